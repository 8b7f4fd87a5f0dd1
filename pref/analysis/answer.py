"""The answer of each score: which loss won, by how much, and what is not decided.

`find_answers` says it for each score, the most trustworthy first (scores.py), from the differences
in aggregated_metrics.json. A difference is decided as a claim is (decisions.py): never by one seed,
never by a judge that is too small, never in trial runs. The first of them is what the report opens
with (opening.py).
"""

from pref.analysis import decisions, estimates, movement, opening, scores, texts
from pref.analysis.movement import Moved
from pref.analysis.opening import Finding, names, reaches
from pref.analysis.scores import Score


def find_answers(comparison: dict) -> list[dict]:
    """One answer for each score that was measured.

    Each has `score` (what was measured), `lead` (one sentence), and `rows`. A row is a comparison:
    `verdict` ("better", "worse", "not decided" or "not measured"), `text` and `detail`. Of what a
    judge gave, `judge` says how well the judge agrees with human votes. `finding` has the numbers
    of what the score decides: verdict, metric, estimate, low, high, a, b, as those of the opening;
    `name` is what a line calls the score, `text` the numbers for people.

    comparison: aggregated_metrics.json.
    """
    found = [answer(score, comparison) for score in scores.list_scores(comparison)]
    return found or [no_answer(comparison)]


def no_answer(comparison: dict) -> dict:
    """The answer of a study in which nothing has been measured."""
    lead = scores.nothing_measured(comparison)
    return {
        "score": "Nothing is measured",
        "lead": lead,
        "rows": [],
        "judge": None,
        "finding": {"name": "nothing", "text": lead} | opening.numbers_of(opening.NOT_MEASURED),
    }


def answer(score: Score, comparison: dict) -> dict:
    """The answer of one score."""
    baseline, measure = comparison["baseline"], score.measure
    moved = movement.movement_of(score, comparison)
    compared = opening.compare_rows(score, comparison)
    headline, untrained = compared.headline, compared.untrained
    shown = headline + [one for one in untrained if one[0]["loss"] == baseline or not headline]
    if score.mark:
        lead = f"{score.mark}."
    elif headline:
        lead = lead_of(headline, measure.unit, measure.digits)
    else:
        lead = scores.without_comparison(score, comparison)
    finding = opening.find(score, comparison)
    helped = ""  # what is decided where nothing is between losses
    if finding.verdict == opening.DECIDED and finding.row["comparison"] == "untrained model":
        helped = finding.sentences[0]
    unmeasured = scores.unmeasured_text(score, comparison)
    lead = " ".join(filter(None, [helped, lead, unmeasured]))
    return {
        "score": score.full_name,
        "lead": lead,
        "rows": [
            {
                "verdict": verdict,
                "text": f"{row['proposed']} against {row['baseline']}: "
                f"{size(row, measure.unit, measure.digits)}",
                "detail": "; ".join(details(row, verdict, score, moved, compared.lost)),
            }
            for row, verdict in shown
        ],
        "judge": score.part.get("agreement_text"),
        "finding": finding_of(score, finding, lead),
    }


def finding_of(score: Score, finding: Finding, lead: str) -> dict:
    verdict, _, row = finding
    text = lead
    if row:
        difference = opening.numbers_text(row, score.measure.digits)
        judge = score.name.removeprefix(score.heading)
        text = f"{difference} {row['proposed']} against {row['baseline']}{judge}"
    numbers = opening.numbers_of(verdict, score.metric, row)
    return {"name": score.heading, "text": text} | numbers


def lead_of(ranked: list[tuple[dict, str]], unit: str, digits: int) -> str:
    """The answer in one sentence. ranked: the headline differences with their verdicts, the largest
    first.
    """
    rows, verdicts = map(list, zip(*ranked))
    theirs = rows[0]["baseline"]
    if "better" in verdicts:
        won = rows[verdicts.index("better")]
        lead = f"{won['proposed']} is better than {theirs}: {size(won, unit, digits)}."
        if close := [row for row in rows if row is not won and reaches(row, won)]:
            lead += f" Whether it is the best of all is not decided against {names(close)}."
        return lead
    if set(verdicts) == {"worse"}:
        return f"{theirs} is better than {names(rows)}."
    open_ones = [row for row, verdict in ranked if verdict == "not decided"]
    verb = "differs" if len(open_ones) == 1 else "differ"
    return f"Not decided: whether {names(open_ones)} {verb} from {theirs}."


def details(
    row: dict, verdict: str, score: Score, moved: dict[str, Moved], lost: dict[str, str]
) -> list[str]:
    """What a comparison rests on, what the gain came with, and why it is open."""
    digits, units = score.measure.digits, score.measure.units
    found = [texts.count_text(row["n_units"], units), f"seeds: {row['seeds_compared']}"]
    if row["p_adjusted"] is not None:
        method = "Holm" if row["comparison"] == "best of grid" else "Benjamini-Hochberg"
        found.append(f"p {texts.p_text(row['p_adjusted'])} ({method})")
    if row["selected_by"] and max(row["proposed_cells"], row["baseline_cells"]) > 1:
        found.append(
            f"best of {row['proposed_cells']} against best of {row['baseline_cells']}, "
            f"selected by {row['selected_by']}"
        )
        if gain := decisions.gain_by_selection(row):
            direction = "high" if gain > 0 else "low"
            found.append(
                f"chance alone may have put the difference up to {abs(gain):.{digits}f} too "
                f"{direction}"
            )
    if row["differs_in"]:
        found.append(f"differs in {row['differs_in']} too")
    sides = (row["proposed"], row["baseline"])
    found += movement.moved_texts(*(moved[label] for label in sides))
    found += without_gamed_texts(row, digits)
    found += [lost[label] for label in sides if label in lost]
    if verdict == "not decided" and not any(label in lost for label in sides):
        found += decisions.why_open(row, digits, units)
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


def size(row: dict, unit: str, digits: int) -> str:
    """E.g. "+0.98 MT-Bench points, 95 % interval [+0.70, +1.26]"."""
    if None in (row["low"], row["high"]):
        return f"{row['estimate']:+.{digits}f} {unit}"
    low, high = (f"{row[key]:+.{digits}f}" for key in ("low", "high"))
    return f"{row['estimate']:+.{digits}f} {unit}, 95 % interval [{low}, {high}]"


def text_lines(answers: list[dict]) -> list[str]:
    """The answers for a terminal."""
    lines = []
    for one in answers:
        lines.append(f"{one['score']}: {one['lead']}")
        lines += [f"  {one['judge']}"] if one["judge"] else []
        for row in one["rows"]:
            lines += [f"  {row['verdict']}: {row['text']}", f"      {row['detail']}"]
    return lines
