"""Cells: which runs differ in their seed alone, and what a best cell is selected by.

Rounds (train_pref.py --round) are cells of their own, whose runs have been trained on pairs of
their own: a later round's validation pairs are made from the answers of the run that it started
from, and no two runs share them. A validation accuracy on them compares nothing. A cell of a later
round is therefore selected by the accuracy of the first round that it comes from, whose pairs all
runs share; of the rounds of one setting, the last is the best then.
"""

import json
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

from pref.analysis import cell_rows, stats
from pref.analysis.runs import LATER_OPTIONS, OF_TUNE, Cell, Run
from pref.files.console import UserError


def make_cells(runs: list[Run]) -> list[Cell]:
    """Group runs by loss, beta, tau and every other setting: what is left inside a cell is seeds.

    Raises UserError if two runs of a cell have the same seed. The untrained model comes first.
    """
    runs = with_targets_of_first_round(runs)
    differing = differing_settings(runs)
    groups: dict[tuple, list[Run]] = defaultdict(list)
    for run in runs:
        settings = settings_of(run, differing)
        group = groups[run.loss, run.beta, run.tau, json.dumps(settings)]
        if twin := next((other for other in group if other.seed == run.seed), None):
            raise UserError(
                f"{twin.run_id} and {run.run_id} have the same loss, beta, tau, settings and seed: "
                "one run would count twice; choose one with --run_ids"
            )
        group.append(run)
    by_id = {run.run_id: run for run in runs}
    cells = [make_cell(group, differing, by_id) for group in groups.values()]
    cells.sort(key=cell_order)
    labels = Counter(cell.label for cell in cells)
    return [
        cell
        if labels[cell.label] == 1
        else replace(cell, label=f"{cell.label} ({cell.runs[0].run_id})")
        for cell in cells
    ]


def make_cell(runs: list[Run], differing: dict[str, list[str]], by_id: dict[str, Run]) -> Cell:
    """The cell of `runs`, which are alike in everything but their seed. by_id: all runs."""
    first = runs[0]
    settings = settings_of(first, differing)
    first_rounds = [first_round(run, by_id) for run in runs]
    accuracies = [run.summary["best_acc_ref"] for run in first_rounds if run and run.summary]
    return Cell(
        loss=first.loss,
        beta=first.beta,
        tau=first.tau,
        settings=settings,
        runs=runs,
        label=cell_rows.cell_label(first.loss, first.beta, first.tau, settings),
        accuracy=stats.mean(accuracy for accuracy in accuracies if accuracy is not None),
    )


def with_targets_of_first_round(runs: list[Run]) -> list[Run]:
    """`runs`, those of later rounds with the lora_targets of their first round: the adapter that
    they started from names its layers one by one, where the first round says "all-linear".
    """
    by_id = {run.run_id: run for run in runs}
    found = []
    for run in runs:
        first = first_round(run, by_id) if run.round > 1 else None
        if first and "lora_targets" in first.settings:
            targets = {"lora_targets": first.settings["lora_targets"]}
            run = replace(run, settings=run.settings | targets)
        found.append(run)
    return found


def differing_settings(runs: list[Run]) -> dict[str, list[str]]:
    """loss -> settings, besides beta and tau, that differ among its runs; those that follow from
    `tune` among the runs that train the same.
    """
    all_keys = {key for run in runs for key in run.settings}
    values: dict[tuple, set] = defaultdict(set)
    for run in runs:
        for key in all_keys:
            same = setting(run, "tune") if key in OF_TUNE else None
            values[run.loss, key, same].add(setting(run, key))
    differing = {(loss, key) for (loss, key, _), found in values.items() if len(found) > 1}
    return {run.loss: sorted(key for loss, key in differing if loss == run.loss) for run in runs}


def settings_of(run: Run, differing: dict[str, list[str]]) -> dict:
    """A run's values of the settings that differ, without those that its `tune` does not have."""
    found = {key: setting(run, key) for key in differing[run.loss]}
    return {k: value for k, value in found.items() if value is not None or k not in OF_TUNE}


def setting(run: Run, key: str):
    """A run's setting; None where it does not apply."""
    default = None if run.untrained or key in OF_TUNE else LATER_OPTIONS.get(key)
    return run.settings.get(key, default)


def cell_order(cell: Cell) -> tuple:
    """Sort key: the untrained model, then by loss, beta, tau and settings; None before numbers."""
    numbers = [(value is not None, value or 0) for value in (cell.beta, cell.tau)]
    return (not cell.untrained, cell.loss, *numbers, json.dumps(cell.settings))


def first_round(run: Run, by_id: dict[str, Run]) -> Run | None:
    """The run of round 1 that a run's adapter comes from, itself if it is one; None if it is not
    among the runs.
    """
    seen = set()
    while run and run.round > 1 and run.run_id not in seen:
        seen.add(run.run_id)
        run = by_id.get(started_from(run))
    return run if run and run.round == 1 else None


def started_from(run: Run) -> str | None:
    """The id of the run whose adapter this one started from."""
    path = Path(run.args.get("init_adapter") or "")
    return path.parent.name if path.name == "adapter" else path.name


def selector(cells: list[Cell]) -> str:
    """By what the best of `cells` is selected, where all have an accuracy."""
    later = any(cell.round > 1 for cell in cells)
    return "validation accuracy" + (" of round 1" if later else "")


def note_rounds(runs: list[Run]) -> list[str]:
    """What a reader must know of the validation accuracies of later rounds."""
    if not any(run.round > 1 for run in runs):
        return []
    return [
        "rounds above 1: each run has training and validation pairs of its own, so that validation "
        "accuracies are compared in round 1 alone, and settings are selected by it there"
    ]
