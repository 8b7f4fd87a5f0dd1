"""Fixtures of the tests of judge.py: a pytest plugin, which they load with `pytest_plugins`."""

import pytest
from judge_workplace import (
    ANSWERS,
    KEY,
    OTHER,
    PROMPTS,
    QUESTIONS,
    REFERENCES,
    make_run,
    official_prompts,
    write_answers,
    write_lines,
)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """Questions, references, prompts, and the run `base` with an answer to each question."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    write_lines(tmp_path / "mt/question.jsonl", QUESTIONS)
    write_lines(tmp_path / "mt/judge_prompts.jsonl", PROMPTS)
    write_answers(tmp_path / "mt/reference_answer/gpt-4.jsonl", REFERENCES)
    make_run(tmp_path, "base", ANSWERS)
    return tmp_path


@pytest.fixture
def pairs(workplace):
    """A second run, and prompts for pairs."""
    write_lines(workplace / "mt/judge_prompts.jsonl", list(official_prompts().values()))
    make_run(workplace, "dpo", OTHER)
    return workplace
