"""What the benchmarks besides MT-Bench lack, and the command that would supply it.

A gap is a dict, as in notes.py.
"""

from pref.analysis import judge_identity, notes, parts
from pref.analysis.parts import Part
from pref.analysis.runs import Run

NO_DIFFICULTY = {
    "what": "AlpacaEval's own length control (no df_gamed.csv in --alpaca_eval): what is shown is "
    "lc_unregularised, without its regularisation, which is another number",
    "runs": [],
    "next": "prep_data.py --alpaca_eval",
}


def unjudged(runs: list[Run]) -> list[dict]:
    """Answers to benchmarks that nobody has judged."""
    gaps = []
    for bench in parts.other_benches(runs):
        files = {run.run_id: run.bench(bench) for run in notes.usable_runs(runs)}
        if not any(one.judgements() for one in files.values()):
            answered = [run_id for run_id, one in files.items() if one.answers]
            gaps += gap(
                f"{parts.bench_title(bench)} (answers without judgements)",
                answered,
                f"judge.py --bench {bench}",
            )
    return gaps


def part_gaps(part: Part, name: str, runs: list[Run]) -> list[dict]:
    """What runs lack of one judge's judgements on a benchmark. name: of the source."""
    facts = part.facts
    # A benchmark chooses its own baselines, by category; --baseline would replace all of them.
    is_run = facts["baseline"] in {run.run_id for run in runs}
    baseline = f" --baseline {facts['baseline']}" if is_run else ""
    command = f"{notes.judge_command(facts, [])} --bench {facts['bench']}{own_options(facts)}"
    command += baseline
    answer = f"gen_mtbench.py --bench {facts['bench']}, then {command}"
    lacking = [run.run_id for run in notes.usable_runs(runs) if run.run_id not in part.judged]
    lacking = [run_id for run_id in lacking if run_id != facts["baseline"]]
    failed = [
        run_id for run_id, rows in part.judged.items() if any(row["status"] != "ok" for row in rows)
    ]
    left_out = part.questions.left_out
    incomplete = sorted({run_id for run_ids in left_out.values() for run_id in run_ids})
    return [
        *gap(name, lacking, answer),
        *gap(f"{name} on all questions ({len(left_out)} left out)", incomplete, answer),
        *gap(f"{name}: judgements without a score", failed, f"{command} --retry_failed"),
    ]


def own_options(facts: dict) -> str:
    """The arguments of judge.py that make another judge of the same model: --preference both."""
    settings = judge_identity.describe_settings({"judge_settings": facts["judge_settings"]})
    way = f" --preference {settings['preference']}" if settings.get("preference") else ""
    return way + (" --neutralise" if settings.get("neutralise") else "")


def gap(what: str, run_ids: list[str], next_step: str) -> list[dict]:
    return [{"what": what, "runs": run_ids, "next": next_step}] if run_ids else []
