"""prep_data.py for AlpacaEval, Arena-Hard, human votes and LLMBar; the folders that it writes.

With the real files: ALPACA_EVAL=DIR ARENA_HARD=DIR MT_BENCH_HUMAN=DIR LLMBAR=DIR.
"""

import gzip
import io
import json
import os
from pathlib import Path

import pytest
from bench_files import (
    SYSTEM,
    TEMPLATE,
    alpaca_eval,
    arena_answers,
    arena_hard,
    arena_questions,
    llmbar,
    outputs,
    votes,
    write_json,
    write_lines,
)

import prep_data
from pref.files import (
    alpaca_eval_download,
    arena_hard_download,
    benchmarks,
    disk,
    fetching,
    mt_bench,
    sources,
    votes_download,
)
from pref.files.console import UserError

MODIFIED = "--allow_modified"


def prepare(out: Path, option: str, *where, more=()) -> dict:
    prep_data.main([option, *map(str, where), "--out", str(out), *more])
    return disk.read_json(out / "manifest.json")


def rows_of(path: Path) -> list[dict]:
    return [row for _, row in disk.read_jsonl(path)]


def baseline(out: Path, name: str = "answers") -> list[dict]:
    """The answers of baseline/<name>.jsonl, each of one turn."""
    return list(mt_bench.read_answers(out / f"baseline/{name}.jsonl", turns=1).values())


def real(name: str) -> Path:
    if not (folder := os.environ.get(name)):
        pytest.skip(f"{name}=DIR: a folder with the published files")
    return Path(folder)


@pytest.fixture
def known(monkeypatch):
    """Makes the files of a folder the published ones: known("alpaca_eval_download", folder)."""

    def make(module, folder: Path) -> None:
        files = [
            file._replace(sha256=fetching.from_folder(file, folder, folder).sha256)
            for file in module.FILES
        ]
        monkeypatch.setattr(module, "FILES", files)

    return make


@pytest.fixture
def web(monkeypatch):
    """What the addresses serve: `files` by URL, or an error in its place. `asked`: in order."""

    class Web:
        files: dict[str, bytes | Exception] = {}
        asked: list[str] = []

    def urlopen(url, timeout):
        Web.asked.append(url)
        content = Web.files.get(url, fetching.urllib.error.URLError("no network here"))
        if isinstance(content, Exception):
            raise content
        return io.BytesIO(content)

    Web.files, Web.asked = {}, []
    monkeypatch.setattr(fetching.urllib.request, "urlopen", urlopen)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    return Web


# ---- AlpacaEval ----------------------------------------------------------------------------------


def test_alpaca_eval_from_a_folder(tmp_path, known, capsys):
    source, out = alpaca_eval(tmp_path / "copy"), tmp_path / "out"
    known(alpaca_eval_download, source)
    manifest = prepare(out, "--alpaca_eval", source)
    said = capsys.readouterr().out
    assert said.count("CC BY-NC 4.0") == 1 and "CC BY-NC 4.0" in manifest["licence"]
    assert f"gen_mtbench.py results/ --base --bench alpaca_eval --bench_data {out}" in said
    # The questions are numbered by their place, which is how length control finds their difficulty.
    bench = benchmarks.open_folder("alpaca_eval", out)
    questions, rows = benchmarks.read_questions(bench), outputs()
    assert [q["question_id"] for q in questions] == [1, 2, 3, 4]
    assert [q["turns"] for q in questions] == [[row["instruction"]] for row in rows]
    assert [q["dataset"] for q in questions] == [row["dataset"] for row in rows]
    answers = baseline(out)
    assert [row["turns"] for row in answers] == [[row["output"]] for row in rows]
    assert {row["model_id"] for row in answers} == {"gpt4_1106_preview"}
    assert (out / "judge_prompt.txt").read_bytes() == (source / "alpaca_eval_clf.txt").read_bytes()
    assert benchmarks.label_of(bench) == manifest["label"] == "alpaca_eval"
    # An edited file shows, whatever the manifest says.
    (out / "questions.json").write_text((out / "questions.json").read_text().replace("3", "5"))
    assert benchmarks.label_of(bench) == "own"


def test_alpaca_eval_download_goes_on_after_an_interruption(tmp_path, known, web, capsys):
    source, out = alpaca_eval(tmp_path / "copy"), tmp_path / "out"
    known(alpaca_eval_download, source)
    names = ("alpaca_eval_gpt4_baseline.json", "alpaca_eval_clf.txt", "df_gamed.csv")
    urls = [file.url for file in alpaca_eval_download.FILES]
    assert all(alpaca_eval_download.COMMIT in url for url in urls[:2])
    assert alpaca_eval_download.REVISION in urls[2]
    content = {url: (source / name).read_bytes() for url, name in zip(urls, names)}
    # 1) The second file breaks off: the first one is kept, and nothing passes for a whole folder.
    web.files = {**content, urls[1]: fetching.http.client.IncompleteRead(b"half")}
    with pytest.raises(UserError, match="clf.txt: IncompleteRead.*\n.*run the same command again"):
        prepare(out, "--alpaca_eval")
    assert not (out / "manifest.json").exists()
    with pytest.raises(UserError, match="the folder is not complete; run .* --alpaca_eval"):
        benchmarks.open_folder("alpaca_eval", out)
    # 2) The hub is out of reach: the folder is written without the one file that can be missing.
    web.files, web.asked = {urls[1]: content[urls[1]]}, []
    manifest = prepare(out, "--alpaca_eval")
    assert web.asked == urls[1:] and "df_gamed.csv" not in manifest["files"]
    assert "lc_unregularised" in capsys.readouterr().out
    # 3) It comes later, and then nothing is fetched any more.
    web.files, web.asked = content, []
    assert "df_gamed.csv" in prepare(out, "--alpaca_eval")["files"] and web.asked == urls[2:]
    web.asked = []
    prepare(out, "--alpaca_eval")
    assert web.asked == []


def test_a_mirror_of_the_hub_and_its_absence(tmp_path, known, web, monkeypatch, capsys):
    source = alpaca_eval(tmp_path / "copy")
    known(alpaca_eval_download, source)
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/")
    (source / "df_gamed.csv").unlink()
    file = alpaca_eval_download.FILES[2]
    with pytest.raises(fetching.Missing):
        fetching.from_web(file, tmp_path)
    assert web.asked[0].startswith("https://mirror.example/datasets/tatsu-lab/alpaca_eval/resolve/")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(fetching.Missing, match="HF_HUB_OFFLINE is set"):
        fetching.from_web(file, tmp_path)
    assert len(web.asked) == 1


def test_other_files_than_the_published_ones_are_refused_unless_told(tmp_path):
    source, out = alpaca_eval(tmp_path / "copy"), tmp_path / "out"
    with pytest.raises(UserError) as error:
        prepare(out, "--alpaca_eval", source)
    assert str(error.value).count("official ") == 4 and not out.exists()
    manifest = prepare(out, "--alpaca_eval", source, more=[MODIFIED])
    assert manifest["label"] == "own"
    assert not any(entry["official"] for entry in manifest["files"].values())
    # A modified df_gamed.csv does not outlive the file that it came from.
    (source / "df_gamed.csv").unlink()
    prepare(out, "--alpaca_eval", source, more=[MODIFIED])
    assert not (out / "df_gamed.csv").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"instruction": "Name 0 things."}, "entry 3: the same instruction as entry 1"),
        ({"instruction": " "}, "entry 3: 'instruction' must be text"),
        ({"output": None}, "entry 3: 'output' must be text, not None"),
        ({"generator": "other"}, "entry 3: of other, not of gpt4_1106_preview"),
    ],
)
def test_outputs_that_cannot_be_a_baseline(tmp_path, change, message):
    rows = outputs()
    rows[2] |= change
    source = alpaca_eval(tmp_path / "copy", rows)
    with pytest.raises(UserError, match=message):
        prepare(tmp_path / "out", "--alpaca_eval", source, more=[MODIFIED])
    assert not (tmp_path / "out/manifest.json").exists()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("alpaca_eval_gpt4_baseline.json", "{", "not valid JSON"),
        ("alpaca_eval_gpt4_baseline.json", "{}", "expected a JSON list"),
        ("alpaca_eval_clf.txt", "{instruction}", "no {output_1}"),
        ("df_gamed.csv", "preference,index\n", "no column instruction_difficulty, std_delta_len"),
    ],
)
def test_files_of_another_form(tmp_path, name, text, message):
    source = alpaca_eval(tmp_path / "copy")
    (source / name).write_text(text)
    with pytest.raises(UserError, match=f"{name}: .*{message}"):
        prepare(tmp_path / "out", "--alpaca_eval", source, more=[MODIFIED])


# ---- Arena-Hard ----------------------------------------------------------------------------------


def test_arena_hard_from_a_checkout(tmp_path, capsys):
    source, out = arena_hard(tmp_path / "copy", "v0.1", "gpt-4-0314"), tmp_path / "out"
    with pytest.raises(UserError, match="not the official files"):
        prepare(out, "--arena_hard", "v0.1", source)
    prepare(out, "--arena_hard", "v0.1", source, more=[MODIFIED])
    bench = benchmarks.open_folder("arena_hard_v0.1", out)
    asked = arena_questions("v0.1")
    assert benchmarks.read_questions(bench) == [
        {
            "question_id": number,
            "uid": row["uid"],
            "category": "arena-hard-v0.1",
            "cluster": "Sums",
            "turns": [row["prompt"]],
        }
        for number, row in enumerate(asked, 1)
    ]
    # Answers are told apart by uid: their file has another order.
    answers = baseline(out, "gpt-4-0314")
    assert [row["turns"] for row in answers] == [[f"gpt-4-0314: {row['uid']}"] for row in asked]
    settings = disk.read_json(out / "judge_settings.json")
    assert settings["prompt_template"] == json.loads(f'"{TEMPLATE}"')
    assert settings["settings"]["arena-hard-v0.1"] == {
        "baseline": "gpt-4-0314",
        "system_prompt": SYSTEM,
    }


def test_arena_hard_v2_can_do_without_one_baseline(tmp_path, capsys):
    """A packed file, and settings as JSON, two folders up."""
    source = arena_hard(tmp_path / "copy", "v2.0", "o3-mini-2025-01-31", "gemini-2.0-flash-001")
    prepare(tmp_path / "out", "--arena_hard", "v2.0", source, more=[MODIFIED])
    assert len(list((tmp_path / "out/baseline").iterdir())) == 2
    answers = source / "data/arena-hard-v2.0/model_answer"
    (answers / "gemini-2.0-flash-001.jsonl").unlink()
    plain = answers / "o3-mini-2025-01-31.jsonl"
    plain.with_name(f"{plain.name}.gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    (tmp_path / "out/published/gemini-2.0-flash-001.jsonl").unlink()
    capsys.readouterr()
    prepare(tmp_path / "out", "--arena_hard", "v2.0", source, more=[MODIFIED])
    assert "creative_writing cannot be judged" in capsys.readouterr().out
    names = [path.name for path in (tmp_path / "out/baseline").iterdir()]
    assert names == ["o3-mini-2025-01-31.jsonl"]
    packed = plain.with_name(f"{plain.name}.gz")
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"jsonl\.gz: damaged"):
        prepare(tmp_path / "out", "--arena_hard", "v2.0", source, more=[MODIFIED])


@pytest.mark.parametrize(
    ("file", "rows", "message"),
    [
        ("question", [{"category": "x", "prompt": "a"}], r"question.jsonl:1: 'uid' must be"),
        ("question", arena_questions("v0.1") * 2, r"question.jsonl:4: uid u0 appears twice"),
        ("question", [{"uid": "a", "prompt": "b"}], r"question.jsonl:1: 'category' must be"),
        ("question", [{"uid": "a", "category": "b", "prompt": "c"}], "has category 'b'; .* has"),
        ("question", [], "no questions"),
        ("model_answer/gpt-4-0314", [{"uid": "u0"}], r"gpt-4-0314.jsonl:1: not an answer"),
        (
            "model_answer/gpt-4-0314",
            arena_answers("gpt-4-0314", arena_questions("v0.1", 2)),
            r"1 questions have no answer \(uid u2 first\)",
        ),
        (
            "model_answer/gpt-4-0314",
            arena_answers("gpt-5", arena_questions("v0.1")),
            "an answer of gpt-5, not of gpt-4-0314",
        ),
        (
            "model_answer/gpt-4-0314",
            arena_answers("gpt-4-0314", arena_questions("v0.1", 4)),
            r"jsonl:1: uid u3 is no question",
        ),
    ],
)
def test_arena_hard_rows_that_cannot_be_used(tmp_path, file, rows, message):
    source = arena_hard(tmp_path / "copy", "v0.1", "gpt-4-0314")
    write_lines(source / f"data/arena-hard-v0.1/{file}.jsonl", rows)
    with pytest.raises(UserError, match=message):
        prepare(tmp_path / "out", "--arena_hard", "v0.1", source, more=[MODIFIED])
    assert not (tmp_path / "out/manifest.json").exists()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("utils/judge_utils.py", "JUDGE_SETTINGS = open('x')", "no JUDGE_SETTINGS that can be"),
        ("utils/judge_utils.py", "JUDGE_SETTINGS = {", "no JUDGE_SETTINGS that can be read"),
        ("utils/judge_utils.py", "JUDGE_SETTINGS = {'a': {}}", "must have 'baseline' and 'system"),
        ("config/arena-hard-v0.1.yaml", "prompt_template: 'x'", "no prompt_template on one line"),
        ("config/arena-hard-v0.1.yaml", 'prompt_template: "x"', "exactly the fields {ANSWER_A}"),
    ],
)
def test_judge_prompts_that_cannot_be_read(tmp_path, name, text, message):
    source = arena_hard(tmp_path / "copy", "v0.1", "gpt-4-0314")
    (source / name).write_text(text)
    with pytest.raises(UserError, match=message):
        prepare(tmp_path / "out", "--arena_hard", "v0.1", source, more=[MODIFIED])


def test_arena_hard_without_network_names_all_files(tmp_path, web):
    with pytest.raises(UserError, match=r"v0.1/question.jsonl: <urlopen error no net") as error:
        prepare(tmp_path / "out", "--arena_hard", "v0.1")
    lines = str(error.value).splitlines()[2:]
    names = ["question.jsonl", "gpt-4-0314.jsonl", "judge_utils.py", "arena-hard-v0.1.yaml"]
    assert [line.split()[0] for line in lines] == names
    assert arena_hard_download.COMMIT in web.asked[0]


@pytest.mark.parametrize("version", [["v3"], ["v0.1", "a", "b"]])
def test_versions_of_arena_hard(version):
    with pytest.raises(UserError, match="expected v0.1 or v2.0, then a folder"):
        prep_data.main(["--arena_hard", *version])


@pytest.mark.parametrize("words", [["--alpaca_eval", ""], ["--arena_hard", "v0.1", ""]])
def test_a_folder_without_a_name_is_no_download(words, web):
    with pytest.raises(UserError, match="the folder's name is empty"):
        prep_data.main(words)
    assert web.asked == []


# ---- votes and LLMBar ----------------------------------------------------------------------------


def write_parquet(folder: Path, splits: dict[str, list[dict]]) -> Path:
    """As the hub has them: data/<split>-00000-of-00001-<hash>.parquet"""
    import datasets

    for name, rows in splits.items():
        path = folder / "data" / f"{name}-00000-of-00001-0123456789abcdef.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    return folder


def test_votes_from_the_hubs_parquet_files(tmp_path, monkeypatch):
    source, out = write_parquet(tmp_path / "hub", votes()), tmp_path / "out"
    with pytest.raises(UserError, match=r"human.jsonl has 2 rows, sha256 \w{64}, official 7ae1ff"):
        prepare(out, "--mt_bench_human", source)
    assert not out.exists()
    manifest = prepare(out, "--mt_bench_human", source, more=[MODIFIED])
    assert manifest["label"] == "own"
    # Sorted by question, and without the conversations.
    assert rows_of(out / "human.jsonl") == [
        {"judge": judge, "model_a": a, "model_b": b, "question_id": q, "turn": t, "winner": winner}
        for judge, a, b, q, t, winner in (
            ("author_0", "alpaca", "llama", 81, 2, "model_b"),
            ("expert_1", "llama", "alpaca", 82, 1, "tie"),
        )
    ]
    answers = benchmarks.read_model_answers(out)
    assert {model: len(rows) for model, rows in answers.items()} == {"alpaca": 2, "llama": 2}
    assert answers["llama"][82, 0]["turns"] == ["assistant llama 1", "assistant llama 2"]
    # The folder is a source itself; a text that was edited there is not.
    prepare(tmp_path / "again", "--mt_bench_human", out, more=[MODIFIED])
    for path in [out / "human.jsonl", *(out / "model_answer").iterdir()]:
        copy = tmp_path / "again" / path.relative_to(out)
        assert copy.read_bytes() == path.read_bytes()
    monkeypatch.setattr(
        votes_download,
        "VOTES_SHA256",
        {name: disk.sha256_file(out / f"{name}.jsonl") for name in ("human", "gpt4_pair")},
    )
    assert prepare(tmp_path / "again", "--mt_bench_human", out)["label"] == "mt_bench_human"
    path = out / "model_answer/llama.jsonl"
    path.write_text(path.read_text().replace("llama 2", "llama 3"))
    with pytest.raises(UserError, match="published votes and answers:\n.*llama.jsonl has 2 rows"):
        prepare(tmp_path / "again", "--mt_bench_human", out)


def test_votes_come_from_the_hub_at_a_fixed_revision(tmp_path, monkeypatch):
    rows, asked = votes(), []
    monkeypatch.setattr(sources, "open_hub", lambda *args: (asked.append(args), (rows, None))[1])
    monkeypatch.setattr(
        sources, "dataset_rows", lambda *args: ((f"{args[1]}[0]", r) for r in args[2])
    )
    prepare(tmp_path / "out", "--mt_bench_human", more=[MODIFIED])
    assert asked == [(votes_download.DATASET, votes_download.REVISION, None)]


def test_votes_without_the_hub(tmp_path, monkeypatch):
    def refuse(*_):
        raise UserError("lmsys/x: no network; no such file or folder here either\nCheck")

    monkeypatch.setattr(sources, "open_hub", refuse)
    with pytest.raises(UserError, match="^lmsys/x: no network\n.* give --mt_bench_human DIR.$"):
        prepare(tmp_path / "out", "--mt_bench_human")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"winner": "model_c"}, r"human\[1\]: winner 'model_c' is none of"),
        ({"turn": 3}, r"human\[1\]: question_id must be a whole number, turn 1 or 2"),
        ({"model_b": "alpaca"}, r"human\[1\]: alpaca is compared with itself"),
        ({"conversation_a": None}, "no conversation_a of messages"),
        ({"conversation_a": [{"role": "user", "content": "x"}]}, "needs two answers"),
        (
            {"conversation_a": [{"role": "assistant", "content": text} for text in "xy"]},
            "question 81, alpaca: two votes show different answers",
        ),
    ],
)
def test_votes_that_cannot_be_used(tmp_path, monkeypatch, change, message):
    rows = votes()
    rows["human"][1] |= change
    placed = {
        name: [(f"{name}[{i}]", row) for i, row in enumerate(split)] for name, split in rows.items()
    }
    monkeypatch.setattr(votes_download, "open_votes", lambda folder: placed)
    with pytest.raises(UserError, match=message):
        prepare(tmp_path / "out", "--mt_bench_human", more=[MODIFIED])


def test_a_vote_about_an_answer_that_is_not_there(tmp_path):
    source = tmp_path / "votes"
    keys = votes_download.VOTE_KEYS
    for name, rows in votes().items():
        write_lines(source / f"{name}.jsonl", [{key: row[key] for key in keys} for row in rows])
    with pytest.raises(UserError, match=r"model_answer: no \*.jsonl with answers"):
        prepare(tmp_path / "out", "--mt_bench_human", source, more=[MODIFIED])
    answer = {"question_id": 81, "choices": [{"index": 0, "turns": ["a", "b"]}]}
    for model in ("alpaca", "llama"):
        write_lines(source / f"model_answer/{model}.jsonl", [answer])
    with pytest.raises(UserError, match="answer of llama to question 82, and that is not there"):
        prepare(tmp_path / "out", "--mt_bench_human", source, more=[MODIFIED])


def test_llmbar(tmp_path):
    source = llmbar(tmp_path / "copy")
    manifest = prepare(tmp_path / "out", "--llmbar", source, more=[MODIFIED])
    assert len(manifest["files"]) == 5 and "MIT" in manifest["licence"]
    write_json(source / "Natural.json", [{"input": "", "output_1": "", "output_2": "", "label": 3}])
    with pytest.raises(UserError, match="Natural.json: entry 1: 'label' must be 1 or 2, not 3"):
        prepare(tmp_path / "out", "--llmbar", source, more=[MODIFIED])
    (source / "Natural.json").unlink()
    with pytest.raises(
        UserError, match="no Natural.json in it\n.*needs these files(.*\n)+.* https://"
    ):
        prepare(tmp_path / "other", "--llmbar", source, more=[MODIFIED])


# ---- folders -------------------------------------------------------------------------------------


def test_a_folder_of_another_benchmark_is_refused(tmp_path):
    prepare(tmp_path / "out", "--llmbar", llmbar(tmp_path / "copy"), more=[MODIFIED])
    with pytest.raises(UserError, match="holds the data of benchmark llmbar, not of alpaca_eval"):
        benchmarks.open_folder("alpaca_eval", tmp_path / "out")
    with pytest.raises(UserError, match="no such folder.* run python prep_data.py --arena_hard v2"):
        benchmarks.open_folder("arena_hard_v2.0", tmp_path / "nowhere")
    with pytest.raises(UserError, match="known to prep_data.py: mt_bench, alpaca_eval"):
        benchmarks.open_folder("alpaka", tmp_path / "nowhere")
    with pytest.raises(UserError, match="run id '../x'"):
        benchmarks.open_folder("../x")
    names = ("Arena-Hard-v2.0", "arena_hard_v2", "My-Bench")
    assert [benchmarks.name_of(name) for name in names] == ["arena_hard_v2.0"] * 2 + ["My-Bench"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"questions": "../questions.json"},
        {"generation": {"temperature": "0"}},
        {"generation": {"max_new_tokens": 0.5}},
        {"generation": 0.7},
        {"files": {"a": "b"}},
    ],
)
def test_a_manifest_written_by_hand_is_checked(tmp_path, wrong):
    write_json(tmp_path / "manifest.json", {"bench": "mine"} | wrong)
    with pytest.raises(UserError, match=r"manifest.json: '\w+'(: a)?(:| must)"):
        benchmarks.open_folder("mine", tmp_path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"uid": "a"}, {"uid": "a"}], "2: uid a appears twice"),
        ([{"uid": "a"}, {"uid": None}], "2: 'uid' must be non-empty text"),
        ([{"uid": "a"}, {"question_id": 1}], "2: question_id 1 appears twice"),
    ],
)
def test_questions_that_cannot_be_told_apart(tmp_path, rows, message):
    rows = [{"question_id": i, "turns": ["x"]} | row for i, row in enumerate(rows, 1)]
    path = write_lines(tmp_path / "question.jsonl", rows)
    with pytest.raises(UserError, match=message):
        mt_bench.read_questions(path, mt_bench=False)


# ---- the real files ------------------------------------------------------------------------------


def test_real_alpaca_eval(tmp_path):
    manifest = prepare(tmp_path / "out", "--alpaca_eval", real("ALPACA_EVAL"))
    assert manifest["label"] == "alpaca_eval"
    bench = benchmarks.open_folder("alpaca_eval", tmp_path / "out")
    questions = benchmarks.read_questions(bench)
    assert len(questions) == len(baseline(tmp_path / "out")) == 805
    assert len({question["turns"][0] for question in questions}) == 805


@pytest.mark.parametrize(
    ("version", "count", "model"),
    [("v0.1", 500, "gpt-4-0314"), ("v2.0", 750, "o3-mini-2025-01-31")],
)
def test_real_arena_hard(tmp_path, version, count, model):
    manifest = prepare(tmp_path / "out", "--arena_hard", version, real("ARENA_HARD"))
    assert manifest["label"] == f"arena_hard_{version}"
    bench = benchmarks.open_folder(f"arena_hard_{version}", tmp_path / "out")
    assert len(benchmarks.read_questions(bench)) == count
    assert len(baseline(tmp_path / "out", model)) == count


def test_real_votes(tmp_path):
    manifest = prepare(tmp_path / "out", "--mt_bench_human", real("MT_BENCH_HUMAN"))
    assert manifest["label"] == "mt_bench_human"
    assert all(entry["official"] for entry in manifest["files"].values())
    assert len(rows_of(tmp_path / "out/human.jsonl")) == 3355
    assert len(rows_of(tmp_path / "out/gpt4_pair.jsonl")) == 2400
    assert sum(map(len, benchmarks.read_model_answers(tmp_path / "out").values())) == 480


def test_real_llmbar(tmp_path):
    manifest = prepare(tmp_path / "out", "--llmbar", real("LLMBAR"))
    assert manifest["label"] == "llmbar"
    assert sum(len(disk.read_json_value(p)) for p in (tmp_path / "out").glob("[NA]*.json")) == 419
