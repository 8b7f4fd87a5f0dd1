"""Several responses to a prompt, with scores: which of them become pairs.

The rule is asked for (`--rule`), because it decides what is learned:

    best_worst    the best response against the worst
    best_random   the best response against one of the others, drawn at random (UltraFeedback's way)
    all           every two responses whose scores differ

`min_margin` is the least difference of the two scores, or of the ranks. Equal scores give no pair.
"""

import math
import random
import re
from itertools import combinations
from typing import NamedTuple

from pref.files import disk
from pref.files.console import UserError
from pref.files.messages import Drop

RULES = ("best_worst", "best_random", "all")
RESPONSE_KEYS = ("response", "answer", "completion", "output", "generation", "text", "content")
# The first of these that a response has. UltraFeedback's overall_score is known to be wrong in
# places (a "1" that became a "10"); fine-grained_score is the mean of its four ratings.
SCORE_KEYS = ("fine-grained_score", "overall_score", "score", "rating", "reward", "rank", "ranking")
SCORE_COLUMNS = ("scores", "ratings", "rating", "rewards", "all_rm_scores", "ranks", "ranking")


class Scored(NamedTuple):
    response: object  # text or messages
    score: float  # higher is better


class Candidates(NamedTuple):
    """A prompt with several responses."""

    prompt: list[dict]
    responses: list[Scored]


class Selection(NamedTuple):
    """How pairs are made of several responses."""

    rule: str | None
    min_margin: float
    seed: int


class Match(NamedTuple):
    chosen: object
    rejected: object


def read_candidates(prompt: list[dict], row: dict, column: str) -> Candidates:
    """The responses in the list `column` with their scores, which are in the responses themselves
    or in a list of their own. Raises Drop if there is no score for each.
    """
    items = checked_list(row, column)
    # Tables fill the columns that only other rows have with None.
    name = next((name for name in SCORE_COLUMNS if row.get(name) is not None), None)
    if name == "ranking":
        raise UserError(
            "a list `ranking` may hold each response's rank, or their numbers from best to worst. "
            "If it holds ranks: --columns ranks=ranking"
        )
    if name:
        scores = checked_list(row, name)
    else:
        name = score_key(items)
        scores = [item.get(name) for item in items]
    if len(scores) != len(items):
        raise Drop(f"{len(items)} responses and {len(scores)} scores")
    responses = [
        Scored(response_of(item), as_score(score, is_rank(name)))
        for item, score in zip(items, scores)
    ]
    return Candidates(prompt, responses)


def checked_list(row: dict, column: str) -> list:
    if not isinstance(row[column], list):
        raise Drop(f"{column} is not a list")
    return row[column]


def score_key(items: list) -> str:
    """The key under which responses have their scores. Raises Drop if they have none."""
    if all(isinstance(item, dict) for item in items):
        for key in SCORE_KEYS:
            if items and all(item.get(key) is not None for item in items):
                return key
    raise Drop("responses without scores")


def response_of(item):
    """Text or messages of a response that may be an object with other keys."""
    if not isinstance(item, dict) or "role" in item or "from" in item:
        return item
    found = next((item[key] for key in RESPONSE_KEYS if item.get(key) is not None), None)
    if found is None:
        raise Drop("a response without a text")
    return found


def as_score(value, lower_is_better: bool) -> float:
    score = as_number(value)
    if score is None:
        raise Drop("a score that is not a number")
    return -score if lower_is_better else score


def select(candidates: Candidates, selection: Selection) -> list[Match]:
    """The pairs that the rule makes. Raises UserError without a rule, Drop if there is no pair.

    best_random draws by the seed and the responses, so that the order of the rows does not matter.
    """
    if not selection.rule:
        raise UserError(
            "rows with several scored responses need a --rule: best_worst, best_random or all "
            "(--help says what they are)"
        )
    ranked = sorted(candidates.responses, key=lambda response: -response.score)
    if len(ranked) < 2:
        raise Drop("fewer than two responses")
    if selection.rule == "best_worst":
        matches = [(ranked[0], ranked[-1])]
    elif selection.rule == "best_random":
        worse = [item for item in ranked[1:] if far_enough(ranked[0], item, selection.min_margin)]
        key = disk.sha256_json([selection.seed, candidates.prompt, [r.response for r in ranked]])
        matches = [(ranked[0], random.Random(key).choice(worse))] if worse else []
    else:
        matches = list(combinations(ranked, 2))
    matches = [match for match in matches if far_enough(*match, selection.min_margin)]
    if not matches:
        raise Drop(tie_reason(selection.min_margin))
    return [Match(better.response, worse.response) for better, worse in matches]


def far_enough(better: Scored, worse: Scored, min_margin: float) -> bool:
    difference = better.score - worse.score
    # 0.8 - 0.7 is a little less than 0.1 in binary.
    return difference > 0 and (difference >= min_margin or math.isclose(difference, min_margin))


def tie_reason(min_margin: float) -> str:
    return f"tie, or scores less than {min_margin:g} apart" if min_margin else "tie"


# ---- scores beside chosen and rejected -----------------------------------------------------------

SCORE_NAME = re.compile(
    r"score|rating|reward|grade|rank|quality|win_?rate|utility|helpful", re.IGNORECASE
)
RANK_WORDS = ("rank", "ranks", "ranking", "rankings")  # the lower is better
DECIMAL_COMMA = re.compile(r"\s*[-+]?\d+,\d{1,2}\s*")  # as spreadsheets write it in half of Europe
SIDES = (("a", "b"), ("0", "1"), ("1", "2"), ("j", "k"))  # how names tell two responses apart
# What the name of a score of the whole response is made of, besides its side: no `toxicity`.
GENERAL_WORDS = {"score", "scores", "rating", "ratings", "reward", "rewards", "grade", "rank"}
GENERAL_WORDS |= {"response", "completion", "output", "answer", "overall", "total", "final"}
GENERAL_WORDS |= {"avg", "average", "mean", "human", "judge", "rm"}
SIDED = re.compile(
    r"(?:completion|response|output|answer|conversation)[_ ]?([ab012jk])", re.IGNORECASE
)
MARGINS = ("margin", "score_margin", "reward_margin")  # chosen minus rejected


class PairScores(NamedTuple):
    """The scores that a row gives to its chosen and rejected response. Higher is better."""

    chosen: float
    rejected: float
    columns: tuple[str, ...]


def pair_scores(row: dict, chosen: str, rejected: str) -> PairScores | None:
    """The scores of the two responses, or None if the row has none.

    They are in columns such as chosen_score and rejected_score, in an object {"chosen", "rejected"}
    of such a name, in the responses themselves, in score_a and score_b beside response_a and
    response_b, in `rating` beside `generations`, or in `margin`.
    """
    for name in filter(SCORE_NAME.search, row):
        sign = -1 if is_rank(name) else 1
        partner = name.replace("chosen", "rejected").replace("Chosen", "Rejected")
        both = row[name]
        if isinstance(both, dict):
            values, names = [both.get(key) for key in ("chosen", "rejected")], (name,)
        else:
            values, names = [both, row.get(partner)], (name, partner)
        values = list(map(as_number, values))
        if partner != name or isinstance(both, dict):
            if None not in values:
                return PairScores(sign * values[0], sign * values[1], names)
    return (
        inner_scores(row)
        or sided_scores(row, chosen, rejected)
        or listed_scores(row, chosen, rejected)
        or margin_scores(row)
    )


def words(name: str) -> list[str]:
    """'promptSource_0' -> ['prompt', 'source', '0']."""
    spaced = re.sub(r"([a-z])([A-Z])", r"\1 \2", name)
    return re.findall(r"[a-z]+|\d+", spaced.lower())


def is_rank(name: str) -> bool:
    """Whether the lower is better: of ranks, but not of a reranker's score or a `rank_score`."""
    kinds = [word for word in words(name) if word in RANK_WORDS or word in ("score", "scores")]
    return bool(kinds) and kinds[-1] in RANK_WORDS


def sided_scores(row: dict, chosen: str, rejected: str) -> PairScores | None:
    """Scores in columns such as score_a and score_b, of the texts in response_a and response_b."""
    texts = {m[1].lower(): last_text(row[name]) for name in row if (m := SIDED.fullmatch(name))}
    for first, second in SIDES:
        if [texts.get(first), texts.get(second)] == [chosen, rejected]:
            sides = (first, second)
        elif [texts.get(second), texts.get(first)] == [chosen, rejected]:
            sides = (second, first)
        else:
            continue
        for name in filter(SCORE_NAME.search, row):
            parts = words(name)
            if sides[0] not in parts or set(parts) - {*GENERAL_WORDS, sides[0]}:
                continue
            swapped = [sides[1] if part == sides[0] else part for part in parts]
            partner = next((other for other in row if words(other) == swapped), name)
            values = [as_number(row[name]), as_number(row[partner])]
            if partner != name and None not in values:
                sign = -1 if is_rank(name) else 1
                return PairScores(sign * values[0], sign * values[1], (name, partner))
    return None


def last_text(value):
    """A text, or the text of the last message in a list."""
    while isinstance(value, list) and value:
        value = value[-1]
    if isinstance(value, dict):
        value = next((value[key] for key in RESPONSE_KEYS if key in value), None)
    return value


def inner_scores(row: dict) -> PairScores | None:
    """Scores inside the objects `chosen` and `rejected`."""
    sides = [row.get("chosen"), row.get("rejected")]
    if not all(isinstance(side, dict) for side in sides):
        return None
    for key in SCORE_KEYS:
        values = [as_number(side.get(key)) for side in sides]
        if None not in values:
            sign = -1 if is_rank(key) else 1
            return PairScores(sign * values[0], sign * values[1], (f"chosen.{key}",) * 2)
    return None


def listed_scores(row: dict, chosen: str, rejected: str) -> PairScores | None:
    """Scores in a list `rating` that belong to the texts in the list `generations`."""
    texts = row.get("generations")
    ratings = next((row[name] for name in ("rating", "ratings") if name in row), None)
    if not (isinstance(texts, list) and isinstance(ratings, list) and len(texts) == len(ratings)):
        return None
    scores = {text: as_number(value) for text, value in zip(texts, ratings) if type(text) is str}
    pair = [scores.get(chosen), scores.get(rejected)]
    return None if None in pair else PairScores(*pair, ("generations", "rating", "ratings"))


def margin_scores(row: dict) -> PairScores | None:
    for name in MARGINS:
        margin = as_number(row.get(name))
        if margin is not None:
            return PairScores(margin, 0, (name,))
    return None


def as_number(value) -> float | None:
    if isinstance(value, str) and DECIMAL_COMMA.fullmatch(value):
        value = value.replace(",", ".")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
