"""The figures of analyze.py as PDF, PNG and SVG: which exist, in which order, what they answer.

file name                  question                                              drawn by
comparison_*
  <score>_frontier         What does it gain for its distance to the base?       frontier_figures
  <score>_bars             How good is each cell?                                score_figures
  <score>_differences      Is it better than the baseline, and how sure is that? pair_figures
  <score>_over_beta        Does that depend on beta?                             curve_figures
  <score>_heatmap          And on tau?                                           curve_figures
  <score>_categories       What is it good at?                                   score_figures
  win_matrix               Which answers does a judge prefer side by side?       pair_figures
  movement                 What was gained for moving away from the reference?   curve_figures
  <score>_rounds           What does each round on its own answers gain?         task_figures
  task_gold                What does selection by accuracy really select?        task_figures
  <score>_boxes            How much do runs of one loss differ?                  score_figures
  learning_curves          How did training go, by loss?                         curve_figures
<run_id>_learning_curve    How did this run go?                                  run_figures

<score> is a key of measures.py: accuracy, mt_bench, alpaca_eval_lc, ... With several judges,
baselines or versions, a suffix names them.
"""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from pref.analysis import (
    curve_figures,
    frontier_figures,
    judge_identity,
    measures,
    pair_figures,
    run_figures,
    score_figures,
    task_figures,
    texts,
)
from pref.analysis.figure_parts import Look, Styles, styles_of
from pref.analysis.measures import Measure
from pref.analysis.runs import Run
from pref.files import console, drawing

WORTH_PROCESSES = 40  # figures: a process takes seconds to import what it draws with
KINDS = {  # of a score's figures, in the order of the report: caption
    "frontier": "{} against KL to the base model",
    "bars": "{} by cell",
    "differences": "Differences in {}",
    "over_beta": "{} over beta",
    "heatmap": "{} over beta and tau",
    "rounds": "{} from round to round",
    "gold": "{} against validation accuracy",
    "categories": "{} by category",
}
LAST_KINDS = {"boxes": "{} of every run"}


def list_titles() -> dict[str, str]:
    """comparison_<key> -> caption, in the order of the report."""
    scores = {measures.ACCURACY.key: "Accuracy"}
    scores |= {measure.key: measure.short for measure in measures.MEASURES}
    # A caption knows the file's name alone: the figure's title says by which definition.
    scores[measures.ALPACA_EVAL_LC.key] = "AlpacaEval 2 at equal length"

    def titles(kinds: dict[str, str]) -> dict[str, str]:
        return {
            f"{key}_{kind}": caption.format(short)
            for kind, caption in kinds.items()
            for key, short in scores.items()
        }

    return {
        **titles(KINDS),
        "win_matrix": "Win rates",
        "movement": "Gain against distance from the reference",
        **titles(LAST_KINDS),
        "learning_curves": "Learning curves by loss",
    } | {
        "accuracy_bars": "Validation accuracy by cell",
        "accuracy_differences": "Differences in accuracy",
        "mt_bench_differences": "Differences in MT-Bench score",
    }


FIGURE_TITLES = list_titles()


def figure_kind(path: Path) -> str | None:
    """The key of FIGURE_TITLES that a file's name begins with."""
    kinds = [kind for kind in FIGURE_TITLES if path.stem.startswith(f"comparison_{kind}")]
    return max(kinds, key=len, default=None)


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
    styles = study_styles(comparison, runs)

    # 1) How training went.
    if with_curve := [run for run in runs if curve_figures.has_curve(run)]:
        stem = folder / "comparison_learning_curves"
        jobs.append(partial(curve_figures.draw_learning_curves, stem, with_curve, styles))

    # 2) Each score: validation accuracy, and what judges and tasks have measured.
    accuracy = comparison["accuracy"]
    if accuracy["cells"]:
        notes = trial_marks(comparison)
        look = look_of(measures.ACCURACY, accuracy, "validation accuracy", notes, styles)
        jobs += score_jobs(folder, measures.ACCURACY, "", accuracy, look, comparison)
    for measure, part in measures.parts_of(comparison):
        if part["cells"]:
            jobs += part_jobs(folder, measure, part, comparison, styles)

    # 3) Everything besides the scores.
    movement = comparison["movement"]
    if panels := curve_figures.find_movement_panels(movement):
        stem = folder / "comparison_movement"
        jobs.append(partial(curve_figures.draw_movement, stem, movement, panels, styles))
    if pairs := comparison["pairs"]:
        jobs.append(partial(pair_figures.draw_win_matrix, folder / "comparison_win_matrix", pairs))
    return jobs


def study_styles(comparison: dict, runs: list[Run]) -> Styles:
    """One colour a loss for all figures, also of those that show some of the losses alone."""
    parts = [comparison["accuracy"], *(part for _, part in measures.parts_of(comparison))]
    rows = [row for part in parts for row in part["cells"]]
    rows += [
        {"loss": run.loss, "tau": run.tau, "settings": None, "untrained": run.untrained}
        for run in runs
    ]
    # A run that has no score may still have moved from the reference.
    untrained = {row["loss"] for row in rows if row["untrained"]}
    rows += [row for row in comparison["movement"] if row["loss"] not in untrained]
    return styles_of(rows, comparison["baseline"])


def part_jobs(
    folder: Path, measure: Measure, part: dict, comparison: dict, styles: Styles
) -> list[Callable[[], None]]:
    """The figures of one part of a measure."""
    suffix = judge_identity.file_suffix(part, comparison[measure.key])
    notes = [measure.heading(part)]
    if measure is measures.MT:
        notes = [f"{len(part['questions'])} questions, {part['title']}"]
    if mark := judge_identity.smoke_mark(part) if measure.judged else "":
        notes.append(mark)
    notes += trial_marks(comparison)
    look = look_of(measure, part, measure.short, notes, styles)
    jobs = score_jobs(folder, measure, suffix, part, look, comparison)
    if part.get("categories"):
        stem = folder / f"comparison_{measure.key}_categories{suffix}"
        jobs.append(partial(score_figures.draw_categories, stem, part, look))
    if len(part["frontier"]) > 1:
        stem = folder / f"comparison_{measure.key}_frontier{suffix}"
        jobs.append(partial(frontier_figures.draw_frontier, stem, part, look))
    if part.get("rounds"):
        stem = folder / f"comparison_{measure.key}_rounds{suffix}"
        untrained = [row[look.metric] for row in untrained_cells(part, look.metric)]
        jobs.append(partial(task_figures.draw_rounds, stem, part["rounds"], untrained, look))
    if len(part.get("gold_points", [])) > 1:
        stem = folder / f"comparison_{measure.key}_gold{suffix}"
        jobs.append(partial(task_figures.draw_gold, stem, part, look))
    return jobs


def look_of(measure: Measure, part: dict, title: str, notes: list[str], styles: Styles) -> Look:
    return Look(
        title=title,
        label=measure.label,
        limits=measure.limits,
        digits=measure.digits,
        se_over=measure.se.removeprefix("se_over_"),
        metric=measure.value,
        notes=tuple(notes),
        styles=styles,
    )


def trial_marks(comparison: dict) -> list[str]:
    return [texts.TRIAL] if comparison["trial"] else []


def score_jobs(
    folder: Path, measure: Measure, suffix: str, part: dict, look: Look, comparison: dict
) -> list[Callable[[], None]]:
    """The figures that all measures have."""

    def stem(kind: str) -> Path:
        return folder / f"comparison_{measure.key}_{kind}{suffix}"

    cells = part["cells"]
    lines = reference_lines(part, comparison["baseline"], look.metric)
    jobs: list[Callable[[], None]] = [
        partial(score_figures.draw_bars, stem("bars"), cells, look, lines)
    ]
    if runs := part["runs"]:
        jobs.append(partial(score_figures.draw_boxes, stem("boxes"), runs, look))
    if grids := curve_figures.find_grids(cells, look.metric):
        jobs.append(partial(curve_figures.draw_heatmaps, stem("heatmap"), grids, look))
    elif measure in (measures.ACCURACY, measures.MT):  # for others, that would say it again
        what = "accuracy" if measure is measures.ACCURACY else measure.heading(part)
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
