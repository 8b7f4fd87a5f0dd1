"""What a search says about itself: --status, --show. Reads files, starts nothing."""

import difflib
import json
import re
import sqlite3
from collections import Counter
from pathlib import Path

from pref.discovery import estimates, rungs, search, settings
from pref.discovery.archive import Archive, Entry, State
from pref.discovery.settings import Settings
from pref.files import console, disk
from pref.files.console import UserError
from pref.sweeping import status as sweep_status

# Where a proposal can end, in order. The funnel counts who passed each.
FUNNEL = {
    "read": ("parse", "worker"),
    "in the form": ("form",),
    "self-test passed": ("selftest",),
    "range passed": ("range",),
    "new": ("duplicate",),
    "proxy passed": ("proxy",),
}
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def clean(text: str) -> str:
    """A proposer's text without characters that command a terminal."""
    return CONTROL.sub("?", text)


# ---- --status -----------------------------------------------------------------------------------


def print_status(folder: Path) -> int:
    """Print how far a search is. Returns 1 unless it is done."""
    recorded = begun(folder)
    archive = Archive.read(folder)
    state, steps = archive.state(), search.plan(recorded)
    left = [step for step in steps if step.name not in state.steps]
    holder = disk.lock_holder(folder)
    if holder:
        now = f"running ({holder})"
    else:
        now = f"stopped before {left[0].name}; the same command continues" if left else "done"
    print(f"{folder}: {now}; {len(steps) - len(left)} of {len(steps)} steps\n")
    print(console.format_table(funnel(state), right_from=1))
    print()
    for line in best_lines(state):
        print(line)
    if left:
        print(time_left(folder, recorded, state, left))
    if (spent := dollars(folder)) is not None:
        print(f"dollars: {spent:.4f} spent on proposals")
    path = folder / "confirmation.json"
    if path.is_file():
        print(f"confirmed: {clean(disk.read_json(path)['verdict'])}")
    elif not left:
        print("not confirmed: these numbers were selected on; --confirm 3 asks unseen pairs")
    return 1 if left else 0


def begun(folder: Path) -> Settings:
    recorded = settings.read(folder)
    if recorded is None:
        raise UserError(f"{folder}: no search there (settings.json); python discover.py {folder}")
    return recorded


def funnel(state: State) -> list[list[str]]:
    """A row a stage, a column a proposer."""
    entries = list(state.entries.values())
    proposers = list(dict.fromkeys(entry.by for entry in entries))
    rows = [["", *map(clean, proposers)]]

    def row(title: str, passed: list[Entry]) -> None:
        counts = Counter(entry.by for entry in passed)
        rows.append([title, *(str(counts[by]) for by in proposers)])

    row("proposed", entries)
    for title, places in FUNNEL.items():
        entries = [e for e in entries if e.stopped is None or e.stopped["at"] not in places]
        row(title, entries)
    for k in sorted({event["k"] for event in state.rungs}):
        ids = {id for event in state.rungs if event["k"] == k for id in event["ids"]}
        row(f"rung {k}", [entry for entry in entries if entry.id in ids])
    return rows


def best_lines(state: State, count: int = 3) -> list[str]:
    """The best candidates: those that were trained, else by proxy."""
    gains = estimates.gains(state)
    ranked = rungs.ranking(state) or sorted(
        (id for id in gains if state.entries[id].reached_proxy),
        key=lambda id: gains[id].rank,
        reverse=True,
    )
    lines = []
    for id in [id for id in ranked if state.dpo and id != state.dpo.id][:count]:
        gain, entry = gains[id], state.entries[id]
        how = "trained" if gain.measured == "trained" else "proxy"
        lines.append(
            f"{'best' if not lines else '    '} {clean(entry.label)}: {points(gain.gain)} ± "
            f"{100 * gain.gain_se:.1f} points over dpo, shrunk from {points(gain.difference)} "
            f"({how}, {gain.seeds} seed{'s' * (gain.seeds > 1)}, {clean(entry.by)})"
        )
    trained = [gains[id] for id in ranked if id != state.dpo.id and gains[id].measured == "trained"]
    if trained and all(gain.difference < 0 for gain in trained):
        lines.append("no candidate that was trained has done as well as dpo")
    return lines or ["nothing measured yet"]


def points(fraction: float) -> str:
    """Percentage points; never "-0.0"."""
    return f"{round(100 * fraction, 1) + 0.0:+.1f}"


def time_left(folder: Path, recorded: Settings, state: State, left: list) -> str:
    """Training that is still to be done, from the runs so far."""
    runs = runs_of(recorded, left)
    rounds = sum(step.kind == "round" for step in left)
    text = f"left: {rounds} rounds, about {runs} training runs"
    walls = run_seconds(folder)
    if walls and runs:
        seconds = sum(walls) / len(walls) * runs / rungs.default_jobs()
        text += f", {sweep_status.hours_text(seconds)} at {sum(walls) / len(walls):.0f} s a run"
    return text


def run_seconds(folder: Path) -> list[float]:
    """Of the training runs that have ended."""
    paths = sorted(folder.glob("results/*/summary.json"))
    return [disk.read_json(path)["wall_s"] for path in paths]


def runs_of(recorded: Settings, steps: list) -> int:
    """Training runs of some steps, DPO's included, if nobody leaves the race early."""
    count, parts = 0, search.instalments(recorded)
    for step in steps:
        if step.kind == "rung":
            candidates = parts[step.part] if step.number == 0 else recorded.rung[step.number]
            count += candidates * recorded.seeds_per_rung[step.number]
            if step.part == 0:
                count += recorded.seeds_per_rung[step.number]  # DPO's
    return count


def dollars(folder: Path) -> float | None:
    """What was spent on models; None if none was asked."""
    path = folder / "requests.sqlite"
    if not path.is_file():
        return None
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10) as db:
        query = "SELECT COALESCE(SUM(cost_usd + lost_usd), 0) FROM requests"
        return db.execute(query).fetchone()[0]


# ---- --show -------------------------------------------------------------------------------------


def show(folder: Path, id: str) -> int:
    """Print everything that is known of a candidate."""
    begun(folder)
    archive = Archive.read(folder)
    state = archive.state()
    id = id.partition("_")[0]
    if id not in state.entries:
        last = list(state.entries)[-1:] or ["none yet"]
        raise UserError(f"--show {id}: no such candidate in {folder}; the last one is {last[0]}")
    entry = state.entries[id]
    origin = f" from {', '.join(entry.parents)}" if entry.parents else ""
    print(
        f"{clean(entry.label)}, round {entry.round}: {clean(entry.operator)}{origin}, "
        f"by {clean(entry.by)}"
    )
    if thought := read_text(archive.folder_of(id) / "thought.txt"):
        print(f"thought: {clean(thought)}")
    print_fate(archive, entry)
    print_program(archive, entry)
    children = [e.id for e in state.entries.values() if id in e.parents]
    if children:
        print(f"\nchildren: {', '.join(children)}")
    return 0


def read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""


def print_fate(archive: Archive, entry: Entry) -> None:
    """Why it stopped, what was measured, the self-test."""
    state = archive.state()
    if entry.stopped:
        print(f"stopped at {entry.stopped['at']}: {clean(entry.stopped['why'])}")
    if entry.cell:
        slopes = ", ".join(f"{value:g} at {rho}" for rho, value in entry.gradient.items())
        print(f"behaviour: {entry.cell}; gradient relative to dpo's: {slopes} (rho, nats)")
    if entry.proxy:
        one = entry.proxy
        print(
            f"proxy: accuracy {one['acc']:.4f}, {points(one['difference'])} ± "
            f"{100 * one['se']:.1f} points over dpo, {one['bits']:.3f} bits, {one['seeds']} seeds"
        )
    for seed, run in entry.runs.items():
        accuracy = "no accuracy" if run["acc_ref"] is None else f"accuracy {run['acc_ref']:.4f}"
        print(f"trained, seed {seed}: {run['status']}, {accuracy}  (results/{run['run_id']})")
    gain = estimates.gains(state).get(entry.id)
    if gain and entry.id != state.dpo.id:
        print(
            f"gain over dpo: {points(gain.difference)} ± {100 * gain.se:.1f} points as measured, "
            f"{points(gain.gain)} ± {100 * gain.gain_se:.1f} shrunk ({gain.measured})"
        )
    selftest = archive.folder_of(entry.id) / "selftest.json"
    if selftest.is_file() and (content := disk.read_json(selftest)):
        print(f"self-test: {clean(json.dumps(content))[:400]}")


def print_program(archive: Archive, entry: Entry) -> None:
    """Its text, or what was proposed; then how it differs from its first parent."""
    text = archive.text_of(entry.id)
    if not text:
        original = read_text(archive.folder_of(entry.id) / "original.txt")
        print(f"\nas proposed, never executed:\n{clean(original)}")
        return
    print(f"\n{text}", end="")
    for parent in entry.parents:
        before = archive.text_of(parent)
        lines = difflib.unified_diff(
            before.splitlines(), text.splitlines(), parent, entry.id, lineterm="", n=1
        )
        print(f"\nagainst {parent}:")
        print("\n".join(lines))
