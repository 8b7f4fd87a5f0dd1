"""Arena-Hard's scores and their intervals, compared with plain computations that share no code."""

import gzip
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize

from pref.analysis import arena_hard
from pref.analysis.arena_hard import EQUAL, LENGTH, MARKDOWN, Game
from pref.files import verdict_labels

LABELS = ("A>>B", "A>B", "A=B", "B>A", "B>>A")

# Verdicts of gpt-3.5-turbo-0125 on Athene-V2-Chat against gpt-4-0314, as (game 1, game 2): how many
# of 108 questions. Labels from zeppombal/arena-hard-auto at dff24acc, Apache-2.0. Game 1 shows the
# baseline as A, game 2 the run.
REAL_PAIRS = {
    ("A>>B", "B>>A"): 74,
    ("A>>B", "B>A"): 16,
    ("A>B", "B>A"): 5,
    ("A>B", "B>>A"): 3,
    ("B>A", "B>A"): 2,
    ("A>>B", "A=B"): 2,
    (None, None): 1,
    ("A>>B", "A>>B"): 1,
    ("A=B", "B>>A"): 1,
    ("A>>B", "A>B"): 1,
    ("A=B", "A=B"): 1,
    ("B>>A", "B>>A"): 1,
}


def games_of(pairs, shapes=None) -> list[Game]:
    """Games from (game 1, game 2) by question, as shown to the judge."""
    games = []
    for question, pair in pairs.items():
        for label, order in zip(pair, "21"):
            turned = label and verdict_labels.from_run_side(label, order)
            games.append(Game(question, order, turned, *(shapes or {}).get(question, ())))
    return games


def real_games() -> list[Game]:
    listed = [pair for pair, count in REAL_PAIRS.items() for _ in range(count)]
    return games_of(dict(enumerate(listed)))


def exploded(game: Game) -> list[float]:
    """A game's rows, written out."""
    return {"A>>B": [1, 1, 1], "A>B": [1], "A=B": [0.5], "B>A": [0], "B>>A": [0, 0, 0]}[game.label]


# ---- labels --------------------------------------------------------------------------------------


def test_a_label_is_turned_to_the_runs_side():
    assert verdict_labels.from_run_side("A>>B", "1") == "A>>B"
    assert verdict_labels.from_run_side("A>>B", "2") == "B>>A"
    assert verdict_labels.from_run_side("B>A", "2") == "A>B"
    assert verdict_labels.from_run_side("A=B", "2") == "A=B"
    spelled = {text: verdict_labels.read_label(text) for text in ("A<<B", "B<A", "B=A", "AB", "")}
    assert spelled == {"A<<B": "B>>A", "B<A": "A>B", "B=A": "A=B", "AB": None, "": None}


# ---- win rate ------------------------------------------------------------------------------------


def test_the_win_rate_of_real_verdicts():
    score = arena_hard.win_rate(real_games())
    assert score.n_rows == 564 and score.left_out == 1 and len(score.values) == 107
    assert score.score == pytest.approx(2.0390070921985815, abs=1e-12)
    # A jackknife over questions, from rows that are written out.
    rows = {}
    for game in real_games():
        if game.label:
            rows.setdefault(game.question, []).extend(exploded(game))
    without = [
        100 * np.mean([y for q, ys in rows.items() if q != left_out for y in ys])
        for left_out in rows
    ]
    n = len(rows)
    jackknife = math.sqrt((n - 1) / n * np.sum((without - np.mean(without)) ** 2))
    assert score.se == pytest.approx(jackknife, rel=0.03)
    # Rows as independent observations, as arena-hard-auto has them: 1.5 times too small.
    flat = [y for ys in rows.values() for y in ys]
    assert 1.4 < score.se / (100 * np.std(flat, ddof=1) / math.sqrt(len(flat))) < 1.55


def test_pseudo_values_by_hand():
    # Question 1: a strong win and a slight one, 4 of 4 rows. Question 2: a tie and a slight loss.
    score = arena_hard.win_rate(games_of({1: ("B>>A", "A>B"), 2: ("A=B", "B>A")}))
    rate = 4.5 / 6
    assert score.score == pytest.approx(100 * rate)
    assert score.values[1] == pytest.approx(100 * (rate + 2 * (4 - rate * 4) / 6))
    assert score.values[2] == pytest.approx(100 * (rate + 2 * (0.5 - rate * 2) / 6))
    assert score.n_rows == 6


def test_a_judge_that_goes_by_position_is_seen():
    score = arena_hard.win_rate(
        games_of({1: ("A>>B", "A>>B"), 2: ("A>B", "A>B"), 3: ("A=B", "A>B")})
    )
    assert (score.disagree, score.left_out) == (2, 0)
    always_a = arena_hard.win_rate(games_of(dict.fromkeys(range(5), ("A>>B", "A>>B"))))
    assert (always_a.score, always_a.se, always_a.disagree) == (50.0, 0.0, 5)


def test_a_game_without_a_verdict_takes_its_question_along_or_not():
    pairs = {1: ("B>A", "A>B"), 2: (None, "B>>A"), 3: ("A>B", "B>A")}
    both = arena_hard.win_rate(games_of(pairs))
    alone = arena_hard.win_rate(games_of(pairs), both_games=False)
    assert (both.score, both.n_rows, both.left_out) == (50.0, 4, 1)
    assert (alone.score, alone.n_rows, alone.left_out) == (pytest.approx(100 * 2 / 7), 7, 0)
    # A game that was not judged yet is none either; without any verdict there is no score.
    half = [game for game in games_of(pairs) if game.question != 1 or game.order == "1"]
    assert arena_hard.win_rate(half).left_out == 2
    assert arena_hard.win_rate(games_of({1: (None, None)}), both_games=False) is None
    assert arena_hard.win_rate([]) is None
    assert arena_hard.win_rate(games_of({1: ("B>A", "A>B")})).se is None
    with pytest.raises(KeyError, match="AB"):
        arena_hard.win_rate([Game(1, "1", "AB")])


# ---- style control -------------------------------------------------------------------------------


def simulated(n=60, seed=3) -> dict[str, list[Game]]:
    """Two runs whose wins depend on the length of their answers, `long` writing more."""
    rng = np.random.default_rng(seed)

    def shape(chars):
        headers, lists, bold = rng.poisson((2, 4, 6))
        return {"chars": int(chars), "headers": headers, "lists": lists, "bold": bold}

    games = {}
    for run, factor in {"long": 1.8, "short": 0.9}.items():
        shapes, pairs = {}, {}
        for question in range(n):
            chars = rng.uniform(300, 1500, 2)
            shapes[question] = (shape(chars[0] * factor), shape(chars[1]))
            a, b = (side["chars"] for side in shapes[question])
            logits = 3 * (a - b) / (a + b) - 0.4 + rng.logistic(size=2)
            cuts = np.array([-1.5, -0.2, 0.2, 1.5])
            from_run = [LABELS[4 - int(np.searchsorted(cuts, logit))] for logit in logits]
            pairs[question] = (verdict_labels.MIRRORED[from_run[0]], from_run[1])
        games[run] = games_of(pairs, shapes)
    return games


def reference_fit(games, columns=(0, 1, 2, 3)):
    """Scores at the mean style and at equal style, and coefficients: every row written out, SciPy's
    minimiser, the features' formulas once more.
    """
    x, y, run = [], [], []
    for i, of_run in enumerate(games.values()):
        for game in of_run:
            a, b = game.run_shape, game.baseline_shape
            row = [(a["chars"] - b["chars"]) / (a["chars"] + b["chars"])]
            for name in ("headers", "lists", "bold"):
                p, q = a[name] / (a["chars"] + 1), b[name] / (b["chars"] + 1)
                row.append((p - q) / (p + q + 1))
            for outcome in exploded(game):
                x.append(row), y.append(outcome), run.append(i)
    x, y, run = np.array(x)[:, columns], np.array(y), np.array(run)
    z = (x - x.mean(0)) / x.std(0, ddof=1)
    design = np.column_stack([run == i for i in range(len(games))] + [z])

    def loss(w):
        eta = design @ w
        return np.sum(np.log1p(np.exp(eta)) - y * eta)

    w = minimize(loss, np.zeros(design.shape[1]), method="BFGS", options={"gtol": 1e-7}).x
    at_zero = w[: len(games)] - (x.mean(0) / x.std(0, ddof=1)) @ w[len(games) :]
    return 100 / (1 + np.exp(-w[: len(games)])), 100 / (1 + np.exp(-at_zero)), w[len(games) :]


def test_style_control_is_the_optimum_of_its_likelihood():
    games = simulated()
    at_mean, at_equal, coefficients = reference_fit(games)
    control = arena_hard.style_control(games)
    assert [s.score for s in control.scores.values()] == pytest.approx(at_mean, abs=2e-4)
    assert list(control.coefficients.values()) == pytest.approx(coefficients, abs=2e-5)
    equal = arena_hard.style_control(games, at=EQUAL)
    assert [s.score for s in equal.scores.values()] == pytest.approx(at_equal, abs=2e-4)
    assert control.coefficients == equal.coefficients and control.reason == ""
    # Length explains most of what the longer answers won.
    plain = arena_hard.win_rate(games["long"]).score
    assert plain - equal.scores["long"].score > 10


@pytest.mark.parametrize("at", ["mean", "equal"])
def test_the_values_of_questions_are_a_jackknifes(at):
    games = simulated(n=40)
    whole = arena_hard.style_control(games, at=at).scores
    left = []
    for question in range(40):
        rest = {run: [g for g in gs if g.question != question] for run, gs in games.items()}
        left.append([s.score for s in arena_hard.style_control(rest, at=at).scores.values()])
    left = np.array(left)  # (40, 2)
    jackknife = np.sqrt(39 / 40 * ((left - left.mean(0)) ** 2).sum(0))
    values = np.array([list(score.values.values()) for score in whole.values()])  # (2, 40)
    for i, score in enumerate(whole.values()):
        assert np.mean(values[i]) == pytest.approx(score.score, abs=1e-9)
        assert score.se == pytest.approx(jackknife[i], rel=0.12)
        assert np.corrcoef(values[i], -left[:, i])[0, 1] > 0.99
    # A difference of two runs, paired by question.
    difference = np.std(values[0] - values[1], ddof=1) / math.sqrt(40)
    spread = left[:, 0] - left[:, 1]
    paired = np.sqrt(39 / 40 * ((spread - spread.mean()) ** 2).sum())
    assert difference == pytest.approx(paired, rel=0.12)


@pytest.mark.parametrize("features, columns", [(LENGTH, [0]), (MARKDOWN, [1, 2, 3])])
def test_some_of_the_style_features(features, columns):
    games = simulated()
    at_mean, _, coefficients = reference_fit(games, columns)
    control = arena_hard.style_control(games, features=features)
    assert [s.score for s in control.scores.values()] == pytest.approx(at_mean, abs=2e-4)
    assert list(control.coefficients) == list(features)
    assert list(control.coefficients.values()) == pytest.approx(coefficients, abs=2e-5)


def test_a_feature_that_never_varies_is_left_out():
    def without_headers(game):
        run, baseline = (s | {"headers": 0} for s in (game.run_shape, game.baseline_shape))
        return game._replace(run_shape=run, baseline_shape=baseline)

    games = {run: list(map(without_headers, of_run)) for run, of_run in simulated().items()}
    control = arena_hard.style_control(games)
    assert control.coefficients["headers"] == pytest.approx(0, abs=1e-12)
    without = arena_hard.style_control(games, features=("chars", "lists", "bold"))
    for run in games:
        assert control.scores[run].score == pytest.approx(without.scores[run].score, abs=1e-9)
        assert control.scores[run].se == pytest.approx(without.scores[run].se, abs=1e-9)


def test_a_run_that_wins_every_game_is_no_part_of_the_fit():
    games = simulated()
    best = [g._replace(label="A>B") for g in games["short"]]
    control = arena_hard.style_control(games | {"best": best})
    assert control.scores["best"].score == 100 and control.scores["best"].se == 0
    assert all(0 < control.scores[run].score < 100 for run in games)
    alone = arena_hard.style_control({"best": best})
    assert alone.scores["best"].score == 100 and alone.reason == ""


def test_what_cannot_be_fitted_has_a_reason():
    games = simulated()
    unread = {"run": [g._replace(label=None) for g in games["long"]]}
    assert arena_hard.style_control(unread) == ({}, {}, arena_hard.NO_VERDICT)
    bare = {"run": [g._replace(run_shape=None) for g in games["long"]]}
    assert arena_hard.style_control(bare).reason == arena_hard.NO_SHAPE
    # The longer answer wins every game.
    longer = {
        "run": [
            g._replace(label="A>B" if g.run_shape["chars"] > g.baseline_shape["chars"] else "B>A")
            for g in games["long"]
        ]
    }
    assert arena_hard.style_control(longer).reason == arena_hard.SEPARATED
    # Each run always has the same style, so that nothing tells its style from itself.
    shapes = {
        run: {"chars": 100 * i, "headers": 0, "lists": 0, "bold": 0}
        for i, run in enumerate(games, 1)
    }
    same = {
        run: [g._replace(run_shape=shapes[run], baseline_shape=shapes["long"]) for g in of_run]
        for run, of_run in games.items()
    }
    assert arena_hard.style_control(same).reason == arena_hard.NOT_IDENTIFIED


def test_a_row_of_judgements_csv_is_a_game():
    shape = {"run": {"chars": 5}, "baseline": {"chars": 7}}
    row = {"question_id": 4, "order": "2", "label": "A>>B", "status": "ok"}
    game = arena_hard.as_game(row | {"shape": json.dumps(shape)})
    assert game == Game(4, "2", "B>>A", {"chars": 5}, {"chars": 7})
    failed = arena_hard.as_game(row | {"status": "length", "label": None, "shape": None})
    assert failed == Game(4, "2", None, None, None)


# ---- upstream's own numbers, ARENA_HARD=DIR ------------------------------------------------------


@pytest.fixture
def folder():
    if "ARENA_HARD" not in os.environ:
        pytest.skip("ARENA_HARD is not set")
    return Path(os.environ["ARENA_HARD"])


def read_rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def fixture_games(folder) -> dict[str, list[Game]]:
    def styles(model):
        rows = read_rows(folder / f"style_{model}.jsonl")
        counted = {row["uid"]: row["metadata"] for row in rows}
        return {
            uid: {
                "chars": meta["token_len"],
                "headers": sum(meta["header_count"].values()),
                "lists": sum(meta["list_count"].values()),
                "bold": sum(meta["bold_count"].values()),
            }
            for uid, meta in counted.items()
        }

    baseline, games = styles("o3-mini-2025-01-31"), {}
    for run in ("run_a", "run_b"):
        own = styles(run)
        shapes = {uid: (own[uid], baseline[uid]) for uid in own}
        rows = read_rows(folder / f"judgment_{run}.jsonl")
        pairs = {row["uid"]: [game and game["score"] for game in row["games"]] for row in rows}
        games[run] = games_of(pairs, shapes)
    return games


def test_the_simulated_fixture(folder):
    games = fixture_games(folder / "fixture_simulated")
    reference = json.loads((folder / "fixture_simulated/reference.json").read_text())
    plain = {run: arena_hard.win_rate(of_run) for run, of_run in games.items()}
    control = arena_hard.style_control(games)
    for run in games:
        assert plain[run].score == pytest.approx(reference["exploded_mean"][run], abs=1e-10)
        assert plain[run].n_rows == reference["rows"][run]
        assert control.scores[run].score == pytest.approx(reference["style_exact"][run], abs=1e-5)
    assert sum(score.left_out for score in plain.values()) == 10
    exact = reference["coefficients_exact"]
    assert list(control.coefficients.values()) == pytest.approx(exact, abs=1e-6)


def test_standard_errors_are_those_of_refits(folder):
    games = fixture_games(folder / "fixture_simulated")
    by_question = {
        run: {q: [g for g in of_run if g.question == q] for q in {g.question for g in of_run}}
        for run, of_run in games.items()
    }
    questions, rng, refits = sorted(by_question["run_a"]), np.random.default_rng(1), []
    for _ in range(200):
        drawn = list(enumerate(rng.choice(questions, len(questions))))
        sample = {
            run: [g._replace(question=i) for i, q in drawn for g in by_question[run][q]]
            for run in games
        }
        plain = [arena_hard.win_rate(of_run).score for of_run in sample.values()]
        control = arena_hard.style_control(sample).scores
        refits.append([*plain, *(score.score for score in control.values())])
    spread = np.std(refits, axis=0, ddof=1)
    plain = [arena_hard.win_rate(of_run).se for of_run in games.values()]
    control = [score.se for score in arena_hard.style_control(games).scores.values()]
    assert [*plain, *control] == pytest.approx(spread, rel=0.12)


def test_upstreams_counts_of_markdown(folder):
    from pref.judging.shape import shape

    with gzip.open(folder / "v2.0/o3-mini-2025-01-31.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    for row in rows:
        counted = shape(row["messages"][-1]["content"]["answer"])
        expected = {
            "headers": sum(row["metadata"]["header_count"].values()),
            "lists": sum(row["metadata"]["list_count"].values()),
            "bold": sum(row["metadata"]["bold_count"].values()),
        }
        assert {name: counted[name] for name in expected} == expected
    assert len(rows) == 750 and any(row["metadata"]["bold_count"]["**"] for row in rows)
