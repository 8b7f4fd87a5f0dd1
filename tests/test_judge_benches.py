"""Benchmarks other than MT-Bench, through the code that is the same for all of them."""

import json
import math
import textwrap
from pathlib import Path

import duel
import pytest
from bench_workplace import make_answers, make_data, run_bench
from doubles import completion
from judge_workplace import KEY, write_lines

import judge
from pref.files.console import UserError
from pref.files.judgements import read_judgements
from pref.judging import benchmarks, judges, server_judge, store
from pref.judging.benchmark import Bench

pytestmark = pytest.mark.slow

ASKED = {1: "Say hello.", 2: "What is 2 + 2?", 3: "Name a colour."}
BASELINE = {1: "Hello!", 2: "4", 3: "Red."}
RUNS = {"dpo": {1: "Hi.", 2: "4", 3: "Blue {x}."}, "simpo": {1: "Hey", 2: "Four", 3: "Blue {x}."}}


def answer_rows(answers, model):
    return [
        {"question_id": q, "model_id": model, "choices": [{"index": 0, "turns": [text]}]}
        for q, text in answers.items()
    ]


@pytest.fixture
def arena(tmp_path, monkeypatch):
    """The benchmark of duel.py, with two runs that have answered it."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setitem(benchmarks.BENCHMARKS, "duel", duel.BENCHMARK)
    data = tmp_path / "data"
    write_lines(
        data / "question.jsonl", [{"question_id": q, "turns": [t]} for q, t in ASKED.items()]
    )
    write_lines(data / "baseline/gpt.jsonl", answer_rows(BASELINE, "gpt"))
    for name, answers in RUNS.items():
        run = tmp_path / "results" / name
        write_lines(run / "duel/answers.jsonl", answer_rows(answers, name))
        (run / "args.json").write_text("{}")
    return tmp_path


def run_duel(arena, server, *more):
    where = ["--bench", "duel", "--bench_data", str(arena / "data")]
    given = ["--judge", "big-70b", "--base_url", server.url, "--concurrency", "1"]
    return judge.main([str(arena / "results"), *where, *given, *more])


def rows_of(arena, run="dpo"):
    return read_judgements(arena / "results" / run / "duel/judgements.csv")


def test_a_benchmark_of_ones_own_is_judged(arena, server, capsys):
    server.answer = lambda body: completion("I think [[A]]")
    assert run_duel(arena, server) == 0
    paid = server.paid(server_judge.PROBE[1:])
    # dpo: two duels in both orders and one of equal answers; simpo: its third is dpo's
    assert len(paid) == 4 + 4
    assert paid[0]["temperature"] == 1 and paid[0]["max_tokens"] == 16
    rows = rows_of(arena)
    assert [(r["question_id"], r["order"], r["winner"], r["preference"]) for r in rows] == [
        (1, "1", "dpo", 2.0),
        (1, "2", "gpt", 1.0),
        (2, "1", None, 1.5),
        (3, "1", "dpo", 2.0),
        (3, "2", "gpt", 1.0),
    ]
    assert {r["bench"] for r in rows} == {"duel"} and rows[0]["label"] == "A!"
    assert (rows[2]["reading"], rows[2]["cost_usd"], rows[2]["status"]) == ("equal", 0, "ok")
    assert json.loads(rows[3]["shape"]) == {
        "run": {"chars": 9, "headers": 0, "lists": 0, "bold": 0},
        "baseline": {"chars": 4, "headers": 0, "lists": 0, "bold": 0},
    }
    out = capsys.readouterr().out
    assert "Duel, comparison with gpt in both orders by big-70b" in out
    assert "answers that equal the baseline's: 1;" in out
    assert [line.split()[:7] for line in out.splitlines() if line.startswith("dpo ")] == [
        ["dpo", "50.00", "%", "0.00", "0", "3", "0"]
    ]
    assert run_duel(arena, server) == 0 and len(server.paid(server_judge.PROBE[1:])) == len(paid)
    counts = store.judgement_counts(arena / "results", "big-70b", "duel")
    assert counts == {"dpo": store.Verdicts(5, 0), "simpo": store.Verdicts(6, 0)}
    assert store.judgement_counts(arena / "results", "big-70b") == {}


def test_log_probabilities_are_read_and_kept(arena, server):
    token = {"top_logprobs": [{"token": "m", "logprob": -2.5}, {"token": "x", "logprob": -9999.0}]}
    reply = completion("m")
    reply[1]["choices"][0]["logprobs"] = {"content": [token]}
    server.answer = lambda body: reply
    assert run_duel(arena, server, "--softly") == 0
    rows = rows_of(arena)
    assert [r["preference"] for r in rows] == [1.75, 1.25, 1.5, 1.75, 1.25]
    assert json.loads(rows[0]["token_logprobs"]) == {"m": -2.5}
    assert json.loads(rows[0]["judge_settings"])["softly"] is True


def test_a_server_without_log_probabilities_is_not_asked_further(arena, server):
    server.answer = lambda body: completion("m")
    with pytest.raises(UserError, match="big-70b: its server gives no log-probabilities"):
        run_duel(arena, server, "--softly")
    assert len(server.requests) == 1


def test_arguments_of_another_benchmark_are_refused_by_name(arena, server):
    with pytest.raises(UserError, match="--refs is for --bench mt_bench; duel does not have it"):
        run_duel(arena, server, "--refs", "corrected:x")
    with pytest.raises(UserError, match="--softly is for --bench duel; mt_bench does not"):
        judge.parse_args(["results", "--judge", "x", "--softly"])
    with pytest.raises(UserError, match="--bench_data and --mt_bench"):
        judge.parse_args(["r", "--judge", "x", "--mt_bench", "a", "--bench_data", "b"])


# ---- judges that score ---------------------------------------------------------------------------


@pytest.fixture
def scored_by_length(monkeypatch):
    """--judge rm:length scores an answer by its characters; what it was given is in the list."""
    seen = []

    def score(messages):
        seen.append(messages)
        answer = messages[-1]["content"]
        if answer == "Four":
            raise judges.NoScore("context", "too long")
        return math.nan if answer == "Hey" else len(answer)

    def open_judge(args, db, bench):
        return judges.score_judge(args.judge, 0.6, {"method": "length"}, score, seen.append)

    monkeypatch.setattr(judge, "open_judge", open_judge)
    return seen


def score_duel(arena, *more):
    where = ["--bench", "duel", "--bench_data", str(arena / "data")]
    return judge.main([str(arena / "results"), *where, "--judge", "rm:length", *more])


def test_a_score_judge_rates_every_answer_and_compares_it(arena, scored_by_length, capsys):
    assert score_duel(arena) == 1
    prepared, *asked = scored_by_length
    assert len(prepared) == 5, "the two runs' third answer is the same"
    assert asked[0] == [
        {"role": "user", "content": "Say hello."},
        {"role": "assistant", "content": "Hi."},
    ]
    assert len(asked) == len({json.dumps(messages) for messages in asked}), "each is scored once"
    rows = rows_of(arena)
    assert [(r["score"], r["grading"], r["baseline"], r["order"]) for r in rows] == [
        (3, "reward", "gpt", None), (1, "reward", "gpt", None), (9, "reward", "gpt", None),
    ]  # fmt: skip
    expected = [1 + 1 / (1 + math.exp(-d)) for d in (3 - 6, 0, 9 - 4)]
    assert [r["preference"] for r in rows] == pytest.approx(expected, abs=1e-12)
    assert [r["status"] for r in rows_of(arena, "simpo")] == ["nonfinite", "context", "ok"]
    out = capsys.readouterr().out
    assert "Duel, scores, compared with gpt, by rm:length" in out and "smoke test" not in out


def test_a_run_as_baseline_is_scored_alone(arena, scored_by_length):
    assert score_duel(arena, "--baseline", "dpo") == 1
    assert [r["baseline"] for r in rows_of(arena)] == [None] * 3
    assert [r["preference"] for r in rows_of(arena)] == [None] * 3
    assert rows_of(arena, "simpo")[2]["preference"] == 1.5


def test_a_score_judge_takes_no_arguments_of_asking(arena, scored_by_length):
    for more in (["--repeats", "2"], ["--softly"], ["--max_tokens", "3"], ["--requests", "x"]):
        with pytest.raises(UserError, match=more[0]):
            score_duel(arena, *more)


# ---- parameters that a judge is known to accept --------------------------------------------------

NEWER = {"max_completion_tokens": 2048}  # a judge that refuses temperature and max_tokens
OLDER = {"temperature": 0, "max_tokens": 2048}


@pytest.mark.parametrize(
    ("accepted", "form"),
    [
        ([], None),
        ([(NEWER, "mt_bench")], {"max_completion_tokens": 16}),
        ([(NEWER, "")], {"max_completion_tokens": 16}),  # a batch file was written
        # It takes a temperature, and the request without one was an experiment.
        ([({"max_tokens": 5}, "mt_bench"), (OLDER, "mt_bench")], None),
        # Of the benchmark's own requests the last one counts.
        ([(NEWER, "duel"), ({"temperature": 1, "max_tokens": 9}, "duel")],
         {"max_completion_tokens": 16}),
        ([({"temperature": 0.5, "max_tokens": 9}, "duel")], None),
        ([({"max_tokens": 9, "seed": 3}, "duel")], {"max_tokens": 16}),
        ([({"max_tokens": 9, "n": 2}, "duel")], None),
    ],
)  # fmt: skip
def test_what_one_benchmark_has_learned_of_a_judge_serves_another(accepted, form):
    parameters = {"temperature": 1, "max_tokens": 16}
    bench = Bench(duel.BENCHMARK, None, [], "pair", {}, "duel", parameters)
    known = [store.Accepted(*one) for one in accepted]
    assert server_judge.form_of(bench, known) == form


def test_the_example_of_contributing_md_is_judged(arena, server, monkeypatch):
    text = (Path(judge.__file__).parent / "CONTRIBUTING.md").read_text()
    code = text[text.index('   """Jokes: ') :].partition("   ```")[0]
    example = {}
    exec(textwrap.dedent(code), example)
    monkeypatch.setitem(benchmarks.BENCHMARKS, "jokes", example["BENCHMARK"])
    # The folder as the text describes it.
    data = arena / "data"
    write_lines(data / "baseline/gpt.jsonl", answer_rows(BASELINE, "comedian"))
    about = {"bench": "jokes", "questions": "question.jsonl", "generation": {"temperature": 0.7}}
    (data / "manifest.json").write_text(json.dumps(about))
    (arena / "results/dpo/duel").rename(arena / "results/dpo/jokes")
    server.answer = lambda body: completion("Ha. [[A]]")
    given = ["--bench", "jokes", "--bench_data", str(data), "--judge", "big-70b"]
    run = str(arena / "results/dpo")
    assert judge.main([run, *given, "--base_url", server.url, "--concurrency", "1"]) == 0
    rows = read_judgements(arena / "results/dpo/jokes/judgements.csv")
    assert [(row["question_id"], row["order"], row["winner"]) for row in rows] == [
        (question_id, order, winner)
        for question_id in ASKED
        for order, winner in (("1", "dpo"), ("2", "comedian"))
    ]


# ---- several baselines in one store --------------------------------------------------------------


def test_another_baseline_leaves_the_earlier_comparisons_in_the_file(arena, server, capsys):
    server.answer = lambda body: completion("I think [[A]]")

    def baselines_of(run):
        return {row["baseline"] for row in rows_of(arena, run)}

    assert run_duel(arena, server) == 0
    assert run_duel(arena, server, "--baseline", "dpo") == 0
    assert baselines_of("dpo") == {"gpt"} and baselines_of("simpo") == {"gpt", "dpo"}
    assert "not in judgements.csv" not in capsys.readouterr().out
    (arena / "data/baseline/gpt.jsonl").unlink()
    assert run_duel(arena, server, "--baseline", "dpo") == 0
    assert baselines_of("dpo") == set() and baselines_of("simpo") == {"dpo"}
    assert "not in judgements.csv: 11 comparisons with gpt, whose" in capsys.readouterr().out


# ---- data folders that are not as they should be -------------------------------------------------


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("alpaca_eval", "manifest.json", "{", "manifest.json: not valid JSON.*; run .*--alpaca_e"),
        ("alpaca_eval", "questions.json", None, "questions.json: no such file; run .*--alpaca_ev"),
        ("alpaca_eval", "baseline/answers.jsonl", None,
         r"baseline: no answers of gpt4_1106_preview.*--alpaca_eval, or .*--baseline RUN"),
        ("alpaca_eval", "baseline/answers.jsonl", "{", "not valid JSON.*models: run .*--alpaca_e"),
        ("arena_hard_v0.1", "baseline/gpt-4-0314.jsonl", "", "no answers.*prep_data.py --arena_h"),
    ],
)  # fmt: skip
def test_a_damaged_data_folder_is_named_with_the_command_that_makes_it(
    name, file, content, message, tmp_path, server, monkeypatch
):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    data = make_data(tmp_path, name)
    make_answers(tmp_path, name, data / benchmarks.BENCHMARKS[name].question_file)
    (data / file).unlink() if content is None else (data / file).write_text(content)
    with pytest.raises(UserError, match=message):
        run_bench(tmp_path, name, server)
    assert not server.requests


def test_the_folder_of_another_benchmark_is_none_of_mt_bench(tmp_path):
    data = make_data(tmp_path, "arena_hard_v0.1")
    with pytest.raises(UserError, match="holds the data of benchmark arena_hard_v0.1, not of mt_b"):
        benchmarks.read_bench(judge.parse_args(["r", "--judge", "x", "--mt_bench", str(data)]))


def test_a_baseline_that_answers_other_questions_compares_nothing(arena, server):
    rows = answer_rows({3: "Red."}, "gpt")
    write_lines(arena / "data/baseline/gpt.jsonl", rows)
    for run in RUNS:
        write_lines(arena / "results" / run / "duel/answers.jsonl", answer_rows({1: "Hi."}, run))
    with pytest.raises(UserError, match=r"nothing can be compared: the baseline \(gpt\) has no"):
        run_duel(arena, server)
    assert not server.requests
