"""Score against distance: what each cell gained for its KL to the base model.

A reward, or any other score, that rises only with the KL was bought by leaving the reference. The
KL is that of the answers that were scored, where they carry log-probabilities (gen_mtbench.py
--kl), else that of the run's answers to MT-Bench, which the row says.
"""

from pref.analysis import stats
from pref.analysis.runs import MT_BENCH, Run, ScoredCell


def rows(
    scored: list[ScoredCell], metric: str, bench: str | None, numbers: dict[str, dict]
) -> list[dict]:
    """One row for each cell with a score whose runs have a KL: means over the runs with both.

    bench: on whose answers the score is; None for a score that is not of answers to a benchmark.
    numbers: those of a Part.
    """
    bench = bench or MT_BENCH
    runs = [run for one in scored for run in one.cell.runs if not run.untrained]
    kl_of = next(
        (name for name in (bench, MT_BENCH) if any(run.bench(name).kl for run in runs)), None
    )
    if kl_of is None:
        return []
    found = []
    for cell, row in scored:
        counted = [run for run in cell.runs if run.run_id in row["runs"]]
        known = [run for run in counted if kl_to_base(run, kl_of) is not None]
        distances = [kl_to_base(run, kl_of) for run in known]
        scores = [numbers[run.run_id][metric] for run in known]
        if not known:
            continue
        found.append(
            {
                **{key: row[key] for key in ("label", "untrained", "loss", "beta", "tau")},
                "settings": row["settings"],
                "kl": stats.mean(distances),
                "kl_sd": stats.sd(distances),
                "kl_answers": kl_of,
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
