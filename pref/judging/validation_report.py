"""What is said of a validated judge: all numbers, the verdict, warnings, and the printed table.

`measure` is the numbers of validation.json, as a dict that JSON can hold; the other functions read
that dict.
"""

import re
from collections.abc import Iterator

from pref.files import console
from pref.judging import validation_biases, validation_stats
from pref.judging.benchmark import PAIR
from pref.judging.human_votes import LLMBAR
from pref.judging.validation_stats import MARGIN, Judged, grouped

YES, NO, NOT_MEASURED = "yes", "no", "not measured"  # as_humans
LEAST_AGREEMENT = 0.75  # lower end, of verdicts and votes that both decided
MOST_FLIPS = 0.30
MOST_MISSING = 0.10  # share of judged pairs without a verdict

GPT4 = "GPT-4 of 2023"


# ---- numbers -------------------------------------------------------------------------------------


def measure(rows: list[Judged], judge: str) -> dict:
    """Every number of a validation against human votes.

    rows: one for each pair, with or without a verdict. judge: its name, which tells its family.
    """
    judged = [row for row in rows if row.verdict is not None]
    counts = validation_stats.vote_counts(judged)
    majority = validation_stats.majority_counts(judged)
    return as_json(
        {
            **validation_stats.agreement(judged, counts),
            "majority": validation_stats.agreement(judged, majority),
            "ceiling": validation_stats.ceiling(judged),
            "ties": validation_stats.share_of_ties(judged),
            "flips": validation_biases.flips(judged),
            "longer_chosen": validation_biases.longer_chosen(judged),
            "length_given_votes": validation_biases.length_given_votes(judged),
            "own_family": validation_biases.own_family(judged, judge),
            "retest": validation_stats.retest(rows),
            "by_turn": validation_stats.by_group(judged, lambda row: str(row.pair.turn)),
            "by_category": validation_stats.by_group(judged, lambda row: row.category),
            "paper_table": validation_stats.paper_table(judged),
        }
    )


def measure_accuracy(rows: list[Judged]) -> dict:
    """Every number of a validation on pairs of which one answer is right."""
    judged = [row for row in rows if row.verdict is not None]
    return as_json(
        {
            **validation_stats.accuracy(judged),
            "ties": {"judge": validation_stats.share_of_ties(judged)["judge"]},
            "flips": validation_biases.flips(judged),
            "retest": validation_stats.retest(rows),
            "by_category": {
                name: validation_stats.accuracy(part)
                for name, part in grouped(judged, lambda row: row.category).items()
            },
        }
    )


def as_json(value):
    """Named tuples as objects, at any depth."""
    if hasattr(value, "_asdict"):
        return as_json(value._asdict())
    if isinstance(value, dict):
        return {name: as_json(item) for name, item in value.items()}
    return value


# ---- verdict and warnings ------------------------------------------------------------------------


def as_humans(found: dict, missing: float) -> tuple[str, str]:
    """Whether a judge agrees with human votes as often as humans do, and why.

    By the 90 % interval of the difference of the two rates, which is the equivalence test's. YES:
    all of it is above -MARGIN, so that the judge agrees as often, or more often. NO: otherwise, if
    all of it is below 0. NOT_MEASURED: the pairs are too few to tell. missing: share of the
    judged pairs that have no verdict; those that are left may be the easy ones.
    """
    ceiling = found["ceiling"]
    difference, judge, humans = (ceiling[name] for name in ("difference", "judge", "humans"))
    if difference["low"] is None:
        if difference["n_questions"] < 2:
            return NOT_MEASURED, "no two questions have verdicts on pairs with two or more votes"
        return NOT_MEASURED, "the rates differ alike in all questions: nothing measures the error"
    rates = (
        f"{judge['estimate']:.2f} of votes against {humans['estimate']:.2f} among humans; mean "
        f"difference over questions {interval_text(difference, sign=True)}, 90 % interval"
    )
    if difference["low"] > -MARGIN:
        if missing > MOST_MISSING:
            return (
                NOT_MEASURED,
                f"{missing:.0%} of the pairs have no verdict; the others: {rates}",
            )
        return YES, rates
    if difference["high"] < 0:
        return NO, rates
    return NOT_MEASURED, f"too few pairs to tell with a margin of {MARGIN}: {rates}"


def find_warnings(found: dict, missing: float) -> list[str]:
    """What speaks against a judge, as sentences."""
    warnings = []
    decided = found["agreement_no_ties"]
    if decided["estimate"] is None:
        warnings.append("no pair was decided by both the judge and a vote")
    elif decided["low"] is None or decided["low"] < LEAST_AGREEMENT:
        warnings.append(
            f"of what both decided, it agrees with {interval_text(decided)} of the votes: the "
            f"interval reaches below {LEAST_AGREEMENT}"
        )
    return warnings + common_warnings(found, missing)


def common_warnings(found: dict, missing: float) -> list[str]:
    warnings, flips = [], found["flips"]
    if flips["estimate"] is not None and flips["estimate"] > MOST_FLIPS:
        first = flips["to_first"]["estimate"]
        where = "" if first is None else f", {first:.0%} of these to the answer shown first"
        warnings.append(
            f"{flips['estimate']:.0%} of its verdicts change with the order of the answers{where}: "
            f"more than {MOST_FLIPS:.0%}"
        )
    if missing > MOST_MISSING:
        warnings.append(f"{missing:.0%} of the judged pairs have no verdict")
    return warnings


def accuracy_warnings(found: dict, missing: float) -> list[str]:
    """`find_warnings`, of pairs of which one answer is right."""
    warnings, accuracy = [], found["accuracy"]
    if accuracy["estimate"] is not None and (accuracy["low"] is None or accuracy["low"] <= 0.5):
        warnings.append(
            f"it is right in {interval_text(accuracy)} of the pairs, and chance in half of them"
        )
    return warnings + common_warnings(found, missing)


def sentence(report: dict) -> str:
    """The verdict, in one sentence."""
    name = f"judge {report['judge']}"
    if report["data"] == LLMBAR:
        if report["accuracy"]["estimate"] is None:
            return f"{name}: not measured, there is no verdict"
        return (
            f"{name} names the right answer in {interval_text(report['accuracy'])} of LLMBar's "
            "pairs, of which chance finds half"
        )
    verdict = f"{name} agrees with human votes as often as humans do: {report['as_humans']}"
    return f"{verdict} ({report['as_humans_because']})"


# ---- the printed table ---------------------------------------------------------------------------


def table(report: dict) -> str:
    """A line for each number: the judge's, how many observations, and GPT-4's of 2023 beside it."""
    of_gpt4 = report.get("gpt4_2023")
    name = re.split("[/:]", report["judge"].rstrip("/"))[-1]
    lines = [["", name, "n", *([GPT4] if of_gpt4 else [])]]
    for label, path in table_rows(report):
        found = find(report, path)
        if found is None or (found["estimate"] is None and label.startswith("agreement, ")):
            continue  # it has none
        other = find(of_gpt4, path) if of_gpt4 else None
        cell = "" if other is None or other["estimate"] is None else f"{other['estimate']:.3f}"
        line = [label, interval_text(found, digits=3), str(found["n"])]
        lines.append([*line, cell] if of_gpt4 else line)
    return console.format_table(lines, right_from=1, underline=True)


def table_rows(report: dict) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(label, keys of the estimate in the report) of each line."""
    if report["data"] == LLMBAR:
        yield "right answer named (chance: 0.5)", ("accuracy",)
        yield "  in both orders", ("right_both",)
        for subset in report["by_category"]:
            yield f"  {subset}", ("by_category", subset, "accuracy")
    else:
        yield "agreement with votes", ("agreement",)
        yield "  of what both decided (no ties)", ("agreement_no_ties",)
        yield "kappa", ("kappa",)
        yield "  no ties", ("kappa_no_ties",)
        yield "agreement with the majority of votes", ("majority", "agreement")
        yield "  no ties", ("majority", "agreement_no_ties")
        yield "pairs with 2 or more votes: judge and a vote", ("ceiling", "judge")
        yield "  a vote and another vote", ("ceiling", "humans")
        for group, prefix in (("by_turn", "turn "), ("by_category", "")):
            for name in report[group]:
                yield f"agreement, {prefix}{name}", (group, name, "agreement")
        yield "longer answer chosen by the judge", ("longer_chosen", "judge")
        yield "  by the majority of votes", ("longer_chosen", "humans")
        yield "  by the judge against that majority", ("longer_chosen", "judge_against_humans")
        yield "log odds per log length, given the votes", ("length_given_votes",)
        yield "own family's wins, less those in the votes", ("own_family", "difference")
        yield "ties among the votes", ("ties", "humans")
    yield "ties among the verdicts", ("ties", "judge")
    if report["grading"] == PAIR:
        yield "verdicts that change with the order", ("flips",)
        yield "  of these, first answer both times", ("flips", "to_first")
    if report["repeats"] > 1:
        yield "repeats that agree", ("retest",)


def find(report: dict | None, path: tuple[str, ...]) -> dict | None:
    """The estimate at `path` of a report; None where it has none."""
    for key in path:
        report = report.get(key) if report else None
    return report


def interval_text(found: dict, digits: int = 2, sign: bool = False) -> str:
    """0.66 [0.63, 0.69]; the number alone where its error is not known, "-" without a number."""
    if found["estimate"] is None:
        return "-"
    form = f"{'+' if sign else ''}.{digits}f"
    if found["low"] is None or found["high"] is None:
        return f"{found['estimate']:{form}}"
    return f"{found['estimate']:{form}} [{found['low']:{form}}, {found['high']:{form}}]"
