"""The scores of a study in the order of trust, and what a score says nothing about.

1) Scores by a program (judge.py --judge py:FILE), and by a judge that agrees with human votes as
   often as humans do.
2) Other judges' scores, in the order of measures.py.
3) Imported tasks: what the training was not for.
4) Validation accuracy, which says nothing about answers.

What measures nothing, because the judge is too small or no trained run is scored, comes behind what
does.
"""

from typing import NamedTuple

from pref.analysis import judge_identity, judge_validation, length_control, measures, texts
from pref.analysis.measures import Measure
from pref.analysis.texts import TRIAL

MOST_NAMED = 5  # cells that a sentence names


class Score(NamedTuple):
    """One measure by one judge."""

    measure: Measure
    part: dict  # in aggregated_metrics.json
    mark: str  # why its numbers measure nothing, or ""

    @property
    def metric(self) -> str:
        """The metric of a claim on it; of what no claim may be on, what it is."""
        if self.part.get("definition") == length_control.UNREGULARISED:
            return length_control.UNREGULARISED
        return self.measure.metric(self.part)

    @property
    def is_program(self) -> bool:
        return self.part.get("grading") == "program"

    @property
    def name(self) -> str:
        """What a sentence calls it: "MT-Bench by gpt-5-mini", "constraints" of a task's program."""
        judge = None if self.is_program else self.part.get("judge")
        return f"{self.heading} by {judge}" if judge else self.heading

    @property
    def heading(self) -> str:
        """The same without the judge."""
        if self.measure is measures.ACCURACY:
            return "validation accuracy"
        if self.is_program:
            return self.part["bench"]
        heading = self.measure.heading(self.part | {"title": None})
        return f"{heading} (%)" if self.measure.limits == measures.PERCENT else heading

    @property
    def full_name(self) -> str:
        """E.g. "MT-Bench by gpt-5-mini, prompts mt_bench"."""
        if self.measure is measures.ACCURACY:
            return "validation accuracy (share of pairs)"
        if not self.part.get("title"):
            return self.measure.heading(self.part)
        heading = self.measure.heading(self.part | {"title": None})
        return f"{heading} by {self.part['title'].removeprefix('judge ')}"

    def is_measured(self) -> bool:
        """Whether a trained cell has a number."""
        cells = (cell for cell in self.part["cells"] if not cell["untrained"])
        return any(cell[self.measure.value] is not None for cell in cells)


def list_scores(comparison: dict) -> list[Score]:
    """Every score that was given, the most trustworthy first.

    comparison: aggregated_metrics.json.
    """
    trial = TRIAL if comparison["trial"] else ""
    found = []
    for measure, part in measures.parts_of(comparison):
        if part["cells"]:
            mark = trial or (judge_identity.smoke_mark(part) if measure.judged else "")
            found.append(Score(measure, part, mark))
    found.sort(key=lambda score: (bool(score.mark), not score.is_measured(), distrust(score)))
    accuracy = Score(measures.ACCURACY, comparison["accuracy"], trial)
    return [*found, accuracy] if accuracy.is_measured() else found


def distrust(score: Score) -> int:
    if not score.measure.judged:
        return 2
    validated = score.part.get("as_humans") == judge_validation.YES
    return 0 if validated or score.is_program else 1


# ---- what a score says nothing about ------------------------------------------------------------


def nothing_measured(comparison: dict) -> str:
    """Of a study in which nothing has been measured."""
    n_runs, n_diverged = len(comparison["runs"]), len(comparison["diverged"])
    said = "No run has a score or a validation accuracy yet: see what is missing below."
    if n_diverged:
        said = f"{n_diverged} of {texts.count_text(n_runs, 'runs')} diverged. {said}"
    return said


def unmeasured_text(score: Score, comparison: dict) -> str:
    """Names the trained cells without a score, of which the answer says nothing; "" if there are
    none. A loss that diverged in all of its runs must not be passed over.
    """
    metric, cells = score.measure.value, score.part["cells"]
    measured = {cell["label"] for cell in cells if cell[metric] is not None}
    found = {}  # label -> text
    for cell in [*cells, *comparison["accuracy"]["cells"]]:
        if cell["label"] not in measured and not cell["untrained"]:
            runs = texts.count_text(cell["n_diverged"], "runs")
            why = f" ({runs} diverged)" if cell["n_diverged"] else ""
            found.setdefault(cell["label"], cell["label"] + why)
    if not found or not measured:  # where nothing is measured, the answer says so itself
        return ""
    named = list(found.values())[:MOST_NAMED]
    more = f" and {len(found) - len(named)} more" if len(found) > len(named) else ""
    return f"Not measured: {', '.join(named)}{more}."


def without_comparison(score: Score, comparison: dict) -> str:
    """What can be said where no loss could be set against the baseline."""
    measure, cells, baseline = score.measure, score.part["cells"], comparison["baseline"]
    metric, digits = measure.value, measure.digits
    scored = [row for row in cells if row[metric] is not None]
    if not scored:
        if left_out := score.part.get("questions_left_out"):
            return (
                "Nothing is compared: no question was judged in all runs "
                f"({texts.count_text(len(left_out), 'questions')} in some); see the notes."
            )
        if any(row.get("n_scored") for row in cells):  # no length control, for example
            return "Nothing is measured, although judgements have a verdict; see the notes."
        return "Nothing is measured: no judgement has a score."
    best = max(scored, key=lambda row: row[metric])
    losses = list(dict.fromkeys(row["loss"] for row in scored if not row["untrained"]))
    highest = f"the highest is {best['label']} with {best[metric]:.{digits}f}"
    if not losses:
        return f"No trained run is measured yet ({highest})."
    if baseline not in losses:
        trained = [*cells, *comparison["accuracy"]["cells"]]
        if any(cell["loss"] == baseline for cell in trained):
            return (
                f"No loss is compared: no run of the baseline {baseline} is measured ({highest})."
            )
        return (
            f"No loss is compared: there is no run of the baseline {baseline} ({highest}); "
            "name another with --baseline."
        )
    if len(losses) < 2:
        return f"Only {losses[0]} was measured, so that no losses are compared ({highest})."
    unit = "question that was rated in all runs"
    if measure is measures.ACCURACY:
        unit = "pair in val_pairs.jsonl"
    return f"Nothing is tested: the losses share no {unit} ({highest})."
