"""--confirm: the best candidates and a tuned DPO on pairs and seeds that the search never saw.

1. DPO is tuned on the search's pairs, over beta, with as many runs as the winner's lineage had: a
   new loss that was chosen among many must not win by a baseline that was not chosen at all.
2. What is compared with what is written down (`looked`), and then val.jsonl is read for the first
   time.
3. Candidates and DPO are trained on all of train.jsonl, with SEEDS new seeds each.
4. The differences are tested over pairs and seeds (stats.difference), Holm over the candidates.

It can be asked once. Whoever has seen these pairs can choose by them: what follows is marked as not
confirmatory.
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pref.analysis import power, stats
from pref.discovery import archive, estimates, rungs, split, stand_in
from pref.discovery.archive import Entry, State
from pref.discovery.search import Search
from pref.discovery.settings import MOST_CONFIRMED
from pref.files import disk
from pref.files.console import UserError

FILE = "confirmation.json"
SEEDS = 5
FIRST_SEED = 9001
MARGIN = 0.01  # in accuracy: differences below it are taken for none
BETAS = (0.1, 0.03, 0.3, 0.01, 1.0, 0.05, 0.5, 0.02, 2.0, 0.2)  # of dpo, in the order tried


def run(search: Search, count: int, again: bool) -> bool:
    """Confirm the best `count` candidates. Returns False if a signal stopped it. Raises UserError
    for a question that cannot be asked.
    """
    state = search.state
    ids, seeds = question(state, count, again)
    is_new = not state.looked or state.looked[-1]["seeds"] != seeds

    # 1) DPO's beta, on the search's pairs.
    beta = tune(search, ids)
    if beta is None:
        return False

    # 2) What is asked, before the pairs are read.
    if is_new:
        search.archive.append(
            {"event": "looked", "ids": ids, "seeds": seeds, "again": bool(state.looked)}
        )
    if not search.settings.is_stand_in:
        split.write_confirm(Path(search.settings.data), search.folder)

    # 3) Training.
    labels = [state.entries[id].label for id in ids]
    search.log(
        f"confirmation: training {', '.join(labels)} and dpo (beta {beta:g}) on all training "
        f"pairs, seeds {seeds[0]} to {seeds[-1]}"
    )
    tables = train(search, ids, seeds, beta)
    if tables is None:
        return False

    # 4) The answer.
    result = compare(state, ids, tables, beta, seeds)
    result["confirmatory"] = not state.looked[-1]["again"]
    result["verdict"] = verdict(result)
    disk.write_json(search.folder / FILE, result)
    search.archive.append({"event": "confirmed", "verdict": result["verdict"], "ids": ids})
    return True


def question(state: State, count: int, again: bool) -> tuple[list[str], list[int]]:
    """The candidates and the seeds of this confirmation: those of one that was begun and not ended,
    or new ones. Raises UserError for a second one without --again.
    """
    number = len(state.looked)
    if number > len(state.confirmed):  # begun, then killed
        begun = state.looked[-1]
        if len(begun["ids"]) != count:
            raise UserError(
                f"--confirm {count}: a confirmation of {len(begun['ids'])} was begun, and its "
                f"pairs have been read; finish it first: --confirm {len(begun['ids'])}"
            )
        return begun["ids"], begun["seeds"]
    if number and not again:
        raise UserError(
            f"--confirm: was asked before ({state.confirmed[-1]['verdict']}); its pairs have been "
            "looked at, and another answer would not confirm anything. --again gives one, marked "
            "as not confirmatory"
        )
    ranked = [id for id in rungs.ranking(state) if state.entries[id].by != archive.SEED]
    if not ranked:
        raise UserError(
            "--confirm: no candidate is left that was trained; nothing can be confirmed"
        )
    ids = sorted(ranked, key=lambda id: -len(state.entries[id].runs))[:count]
    first = FIRST_SEED + SEEDS * number
    return ids, list(range(first, first + SEEDS))


# ---- DPO, tuned ---------------------------------------------------------------------------------


class Try(NamedTuple):
    beta: float
    seeds: list[int]


def lineage_runs(state: State, id: str) -> int:
    """Training runs of a candidate and of all its ancestors, seeds of the archive aside."""
    seen, waiting, runs = set(), [id], 0
    while waiting:
        entry = state.entries[waiting.pop()]
        if entry.id in seen or entry.id == state.dpo.id:
            continue
        seen.add(entry.id)
        runs += len(entry.runs)
        waiting += [parent for parent in entry.parents if parent in state.entries]
    return runs


def tries(runs: int, seeds: list[int]) -> list[Try]:
    """How `runs` runs are spent on DPO: half of them (at least) on betas with one seed, the rest on
    further seeds of the better half of these, in the order of `seeds`. Here the first part.
    """
    betas = BETAS[: max(1, min(len(BETAS), math.ceil(runs / 2)))]
    return [Try(beta, seeds[:1]) for beta in betas]


def tune(search: Search, ids: list[str]) -> float | None:
    """DPO's best beta by accuracy on the search's pairs. None if a signal stopped it."""
    state = search.state
    runs = max(lineage_runs(state, id) for id in ids)
    seeds = sorted(state.dpo.runs)
    betas = [one.beta for one in tries(runs, seeds)]
    if len(betas) == 1:
        return betas[0]
    search.log(f"dpo is tuned with {runs} runs, as many as the lineage of the best has had")
    tables = train_dpo(search, "dpo_1", betas, seeds[:1])
    if tables is None:
        return None
    left = runs - len(betas)
    ranked = sorted(betas, key=lambda beta: (-tables[beta].mean(), betas.index(beta)))
    finalists = ranked[: max(1, min(len(ranked), left // max(1, len(seeds) - 1)))]
    more = seeds[1 : 1 + left // len(finalists)]
    if more:
        again = train_dpo(search, "dpo_2", finalists, more)
        if again is None:
            return None
        tables = {beta: np.concatenate([tables[beta], again[beta]]) for beta in finalists}
    best = max(finalists, key=lambda beta: (tables[beta].mean(), -betas.index(beta)))
    for beta, table in tables.items():
        search.log(f"  dpo, beta {beta:g}: accuracy {table.mean():.4f} ({len(table)} seeds)")
    return best


def train_dpo(
    search: Search, name: str, betas: list[float], seeds: list[int]
) -> dict[float, np.ndarray] | None:
    """(seeds, pairs) by beta, on the search's pairs."""
    if search.settings.is_stand_in:
        texts = {beta: stand_in.dpo_text(beta) for beta in betas}
        return stand_in.tables(search, texts, seeds, "val")
    path = search.folder / "rungs" / f"{name}.grid"
    rungs.write_grid(search, path, ["dpo"], seeds, betas=betas)
    if not rungs.run_grid(search, path):
        return None
    rate = search.settings.training().learning_rate
    indices = {b: rungs.index_of_runs(search.folder / "results", b, rate) for b in betas}
    return {beta: dpo_table(runs, seeds) for beta, runs in indices.items()}


def dpo_table(runs: dict[tuple[str, int], Path], seeds: list[int]) -> np.ndarray:
    """(seeds, pairs); a run that diverged is right half of the time."""
    texts = [rungs.outcome_of(runs["dpo", seed])["correct"] for seed in seeds]
    known = [archive.decode(text) for text in texts if text is not None]
    if not known:
        return np.full((len(seeds), 1), 0.5)
    return np.stack(
        [np.full(len(known[0]), 0.5) if t is None else archive.decode(t) for t in texts]
    )


# ---- the comparison -----------------------------------------------------------------------------


def train(
    search: Search, ids: list[str], seeds: list[int], beta: float
) -> dict[str, np.ndarray] | None:
    """(seeds, pairs) of each candidate, and of "dpo", on the unseen pairs."""
    entries = search.state.entries
    for id in ids:
        search.archive.check_program(id)
    if search.settings.is_stand_in:
        texts = {"dpo": stand_in.dpo_text(beta)}
        texts |= {id: search.archive.text_of(id) for id in ids}
        return stand_in.tables(search, texts, seeds, "confirm")
    losses = {"dpo": "dpo"} | {id: rungs.loss_spec(search, entries[id]) for id in ids}
    path = search.folder / "rungs" / f"confirm_{seeds[0]}.grid"
    rungs.write_grid(
        search, path, list(losses.values()), seeds, "data/confirm", "confirmation", betas=[beta]
    )
    if not rungs.run_grid(search, path):
        return None
    results = search.folder / "confirmation"
    runs = rungs.index_of_runs(results, beta)
    tables = {}
    for id in losses:
        name = "dpo" if id == "dpo" else entries[id].label
        texts = [rungs.outcome_of(runs[name, seed])["correct"] for seed in seeds]
        if None in texts:
            lost = [seed for seed, text in zip(seeds, texts) if text is None]
            search.log(
                f"  {name} diverged with seed {lost[0]}: its pairs count as half right there"
            )
        tables[id] = [None if text is None else archive.decode(text) for text in texts]
    pairs = next(len(row) for rows in tables.values() for row in rows if row is not None)
    chance = np.full(pairs, 0.5)
    return {
        id: np.stack([chance if row is None else row for row in rows])
        for id, rows in tables.items()
    }


def compare(
    state: State, ids: list[str], tables: dict[str, np.ndarray], beta: float, seeds: list[int]
) -> dict:
    """confirmation.json without the verdict. tables: (seeds, pairs) by id, and "dpo"."""
    differences = [stats.difference(tables[id], tables["dpo"], paired=True) for id in ids]
    adjusted = stats.holm([one.p() for one in differences])
    search_gains = estimates.gains(state)
    candidates = [
        candidate_row(state.entries[id], one, p, search_gains.get(id), beta)
        for id, one, p in zip(ids, differences, adjusted)
    ]
    return {
        "margin": MARGIN,
        "pairs": int(tables["dpo"].shape[1]),
        "seeds": seeds,
        "dpo_beta": beta,
        "dpo_accuracy": float(tables["dpo"].mean()),
        "candidates": candidates,
    }


def candidate_row(
    entry: Entry, one: stats.Difference, p: float, gain: estimates.Gain | None, beta: float
) -> dict:
    return {
        "id": entry.id,
        "name": entry.name,
        "difference": one.estimate,
        "low": one.low,
        "high": one.high,
        "p_holm": p,
        "word": word(one, p),
        "detectable": power.minimum_detectable(one),
        "dpo_beta": beta,
        "search_difference": gain.difference if gain else None,
        "search_gain": gain.gain if gain else None,
    }


def word(one: stats.Difference, p_holm: float) -> str:
    """better, worse, equivalent or undecided."""
    if p_holm < stats.ALPHA:
        return "better" if one.estimate > 0 else "worse"
    if one.measurable():
        return "equivalent" if one.p_equivalent(MARGIN) < stats.ALPHA else "undecided"
    return "equivalent" if abs(one.estimate) < MARGIN else "undecided"


def verdict(result: dict) -> str:
    """One line about all candidates."""
    parts = []
    for row in result["candidates"]:
        name, points = f"{row['id']}_{row['name']}", f"{100 * row['difference']:+.1f} points"
        interval = ""
        if not math.isnan(row["low"]):
            interval = f" [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"
        text = f"{name} is {row['word']}"
        if row["word"] == "equivalent":
            text += f" to dpo within {100 * MARGIN:g} point"
        else:
            text += {"better": " than dpo", "worse": " than dpo"}.get(row["word"], " against dpo")
        parts.append(f"{text}: {points}{interval}")
        if row["word"] == "undecided" and not math.isnan(row["detectable"]):
            parts[-1] += f", {100 * row['detectable']:.1f} would be found"
    where = f"{result['pairs']} unseen pairs, {len(result['seeds'])} new seeds"
    text = f"{'; '.join(parts)} ({where}, dpo with beta {result['dpo_beta']:g})"
    return text if result["confirmatory"] else f"not confirmatory, the pairs were seen: {text}"


def check_count(count: int) -> None:
    if not 1 <= count <= MOST_CONFIRMED:
        raise UserError(f"--confirm {count}: from 1 to {MOST_CONFIRMED} candidates")
