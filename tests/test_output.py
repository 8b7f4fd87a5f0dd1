"""Output whose reader leaves, and Ctrl-C before a stage begins."""

import io
import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

from pref.files import console, output


@pytest.mark.parametrize("buffered", [True, False])
def test_work_goes_on_when_the_reader_of_its_output_leaves(tmp_path, monkeypatch, buffered):
    """As `| head -1` does. The rest of the output is kept, and the exit code is the work's own."""
    reader, writer = os.pipe()
    raw = os.fdopen(writer, "wb", buffering=-1 if buffered else 0)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, write_through=not buffered))

    def work() -> int:
        output.keep_rest_in(tmp_path / "output.txt")
        print("the first line", flush=True)
        os.close(reader)
        for number in range(3):
            print(f"line {number}", flush=True)
        return 1

    with pytest.raises(SystemExit) as end:
        console.run_main(work)
    sys.stdout.close()
    assert end.value.code == 1
    lines = (tmp_path / "output.txt").read_text().splitlines()
    assert lines[0].startswith("The reader of this process's output has left")
    assert lines[1:] == ["line 0", "line 1", "line 2"]


def test_without_a_file_the_rest_is_dropped(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w"))
    with pytest.raises(SystemExit) as end:
        console.run_main(lambda: print("a table", flush=True))
    sys.stdout.close()
    assert end.value.code == 0


STAGES = ("prep_data", "train_pref", "gen_mtbench", "judge", "analyze")


@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c_during_the_imports_is_no_traceback(tmp_path, stage):
    """Modules in place of the libraries send the signal while they are imported."""
    ctrl_c = "import os, signal; os.kill(os.getpid(), signal.SIGINT)\nraise ImportError('half')\n"
    for library in ("torch", "tqdm", "numpy", "jinja2"):
        (tmp_path / f"{library}.py").write_text(ctrl_c)
    done = subprocess.run(
        [sys.executable, ROOT / f"{stage}.py"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=restore_ctrl_c,
    )
    assert (done.returncode, done.stderr) == (130, "interrupted: nothing was begun\n")


def restore_ctrl_c() -> None:
    """A script's background job ignores Ctrl-C, and its children would too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
