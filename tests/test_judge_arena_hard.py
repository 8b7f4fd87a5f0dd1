"""judge.py --bench arena_hard_v0.1 and _v2.0: messages, verdicts, baselines.

test_judge_benches_faults.py has what protects money and work.
"""

import json
import os
import re
from pathlib import Path

import pytest
from doubles import completion
from judge_workplace import KEY, write_lines

import judge
from pref.analysis import arena_hard
from pref.files import arena_hard_download, verdict_labels
from pref.files.console import UserError
from pref.files.disk import read_json
from pref.files.judgements import read_judgements
from pref.judging import bench_arena_hard, benchmark, server_judge
from pref.judging.bench_arena_hard import V01, V20
from pref.judging.reading import Reply
from pref.judging.shape import shape

SYSTEM = {
    "hard_prompt": "Write your own answer, then compare.",
    "creative_writing": "Compare.",
    "arena-hard-v0.1": "Write your own answer first.",
}
BASELINES = {
    "hard_prompt": "o3-mini-2025-01-31",
    "creative_writing": "gemini-2.0-flash-001",
    "arena-hard-v0.1": "gpt-4-0314",
}
TEMPLATE = "<Q>\n{QUESTION}\n<A>\n{ANSWER_A}\n</A>\n<B>\n{ANSWER_B}\n</B>"
QUESTIONS = {  # by version: category and text
    V20: [
        ("hard_prompt", "Sort {x} in C."),
        ("hard_prompt", "Why is 0.1 + 0.2 not 0.3?"),
        ("creative_writing", "A poem about {ANSWER_A}."),
    ],
    V01: [("arena-hard-v0.1", f"Task {number}") for number in range(3)],
}
THEIRS = ["qsort(x, n);", "Binary **fractions**.", "Roses\n- red\n- blue"]
OURS = ["Use qsort on {x}.", "# Why\nFloats are binary.", "Violets."]


def write_bench(folder: Path, bench: str, without: str = "") -> Path:
    """The data folder of a version, as prep_data.py leaves it, `without` one baseline."""
    data = folder / "data" / bench
    questions = [
        {"question_id": i, "uid": f"u{i}", "category": category, "turns": [text]}
        for i, (category, text) in enumerate(QUESTIONS[bench], 1)
    ]
    write_lines(data / "question.jsonl", questions)
    for model in {BASELINES[q["category"]] for q in questions} - {without}:
        write_lines(data / f"baseline/{model}.jsonl", answer_rows(THEIRS, model))
    settings = {c: {"baseline": BASELINES[c], "system_prompt": SYSTEM[c]} for c in SYSTEM}
    content = {"settings": settings, "prompt_template": TEMPLATE}
    (data / "judge_settings.json").write_text(json.dumps(content))
    manifest = {"bench": bench, "questions": "question.jsonl"}
    (data / "manifest.json").write_text(json.dumps(manifest))
    return data


def answer_rows(texts, model) -> list[dict]:
    return [
        {"question_id": i, "model_id": model, "choices": [{"index": 0, "turns": [text]}]}
        for i, text in enumerate(texts, 1)
    ]


def write_run(folder: Path, bench: str, name: str, texts) -> None:
    run = folder / "results" / name
    write_lines(run / bench / "answers.jsonl", answer_rows(texts, name))
    (run / "args.json").write_text("{}")


@pytest.fixture
def arena(tmp_path, monkeypatch):
    """Both versions' data, and the run `dpo` with an answer to each question."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    for bench in (V01, V20):
        write_bench(tmp_path, bench)
        write_run(tmp_path, bench, "dpo", OURS)
    return tmp_path


def command(folder, server, bench, *more) -> list[str]:
    where = ["--bench", bench, "--bench_data", str(folder / "data" / bench)]
    return [str(folder / "results"), *where, "--judge", "big-70b", "--base_url", server.url, *more]


def run_judge(folder, server, bench, *more) -> int:
    return judge.main(command(folder, server, bench, *more))


def rows_of(folder, bench, name="dpo") -> list[dict]:
    return read_judgements(folder / "results" / name / bench / "judgements.csv")


def paid(server) -> list[dict]:
    return server.paid(server_judge.PROBE)


def prefers(*ours, strongly=True):
    """A judge for whom the answers `ours` are much better than all others, or a little."""
    mark = ">>" if strongly else ">"

    def answer(body):
        shown = re.search(r"<A>\n(.*)\n</A>", body["messages"][-1]["content"], re.DOTALL)
        better = "AB" if shown and shown[1] in ours else "BA"
        return completion(f"My final verdict is: [[{better[0]}{mark}{better[1]}]]")

    return answer


# ---- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "label", "how"),
    [
        ("My final verdict is tie: [[A=B]]", "A=B", ""),
        ("first [[A>B]], but my final verdict is [[b>>a]].", "B>>A", "several"),
        ("[[A>B]], so [[A>B]]", "A>B", ""),
        ("[[A<<B]]", "B>>A", ""),
        ("[[B=A]]", "A=B", ""),
        ("[A>>B]", "A>>B", "fallback"),
        ("[B>A] and [[A>B]]", "A>B", ""),  # single brackets count where there are no double ones
        ("<think>[[A>>B]]</think>[[B>A]]", "B>A", ""),
        ("[[AB]]", None, ""),
        ("[[A>B]] [[>]]", None, ""),
        ("A>B", None, ""),
    ],
)
def test_a_label_is_read(text, label, how):
    read = bench_arena_hard.BENCHMARKS[V20].read_reply
    verdict = read(Reply(text, "stop"), {}, "first")
    assert (verdict.label, verdict.reading) == (label, how)
    assert verdict.status == ("ok" if label else "parse")
    expected = {"A>>B": "A", "A>B": "A", "A=B": "tie", "B>A": "B", "B>>A": "B", None: None}
    assert verdict.winner == expected[label]


def test_version_0_1_takes_no_side_between_two_labels():
    old, new = (bench_arena_hard.BENCHMARKS[bench].read_reply for bench in (V01, V20))
    both = Reply("[[A>B]] ... [[A>>B]]", "stop")
    assert old(both, {}, "first").status == "parse"
    assert new(both, {}, "first").label == "A>>B"
    assert old(Reply("[[A=B]] ... [[B=A]]", "stop"), {}, "first").label == "A=B"


@pytest.mark.parametrize("bench", [V01, V20])
def test_a_judgement_that_was_cut_off_has_no_verdict(bench):
    read = bench_arena_hard.BENCHMARKS[bench].read_reply
    assert read(Reply("A is [[A>B]] at first sight, but", "length"), {}, "first").status == "length"
    assert read(Reply("<think>[[A>B]]", "stop"), {}, "first").status == "length"
    assert read(Reply("", "stop"), {}, "first").status == "empty"
    assert read(Reply("[[A>B]]", None), {}, "first").status == "ok"


def test_the_shape_of_an_answer():
    text = (
        "# A\n\n1. one\n2. two\n* three\n**b** and __c__\n```\n# `no`\n- no\n```\n####### no\n- x"
    )
    assert shape(text) == {"chars": len(text), "headers": 1, "lists": 4, "bold": 2}
    assert shape("") == {"chars": 0, "headers": 0, "lists": 0, "bold": 0}
    assert shape("```\n- cut off")["lists"] == 0


# ---- two games -----------------------------------------------------------------------------------


def test_two_games_a_question(arena, server, capsys):
    server.answer = prefers(*OURS)
    assert run_judge(arena, server, V20) == 0
    # 1) What was asked: the category's system prompt; the baseline is A in game 1, B in game 2.
    asked = [body["messages"] for body in paid(server)]
    assert len(asked) == 6
    games = {json.dumps(messages) for messages in asked}
    for (category, question), ours, theirs in zip(QUESTIONS[V20], OURS, THEIRS):
        for a, b in ((theirs, ours), (ours, theirs)):
            user = f"<Q>\n{question}\n<A>\n{a}\n</A>\n<B>\n{b}\n</B>"
            roles = [("system", SYSTEM[category]), ("user", user)]
            games.remove(json.dumps([{"role": r, "content": text} for r, text in roles]))
    assert not games
    assert {(body["temperature"], body["max_tokens"]) for body in paid(server)} == {(0, 16000)}
    # 2) What is written.
    rows = sorted(rows_of(arena, V20), key=lambda r: (r["question_id"], r["order"]))
    assert [(r["question_id"], r["order"], r["label"]) for r in rows] == [
        (q, order, label) for q in (1, 2, 3) for order, label in (("1", "A>>B"), ("2", "B>>A"))
    ]
    assert {r["winner"] for r in rows} == {"dpo"}
    assert [r["baseline"] for r in rows[::2]] == [BASELINES[c] for c, _ in QUESTIONS[V20]]
    shapes = {"run": shape(OURS[2]), "baseline": shape(THEIRS[2])}
    assert json.loads(rows[-1]["shape"]) == shapes
    # 3) What it amounts to, as printed and as the analysis has it.
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("dpo "))
    assert line.split() == [
        "dpo",
        "100.00",
        "%",
        "/",
        "100.00",
        "%",
        "2/2",
        "/",
        "1/1",
        "0",
        "/",
        "0",
        "-",
        "-",
    ]
    hard = [arena_hard.as_game(r) for r in rows if r["baseline"] == BASELINES["hard_prompt"]]
    assert arena_hard.win_rate(hard)[:2] == (100.0, 0.0)
    # 4) A question that is judged twice is one question.
    assert run_judge(arena, server, V20, "--repeats", "2") == 0 and len(paid(server)) == 12
    assert " 2/2 / 1/1 " in capsys.readouterr().out


def test_the_parameters_of_version_0_1(arena, server):
    server.answer = prefers(*THEIRS, strongly=False)
    assert run_judge(arena, server, V01) == 0
    assert {(body["temperature"], body["max_tokens"]) for body in paid(server)} == {(0, 4096)}
    assert {r["baseline"] for r in rows_of(arena, V01)} == {"gpt-4-0314"}
    games = [arena_hard.as_game(row) for row in rows_of(arena, V01)]
    assert arena_hard.win_rate(games, both_games=False)[:2] == (0.0, 0.0)


def test_one_game_is_enough_for_version_0_1(arena, server, capsys):
    """A judge that has a verdict only where the run's answer is A."""

    def answer(body):
        shown = body["messages"][-1]["content"]
        return completion("[[A>B]]" if any(f"<A>\n{text}\n" in shown for text in OURS) else "?")

    server.answer = answer
    for bench, expected in {V01: "100.00 % 3/3 0 3 parse", V20: "- / - 0/2 / 0/1 0 / 0"}.items():
        assert run_judge(arena, server, bench) == 1
        out = capsys.readouterr().out
        assert f"dpo {expected}" in " ".join(out.split())
    games = [arena_hard.as_game(row) for row in rows_of(arena, V01)]
    assert arena_hard.win_rate(games, both_games=False).score == 100
    assert arena_hard.win_rate(games) is None


def test_a_baseline_without_answers(arena, server, capsys):
    write_run(arena, V20, "base", THEIRS)
    (arena / "data" / V20 / "baseline/gemini-2.0-flash-001.jsonl").unlink()
    server.answer = prefers(*OURS)
    assert run_judge(arena, server, V20) == 0
    err = capsys.readouterr().err
    assert "no answers of gemini-2.0-flash-001, the baseline of 1 of 3 questions" in err
    assert {row["question_id"] for row in rows_of(arena, V20)} == {1, 2}
    # With a run as baseline, every question is judged, and nothing is missing.
    assert run_judge(arena, server, V20, "--baseline", "base") == 0
    assert "no answers of" not in capsys.readouterr().err
    versus = [row for row in rows_of(arena, V20) if row["baseline"] == "base"]
    assert {row["question_id"] for row in versus} == {1, 2, 3}
    assert arena_hard.win_rate(map(arena_hard.as_game, versus)).score == 100
    (arena / "data" / V20 / "baseline/o3-mini-2025-01-31.jsonl").unlink()
    with pytest.raises(UserError, match=r"no answers of o3-mini.*--baseline RUN"):
        run_judge(arena, server, V20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": {"hard_prompt": {"baseline": "x"}}}, "'settings' must have"),
        ({"prompt_template": "{QUESTION} {ANSWER_A}"}, "exactly the fields {ANSWER_A}, {ANSWER_B}"),
        ({"prompt_template": None}, "exactly the fields"),
        ({"settings": {"other": {"baseline": "x", "system_prompt": ""}}}, "has category"),
    ],
)
def test_settings_that_cannot_be_used(arena, server, change, message):
    path = arena / "data" / V20 / "judge_settings.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=re.escape(message)):
        run_judge(arena, server, V20)
    assert server.requests == []


def test_files_that_lack_something(arena, server):
    data = arena / "data" / V20
    write_lines(data / "question.jsonl", [{"question_id": 1, "turns": ["Which?"]}])
    with pytest.raises(UserError, match="question 1 has category None"):
        run_judge(arena, server, V20)
    (data / "judge_settings.json").unlink()
    with pytest.raises(UserError, match=r"judge_settings.json: no such file; run python prep_data"):
        run_judge(arena, server, V20)


def test_a_local_judge_takes_the_most_probable_label(arena, tiny_model):
    """A random model: its labels mean nothing, and are few of what it might have written."""
    where = ["--bench", V01, "--bench_data", str(arena / "data" / V01)]
    given = [str(arena / "results"), *where, "--judge", f"hf:{tiny_model}"]
    assert judge.main([*given, "--min_rating_mass", "0"]) == 0
    rows = rows_of(arena, V01)
    assert len(rows) == 6
    for row in rows:
        probabilities = json.loads(row["judgement"])
        assert list(probabilities) == list(verdict_labels.LABELS)
        assert row["label"] == max(probabilities, key=probabilities.get)
        assert row["rating_mass"] == pytest.approx(sum(probabilities.values()))
    assert judge.main(given) == 1, "with too little probability there is no verdict"
    statuses = [row["status"] for row in rows_of(arena, V01)]
    assert sorted(statuses) == ["mass"] * 6 + ["ok"] * 6


# ---- the published files, ARENA_HARD=DIR ---------------------------------------------------------


def test_messages_from_the_published_settings():
    if "ARENA_HARD" not in os.environ:
        pytest.skip("ARENA_HARD is not set")
    path = Path(os.environ["ARENA_HARD"]) / "judge_settings.json"
    content = arena_hard_download.check_settings(read_json(path), str(path))
    settings = content["settings"]
    prompt = {**settings["hard_prompt"], "prompt_template": content["prompt_template"]}
    fields = {"QUESTION": "Q {x}", "ANSWER_A": "a {ANSWER_B}", "ANSWER_B": "b"}
    system, user = benchmark.fill(prompt, fields)
    assert system == {"role": "system", "content": settings["hard_prompt"]["system_prompt"]}
    assert user["content"] == (
        "<|User Prompt|>\nQ {x}\n\n<|The Start of Assistant A's Answer|>\na {ANSWER_B}\n"
        "<|The End of Assistant A's Answer|>\n\n<|The Start of Assistant B's Answer|>\nb\n"
        "<|The End of Assistant B's Answer|>"
    )
