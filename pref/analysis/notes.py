"""What a reader must know besides the numbers: notes on runs and judges, and what is missing.

A note is one line of text. A gap is a dict with `what` could not be done, of which `runs` (all of
them if the list is empty), and the command that comes `next`.
"""

import argparse
import json
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from pref.analysis import cell_rows, judge_identity, provenance, texts
from pref.analysis.cell_rows import CommonQuestions
from pref.analysis.runs import MT_BENCH, Cell, JudgeKey, Run, Stale
from pref.files import disk, judgements
from pref.files.console import UserError

MOST_LISTED = 8  # runs or questions that a line names
COMPARED_ON = "compared on the"
ORDINARY_STATUSES = ("finished", "untrained", "no training record")


def note_runs(runs: list[Run], cells: list[Cell]) -> list[str]:
    """What was taken out of the runs, runs that did not end well, non-finite validation pairs,
    answers made in different ways, and seeds that a cell lacks.
    """
    notes = note_stale(runs)
    notes += [note for run in runs if (note := note_status(run))]
    for run in runs:
        if bad := sum(margins is None for margins in run.best_val.values()):
            notes.append(
                f"{run.run_id}: {bad} validation pairs have a non-finite log-probability, "
                "counted as wrong"
            )
    for run in runs:
        for bench, files in run.benches.items():
            if files.kl and files.kl["n_nonfinite"]:
                turns = f"{files.kl['n_nonfinite']} turns{provenance.of_bench(bench)}"
                notes.append(
                    f"{run.run_id}: {turns} have no finite log-probability; its KL is over the "
                    "others, and too small where the model broke down"
                )
    notes += dict.fromkeys(note for run in runs if run.imported for note in run.imported.notes)
    for bench in sorted({name for run in runs for name in run.benches}):
        notes += note_answer_settings(runs, bench)
    trained = [cell for cell in cells if not cell.untrained]
    notes += [note for cell in trained if (note := note_token_ids(cell))]
    seeds = {seed for cell in trained for seed in cell_seeds(cell)}
    for cell in trained:
        if lacking := seeds - cell_seeds(cell):
            listed = ", ".join(map(str, sorted(lacking)))
            notes.append(f"unbalanced grid: {cell.label} has no seed {listed}")
    return notes


def note_stale(runs: list[Run]) -> list[str]:
    """What does not belong together, one note for all runs with the same fault."""
    with_answers = sum(bool(run.answers or run.stale) for run in runs)
    return [
        f"left out, because old and new do not belong together: {stale.what} of "
        f"{'all runs' if len(run_ids) == with_answers > 1 else ', '.join(run_ids)}: {stale.why}"
        for stale, run_ids in group_stale(runs).items()
    ]


def group_stale(runs: list[Run]) -> dict[Stale, list[str]]:
    """What was taken out -> the runs that it was taken out of."""
    groups: dict[Stale, list[str]] = defaultdict(list)
    for run in runs:
        for stale in run.stale:
            groups[stale].append(run.run_id)
    return groups


def note_answer_settings(runs: list[Run], bench: str) -> list[str]:
    """Settings, batch size or device that the answers of some runs were made with and those of
    others were not: part of a difference in score may come from these.
    """
    runs_of: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        answers = run.bench(bench).answers.values()
        settings = next((row.get("settings") for row in answers), None)
        for name, value in settings.items() if isinstance(settings, dict) else ():
            runs_of[name][json.dumps(value, sort_keys=True)].append(run.run_id)
        for name in ("batch_size", "device"):
            values = {json.dumps(row.get(name)) for row in answers} - {"null"}
            if values:
                runs_of[name][", ".join(sorted(values))].append(run.run_id)
    notes = []
    for name, by_value in sorted(runs_of.items()):
        if len(by_value) > 1:
            listed = "; ".join(f"{value}: {', '.join(ids)}" for value, ids in by_value.items())
            effect = "differences in score include what that changes"
            if name in ("batch_size", "device"):
                effect = "in bf16 that alone changes some of the answers"
            answers = f"answers{provenance.of_bench(bench)}"
            notes.append(f"{answers} were made with different {name} ({listed}): {effect}")
    return notes


def note_token_ids(cell: Cell) -> str | None:
    """Seeds of one cell must have been trained on the same token ids."""
    if cell.round > 1:  # each of its runs has pairs of its own
        return None
    hashes = [run.args.get("reference") for run in cell.runs]
    if len({json.dumps(one, sort_keys=True) for one in hashes if isinstance(one, dict)}) < 2:
        return None
    return (
        f"{cell.label}: its runs were trained on different token ids or another base (another "
        f"tokenizer, chat template, or a date in it): {', '.join(run.run_id for run in cell.runs)} "
        "differ in more than their seed"
    )


def note_status(run: Run) -> str | None:
    if run.status == "diverged":
        steps = run.summary["nonfinite_steps"]
        count = f" ({steps} non-finite steps)" if steps else ""
        return f"diverged: {run.run_id}{count}; counted, and the numbers it has are in the means"
    if run.status == "unfinished":
        return f"unfinished, left out of the comparison: {run.run_id} (no summary.json)"
    if run.status not in ORDINARY_STATUSES:
        return f"status of {run.run_id} is {run.status!r}; its numbers are averaged with the others"
    return None


def cell_seeds(cell: Cell) -> set[int]:
    return {run.seed for run in cell.runs if run.seed is not None}


def note_judge(
    judge: dict,
    judged: dict[str, list[dict]],
    questions: CommonQuestions,
    name: str | None = None,
) -> list[str]:
    """What limits the scores of one judge: its size, questions left out, failed judgements.

    judge: of judge_identity.describe_judge. judged: run id -> all of its judgements by this judge.
    name: of the measure and the judge; None: the judge's title.
    """
    name, notes = name or judge["title"], []
    if judge["validation"]:
        notes.append(judge["agreement_text"])
    if mark := judge_identity.smoke_mark(judge):
        notes.append(f"{name}: {mark}")
    elif judge_identity.is_program(judge["judge"]):
        pass
    elif judge["judge_params_b"] is None and judge["validation"] is None:
        notes.append(
            f"judge {judge['judge']}: its size is not known; taken as "
            f"{judgements.SMOKE_TEST_BELOW_B:g}B or more"
        )
    if questions.left_out:
        runs = sorted({run_id for lacking in questions.left_out.values() for run_id in lacking})
        n_common = len(questions.common)
        notes.append(
            f"{name}: {COMPARED_ON} {n_common} of {n_common + len(questions.left_out)} questions "
            f"that all runs were judged on; left out {shortened(questions.left_out)} "
            f"(lacking or partly judged in {shortened(runs)})"
        )
    notes += [f"{name}: {text}" for text in note_failures(judged)]
    notes += [f"{name}: {text}" for text in note_readings(judged)]
    served = {row["served_model"] for rows in judged.values() for row in rows} - {None}
    if len(served) > 1:
        listed = ", ".join(sorted(served))
        notes.append(f"{name}: answered by different versions of the model: {listed}")
    return notes


def note_failures(judged: dict[str, list[dict]]) -> list[str]:
    """Judgements without a score: by run, of many runs together (the tables have them by cell)."""
    failed = {
        run_id: [str(row["status"]) for row in rows if row["status"] != "ok"]
        for run_id, rows in judged.items()
    }
    failed = {run_id: statuses for run_id, statuses in failed.items() if statuses}
    if len(failed) > MOST_LISTED:
        of = f"{len(failed)} of {len(judged)} runs"
        n_judged = sum(len(judged[run_id]) for run_id in failed)
        groups = [(of, [one for statuses in failed.values() for one in statuses], n_judged)]
    else:
        groups = [(run_id, statuses, len(judged[run_id])) for run_id, statuses in failed.items()]
    return [
        f"{who}: {len(statuses)} of {n_judged} judgements have no score ({count_by_name(statuses)})"
        for who, statuses, n_judged in groups
    ]


def count_by_name(names: list[str]) -> str:
    """["parse", "length", "parse"] -> "length 1, parse 2"."""
    return ", ".join(f"{name} {n}" for name, n in sorted(Counter(names).items()))


def shortened(names: Iterable) -> str:
    """Names in a line, of many the first: "81, 82, 83 and 12 more"."""
    names = list(map(str, names))
    if len(names) <= MOST_LISTED + 1:
        return ", ".join(names)
    return f"{', '.join(names[:MOST_LISTED])} and {len(names) - MOST_LISTED} more"


def note_readings(judged: dict[str, list[dict]]) -> list[str]:
    """Ratings that are less certain than others, as judge.py has marked them."""
    rated = [row for rows in judged.values() for row in rows if row["status"] == "ok"]
    readings = Counter(row.get("reading") for row in rated)
    faint = sum(row.get("rating_mass") is not None and row["rating_mass"] < 0.5 for row in rated)
    counts = {
        "were read from [N] where the judge wrote no [[N]] (FastChat's fallback)": readings[
            "fallback"
        ],
        "hold several ratings or verdicts, of which the first and the last differ": readings[
            "several"
        ],
        "rest on ratings or verdicts that hold less than half of the judge's probability": faint,
    }
    return [f"{n} of {len(rated)} judgements {what}" for what, n in counts.items() if n]


def is_caveat(note: str) -> bool:
    """Whether a note says what the answer is without: runs, scores or questions."""
    return note.startswith("left out") or COMPARED_ON in note


# ---- claims -------------------------------------------------------------------------------------


def fold_claims(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """(verdicts to show, those to fold): claims of other studies, of whose losses, model or scores
    there is no run, are in the way of those on the runs that are there.
    """
    shown = [row for row in rows if row["concerns_runs"]]
    return shown, [row for row in rows if not row["concerns_runs"]]


def folded_text(folded: list[dict], others: bool) -> str:
    """others: whether claims are shown beside these."""
    ids = list(dict.fromkeys(row["id"] for row in folded))
    verb = "are" if len(ids) > 1 else "is"
    return (
        f"{texts.count_text(len(ids), 'more claims' if others else 'claims')} {verb} of other "
        f"studies: no run of their losses, model or score ({', '.join(ids)})"
    )


# ---- what is missing ----------------------------------------------------------------------------


class Lack(NamedTuple):
    """Something that some runs lack, and the command that would supply it."""

    what: str
    runs: list[Run]
    next: str


def find_missing(runs: list[Run], judges: list[dict], args: argparse.Namespace) -> list[dict]:
    """What could not be done, of which runs, and what would supply it.

    judges: of judge_identity.describe_judge, one for each judge of the study.
    """
    gaps = [
        {"what": lack.what, "runs": [run.run_id for run in lack.runs], "next": lack.next}
        for lack in run_gaps(runs, judges)
        if lack.runs
    ]
    gaps += [
        {"what": stale.what, "runs": run_ids, "next": stale.next}
        for stale, run_ids in group_stale(runs).items()
    ]
    return gaps + study_gaps(runs, args)


def run_gaps(runs: list[Run], judges: list[dict]) -> list[Lack]:
    """What single runs lack; `runs` of a lack may be empty."""
    trained = [run for run in runs if not run.untrained]
    ended = [run for run in trained if run.summary]
    usable = usable_runs(runs)
    unfinished = [run for run in trained if run.status == "unfinished"]
    unrecorded = [run for run in trained if run.status == "no training record"]
    # What was taken out of a run is listed on its own.
    taken = {(run.run_id, stale.what) for run in runs for stale in run.stale}
    no_curve = [
        run
        for run in ended
        if not (run.steps or run.evals or (run.run_id, "learning curve") in taken)
    ]
    no_pairs = [run for run in ended if run in usable and not run.val and not run.stale]
    # A study of another benchmark lacks nothing of MT-Bench.
    of_mt_bench = any(MT_BENCH in run.benches for run in runs) or not any(
        files.judgements() for run in runs for files in run.benches.values()
    )
    no_judge = [run for run in usable if of_mt_bench and not run.judged and not run.stale]
    lacks = [
        Lack("accuracy (unfinished)", unfinished, "the same train_pref.py command again"),
        Lack("accuracy (no summary.json)", unrecorded, "train_pref.py"),
        Lack("learning curve (no metrics.jsonl)", no_curve, "train_pref.py"),
        Lack("margins (no val_pairs.jsonl)", no_pairs, "train_pref.py"),
        Lack("MT-Bench (no judgements)", no_judge, "gen_mtbench.py, then judge.py"),
    ]
    with_kl = [run for run in usable if run.kl]
    no_kl = [run for run in usable if run.answers and not run.kl and not run.untrained]
    lacks.append(
        Lack("KL (no log-probs in answers)", no_kl if with_kl else [], "gen_mtbench.py --kl")
    )
    for judge in judges:
        lacks += judge_gaps(judge, usable, [other for other in judges if other is not judge])
    return lacks


def judge_command(judge: dict, others: list[dict]) -> str:
    """The command that asks this judge, and none of the others."""
    command = f"judge.py --judge {judge['judge']}"
    address, settings = judge["judge_address"] or "", judge["judge_settings"]
    if address.startswith("http"):
        command += f" --base_url {address}"
        if settings and any(other["judge"] == judge["judge"] for other in others):
            command += f" --parameters {shlex.quote(settings)}"
    return command


def judge_gaps(judge: dict, usable: list[Run], others: list[dict]) -> list[Lack]:
    """What runs lack of one judge's ratings. others: the study's other judges."""
    key = JudgeKey(*(judge[name] for name in JudgeKey._fields))
    command = judge_command(judge, others)
    judged = {run.run_id: run.judged[key] for run in usable if key in run.judged}
    left_out = cell_rows.common_questions(judged).left_out
    incomplete = {run_id for run_ids in left_out.values() for run_id in run_ids}
    failed = {
        run_id for run_id, rows in judged.items() if any(row["status"] != "ok" for row in rows)
    }

    def runs(run_ids: set[str]) -> list[Run]:
        return [run for run in usable if run.run_id in run_ids]

    name = f"MT-Bench by {judge['title']}"
    lacking = [run for run in usable if run.judged and key not in run.judged] if others else []
    return [
        Lack(name, lacking, command),
        Lack(
            f"{name} on all questions ({len(left_out)} left out)",
            runs(incomplete),
            f"gen_mtbench.py, then {command}",
        ),
        Lack(f"{name}: judgements without a score", runs(failed), f"{command} --retry_failed"),
    ]


def usable_runs(runs: list[Run]) -> list[Run]:
    """Runs whose model can be judged: neither unfinished, nor diverged before the first evaluation,
    which leaves no adapter.
    """
    return [
        run
        for run in runs
        if run.untrained
        or (run.status != "unfinished" and not (run.summary and run.best_step is None))
    ]


def study_gaps(runs: list[Run], args: argparse.Namespace) -> list[dict]:
    """What the study lacks as a whole."""
    gaps = []

    def add(what: str, next_step: str) -> None:
        gaps.append({"what": what, "runs": [], "next": next_step})

    benches = [files for run in runs for files in run.benches.values()]
    if any(files.judged for files in benches) and not any(files.pairs for files in benches):
        add("win rates (no pairwise judgements)", "judge.py --grading pair")
    if not any(files.kl for run in usable_runs(runs) for files in run.benches.values()):
        add("score against KL (no log-probs in answers)", "gen_mtbench.py --kl")
    if not any(run.untrained for run in runs):
        add("the untrained model (run base)", "gen_mtbench.py and judge.py")
    losses = {run.loss for run in runs}
    for flag, loss in (("baseline", args.baseline), ("proposed", args.proposed)):
        if loss not in losses:
            what = f"improvement of {args.proposed} over {args.baseline} (no run of {loss})"
            add(what, f"train_pref.py --loss {loss}, or another --{flag}")
    return gaps


def missing_text(gap: dict) -> str:
    of = f" of {shortened(gap['runs'])}" if gap["runs"] else ""
    return f"{gap['what']}{of}; next: {gap['next']}"


# ---- on the terminal ----------------------------------------------------------------------------


def note_replaced(folder: Path, n_runs: int) -> str | None:
    """A line where the comparison of `n_runs` runs replaces one of more runs."""
    path = folder / "aggregated_metrics.json"
    try:
        before = disk.read_json(path).get("runs") if path.is_file() else None
    except UserError:  # damaged: it is replaced in any case
        before = None
    if not isinstance(before, list) or len(before) <= n_runs:
        return None
    return f"{folder}: the comparison of {len(before)} runs is replaced; --out DIR keeps both"


def print_summary(results_dir: Path, folder: Path, comparison: dict) -> None:
    """Print the runs by status, notes, gaps, and where the results are. folder: --out."""
    statuses = Counter(run["status"] for run in comparison["runs"])
    by_status = ", ".join(f"{n} {status}" for status, n in sorted(statuses.items()))
    print(f"\n{texts.count_text(len(comparison['runs']), 'runs')}: {by_status}")
    for note in comparison["notes"]:
        print(f"  note: {note}")
    for gap in comparison["missing"]:
        print(f"  missing: {missing_text(gap)}")
    if not comparison["missing"]:
        print("  nothing is missing")
    print(f"report: {folder / 'report.html'}")
    print(f"results: {folder / 'aggregated_metrics.json'}, {results_dir}/<run_id>/metrics.json")
    for name in ("tables", "figures"):
        if stems := sorted({path.stem for path in (folder / name).glob("*.*")}):
            print(f"{name}: {folder / name}/ ({shortened(stems)})")
