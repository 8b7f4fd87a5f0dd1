"""A judge's verdicts against human votes: the numbers, by hand and by computations of their own."""

import importlib.util
import itertools
import json
import math
import os
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from doubles import load_module
from scipy import optimize, stats

from pref.files import mt_bench
from pref.files.console import UserError
from pref.judging import human_votes, validation_biases, validation_stats
from pref.judging.human_votes import TIE, A, B, Pair, Vote
from pref.judging.validation_stats import Judged

VERDICT_OF = {"a": A, "b": B, "=": TIE, "-": None}


def judged(question: int, votes: str, verdict: str, lengths=(10, 10), **more) -> Judged:
    """judged(81, "ab=", "a"): votes for a, for b and for a tie; the judge chose a."""
    pair = Pair(question, more.pop("turn", 1), *more.pop("models", ("claude-v1", "gpt-4")))
    outcomes = [Vote(f"expert_{i}", VERDICT_OF[vote]) for i, vote in enumerate(votes)]
    return Judged(
        pair, more.pop("category", "stem"), outcomes, lengths, VERDICT_OF[verdict], **more
    )


# Three questions, 10 votes on 5 pairs. Worked out on paper, votes as rows and verdicts as columns:
#            a  tie  b                                    a  b
#      a     2   2   0      po = 5/10                 a   2  0    po = 3/5
#      tie   0   2   0      pe = (4*4 + 2*5 + 4*1)/100  b   2  1    pe = (2*4 + 3*1)/25
#      b     2   1   1
FIVE = [
    judged(81, "aa", "a"),
    judged(81, "ab", "="),
    judged(82, "b", "b"),
    judged(82, "==a", "="),
    judged(83, "bb", "a"),
]


def estimates(found: dict) -> dict:
    return {name: value.estimate for name, value in found.items()}


def test_agreement_and_kappa_by_hand():
    found = validation_stats.agreement(FIVE, validation_stats.vote_counts(FIVE))
    assert estimates(found) == pytest.approx(
        {
            "agreement": 0.5,
            "agreement_no_ties": 0.6,
            "kappa": (0.5 - 0.3) / 0.7,
            "kappa_no_ties": (0.6 - 0.44) / 0.56,
        }
    )
    assert {name: value.n for name, value in found.items()} == {
        "agreement": 10,
        "agreement_no_ties": 5,
        "kappa": 10,
        "kappa_no_ties": 5,
    }
    # Majorities: a, tie (one vote each), b, tie, b. The verdicts: a, tie, b, tie, a.
    found = validation_stats.agreement(FIVE, validation_stats.majority_counts(FIVE))
    assert found["agreement"].estimate == 0.8 and found["agreement"].n == 5
    assert found["agreement_no_ties"].estimate == pytest.approx(2 / 3)


def test_the_ceiling_by_hand():
    """Each vote counts once: with the judge, and with the share of the pair's other votes."""
    found = validation_stats.ceiling(FIVE)
    # Pairs with two votes or more: aa/a, ab/tie, ==a/tie, bb/a. Nine votes.
    assert (found["n_pairs"], found["judge"].n) == (4, 9)
    assert found["judge"].estimate == pytest.approx((2 + 0 + 2 + 0) / 9)
    assert found["humans"].estimate == pytest.approx((2 + 0 + (0.5 + 0.5 + 0) + 2) / 9)
    # By question: (2 - 2)/4, (2 - 1)/3, (0 - 2)/2.
    means = [0, 1 / 3, -1]
    difference = found["difference"]
    assert difference["estimate"] == pytest.approx(np.mean(means))
    p_values = [
        stats.ttest_1samp(means, -0.05, alternative="greater").pvalue,
        stats.ttest_1samp(means, 0.05, alternative="less").pvalue,
    ]
    assert difference["p_equivalent"] == pytest.approx(max(p_values))
    interval = stats.ttest_1samp(means, 0).confidence_interval(0.9)
    assert (difference["low"], difference["high"]) == pytest.approx((interval.low, interval.high))


def random_rows(n: int, seed: int) -> list[Judged]:
    generator = random.Random(seed)
    rows = []
    for _ in range(n):
        votes = "".join(generator.choices("ab=", (5, 3, 2), k=generator.choice((1, 1, 2, 3))))
        verdict = generator.choice((votes[0], "a", "b", "=", "-"))
        lengths = (generator.randint(1, 900), generator.randint(1, 900))
        question, turn = generator.randint(81, 120), generator.choice((1, 2))
        rows.append(judged(question, votes, verdict, lengths, turn=turn))
    return rows


def plain_kappa(one: list, other: list) -> float:
    """Cohen's kappa of two lists of labels."""
    n = len(one)
    observed = sum(map(str.__eq__, one, other)) / n
    first, second = Counter(one), Counter(other)
    expected = sum(first[label] * second[label] for label in first) / n**2
    return (observed - expected) / (1 - expected)


def plain_measures(rows: list[Judged]) -> dict[str, float]:
    """agreement() from a list of (vote, verdict), vote by vote."""
    two = [(v.outcome, row.verdict) for row in rows for v in row.votes if row.verdict is not None]
    decided = [both for both in two if TIE not in both]
    return {
        "agreement": np.mean([vote == verdict for vote, verdict in two]),
        "agreement_no_ties": np.mean([vote == verdict for vote, verdict in decided]),
        "kappa": plain_kappa(*zip(*two)),
        "kappa_no_ties": plain_kappa(*zip(*decided)),
    }


def test_agreement_and_intervals_equal_a_plain_computation():
    rows = random_rows(250, seed=1)
    found = validation_stats.agreement(rows, validation_stats.vote_counts(rows))
    assert estimates(found) == pytest.approx(plain_measures(rows))
    # Intervals: questions drawn one by one, and everything computed anew.
    generator, by_question = random.Random(2), {}
    for row in rows:
        by_question.setdefault(row.pair.question_id, []).append(row)
    drawn = [
        plain_measures([row for q in generator.choices(list(by_question), k=len(by_question))
                        for row in by_question[q]])
        for _ in range(200)
    ]  # fmt: skip
    for name, estimate in found.items():
        low, high = np.quantile([values[name] for values in drawn], [0.025, 0.975])
        tolerance = 0.25 * (high - low)
        assert estimate.low == pytest.approx(low, abs=tolerance)
        assert estimate.high == pytest.approx(high, abs=tolerance)
        assert estimate.low < estimate.estimate < estimate.high


def test_the_papers_table_is_counted_as_fastchat_counts():
    package = Path(importlib.util.find_spec("fastchat").submodule_search_locations[0])
    fastchat = load_module("compute_agreement", package / "llm_judge" / "compute_agreement.py")
    rows, pairs = random_rows(300, seed=5), set()
    rows = [row for row in rows if not (row.pair in pairs or pairs.add(row.pair))]
    rows = [
        row._replace(votes=[*row.votes, Vote("author_1", A)]) if i % 3 else row
        for i, row in enumerate(rows)
    ]
    winner = {A: "model_a", B: "model_b", TIE: "tie"}
    given = []
    for row in rows:
        pair = {"question_id": row.pair.question_id, "turn": row.pair.turn}
        pair |= {"model_a": row.pair.model_a, "model_b": row.pair.model_b}
        given += [pair | {"judge": v.voter, "winner": winner[v.outcome]} for v in row.votes]
        if row.verdict is not None:
            given.append(pair | {"judge": ["gpt-4", "pair-v2"], "winner": winner[row.verdict]})
    data = fastchat.get_mt_bench_votes_data([given])
    expected = {}
    for turn, (name, judge) in itertools.product(
        (1, 2), {"judge": "gpt4-pair", "human": "human"}.items()
    ):
        for suffix, ban in {"": [], "_no_ties": ["tie"]}.items():
            counts = fastchat.get_mt_bench_agreement(data[turn - 1], judge, "human", ban)
            expected[f"{name}_turn_{turn}{suffix}"] = [int(count) for count in counts]
    assert validation_stats.paper_table(rows) == expected


def test_the_length_coefficient_is_the_maximum_of_the_likelihood():
    rows = [row for row in random_rows(200, seed=3) if row.verdict in (A, B)]
    found = validation_biases.length_given_votes(rows)

    def negative_log_likelihood(coefficients) -> float:
        total = 0.0
        for row in rows:
            share = sum({A: 1, TIE: 0.5, B: 0}[v.outcome] for v in row.votes) / len(row.votes)
            ratio = math.log(row.lengths[0]) - math.log(row.lengths[1])
            logit = coefficients[0] * (share - 0.5) + coefficients[1] * ratio
            total += np.logaddexp(0, -logit if row.verdict == A else logit)
        return total

    best = optimize.minimize(negative_log_likelihood, [0, 0], tol=1e-10)
    assert found.estimate == pytest.approx(best.x[1], abs=1e-4)
    assert found.low < found.estimate < found.high and found.n == len(rows)
    # It does not matter which of the two answers is a.
    mirrored = [
        row._replace(
            votes=[vote._replace(outcome=human_votes.MIRRORED[vote.outcome]) for vote in row.votes],
            verdict=human_votes.MIRRORED[row.verdict],
            lengths=row.lengths[::-1],
        )
        for row in rows
    ]
    assert validation_biases.length_given_votes(mirrored).estimate == pytest.approx(found.estimate)


def test_a_choice_by_length_alone_has_no_finite_coefficient():
    rows = [judged(81 + i, "=", "a", (20, 10)) for i in range(9)]
    assert validation_biases.length_given_votes(rows)[:3] == (None, None, None)


def test_length_and_position_by_hand():
    rows = [
        judged(81, "a", "a", (9, 5), flipped=False, orders=(A, A)),  # longer, as the humans do
        judged(82, "b", "a", (9, 5), flipped=False, orders=(A, A)),  # longer, against them
        judged(83, "a", "b", (9, 5), flipped=False, orders=(B, B)),  # shorter, against them
        judged(84, "=", "b", (5, 9), flipped=False, orders=(B, B)),  # longer; the humans: a tie
        judged(85, "a", "=", (9, 5), flipped=True, orders=(A, B)),  # what is shown first
        judged(86, "b", "=", (7, 7), flipped=True, orders=(B, A)),  # what is shown second
        judged(87, "b", "=", (7, 7), flipped=True, orders=(A, TIE)),
        judged(88, "b", "-", (7, 7)),
    ]
    longer = validation_biases.longer_chosen(rows)
    assert {name: (value.estimate, value.n) for name, value in longer.items()} == {
        "humans": (0.75, 4),
        "judge": (0.75, 4),
        "judge_against_humans": (0.5, 2),
    }
    flips = validation_biases.flips(rows)
    assert (flips["estimate"], flips["n"]) == (pytest.approx(3 / 7), 7)
    assert [flips[name].estimate for name in ("to_first", "to_second")] == pytest.approx(
        [1 / 3] * 2
    )


@pytest.mark.parametrize(
    ("judge", "models"),
    [
        ("gpt-5-mini", ["gpt-4"]),
        ("chatgpt-4o-latest", ["gpt-4"]),
        ("o4-mini", ["gpt-4"]),
        ("anthropic/claude-opus-4", ["claude-v1"]),
        ("hf:/home/gpt-4/Qwen2.5-7B-Instruct/", []),
    ],
)
def test_the_judges_own_family(judge, models):
    rows = [judged(81, "a=", "b"), judged(82, "b", "b"), judged(83, "a", "=")]
    found = validation_biases.own_family(rows, judge)
    if not models:
        assert found is None
        return
    assert found["models"] == models
    # gpt-4 is b: judge 1, 1, 0.5; votes (0 + 0.5)/2, 1, 0
    judge_share, vote_share = 2.5 / 3, 1.25 / 3
    if models == ["claude-v1"]:
        judge_share, vote_share = 1 - judge_share, 1 - vote_share
    assert found["judge"].estimate == pytest.approx(judge_share)
    assert found["humans"].estimate == pytest.approx(vote_share)
    assert found["difference"].estimate == pytest.approx(judge_share - vote_share)


def test_retest_and_accuracy_by_hand():
    rows = [
        judged(1, "a", "a", repeats=(A, A, B), orders=(A, A)),
        judged(2, "b", "=", repeats=(TIE, TIE, None), orders=(B, A)),
        judged(3, "b", "=", repeats=(TIE,), orders=(B, TIE)),
    ]
    assert validation_stats.retest(rows)[::3] == (pytest.approx((1 + 1) / (3 + 1)), 4)
    found = validation_stats.accuracy(rows)
    assert found["accuracy"].estimate == pytest.approx((1 + 0.5 + 0.75) / 3)
    assert found["right_both"].estimate == pytest.approx(1 / 3)


# ---- edges ---------------------------------------------------------------------------------------


def everything(rows: list[Judged]) -> dict:
    """All numbers, none of which may be NaN."""
    counts = validation_stats.vote_counts(rows)
    found = validation_stats.agreement(rows, counts) | {
        "ceiling": validation_stats.ceiling(rows),
        "flips": validation_biases.flips(rows),
        "longer": validation_biases.longer_chosen(rows),
        "length": validation_biases.length_given_votes(rows),
        "family": validation_biases.own_family(rows, "gpt-4"),
        "retest": validation_stats.retest(rows),
        "ties": validation_stats.share_of_ties(rows),
        "accuracy": validation_stats.accuracy(rows),
    }
    assert "NaN" not in json.dumps(found)
    return found


def test_nothing_to_measure_is_none_and_not_nan():
    assert everything([])["agreement"].n == 0
    # 1) No verdict at all.
    found = everything([judged(81, "aa", "-"), judged(82, "b", "-")])
    assert found["agreement"][:3] == (None, None, None)
    # 2) One question: a rate, and nothing that measures its error.
    found = everything([judged(81, "ab", "a"), judged(81, "b", "b")])
    assert found["agreement"] == (pytest.approx(2 / 3), None, None, 3)
    assert found["ceiling"]["difference"]["p_equivalent"] is None
    # 3) Ties only, by the judge or in the votes: chance would agree as often.
    for votes, verdict in (("==", "="), ("ab", "="), ("==", "a")):
        found = everything([judged(81 + i, votes, verdict) for i in range(5)])
        assert found["agreement"].estimate == (1.0 if votes == "==" and verdict == "=" else 0.0)
        assert found["kappa_no_ties"].estimate is None and found["agreement_no_ties"].n == 0
    assert everything([judged(81, "==", "="), judged(82, "=", "=")])["kappa"].estimate is None


def test_a_share_without_spread_has_an_exact_interval():
    found = everything([judged(81 + i, "aa", "a") for i in range(10)])
    interval = stats.binomtest(10, 10).proportion_ci(method="exact")
    assert found["agreement"][:3] == pytest.approx((1.0, interval.low, 1.0))
    found = everything([judged(81 + i, "aa", "b") for i in range(10)])
    interval = stats.binomtest(0, 10).proportion_ci(method="exact")
    assert found["agreement"][:3] == pytest.approx((0.0, 0.0, interval.high))


# ---- votes in files, and the sample --------------------------------------------------------------

QUESTIONS = [
    {"question_id": q, "category": category, "turns": ["Ask.", "Ask again."]}
    for q, category in enumerate(["writing", "stem"] * 10, 81)
]
VOTE = {"judge": "expert_1", "question_id": 81, "turn": 1}
VOTE |= {"model_a": "m2", "model_b": "m1", "winner": "model_a"}


def write_votes(folder: Path, rows: list[dict]) -> Path:
    (folder / "model_answer").mkdir(exist_ok=True)
    for model in ("m1", "m2"):
        lines = [
            {"question_id": q["question_id"], "choices": [{"index": 0, "turns": ["x", "yy"]}]}
            for q in QUESTIONS
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "model_answer" / f"{model}.jsonl").write_text(text)
    (folder / "human.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_votes_are_oriented_and_a_second_vote_counts_too(tmp_path):
    rows = [VOTE, VOTE, VOTE | {"model_a": "m1", "model_b": "m2", "winner": "model_a"}]
    known = human_votes.read_votes(write_votes(tmp_path, rows), QUESTIONS)
    votes = known.votes[Pair(81, 1, "m1", "m2")]
    assert [vote.outcome for vote in votes] == [B, B, A]
    assert human_votes.repeated_votes(known.votes) == 2
    assert human_votes.majority(vote.outcome for vote in votes) == B


@pytest.mark.parametrize(
    ("wrong", "fact"),
    [
        ({"question_id": 999}, "question_id 999 is not among the questions"),
        ({"question_id": True}, "question_id True is not among"),
        ({"turn": 3}, "turn 3 must be 1 or 2"),
        ({"winner": "m1"}, "winner 'm1' must be one of model_a"),
        ({"winner": None}, "winner None must be"),
        ({"model_b": "m7"}, "model 'm7' has no file in model_answer/, which has m1, m2"),
        ({"model_b": "m2"}, "m2 is compared with itself"),
        ({"judge": 4}, "judge 4 must be text"),
    ],
)
def test_a_vote_that_cannot_be_used_is_named(tmp_path, wrong, fact):
    folder = write_votes(tmp_path, [VOTE, VOTE | wrong])
    with pytest.raises(UserError, match="human.jsonl:2: ") as raised:
        human_votes.read_votes(folder, QUESTIONS)
    assert fact in str(raised.value)


def test_a_sample_is_nested_and_has_every_stratum_in_proportion(tmp_path):
    generator = random.Random(4)
    rows = [
        VOTE | {"question_id": q["question_id"], "turn": turn, "winner": winner}
        for q in QUESTIONS
        for turn in (1, 2)
        for winner in [generator.choices(("model_a", "model_b", "tie"), (6, 2, 2))[0]]
    ]
    generator.shuffle(rows)
    known = human_votes.read_votes(write_votes(tmp_path, rows), QUESTIONS)
    order = human_votes.in_sample_order(known)
    assert sorted(order) == sorted(known.votes)
    generator.shuffle(rows)
    assert order == human_votes.in_sample_order(
        human_votes.read_votes(write_votes(tmp_path, rows), QUESTIONS)
    )

    def strata(pairs: list[Pair]) -> Counter:
        return Counter(
            (known.questions[p.question_id]["category"], p.turn, known.votes[p][0].outcome)
            for p in pairs
        )

    whole = strata(order)
    for n in (5, 10, 20, 30):
        part = strata(order[:n])
        assert all(abs(part[s] - whole[s] * n / len(order)) < 2 for s in whole)


# ---- GPT-4 against the real votes ----------------------------------------------------------------


@pytest.mark.skipif("MT_BENCH_HUMAN" not in os.environ, reason="set MT_BENCH_HUMAN=DIR")
def test_gpt4_against_the_votes_as_published():
    """Zheng et al. 2023, table 5, and GPT-4's other values, with intervals of another program."""
    folder = Path(os.environ["MT_BENCH_HUMAN"])
    questions = [
        {"question_id": 81 + i, "category": category, "turns": ["", ""]}
        for i, category in enumerate(c for c in mt_bench.CATEGORIES for _ in range(10))
    ]
    known = human_votes.read_votes(folder, questions)
    assert (len(known.votes), sum(map(len, known.votes.values()))) == (1814, 3355)
    assert human_votes.repeated_votes(known.votes) == 1

    def row(pair: Pair) -> Judged:
        lengths = tuple(
            sum(map(len, known.answers[model][pair.question_id][: pair.turn]))
            for model in (pair.model_a, pair.model_b)
        )
        category = known.questions[pair.question_id]["category"]
        flipped = pair in known.inconsistent
        votes = known.votes.get(pair, [])
        return Judged(pair, category, votes, lengths, known.published[pair], flipped)

    rows = [row(pair) for pair in known.votes]
    found = validation_stats.agreement(rows, validation_stats.vote_counts(rows))
    close(found["agreement"], 0.6617, 0.6320, 0.6899, 3355)
    close(found["agreement_no_ties"], 0.8563, 0.8309, 0.8804, 2129)
    close(found["kappa"], 0.4827, 0.4396, 0.5256, 3355)
    close(found["kappa_no_ties"], 0.7120, 0.6619, 0.7574, 2129)
    found = validation_stats.agreement(rows, validation_stats.majority_counts(rows))
    close(found["agreement"], 0.6720, 0.6415, 0.7004, 1814)
    close(found["agreement_no_ties"], 0.8840, 0.8594, 0.9080, 1078)
    close(found["kappa"], 0.5047, 0.4616, 0.5484, 1814)
    close(found["kappa_no_ties"], 0.7670, 0.7179, 0.8140, 1078)
    found = validation_stats.ceiling(rows)
    assert found["n_pairs"] == 961
    close(found["judge"], 0.6599, 0.6255, 0.6940, 2502)
    close(found["humans"], 0.6655, 0.6331, 0.6953, 2502)
    found = validation_biases.longer_chosen(rows)
    close(found["humans"], 0.6890, 0.6500, 0.7288, 1254)
    close(found["judge"], 0.7365, 0.6951, 0.7784, 1351)
    close(found["judge_against_humans"], 0.6560, 0.5548, 0.7537, 125, tolerance=0.01)
    found = validation_biases.flips([row(pair) for pair in known.published])
    assert (round(found["estimate"] * 2400), found["n"]) == (380, 2400)
    turns = validation_stats.by_group(rows, lambda row: str(row.pair.turn))
    assert {turn: round(of["agreement"].estimate, 3) for turn, of in turns.items()} == {
        "1": 0.666,
        "2": 0.657,
    }
    categories = validation_stats.by_group(rows, lambda row: row.category)
    rounded = {name: round(of["agreement"].estimate, 2) for name, of in categories.items()}
    assert (rounded["writing"], rounded["stem"]) == (0.61, 0.72)
    assert validation_stats.paper_table(rows) == {
        "judge_turn_1": [886, 1343],
        "judge_turn_1_no_ties": [727, 859],
        "judge_turn_2": [871, 1325],
        "judge_turn_2_no_ties": [731, 864],
        "human_turn_1": [454, 721],
        "human_turn_1_no_ties": [388, 479],
        "human_turn_2": [471, 707],
        "human_turn_2_no_ties": [388, 474],
    }


def close(estimate, value: float, low: float, high: float, n: int, tolerance: float = 0.006):
    """Equal but for rounding; the interval's ends but for the chance of resampling."""
    assert estimate.estimate == pytest.approx(value, abs=5.1e-5)
    assert estimate[1:3] == pytest.approx((low, high), abs=tolerance)
    assert estimate.n == n
