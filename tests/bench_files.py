"""Small files in the form of AlpacaEval's, Arena-Hard's, LLMBar's and the human votes'.

Their texts are the tests' own, so that prep_data.py must be told to take them (--allow_modified),
or their hashes be made the known ones.
"""

import json
from pathlib import Path

SYSTEM = "Judge fairly. Label: [[A>>B]]"
CODE = """
import nothing_that_exists
FIRST = "Judge fairly. Label: [[A>>B]]"
JUDGE_SETTINGS = {
    "hard_prompt": {"baseline": "o3-mini-2025-01-31", "system_prompt": FIRST},
    "creative_writing": {"baseline": "gemini-2.0-flash-001", "system_prompt": "Enjoy it."},
    "arena-hard-v0.1": {"baseline": "gpt-4-0314", "system_prompt": FIRST},
}
def unused():
    raise SystemExit("this code is never run")
unused()
"""
TEMPLATE = "<Q>{QUESTION}</Q>\\n<A>{ANSWER_A}</A>\\n<B>{ANSWER_B}</B>"  # as YAML quotes it
CONFIG = f'judge_model: x\nprompt_template: "{TEMPLATE}"\nmodel_list:\n  - y\n'


def write_json(path: Path, value) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def outputs(count: int = 4) -> list[dict]:
    """AlpacaEval's baseline."""
    return [
        {
            "dataset": ("koala", "vicuna")[i % 2],
            "instruction": f"Name {i} things.",
            "output": f" Thing {i}\n",
            "generator": "gpt4_1106_preview",
        }
        for i in range(count)
    ]


def alpaca_eval(folder: Path, rows: list[dict] | None = None) -> Path:
    write_json(folder / "alpaca_eval_gpt4_baseline.json", outputs() if rows is None else rows)
    prompt = "<|im_start|>user\n{instruction} m: {output_1} M: {output_2}<|im_end|>"
    (folder / "alpaca_eval_clf.txt").write_text(prompt)
    (folder / "df_gamed.csv").write_text(
        "preference,index,std_delta_len,instruction_difficulty\n0.5,0,1,0\n"
    )
    return folder


def arena_questions(version: str, count: int = 3) -> list[dict]:
    if version == "v0.1":
        about = {"category": "arena-hard-v0.1", "cluster": "Sums"}
    else:
        about = {"category": "hard_prompt", "subcategory": "math"}
    return [{"uid": f"u{i}", **about, "prompt": f"What is {i} + {i}?"} for i in range(count)]


def arena_answers(model: str, questions: list[dict]) -> list[dict]:
    """In another order than the questions."""
    return [
        {
            "uid": question["uid"],
            "ans_id": "x",
            "model": model,
            "messages": [
                {"role": "user", "content": question["prompt"]},
                {"role": "assistant", "content": {"answer": f"{model}: {question['uid']}"}},
            ],
            "tstamp": 1.5,
        }
        for question in reversed(questions)
    ]


def arena_hard(folder: Path, version: str, *models: str) -> Path:
    """As the repository has them."""
    data, questions = folder / f"data/arena-hard-{version}", arena_questions(version)
    write_lines(data / "question.jsonl", questions)
    for model in models:
        write_lines(data / f"model_answer/{model}.jsonl", arena_answers(model, questions))
    (folder / "utils").mkdir(parents=True)
    (folder / "utils/judge_utils.py").write_text(CODE)
    (folder / "config").mkdir()
    (folder / f"config/arena-hard-{version}.yaml").write_text(CONFIG)
    return folder


def votes() -> dict[str, list[dict]]:
    """The rows of both splits, with the conversations."""

    def row(judge: str, question: int, turn: int, a: str, b: str, winner: str) -> dict:
        talks = {
            f"conversation_{side}": [
                {"role": role, "content": f"{role} {model if role == 'assistant' else ''} {n}"}
                for n in (1, 2)
                for role in ("user", "assistant")
            ]
            for side, model in (("a", a), ("b", b))
        }
        return {
            "question_id": question,
            "model_a": a,
            "model_b": b,
            "winner": winner,
            "judge": judge,
            **talks,
            "turn": turn,
        }

    human = [
        row("expert_1", 82, 1, "llama", "alpaca", "tie"),
        row("author_0", 81, 2, "alpaca", "llama", "model_b"),
    ]
    gpt4 = [row("gpt4_pair", 81, 2, "alpaca", "llama", "tie (inconsistent)")]
    return {"human": human, "gpt4_pair": gpt4}


def llmbar(folder: Path) -> Path:
    names = ["Natural", *(f"Adversarial_{n}" for n in ("GPTInst", "GPTOut", "Manual", "Neighbor"))]
    for name in names:
        row = {"input": f"Say {name}.", "output_1": name, "output_2": "No.", "label": 1}
        write_json(folder / f"{name}.json", [row])
    return folder
