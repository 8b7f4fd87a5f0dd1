"""What a search leaves to go on with: best.py and final.grid.

    best.py      the best loss, ready for `train_pref.py --loss_file FOLDER/best.py:NAME`
    final.grid   it and DPO, for `sweep.sh FOLDER/final.grid`: answers and a judge

Until the confirmation, the best is the one of the search's own ranking, and final.grid has the runs
of the search: data/<name>/val.jsonl stays unread. Afterwards, it is what the confirmation calls
better than DPO, and the grid has the confirmation's runs, which sweep.sh does not train again. If
nothing was better, both files say so. With --task, the runs of final.grid answer its questions;
after the confirmation, which is about accuracy on pairs, these are questions the search never saw.
"""

import shlex
from pathlib import Path

from pref.analysis.texts import count_text
from pref.discovery import estimates, rungs, settings, task_fitness
from pref.discovery.archive import Archive, State
from pref.discovery.estimates import Gain
from pref.discovery.settings import Settings
from pref.files import disk

NOT_CONFIRMED = "not confirmed yet: the numbers below were selected on"
STAGES = "train gen judge analyze"


def write(folder: Path, archive: Archive) -> None:
    """Write best.py and final.grid if a candidate was measured."""
    state, confirmation = archive.state(), read_confirmation(folder)
    id = best_of(state, confirmation)
    if id is None:
        return
    archive.check_program(id)
    recorded = settings.read(folder)
    disk.write_text(folder / "best.py", best_text(folder, archive, id, confirmation, recorded))
    if state.entries[id].runs and recorded:
        disk.write_text(
            folder / "final.grid", grid_text(folder, archive, id, confirmation, recorded)
        )


def read_confirmation(folder: Path) -> dict | None:
    path = folder / "confirmation.json"
    return disk.read_json(path) if path.is_file() else None


def ranking(state: State) -> list[str]:
    """Proposals that can be the best, the best first: those still in the race, then, if nothing was
    trained, those that were measured on the proxy. Neither DPO nor another seed of the archive:
    nobody has discovered them.
    """
    gains = estimates.gains(state)
    trained = rungs.ranking(state)
    others = [id for id in gains if state.entries[id].reached_proxy and not state.entries[id].runs]
    others = [] if trained and trained != [state.dpo.id] else others
    ranked = [*trained, *sorted(others, key=lambda id: (-gains[id].gain, id))]
    return [id for id in ranked if state.entries[id].by != "seed"]


def best_of(state: State, confirmation: dict | None) -> str | None:
    """The candidate of best.py: of those confirmed as better the one that gains most, else the
    first of the ranking.
    """
    better = confirmed_better(state, confirmation)
    ranked = ranking(state)
    return better[0] if better else ranked[0] if ranked else None


def confirmed_better(state: State, confirmation: dict | None) -> list[str]:
    """Ids of what the confirmation calls better than DPO, by the confirmed difference."""
    rows = (confirmation or {}).get("candidates", [])
    rows = [row for row in rows if row["word"] == "better" and row["id"] in state.entries]
    return [row["id"] for row in sorted(rows, key=lambda row: -row["difference"])]


# ---- best.py ------------------------------------------------------------------------------------


def measured_with(gain: Gain) -> str:
    """What a gain rests on, in words."""
    if gain.measured == "trained":
        return count_text(gain.seeds, "training seeds")
    return "the proxy alone"


def best_text(
    folder: Path, archive: Archive, id: str, confirmation: dict | None, recorded: Settings | None
) -> str:
    """The program with a comment above: what is known of it, and how to train with it."""
    state = archive.state()
    entry, gain = state.entries[id], estimates.gains(state)[id]
    how, unit = measured_with(gain), settings.unit_of(gain, recorded)
    lines = [
        f"{entry.label}: the best of {len(state.entries)} candidates of {folder}.",
        f"In the search ({how}): {signed(gain.difference)} +- {100 * gain.se:.1f} {unit} "
        f"over dpo, of which {signed(gain.gain)} can be expected again.",
        f"Confirmation: {confirmed_words(id, confirmation)}",
        "",
        train_command(folder / "best.py", entry.label, recorded),
    ]
    comment = "".join(f"# {ascii_line(line)}".rstrip() + "\n" for line in lines)
    return f"{comment}\n{archive.text_of(id)}"


def signed(fraction: float) -> str:
    return f"{100 * fraction:+.1f}"


def confirmed_words(id: str, confirmation: dict | None) -> str:
    """What the confirmation says of a candidate, in one line."""
    if confirmation is None:
        return "none yet; what is above was selected on"
    row = next((row for row in confirmation["candidates"] if row["id"] == id), None)
    if row is None:
        return "this candidate was not in it"
    doubt = "" if confirmation.get("confirmatory") else "not confirmatory, the pairs were seen: "
    return (
        f"{doubt}{row['word']}, {signed(row['difference'])} points on {confirmation['pairs']} "
        "unseen pairs"
    )


def train_command(path: Path, label: str, recorded: Settings | None) -> str:
    words = ["python", "train_pref.py"]
    if recorded:
        given = {"--model": recorded.model, "--data": recorded.data}  # "" with features alone
        words += [word for pair in given.items() if pair[1] for word in pair]
    words += ["--loss_file", f"{path}:{label}"]
    return shlex.join(words) + (f" {recorded.train_args}" if recorded else "")


def ascii_line(text: str) -> str:
    """A comment must end where its line ends, whatever is in a path."""
    return "".join(x if " " <= x <= "~" else "?" for x in text)


# ---- final.grid ---------------------------------------------------------------------------------


def grid_text(
    folder: Path, archive: Archive, id: str, confirmation: dict | None, recorded: Settings
) -> str:
    """A grid of DPO and the best, whose runs are there already."""
    state = archive.state()
    better = confirmed_better(state, confirmation)
    asked = [row["id"] for row in (confirmation or {}).get("candidates", [])]
    ids = better or asked or [id]
    specs = [f"{archive.loss_file(one)}:{state.entries[one].label}" for one in ids]
    if confirmation:
        head = "Confirmed as better than dpo." if better else "Nothing was confirmed as better."
        place, results, seeds = "data/confirm", "confirmation", confirmation["seeds"]
        betas = f"{confirmation['dpo_beta']:g}"
    else:
        head = "Not confirmed: the best of the search, and the search's own runs."
        place, results, betas = "data/search", "results", ""  # the default beta
        seeds = sorted(set(state.entries[id].runs) & set(state.dpo.runs))
    lines = {
        "MODEL": recorded.model,
        "DATA": folder / place,
        "RESULTS": folder / results,
        "LOSSES": " ".join(["dpo", *specs]),
        "SEEDS": " ".join(map(str, seeds)),
        **({"BETAS_dpo": betas} if betas else {}),
        "STAGES": STAGES,
        "TRAIN_ARGS": shlex.join(recorded.given_train_args()),
    }
    if recorded.task:
        lines |= task_fitness.question_lines(recorded, folder, are_fresh=bool(confirmation))
    body = "".join(f"{name:<10} {value}\n" for name, value in lines.items())
    return f"# {head} Written by discover.py {ascii_line(str(folder))}\n{body}"
