"""The user's own answer, in short: which loss won, by how much, and what is not decided.

`find_answers` says it for each score, those of judges before validation accuracy, from the
differences in aggregated_metrics.json. A difference is decided as a claim is: by the adjusted test
and the interval together, never by one seed, never by a judge that is too small, never in trial
runs; and the best of more cells must win by more than chance may give it. The report opens with
the answers, and the terminal prints them last.
"""

from typing import NamedTuple

from pref.analysis import estimates, judge_identity, measures, stats, texts, variation
from pref.analysis.measures import Measure
from pref.analysis.texts import TRIAL

MOST_NAMED = 5  # cells that a sentence names
ONE_SEED = "one seed: how much another seed would differ is not known; train three"


def find_answers(comparison: dict) -> list[dict]:
    """One answer for each score that was measured.

    Each has `score` (what was measured), `lead` (one sentence), and `rows`. A row is a comparison:
    `verdict` ("better", "worse", "not decided" or "not measured"), `text` and `detail`. Of what a
    judge gave, `judge` says how well the judge agrees with human votes.

    comparison: aggregated_metrics.json.
    """
    trial = TRIAL if comparison["trial"] else ""
    answers = []
    for measure, part in measures.parts_of(comparison):
        if part["cells"]:
            mark = trial or (judge_identity.smoke_mark(part) if measure.judged else "")
            found = answer(score_name(measure, part), measure, part, mark, comparison)
            answers.append(found | {"judge": part.get("agreement_text")})
    accuracy = comparison["accuracy"]
    if any(row["best_acc_ref"] is not None for row in accuracy["cells"]):
        name = "validation accuracy (share of pairs)"
        found = answer(name, measures.ACCURACY, accuracy, trial, comparison)
        answers.append(found | {"judge": None})
    return answers or [no_answer(comparison)]


def score_name(measure: Measure, part: dict) -> str:
    """E.g. "MT-Bench by gpt-5-mini, prompts mt_bench"."""
    if not part.get("title"):
        return measure.heading(part)
    heading = measure.heading(part | {"title": None})
    return f"{heading} by {part['title'].removeprefix('judge ')}"


def no_answer(comparison: dict) -> dict:
    """The answer of a study in which nothing has been measured."""
    n_runs, n_diverged = len(comparison["runs"]), len(comparison["diverged"])
    lead = "No run has a score or a validation accuracy yet: see what is missing below."
    if n_diverged:
        lead = f"{n_diverged} of {texts.count_text(n_runs, 'runs')} diverged. {lead}"
    return {"score": "Nothing is measured", "lead": lead, "rows": [], "judge": None}


def answer(name: str, measure: Measure, part: dict, mark: str, comparison: dict) -> dict:
    """The answer for one score, whose name is `name`.

    part: of the measure, in `comparison`. mark: why the scores measure nothing, or "".
    """
    baseline, cells = comparison["baseline"], part["cells"]
    metric, unit, digits, units = measure.value, measure.unit, measure.digits, measure.units
    if measure is measures.MT:
        moved = movement_of(cells, comparison["movement"])
    else:
        moved = movement_of_part(part)
    lost = lost_runs(cells, comparison["diverged"])
    differences = [row for row in part["improvement"] if row["estimate"] is not None]
    headline = [row for row in differences if row["comparison"] == "best of grid"]
    headline.sort(key=lambda row: -row["estimate"])
    untrained = [row for row in differences if row["comparison"] == "untrained model"]
    shown = headline + [row for row in untrained if row["loss"] == baseline or not headline]
    verdicts = [verdict_of(row, mark, lost) for row in shown]
    if mark:
        lead = f"{mark}."
    elif headline:
        lead = lead_of(headline, verdicts[: len(headline)], unit, digits)
    else:
        has_baseline = any(cell["loss"] == baseline for cell in comparison["accuracy"]["cells"])
        lead = lead_without_comparison(part, measure, baseline, has_baseline)
    lead = " ".join(filter(None, [lead, unmeasured_text(part, metric, comparison)]))
    rows = [
        {
            "verdict": verdict,
            "text": f"{row['proposed']} against {row['baseline']}: {size(row, unit, digits)}",
            "detail": "; ".join(details(row, verdict, digits, units, moved, lost)),
        }
        for row, verdict in zip(shown, verdicts)
    ]
    return {"score": name, "lead": lead, "rows": rows}


def lead_of(ranked: list[dict], verdicts: list[str], unit: str, digits: int) -> str:
    """The answer in one sentence. ranked: the headline differences, the largest first."""
    theirs = ranked[0]["baseline"]
    if "better" in verdicts:
        won = ranked[verdicts.index("better")]
        lead = f"{won['proposed']} is better than {theirs}: {size(won, unit, digits)}."
        close = [row for row in ranked if row is not won and reaches(row, won)]
        if close:
            lead += f" Whether it is the best of all is not decided against {names(close)}."
        return lead
    if set(verdicts) == {"worse"}:
        return f"{theirs} is better than {names(ranked)}."
    open_ones = [row for row, verdict in zip(ranked, verdicts) if verdict == "not decided"]
    verb = "differs" if len(open_ones) == 1 else "differ"
    return f"Not decided: whether {names(open_ones)} {verb} from {theirs}."


def unmeasured_text(part: dict, metric: str, comparison: dict) -> str:
    """Names the trained cells without a score, of which the answer says nothing; "" if there are
    none. A loss that diverged in all of its runs must not be passed over.
    """
    measured = {cell["label"] for cell in part["cells"] if cell[metric] is not None}
    found = {}  # label -> text
    for cell in [*part["cells"], *comparison["accuracy"]["cells"]]:
        if cell["label"] not in measured and not cell["untrained"]:
            runs = texts.count_text(cell["n_diverged"], "runs")
            why = f" ({runs} diverged)" if cell["n_diverged"] else ""
            found.setdefault(cell["label"], cell["label"] + why)
    if not found or not measured:  # where nothing is measured, the answer says so itself
        return ""
    named = list(found.values())[:MOST_NAMED]
    more = f" and {len(found) - len(named)} more" if len(found) > len(named) else ""
    return f"Not measured: {', '.join(named)}{more}."


def reaches(row: dict, won: dict) -> bool:
    """Whether the interval of a difference reaches into the winner's."""
    return row["high"] is None or row["high"] >= won["low"]


def verdict_of(row: dict, mark: str, lost: dict[str, str]) -> str:
    """What a row of "improvement" decides. A cell that lost runs looks better than it is: that it
    is better is then not decided.
    """
    if mark:
        return "not measured"
    p, low, high = row["p_adjusted"], row["low"], row["high"]
    if row.get("caveat"):  # the test's error rates are not known for such data
        return "not decided"
    if row["paired"] == "one seed" or None in (p, low, high) or p >= stats.ALPHA:
        return "not decided"
    gain = gain_by_selection(row)
    if low > max(0.0, gain) and row["proposed"] not in lost:
        return "better"
    if high < min(0.0, gain) and row["baseline"] not in lost:
        return "worse"
    return "not decided"


def gain_by_selection(row: dict) -> float:
    """How far chance alone may favour the side that is the best of more cells (variation.py)."""
    if None in (row["selected_by"], row["se"], row["p_adjusted"]):
        return 0.0
    return variation.chance_gain(row["se"], row["proposed_cells"], row["baseline_cells"])


def lost_runs(cells: list[dict], diverged: list[str]) -> dict[str, str]:
    """Label -> how many runs of the cell diverged and left no score; other cells have no key."""
    lost = {}
    for cell in cells:
        count = cell["n_diverged"] - len(set(cell["runs"]) & set(diverged))
        if count:
            runs = texts.count_text(count, "runs")
            lost[cell["label"]] = f"{runs} of {cell['label']} diverged and left no score"
    return lost


class Moved(NamedTuple):
    """How far a cell has moved, mean over its runs; None where that was not measured."""

    kl: float | None  # nats an answer, to the base
    tokens: float | None  # length of an answer
    cut_off: float | None  # share of answers that reached the limit of tokens
    characters: float | None = None  # length of an answer, where tokens are not counted


def movement_of(cells: list[dict], movement: list[dict]) -> dict[str, Moved]:
    """Label -> how far the cell has moved: a score may be gained by leaving the reference behind,
    or by writing more.

    cells, movement: rows in aggregated_metrics.json.
    """
    row_of = {row["run_id"]: row for row in movement}

    def mean_of(cell: dict, name: str) -> float | None:
        values = [row_of[run_id][name] for run_id in cell["runs"]]
        return stats.mean(value for value in values if value is not None)

    names = ("kl", "tokens", "cut_off")
    return {cell["label"]: Moved(*(mean_of(cell, name) for name in names)) for cell in cells}


def movement_of_part(part: dict) -> dict[str, Moved]:
    """The same of the answers that this part is of; nothing of validation accuracy and tasks."""
    distance = {row["label"]: row["kl"] for row in part.get("frontier", ())}
    return {
        cell["label"]: Moved(distance.get(cell["label"]), None, None, cell.get("length"))
        for cell in part["cells"]
    }


def moved_texts(ours: Moved, theirs: Moved) -> list[str]:
    texts_of = []
    if None not in (ours.kl, theirs.kl):
        texts_of.append(f"KL to the base {ours.kl:.2f} against {theirs.kl:.2f} nats an answer")
    elif ours.kl is not None:
        texts_of.append(f"KL to the base {ours.kl:.2f} nats an answer")
    if None not in (ours.characters, theirs.characters):
        lengths = f"{ours.characters:.0f} against {theirs.characters:.0f}"
        texts_of.append(f"answers of {lengths} characters")
    if None not in (ours.tokens, theirs.tokens):
        text = f"answers of {ours.tokens:.0f} against {theirs.tokens:.0f} tokens"
        if None not in (ours.cut_off, theirs.cut_off) and max(ours.cut_off, theirs.cut_off) > 0:
            text += f", {ours.cut_off:.1%} against {theirs.cut_off:.1%} of them cut off"
        texts_of.append(text)
    return texts_of


def details(
    row: dict,
    verdict: str,
    digits: int,
    units: str,
    moved: dict[str, Moved],
    lost: dict[str, str],
) -> list[str]:
    """What a comparison rests on, what the gain came with, and why it is open."""
    found = [texts.count_text(row["n_units"], units), f"seeds: {row['seeds_compared']}"]
    if row["p_adjusted"] is not None:
        method = "Holm" if row["comparison"] == "best of grid" else "Benjamini-Hochberg"
        found.append(f"p {texts.p_text(row['p_adjusted'])} ({method})")
    if row["selected_by"] and max(row["proposed_cells"], row["baseline_cells"]) > 1:
        found.append(
            f"best of {row['proposed_cells']} against best of {row['baseline_cells']}, "
            f"selected by {row['selected_by']}"
        )
        if gain := gain_by_selection(row):
            direction = "high" if gain > 0 else "low"
            found.append(
                f"chance alone may have put the difference up to {abs(gain):.{digits}f} too "
                f"{direction}"
            )
    if row["differs_in"]:
        found.append(f"differs in {row['differs_in']} too")
    sides = (row["proposed"], row["baseline"])
    found += moved_texts(*(moved[label] for label in sides))
    found += without_gamed_texts(row, digits)
    found += [lost[label] for label in sides if label in lost]
    if verdict == "not decided" and not any(label in lost for label in sides):
        found.append(why_open(row, digits))
    return found


def without_gamed_texts(row: dict, digits: int) -> list[str]:
    """A difference of length-controlled win rates without AlpacaEval's gamed rows; none for other
    measures.
    """
    estimate, low, high = (row.get(key) for key in estimates.WITHOUT_GAMED)
    if None in (estimate, low, high):
        return []
    text = f"without the gamed rows {estimate:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
    side = ((row["low"] or 0) > 0) - ((row["high"] or 0) < 0)  # of 0 that the interval lies on
    if side and side * (low if side > 0 else high) <= 0:
        text += ", which does not confirm it"
    return [text]


def why_open(row: dict, digits: int) -> str:
    if row["paired"] == "one seed":
        return ONE_SEED
    if row.get("caveat"):
        return row["caveat"]
    if row["p_adjusted"] is None:
        return "all differences are equal, or there is one question: nothing measures the error"
    if row["low"] is not None and (row["low"] > 0 or row["high"] < 0):
        if row["p_adjusted"] < stats.ALPHA:
            return "the difference is not clear of what chance gives the best of more cells"
        return "of so many comparisons, one such interval leaves out 0 by chance: p is adjusted"
    if row["detectable"] is None:
        return "the data do not say which is better"
    if abs(row["estimate"]) >= row["detectable"]:
        return "it was close: a study of this size decides such a difference four times in five"
    detectable = f"{row['detectable']:.{digits}f}"
    return f"a study of this size finds a difference of {detectable} in four cases of five"


def size(row: dict, unit: str, digits: int) -> str:
    """E.g. "+0.98 MT-Bench points, 95 % interval [+0.70, +1.26]"."""
    if None in (row["low"], row["high"]):
        return f"{row['estimate']:+.{digits}f} {unit}"
    low, high = (f"{row[key]:+.{digits}f}" for key in ("low", "high"))
    return f"{row['estimate']:+.{digits}f} {unit}, 95 % interval [{low}, {high}]"


def lead_without_comparison(part: dict, measure: Measure, baseline: str, has_baseline: bool) -> str:
    """What can be said where no loss could be set against the baseline.

    has_baseline: whether the baseline has runs at all, measured or not.
    """
    metric, digits = measure.value, measure.digits
    scored = [row for row in part["cells"] if row[metric] is not None]
    if not scored:
        if left_out := part.get("questions_left_out"):
            return (
                "Nothing is compared: no question was judged in all runs "
                f"({texts.count_text(len(left_out), 'questions')} in some); see the notes."
            )
        if any(row.get("n_scored") for row in part["cells"]):  # no length control, for example
            return "Nothing is measured, although judgements have a verdict; see the notes."
        return "Nothing is measured: no judgement has a score."
    best = max(scored, key=lambda row: row[metric])
    losses = list(dict.fromkeys(row["loss"] for row in scored if not row["untrained"]))
    highest = f"the highest is {best['label']} with {best[metric]:.{digits}f}"
    if baseline not in losses:
        if has_baseline or any(cell["loss"] == baseline for cell in part["cells"]):
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


def names(rows: list[dict]) -> str:
    labels = [row["proposed"] for row in rows]
    return " and ".join(filter(None, [", ".join(labels[:-1]), labels[-1]]))


def text_lines(answers: list[dict]) -> list[str]:
    """The answers for a terminal."""
    lines = []
    for one in answers:
        lines.append(f"{one['score']}: {one['lead']}")
        lines += [f"  {one['judge']}"] if one["judge"] else []
        for row in one["rows"]:
            lines += [f"  {row['verdict']}: {row['text']}", f"      {row['detail']}"]
    return lines
