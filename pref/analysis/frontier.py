"""Score against distance: what each run gained for its KL to the base model.

A reward, or any other score, that rises only with the KL was bought by leaving the reference. The
KL is that of the answers that were scored, where they carry log-probabilities (gen_mtbench.py
--kl), else that of the run's answers to MT-Bench, which the row says.

equal_kl.py compares the losses' scores at the same KL.
"""

from pref.analysis import equal_kl, stats
from pref.analysis.parts import Part
from pref.analysis.runs import MT_BENCH, Cell, Run, ScoredCell

MOST_NAMED = 8  # runs in a note


def find(
    cells: list[Cell], scored: list[ScoredCell], metric: str, part: Part, baseline: str
) -> dict:
    """What aggregated_metrics.json has of a part's scores against KL: `frontier` (a row a cell),
    `frontier_runs` (a row a run), `frontier_without` (runs with a score and no KL) and `equal_kl`.
    """
    bench = part.facts.get("bench", MT_BENCH)  # imported tasks have no answers here
    of_answers = "bench" in part.facts or "task" not in part.facts
    source = kl_source([run for cell in cells for run in cell.runs], bench)
    if source is None:
        return {"frontier": [], "frontier_runs": [], "frontier_without": [], "equal_kl": []}
    of_runs = rows_of_runs(cells, metric, source, part.numbers)
    return {
        "frontier": rows_of_cells(scored, source, of_runs),
        "frontier_runs": [row for row in of_runs if row["kl"] is not None],
        "frontier_without": [row["run_id"] for row in of_runs if row["kl"] is None],
        "equal_kl": equal_kl.rows(cells, source, part.values, baseline)
        if of_answers and source == bench
        else [],
    }


def notes(results: dict) -> list[str]:
    """Names the runs whose KL is not known. results: a part of aggregated_metrics.json."""
    if not (lacking := results["frontier_without"]):
        return []
    named = ", ".join(lacking[:MOST_NAMED])
    more = f" and {len(lacking) - MOST_NAMED} more" if len(lacking) > MOST_NAMED else ""
    return [
        f"the KL of {named}{more} is not known (no log-probabilities in answers.jsonl): not in the "
        "scores against KL; gen_mtbench.py --kl computes it"
    ]


def kl_source(runs: list[Run], bench: str) -> str | None:
    """The benchmark on whose answers the KL is: that of the scores, else MT-Bench, where any run
    has one.
    """
    trained = [run for run in runs if not run.untrained]
    names = (name for name in (bench, MT_BENCH) if any(run.bench(name).kl for run in trained))
    return next(names, None)


def rows_of_runs(
    cells: list[Cell], metric: str, source: str, numbers: dict[str, dict]
) -> list[dict]:
    """One row for each run with a score; its KL is None where it is not known.

    numbers: those of a Part.
    """
    return [
        {
            "run_id": run.run_id,
            "label": cell.label,
            **{key: getattr(run, key) for key in ("untrained", "loss", "beta", "tau", "seed")},
            "kl": kl_to_base(run, source),
            "score": numbers[run.run_id][metric],
        }
        for cell in cells
        for run in cell.runs
        if numbers.get(run.run_id, {}).get(metric) is not None
    ]


def rows_of_cells(scored: list[ScoredCell], source: str, of_runs: list[dict]) -> list[dict]:
    """One row for each cell with a score whose runs have a KL: means over the runs with both."""
    curve_of = {
        cell.label: name
        for name, curve in equal_kl.list_curves([one.cell for one in scored]).items()
        for cell in curve
    }
    found = []
    for _, row in scored:
        known = [one for one in of_runs if one["run_id"] in row["runs"] and one["kl"] is not None]
        if not known:
            continue
        distances, scores = [one["kl"] for one in known], [one["score"] for one in known]
        found.append(
            {
                **{key: row[key] for key in ("label", "untrained", "loss", "beta", "tau")},
                "settings": row["settings"],
                "curve": curve_of.get(row["label"]),
                "kl": stats.mean(distances),
                "kl_sd": stats.sd(distances),
                "kl_answers": source,
                "score": stats.mean(scores),
                "score_sd": stats.sd(scores),
                "n_seeds": len(distances),
            }
        )
    return found


def kl_to_base(run: Run, bench: str) -> float | None:
    """Nats an answer; 0 of the untrained model."""
    if run.untrained:
        return 0.0
    kl = run.bench(bench).kl
    return kl["kl"] if kl else None
