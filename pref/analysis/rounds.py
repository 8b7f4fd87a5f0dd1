"""The score from round to round of training on the model's own answers, with the KL beside it.

A chain leads from a cell of the last round back to round 1, by the adapters that its runs started
from; a row is one of its rounds. The gain is over the round before, of the same seeds; of round 1,
over the untrained model.
"""

from pref.analysis import cell_rows, estimates, grouping, stats
from pref.analysis.runs import Cell, Run, ScoredCell, Values

GAIN = {"gain": "estimate", "gain_low": "low", "gain_high": "high", "gain_p": "p"}


def rows(scored: list[ScoredCell], metric: str, of_runs: list[dict], values: Values) -> list[dict]:
    """One row for each round of each chain; empty without rounds.

    of_runs: rows of `frontier_runs`, with the KL of the runs for which it is known.
    """
    by_label = {one.cell.label: one for one in scored if one.row[metric] is not None}
    cells = [one.cell for one in scored]
    untrained = next((cell for cell in cells if cell.untrained), None)
    kl_of = {row["run_id"]: row["kl"] for row in of_runs}
    found = []
    for chain in chains(cells):
        for before, cell in zip([untrained, *chain], chain):
            if cell.label in by_label:
                row = round_row(chain_name(chain), by_label[cell.label].row, cell, metric, kl_of)
                found.append(row | gain_columns(cell, before, values))
    return found


def chains(cells: list[Cell]) -> list[list[Cell]]:
    """Cells from round 1 to the last, each the start of the next one."""
    cell_of = {run.run_id: cell for cell in cells for run in cell.runs}
    before = {
        cell.label: cell_of.get(grouping.started_from(cell.runs[0]))
        for cell in cells
        if cell.round > 1
    }
    starts = {cell.label for cell in before.values() if cell}
    found = []
    for cell in cells:
        if cell.round > 1 and cell.label not in starts:
            chain = [cell]
            while (earlier := before.get(chain[0].label)) and earlier not in chain:
                chain.insert(0, earlier)
            found.append(chain)
    return found


def chain_name(chain: list[Cell]) -> str:
    """The label of the last cell without its round."""
    last = chain[-1]
    settings = {key: value for key, value in last.settings.items() if key != "round"}
    return cell_rows.cell_label(last.loss, last.beta, last.tau, settings)


def round_row(name: str, row: dict, cell: Cell, metric: str, kl_of: dict[str, float]) -> dict:
    distances = [kl_of[run_id] for run_id in row["runs"] if kl_of.get(run_id) is not None]
    return {
        "chain": name,
        **{key: row[key] for key in ("label", "loss", "beta", "tau", "n_seeds", "low", "high")},
        "round": cell.round,
        "score": row[metric],
        "score_sd": row[f"{metric}_sd"],
        "kl": stats.mean(distances),
        "kl_sd": stats.sd(distances),
        "accuracy": stats.mean(best_accuracies(cell.runs)),
    }


def best_accuracies(runs: list[Run]) -> list[float]:
    """Of later rounds, each on validation pairs of its own."""
    found = [run.summary["best_acc_ref"] for run in runs if run.summary]
    return [accuracy for accuracy in found if accuracy is not None]


def gain_columns(cell: Cell, before: Cell | None, values: Values) -> dict:
    """The difference to the round before, with its interval."""
    compared = estimates.compare_cells(cell, before, values) if before else None
    columns = estimates.comparison_columns(compared, has_rate=False)
    return {name: columns[key] for name, key in GAIN.items()} | {
        "over": before.label if before else None,
        "seeds_compared": columns["seeds_compared"],
    }
