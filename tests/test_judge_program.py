"""judge.py --judge py:FILE: scores by a task's function, through the same store as any judge."""

import importlib.util
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import closing

import pytest
from conftest import ROOT, write_jsonl
from judge_workplace import ANSWERS, QUESTIONS, options
from task_files import WORDS, write_answers, write_task

import judge
import prep_data
from pref.files import disk, tasks
from pref.files.console import UserError
from pref.files.judgements import read_judgements
from pref.judging import benchmarks, calls, judges, store

pytest_plugins = ("judge_fixtures",)

TEXTS = ["", "one", "one two three", "a b c d e f g", "w " * 40, "größer als \u202e 漢字 \x00"]
LINES = [f'{{"question_id": {n}, "turns": ["Question {n}"], "most": {n}}}\n' for n in range(100)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A task with its data, and the answers of two runs to both sets."""
    folder = tmp_path_factory.mktemp("words")
    task, out = write_task(folder), folder / "data/words"
    prep_data.main([*options(task=task, num_train=6, num_test=5, out=out)])
    for number, run in enumerate(("base", "dpo_b0.1_s42")):
        for name, file in {"words": "test", "words_train": "train"}.items():
            questions = out / f"{file}_questions.jsonl"
            write_answers(folder / "results" / run, name, questions, TEXTS[number:], choices=4)
    return folder


@pytest.fixture
def folder(prepared, tmp_path, monkeypatch):
    """A copy of it, in which commands run."""
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def score(bench: str, *more: str, task: str = "words.py") -> int:
    return judge.main(["results", "--bench", bench, "--judge", f"py:{task}", *more])


def rows_of(bench: str, run: str = "base") -> list[dict]:
    return read_judgements(disk.Path("results") / run / bench / "judgements.csv")


def by_script(bench: str, file: str, run: str = "base") -> dict:
    """What twenty lines that know nothing of the toolkit make of the same answers."""
    spec = importlib.util.spec_from_file_location("task", "words.py")
    task = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(task)
    with open(f"data/words/{file}_questions.jsonl", encoding="utf-8") as lines:
        questions = {row["question_id"]: row for row in map(json.loads, lines)}
    scores = {}
    with open(f"results/{run}/{bench}/answers.jsonl", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            question = questions[row["question_id"]]
            for choice in row["choices"]:
                key = (row["question_id"], choice["index"])
                (text,) = choice["turns"]
                scores[key] = (task.score(question, text), task.explain(question, text), text)
    return scores


@pytest.mark.parametrize(
    ("bench", "name", "file"),
    [("words", "words", "test"), ("data/words/train_questions.jsonl", "words_train", "train")],
)
def test_scores_are_those_of_a_script_of_its_own(folder, capsys, bench, name, file):
    assert score(bench) == 0
    lines = capsys.readouterr().out.splitlines()
    for run in ("base", "dpo_b0.1_s42"):
        rows, expected = rows_of(name, run), by_script(name, file, run)
        found = {(row["question_id"], row["choice"]): row for row in rows}
        assert len(rows) == len(expected) == {"test": 20, "train": 24}[file]
        assert found.keys() == expected.keys()
        for key, (number, words, _) in expected.items():
            assert found[key]["score"] == number
            assert json.loads(found[key]["judgement"]) == words
        assert {(r["grading"], r["judge"], r["bench"], r["status"]) for r in rows} == {
            ("program", "py:words.py", name, "ok")
        }
        assert {row["category"] for row in rows} == {"strict", "loose"}
        mean = sum(number for number, _, _ in expected.values()) / len(expected)
        (line,) = (line for line in lines if line.startswith(f"{run} "))
        assert line.split()[1:3] == [f"{mean:.4f}", f"{len(rows)}/{len(rows)}"]
    with tasks.open_task("words.py") as task:
        settings = {"method": "program", **task.identity}
    assert json.loads(rows[0]["judge_settings"]) == settings


def test_scores_become_pairs_of_the_answers(folder, capsys):
    assert score("words_train") == 0
    (line,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("next: "))
    assert line == "next: python prep_data.py --from_answers results/RUN/words_train"
    prep_data.main(line.replace("RUN", "base").split()[3:])
    scores = defaultdict(dict)  # of what can be trained on
    for (number, _), (value, _, text) in by_script("words_train", "train").items():
        if text.strip() and "\0" not in text:
            scores[number][text] = value
    found = {}
    for side in ("train", "val"):
        path = folder / "results/base/words_train/pairs" / f"{side}.jsonl"
        for _, row in disk.read_jsonl(path):
            texts = [row[name][0]["content"] for name in ("chosen", "rejected")]
            found[row["question_id"]] = [scores[row["question_id"]][text] for text in texts]
    assert found == {
        number: [max(by_text.values()), min(by_text.values())]
        for number, by_text in scores.items()
        if len(set(by_text.values())) > 1
    }
    assert len(found) > 3


def test_words_of_any_characters_are_kept(folder):
    """explain that gives the answer back, with a lone surrogate and a NUL."""
    strange = '"\ud800 \x00 \r\n , é \U0001f600 \u2028'
    text = WORDS.replace('"text": f"', f'"text": {strange!r} + answer + f"')
    text = text.replace(
        "over = max", f"if answer == 'one': raise ValueError({strange!r})\n    over = max"
    )
    write_task(folder, text)
    assert score("words") == 1
    for row in rows_of("words"):
        if row["status"] == "ok":
            assert json.loads(row["judgement"])["text"].startswith(strange)
        else:
            assert '"\\ud800 ' in row["judgement"] and "é" in row["judgement"]
    assert {row["status"] for row in rows_of("words")} == {"ok", "program_error"}


def test_what_is_scored_is_not_scored_again_and_the_path_is_no_matter(folder, monkeypatch, capsys):
    assert score("words") == 0
    asked = []
    monkeypatch.setattr(tasks.Task, "score_some", lambda self, answers: asked.append(answers))
    (folder / "link").symlink_to(folder)
    for path in ("./words.py", str(folder / "words.py"), "data/../words.py", "link/words.py"):
        assert score("words", task=path) == 0
    assert not asked and "0 to make" in capsys.readouterr().out
    assert judges.recorded_name("py:link/words.py") == "py:words.py"
    assert len({row["judge_id"] for row in rows_of("words")}) == 1
    assert store.judgement_counts(folder / "results", "py:words.py", "words")["base"] == (20, 0)


def test_another_version_of_the_task_is_another_judge(folder):
    assert score("words") == 0
    before = {(row["question_id"], row["choice"]): row["score"] for row in rows_of("words")}
    write_task(folder, WORDS.replace("1 / (1 + over)", "1 / (1 + over) / 2"))
    # The checker's fields are no part of what the model was asked, and decide the score.
    path = folder / "data/words/test_questions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    write_jsonl(path, [row | {"most": 0} for row in rows[:1]] + rows[1:])
    assert score("words") == 0
    by_judge: dict[str, dict] = {}
    for row in rows_of("words"):
        of_judge = by_judge.setdefault(row["judge_id"], {})
        of_judge[row["question_id"], row["choice"]] = row["score"]
    old, new = sorted(by_judge.values(), key=lambda scores: -sum(scores.values()))
    assert old == before
    assert new == {key: number for key, (number, *_) in by_script("words", "test").items()}
    assert new[2, 0] == before[2, 0] / 2 and new[1, 1] < before[1, 1] / 2


def test_faults_are_failures_with_reasons_and_can_be_tried_again(folder, capsys, monkeypatch):
    text = WORDS.replace(
        "over = max", "if len(answer) == 3: raise ValueError('three')\n    over = max"
    )
    write_task(folder, text)
    assert score("words") == 1
    rows = rows_of("words")
    failed = [row for row in rows if row["status"] == "program_error"]
    assert failed and all(row["score"] is None for row in failed)
    assert all(
        "words.py:" in row["judgement"] and "ValueError: three" in row["judgement"]
        for row in failed
    )
    assert {row["status"] for row in rows} == {"ok", "program_error"}
    printed = capsys.readouterr().out
    assert f"{len(failed)} program_error" in printed and "column judgement" in printed
    asked = []
    some = tasks.Task.score_some
    monkeypatch.setattr(
        tasks.Task, "score_some", lambda task, answers: asked.extend(answers) or some(task, answers)
    )
    assert score("words") == 1 and not asked
    assert score("words", "--retry_failed") == 1
    assert {answer for _, answer in asked} == {"one"}


@pytest.mark.parametrize(
    "value",
    [
        "random.random()",
        # What it has scored before decides, which is the same in two processes.
        "seen.append(1) or len(seen) % 7 / 7",
        "seen.append(answer) or float(seen.count(answer) > 1)",
    ],
    ids=["draws", "counts", "has seen"],
)
def test_a_task_that_gives_an_answer_two_scores_is_refused(folder, value):
    write_task(folder, "seen = []\n" + WORDS.replace("1 / (1 + over)", value))
    with pytest.raises(UserError, match="gives .* and .* for the same answer"):
        score("words")
    with closing(sqlite3.connect("results/judgements.sqlite")) as db:
        assert db.execute("SELECT COUNT(*) FROM judgements").fetchone() == (0,)


def test_a_task_that_always_fails_stops_the_command(folder, capsys):
    write_many(folder)
    write_task(folder, WORDS.replace("over = max", "over = answer.no_such"))
    with pytest.raises(
        UserError, match=r"none of the first 20 replies .*20 program_error"
    ) as caught:
        score("many.jsonl")
    assert "AttributeError" in str(caught.value) and "question 0" in str(caught.value)
    rows = rows_of("many")
    assert len(rows) == calls.NO_VERDICT_AFTER


def write_many(folder):
    """Thirty questions in a file of the user's own, and answers as other programs write them."""
    (folder / "many.jsonl").write_text("".join(LINES))
    rows = [
        {"question_id": n, "choices": [{"index": 0, "turns": [f"answer {n}"]}]}
        for n in range(len(LINES))
    ]
    write_jsonl(folder / "results/base/many/answers.jsonl", rows)


def test_answers_that_take_for_ever_stop_the_command(folder, monkeypatch):
    """The first ones have a score, so that it is no matter of the judge as a whole."""
    write_many(folder)
    loops = "while question['question_id'] > 3: pass\n    over = max"
    write_task(folder, WORDS.replace("over = max", loops))
    monkeypatch.setattr("pref.judging.program_judge.GIVE_UP_AFTER", 1)
    monkeypatch.setattr("pref.judging.program_judge.CHECKED_S", 0)
    monkeypatch.setitem(tasks.open_task.__kwdefaults__, "seconds", 0.25)
    with pytest.raises(UserError, match="2 answers in a row took too long.*question 5.*next ans"):
        score("many.jsonl")
    assert [row["status"] for row in rows_of("many")] == ["ok"] * 4 + ["program_timeout"]


def test_any_benchmarks_answers_can_be_scored(workplace, tmp_path):
    """MT-Bench: each turn, with the question's row up to it."""
    text = """
        def questions(*_): return []
        def score(question, answer): return len(question["turns"]) / 2
        def explain(question, answer):
            return {"text": " | ".join([question["category"], *question["turns"], answer])}
    """.replace("\n        ", "\n")
    task = write_task(tmp_path / "t", text, "turns.py")
    command = [
        str(workplace / "results"),
        "--mt_bench",
        str(workplace / "mt"),
        "--judge",
        f"py:{task}",
    ]
    assert judge.main([*command, "--allow_incomplete"]) == 0
    rows = read_judgements(workplace / "results/base/mt_bench/judgements.csv")
    assert len(rows) == 6
    asked = {question["question_id"]: question for question in QUESTIONS}
    for row in rows:
        number, turn = row["question_id"], row["turn"]
        assert row["score"] == turn / 2
        seen = [
            asked[number]["category"],
            *asked[number]["turns"][:turn],
            ANSWERS[number][turn - 1],
        ]
        assert json.loads(row["judgement"])["text"] == " | ".join(seen)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--bench", "words", "--judge", "gpt-5"], "has no prompts for it"),
        (["--bench", "words", "--judge", "hf:x"], "has no prompts for it"),
        (["--bench", "words", "--judge", "py:no.py"], "no.py: no such file"),
        (["--bench", "words", "--judge", "py:"], "--judge is missing"),
        (["--bench", "other", "--judge", "py:words.py"], "data/other: no such folder"),
        (["--bench", "other.jsonl", "--judge", "py:words.py"], "no such file of questions"),
        (["--bench", "words", "--judge", "py:words.py", "--baseline", "base"], "by itself"),
        (["--bench", "words", "--judge", "py:words.py", "--repeats", "2"], "same score again"),
        (["--bench", "words", "--judge", "py:words.py", "--max_usd", "2"], "costs nothing"),
        (["--bench", "words", "--judge", "py:words.py", "--max_tokens", "2"], "writes no text"),
        (["--bench", "words", "--judge", "py:words.py", "--verdict", "last"], "py:FILE"),
        (["--bench", "words", "--judge", "py:words.py", "--base_url", "http://x"], "py:FILE"),
        (["--validate", "--judge", "py:words.py"], "--validate compares"),
    ],
)
def test_what_makes_no_sense_is_refused(folder, arguments, says):
    with pytest.raises(UserError) as caught:
        judge.main(["results", *arguments])
    assert says in str(caught.value)
    assert not (folder / "results/judgements.sqlite").exists()


def test_a_reward_model_may_score_the_answers_to_a_tasks_questions(folder):
    args = judge.parse_args(["results", "--bench", "words_train", "--judge", "rm:some/model"])
    bench = benchmarks.read_bench(args)
    assert (bench.name, bench.grading, len(bench.questions)) == ("words_train", "reward", 6)
    assert bench.question_file.name == "train_questions.jsonl" and list(bench.turns) == [1]


def test_questions_of_several_lengths_are_refused(folder):
    rows = [{"question_id": n, "turns": ["Why?"] * n} for n in (1, 2)]
    write_jsonl(folder / "mixed.jsonl", rows)
    with pytest.raises(UserError, match="questions of 1 and of 2 turns"):
        score("mixed.jsonl")


def test_a_dry_run_costs_and_scores_nothing(folder, capsys):
    assert score("words", "--dry_run") == 0
    printed = capsys.readouterr().out
    assert "40 judgements of 2 runs" in printed and "no dollars" in printed
    assert not (folder / "results/base/words/judgements.csv").exists()
    assert (
        judge.main(["--bench", "words", "--judge", "py:words.py", *options(runs=3), "--dry_run"])
        == 0
    )
    assert "15 scores" in capsys.readouterr().out


def test_a_judge_that_is_killed_goes_on_where_it_was(folder):
    """kill -9 while it scores: what is in the store is not scored again, and nothing is lost."""
    write_many(folder)
    kills = """import os
    with open("log", "a") as log:
        log.write(f"{question['question_id']} ")
    if question["question_id"] == 80 and not os.path.exists("killed"):
        open("killed", "w").close()
        os.kill(os.getppid(), 9)
    over = max"""
    write_task(folder, WORDS.replace("over = max", kills))
    child = os.fork()
    if child == 0:
        score("many.jsonl")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    with closing(sqlite3.connect("results/judgements.sqlite")) as db:
        rows = db.execute("SELECT question_id FROM judgements JOIN asked USING (request_sha256)")
        before = {number for (number,) in rows}
    assert 1 < len(before) <= 80
    time.sleep(0.1)  # the task's process has seen the end of its requests
    (folder / "log").unlink()
    assert score("many.jsonl") == 0
    again = {*map(int, (folder / "log").read_text().split())}
    assert again == {*range(len(LINES))} - before
    with tasks.open_task(write_task(folder)) as task:
        questions = [json.loads(line) for line in LINES]
        expected = [task.score(row, f"answer {n}").score for n, row in enumerate(questions)]
    assert [row["score"] for row in rows_of("many")] == expected


def test_judging_by_a_program_loads_no_torch(folder):
    code = "import sys, judge; judge.main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    command = ["results", "--bench", "words", "--judge", "py:words.py"]
    done = subprocess.run([sys.executable, "-c", code, *command], env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0
