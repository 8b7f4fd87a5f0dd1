"""The figures of analyze.py, as PDF and PNG: which exist, in which order, and what they answer.

file name                  question                                              drawn by
comparison_*
  <score>_bars             How good is each cell?                                score_figures
  <score>_differences      Is it better than the baseline, and how sure is that? pair_figures
  <score>_over_beta        Does that depend on beta?                             curve_figures
  <score>_heatmap          And on tau?                                           curve_figures
  mt_bench_categories      What is it good at?                                   score_figures
  win_matrix               Which answers does a judge prefer side by side?       pair_figures
  movement                 What was gained for moving away from the reference?   curve_figures
  <score>_boxes            How much do runs of one loss differ?                  score_figures
  learning_curves          How did training go, by loss?                         curve_figures
<run_id>_learning_curve    How did this run go?                                  run_figures

<score> is accuracy or mt_bench. With several judges, a suffix names the judge.
"""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from pref.analysis import (
    curve_figures,
    judge_identity,
    pair_figures,
    run_figures,
    score_figures,
    texts,
)
from pref.analysis.figure_parts import Look
from pref.analysis.runs import Run
from pref.files import console, drawing

WORTH_PROCESSES = 40  # figures: a process takes seconds to import what it draws with
FIGURE_TITLES = {  # comparison_<key>: the order and the captions of the report
    "accuracy_bars": "Validation accuracy by cell",
    "mt_bench_bars": "MT-Bench by cell",
    "accuracy_differences": "Differences in accuracy",
    "mt_bench_differences": "Differences in MT-Bench score",
    "accuracy_over_beta": "Accuracy over beta",
    "mt_bench_over_beta": "MT-Bench over beta",
    "accuracy_heatmap": "Accuracy over beta and tau",
    "mt_bench_heatmap": "MT-Bench over beta and tau",
    "mt_bench_categories": "MT-Bench by category",
    "win_matrix": "Win rates",
    "movement": "Gain against distance from the reference",
    "accuracy_boxes": "Accuracy of every run",
    "mt_bench_boxes": "MT-Bench of every run",
    "learning_curves": "Learning curves by loss",
}


def figure_kind(path: Path) -> str | None:
    """The key of FIGURE_TITLES that a file's name begins with."""
    kinds = (kind for kind in FIGURE_TITLES if path.stem.startswith(f"comparison_{kind}"))
    return next(kinds, None)


def figure_order(path: Path) -> tuple[int, str]:
    """A key to sort files by: in order of FIGURE_TITLES, unknown ones last."""
    kind = figure_kind(path)
    return (list(FIGURE_TITLES).index(kind) if kind else len(FIGURE_TITLES), path.stem)


def figure_title(path: Path) -> str:
    """The caption of a file; with several judges it names the judge."""
    kind = figure_kind(path)
    if kind is None:
        return path.stem
    judge = path.stem.removeprefix(f"comparison_{kind}").strip("_")
    return FIGURE_TITLES[kind] + (f", {judge}" if judge else "")


def draw_all(runs: list[Run], comparison: dict, folder: Path) -> None:
    """Draw the figure of each run, in its folder, and those of the comparison, in `folder`.

    comparison: aggregated_metrics.json. Notes about figures that cannot be drawn are added to it.
    The figures of the last analysis stay until all of this one have been drawn.
    """
    runs = [run_figures.without_texts(run) for run in runs]
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".figures.", dir=folder.parent) as beside:
        jobs = [partial(run_figures.draw_run, run) for run in runs]
        jobs += comparison_jobs(Path(beside), comparison, runs)
        draw_jobs(jobs)
        drawn = sorted(Path(beside).iterdir())
        for path in drawn:
            path.replace(folder / path.name)
    for old in folder.glob("comparison_*.*"):
        if old.name not in {path.name for path in drawn}:
            old.unlink()


def draw_jobs(jobs: list[Callable[[], None]]) -> None:
    if len(jobs) < WORTH_PROCESSES:
        for job in console.progress(jobs, "drawing", "figures"):
            draw(job)
        return
    # Spawned, not forked: a fork of a process that has threads, such as those of a linear-algebra
    # library, can hang.
    with ProcessPoolExecutor(console.usable_cores(), multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(draw, job) for job in jobs]
        for future in console.progress(futures, "drawing", "figures"):
            future.result()


@drawing.own_style()
def draw(job: Callable[[], None]) -> None:
    job()


def comparison_jobs(folder: Path, comparison: dict, runs: list[Run]) -> list[Callable[[], None]]:
    """A function for each figure of the comparison that there are data for.

    A heat map that cannot be drawn is reported in comparison["notes"].
    """
    jobs: list[Callable[[], None]] = []

    # 1) How training went.
    if with_curve := [run for run in runs if curve_figures.has_curve(run)]:
        stem = folder / "comparison_learning_curves"
        jobs.append(partial(curve_figures.draw_learning_curves, stem, with_curve))

    # 2) Each score: validation accuracy, and MT-Bench by each judge.
    accuracy = comparison["accuracy"]
    if accuracy["cells"]:
        look = Look(
            title="Validation accuracy" + trial_mark(comparison),
            label="validation accuracy (best acc_ref)",
            limits=(0, 1),
            digits=3,
            se_over="pairs",
            metric="best_acc_ref",
        )
        jobs += score_jobs(folder, "accuracy", "", accuracy, look, comparison)
    for judge in comparison["mt_bench"]:
        if judge["cells"]:
            jobs += mt_bench_jobs(folder, judge, comparison)

    # 3) Everything besides the scores.
    movement = comparison["movement"]
    if panels := curve_figures.find_movement_panels(movement):
        stem = folder / "comparison_movement"
        jobs.append(partial(curve_figures.draw_movement, stem, movement, panels))
    if pairs := comparison["pairs"]:
        jobs.append(partial(pair_figures.draw_win_matrix, folder / "comparison_win_matrix", pairs))
    return jobs


def mt_bench_jobs(folder: Path, judge: dict, comparison: dict) -> list[Callable[[], None]]:
    """The figures of MT-Bench by one judge."""
    suffix = judge_identity.file_suffix(judge, comparison["mt_bench"])
    title = f"MT-Bench, {len(judge['questions'])} questions, {judge['title']}"
    if judge["smoke_test"]:
        title += f"\n{judge_identity.smoke_mark(judge)}"
    title += trial_mark(comparison)
    look = Look(
        title=title,
        label="MT-Bench score (1-10, mean of both turns)",
        limits=(0, 10),
        digits=2,
        se_over="questions",
        metric="score",
    )
    jobs = score_jobs(folder, "mt_bench", suffix, judge, look, comparison)
    if judge["categories"]:
        stem = folder / f"comparison_mt_bench_categories{suffix}"
        jobs.append(partial(score_figures.draw_categories, stem, judge, title))
    return jobs


def trial_mark(comparison: dict) -> str:
    return f"\n{texts.TRIAL}" if comparison["trial"] else ""


def score_jobs(
    folder: Path, name: str, suffix: str, part: dict, look: Look, comparison: dict
) -> list[Callable[[], None]]:
    """The figures that accuracy and MT-Bench both have.

    part: comparison["accuracy"] or one of comparison["mt_bench"].
    """

    def stem(kind: str) -> Path:
        return folder / f"comparison_{name}_{kind}{suffix}"

    cells = part["cells"]
    lines = reference_lines(part, comparison["baseline"], look.metric)
    jobs: list[Callable[[], None]] = [
        partial(score_figures.draw_bars, stem("bars"), cells, look, lines)
    ]
    if runs := part["runs"]:
        jobs.append(partial(score_figures.draw_boxes, stem("boxes"), runs, look))
    if grids := curve_figures.find_grids(cells, look.metric):
        jobs.append(partial(curve_figures.draw_heatmaps, stem("heatmap"), grids, look))
    else:
        what = "accuracy" if name == "accuracy" else f"MT-Bench, {part['title']}"
        note = f"no heat map of {what}: no loss has two cells of beta x tau"
        comparison["notes"].append(note)
    if series := curve_figures.find_series(cells, look.metric):
        untrained = [row[look.metric] for row in untrained_cells(part, look.metric)]
        jobs.append(
            partial(curve_figures.draw_beta_curves, stem("over_beta"), series, untrained, look)
        )
    differences = [
        row
        for row in part["improvement"]
        if row["comparison"] != "best baseline" and row["estimate"] is not None
    ]
    # Two best cells at the same beta are one comparison, with the headline's p-value.
    headline = {
        (row["proposed"], row["baseline"])
        for row in differences
        if row["comparison"] == "best of grid"
    }
    differences = [
        row
        for row in differences
        if row["comparison"] != "matched beta" or (row["proposed"], row["baseline"]) not in headline
    ]
    if differences:
        jobs.append(partial(pair_figures.draw_differences, stem("differences"), differences, look))
    return jobs


def untrained_cells(part: dict, metric: str) -> list[dict]:
    return [row for row in part["cells"] if row["untrained"] and row[metric] is not None]


def reference_lines(part: dict, baseline: str, metric: str) -> dict[str, float]:
    """Name -> score of the untrained model and of the baseline that improvement is measured from.

    Without an improvement, the baseline is included only if it has a single cell.
    """
    untrained = untrained_cells(part, metric)
    lines = {f"untrained model ({row['label']})": row[metric] for row in untrained}
    headline = (row for row in part["improvement"] if row["comparison"] == "best of grid")
    if row := next(headline, None):
        selection = ""
        if row["baseline_cells"] > 1:
            selection = f", best of {row['baseline_cells']} by {row['selected_by']}"
        return lines | {f"baseline ({row['baseline']}{selection})": row["baseline_score"]}
    cells = [row for row in part["cells"] if row["loss"] == baseline and row[metric] is not None]
    if len(cells) == 1:
        lines |= {f"baseline ({row['label']})": row[metric] for row in cells}
    return lines
