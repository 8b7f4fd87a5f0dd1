"""bench/gpu.sh's frame: parts that fail, are late or leave children, and the goals. That the parts
run is shown by the rehearsal (slow).
"""

import json
import os
import sys
import time

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "bench"))
import gpu_rows
import gpu_run
from gpu_run import Part, goals_of, run_part

# A part that prints a row, and what is no row.
ROW = 'print(\'{"row": "a", "pairs_per_s": 2.0}\', flush=True); print("{not a row"); print("[1]");'


def run(code: str, tmp_path, seconds: float = 60) -> list[dict]:
    part = Part("part", [sys.executable, "-c", code], seconds)
    return run_part(part, tmp_path, dict(os.environ))


def test_a_part_that_fails_keeps_its_rows(tmp_path):
    rows = run(ROW + "raise SystemExit(3)", tmp_path)
    assert rows[0] == {"row": "a", "pairs_per_s": 2.0}
    assert rows[1]["failed"].startswith("exit code 3")
    assert "not a row" in (tmp_path / "part.log").read_text()


def test_a_part_that_is_late_ends_with_its_children(tmp_path):
    pid = tmp_path / "pid"
    child = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = ROW + (
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], "
        "start_new_session=True, stdout=subprocess.DEVNULL)"
    )
    begun = time.monotonic()
    rows = run(code, tmp_path, seconds=1.5)
    assert time.monotonic() - begun < 20
    assert [row["row"] for row in rows] == ["a", "part"]
    assert rows[1]["failed"] == "not done within 2 s"
    with pytest.raises(ProcessLookupError):
        for _ in range(100):  # a killed process stays until its parent, here init, takes notice
            os.kill(int(pid.read_text()), 0)
            time.sleep(0.02)


def test_no_part_is_begun_when_time_is_over(tmp_path):
    rows = run_part(Part("part", ["no such command"], 0), tmp_path, {})
    assert rows == [{"row": "part", "failed": "no time was left for it"}]


def good_rows() -> list[dict]:
    return [
        {
            "part": "correct",
            "row": "packed = plain",
            "value": 1e-6,
            "tolerance": 1e-4,
            "holds": True,
        },
        {"part": "train", "row": "ours, best", "pairs_per_s": 12.0, "mfu": 0.5, "peak_gib": 40.0},
        {"part": "train", "row": "TRL, 4 pairs, recomputed", "pairs_per_s": 3.0, "peak_gib": 30.0},
        {"part": "train", "row": "TRL, 8 pairs, recomputed", "pairs_per_s": 3.5, "peak_gib": 50.0},
        {"part": "train", "row": "TRL, 2 pairs, kept", "failed": "out of memory"},
        {"part": "train", "row": "TRL, best", "like": "TRL, 8 pairs, recomputed"},
        {
            "part": "train",
            "row": "TRL, 8 pairs, recomputed, references precomputed",
            "pairs_per_s": 5.0,
        },
        {"part": "train", "row": "ours, as lean as TRL", "pairs_per_s": 9.0, "peak_gib": 12.0},
    ]


def exit_code(rows: list[dict], card: str | None = "NVIDIA H100 80GB HBM3") -> int:
    about = {"card": str(card), "torch": "2", "seconds": 1.0}
    return gpu_run.report(rows, goals_of(rows, card), about)


def test_goals_compare_the_best_rows(capsys):
    goals = {goal.what: goal for goal in goals_of(good_rows(), "NVIDIA H100 80GB HBM3")}
    assert goals["times TRL"].value == 12 / 3.5
    assert goals["times TRL with precomputed references"].value == 12 / 5
    assert goals["of TRL's memory"].value == 12 / 30  # of the leanest of TRL's rows
    assert goals["MFU"].at_least == 0.45
    assert exit_code(good_rows()) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(last["rows"]) == 8 and all(goal["holds"] for goal in last["goals"])


@pytest.mark.parametrize(
    ("row", "change"),
    [
        (0, {"holds": False}),
        (0, {"value": float("nan"), "holds": False}),
        (1, {"pairs_per_s": 10.0}),  # 2.86 times TRL
        (1, {"mfu": 0.44}),
        (1, {"mfu": None}),  # a card that is not known
        (6, {"pairs_per_s": 6.5}),
        (7, {"peak_gib": 15.5}),
    ],
)
def test_a_goal_that_does_not_hold_is_an_exit_code(row, change):
    rows = good_rows()
    rows[row] |= change
    assert exit_code(rows) == 1


@pytest.mark.parametrize("missing", [0, 1, 5, 6, 7])
def test_what_was_not_measured_does_not_hold(missing):
    rows = good_rows()
    del rows[missing]
    assert exit_code(rows) == 1


def test_the_goal_depends_on_the_card():
    assert exit_code(good_rows(), "NVIDIA A100-SXM4-80GB") == 1  # 50 % of 55 %
    assert gpu_rows.peaks_of("NVIDIA A100-SXM4-80GB")[0] == 312e12
    assert gpu_rows.peaks_of("NVIDIA H100 PCIe")[0] == 756e12
    assert gpu_rows.peaks_of("NVIDIA H100 80GB HBM3")[0] == 989e12
    assert gpu_rows.peaks_of("Some card") is None


def test_a_rehearsal_wants_every_row():
    rows = [row for row in good_rows() if "failed" not in row]
    assert exit_code(rows, None) == 0
    assert exit_code(good_rows(), None) == 1


def test_the_reason_of_a_failure_is_one_line():
    trace = "Traceback\n  File x\ntorch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB\n"
    assert gpu_rows.reason_of(trace) == "out of memory"
    assert (
        gpu_rows.reason_of("noise\nerror: --model x: not there\nmore")
        == "error: --model x: not there"
    )
    assert gpu_rows.reason_of("") == "no message"
