"""console.py: progress in a log and at a terminal."""

import io
import os

import pytest

from pref.files import console


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    """Seconds that pass only when a test says so."""

    now = 1000.0

    def __call__(self):
        return self.now


def log_of(total, steps, **options):
    """What a `Progress` logs over `steps` of (seconds passed, count, note)."""
    stream, clock = io.StringIO(), Clock()
    with console.Progress(
        "reference log-probs train", "batches", total, stream=stream, clock=clock, **options
    ) as bar:
        for seconds, count, note in steps:
            clock.now += seconds
            bar.update(count, note)
    return stream.getvalue().splitlines()


def test_log_has_a_line_per_minute_with_count_rate_and_time_left():
    assert log_of(5000, [(59, 190, ""), (2, 2, ""), (58, 180, ""), (2, 8, ""), (59, 1, "")]) == [
        "reference log-probs train: 192 of 5,000 batches, 3.1 per s, 0:25:28 left",
        "reference log-probs train: 380 of 5,000 batches, 3.1 per s, 0:24:31 left",
    ]


def test_log_of_slow_work_with_a_note_and_of_unknown_length():
    assert log_of(30, [(240, 2, "$0.40")]) == [
        "reference log-probs train: 2 of 30 batches, 0.5 per min, 0:56:00 left, $0.40"
    ]
    assert log_of(None, [(100, 1240, "")]) == [
        "reference log-probs train: 1,240 batches, 12.4 per s"
    ]
    assert log_of(30, [(61, 0, "")]) == ["reference log-probs train: 0 of 30 batches"]


def test_work_shorter_than_a_minute_and_other_ranks_log_nothing():
    assert log_of(10, [(5.9, 1, "")] * 10) == []
    assert log_of(10, [(100, 1, "")] * 10, enabled=False) == []


def test_a_terminal_gets_a_bar_with_the_note():
    stream = Terminal()
    with console.Progress("judging", "judgements", 8, stream=stream) as bar:
        bar.update(3, "usd=0.02")
        bar.bar.refresh()
    assert "judging:" in stream.getvalue() and "3/8" in stream.getvalue()
    assert "judgements/s" in stream.getvalue() and "usd=0.02" in stream.getvalue()
    stream = Terminal()
    with console.Progress("judging", "judgements", 8, enabled=False, stream=stream) as bar:
        bar.update()
    assert stream.getvalue() == ""


def test_progress_yields_the_items_and_counts_each_after_its_turn(monkeypatch):
    clock, stream = Clock(), io.StringIO()
    monkeypatch.setattr(console.sys, "stderr", stream)
    monkeypatch.setattr(console.Progress.__init__, "__defaults__", (None, True, None, clock))
    seen = []
    for item in console.progress("abc", "reading", "rows"):
        clock.now += 40
        seen.append(item)
    assert seen == ["a", "b", "c"]
    assert stream.getvalue() == "reading: 2 of 3 rows, 1.5 per min, 0:00:40 left\n"
    assert list(console.progress(iter(range(3)), "reading", "rows")) == [0, 1, 2]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("  no such file.\nmore"), "no such file"),
        (KeyError(), "KeyError"),
        (RuntimeError(" \n"), "RuntimeError"),
    ],
)
def test_first_line_of_an_error(error, text):
    assert console.first_line(error) == text


def test_a_busy_machine_is_named():
    from pref.model.ranks import busy_note

    assert "load 3.5 on 2 cores" in busy_note(3.5, cores=2, threads=2)
    assert "OMP_NUM_THREADS=1" in busy_note(2.1, cores=2, threads=2)
    assert busy_note(2.0, cores=2, threads=2) is None
    assert busy_note(2.0, cores=2, threads=1) is None
    alone = busy_note(9.0, cores=2, threads=1)  # or on a GPU, whose kernels the host starts
    assert "load 9.0 on 2 cores" in alone and "OMP_NUM_THREADS" not in alone


def test_the_cores_are_those_of_this_process(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3}, raising=False)
    assert console.usable_cores() == 1
    monkeypatch.delattr(os, "sched_getaffinity")
    assert console.usable_cores() == (os.cpu_count() or 1)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8"])
def test_a_terminal_without_the_letters_gets_plain_ones(monkeypatch, encoding):
    raw = io.BytesIO()
    monkeypatch.setattr(console.sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    monkeypatch.setattr(console.sys, "stderr", io.StringIO())  # cannot be changed: left alone
    console.print_on_any_terminal()
    print("td_dpo β=0.1 τ=2: 5 → 6, 裁判 \ud800", flush=True)
    text = raw.getvalue().decode(encoding)
    if encoding == "utf-8":
        assert text == "td_dpo β=0.1 τ=2: 5 → 6, 裁判 \\ud800\n"
    else:
        assert text == "td_dpo b=0.1 t=2: 5 -> 6, \\u88c1\\u5224 \\ud800\n"


def test_run_main_prints_on_any_terminal(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(console.sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    with pytest.raises(SystemExit) as ended:
        console.run_main(lambda: print("β ± γ", flush=True))
    assert (ended.value.code, raw.getvalue()) == (0, b"b +- \\u03b3\n")
