"""Tasks: whatever their code does, a score is a number from 0 to 1 or a reason, and the next call
works; and prep_data.py --task, which checks them and writes their questions.
"""

import json
import os
import re
import time
from importlib import metadata
from types import SimpleNamespace

import pytest
from conftest import ROOT
from task_files import LIARS, WORDS, liar, write_answers, write_task

import prep_data
from pref.answering.questions import load_bench
from pref.files import benchmarks, disk, task_child, task_data, tasks
from pref.files.console import UserError
from pref.files.tasks import Scored, TaskFault

README = ROOT / "pref" / "files" / "README.md"
QUESTION = {"question_id": 7, "turns": ["Say hello."], "most": 2, "category": "strict"}


# ---- one process ---------------------------------------------------------------------------------


def test_scores_and_words_are_those_of_the_function(tmp_path):
    with tasks.open_task(write_task(tmp_path)) as task:
        assert task.score(QUESTION, "Hello there") == Scored(
            1.0, "2 words of 2", {"forgiving": 1.0}
        )
        answers = [(QUESTION, "word " * (n % 12)) for n in range(300)]
        scores = task.score_many(answers)
    assert [scored.score for scored in scores] == [1 / (1 + max(0, n % 12 - 2)) for n in range(300)]
    assert [scored.scores["forgiving"] for scored in scores] == [n % 12 < 9 for n in range(300)]


def test_a_lie_has_a_reason_and_the_next_answer_a_score(tmp_path):
    path = write_task(tmp_path, liar(*LIARS), "liar.py")
    with tasks.open_task(path, seconds=0.3, memory_mib=512) as task:
        told = [text for name in LIARS for text in (name, "the truth")]
        results = task.score_many([(QUESTION, text) for text in told])
        process = task.process
    assert results[1::2] == [Scored(0.5)] * len(LIARS)
    for name, fault in zip(LIARS, results[::2]):
        _, status, says = LIARS[name]
        assert isinstance(fault, TaskFault) and fault.status == f"program_{status}", name
        assert fault.text.startswith("liar.py: question 7: ") and says in fault.text, name
        assert "\n" not in fault.text and fault.text.count("; ") == 1, name  # the remedy
    assert process.poll() is not None


# What explain does, by answer.
EXPLANATIONS = [
    ("raise KeyError('x')", "error", "KeyError: 'x'"),
    ("return 'fine'", "error", "gave the text 'fine', not a dict"),
    ("return {'words': 'fine'}", "error", "gave the keys words"),
    ("return {'text': 3}", "error", "'text' must be text"),
    ("return {'scores': {'loose': 7}}", "range", "explain(...)'s loose gave 7"),
    ("return {'text': 'x' * 2 ** 21}", "output", "1 MiB"),
]


def test_an_explanation_that_fails_is_a_failure(tmp_path):
    text = "def questions(*_): pass\ndef score(q, a): return 1\ndef explain(q, a):\n"
    text += "".join(f"    if a == '{n}': {body}\n" for n, (body, *_) in enumerate(EXPLANATIONS))
    with tasks.open_task(write_task(tmp_path, text)) as task:
        faults = task.score_many([(QUESTION, str(n)) for n in range(len(EXPLANATIONS))])
    for (body, status, says), fault in zip(EXPLANATIONS, faults, strict=True):
        assert isinstance(fault, TaskFault), body
        assert fault.status == f"program_{status}" and says in fault.text, body


def test_a_task_may_change_its_question_and_fork(tmp_path):
    text = """
        import os
        def questions(*_): pass
        def score(question, answer):
            child = os.fork()
            if child == 0:
                if answer == "hang":
                    while True: pass
                return 0  # a child that comes back is not listened to
            open("child", "w").write(str(child))
            question["most"] -= 1
            return question["most"] / 2
        def explain(question, answer):
            return {"text": str(question["most"])}
    """.replace("\n        ", "\n")
    with tasks.open_task(write_task(tmp_path, text)) as task:
        assert task.score(QUESTION, "") == task.score(QUESTION, "hang") == Scored(0.5, "2")
        child = int((tmp_path / "child").read_text())
        assert is_running(child) and not task.late_files
    assert QUESTION["most"] == 2 and has_ended(child)


def has_ended(pid: int) -> bool:
    """Whether a process ends within 30 s: much less than that on an idle machine."""
    until = time.monotonic() + 30
    while is_running(pid) and time.monotonic() < until:
        time.sleep(0.01)
    return not is_running(pid)


def test_the_process_has_no_keys_and_none_of_the_toolkit(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    text = """
        import json, os, sys
        def questions(*_):
            print("a word")
            found = {"environment": sorted(os.environ), "path": sys.path, "argv": sys.argv}
            return [found | {"cwd": os.getcwd(), "pref": "pref" in sys.modules}]
        def score(*_): return 0
    """.replace("\n        ", "\n")
    path = write_task(tmp_path, text)
    with tasks.open_task(path) as task:
        (row,) = task.questions("train", 1, 0)
    assert not any("KEY" in name for name in row["environment"])
    assert row["path"][0] == row["cwd"] == str(tmp_path) and row["argv"] == [str(path)]
    assert not row["pref"] and os.path.dirname(task_child.__file__) not in row["path"]


# A regular expression that takes for ever, and lets no other Python code run meanwhile.
BACKTRACKS = """
import re
def questions(*_): pass
def score(*_): return bool(re.match("(a+)+$", "a" * 60 + "b")) / 2
"""


def test_a_process_whose_parent_is_gone_ends_by_itself(tmp_path):
    path = write_task(tmp_path, BACKTRACKS)
    child = os.fork()
    if child == 0:
        task = tasks.Task(path, seconds=0.2 - tasks.GRACE_SECONDS, memory_mib=512, hash_seed=0)
        (tmp_path / "pid").write_text(str(task.process.pid))
        line = tasks.encode({"score": [QUESTION, "x"]})
        os.write(task.requests, line)
        time.sleep(0.1)
        os._exit(0)
    os.waitpid(child, 0)
    pid = int((tmp_path / "pid").read_text())
    assert has_ended(pid)


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# ---- what is no task -----------------------------------------------------------------------------

SCORE = "def score(question, answer): return 1\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def score(:\n", "words.py:1: not valid Python"),
        ("import no_such_module\n" + SCORE, "words.py:1: ModuleNotFoundError: No module named"),
        (SCORE, "has no function questions"),
        (SCORE + "def questions(*_): pass\nexplain = 3\n", "explain is no function"),
        (SCORE + "def questions(*_): pass\nGENERATION = {'top_p': 1}\n", "unknown top_p"),
        (SCORE + "def questions(*_): pass\nGENERATION = {'temperature': -1}\n", "'temperature'"),
        ("import os; os._exit(5)\n", "ends its own process (exit code 5)"),
    ],
)
def test_a_file_that_is_no_task_is_refused(tmp_path, text, says):
    with pytest.raises(UserError, match="words.py") as caught:
        tasks.open_task(write_task(tmp_path, text))
    assert says in str(caught.value)


def test_a_path_that_is_no_file_is_refused(tmp_path):
    (tmp_path / "words.txt").write_text(WORDS)
    for name, says in {
        "no.py": "no such file",
        ".": "is a folder",
        "words.txt": "end with .py",
    }.items():
        with pytest.raises(UserError, match=says):
            tasks.path_of(f"py:{tmp_path / name}")


# What questions returns, by the number that is asked for.
NO_QUESTIONS = [
    ("'abc'", "gave the text 'abc', not a list"),
    ("[1]", "row 1 is a value of type int, not a dict"),
    ("[{'x': {1, 2}}]", "row 1 is no JSON"),
    ("[{'x': float('nan')}]", "row 1 is no JSON"),
    ("(_ for _ in ()).throw(OSError('gone'))", "OSError: gone (questions('test', 4, 1))"),
]


def test_questions_that_are_none_are_a_fault(tmp_path):
    text = f"{SCORE}def questions(split, number, seed):\n"
    text += "".join(f"    if number == {n}: return {x}\n" for n, (x, _) in enumerate(NO_QUESTIONS))
    with tasks.open_task(write_task(tmp_path, text)) as task:
        for number, (_, says) in enumerate(NO_QUESTIONS):
            with pytest.raises(TaskFault) as caught:
                task.questions("test", number, 1)
            assert says in caught.value.text and caught.value.status == "program_error"


# ---- identity ------------------------------------------------------------------------------------


def test_the_identity_is_what_the_scores_depend_on(tmp_path):
    text = (
        "import json, packaging\nimport helper\nfrom pathlib import Path\n"
        "KNOWN = Path(__file__).with_name('known.txt').read_text()\n"
        "def questions(*_): pass\n"
        "def score(*_):\n    import late\n    open('later.txt').read()\n    return 1\n"
    )
    path = write_task(tmp_path / "a", text)
    write_task(tmp_path / "a", "import deeper\n", "helper.py")
    for name in ("deeper.py", "late.py", "other.py", "known.txt", "later.txt"):
        write_task(tmp_path / "a", "", name)
    with tasks.open_task(path) as task:
        assert task.score(QUESTION, "").score == 1
        assert task.late_files == {"later.txt"} and "later.txt" in tasks.late_file_note("later.txt")
    files = ("deeper.py", "helper.py", "known.txt", "late.py", "words.py")
    assert task.identity == {
        "file": "words.py",
        "sha256": {name: disk.sha256_file(tmp_path / "a" / name) for name in files},
        "packages": {"packaging": metadata.version("packaging")},
    }
    # Another path to the same is the same; other content is not.
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with tasks.open_task(tmp_path / "b" / ".." / "b" / "words.py") as again:
        assert again.identity == task.identity
    (tmp_path / "a" / "known.txt").write_text("more")
    with tasks.open_task(path) as again:
        assert again.identity != task.identity


def test_a_task_that_is_edited_while_it_is_used_is_refused_when_it_starts_again(tmp_path):
    path = write_task(tmp_path, liar("ends"))
    with tasks.open_task(path) as task:
        assert task.score_some([(QUESTION, "ends")])[0].status == tasks.ERROR
        path.write_text(liar("ends").replace("0.5", "0.6"))
        with pytest.raises(UserError, match="was changed meanwhile"):
            task.score(QUESTION, "a")


# ---- prep_data.py --task -------------------------------------------------------------------------


def test_the_questions_are_written_and_found_by_name_and_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_task(tmp_path)
    command = ["--task", "words.py", "--num_train", "8", "--num_test", "5", "--seed", "3"]
    prep_data.main([*command, "--check"])
    assert not (tmp_path / "data").exists()
    prep_data.main(command)
    printed = capsys.readouterr().out
    assert "8 train + 5 test questions of 2 categories" in printed and "ms a score" in printed
    manifest = disk.read_json(tmp_path / "data/words/manifest.json")
    assert manifest["task"]["numbers"] == {"train": 8, "test": 5} and manifest["task"]["seed"] == 3
    assert manifest["task"]["identity"]["sha256"] == {"words.py": disk.sha256_file("words.py")}
    assert manifest["generation"] == {"temperature": 1.0, "max_new_tokens": 20}
    for name, file, count in (("words", "test", 5), ("words_train", "train", 8)):
        path = tmp_path / f"data/words/{file}_questions.jsonl"
        assert manifest["files"][path.name]["sha256"] == disk.sha256_file(path)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert [row["turns"][0].split(":")[0] for row in rows] == [
            f"{file} {n}" for n in range(1, count + 1)
        ]
        for bench in (load_bench(name), load_bench(file=path)):
            assert (bench.name, bench.max_new_tokens) == (name, 20)
            assert [row.pop("temperature") for row in bench.questions] == [1.0] * count
            assert bench.questions == rows
        assert benchmarks.task_file(bench.folder) == "words.py"


def test_the_example_in_the_readme_passes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (text,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    write_task(tmp_path, text)
    prep_data.main(["--task", "words.py", "--num_train", "8", "--num_test", "5", "--check"])
    assert "8 train + 5 test questions of one category" in capsys.readouterr().out


# What of WORDS is replaced, by what, and what the message says.
BROKEN = {
    "set order": ('("strict", "loose")', "list({'strict', 'loose', 'x', 'y'})", "other rows"),
    "both splits": ('f"{split} {n}:', 'f"{n}:', "prompt of train question 1; .*in both splits"),
    "remembers": ("1 / (1 + over)", "1 / (SEEN.append(1) or len(SEEN))", "for the same answer"),
    "by chance": ('f"{count} words', 'f"{random.random()} words', "explain.* different words"),
    "no empty answer": ("over = max", "answer.split()[0]; over = max", "IndexError"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_task_that_does_not_pass_writes_nothing(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    old, new, says = BROKEN[name]
    assert old in WORDS
    text = WORDS.replace(old, new).replace("import random", "import random\n\nSEEN = []")
    if name == "both splits":
        text = text.replace("{split} {seed}", "{seed}")
    write_task(tmp_path, text)
    with pytest.raises(UserError, match=says):
        prep_data.main(["--task", "words.py", "--num_train", "8", "--num_test", "5"])
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"question_id": 1}, "row 2: has the question_id 1 of row 1"),
        ({"question_id": "2"}, "row 2: 'question_id' must be a whole number"),
        ({"category": None}, "row 2: 'category' must be text"),
        ({"turns": ["a", "b"]}, "row 2: has 2 turns"),
        ({"turns": [" "]}, "row 2: 'turns' must be a list of non-empty strings"),
        ({"temperature": 1}, "row 2: has 'temperature'"),
        (None, "gave 1 rows, not 2; ask for 1 at most"),
    ],
)
def test_rows_that_are_no_questions_are_refused(change, says):
    rows = [{"question_id": n, "category": "x", "turns": [f"Ask {n}"]} for n in (1, 2)]
    rows = rows[:1] if change is None else [rows[0], rows[1] | change]
    with pytest.raises(UserError) as caught:
        task_data.check_rows(rows, "words.py", 2)
    assert f"words.py: {says}" in str(caught.value)


def test_rates_mark_categories_that_teach_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_task(tmp_path)
    command = ["--task", "words.py", "--num_train", "8", "--num_test", "5"]
    prep_data.main(command)
    file = tmp_path / "data/words/train_questions.jsonl"
    run = tmp_path / "results/base"
    write_answers(run, "words_train", file, ["one two", "one two three four"])
    capsys.readouterr()
    prep_data.main([*command, "--check", "--answers", "results/base/words_train"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    # "strict" allows two words: 1 and 1/3 for each question; "loose" allows six.
    assert [
        "loose",
        "4",
        "8",
        "1.000",
        "1.00",
        "0.00",
        "0",
        *["always", "met:", "teaches", "nothing"],
    ] in lines
    assert ["strict", "4", "8", "0.667", "0.50", "0.00", "4"] in lines

    # Other questions, and the answers to another set.
    file.write_text(file.read_text().replace("at most", "no more than"))
    task = SimpleNamespace(name="words", path=tmp_path / "words.py")
    for name, says in {"words_train": "question 1 is not the one", "x": "words_train or"}.items():
        with pytest.raises(UserError, match=says):
            task_data.read_real_answers(task, run / name, file.parent)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--check"], "only with --task"),
        (["--num_test", "3"], "only with --task"),
        (["--task", "words.py", "--num_test", "0"], "at least 1"),
        (["--task", "llmbar.py"], "rename the file"),
        (["--task", "words_train.py"], "rename the file"),
        (["--task", "words.py", "--out", "other"], "holds other data"),
    ],
)
def test_arguments_that_cannot_work_are_refused(tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    for name in ("words.py", "llmbar.py", "words_train.py"):
        write_task(tmp_path, name=name)
    disk.write_json(tmp_path / "other/manifest.json", {"pairs": {"train": 3}})
    with pytest.raises(UserError, match=says):
        prep_data.main(arguments)


def test_made_up_answers_reach_every_category():
    rows = {"train": [{"category": f"c{n % 40}", "question_id": n} for n in range(100)]}
    chosen = task_data.made_up_answers(rows)
    assert {row["category"] for row, _ in chosen} == {f"c{n}" for n in range(40)}
    assert {answer for _, answer in chosen} == {*task_data.MADE_UP.values()}
