"""pref/analysis/length_control.py and bench/lc_parity.py.

Against SciPy's optimisers on the same objective, written down once more here; against refits; and,
with ALPACA_EVAL=DIR, against the numbers that AlpacaEval has published and what its package gives.
DIR holds parity_annotations.csv, reference_real_package.csv, glm_weights_length_controlled_v1.csv,
leaderboard_weighted_alpaca_eval_gpt4_turbo.csv, instruction_difficulty_recovered.csv,
alpaca_eval_gpt4_baseline.json, and df_gamed.csv or df_gamed_standin.csv.
"""

import csv
import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import optimize, special, stats

from pref.analysis import length_control
from pref.analysis.length_control import CannotControl, Compared
from pref.files import alpaca_eval
from pref.files.console import UserError

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import lc_calibration
import lc_parity

PENALTIES = [10 ** (-4 + 8 * i / 9) for i in range(10)]


def made_up(n: int = 60, seed: int = 0, length_effect: float = -1.5) -> dict:
    """Judgements of n instructions by a judge that likes long answers, and their gamed rows."""
    rng = np.random.default_rng(seed)
    difficulty = rng.normal(-0.3, 1, n)

    def judged(delta, level):
        rate = special.expit(
            length_effect * np.tanh(delta / delta.std()) + 0.8 * difficulty + level
        )
        return rng.beta(0.4 * rate, 0.4 * (1 - rate))

    len_baseline = rng.integers(200, 3000, n).astype(float)
    len_run = np.round(len_baseline * rng.uniform(0.3, 1.6, n))
    gamed_delta = [rng.normal(-900, 500, n), rng.normal(1200, 500, n)]
    gamed = alpaca_eval.Gamed(
        y=np.concatenate([judged(delta, 0.0) for delta in gamed_delta]),
        t=np.concatenate([np.tanh(delta / delta.std(ddof=1)) for delta in gamed_delta]),
        difficulty=np.tile(difficulty, 2),
    )
    return {
        "y": judged(len_baseline - len_run, -0.5),
        "len_baseline": len_baseline,
        "len_run": len_run,
        "difficulty": difficulty,
        "gamed": gamed,
    }


# ---- the same fit by other means -----------------------------------------------------------------


def other_minimum(x, y, s, C) -> np.ndarray:
    """w with the least |w|_1 + C sum s [log(1 + exp(x w)) - y x w], as positive and negative parts:
    smooth, with bounds.
    """

    def value(parts):
        w = parts[: x.shape[1]] - parts[x.shape[1] :]
        slope = C * x.T @ (s * (special.expit(x @ w) - y))
        loss = C * np.sum(s * (np.logaddexp(0, x @ w) - y * (x @ w)))
        return parts.sum() + loss, 1 + np.concatenate([slope, -slope])

    options = {"ftol": 1e-15, "gtol": 1e-9, "maxiter": 5000, "maxfun": 50000}
    found = optimize.minimize(
        *(value, np.full(2 * x.shape[1], 0.01)),
        jac=True,
        method="L-BFGS-B",
        bounds=[(0, None)] * 2 * x.shape[1],
        options=options,
    )
    return found.x[: x.shape[1]] - found.x[x.shape[1] :]


def other_lc(y, len_baseline, len_run, difficulty, gamed) -> tuple[float, float]:
    """(LC, C) by the definition, with its rows, folds and fit made here."""
    delta = len_baseline - len_run
    own = np.stack([np.tanh(delta / np.std(delta, ddof=1)), difficulty, np.ones(len(y))], axis=1)
    there = np.stack([gamed.t, gamed.difficulty, 0 * gamed.t], axis=1)
    keep = ~np.isnan(y)
    x = np.vstack([there, own[keep]])
    target = np.append(gamed.y, y[keep])
    s = np.append(np.full(len(gamed.y), 0.1), np.ones(keep.sum()))
    fold = np.empty(len(x), dtype=int)
    for place, row in enumerate(reversed(np.array([2] * len(x), dtype=object).argsort().tolist())):
        fold[row] = place % 5
    scores = []
    for C in PENALTIES:
        of_folds = []
        for k in range(5):
            w = other_minimum(x[fold != k], target[fold != k], s[fold != k], C)
            z = x[fold == k] @ w
            log_p, log_q = -np.logaddexp(0, -z), -np.logaddexp(0, z)
            t = target[fold == k]
            of_folds.append(np.mean(s[fold == k] * (t * log_p + (1 - t) * log_q)))
        scores.append(np.mean(of_folds))
    C = PENALTIES[int(np.argmax(scores))]
    w = other_minimum(x, target, s, C)
    return 100 * np.mean(1 / (1 + np.exp(-(w[1] * difficulty + w[2])))), C


@pytest.mark.parametrize("seed", [0, 1])
def test_lc_is_that_of_its_definition(seed):
    rows = made_up(seed=seed)
    rows["y"][[3, 17]] = np.nan
    found = length_control.fit(**rows)
    lc, C = other_lc(**rows)
    assert pytest.approx(C) == found.C
    assert found.lc == pytest.approx(lc, abs=1e-3)
    assert (found.n, found.n_judged, found.label) == (60, 58, "length controlled")


def violation(rows: length_control.Rows, C: float, w: np.ndarray) -> float:
    """By how much w violates the conditions of a minimum: 0 in the subgradient."""
    slope = C * rows.x.T @ (rows.weight * (special.expit(rows.x @ w) - rows.y))
    at_zero = np.maximum(np.abs(slope) - 1, 0)
    return float(np.where(w == 0, at_zero, np.abs(slope + np.sign(w))).max())


def test_the_solver_finds_the_minimum():
    rng = np.random.default_rng(3)
    zeros = 0
    for trial in range(120):
        n, k = rng.integers(2, 50), rng.integers(1, 4)
        x = rng.normal(size=(n, k)) * 10 ** rng.uniform(-1, 1)
        if trial % 4 == 0:
            x[:, -1] = x[:, 0]  # only the sum of two weights is known
        y = [rng.random(n), np.ones(n), (x[:, 0] > 0) * 1.0, np.full(n, 0.5)][trial % 5 % 4]
        C = 10 ** rng.uniform(-4, 4)
        rows = length_control.Rows(x, y, rng.choice([0.1, 1.0], n))
        w = length_control.minimise(rows, C, np.zeros(k))
        assert violation(rows, C, w) < 1e-9 * C * np.abs(x).sum() + 1e-6
        zeros += (w == 0).sum()
    assert zeros > 20  # of 240: the penalty sets weights to exactly 0
    separable = length_control.Rows(np.array([[-1.0], [2.0]]), np.array([0.0, 1.0]), np.ones(2))
    found = length_control.minimise(separable, 1e4, np.zeros(1))
    assert found == pytest.approx(other_minimum(*separable, 1e4), abs=1e-3) and found > 5


def test_folds_are_those_of_scikit_learn_on_its_generic_path():
    """Hashes of GroupKFold's folds (scikit-learn 1.5.2, NumPy 1.26.4, its SIMD sorts disabled)."""
    for n, sha256 in ((7, "777293a8"), (100, "51216421"), (2015, "fae80dd1"), (2415, "130d0db2")):
        folds = length_control.fold_of_row(n).astype("<i8")
        assert hashlib.sha256(folds.tobytes()).hexdigest()[:8] == sha256


# ---- standard errors -----------------------------------------------------------------------------


def test_pseudo_values_say_what_a_refit_without_the_row_gives():
    rows = made_up(n=300, seed=5)
    del rows["gamed"], rows["difficulty"]
    found = length_control.fit_own(**rows)
    assert found.influence.mean() == pytest.approx(found.lc, abs=1e-9)
    assert found.se == pytest.approx(stats.sem(found.influence))
    left_out = []
    for i in range(300):
        without = length_control.fit_own(*(np.delete(values, i) for values in rows.values()))
        left_out.append(300 * found.lc - 299 * without.lc)  # the jackknife's pseudo-value
    assert np.corrcoef(left_out, found.influence)[0, 1] > 0.995
    assert found.se == pytest.approx(stats.sem(left_out), rel=0.03)


def test_pseudo_values_of_rows_without_a_preference_are_their_predictions():
    rows = made_up(n=80, seed=6)
    rows["y"][:5] = np.nan
    rows["len_run"][0] = np.nan  # there is no answer either
    found = length_control.fit(**rows)
    assert found.influence.mean() == pytest.approx(found.lc, abs=1e-9)
    predicted = special.expit(found.weights[1] * rows["difficulty"] + found.weights[2])
    assert found.influence[:5] == pytest.approx(100 * predicted[:5])
    assert found.lc == pytest.approx(100 * predicted.mean())


def test_simulated_studies_have_the_difference_that_they_state():
    def world(rng):
        return lc_calibration.made_up_instructions(lc_calibration.WEIGHTS[0], 805, rng), (
            lc_calibration.WEIGHTS
        )

    design = lc_calibration.Design(seeds=2, seed_sd=0.5, ratio=1.6, effect=20)
    found = lc_calibration.compare(5, design, world)
    assert found["mean"] == pytest.approx(20, abs=3)  # five standard errors
    assert found["found"] >= 0.8 and found["covered"] >= 0.6


# ---- special cases -------------------------------------------------------------------------------


def test_the_baseline_against_itself_is_50():
    lengths = np.arange(100.0, 140)
    ties = np.full(40, 0.5)
    for found in (
        length_control.fit(ties, lengths, lengths, np.zeros(40), made_up()["gamed"]),
        length_control.fit_own(ties, lengths, lengths),
    ):
        assert found.lc == 50 and found.se == 0 and (found.influence == 50).all()


def test_all_wins_and_two_questions():
    rows = made_up()
    rows["y"] = np.ones(60)
    found = length_control.fit(**rows)
    assert 99.9 < found.lc <= 100 and np.isfinite(found.influence).all()
    two = {key: rows[key][:2] for key in ("y", "len_baseline", "len_run", "difficulty")}
    two["y"] = np.array([0.2, 0.9])
    found = length_control.fit(**two, gamed=rows["gamed"])
    assert 0 <= found.lc <= 100 and np.isfinite(found.se) and found.n == 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"len_run": lambda x, rows: rows["len_baseline"] - 7}, "same number of characters"),
        ({"len_run": lambda x, rows: np.where(np.arange(60) == 4, np.nan, x)}, "without a length"),
        ({"difficulty": lambda x, rows: np.where(x == x[7], np.inf, x)}, "without a difficulty"),
        ({"difficulty": lambda x, rows: x[1:]}, "without a difficulty"),
        ({"difficulty": lambda x, rows: None}, "no difficulty"),
        ({"y": lambda x, rows: x + 1}, "not from 0"),
        ({"y": lambda x, rows: x[1:]}, "59 preferences"),
        ({"y": lambda x, rows: x * np.nan}, "0 answers with a preference"),
    ],
)
def test_what_cannot_be_controlled_is_refused(change, reason):
    rows = made_up()
    rows |= {key: changed(rows[key], rows) for key, changed in change.items()}
    with pytest.raises(CannotControl, match=reason):
        length_control.fit(**rows)


def test_without_gamed_rows_it_is_called_something_else():
    rows = made_up()
    gamed, difficulty = rows.pop("gamed"), rows.pop("difficulty")
    with_difficulty = length_control.fit(**rows, difficulty=difficulty)
    assert with_difficulty.label == "lc_unregularised" and PENALTIES[6] == with_difficulty.C
    delta = rows["len_baseline"] - rows["len_run"]
    t = np.tanh(delta / delta.std(ddof=1))
    x = np.stack([t, difficulty, np.ones(60)], axis=1)
    w = other_minimum(x, rows["y"], np.ones(60), PENALTIES[6])
    assert with_difficulty.weights == pytest.approx(w, abs=1e-4)
    alone, own = length_control.fit(**rows), length_control.fit_own(**rows)
    assert alone.label == "lc_unregularised" and own.label == "length controlled, own"
    w = other_minimum(x[:, [0, 2]], rows["y"], np.ones(60), PENALTIES[6])
    assert own.lc == alone.lc == pytest.approx(100 * special.expit(w[1]), abs=1e-3)
    assert length_control.fit(**rows, difficulty=difficulty, gamed=gamed).label == (
        "length controlled"
    )


# ---- by question ---------------------------------------------------------------------------------


def write_gamed(path: Path, rows: dict) -> Path:
    """A df_gamed.csv of made-up rows; the standardised difference is cut where tanh is 1."""
    gamed = rows["gamed"]
    delta = np.arctanh(np.clip(gamed.t, -1 + 1e-15, 1 - 1e-15))
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["preference", "index", "std_delta_len", "instruction_difficulty", "not_gamed_baseline"]
        )
        for i, (y, x, d) in enumerate(zip(gamed.y, delta, gamed.difficulty)):
            writer.writerow([repr(float(y)), i % 60, repr(float(x)), repr(float(d)), "False"])
    return path


def test_rows_are_aligned_by_question_in_any_order(tmp_path):
    rows = made_up()
    gamed = alpaca_eval.read_gamed(write_gamed(tmp_path / "df_gamed.csv", rows))
    assert not gamed.official and "not AlpacaEval's own" in gamed.note
    expected = length_control.fit(**rows)
    by_question = {
        i + 1: Compared(rows["y"][i], rows["len_baseline"][i], rows["len_run"][i])
        for i in np.random.default_rng(1).permutation(60).tolist()
    }
    found = length_control.control(by_question, "gpt4_1106_preview", gamed)
    assert found.result.lc == pytest.approx(expected.lc, abs=1e-9)
    assert [found.values[i + 1][0] for i in range(60)] == pytest.approx(expected.influence)

    plain = length_control.control(by_question, "gpt4_1106_preview", gamed, regularise=False)
    alone = length_control.fit(**rows | {"gamed": None})
    assert plain.result.lc == pytest.approx(alone.lc, abs=1e-9) and alone.lc != expected.lc

    # A question that is missing takes nothing from the others: difficulty is looked up by question.
    del by_question[11]
    without = length_control.control(by_question, "gpt4_1106_preview", gamed)
    assert 11 not in without.values and abs(without.result.lc - expected.lc) < 3
    by_question[11] = Compared(None, None, None)
    unjudged = length_control.control(by_question, "gpt4_1106_preview", gamed)
    assert unjudged.result.n == 60 and abs(unjudged.result.lc - without.result.lc) < 1
    own = length_control.control(by_question, "dpo_b0.1_s42", gamed)
    assert own.result.label == "length controlled, own"
    by_question[61] = Compared(1.0, 5, 6)
    with pytest.raises(CannotControl, match="no difficulty of 1 questions, such as 61"):
        length_control.control(by_question, "gpt4_1106_preview", gamed)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no column preference"),
        ("preference,index,std_delta_len,instruction_difficulty\n", "no rows"),
        ("preference,index,std_delta_len\n0.5,0,1\n", "no column instruction_difficulty"),
        ("preference,index,std_delta_len,instruction_difficulty\n0.5,0,1\n", ":2: 3 fields"),
        (
            "preference,index,std_delta_len,instruction_difficulty\n1.5,0,1,0\n",
            ":2: preference 1.5",
        ),
        ("preference,index,std_delta_len,instruction_difficulty\n0.5,0,x,0\n", ":2: std_delta_len"),
        (
            "preference,index,std_delta_len,instruction_difficulty\n0.5,0,1,\n",
            "no instruction_diff",
        ),
        ("preference,index,std_delta_len,instruction_difficulty\n0.5,-1,1,0\n", ":2: index -1"),
        (
            "preference,index,std_delta_len,instruction_difficulty\n0.5,0,1,0\n0.5,0,1,2\n",
            ":3: index 0 has difficulty 2 here and 0",
        ),
        (
            "preference,index,std_delta_len,instruction_difficulty,not_gamed_baseline\n"
            "0.5,0,1,0,True\n",
            ":2: a row that is not of a gamed baseline",
        ),
    ],
)
def test_bad_files_of_gamed_rows_are_named(tmp_path, content, message):
    (tmp_path / "df_gamed.csv").write_text(content)
    with pytest.raises(UserError, match="df_gamed.csv.*" + message):
        alpaca_eval.read_gamed(tmp_path / "df_gamed.csv")


# ---- bench/lc_parity.py --------------------------------------------------------------------------


def annotations(rows: dict, model: str = "made_up") -> list[list]:
    values = zip(rows["y"].tolist(), rows["len_baseline"].tolist(), rows["len_run"].tolist())
    return [[model, i, 1 + y, int(a), int(b)] for i, (y, a, b) in enumerate(values)]


def run_parity(capsys, tmp_path, header: list[str], lines: list[list], **files: Path):
    """(exit code, JSON lines, stderr) of bench/lc_parity.py."""
    text = "\n".join(",".join(map(str, line)) for line in [header, *lines])
    (tmp_path / "annotations.csv").write_text(text + "\n")
    options = [str(part) for name, path in files.items() for part in (f"--{name}", path)]
    code = lc_parity.main([str(tmp_path / "annotations.csv"), *options])
    out, err = capsys.readouterr()
    return code, [json.loads(line) for line in out.splitlines()], err


KEYS = ["model", "n", "win_rate", "standard_error", "lc", "lc_se"]
HEADER = ["model", "index", "preference", "len_baseline", "len_model"]


def test_lc_parity_takes_any_order_and_missing_preferences(capsys, tmp_path):
    rows = made_up()
    rows["y"][9] = np.nan
    gamed = write_gamed(tmp_path / "df_gamed.csv", rows)
    lines = annotations(rows)
    code, (found,), err = run_parity(capsys, tmp_path, HEADER, lines, gamed=gamed)
    expected = length_control.fit(**rows)
    assert code == 0 and list(found) == [
        *HEADER[:1],
        "n",
        "win_rate",
        "standard_error",
        "lc",
        "lc_se",
    ]
    assert found["model"] == "made_up" and found["n"] == 59
    judged = np.delete(rows["y"], 9)
    assert found["win_rate"] == pytest.approx(100 * judged.mean(), abs=1e-9)
    assert found["standard_error"] == pytest.approx(100 * stats.sem(judged), abs=1e-9)
    assert found["lc"] == pytest.approx(expected.lc, abs=1e-9)
    assert found["lc_se"] == pytest.approx(expected.se, abs=1e-9)
    assert "not AlpacaEval's own" in err

    # Other orders of rows and columns, another column, empty for NaN, 0 for a draw.
    lines[9][2] = ""
    shuffled = [[x[4], "?", x[2], x[0], float(x[1]), x[3]] for x in reversed(lines)]
    header = ["LEN_MODEL", "note", "Preference", "model", "", "len_baseline"]
    assert run_parity(capsys, tmp_path, header, shuffled, gamed=gamed)[1] == [
        pytest.approx(found, abs=1e-9)
    ]
    lines[0][2] = 0
    (zero,) = run_parity(capsys, tmp_path, HEADER, lines, gamed=gamed)[1]
    lines[0][2] = 1.5
    assert run_parity(capsys, tmp_path, HEADER, lines, gamed=gamed)[1] == [zero]


def test_lc_parity_says_what_it_cannot_give(capsys, tmp_path):
    rows = made_up()
    gamed = write_gamed(tmp_path / "df_gamed.csv", rows)
    lines = annotations(rows)
    equal = [["equal", i, 1.2, 100, 100] for i in range(60)]
    unjudged = [["unjudged", i, "", 100, 100] for i in range(60)]
    code, (_, same, none), _ = run_parity(
        capsys, tmp_path, HEADER, lines + equal + unjudged, gamed=gamed
    )
    assert code == 1 and same["lc"] is None and "same number of characters" in same["why"]
    assert same["win_rate"] == pytest.approx(20) and none["n"] == 0 and none["win_rate"] is None
    (alone,) = run_parity(capsys, tmp_path, HEADER, lines)[1]
    assert "lc" not in alone and alone["lc_unregularised"] > 0
    # A model whose indices count its own rows is pointed out.
    moved = [["short", line[1] - 1, *line[2:]] for line in lines[1:]]
    others = annotations(rows, "other")
    err = run_parity(capsys, tmp_path, HEADER, lines + others + moved, gamed=gamed)[2]
    assert "short: the baseline's answer has another length" in err and "other:" not in err
    # So is a file that may count from 1, and one whose preferences may be from 0 to 1.
    assert "no row has index 0" not in err and "all preferences are 0" not in err
    binary = [["binary", line[1], i % 2, *line[3:]] for i, line in enumerate(lines[1:])]
    err = run_parity(capsys, tmp_path, HEADER, binary, gamed=gamed)[2]
    assert "no row has index 0, the first one is 1" in err
    assert "binary: all preferences are 0 (a draw) or 1" in err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["a", 0, 2.5, 1, 1], ":2: preference 2.5 is not from 1"),
        (["a", 0, "yes", 1, 1], ":2: preference 'yes'"),
        (["a", 0, 1.5, "", 1], ":2: no len_baseline"),
        (["a", 0, 1.5, -1, 1], ":2: len_baseline -1"),
        (["a", 0.5, 1.5, 1, 1], ":2: index 0.5"),
        (["a", 805, 1.5, 1, 1], "a: no difficulty of index 805"),
        (["a", 1, 1.5, 1, 1], ":3: a has index 1 twice"),
        (["a", 1, 1.5, 1], ":2: 4 fields"),
        (["", 0, 1.5, 1, 1], ":2: no model"),
        (["a", 0, 1.5, 1e300, 1], ":2: len_baseline 1e.300 is not a number of characters"),
    ],
)
def test_lc_parity_names_bad_rows(capsys, tmp_path, line, message):
    gamed = write_gamed(tmp_path / "df_gamed.csv", made_up())
    with pytest.raises(UserError, match=message):
        run_parity(capsys, tmp_path, HEADER, [line, ["a", 1, 1.2, 3, 4]], gamed=gamed)


# ---- the published numbers -----------------------------------------------------------------------

DIR = Path(os.environ.get("ALPACA_EVAL") or "nothing")
published = pytest.mark.skipif(not DIR.is_dir(), reason="needs ALPACA_EVAL=DIR")


def read_table(name: str, key: str) -> dict[str, dict]:
    with open(DIR / name, newline="") as file:
        return {row[key]: row for row in csv.DictReader(file)}


def gamed_path() -> Path:
    official = DIR / "df_gamed.csv"
    return official if official.exists() else DIR / "df_gamed_standin.csv"


@pytest.fixture(scope="module")
def models() -> dict[str, dict]:
    """model -> keywords of `fit`."""
    gamed = alpaca_eval.read_gamed(gamed_path())
    kept = {}
    for model, rows in lc_parity.read_annotations(DIR / "parity_annotations.csv").items():
        columns = np.array([rows[index] for index in sorted(rows)]).T
        kept[model] = dict(zip(("y", "len_baseline", "len_run"), columns))
        kept[model]["difficulty"] = np.array([gamed.difficulty[index] for index in sorted(rows)])
        kept[model]["gamed"] = gamed.rows
    return kept


@published
def test_published_rates(capsys):
    arguments = [DIR / "parity_annotations.csv", "--gamed", gamed_path()]
    arguments += ["--difficulty", DIR / "instruction_difficulty_recovered.csv"]
    assert lc_parity.main([str(part) for part in arguments]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    references = read_table("reference_real_package.csv", "model")
    assert {line["model"] for line in lines} == references.keys() and len(lines) == 10
    for line in lines:
        reference = {
            k: v and float(v) for k, v in references[line["model"]].items() if k != "model"
        }
        assert line["n"] == reference["n_total"]
        assert line["win_rate"] == pytest.approx(reference["published_win_rate"], abs=1e-9)
        error = reference["published_standard_error"]
        assert line["standard_error"] == pytest.approx(error, abs=1e-9)
        assert line["lc"] == pytest.approx(reference["published_lc"], abs=0.16)
        assert line["lc"] == pytest.approx(reference["lc_numpy126_generic"], abs=0.1)


@published
@pytest.mark.skipif((DIR / "df_gamed.csv").exists(), reason="of the stand-in")
def test_what_the_package_gives_with_the_same_gamed_rows(models):
    same_C = 0
    for model, reference in read_table("reference_real_package.csv", "model").items():
        found = length_control.fit(**models[model])
        if pytest.approx(float(reference["C_numpy126_generic"])) == found.C:
            same_C += 1
            lc = float(reference["lc_numpy126_generic"])
            assert found.lc == pytest.approx(lc, abs=0.016), model
            # What the package calls the standard error: the spread of the predictions.
            x = np.column_stack([models[model]["difficulty"], np.ones(found.n)])
            spread = 100 * stats.sem(special.expit(x @ found.weights[1:]))
            theirs = float(reference["lc_se_numpy126_generic"])
            assert spread == pytest.approx(theirs, rel=0.01)
            assert found.se > 1.5 * spread
    assert same_C == 8


@published
def test_published_weights_give_the_published_rates():
    """No fit: the difficulty of each instruction, and what is done with it."""
    difficulty = alpaca_eval.read_difficulty(DIR / "instruction_difficulty_recovered.csv")
    x = np.array([[0, difficulty[i], 1] for i in range(805)])
    leaderboard = read_table("leaderboard_weighted_alpaca_eval_gpt4_turbo.csv", "")
    errors = []
    for model, row in read_table("glm_weights_length_controlled_v1.csv", "").items():
        weights = np.array([float(value) for name, value in row.items() if name])
        if model in leaderboard and (there := leaderboard[model]["length_controlled_winrate"]):
            lc = 100 * length_control.at_equal_length(x, weights).mean()
            errors.append(abs(lc - float(there)))
    assert len(errors) >= 190 and np.median(errors) < 1e-9


@published
@pytest.mark.parametrize("model", ["gpt-3.5-turbo-1106", "gemma-7b-it", "NullModel"])
def test_a_missing_row_does_not_move_the_others(models, model):
    rows = models[model]
    whole = length_control.fit(**rows).lc
    for i in (5, 130, 409, 700):
        cut = {k: v if k == "gamed" else np.delete(v, i) for k, v in rows.items()}
        assert abs(length_control.fit(**cut).lc - whole) < 0.35


@published
def test_phi_2_by_instruction(models):
    """Its published annotations lack two rows; the lengths of the baseline's answers tell which."""
    questions = json.loads((DIR / "alpaca_eval_gpt4_baseline.json").read_text())
    lengths = iter([len(question["output"]) for question in questions])
    rows = dict(models["phi-2"])
    kept = []
    for wanted in rows["len_baseline"]:
        kept.append(
            next(
                i
                for i, length in enumerate(lengths, len(kept) and kept[-1] + 1)
                if length == wanted
            )
        )
    difficulty = models["NullModel"]["difficulty"]
    found = length_control.fit(**rows | {"difficulty": difficulty[kept]})
    assert found.lc == pytest.approx(3.824, abs=0.02)


@published
@pytest.mark.parametrize("model", ["FuseChat-Llama-3.1-8B-Instruct", "claude-2.1", "gpt4_gamed"])
def test_standard_errors_are_those_of_refits(models, model):
    rows = models[model]
    found = length_control.fit(**rows)
    assert found.influence.mean() == pytest.approx(found.lc, abs=1e-9)
    rng = np.random.default_rng(0)
    refits = []
    for _ in range(200):
        drawn = np.sort(rng.integers(0, 805, 805))
        refits.append(
            length_control.fit(**{k: v if k == "gamed" else v[drawn] for k, v in rows.items()}).lc
        )
    assert found.se == pytest.approx(np.std(refits, ddof=1), rel=0.12)
