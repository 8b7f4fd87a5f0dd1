"""From the runs of a results folder to comparisons: what analyze.py says beyond means.

"values": run_id -> unit -> part -> number. MT-Bench: question -> turn -> mean rating. Accuracy:
validation pair -> 0 -> 0, 0.5 or 1. A comparison uses the units and parts that all of its runs
have, so that no run has an easier exam.

A "cell" is the runs that differ in their seed alone (analyze.make_cells). Formulas and assumptions:
stats.py.
"""

import math
from collections import defaultdict
from statistics import fmean

import numpy as np

from pref.analysis import stats
from pref.files import judgements

LENGTH_BINS = 5
SPREAD_KEYS = ("ratio", "low", "high", "high_open", "reduction_percent", "brown_forsythe_p")


def accuracy_values(run: dict) -> dict:
    """pair -> 0 -> whether rho > 0 at the best evaluation: a tie is one half, a pair with a
    non-finite log-probability is wrong, as in the training stage.
    """
    return {
        pair: {0: ranked_right(found)}
        for pair, found in best_pairs(run["val"], run["summary"]).items()
    }


def best_pairs(val: dict, summary: dict | None) -> dict:
    """pair id -> (rho, delta) or None, at the best evaluation; empty for a run without one."""
    return val.get((summary or {}).get("best_step"), {})


def ranked_right(pair: tuple[float, float] | None) -> float:
    return 0.5 * ((pair[0] > 0) + (pair[0] >= 0)) if pair else 0.0


def rating_values(turns: dict[tuple[int, int], float]) -> dict:
    """question -> turn -> mean rating, from (question, turn) -> mean rating."""
    values: dict = defaultdict(dict)
    for (question, turn), rating in turns.items():
        values[question][turn] = rating
    return dict(values)


def shared_parts(runs: list[dict]) -> dict:
    """unit -> the parts that all runs have, of the units of which all have one."""
    shared = [unit for unit in runs[0] if all(unit in run for run in runs)]
    parts = {unit: set.intersection(*(set(run[unit]) for run in runs)) for unit in sorted(shared)}
    return {unit: found for unit, found in parts.items() if found}


def make_tables(values: dict, groups: list[list[str]]) -> list[np.ndarray]:
    """(runs, units) of each group of run ids, over the units that all of these runs have; a unit's
    value is the mean of the parts that all have. With a turn's judgement lost in one run, that turn
    counts in none.
    """
    parts = shared_parts([values[run_id] for group in groups for run_id in group])
    return [
        np.array(
            [[average(values[run_id][unit], parts[unit]) for unit in parts] for run_id in group]
        )
        for group in groups
    ]


def average(found: dict, parts: set) -> float:
    return sum(found[part] for part in parts) / len(parts)


def runs_with_values(cell: dict, values: dict) -> dict:
    """seed -> run id of the cell's runs that have values."""
    return {run["args"]["seed"]: run["run_id"] for run in cell["runs"] if values.get(run["run_id"])}


def differences(one: dict, other: dict) -> list[str]:
    """Settings that both cells have and that differ; null is "does not apply", not a difference."""
    a, b = one["runs"][0]["settings"], other["runs"][0]["settings"]
    return sorted(
        key for key in a if a[key] is not None and b.get(key) is not None and a[key] != b[key]
    )


def differences_text(one: dict, other: dict) -> str | None:
    a, b = one["runs"][0]["settings"], other["runs"][0]["settings"]
    return (
        "; ".join(f"{key} {plain(a[key])} / {plain(b[key])}" for key in differences(one, other))
        or None
    )


def plain(value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def nearest(one: dict, others: list[dict]) -> list[dict]:
    """Those of `others` that differ from `one` in the fewest other settings."""
    fewest = min((len(differences(one, other)) for other in others), default=0)
    return [other for other in others if len(differences(one, other)) == fewest]


def is_untrained(cell: dict) -> bool:
    return cell["runs"][0]["args"]["loss"] is None


def cell_interval(
    cell: dict, counted: list[str], values: dict, draws: int
) -> tuple[float | None, float | None]:
    """Crossed-bootstrap interval of a cell's mean over its seeds and units; of one seed: over units
    alone. None where not every run that counts in the mean (`counted`) has values.
    """
    runs = runs_with_values(cell, values)
    if not runs or set(runs.values()) != set(counted):
        return None, None
    (table,) = make_tables(values, [list(runs.values())])
    return stats.percentiles(stats.bootstrap(table, draws)) if table.size else (None, None)


def compare_cells(
    a: dict, b: dict, values: dict, draws: int
) -> tuple[stats.Difference, np.ndarray, np.ndarray] | None:
    """(difference, table of a, table of b), or None if they share no unit. Seeds that both have are
    paired; where there are fewer than two of these, all seeds count, unpaired; a trained cell with
    one seed says nothing about seeds.
    """
    seeds_a, seeds_b = runs_with_values(a, values), runs_with_values(b, values)
    if not seeds_a or not seeds_b:
        return None
    common = sorted(set(seeds_a) & set(seeds_b), key=str)
    lone = any(
        len(seeds) == 1 and not is_untrained(cell) for cell, seeds in ((a, seeds_a), (b, seeds_b))
    )
    paired = bool(common) and (lone or len(common) > 1)
    if paired:
        groups = [[seeds[seed] for seed in common] for seeds in (seeds_a, seeds_b)]
    elif lone:
        groups = [list(seeds_a.values())[:1], list(seeds_b.values())[:1]]
    else:
        groups = [list(seeds_a.values()), list(seeds_b.values())]
    table_a, table_b = make_tables(values, groups)
    if not table_a.size:
        return None
    return stats.difference(table_a, table_b, paired, draws), table_a, table_b


def comparison_columns(found: tuple | None) -> dict:
    """What a table of differences says about one, every key present."""
    if found is None:
        names = ("estimate", "se", "df", "low", "high", "rate", "rate_low", "rate_high")
        return dict.fromkeys((*names, "p", "detectable", "n_units", "paired", "seeds_compared"))
    difference, table_a, table_b = found
    keys = ("estimate", "se", "df", "low", "high", "rate", "rate_low", "rate_high")
    counts = {
        "paired": f"{len(table_a)} paired",
        "unpaired": f"{len(table_a)} against {len(table_b)}, unpaired",
    }
    return {
        **{key: known(getattr(difference, key)) for key in keys},
        "p": known(difference.p()),
        "detectable": known(difference.minimum_detectable()),
        "n_units": difference.n_questions,
        "paired": difference.seeds,
        "seeds_compared": counts.get(difference.seeds, "one seed"),
    }


def known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def sensitivity_rows(label: str, baseline: str, found: tuple) -> list[dict]:
    """The primary test and the usual ones beside it, each with what it ignores."""
    difference, table_a, table_b = found
    ignores = {
        "paired": "nothing of the two: questions and seeds are both sampled",
        "unpaired": "nothing of the two; the seeds differ, so that they are not paired",
        "one seed": "other seeds would differ: with one seed nothing is known of it",
    }
    head = {"proposed": label, "baseline": baseline}
    primary = {
        "test": "primary: questions and seeds",
        "p": known(difference.p()),
        "ignores": ignores[difference.seeds],
    }
    others = [row | {"p": known(row["p"])} for row in stats.sensitivity(table_a, table_b)]
    return [head | row for row in (primary, *others)]


def mcnemar_rows(a: dict, b: dict, values: dict) -> list[dict]:
    """Exact McNemar on the same validation pairs, seed by seed: pairs of several seeds are not
    independent.
    """
    seeds_a, seeds_b = runs_with_values(a, values), runs_with_values(b, values)
    rows = []
    for seed in sorted(set(seeds_a) & set(seeds_b), key=str):
        (right_a,), (right_b,) = make_tables(values, [[seeds_a[seed]], [seeds_b[seed]]])
        rows.append({"seed": seed, "n_pairs": len(right_a), **stats.mcnemar(right_a, right_b)})
    return rows


def beta_series(cells: list[dict], values: dict) -> dict[tuple, list[dict]]:
    """(loss, tau, settings) -> its cells in order of beta, where there are at least two with
    values.
    """
    series: dict[tuple, list[dict]] = defaultdict(list)
    for cell in cells:
        if cell["beta"] is not None and runs_with_values(cell, values):
            series[cell["loss"], cell["tau"], str(cell["settings"])].append(cell)
    return {
        key: sorted(found, key=lambda cell: cell["beta"])
        for key, found in series.items()
        if len(found) > 1
    }


def spread_of(
    cells: list[dict], values: dict, draws: int, stream: int = 0
) -> stats.BetaSpread | None:
    """Variance over beta of the cells' values on common units; None without a common unit."""
    runs = [dict(sorted(runs_with_values(cell, values).items(), key=str)) for cell in cells]
    tables = make_tables(values, [list(found.values()) for found in runs])
    same_seeds = all(list(found) == list(runs[0]) for found in runs) and len(runs[0]) > 1
    return stats.beta_spread(tables, same_seeds, draws, stream) if tables[0].size else None


def compare_spreads(a: list[dict], b: list[dict], values: dict, draws: int) -> dict | None:
    """Variance over beta of the cells a against the cells b, a cell a beta, at the betas that both
    have.
    """
    betas = sorted({cell["beta"] for cell in a} & {cell["beta"] for cell in b})
    a, b = ([cell for cell in cells if cell["beta"] in betas] for cells in (a, b))
    assert len(a) == len(b) == len(betas), "a beta stands twice"
    if len(betas) < 2:
        return None
    spreads = spread_of(a, values, draws), spread_of(b, values, draws, stream=100)
    if None in spreads:
        return None
    ratio = stats.variance_ratio(*spreads)
    means = [[cell_mean(cell, values) for cell in cells] for cells in (a, b)]
    return {
        "betas": betas,
        "spreads": spreads,
        **ratio,
        "high_open": ratio["high"] == math.inf,
        "reduction_percent": None if ratio["ratio"] is None else 100 * (1 - ratio["ratio"]),
        "n_seeds": min(len(runs_with_values(cell, values)) for cell in (*a, *b)),
        "brown_forsythe_p": known(stats.brown_forsythe(*means)),
    }


def cell_mean(cell: dict, values: dict) -> float:
    (table,) = make_tables(values, [list(runs_with_values(cell, values).values())])
    return float(table.mean())


def spread_rows(cells: list[dict], values: dict, baseline: str, draws: int) -> list[dict]:
    """Variance over beta of each loss and tau, against the baseline's series that differs in the
    fewest settings.
    """
    series = beta_series(cells, values)
    references = [found for (loss, *_), found in series.items() if loss == baseline]
    rows = []
    for (loss, tau, _), found in series.items():
        if (spread := spread_of(found, values, draws)) is None:
            continue
        first = nearest(found[0], [reference[0] for reference in references])
        reference = next((one for one in references if first and one[0] is first[0]), None)
        against = {}
        if reference and loss != baseline:
            against = compare_spreads(found, reference, values, draws) or {}
        rows.append(
            {
                "loss": loss,
                "tau": tau,
                "settings": " ".join(
                    f"{key}={plain(value)}" for key, value in found[0]["settings"].items()
                )
                or None,
                "betas": [cell["beta"] for cell in found],
                "variance_of_means": spread.raw,
                "of_it_noise": spread.noise,
                "variance": spread.variance,
                **{key: against.get(key) for key in SPREAD_KEYS},
                "differs_in": differences_text(found[0], reference[0]) if against else None,
            }
        )
    return rows


def selection_rows(
    cells: list[dict], rows: list[dict | None], metric: str, baseline: str
) -> list[dict]:
    """The best cell of each loss by validation accuracy, and what its grid and the baseline's would
    give at equal budget: the expected score of the best of k cells drawn at random
    (stats.expected_best), k the smaller grid's.
    """
    grids: dict[str, list[tuple]] = defaultdict(list)
    for cell, row in zip(cells, rows):
        if row and row[metric] is not None and not is_untrained(cell):
            grids[cell["loss"]].append((cell.get("accuracy"), row))
    found = []
    for loss, grid in grids.items():
        scores, selector, how = grid_scores(grid, metric)
        best = grid[selector.index(max(selector))][1]
        theirs = grids.get(baseline)
        budget = min(len(grid), len(theirs or grid))
        row = {
            "loss": loss,
            "cells": len(grid),
            "selected": best["label"],
            "selected_by": how,
            "value": best[metric],
            "budget": budget,
            "expected_selected": stats.expected_best(selector, scores, budget),
            "expected_maximum": stats.expected_best(scores, scores, budget),
            "maximum": max(scores),
        }
        if theirs:
            base_scores, base_selector, _ = grid_scores(theirs, metric)
            row["baseline_expected_selected"] = stats.expected_best(
                base_selector, base_scores, budget
            )
        found.append(row)
    return found


def grid_scores(grid: list[tuple], metric: str) -> tuple[list[float], list[float], str]:
    """(scores, what the best is selected by, its name) of a loss's cells."""
    scores = [row[metric] for _, row in grid]
    if metric != "best_acc_ref" and all(accuracy is not None for accuracy, _ in grid):
        return scores, [accuracy for accuracy, _ in grid], "validation accuracy"
    return scores, scores, "the score itself"


def stability_rows(cells: list[dict]) -> list[dict]:
    """Runs that diverged, runs with a non-finite step, and such steps, by loss and beta, with exact
    intervals.
    """
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for cell in cells:
        if not is_untrained(cell):
            groups[cell["loss"], cell["beta"]] += [run for run in cell["runs"] if run["summary"]]
    rows = []
    for (loss, beta), runs in groups.items():
        if not runs:
            continue
        counts = {
            "diverged": (sum(run["status"] == "diverged" for run in runs), len(runs)),
            "nonfinite_runs": (
                sum(bool(run["summary"]["nonfinite_steps"]) for run in runs),
                len(runs),
            ),
            "nonfinite_steps": (
                sum(run["summary"]["nonfinite_steps"] or 0 for run in runs),
                sum((run["summary"]["steps"] or 0) for run in runs),
            ),
        }
        row = {"loss": loss, "beta": beta}
        for name, (count, total) in counts.items():
            total = max(count, total)  # a step that was not taken may not be in `steps`
            low, high = stats.exact_interval(count, total)
            row |= {name: count, f"{name}_of": total, f"{name}_low": low, f"{name}_high": high}
        rows.append(row)
    return rows


def judge_rows(judged: dict[str, list[dict]], answers: dict[str, dict]) -> dict:
    """Retest reliability (where answers were judged several times) and the correlation of score and
    answer length.
    """
    items: dict[tuple, list[float]] = defaultdict(list)
    scores, lengths, groups = [], [], []
    for run_id, rows in judged.items():
        for row in rows:
            if row["status"] == "ok":
                items[run_id, row["question_id"], row["turn"], row["choice"]].append(row["score"])
    for (run_id, question, turn, choice), ratings in items.items():
        turns = answers.get(run_id, {}).get((question, choice), {}).get("turns")
        if turns:
            scores.append(fmean(ratings))
            lengths.append(len(turns[turn - 1]))
            groups.append((question, turn))
    length = (
        stats.length_correlation(np.array(scores), np.array(lengths), groups) if scores else None
    )
    return {"retest": stats.retest(list(items.values())), "length": length}


def variance_rows(cells: list[dict], values: dict, retest: dict | None) -> list[dict]:
    """Variance of a question's score split into question, beta and tau, seed, and judge, for each
    loss with at least two cells of two common seeds.
    """
    by_loss: dict[str, list[dict]] = defaultdict(list)
    for cell in cells:
        if len(runs_with_values(cell, values)) > 1:
            by_loss[cell["loss"]].append(cell)
    rows = []
    for loss, found in by_loss.items():
        seeds = set.intersection(*(set(runs_with_values(cell, values)) for cell in found))
        if len(found) < 2 or len(seeds) < 2:
            continue
        runs = [
            [runs_with_values(cell, values)[seed] for seed in sorted(seeds, key=str)]
            for cell in found
        ]
        cube = np.array(make_tables(values, runs))
        if cube.shape[-1] < 2:
            continue
        parts = stats.variance_parts(cube)
        total = sum(parts.values())
        judge = retest["sd"] ** 2 if retest else None
        rows += [
            {
                "loss": loss,
                "source": name,
                "variance": value,
                "share": value / total if total else None,
            }
            for name, value in parts.items()
        ]
        if judge is not None:
            rows.append(
                {
                    "loss": loss,
                    "source": "judge, one rating (within residual)",
                    "variance": judge,
                    "share": None,
                }
            )
    return rows


def run_kl(answers: dict) -> dict | None:
    """On-policy KL(policy || base) of a run's answers: mean log-ratio of what the policy itself
    wrote (the k1 estimator), in nats an answer and a token, with the standard error over questions.
    None where answers carry no log-probs.
    """
    by_question: dict[int, list[float]] = defaultdict(list)
    total, tokens = 0.0, 0
    for (question, index), row in answers.items():
        choice = next(choice for choice in row["choices"] if choice["index"] == index)
        if not all(
            isinstance(choice.get(key), list) for key in ("logp", "logp_base", "logp_tokens")
        ):
            continue
        for policy, base, n in zip(choice["logp"], choice["logp_base"], choice["logp_tokens"]):
            if None in (policy, base, n) or not math.isfinite(policy - base):
                continue
            by_question[question].append(policy - base)
            total, tokens = total + policy - base, tokens + n
    if not by_question:
        return None
    means = [fmean(found) for found in by_question.values()]
    se = float(np.std(means, ddof=1) / math.sqrt(len(means))) if len(means) > 1 else None
    return {
        "kl": fmean(means),
        "kl_se": se,
        "kl_per_token": total / tokens if tokens else None,
        "n_questions": len(means),
    }


def pair_outcomes(rows: list[dict]) -> dict[tuple, dict[int, dict[tuple, float]]]:
    """(judge, prompts, refs, baseline) -> question -> (turn, choice, repeat) -> 1 run wins, 0
    baseline wins, 0.5 tie.

    Both orders of a pair together: where they disagree it is a tie; one without both verdicts
    counts nowhere.
    """
    matches: dict[tuple, dict] = defaultdict(dict)
    for row in rows:
        key = tuple(row[name] for name in ("judge", "prompts", "refs", "baseline"))
        place = (row["turn"], row["choice"], row["repeat"])
        matches[key, row["question_id"], place][row["order"]] = (
            row["winner"] if row["status"] == "ok" else None
        )
    outcomes: dict[tuple, dict] = defaultdict(lambda: defaultdict(dict))
    for (key, question, place), winners in matches.items():
        if len(winners) == 2 and None not in winners.values():
            agreed = set(winners.values()) if len(set(winners.values())) == 1 else {"tie"}
            outcomes[key][question][place] = 0.5 if agreed == {"tie"} else float(agreed != {key[3]})
    return {key: dict(found) for key, found in outcomes.items()}


def judge_size(judge: str, rows: list[dict]) -> tuple[float | None, bool]:
    """(billions of parameters if they are known, whether that is too few for the judgements to
    measure anything).
    """
    sizes = [
        row["judge_params_b"]
        for row in rows
        if row["judge"] == judge and row.get("judge_params_b") is not None
    ]
    size = min(sizes) if sizes else judgements.params_from_name(judge)
    return size, size is not None and size < judgements.SMOKE_TEST_BELOW_B


def win_rows(cells: list[dict], draws: int) -> list[dict]:
    """Win rate of each cell against each baseline run it was judged against (a tie is one half),
    with the crossed-bootstrap interval over questions and seeds.
    """
    rows = []
    for cell in cells:
        by_judge: dict[tuple, dict] = defaultdict(dict)
        for run in cell["runs"]:
            for key, outcomes in pair_outcomes(run["pairs"]).items():
                by_judge[key][run["run_id"]] = outcomes
        for (judge, prompts, refs, baseline), values in sorted(by_judge.items(), key=str):
            (table,) = make_tables(values, [list(values)])
            if not table.size:
                continue
            low, high = stats.percentiles(stats.bootstrap(table, draws))
            parts = shared_parts(list(values.values()))
            outcomes = [
                run[q][place]
                for run in values.values()
                for q, places in parts.items()
                for place in places
            ]
            rows.append(
                {
                    "judge": judge,
                    "prompts": prompts,
                    "refs": refs,
                    "label": cell["label"],
                    "loss": cell["loss"],
                    "baseline": baseline,
                    "win_rate": float(table.mean()),
                    "low": low,
                    "high": high,
                    "wins": outcomes.count(1),
                    "ties": outcomes.count(0.5),
                    "losses": outcomes.count(0),
                    "n_questions": table.shape[1],
                    "n_seeds": len(values),
                    "smoke_test": judge_size(
                        judge, [row for run in cell["runs"] for row in run["pairs"]]
                    )[1],
                }
            )
    return rows


def length_bias(pairs: dict[str, tuple], lengths: dict[str, int]) -> list[dict]:
    """Accuracy (rho > 0) by how much longer the chosen response is, in tokens: at most five groups
    of equal size. A model that has learned length is right where the chosen response is the longer
    one.
    """
    found = sorted((lengths[pair], ranked_right(value)) for pair, value in pairs.items())
    if not found:
        return []
    edges = np.unique(
        np.quantile([length for length, _ in found], np.linspace(0, 1, LENGTH_BINS + 1))
    )
    bins = np.clip(
        np.searchsorted(edges, [length for length, _ in found], side="right") - 1,
        0,
        max(0, len(edges) - 2),
    )
    rows = []
    for i in sorted(set(bins.tolist())):
        mine = [pair for pair, j in zip(found, bins) if i == j]
        hits = [hit for _, hit in mine]
        low, high = stats.exact_interval(round(sum(hits)), len(hits))
        rows.append(
            {
                "from": mine[0][0],
                "to": mine[-1][0],
                "n_pairs": len(hits),
                "accuracy": fmean(hits),
                "low": low,
                "high": high,
            }
        )
    return rows
