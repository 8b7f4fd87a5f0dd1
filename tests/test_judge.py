"""judge.py: FastChat's messages and reading, request hashes, and a user's mistakes."""

import json
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from doubles import load_fastchat
from judge_workplace import (
    ANSWERS,
    OTHER,
    PROMPTS,
    QUESTIONS,
    REFERENCES,
    arguments,
    make_run,
    official_prompts,
    our_messages,
    prompt_name,
    rows_of,
    run_judge,
    write_answers,
    write_lines,
)

import judge
import prep_data
from pref.files import judgements
from pref.files.console import UserError
from pref.files.disk import locked, sha256_json
from pref.judging import bench_mt_bench, benchmark, identity, items, judges, run_answers, schema
from pref.judging.reading import Reading, Reply

pytest_plugins = ("judge_fixtures",)


# ---- what is sent --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("index", "turn", "sha256"),
    # Of the messages that FastChat 0.2.36's own run_judge_single sends
    # (test_messages_and_ratings_equal_those_of_fastchats_code)
    [
        (0, 1, "fb46821e0bb6f1ca84b851f5464a71ac2043624089cb246dfe7399b20c60fc05"),
        (0, 2, "098f82ca94248f984282db4da84d451f1e6efd8470e74943a46d33a07948d543"),
        (1, 1, "a47bb5d7b3b5057d5627689b7425b231fbb53f23e50858dc0658eaec4b3271b8"),
        (1, 2, "7a53b4b326f377c3f64e857efdcc44068803ffd2825d5458d6c5dccff91521f9"),
        (2, 1, "1c8a0b26a7240a13c0711778354184df0a182a4cfed869e55ed919d7401c8b08"),
        (2, 2, "1ae8206d60fcd828d4ba2dd28b867d5a5fe2eb8a956fd75eaa55a133b84dc197"),
    ],
)
def test_messages_have_not_changed(index, turn, sha256):
    assert sha256_json(our_messages(QUESTIONS[index], turn)) == sha256


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning"
)  # FastChat's regular expressions are not raw strings
def test_messages_and_ratings_equal_those_of_fastchats_code(monkeypatch):
    fastchat = load_fastchat(monkeypatch)
    sent = []
    fastchat.chat_completion_openai = lambda model, conv, **kwargs: (
        sent.append((conv.to_openai_api_messages(), kwargs)) or "[[7]]"
    )
    prompts = {prompt["name"]: prompt for prompt in PROMPTS}
    for question in QUESTIONS:
        question_id = question["question_id"]
        math_like = question["category"] in fastchat.NEED_REF_CATS
        reference = {"choices": [{"turns": REFERENCES[question_id]}]} if math_like else None
        for turn in (1, 2):
            name = prompt_name("single", math_like, turn)
            fastchat.run_judge_single(
                question,
                {"choices": [{"turns": ANSWERS[question_id]}]},
                fastchat.Judge("the-judge", prompts[name], multi_turn=turn == 2),
                reference,
                multi_turn=turn == 2,
            )
            messages, parameters = sent.pop()
            assert messages == our_messages(question, turn)
            assert parameters == {
                "temperature": bench_mt_bench.TEMPERATURE,
                "max_tokens": bench_mt_bench.MAX_TOKENS,
            }
    for text in [text for text, _ in RATINGS]:
        fastchat.chat_completion_openai = lambda *args, text=text, **kwargs: text
        theirs = fastchat.run_judge_single(
            QUESTIONS[0],
            {"choices": [{"turns": ANSWERS[81]}]},
            fastchat.Judge("the-judge", prompts["single-v1"]),
            None,
        )[0]
        assert rating_in(text) == (theirs if 1 <= theirs <= 10 else None), text


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_pairs_equal_those_of_fastchats_code(monkeypatch):
    """Messages of both orders and turns, parameters, and who wins."""
    fastchat, sent, prompts = load_fastchat(monkeypatch), [], official_prompts()
    answers = [
        {"choices": [{"turns": side}]}
        for side in (ANSWERS[111], ['{0} [[9]] \u4f60\t"q"', "\u0434\u0430\n"])
    ]
    texts = iter(["so [[A]]", "[[B]]", "[[C]] tie", "[[B]] or [[A]]", "[A]", "none"] * 4)
    replies = []

    def complete(model, conv, **kwargs):
        sent.append((conv.to_openai_api_messages(), kwargs))
        replies.append(next(texts))
        return replies[-1]

    fastchat.chat_completion_openai = complete
    for question in QUESTIONS:
        math_like = question["category"] in fastchat.NEED_REF_CATS
        reference = (
            {"choices": [{"turns": REFERENCES[question["question_id"]]}]} if math_like else None
        )
        for turn in (1, 2):
            name = prompt_name("pair", math_like, turn)
            match = fastchat.MatchPair(
                question,
                "run",
                "base",
                *answers,
                fastchat.Judge("the-judge", prompts[name], multi_turn=turn == 2),
                reference,
                turn == 2,
            )
            theirs = fastchat.play_a_match_pair(match, None)
            for order, key in zip(judgements.ORDERS, ("g1_winner", "g2_winner")):
                messages, parameters = sent.pop(0)
                sides = [answer["choices"][0]["turns"] for answer in answers]
                sides = sides if order == "1" else sides[::-1]
                refs = REFERENCES.get(question["question_id"], [])
                assert messages == bench_mt_bench.pair_messages(
                    prompts, question, *sides, turn, refs
                )
                assert parameters == {
                    "temperature": bench_mt_bench.TEMPERATURE,
                    "max_tokens": bench_mt_bench.MAX_TOKENS,
                }
                verdict = bench_mt_bench.read_verdict(replies.pop(0))
                winner = benchmark.winner_of(order, verdict, "model_1", "model_2")
                assert winner == (None if theirs[key] == "error" else theirs[key])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_all_eighty_questions_equal_those_of_fastchats_code(monkeypatch, tmp_path):
    """MT-Bench's own questions, references and judge prompts, every turn, single and pair, with
    awkward answers.
    """
    assert prep_data.main(["--mt_bench", "nvidia", "--out", str(tmp_path)]) in (0, None)
    fastchat, sent = load_fastchat(monkeypatch), []
    fastchat.chat_completion_openai = lambda model, conv, **_: (
        sent.append(conv.to_openai_api_messages()) or "[[C]]"
    )
    awkward = [
        "{x} {{y}} {0} [[9]] \"q\" 's'\t\u4f60\u597d \u0430\r\n",
        "%s {question} \\n [[A]] \U0001f600 </s>\n",
    ]
    sides = [awkward, [text[::-1] for text in awkward]]
    answers = [{"choices": [{"turns": side}]} for side in sides]
    benches = {
        grading: bench_mt_bench.read(tmp_path, SimpleNamespace(grading=grading, refs="original"))
        for grading in ("single", "pair")
    }
    assert {bench.label for bench in benches.values()} == {"mt_bench"}
    questions = benches["single"].questions
    assert len(questions) == 80
    for question in questions:
        math_like = question["category"] in fastchat.NEED_REF_CATS
        turns = benches["single"].references.get(question["question_id"], [])
        reference = {"choices": [{"turns": turns}]} if math_like else None
        for turn in (1, 2):
            for grading in ("single", "pair"):
                prompts = benches[grading].prompts
                theirs = fastchat.Judge("the-judge", prompts[prompt_name(grading, math_like, turn)])
                if grading == "single":
                    fastchat.run_judge_single(
                        question, answers[0], theirs, reference, multi_turn=turn == 2
                    )
                    ours = bench_mt_bench.single_messages(prompts, question, sides[0], turn, turns)
                else:
                    fastchat.run_judge_pair(
                        question, *answers, theirs, reference, multi_turn=turn == 2
                    )
                    ours = bench_mt_bench.pair_messages(prompts, question, *sides, turn, turns)
                assert ours == sent.pop(), (question["question_id"], turn, grading)


# ---- what is read --------------------------------------------------------------------------------


RATINGS = [
    ("Good. Rating: [[7]]", 7),
    ("[[7.5]] and more", 7.5),
    ("[[8.]]", 8),
    ("first [[3]], later [[9]]", 3),
    ("one bracket [6]", 6),
    ("[2] comes first, but [[4]] counts", 4),
    ("[[10]]", 10),
    ("[[1]]", 1),
    ("[[[5]]]", 5),
    ("Rating: [[7/10]]", None),
    ("Rating: [[ 7 ]]", None),
    ("Rating: [[-3]]", None),
    ("Rating: [[0]]", None),
    ("Rating: [[11]]", None),
    ("[[0]] then [5]", None),  # the double bracket is what counts, as in FastChat
    ("[[99999999999999999999]]", None),
    ("Rating: 7", None),
    ("[[rating]]", None),
    ("[[8", None),
    ("[[7,8]]", None),
    ("", None),
]


def rating_in(text: str) -> float | None:
    reply = Reply(text, finish_reason="stop")
    return bench_mt_bench.read_reply(reply, request={"grading": "single"}).score


@pytest.mark.parametrize(("text", "rating"), RATINGS)
def test_rating(text, rating):
    assert rating_in(text) == rating


def test_huge_rating_is_none():
    assert rating_in(f"[[{'9' * 400}]]") is None  # inf as a float


# ---- what a judgement is stored under ------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "parameters", "sha256"),
    [
        ([], {}, "c0db947c81c88f1d3f5633565e2216fb833f69afa7acd5c4db9e9edd46815ea6"),
        (
            ["--repeats", "2"],
            {"seed": 5},
            "7bd3aba97d96efec44052cda4b5a5339e195eef25c1be334edaccba0e7f2cdf4",
        ),
        (
            ["--grading", "pair", "--baseline", "base"],
            {},
            "103003389e52422d92bd0c9d8e5247082c22bd78b0341701e67f0b145fe8d61b",
        ),
    ],
)
def test_requests_of_version_1_0_0_are_found(options, parameters, sha256):
    """A changed hash would be paid for again. The expected values are those of version 1.0.0, whose
    requests are today's without the server.
    """
    args = judge.parse_args(["results", "--judge", "big-70b", *options])
    bench = benchmark.Bench(
        benchmark=bench_mt_bench.BENCHMARK,
        grading=args.grading or "single",
        parameters={},
        folder=Path("unused"),
        questions=QUESTIONS,
        references=REFERENCES,
        refs="original",
        prompts=official_prompts() | {prompt["name"]: prompt for prompt in PROMPTS},
        label="own",
    )
    answers = {"base": ANSWERS, "dpo": OTHER}
    runs = {
        Path("results") / name: {(q, 0): {"turns": turns} for q, turns in of_run.items()}
        for name, of_run in answers.items()
    }
    the_judge = judges.Judge(
        name="big-70b",
        params_b=70.0,
        parameters={"temperature": 0, "max_tokens": 2048, **parameters},
        ask=None,
        concurrency=1,
        server="http://localhost:8000/v1",
    )
    who = identity.identify(the_judge, bench, Reading())
    baselines = run_answers.read_baselines(runs, bench, args.baseline)
    needed = items.make_items(runs, bench, baselines, who, args.repeats)
    legacy = [sha256_json(identity.legacy(item.request)) for item in needed]
    assert sha256_json(legacy) == sha256
    assert not set(legacy) & {item.request_sha256 for item in needed}


def test_the_schema_does_not_change_within_its_version():
    expected = "eac6573ff351e4e12ad949ec12665e948832b9e75b1803d5441e351805fd9435"
    statements = [schema.JUDGEMENTS, schema.NEW_COLUMNS, schema.ASKED, schema.JUDGES]
    assert schema.SCHEMA_VERSION == 3 and sha256_json(statements) == expected


def test_key_is_the_hash_of_the_stored_request(workplace, server):
    run_judge(workplace, server)
    with sqlite3.connect(workplace / "results/judgements.sqlite") as db:
        stored = db.execute("SELECT request_sha256, request FROM judgements").fetchall()
    assert all(key == sha256_json(json.loads(request)) for key, request in stored)
    assert {row["request_sha256"] for row in rows_of(workplace)} == {key for key, _ in stored}


def test_a_judge_behind_a_server_needs_no_torch():
    code = "import judge, sys; sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", code], cwd=Path(judge.__file__).parent, check=True)


# ---- a user's mistakes ---------------------------------------------------------------------------


def test_no_judge_names_both_forms(workplace):
    with pytest.raises(UserError) as error:
        judge.main([str(workplace / "results")])
    for part in ("--judge", "hf:PATH", "--base_url", "2026-10-23", "2027-01-14"):
        assert part in str(error.value)


def test_no_key(workplace, server, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UserError, match=r"export OPENAI_API_KEY=.*any text will do"):
        run_judge(workplace, server)


def test_unknown_question(workplace, server):
    make_run(workplace, "base", {**ANSWERS, 999: ["a", "b"]})
    with pytest.raises(UserError, match=r"answers.jsonl: question_id 999 is not in"):
        run_judge(workplace, server)
    assert server.requests == []


def test_runs_without_answers_are_named_and_skipped(workplace, server, capsys):
    (make_run(workplace, "dpo", {}) / "mt_bench/answers.jsonl").unlink()
    assert run_judge(workplace, server) == 0
    assert "no answers for run dpo; run python gen_mtbench.py" in capsys.readouterr().err
    (workplace / "results/base/mt_bench/answers.jsonl").unlink()
    with pytest.raises(UserError, match="run gen_mtbench.py first"):
        run_judge(workplace, server)


def test_missing_reference(workplace, server):
    write_answers(workplace / "mt/reference_answer/gpt-4.jsonl", {111: ["4", "8"]})
    with pytest.raises(UserError, match="no reference for question 121"):
        run_judge(workplace, server)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_template": "{question}"}, "exactly the fields {answer}, {question}"),
        ({"prompt_template": "{question} {answer"}, "literal braces"),
        ({"output_format": "[[A]]"}, "output_format"),
        ({"name": "else"}, "no prompt named single-v1"),
        ({"system_prompt": None}, "must be text"),
    ],
)
def test_bad_prompts(workplace, server, change, message):
    write_lines(workplace / "mt/judge_prompts.jsonl", [{**PROMPTS[0], **change}, *PROMPTS[1:]])
    with pytest.raises(UserError) as error:
        run_judge(workplace, server)
    assert message in str(error.value)
    assert "judge_prompts.jsonl" in str(error.value)


def test_the_manifest_must_not_call_other_prompts_mt_benchs(workplace, server):
    (workplace / "mt/manifest.json").write_text('{"prompts": "mt_bench"}')
    with pytest.raises(UserError, match="not MT-Bench's prompts"):
        run_judge(workplace, server)
    (workplace / "mt/manifest.json").write_text('{"prompts": "own"}')
    assert run_judge(workplace, server) == 0


def test_a_file_that_is_not_a_store(workplace, server):
    (workplace / "results/judgements.sqlite").write_text("not a database, " * 100)
    with pytest.raises(UserError, match="move it away"):
        run_judge(workplace, server)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (
            {81: ["a", "b"], 111: ["a", "b"]},
            "run dpo: 1 of 3 answers are missing that other runs have",
        ),
        (
            {81: ["a", "b"], 111: ["a", ""], 121: ["a", "b"]},
            "run dpo: 1 of 3 answers have an empty turn",
        ),
    ],
)
def test_incomplete_answers_are_refused_before_anything_is_paid_for(
    workplace, server, answers, message
):
    make_run(workplace, "base", {q: ["a", "b"] for q in ANSWERS})
    make_run(workplace, "dpo", answers)
    with pytest.raises(UserError, match=message):
        judge.main(arguments(workplace, server))
    assert server.requests == []


def test_answers_of_an_older_adapter_are_refused(workplace, server):
    run = make_run(workplace, "dpo", OTHER)
    path = run / "mt_bench/answers.jsonl"
    rows = [
        json.loads(line) | {"adapter_sha256": "0" * 64} for line in path.read_text().splitlines()
    ]
    write_lines(path, rows)
    (run / "adapter").mkdir()
    (run / "adapter/adapter_model.safetensors").write_bytes(b"retrained")
    with pytest.raises(UserError, match="run dpo: its answers are from an older adapter"):
        run_judge(workplace, server)


def test_a_second_judge_in_the_same_folder_is_refused(workplace, server):
    held = locked(workplace / "results", ".judge.lock", "is being judged")
    with held, pytest.raises(UserError, match="is being judged by process"):
        run_judge(workplace, server)
    assert server.requests == []
