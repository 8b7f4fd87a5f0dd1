"""Measures besides MT-Bench and accuracy, on judgements made by hand: each number against a
computation that shares no code with the analysis.
"""

import json
import math
from statistics import fmean, stdev

import numpy as np
import pytest
from bench_studies import (
    GPT4,
    JUDGE,
    O3,
    RM,
    games,
    make_bench_study,
    preference,
    reward,
    write_alpaca_data,
    write_bench,
    write_texts,
    write_validation,
)
from scipy.optimize import minimize
from scipy.special import expit
from studies import DRAWS, MODEL, find_gap, has_note, make_base, make_run, rating, row_of
from test_imported import evaluate, sample

import analyze
from pref.analysis import (
    answer,
    figures,
    judge_identity,
    measures,
    paper_tables,
    results_folder,
    terminal,
)
from pref.files.console import UserError
from pref.files.disk import finite_or_null, read_json, sha256_json, write_json


def compared(results, *flags):
    """aggregated_metrics.json with the data folders that are beside the results."""
    folders = ("--alpaca_eval", str(results.parent / "data/alpaca_eval"))
    folders += ("--data", str(results.parent / "data"), "--mt_bench", str(results / "none"))
    args = analyze.parse_args([str(results), *DRAWS, *folders, *flags])
    data = analyze.read_data(args)
    runs, notes = results_folder.load_runs(args.results_dir, data=data)
    sources = analyze.Sources(data, analyze.read_gamed(args.alpaca_eval))
    return analyze.compare(runs, args, notes, sources)


@pytest.fixture
def results(tmp_path):
    return tmp_path / "results"


def run_with(results, bench, rows, run_id="a", loss="dpo", seed=42, beta=0.1):
    folder = make_run(results, run_id, loss, beta, None, seed, summary={"best_acc_ref": 0.6})
    write_bench(folder, bench, rows)
    return folder


# ---- AlpacaEval 2 -------------------------------------------------------------------------------


def test_win_rate_standard_error_and_counts_by_hand(results):
    y = [0.9, 0.2, 0.5, 0.7, None]
    run_with(results, "alpaca_eval", [preference(q, value) for q, value in enumerate(y, 1)])
    (part,) = compared(results)["alpaca_eval"]
    (row,) = part["cells"]
    known = [90.0, 20.0, 50.0, 70.0]
    assert row["score"] == pytest.approx(fmean(known))
    assert row["se_over_questions"] == pytest.approx(stdev(known) / 2)
    assert row["discrete"] == pytest.approx(100 * (2 + 0.5) / 4)
    assert (row["n_scored"], row["n_judged"], row["n_bench"]) == (4, 5, 805)
    assert row["failures"] == "no_token 1" and row["length"] == 1000
    assert (part["baseline"], part["judge"]) == (GPT4, JUDGE["judge"])
    assert part["title"].endswith(f"prompts alpaca_eval, baseline {GPT4}")


def test_both_orders_are_averaged_and_one_alone_does_not_count(results):
    rows = []
    for question, first, second in ((1, 0.8, 0.4), (2, 0.6, 0.2), (3, 0.9, None)):
        rows += [preference(question, y, order=o) for o, y in (("1", first), ("2", second))]
    rows.append(preference(4, 0.5, order="", reading="equal"))  # the same text: nobody was asked
    run_with(results, "alpaca_eval", rows)
    (part,) = compared(results)["alpaca_eval"]
    assert part["cells"][0]["score"] == pytest.approx(100 * fmean([0.6, 0.4, 0.5]))
    assert part["cells"][0]["n_scored"] == 3


def test_baselines_judges_and_labels_are_never_mixed(results):
    rows = [preference(1, 0.9), preference(1, 0.1, baseline="dpo")]
    rows += [preference(1, 0.4, judge="other"), preference(1, 0.6, prompts="own", judge_id="b2")]
    run_with(results, "alpaca_eval", rows)
    parts = compared(results)["alpaca_eval"]
    assert sorted(round(part["cells"][0]["score"]) for part in parts) == [10, 40, 60, 90]
    assert len({part["title"] for part in parts}) == 4
    names = {judge_identity.file_suffix(part, parts).lower() for part in parts}
    assert len(names) == 4


def test_a_seed_pair_of_win_rates_is_compared_question_by_question(results):
    rng = np.random.default_rng(0)
    base = rng.uniform(0.2, 0.6, 40)
    for loss, effect in (("dpo", 0.0), ("td_dpo", 0.2)):
        for seed in (42, 43, 44):
            y = base + effect + rng.uniform(-0.05, 0.05, 40)
            rows = [preference(q, value) for q, value in enumerate(y, 1)]
            run_with(results, "alpaca_eval", rows, f"{loss}{seed}", loss, seed)
    claim = {"id": "x", "claim": "c", "kind": "difference", "metric": "alpaca_eval"}
    claim |= {"a": {"loss": "td_dpo"}, "b": {"loss": "dpo"}, "at_least": 10}
    write_json(results / "claims.json", [claim, claim | {"id": "y", "metric": "alpaca_eval_lc"}])
    comparison = compared(results)
    (part,) = comparison["alpaca_eval"]
    row = next(row for row in part["improvement"] if row["comparison"] == "best of grid")
    assert row["estimate"] == pytest.approx(
        row_of(part["cells"], "td_dpo β=0.1")["score"] - row_of(part["cells"], "dpo β=0.1")["score"]
    )
    assert (row["n_units"], row["paired"]) == (40, "paired") and row["low"] > 10
    verdicts = {row["id"]: row for row in comparison["claims"]}
    assert verdicts["x"]["verdict"] == "supported" and verdicts["x"]["unit"] == "points of win rate"
    # all lengths are equal: nothing can be controlled for, which is said
    assert verdicts["y"]["verdict"] == "not measured"
    assert has_note(comparison, "dpo42", "no length-controlled win rate")
    controlled = next(one for one in comparison["answers"] if "length-contr" in one["score"])
    assert controlled["lead"].startswith("Nothing is measured, although judgements have a verdict")
    lead = next(one for one in comparison["answers"] if "AlpacaEval 2 win rate" in one["score"])
    assert "td_dpo β=0.1 is better than dpo β=0.1" in lead["lead"]


def length_study(results, baseline=GPT4, n=60):
    rng = np.random.default_rng(1)
    chars = rng.integers(500, 3000, n)
    y = 1 / (1 + np.exp(-((chars - 1500) / 700 + rng.normal(0, 1, n))))
    rows = [
        preference(q, value, (int(length), 1500), baseline=baseline)
        for q, (value, length) in enumerate(zip(y, chars), 1)
    ]
    run_with(results, "alpaca_eval", rows)
    return y, chars


def test_length_controlled_rate_is_the_mean_of_its_influences(results, tmp_path, monkeypatch):
    y, chars = length_study(results)
    write_alpaca_data(tmp_path / "data/alpaca_eval", n=60)
    comparison = compared(results)
    (part,) = comparison["alpaca_eval_lc"]
    (row,) = part["cells"]
    from pref.analysis import length_control
    from pref.files import alpaca_eval

    gamed = alpaca_eval.read_gamed(tmp_path / "data/alpaca_eval/df_gamed.csv")
    d = [gamed.difficulty[i] for i in range(60)]
    expected = length_control.fit(y, [1500] * 60, chars, d, gamed.rows)
    assert row["score"] == pytest.approx(expected.lc, abs=1e-9)
    assert row["se_over_questions"] == pytest.approx(expected.se)
    assert row["win_rate"] == pytest.approx(100 * fmean(y))
    assert part["definition"] == "length controlled" and part["heading"].endswith("win rate")
    assert has_note(comparison, "df_gamed.csv is not AlpacaEval's own file")
    assert has_note(comparison, "are not AlpacaEval's 805 in their order")
    listed = [[q, f"Ask {q}?"] for q in range(1, 61)]
    monkeypatch.setattr(alpaca_eval, "INSTRUCTIONS_SHA256", sha256_json(listed))
    assert not has_note(compared(results), "are not AlpacaEval's 805")


@pytest.mark.parametrize(
    ("baseline", "heading"),
    [(GPT4, "AlpacaEval 2, lc_unregularised"), ("base", "AlpacaEval 2, length controlled, own")],
)
def test_another_length_control_has_another_name(results, baseline, heading):
    length_study(results, baseline)
    comparison = compared(results)
    (part,) = comparison["alpaca_eval_lc"]
    assert part["heading"] == heading and part["cells"][0]["score"] is not None
    assert bool(find_gap(comparison, "no df_gamed.csv")) == (baseline == GPT4)
    titles = [table.title for table in paper_tables.list_tables(comparison)]
    assert any(title.startswith(f"{heading}, judge") for title in titles)


def rate_without_gamed_rows(y, chars, difficulty):
    """Percent at equal length, by SciPy: the penalty is linear in the weights' two halves."""
    delta = 1500 - np.array(chars)
    x = np.column_stack([np.tanh(delta / delta.std(ddof=1)), difficulty, np.ones(len(y))])

    def objective(halves):
        w = halves[:3] - halves[3:]
        gradient = 21.544346900318843 * x.T @ (expit(x @ w) - y)
        loss = 21.544346900318843 * (np.logaddexp(0, x @ w) - y * (x @ w)).sum()
        return loss + halves.sum(), np.r_[1 + gradient, 1 - gradient]

    found = minimize(
        objective, np.zeros(6), jac=True, bounds=[(0, None)] * 6, options={"ftol": 1e-14}
    )
    w = found.x[:3] - found.x[3:]
    return 100 * expit(x[:, 1:] @ w[1:]).mean()


def test_a_length_controlled_difference_is_shown_without_the_gamed_rows(results, tmp_path):
    write_alpaca_data(tmp_path / "data/alpaca_eval", n=60)
    lines = (tmp_path / "data/alpaca_eval/df_gamed.csv").read_text().splitlines()[1:61]
    difficulty = [float(line.split(",")[3]) for line in lines]
    rng, rates = np.random.default_rng(3), {}
    for loss, effect in (("dpo", 1.0), ("td_dpo", 1.8)):
        for seed in (42, 43, 44):
            chars = rng.integers(500, 3000, 60) * (2 if loss == "td_dpo" else 1)
            y = expit(effect + (chars - 1500) / 2000 + 0.5 * rng.normal(0, 1, 60))
            rows = [preference(q + 1, y[q], (int(chars[q]), 1500)) for q in range(60)]
            run_with(results, "alpaca_eval", rows, f"{loss}{seed}", loss, seed)
            rates[loss, seed] = rate_without_gamed_rows(y, chars, difficulty)
    comparison = compared(results)
    (part,) = comparison["alpaca_eval_lc"]
    row = next(row for row in part["improvement"] if row["comparison"] == "best of grid")
    without = fmean(rates["td_dpo", seed] - rates["dpo", seed] for seed in (42, 43, 44))
    assert row["without_gamed"] == pytest.approx(without, abs=1e-3)
    assert abs(row["estimate"] - without) > 0.1
    assert row["without_gamed_low"] < without < row["without_gamed_high"]
    shown = f"without the gamed rows {without:+.2f} [{row['without_gamed_low']:+.2f}, "
    detail = next(one for one in comparison["answers"] if "length-controlled" in one["score"])
    assert shown in detail["rows"][0]["detail"]
    tables = {table.id: table for table in paper_tables.list_tables(comparison)}
    assert round(without, 2) in tables["alpaca_eval_lc_headline"].values(row)
    assert "without gamed rows" not in tables["alpaca_eval_headline"].headers()


@pytest.mark.parametrize(
    ("main", "without", "confirmed"),
    [((1.0, 3.0), (-0.5, 2.0), False), ((-3.0, -1.0), (-2.0, 0.5), False)]
    + [((1.0, 3.0), (0.5, 2.0), True), ((-0.5, 2.0), (-1.0, 2.0), True), ((1, 3), (-3, -1), False)],
)
def test_a_difference_that_is_gone_without_the_gamed_rows_is_not_confirmed(
    main, without, confirmed
):
    row = dict(zip(("low", "high"), main)) | {"without_gamed": 0.1}
    row |= dict(zip(("without_gamed_low", "without_gamed_high"), without))
    (text,) = answer.without_gamed_texts(row, 2)
    assert ("does not confirm" not in text) == confirmed


# ---- Arena-Hard ---------------------------------------------------------------------------------


def test_arena_hard_counts_strong_wins_three_times_from_the_runs_side(results):
    rows = [
        *games(1, "A>>B", "B>>A"),  # the run wins strongly in both: six rows of 1
        *games(2, "A>B", "A>B"),  # a win, then a loss
        *games(3, "B>>A", "A=B"),  # three rows of 0, one of 0.5
        *games(4, "A>B", None),  # left out whole
    ]
    run_with(results, "arena_hard_v2.0", rows)
    (part,) = compared(results)["arena_hard"]
    (row,) = part["cells"]
    assert row["score"] == pytest.approx(100 * (6 + 1 + 0 + 0.5) / (6 + 2 + 4))
    assert (row["n_scored"], row["n_judged"], row["n_bench"]) == (3, 4, 500)
    assert row["failures"] == "parse 1"
    assert part["heading"] == "Arena-Hard v2.0, hard_prompt, win rate" and part["baseline"] == O3


def test_versions_and_categories_of_arena_hard_are_scores_of_their_own(results):
    rows = games(1, "A>B", "B>A") + games(
        2, "B>A", "A>B", category="creative_writing", baseline="g"
    )
    folder = run_with(results, "arena_hard_v2.0", rows)
    old = {"bench": "arena_hard_v0.1", "baseline": "gpt-4-0314", "category": "arena-hard-v0.1"}
    write_bench(folder, "arena_hard_v0.1", games(1, "A=B", None, **old))
    parts = compared(results)["arena_hard"]
    found = {part["heading"]: part["cells"][0]["score"] for part in parts}
    assert found == {
        "Arena-Hard v0.1, win rate": 50,  # there, a game without a verdict is left out alone
        "Arena-Hard v2.0, creative_writing, win rate": 0,
        "Arena-Hard v2.0, hard_prompt, win rate": 100,
    }
    suffixes = [judge_identity.file_suffix(part, parts) for part in parts]
    assert suffixes[0] == "_arena_hard_v0.1" and "_arena_hard_v2.0_hard_prompt" in suffixes


# ---- rewards ------------------------------------------------------------------------------------


def test_rewards_are_means_by_benchmark_and_not_averaged_over_them(results):
    folder = run_with(results, "alpaca_eval", [reward(q, -2.0 * q) for q in (1, 2, 3)])
    rows = [reward(81, x, "mt_bench", turn=t, category="math") for t, x in ((1, 1.0), (2, 4.0))]
    write_bench(folder, "mt_bench", rows)
    other = run_with(results, "alpaca_eval", [reward(q, 5.0 - q) for q in (1, 2, 3)], "b", "td_dpo")
    write_bench(other, "mt_bench", rows)
    comparison = compared(results)
    assert comparison["mt_bench"] == []  # a reward is no rating from 1 to 10
    found = {part["heading"]: part["cells"][0]["score"] for part in comparison["reward"]}
    assert found == {"Reward, MT-Bench": 2.5, "Reward, AlpacaEval 2": -4}
    part = comparison["reward"][1]
    row = part["improvement"][0]
    assert row["estimate"] == pytest.approx(7) and row["improvement_rate"] is None


def test_a_reward_against_a_baseline_is_a_win_rate_too(results):
    rows = [reward(q, 1.0, baseline="base", preference=1 + y) for q, y in ((1, 0.9), (2, 0.5))]
    run_with(results, "alpaca_eval", rows)
    comparison = compared(results)
    assert comparison["alpaca_eval"][0]["cells"][0]["score"] == pytest.approx(70)
    assert comparison["alpaca_eval"][0]["judge"] == RM["judge"]


@pytest.mark.parametrize(("size", "is_smoke"), [(0.6, False), (0.01, True)])
def test_a_reward_model_may_be_smaller_than_a_judge(results, size, is_smoke):
    run_with(results, "alpaca_eval", [reward(q, 1.0, judge_params_b=size) for q in (1, 2)])
    (part,) = compared(results)["reward"]
    assert part["smoke_test"] is is_smoke and part["judge_params_b"] == size


def test_frontier_is_score_against_kl_of_the_same_answers(results):
    for seed, kl in ((42, 1.0), (43, 3.0)):
        folder = run_with(results, "alpaca_eval", [reward(1, kl)], f"r{seed}", seed=seed)
        write_texts(folder, "alpaca_eval", {1: "text"}, kl)
    (part,) = compared(results)["reward"]
    (row,) = part["frontier"]
    assert (row["kl"], row["score"], row["kl_answers"]) == (2.0, 2.0, "alpaca_eval")
    assert row["kl_sd"] == pytest.approx(math.sqrt(2))


# ---- judges measured against human votes --------------------------------------------------------

SMALL = {"judge": "tiny-0.5b", "judge_params_b": 0.5, "judge_address": None}


@pytest.mark.parametrize(
    ("as_humans", "warnings", "small", "measures_nothing"),
    [
        (None, (), True, True),
        ("yes", (), True, False),
        ("no", (), True, True),
        ("no", (), False, False),
        ("not measured", (), True, True),
        ("yes", ("flips 0.41 of its verdicts",), False, True),
    ],
)
def test_a_validation_stands_beside_every_number(
    results, as_humans, warnings, small, measures_nothing
):
    who = JUDGE | (SMALL if small else {})
    ratings = [rating(q, t, 7, **who) for q in (81, 82) for t in (1, 2)]
    make_run(results, "a", "dpo", summary={}, ratings=ratings)
    if as_humans:
        write_validation(results, as_humans, warnings, who)
    comparison = compared(results)
    (judge,) = comparison["mt_bench"]
    said = as_humans or "not measured"
    sentence = f"judge {who['judge']} agrees with human votes as often as humans do: {said}"
    assert (judge["agreement_text"], judge["as_humans"]) == (sentence, said)
    assert judge["smoke_test"] == measures_nothing
    assert comparison["answers"][0]["judge"] == sentence
    tables = [table for table in paper_tables.list_tables(comparison) if table.judge]
    assert tables and all(sentence in table.note for table in tables)
    mark = judge_identity.smoke_mark(judge)
    assert all(text in mark for text in warnings) and bool(mark) == measures_nothing


def test_a_validation_of_another_server_is_not_the_judges(results):
    ratings = [rating(81, 1, 7, **JUDGE)]
    make_run(results, "a", "dpo", summary={}, ratings=ratings)
    write_validation(results, "yes", judge=JUDGE | {"judge_address": "http://localhost:1/v1"})
    assert compared(results)["mt_bench"][0]["as_humans"] == "not measured"


@pytest.mark.parametrize(
    "found", [{"as_humans": "maybe"}, {"judge": 7}, {"warnings": "text"}, {"warnings": [1]}]
)
def test_a_validation_that_is_none_is_refused(results, found):
    make_run(results, "a", "dpo", summary={})
    write_validation(results)
    path = results / "judges/slug/validation.json"
    write_json(path, read_json(path) | found)
    with pytest.raises(UserError, match="validation.json"):
        compared(results)


# ---- what does not belong, what is missing, what is no judgement --------------------------------


def test_judgements_of_replaced_answers_are_left_out_of_every_benchmark(results, tmp_path):
    from pref.files import mt_bench

    write_alpaca_data(tmp_path / "data/alpaca_eval", n=2)
    folder = run_with(
        results,
        "alpaca_eval",
        [
            preference(q, 0.5, answer_sha256=mt_bench.answer_sha256(1, ["old"], ["x"]))
            for q in (1, 2)
        ],
    )
    write_texts(folder, "alpaca_eval", {1: "new", 2: "new"})
    comparison = compared(results)
    assert comparison["alpaca_eval"] == []
    assert has_note(comparison, "pairwise judgements of alpaca_eval", "have been replaced since")
    gap = find_gap(comparison, "pairwise judgements of alpaca_eval")
    assert gap["next"] == "judge.py --bench alpaca_eval"


def test_only_common_instructions_are_compared_and_gaps_are_named(results):
    run_with(results, "alpaca_eval", [preference(q, 0.9) for q in (1, 2, 3)])
    run_with(results, "alpaca_eval", [preference(q, 0.1) for q in (1, 2)], "b", "td_dpo")
    make_run(results, "c", "simpo", summary={})
    comparison = compared(results)
    (part,) = comparison["alpaca_eval"]
    assert part["questions"] == [1, 2] and part["questions_left_out"] == [3]
    assert find_gap(comparison, f"AlpacaEval 2, {part['title']}")["runs"] == ["c"]
    assert find_gap(comparison, "on all questions (1 left out)")["runs"] == ["b"]


@pytest.mark.parametrize(
    ("bench", "row", "message"),
    [
        ("alpaca_eval", preference(1, 1.4), "2.4"),
        ("alpaca_eval", preference(1, 0.4, baseline=None), "baseline"),
        ("alpaca_eval", preference(1, 0.4, shape="[1]"), "shape"),
        ("alpaca_eval", preference(1, 0.4, turn=0), "turn"),
        ("alpaca_eval", reward(1, math.nan), "nan"),
        ("arena_hard_v2.0", games(1, "A>C", "A>B")[0], "A>C"),
        ("arena_hard_v2.0", games(1, "A>B", "A>B", order="3")[0], "order"),
    ],
)
def test_what_is_no_judgement_is_refused_with_its_place(results, bench, row, message):
    run_with(results, bench, [row])
    with pytest.raises(UserError, match=r"judgements\.csv") as error:
        compared(results)
    assert message in str(error.value)


# ---- everything at once -------------------------------------------------------------------------


@pytest.mark.slow
def test_a_study_with_every_measure(results, tmp_path, capsys):
    make_bench_study(results, n=12, seeds=(42, 43))
    write_validation(results)
    write_alpaca_data(tmp_path / "data/alpaca_eval", n=12)
    comparison = compared(results)
    json.dumps(finite_or_null(comparison), allow_nan=False)
    for key, count in (("alpaca_eval_lc", 1), ("arena_hard_style", 3), ("reward", 1)):
        assert len(comparison[key]) == count, key
        for part in comparison[key]:
            kinds = {row["comparison"] for row in part["improvement"]}
            assert {"best of grid", "matched beta", "untrained model"} <= kinds
            assert part["spread"] and part["selection"] and len(part["frontier"]) == 7
    tables = paper_tables.list_tables(comparison)
    assert len({table.id for table in tables}) == len(tables)
    assert all(
        len(table.values(row)) == len(table.headers()) for table in tables for row in table.rows
    )
    jobs = figures.comparison_jobs(tmp_path, comparison, [])
    stems = [job.args[0].name for job in jobs]
    assert len(set(stems)) == len(stems) and "comparison_reward_frontier" in stems
    assert all(figures.figure_kind(tmp_path / f"{stem}.png") for stem in stems)
    terminal.print_tables(comparison, "td_dpo")
    printed = capsys.readouterr().out
    assert "AlpacaEval 2 length-controlled win rate" in printed and "19/20/805" not in printed
    figures.draw(next(j for j in jobs if j.args[0].name == "comparison_reward_frontier"))
    assert (tmp_path / "comparison_reward_frontier.png").stat().st_size > 10_000


# ---- imported tasks -----------------------------------------------------------------------------


def import_task(folder, right):
    """gsm8k of lm-evaluation-harness: one answer for each entry of `right`."""
    rows = [sample("gsm8k", i, "strict-match", exact_match=float(x)) for i, x in enumerate(right)]
    model = {"pretrained": MODEL}
    if folder.name != "base":
        model |= {"peft": f"results/{folder.name}/adapter"}
    evaluate(folder, {"gsm8k": rows}, model_args=model)


def test_an_imported_task_is_the_alignment_tax_of_a_loss(results):
    base, ours = [1] * 30 + [0] * 10, [1] * 18 + [0] * 22
    import_task(make_base(results), base)
    for seed in (42, 43):
        import_task(make_run(results, f"d{seed}", "dpo", seed=seed, summary={}), ours)
    claim = {"id": "x", "claim": "c", "kind": "equivalence", "metric": "task:gsm8k", "margin": 5}
    sides = {"a": {"loss": "dpo"}, "b": {"loss": "dpo"}}
    write_json(results / "claims.json", [claim | sides])
    comparison = compared(results)
    (part,) = comparison["tasks"]
    assert part["task"] == "gsm8k" and row_of(part["cells"], "base")["score"] == 75
    assert row_of(part["cells"], "base")["se_over_questions"] == pytest.approx(
        100 * stdev(base) / math.sqrt(40)
    )
    (tax,) = (t for t in paper_tables.list_tables(comparison) if t.id == "alignment_tax")
    (row,) = tax.rows
    assert (row["task"], row["estimate"], row["n_units"]) == ("gsm8k", -30, 40) and row["high"] < 0
    verdict = next(row for row in comparison["claims"] if row["id"] == "x")
    assert verdict["unit"] == "points" and verdict["estimate"] == 0
    with pytest.raises(UserError, match="task:NAME"):
        write_json(results / "claims.json", [claim | sides | {"metric": "gsm8k"}])
        compared(results)


def test_every_measure_can_be_claimed_and_says_what_it_lacks(results):
    make_run(results, "a", "dpo", summary={})
    metrics = [name.replace("NAME", "x") for name in measures.metric_names()]
    sides = {"a": {"loss": "dpo"}, "b": {"loss": "dpo"}, "kind": "difference", "at_least": 1}
    write_json(
        results / "claims.json", [{"id": m, "claim": m, "metric": m} | sides for m in metrics]
    )
    rows = {row["id"]: row for row in compared(results)["claims"]}
    assert len(metrics) == 11
    assert all(rows[metric]["verdict"] == "not measured" for metric in metrics)
    assert "judge.py --bench alpaca_eval" in rows["alpaca_eval_lc"]["why"]
    assert "lm_eval" in rows["task:x"]["why"]
