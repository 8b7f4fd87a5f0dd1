"""judge.py --validate: what is asked, what is kept, and what is said of the judge."""

import itertools
import json
import os
import re
from pathlib import Path

import pytest
from doubles import Server, completion
from judge_workplace import write_answers, write_lines

import judge
from pref.files import mt_bench
from pref.files.console import UserError
from pref.judging import (
    human_votes,
    judges,
    mt_bench_files,
    validation,
    validation_report,
    validation_stats,
)
from pref.judging.server_judge import PROBE

pytestmark = pytest.mark.slow

QUESTIONS = {81 + i: ("writing", "math", "stem", "coding")[i % 4] for i in range(4)}
# Three models. What they answer says how good it is, and the votes follow that.
MODELS = {"claude-v1": 3, "gpt-4": 3, "llama-13b": 1}
QUALITY = re.compile(r"worth (\d)")


def write_bench(folder: Path, categories: dict[int, str] = QUESTIONS) -> None:
    """MT-Bench's files, in this test's own words. categories: by question_id."""
    questions = [
        {"question_id": q, "category": category, "turns": [f"Ask {q}.", f"Ask {q} again."]}
        for q, category in categories.items()
    ]
    write_lines(folder / "question.jsonl", questions)
    write_answers(folder / "reference_answer/gpt-4.jsonl", {q: ["R1", "R2"] for q in categories})
    prompts = []
    for grading, fields in mt_bench_files.PROMPT_FIELDS.items():
        for name, needed in fields.items():
            template = "\n".join(f"<{field}> {{{field}}}" for field in sorted(needed))
            kind = mt_bench_files.OUTPUT_FORMATS[grading]
            row = {"name": name, "system_prompt": "Judge.", "prompt_template": template}
            prompts.append(row | {"type": grading, "output_format": kind})
    write_lines(folder / "judge_prompts.jsonl", prompts)


def write_votes(folder: Path) -> None:
    """Two votes on each pair: for the better model, or, of two good ones, a tie and one for a."""
    for model, quality in MODELS.items():
        answers = {q: [f"{model} worth {quality}"] * 2 for q in QUESTIONS}
        write_answers(folder / "model_answer" / f"{model}.jsonl", answers)
    rows = []
    for q in QUESTIONS:
        for turn in (1, 2):
            vote = {"question_id": q, "turn": turn}
            for model_a, model_b, winners in (
                ("claude-v1", "gpt-4", ("tie", "model_a")),
                ("llama-13b", "gpt-4", ("model_b", "model_b")),
                ("claude-v1", "llama-13b", ("model_a", "model_a")),
            ):
                pair = vote | {"model_a": model_a, "model_b": model_b}
                rows += [
                    pair | {"judge": f"expert_{i}", "winner": winner}
                    for i, winner in enumerate(winners)
                ]
    write_lines(folder / "human.jsonl", rows)


N_PAIRS = len(QUESTIONS) * 2 * 3  # 24, of which 8 of two good models


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to work in, with data/mt_bench and data/mt_bench_human."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-0123456789")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    write_bench(tmp_path / "data/mt_bench")
    write_votes(tmp_path / "data/mt_bench_human")
    monkeypatch.setattr(validation_stats, "DRAWS", 200)  # for speed
    return tmp_path


@pytest.fixture(scope="module")
def server():
    return Server()


def good(body: dict) -> tuple[int, dict]:
    """A judge that sees how good each answer is."""
    worth = [int(x) for x in QUALITY.findall(body["messages"][-1]["content"])]
    if not worth:
        return completion("OK")  # the probe
    worth = worth[:1] + worth[-1:]  # the first answer shown, and the last
    verdict = "C" if worth[0] == worth[1] else "A" if worth[0] > worth[1] else "B"
    return completion(f"So it is [[{verdict}]]")


def validate(server: Server | None, *more: str, judge_name: str = "gpt-9-70b") -> int:
    where = ["--base_url", server.url] if server else []
    return judge.main(["results", "--validate", *more, "--judge", judge_name, *where])


def read_report(number: int = 0) -> dict:
    return json.loads(sorted(Path("results/judges").glob("*/validation.json"))[number].read_text())


def start(server: Server, answer) -> Server:
    server.answer, server.requests = answer, []
    return server


def test_a_judge_as_good_as_the_votes(place, server, capsys):
    assert validate(start(server, good)) == 0
    report = read_report()
    assert len(server.paid(PROBE)) == 2 * N_PAIRS
    assert (report["n_pairs"], report["n_judged"], report["n_votes"]) == (24, 24, 48)
    # 16 pairs with two votes like the verdict, 8 with a tie by the judge and by one of two.
    assert report["agreement"]["estimate"] == pytest.approx((16 * 2 + 8) / 48)
    assert report["agreement_no_ties"]["estimate"] == 1.0
    assert report["flips"]["estimate"] == 0.0 and report["no_verdict"] == {}
    assert report["ceiling"]["humans"]["estimate"] == pytest.approx(32 / 48)
    assert report["own_family"]["models"] == ["gpt-4"]
    assert report["judge_id"] and report["grading"] == "pair" and report["prompts"] == "own"
    # Every question has the same difference, so nothing measures its error.
    assert report["as_humans"] == "not measured"
    assert "alike in all questions" in report["as_humans_because"]
    out = capsys.readouterr().out
    assert "agreement with votes" in out and out.rstrip().endswith(
        validation_report.sentence(report)
    )
    # Nothing is asked again, and no run's folder has appeared.
    assert validate(start(server, good)) == 0 and server.requests == []
    assert [path.name for path in Path("results").iterdir() if path.is_dir()] == ["judges"]


def test_a_judge_that_always_chooses_the_first_answer(place, server, capsys):
    assert validate(start(server, lambda body: completion("[[A]]")), "--pairs", "10") == 0
    report = read_report()
    assert len(server.paid(PROBE)) == 20 and report["n_pairs"] == 10
    assert report["ties"]["judge"]["estimate"] == 1.0
    assert (report["flips"]["estimate"], report["flips"]["to_first"]["estimate"]) == (1.0, 1.0)
    assert report["as_humans"] == "no"
    assert any("100% of its verdicts change" in warning for warning in report["warnings"])
    assert "WARNING: no pair was decided" in capsys.readouterr().out
    # A larger sample holds the smaller one: the rest alone is asked.
    assert validate(start(server, lambda body: completion("[[A]]")), "--pairs", "15") == 0
    assert len(server.paid(PROBE)) == 10 and read_report()["n_pairs"] == 15
    # A smaller one is read from the store, and does not take its place.
    assert validate(start(server, good), "--pairs", "5") == 0
    assert server.requests == [] and read_report()["n_pairs"] == 15
    assert "has verdicts on 15 pairs" in capsys.readouterr().out


def test_ratings_become_verdicts_and_are_shared_with_mt_bench(place, server):
    def rate(body):
        worth = QUALITY.findall(body["messages"][-1]["content"]) or ["1"]
        return completion(f"[[{worth[-1]}]]")

    # 1) A run with gpt-4's answers was judged on MT-Bench before.
    answers = {q: ["gpt-4 worth 3"] * 2 for q in QUESTIONS}
    write_answers(place / "results/run/mt_bench/answers.jsonl", answers)
    (place / "results/run/args.json").write_text("{}")
    start(server, rate)
    assert judge.main(["results", "--judge", "gpt-9-70b", "--base_url", server.url]) == 0
    before = (place / "results/run/mt_bench/judgements.csv").read_bytes()
    # 2) Only the other two models are asked about, and the run's table stays as it is.
    start(server, rate)
    assert validate(server, "--grading", "single") == 0
    assert len(server.paid(PROBE)) == 2 * 2 * len(QUESTIONS)
    report = read_report()
    assert report["agreement"]["estimate"] == pytest.approx(40 / 48)
    assert report["flips"]["estimate"] is None and report["grading"] == "single"
    assert report["ties"]["judge"]["estimate"] == pytest.approx(1 / 3)
    judge.main(["results", "--judge", "gpt-9-70b", "--base_url", server.url])
    assert (place / "results/run/mt_bench/judgements.csv").read_bytes() == before


def test_a_cap_stops_it_and_the_rest_is_asked_later(place, server, capsys):
    more = ("--pairs", "8", "--concurrency", "1", "--price_in", "1000", "--price_out", "2000")
    # A call costs 0.017 dollars, and is made only if the 4.2 that it could cost are left.
    capped = ("--max_usd", "4.4", "--max_retries", "0", *more)
    start(server, good)
    with pytest.raises(UserError, match="could pass the cap"):
        validate(server, *capped)
    paid = len(server.paid(PROBE))
    report = read_report()
    assert 0 < paid < 16
    assert report["no_verdict"] == {"not judged": 8 - report["n_judged"]}
    assert report["n_judged"] == paid // 2
    # What is judged is the beginning of the sample, and so a sample too.
    assert not any("have no verdict" in warning for warning in report["warnings"])
    start(server, good)
    assert validate(server, *more) == 0
    assert len(server.paid(PROBE)) == 16 - paid
    assert read_report()["no_verdict"] == {}


def test_a_batch_file_is_written_and_its_results_are_read(place, server, capsys):
    more = ("--pairs", "6", "--parameters", '{"temperature": 0, "max_tokens": 9}')
    assert validate(start(server, good), *more, "--dry_run", "--requests", "batch.jsonl") == 0
    lines = [json.loads(line) for line in Path("batch.jsonl").read_text().splitlines()]
    assert len(lines) == 12 and server.requests == []
    results = []
    for line in lines:
        status, body = good(line["body"])
        response = {"status_code": status, "body": body}
        results.append({"custom_id": line["custom_id"], "response": response})
    write_lines(Path("output.jsonl"), results)
    assert validate(server, *more, "--import_results", "output.jsonl") == 0
    assert read_report()["n_judged"] == 6 and server.requests == []


def test_repeats_and_failures_are_reported(place, server, capsys):
    seen: dict[str, int] = {}

    def moody(body):
        """Undecided the second time, and never with an answer to question 84."""
        text = body["messages"][-1]["content"]
        if "Ask 84" in text:
            return completion("I cannot say.")
        seen[text] = seen.get(text, 0) + 1
        return good(body) if seen[text] == 1 else completion("[[C]]")

    assert validate(start(server, moody), "--repeats", "2") == 1
    report = read_report()
    assert report["no_verdict"] == {"parse": 6} and report["n_judged"] == N_PAIRS - 6
    # Of 18 pairs with two verdicts, the 6 that were a tie before are one again.
    assert report["retest"]["estimate"] == pytest.approx(1 / 3) and report["retest"]["n"] == 18
    assert report["agreement"]["estimate"] == pytest.approx(40 / 48)  # of the first verdicts
    assert any(
        "25% of the judged pairs have no verdict" in warning for warning in report["warnings"]
    )
    assert "without a verdict: 6 parse, of 24 pairs" in capsys.readouterr().out


def test_a_reward_model_is_validated_by_its_scores(place, monkeypatch):
    def open_judge(args, db, bench):
        def score(messages):
            answer = messages[-1]["content"]
            return 100.0 * int(QUALITY.search(answer)[1]) + len(answer)

        return judges.score_judge(args.judge, 0.6, {"method": "length"}, score)

    monkeypatch.setattr(judge, "open_judge", open_judge)
    assert validate(None, judge_name="rm:models/Skywork-8B") == 0
    report = read_report()
    assert report["grading"] == "reward" and report["flips"]["estimate"] is None
    # claude-v1 beats gpt-4 by its length, as one of two votes says; the others as the votes do.
    assert report["ties"]["judge"]["estimate"] == 0.0
    assert report["agreement"]["estimate"] == pytest.approx((32 + 8) / 48)


def test_llmbar(place, server, capsys):
    for i, subset in enumerate(human_votes.LLMBAR_SUBSETS):
        row = {"output_1": "worth 3", "output_2": "worth 1", "label": 1 + (i == 4)}
        rows = [row | {"input": f"{subset} {n}."} for n in range(4)]
        (place / "data/llmbar").mkdir(exist_ok=True)
        (place / f"data/llmbar/{subset}.json").write_text(json.dumps(rows))
    assert validate(start(server, good), "llmbar") == 0
    report = read_report()
    assert len(server.paid(PROBE)) == 40
    assert report["accuracy"]["estimate"] == report["right_both"]["estimate"] == 0.8
    assert report["by_category"]["Natural"]["accuracy"]["estimate"] == 1.0
    assert report["by_category"]["Adversarial_Manual"]["accuracy"]["estimate"] == 0.0
    assert report["as_humans"] == "not measured"
    assert "names the right answer in 0.80 [" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("row", "fact"),
    [
        ({"label": 3}, "'label' must be 1 or 2, not 3"),
        ({"label": True}, "'label' must be 1 or 2, not True"),
        ({"output_1": None}, "'output_1' must be text"),
    ],
)
def test_a_pair_of_llmbar_that_cannot_be_used_is_named(tmp_path, row, fact):
    good = {"input": "Do.", "output_1": "x", "output_2": "y", "label": 1}
    for subset in human_votes.LLMBAR_SUBSETS:
        (tmp_path / f"{subset}.json").write_text(json.dumps([good, good | row]))
    with pytest.raises(UserError, match="Natural.json: entry 2: ") as raised:
        human_votes.read_llmbar(tmp_path)
    assert fact in str(raised.value)


@pytest.mark.parametrize(
    ("more", "fact"),
    [
        (["--validate", "results"], "--validate results: must be mt_bench_human or llmbar"),
        (["results", "--validate", "--pairs", "0"], "--pairs 0: must be at least 1"),
        (["results", "--pairs", "4"], "only with --validate"),
        (["results", "--validate", "--baseline", "dpo"], "without --bench, --baseline, --runs"),
        (["results/run", "--validate"], "give one results folder"),
        (["results", "--validate", "llmbar"], "llmbar/Natural.json: no such file; run python prep"),
        (["results", "--validate", "--bench_data", "x"], "x/human.jsonl: no such file"),
        (["results", "--validate", "--mt_bench", "x"], "--mt_bench x: no such folder"),
    ],
)
def test_what_cannot_be_validated_is_refused_before_it_costs(place, server, more, fact):
    (place / "results/run").mkdir(parents=True)
    (place / "results/run/args.json").write_text("{}")
    start(server, good)
    with pytest.raises(UserError) as raised:
        judge.main([*more, "--judge", "gpt-9-70b", "--base_url", server.url])
    assert fact in str(raised.value) and server.requests == []


# ---- the verdict ---------------------------------------------------------------------------------


def ceiling(low: float | None, high: float | None) -> dict:
    rate = {"estimate": 0.6}
    middle = None if low is None else (low + high) / 2
    difference = {"estimate": middle, "low": low, "high": high, "n_questions": 1}
    return {"ceiling": {"judge": rate, "humans": rate, "difference": difference}}


@pytest.mark.parametrize(
    ("low", "high", "missing", "verdict"),
    [
        (-0.03, 0.02, 0.0, "yes"),
        (-0.04, -0.01, 0.0, "yes"),  # less often, but by less than the margin
        (0.06, 0.12, 0.0, "yes"),  # more often
        (-0.30, -0.20, 0.0, "no"),
        (-0.08, -0.01, 0.0, "no"),  # less often, and perhaps by more than the margin
        (-0.09, 0.04, 0.0, "not measured"),  # too few pairs
        (None, None, 0.0, "not measured"),
        (-0.03, 0.02, 0.2, "not measured"),  # the pairs left may be the easy ones
        (-0.30, -0.20, 0.2, "no"),
    ],
)
def test_as_often_as_humans(low, high, missing, verdict):
    assert validation_report.as_humans(ceiling(low, high), missing)[0] == verdict


def test_judges_do_not_share_a_folder(tmp_path):
    names = ["hf:/models/Qwen-7B", "rm:other/Qwen-7B", "Qwen-7B", "...", "x" * 300]
    paths = [
        validation.report_path(
            tmp_path, {"judge": name, "judge_id": str(i), "data": "llmbar", "grading": "pair"}
        )
        for i, name in enumerate(names)
    ]
    assert len(set(paths)) == len(names)
    assert all(path.parent.parent == tmp_path / "judges" for path in paths)
    assert all(len(path.parent.name) < 80 and path.parent.name[0] != "." for path in paths)


# ---- the whole command on the real votes ---------------------------------------------------------


@pytest.mark.skipif("MT_BENCH_HUMAN" not in os.environ, reason="set MT_BENCH_HUMAN=DIR")
def test_gpt4s_published_verdicts_through_the_whole_command(place, monkeypatch):
    """As replies in a batch file: each verdict in both orders, those that flip for what is shown
    first.
    """
    monkeypatch.undo()
    monkeypatch.chdir(place)
    folder = Path(os.environ["MT_BENCH_HUMAN"]).resolve()
    categories = [category for category in mt_bench.CATEGORIES for _ in range(10)]
    write_bench(place / "data/mt_bench", dict(enumerate(categories, 81)))
    questions = [
        json.loads(line)
        for line in (place / "data/mt_bench/question.jsonl").read_text().splitlines()
    ]
    known = human_votes.read_votes(folder, questions)
    more = ("--bench_data", str(folder), "--parameters", '{"temperature": 0, "max_tokens": 9}')
    validate(None, *more, "--dry_run", "--requests", "batch.jsonl", judge_name="gpt-4")
    lines = [json.loads(line) for line in Path("batch.jsonl").read_text().splitlines()]
    # Some models gave the same answer: then one request serves several pairs, with one verdict.
    needs = {}
    for pair, order in itertools.product(human_votes.in_sample_order(known), "12"):
        shown = [known.answers[model][pair.question_id][: pair.turn] for model in pair[2:]]
        texts = shown if order == "1" else shown[::-1]
        needs.setdefault((pair.question_id, pair.turn, str(texts)), (pair, order))
    results = []
    for line, (pair, order) in zip(lines, needs.values(), strict=True):
        verdict = known.published[pair]
        if order == "2":
            verdict = human_votes.MIRRORED[verdict]
        letter = "A" if pair in known.inconsistent else {"a": "A", "b": "B", "tie": "C"}[verdict]
        response = {"status_code": 200, "body": completion(f"[[{letter}]]")[1]}
        results.append({"custom_id": line["custom_id"], "response": response})
    write_lines(Path("output.jsonl"), results)
    assert validate(None, *more, "--import_results", "output.jsonl", judge_name="gpt-4") == 0
    report = read_report()
    assert (report["n_pairs"], report["n_votes"], report["n_repeated_votes"]) == (1814, 3355, 1)
    assert report["as_humans"] == "yes" and report["warnings"] == []
    assert report["ceiling"]["difference"]["p_equivalent"] < 0.01
    assert report["flips"]["to_first"]["estimate"] == 1.0
    assert report["own_family"]["models"] == ["gpt-3.5-turbo", "gpt-4"]
    published = report["gpt4_2023"]
    assert published["agreement"]["estimate"] == pytest.approx(0.6617, abs=5e-5)
    assert published["flips"]["estimate"] == pytest.approx(290 / 1814)
    for name in ("agreement", "agreement_no_ties", "kappa", "kappa_no_ties", "flips"):
        value = published[name]["estimate"]
        assert report[name]["estimate"] == pytest.approx(value, abs=0.02)
        assert report[name]["n"] == pytest.approx(published[name]["n"], abs=30)
