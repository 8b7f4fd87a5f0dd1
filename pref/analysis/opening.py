"""The statement that a study opens with: which loss and setting won on which score, by how much, at
what distance from the base model and what cost, and how sure that is.

It is about the most trustworthy score (scores.py), and says the first of these that holds:

    1) a loss's best cell is better than the baseline's best; or the baseline's is better than all;
    2) a loss's best cell is better than the untrained model, or all are worse than it; then what is
       not decided between the losses;
    3) nothing is decided, and by how much more it would be;
    4) nothing is measured or compared, and why.

A claim on the same score and the very same two cells gives its verdict where it is supported or
contradicted.
"""

from typing import NamedTuple

from pref.analysis import decisions, measures, movement, parts, scores, stats, texts
from pref.analysis.scores import Score
from pref.analysis.texts import TRIAL

DECIDED, UNDECIDED, NOT_MEASURED = "decided", "undecided", "not measured"
SUPPORTED, CONTRADICTED = "supported", "contradicted"
CLAIMS_ON_CELLS = ("difference", "equivalence")  # kinds of claims whose a and b are two cells


class Finding(NamedTuple):
    """What a score decides."""

    verdict: str  # DECIDED, UNDECIDED or NOT_MEASURED
    sentences: list[str]
    row: dict | None = None  # of "improvement", which the first sentence is about


class Compared(NamedTuple):
    """The differences that an answer is about, the largest first, each with its verdict."""

    headline: list[tuple[dict, str]]  # best cell of a loss against the baseline's best
    untrained: list[tuple[dict, str]]  # best cell of a loss against the untrained model
    lost: dict[str, str]  # of decisions.lost_runs


# ---- the statement ------------------------------------------------------------------------------


class Opening(NamedTuple):
    """What the report opens with."""

    sentences: list[str]
    verdict: str  # DECIDED, UNDECIDED, NOT_MEASURED, SUPPORTED or CONTRADICTED
    metric: str | None = None  # as claims name it
    difference: dict | None = None  # row of "improvement", of proposed - baseline

    def row(self) -> dict:
        """The key `answer` of aggregated_metrics.json; a number that there is not is None."""
        numbers = numbers_of(self.verdict, self.metric, self.difference)
        return {"statement": " ".join(self.sentences)} | numbers


def find_opening(comparison: dict) -> Opening:
    """comparison: aggregated_metrics.json, with or without what is found here."""
    all_scores = scores.list_scores(comparison)
    if not all_scores:
        return Opening([scores.nothing_measured(comparison)], NOT_MEASURED)
    score = all_scores[0]
    finding = find(score, comparison)
    sentences, verdict = list(finding.sentences), finding.verdict
    if finding.row is None:
        sentences += [beside(other, comparison) for other in all_scores[1:]]
        return Opening(list(filter(None, sentences)), NOT_MEASURED, score.metric)
    if claim := deciding_claim(score, finding.row, comparison["claims"]):
        verdict = claim["verdict"]
        sentences[0] = f"{sentences[0].removesuffix('.')}; claim {claim['id']} is {verdict}."
    if comparison["diverged"]:
        sentences.append(scores.unmeasured_text(score, comparison))
    sentences.append(cost_text(score, finding.row["proposed"], comparison))
    return Opening(list(filter(None, sentences)), verdict, score.metric, finding.row)


def numbers_of(verdict: str, metric: str | None = None, row: dict | None = None) -> dict:
    """What a score decides: the estimate is that of a - b, low and high its 95 % interval."""
    numbers = row or {}
    return {
        "verdict": verdict,
        "metric": metric,
        **{key: numbers.get(key) for key in ("estimate", "low", "high")},
        "a": numbers.get("proposed"),
        "b": numbers.get("baseline"),
    }


def beside(other: Score, comparison: dict) -> str:
    """What validation accuracy decides, where the answers were not measured; "" if nothing."""
    if other.measure is not measures.ACCURACY or other.mark:
        return ""
    finding = find(other, comparison)
    if finding.row is None:
        return ""
    return f"{finding.sentences[0]} Validation accuracy says nothing about answers."


def deciding_claim(score: Score, row: dict, claims: list[dict]) -> dict | None:
    """The first claim on this score and the two cells of `row` that is supported or contradicted;
    the user's own come first in `claims`.
    """
    metrics = (score.metric, f"{measures.TASK}{score.part.get('bench')}")
    judge = parts.judged_by(score.part)
    sides = {row["proposed"], row["baseline"]}
    for claim in claims:
        on_cells = claim["kind"] in CLAIMS_ON_CELLS and {claim["a"], claim["b"]} == sides
        on_score = claim["metric"] in metrics and claim["judge"] == judge
        if on_cells and on_score and claim["verdict"] in (SUPPORTED, CONTRADICTED):
            return claim
    return None


def cost_text(score: Score, label: str, comparison: dict) -> str:
    """What a run of a cell took to train, what judging all runs cost, and whether KL is unknown;
    "" where nothing of it is known.
    """
    (run_ids,) = [cell["runs"] for cell in score.part["cells"] if cell["label"] == label]
    runs = [run for run in comparison["runs"] if run["run_id"] in run_ids]
    seconds, tokens = (
        stats.mean(run[key] for run in runs if run.get(key) is not None)
        for key in ("wall_s", "tokens")
    )
    found = []
    if seconds is not None:
        on = f" on {number_text(tokens)} tokens" if tokens is not None else ""
        found.append(f"a run trained for {duration_text(seconds)}{on}")
    if dollars := score.part.get("judge_usd"):
        found.append(f"judging all runs cost {dollars:,.2f} dollars")
    if score.measure.judged and movement.movement_of(score, comparison)[label].kl is None:
        found.append("KL was not measured on these answers (gen_mtbench.py --kl)")
    text = "; ".join(found)
    return f"{text[0].upper()}{text[1:]}." if text else ""


def duration_text(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} seconds"
    minutes = seconds / 60
    return f"{minutes:.0f} minutes" if minutes < 100 else f"{minutes / 60:.1f} hours"


def number_text(number: float) -> str:
    """Three digits: "950", "12,300", "4.51 million"."""
    if number >= 1e6:
        return f"{number / 1e6:,.3g} million"
    return f"{float(f'{number:.3g}'):,.0f}"


# ---- what one score decides ---------------------------------------------------------------------


def compare_rows(score: Score, comparison: dict) -> Compared:
    lost = decisions.lost_runs(score.part["cells"], comparison["diverged"])
    rows = [row for row in score.part["improvement"] if row["estimate"] is not None]
    rows.sort(key=lambda row: -row["estimate"])

    def of_kind(kind: str) -> list[tuple[dict, str]]:
        return [
            (row, decisions.verdict_of(row, score.mark, lost))
            for row in rows
            if row["comparison"] == kind
        ]

    return Compared(of_kind("best of grid"), of_kind("untrained model"), lost)


def find(score: Score, comparison: dict) -> Finding:
    """What a score decides: the first that holds of those at the head of this file."""
    if score.mark:
        return Finding(NOT_MEASURED, [marked(score)])
    compared = compare_rows(score, comparison)
    tell = Teller(score, comparison, compared)

    # 1) Between losses.
    verdicts = [verdict for _, verdict in compared.headline]
    if "better" in verdicts:
        row = compared.headline[verdicts.index("better")][0]
        return Finding(DECIDED, [tell.beats(row), tell.besides(row)], row)
    if set(verdicts) == {"worse"}:
        row = turned(compared.headline[0][0])
        return Finding(DECIDED, [tell.beats(row), tell.besides(row)], row)

    # 2) Against the untrained model.
    verdicts = [verdict for _, verdict in compared.untrained]
    if "better" in verdicts or set(verdicts) == {"worse"}:
        row, verdict = compared.untrained[verdicts.index("better") if "better" in verdicts else 0]
        return Finding(DECIDED, [tell.moves(row, verdict), tell.between_losses()], row)

    # 3) Nothing.
    for row, _ in (*compared.headline, *compared.untrained):
        others = [other for other, _ in compared.headline if other is not row]
        return Finding(UNDECIDED, [tell.undecided(row), tell.others_undecided(others)], row)
    why = scores.without_comparison(score, comparison)
    return Finding(NOT_MEASURED, [f"{score.name}: {why}"])


def marked(score: Score) -> str:
    if score.mark == TRIAL:
        return f"Nothing is measured. {TRIAL}."
    return (
        f"{score.name} is not measured ({score.mark}): ask a larger judge, or validate this one "
        "(judge.py --validate)."
    )


class Teller(NamedTuple):
    """Sentences about the rows of one score."""

    score: Score
    comparison: dict
    compared: Compared

    def beats(self, row: dict) -> str:
        return (
            f"{row['proposed']} is better than {row['baseline']} on {self.score.name}: "
            f"{self.scores_and_difference(row)}."
        )

    def moves(self, row: dict, verdict: str) -> str:
        """A cell against the untrained model."""
        verb = "raises" if verdict == "better" else "lowers"
        after, before = (self.show(row[key]) for key in ("proposed_score", "baseline_score"))
        pair = f"from {before} to {after}{'' if fits(row, self.digits) else ' in all'}: "
        return f"{row['proposed']} {verb} {self.score.name} {pair}{self.difference(row)}."

    def undecided(self, row: dict) -> str:
        return (
            f"Whether {row['proposed']} is better than {other_side(row)} on {self.score.name} is "
            f"not decided: {self.scores_and_difference(row)}; {self.why_open(row)}."
        )

    def besides(self, won: dict) -> str:
        """The winner against the untrained model, and what may be as good."""
        found = []
        for row, verdict in self.compared.untrained:
            if row["proposed"] == won["proposed"]:
                is_open = ", which is not decided" if verdict == "not decided" else ""
                found.append(f"Against the untrained model it is {self.numbers(row)}{is_open}.")
        rows = [row for row, _ in self.compared.headline if row["proposed"] != won["proposed"]]
        close = [row for row in rows if row["baseline"] == won["baseline"] and reaches(row, won)]
        if close:
            found.append(f"Whether it is the best of all is not decided against {names(close)}.")
        return " ".join(found)

    def between_losses(self) -> str:
        """What is decided, and not, between losses of which none is found to be better."""
        rows = [row for row, verdict in self.compared.headline if verdict == "not decided"]
        worse = [row for row, verdict in self.compared.headline if verdict == "worse"]
        found = [f"{worse[0]['baseline']} is better than {names(worse)}." if worse else ""]
        found.append(self.open_between(rows[0], nothing=not worse) if rows else "")
        found.append(self.others_undecided(rows[1:]))
        losses = {row["loss"] for row, _ in self.compared.untrained}
        if not self.compared.headline and len(losses) > 1:
            found.append(scores.without_comparison(self.score, self.comparison))
        return " ".join(filter(None, found))

    def open_between(self, row: dict, nothing: bool) -> str:
        """nothing: nothing else is decided either."""
        pair = f"{row['proposed']} against {row['baseline']}"
        numbers = f"{self.numbers(row)}; {self.why_open(row)}"
        start = "Between losses nothing is decided" if nothing else "Not decided"
        return f"{start}: {pair} is {numbers}."

    def others_undecided(self, rows: list[dict]) -> str:
        return f"Nor is it for {names(rows[: scores.MOST_NAMED])}." if rows else ""

    def why_open(self, row: dict) -> str:
        lost = [self.compared.lost.get(row[side]) for side in ("proposed", "baseline")]
        measure = self.score.measure
        return (
            next(filter(None, lost), None)
            or (decisions.why_open(row, measure.digits, measure.units)[0])
        )

    # ---- numbers --------------------------------------------------------------------------------

    @property
    def digits(self) -> int:
        return self.score.measure.digits

    def show(self, number: float) -> str:
        return f"{number:.{self.digits}f}"

    def numbers(self, row: dict) -> str:
        return numbers_text(row, self.digits)

    def scores_and_difference(self, row: dict) -> str:
        ours, theirs = (self.show(row[key]) for key in ("proposed_score", "baseline_score"))
        pair = f"{ours} against {theirs}{',' if fits(row, self.digits) else ' in all;'} "
        return pair + self.difference(row)

    def difference(self, row: dict) -> str:
        """The difference, on how much it rests, and the KL that it came with."""
        over = texts.count_text(row["n_units"], self.score.measure.units)
        if row["paired"] != "one seed":  # which is why it is open, and said there
            over += f" and {seeds_text(row)}"
        both = "" if fits(row, self.digits) else " that both have"
        return f"{self.numbers(row)} over {over}{both}{self.at_kl(row)}"

    def at_kl(self, row: dict) -> str:
        moved = movement.movement_of(self.score, self.comparison)
        ours, theirs = (moved[row[side]].kl for side in ("proposed", "baseline"))
        if ours is None:
            return ""
        against = theirs is not None and row["comparison"] != "untrained model"
        return f", at {kl_text(ours)}{f' against {kl_text(theirs)}' if against else ''} nats of KL"


def numbers_text(row: dict, digits: int) -> str:
    """E.g. "+0.14 [+0.10, +0.18]"."""
    estimate, low, high = (row[key] for key in ("estimate", "low", "high"))
    if None in (low, high):
        return f"{estimate:+.{digits}f}"
    return f"{estimate:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def kl_text(nats: float) -> str:
    return f"{nats:.2f}" if nats < 9.995 else f"{nats:.1f}"


def fits(row: dict, digits: int) -> bool:
    """Whether a difference is that of the two scores as they are written. Those are of all seeds
    and questions of each cell, the difference of those that both have.
    """
    of_scores = row["proposed_score"] - row["baseline_score"]
    return abs(of_scores - row["estimate"]) < 0.5 * 10**-digits


def seeds_text(row: dict) -> str:
    """E.g. "3 seeds", "3 against 2 seeds"."""
    counted = row["seeds_compared"].split(",")[0].removesuffix(" paired")
    if row["comparison"] == "untrained model":
        counted = counted.split(" against ")[0]
    return f"{counted} seeds"


def other_side(row: dict) -> str:
    return "the untrained model" if row["comparison"] == "untrained model" else row["baseline"]


def turned(row: dict) -> dict:
    """A difference seen from the other side."""
    estimate, low, high = (
        None if row[key] is None else -row[key] for key in ("estimate", "high", "low")
    )
    compared = " against ".join(reversed(row["seeds_compared"].split(", ")[0].split(" against ")))
    return row | {
        "proposed": row["baseline"],
        "baseline": row["proposed"],
        "proposed_score": row["baseline_score"],
        "baseline_score": row["proposed_score"],
        "estimate": estimate,
        "low": low,
        "high": high,
        "seeds_compared": compared,
    }


def names(rows: list[dict]) -> str:
    labels = [row["proposed"] for row in rows]
    return " and ".join(filter(None, [", ".join(labels[:-1]), labels[-1]]))


def reaches(row: dict, won: dict) -> bool:
    """Whether the interval of a difference reaches into the winner's."""
    return row["high"] is None or row["high"] >= won["low"]
