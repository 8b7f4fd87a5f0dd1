"""Who judged: identity in the request, the store and the CSV; stores of version 1.0.0; what is
reused rather than paid for again.
"""

import json
import sqlite3
import time
from collections import Counter

import pytest
from doubles import completion, load_fastchat
from judge_workplace import (
    ANSWERS,
    KEY,
    OTHER,
    PROMPTS,
    QUESTIONS,
    REFERENCES,
    make_run,
    official_prompts,
    prompt_name,
    rows_of,
    run_judge,
    write_lines,
)

from pref.files import mt_bench
from pref.files.console import UserError
from pref.files.disk import sha256_json
from pref.files.judgements import JUDGEMENT_COLUMNS, NEW_COLUMNS, read_judgements
from pref.judging import bench_mt_bench, identity, judgements_csv, schema, server_judge, store
from pref.judging.identity import Identity
from pref.judging.reading import Reading

pytest_plugins = ("judge_fixtures",)

# The tables as version 1.0.0 created them.
SCHEMA_1 = """
CREATE TABLE judgements (
    request_sha256 TEXT PRIMARY KEY, judge TEXT NOT NULL, judge_params_b REAL,
    request TEXT NOT NULL, status TEXT NOT NULL, score REAL, winner TEXT, judgement TEXT,
    served_model TEXT, system_fingerprint TEXT, prompt_tokens INTEGER, completion_tokens INTEGER,
    cost_usd REAL, tries INTEGER NOT NULL, tstamp REAL NOT NULL);
CREATE TABLE asked (
    model_id TEXT, question_id INTEGER, turn INTEGER, choice INTEGER, category TEXT, grading TEXT,
    "order" TEXT, baseline TEXT, judge TEXT, prompts TEXT, repeat INTEGER, refs TEXT,
    answer_sha256 TEXT, request_sha256 TEXT,
    PRIMARY KEY (model_id, question_id, turn, choice, grading, "order", baseline, judge, prompts,
    repeat, refs));
PRAGMA user_version = 1;
"""
PARAMETERS = {"temperature": 0, "max_tokens": 2048}


def old_requests(parameters=PARAMETERS) -> list[dict]:
    """The requests of version 1.0.0 for the workplace's run `base`, in order of question, turn."""
    prompts = {prompt["name"]: prompt for prompt in PROMPTS}
    requests = []
    for question in QUESTIONS:
        for turn in (1, 2):
            number = question["question_id"]
            messages = bench_mt_bench.single_messages(
                prompts, question, ANSWERS[number], turn, REFERENCES.get(number, [])
            )
            requests.append(
                {"judge": "big-70b", "messages": messages, "parameters": parameters, "repeat": 0}
            )
    return requests


def write_old_store(folder, requests, **columns):
    """A store of version 1.0.0 in which `requests` were judged; columns: of every judgement."""
    row = {"judge": "big-70b", "judge_params_b": 70.0, "status": "ok", "score": 4.0}
    row |= {"judgement": "[[4]]", "prompt_tokens": 90, "completion_tokens": 30, "cost_usd": 0.01}
    row |= {"tries": 1, "tstamp": time.time(), **columns}
    with sqlite3.connect(folder / "results/judgements.sqlite") as db:
        db.executescript(SCHEMA_1)
        units = [(q["question_id"], turn, q["category"]) for q in QUESTIONS for turn in (1, 2)]
        for request, (number, turn, category) in zip(requests, units):
            key = sha256_json(request)
            values = row | {"request_sha256": key, "request": json.dumps(request)}
            names = ", ".join(values)
            marks = ", ".join("?" * len(values))
            db.execute(f"INSERT INTO judgements ({names}) VALUES ({marks})", [*values.values()])
            answer = mt_bench.answer_sha256(turn, ANSWERS[number])
            asked = ("base", number, turn, 0, category, "single", "", "", "big-70b", "own", 0)
            values = (*asked, "original", answer, key)
            db.execute(f"INSERT INTO asked VALUES ({', '.join('?' * 14)})", values)
    db.close()


def paid(server) -> int:
    return len(server.paid(server_judge.PROBE))


# ---- identity ------------------------------------------------------------------------------------

A_JUDGE = Identity(
    judge="big-70b",
    parameters=PARAMETERS,
    server="http://a/v1",
    prompts="p",
    references="r",
    reading=Reading(),
)


@pytest.mark.parametrize(
    "change",
    [
        {"judge": "other"},
        {"parameters": {"temperature": 1, "max_tokens": 2048}},
        {"parameters": {"temperature": 0, "max_tokens": 4096}},
        {"server": "http://b/v1"},
        {"prompts": "q"},
        {"references": "s"},
        {"reading": Reading(verdict="last")},
        {"reading": Reading(min_rating_mass=0.0)},
    ],
)
def test_every_part_of_an_identity_makes_another_judge(change):
    other = Identity(**(vars(A_JUDGE) | change))
    assert len(A_JUDGE.id) == 16 and other.id != A_JUDGE.id


def test_the_hash_of_an_identity_does_not_change():
    """The analysis of old files would fall apart into two judges."""
    assert A_JUDGE.id == "24a588755d0bb532"


def test_an_address_holds_nothing_secret(monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    assert identity.server_address(None) == "https://api.openai.com/v1"
    assert identity.server_address("http://h/v1/chat/completions") == "http://h/v1"
    assert identity.server_address("https://me:pw@h.example/v1/?key=k#x") == "https://h.example/v1"
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:8000/v1/")
    assert identity.server_address(None) == "http://localhost:8000/v1"


def test_judges_of_one_name_are_kept_apart(workplace, server):
    """Another temperature, or another server, is another judge; the CSV says which is which."""
    assert run_judge(workplace, server) == 0
    server.answer = lambda body: completion("[[3]]")
    hot = '{"temperature": 1, "max_tokens": 2048}'
    assert run_judge(workplace, server, "--parameters", hot) == 0
    assert run_judge(workplace, server, "--server_name", "node7") == 0
    assert paid(server) == 18
    rows = rows_of(workplace)
    seen = Counter(
        (row["judge_address"], json.loads(row["judge_settings"])["temperature"], row["score"])
        for row in rows
    )
    assert seen == {(server.url, 0, 7): 6, (server.url, 1, 3): 6, ("node7", 0, 3): 6}
    assert len({row["judge_id"] for row in rows}) == 3 and {row["judge"] for row in rows} == {
        "big-70b"
    }


def test_a_named_server_may_move(workplace, server, capsys):
    assert run_judge(workplace, server) == 0
    assert run_judge(workplace, server, "--server_name", "our_node", "--dry_run") == 0
    out = capsys.readouterr().out
    assert f"has verdicts at {server.url}" in out and f"--server_name {server.url}" in out
    assert run_judge(workplace, server, "--server_name", server.url) == 0  # reached elsewhere now
    assert paid(server) == 6 and len(rows_of(workplace)) == 6


def test_other_prompts_are_another_judge(workplace, server):
    """Judgements of a run that is not judged again stay with the prompts that made them."""
    make_run(workplace, "dpo", OTHER)
    assert run_judge(workplace, server) == 0
    edited = [row | {"prompt_template": row["prompt_template"] + "!"} for row in PROMPTS]
    write_lines(workplace / "mt/judge_prompts.jsonl", edited)
    assert run_judge(workplace, server) == 0
    ids = Counter(row["judge_id"] for row in rows_of(workplace, "dpo"))
    assert sorted(ids.values()) == [6, 6]


def test_a_csv_without_the_new_columns_is_read(workplace, server):
    run_judge(workplace, server)
    path = workplace / "results/base/mt_bench/judgements.csv"
    lines = path.read_text().splitlines()
    count = len(JUDGEMENT_COLUMNS) - len(NEW_COLUMNS)
    assert JUDGEMENT_COLUMNS[count:] == NEW_COLUMNS
    header = ",".join(lines[0].split(",")[:count])
    one = ",".join(f'"{value}"' for value in ["81", "1", "writing", "base", "0", "single"])
    path.write_text(f"{header}\n{one}{',' * (count - 6)}\n")
    (row,) = read_judgements(path)
    assert row["category"] == "writing" and all(row[column] is None for column in NEW_COLUMNS)


# ---- stores of version 1.0.0 ---------------------------------------------------------------------


def test_judgements_of_version_1_0_0_are_not_paid_for_again(workplace, server, capsys):
    write_old_store(workplace, old_requests())
    assert run_judge(workplace, server, "--dry_run") == 0
    assert "6 requests already made, 0 to make" in capsys.readouterr().out
    assert run_judge(workplace, server) == 0
    assert server.requests == []
    assert "6 judgements by big-70b were made by version 1.0.0" in capsys.readouterr().err
    rows = rows_of(workplace)
    assert [row["score"] for row in rows] == [4] * 6
    assert {row["judge_address"] for row in rows} == {server.url}
    assert [row["cost_usd"] for row in rows] == [0.01] * 6

    assert run_judge(workplace, server) == 0
    assert "version 1.0.0" not in capsys.readouterr().err, "said once"
    assert run_judge(workplace, server, "--server_name", "another") == 0
    assert paid(server) == 6, "they belong to the first address that asked"
    with sqlite3.connect(workplace / "results/judgements.sqlite") as db:
        stored = db.execute("SELECT request_sha256, request FROM judgements").fetchall()
    assert len(stored) == 12
    assert all(key == sha256_json(json.loads(request)) for key, request in stored)


def test_a_part_of_an_old_store_is_completed(workplace, server):
    write_old_store(workplace, old_requests()[:4])
    assert run_judge(workplace, server) == 0
    assert paid(server) == 2
    assert sorted(row["score"] for row in rows_of(workplace)) == [4, 4, 4, 4, 7, 7]
    assert len({row["judge_id"] for row in rows_of(workplace)}) == 1


def test_parameters_learned_by_version_1_0_0_are_remembered(workplace, server):
    write_old_store(workplace, old_requests({"max_completion_tokens": 2048}))
    assert run_judge(workplace, server) == 0
    assert server.requests == []


@pytest.mark.parametrize(
    ("old", "status", "score", "reading"),
    [
        ({"judgement": "<think>[[5]]</think>[[9]]", "score": 5.0}, "ok", 9, None),
        ({"judgement": "as in x[1]", "score": 1.0}, "ok", 1, "fallback"),
        ({"judgement": "x[1]", "score": 1.0, "completion_tokens": 2048}, "length", None, None),
        ({"judgement": "[[3]], no, [[4]]", "score": 3.0}, "ok", 3, "several"),
        ({"judgement": "[1] and [[ 4 ]]", "score": 1.0}, "parse", None, None),
        ({"judgement": "oops", "score": None, "status": "http_500"}, "http_500", None, None),
    ],
)  # fmt: skip
def test_old_texts_are_read_by_todays_rules(workplace, capsys, old, status, score, reading):
    write_old_store(workplace, old_requests()[:1], **old)
    db = store.open_store(workplace / "results/judgements.sqlite")
    found = db.execute("SELECT status, score, NULLIF(reading, '') FROM judgements").fetchone()
    kept = db.execute("SELECT judgement, cost_usd, tries FROM judgements").fetchone()
    db.close()
    assert found == (status, score, reading)
    assert kept == (old["judgement"], 0.01, 1)
    assert ("read differently" in capsys.readouterr().err) is (score != old["score"])


def test_an_old_local_score_without_mass_does_not_count(workplace):
    request = {"judge": "hf:x", "messages": [], "repeat": 0}
    request |= {"parameters": {"method": "expected_rating", "weights": "w"}}
    text = json.dumps(dict.fromkeys(range(1, 11), 5e-6))
    write_old_store(workplace, [request], judge="hf:x", judgement=text, score=5.05)
    with sqlite3.connect(workplace / "results/judgements.sqlite") as db:
        db.execute("UPDATE asked SET judge = 'hf:x'")
    db = store.open_store(workplace / "results/judgements.sqlite")
    judgements_csv.write_csvs(db, {workplace / "results/base": {(81, 0): {"turns": ANSWERS[81]}}})
    db.close()
    (row,) = rows_of(workplace)
    assert (row["status"], row["score"], row["judge_id"]) == ("mass", None, None)
    assert row["rating_mass"] == pytest.approx(5e-5)
    assert json.loads(row["judge_settings"])["method"] == "expected_rating"


def test_a_migration_that_fails_leaves_the_old_store(workplace, monkeypatch):
    write_old_store(workplace, old_requests())
    path = workplace / "results/judgements.sqlite"

    def fail(*_):
        raise sqlite3.OperationalError("disk is full")

    monkeypatch.setattr(schema, "read_again", fail)
    with pytest.raises(UserError, match="disk is full"):
        store.open_store(path)
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (1,)
        assert db.execute("SELECT COUNT(*) FROM asked").fetchone() == (6,)
    monkeypatch.undo()
    store.open_store(path).close()


def test_a_store_of_a_later_version_is_refused(workplace):
    path = workplace / "results/judgements.sqlite"
    with sqlite3.connect(path) as db:
        db.execute(f"PRAGMA user_version = {schema.SCHEMA_VERSION + 1}")
    with pytest.raises(UserError, match="written by another version"):
        store.open_store(path)


def test_status_reads_an_old_store_without_changing_it(workplace):
    write_old_store(workplace, old_requests()[:5], status="parse", score=None, judgement="?")
    counts = store.judgement_counts(workplace / "results", "big-70b")
    assert counts == {"base": store.Verdicts(asked=5, without=5)}
    assert store.schema_of(workplace / "results") == 1
    store.open_store(workplace / "results/judgements.sqlite").close()
    assert store.judgement_counts(workplace / "results", "big-70b") == counts


def test_status_counts_the_judge_that_was_asked_last(workplace, server):
    server.answer = lambda body: completion("none", "length")
    assert run_judge(workplace, server) == 1
    results = workplace / "results"
    assert store.judgement_counts(results, "big-70b")["base"] == store.Verdicts(6, without=6)
    server.answer = lambda body: completion("[[7]]")
    hot = '{"temperature": 1, "max_tokens": 2048}'
    assert run_judge(workplace, server, "--parameters", hot) == 0
    assert store.judgement_counts(results, "big-70b")["base"] == store.Verdicts(6, without=0)


# ---- reused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("old", [False, True])
def test_a_higher_limit_asks_only_what_was_cut_off(workplace, server, old):
    def answer(body):
        cut = "poem" in body["messages"][-1]["content"] and body["max_tokens"] < 1000
        return completion("so far", "length") if cut else completion("[[6]]")

    server.answer = answer
    if old:
        write_old_store(workplace, old_requests({"temperature": 0, "max_tokens": 100})[2:])
        with sqlite3.connect(workplace / "results/judgements.sqlite") as db:
            db.execute("DELETE FROM asked")
    else:
        assert run_judge(workplace, server, "--max_tokens", "100") == 1
        assert paid(server) == 6
    before = paid(server)
    assert run_judge(workplace, server, "--max_tokens", "2048") == 0
    assert paid(server) == before + 2
    assert [body["max_tokens"] for body in server.requests[-2:]] == [2048] * 2
    rows = rows_of(workplace)
    assert len(rows) == 6 and len({row["judge_id"] for row in rows}) == 1, "the old limit is gone"
    assert {json.loads(row["judge_settings"])["max_tokens"] for row in rows} == {2048}
    assert run_judge(workplace, server, "--max_tokens", "50") == 1, "a lower limit may cut off"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_judgements_of_fastchat_are_imported(pairs, server, monkeypatch, capsys):
    """FastChat's own code makes the files, for single grading and for pairs."""
    fastchat, prompts = load_fastchat(monkeypatch), official_prompts()
    fastchat.chat_completion_openai = lambda model, conv, **_: next(texts)
    runs = {"base": ANSWERS, "dpo": OTHER}
    single, pair = pairs / "single.jsonl", pairs / "pair.jsonl"
    odd = ["$ERROR$", "[2]", "<think>[[1]]</think>[[3]]"]
    texts = iter([f"[[{rating}]]" for rating in range(1, 10)] + odd)
    for question in QUESTIONS:
        number, math_like = question["question_id"], question["category"] in fastchat.NEED_REF_CATS
        reference = {"choices": [{"turns": REFERENCES[number]}]} if math_like else None
        for turn in (1, 2):
            for name, answers in runs.items():
                judge = fastchat.Judge(
                    "the-judge",
                    prompts[prompt_name("single", math_like, turn)],
                    ref_based=math_like,
                    multi_turn=turn == 2,
                )
                answer = {"choices": [{"turns": answers[number]}]}
                match = fastchat.MatchSingle(
                    question, name, answer, judge, reference, multi_turn=turn == 2
                )
                fastchat.play_a_match_single(match, str(single))
    more = ("--import_fastchat", str(single))
    assert run_judge(pairs, server, *more, model="the-judge") == 1
    assert server.requests == []
    out = capsys.readouterr().out
    assert "1 without a judgement ($ERROR$)" in out and "11 ok" in out
    rows = [*rows_of(pairs, "base"), *rows_of(pairs, "dpo")]
    assert sorted(row["score"] for row in rows) == [*range(1, 10), 2, 3][:2] + [
        2,
        3,
        3,
        *range(4, 10),
    ]
    assert {row["reading"] for row in rows} == {None, "fallback"}
    with pytest.raises(UserError, match=r"none .* belongs .*12 by another judge \(the-judge\)"):
        run_judge(pairs, server, *more, model="gpt-4")

    texts = iter(["[[A]]", "[[B]]"] * 6)
    for question in QUESTIONS:
        number, math_like = question["question_id"], question["category"] in fastchat.NEED_REF_CATS
        reference = {"choices": [{"turns": REFERENCES[number]}]} if math_like else None
        for turn in (1, 2):
            judge = fastchat.Judge(
                "the-judge",
                prompts[prompt_name("pair", math_like, turn)],
                ref_based=math_like,
                multi_turn=turn == 2,
            )
            sides = [{"choices": [{"turns": runs[name][number]}]} for name in ("dpo", "base")]
            match = fastchat.MatchPair(question, "dpo", "base", *sides, judge, reference, turn == 2)
            fastchat.play_a_match_pair(match, str(pair))
    more = ("--grading", "pair", "--baseline", "base", "--import_fastchat", str(pair))
    assert run_judge(pairs, server, *more, model="the-judge") == 0
    winners = [row["winner"] for row in rows_of(pairs, "dpo") if row["grading"] == "pair"]
    assert winners == ["dpo"] * 12


def test_no_fastchat_file(workplace, server):
    write_lines(workplace / "x.jsonl", [{"question_id": 81}])
    with pytest.raises(UserError, match=r"x.jsonl:1: not a judgement of FastChat's"):
        run_judge(workplace, server, "--import_fastchat", str(workplace / "x.jsonl"))


# ---- answers that are no answers, runs that are no more ------------------------------------------


def test_failed_answers_are_counted_and_not_judged(workplace, server, capsys):
    make_run(workplace, "base", {**ANSWERS, 111: ["$ERROR$", "$ERROR$"], 121: ["a", "$ERROR$"]})
    assert run_judge(workplace, server) == 0
    assert paid(server) == 3
    assert "run base: 3 turns are $ERROR$, a failed answer: they are not judged" in (
        capsys.readouterr().out
    )
    assert [(r["question_id"], r["turn"]) for r in rows_of(workplace)] == [
        (81, 1), (81, 2), (121, 1),
    ]  # fmt: skip


def test_a_run_deleted_meanwhile_does_not_come_back(workplace, server, capsys):
    run = make_run(workplace, "dpo", OTHER)

    def answer(body):
        if run.exists() and body["messages"] != server_judge.PROBE:
            for path in sorted(run.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            run.rmdir()
        return completion("[[7]]")

    server.answer = answer
    assert run_judge(workplace, server) == 0
    assert not run.exists()
    assert "run dpo was deleted meanwhile" in capsys.readouterr().out
    assert len(rows_of(workplace)) == 6


def test_the_key_is_no_part_of_an_address(workplace, server):
    named = server.url.replace("http://", f"http://user:{KEY}@")
    assert run_judge(workplace, server, "--base_url", named) == 0
    for path in workplace.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


# ---- stores of version 1.1.0 ---------------------------------------------------------------------

# What version 1.1.0 had more than SCHEMA_1.
SCHEMA_2 = """
ALTER TABLE judgements ADD COLUMN finish_reason TEXT;
ALTER TABLE judgements ADD COLUMN reading TEXT;
ALTER TABLE judgements ADD COLUMN rating_mass REAL;
ALTER TABLE judgements ADD COLUMN limitless_sha256 TEXT;
ALTER TABLE asked RENAME TO asked_1;
CREATE TABLE asked (
    model_id TEXT, question_id INTEGER, turn INTEGER, choice INTEGER, category TEXT, grading TEXT,
    "order" TEXT, baseline TEXT, judge TEXT, prompts TEXT, repeat INTEGER, refs TEXT,
    answer_sha256 TEXT, request_sha256 TEXT, judge_id TEXT,
    PRIMARY KEY (model_id, question_id, turn, choice, grading, "order", baseline, judge, prompts,
    repeat, refs, judge_id));
INSERT INTO asked SELECT *, '' FROM asked_1;
DROP TABLE asked_1;
CREATE TABLE judges (
    judge_id TEXT PRIMARY KEY, limitless_id TEXT NOT NULL, judge TEXT NOT NULL,
    server TEXT NOT NULL, parameters TEXT NOT NULL, settings TEXT NOT NULL, verdict TEXT NOT NULL,
    min_rating_mass REAL NOT NULL);
PRAGMA user_version = 2;
"""


def write_store_of_1_1_0(folder, server):
    """What version 1.1.0 left: made by today's code, then without what today's code adds."""
    assert run_judge(folder, server) == 0
    path = folder / "results/judgements.sqlite"
    with sqlite3.connect(path) as db:
        rows = {}
        for table in ("judgements", "asked", "judges"):
            cursor = db.execute(f"SELECT * FROM {table}")
            names = [column[0] for column in cursor.description]
            rows[table] = [dict(zip(names, values)) for values in cursor]
    db.close()
    for file in path.parent.glob("judgements.sqlite*"):
        file.unlink()
    with sqlite3.connect(path) as db:
        db.executescript(SCHEMA_1 + SCHEMA_2)
        for table, found in rows.items():
            names = [column[1] for column in db.execute(f"PRAGMA table_info({table})")]
            for row in found:
                marks = ", ".join("?" * len(names))
                db.execute(f"INSERT INTO {table} VALUES ({marks})", [row[name] for name in names])
    db.close()
    return path


def test_a_store_of_version_1_1_0_is_opened_and_nothing_is_asked_again(workplace, server):
    path = write_store_of_1_1_0(workplace, server)
    csv = workplace / "results/base/mt_bench/judgements.csv"
    before, calls = csv.read_text(), len(server.requests)
    counts = store.judgement_counts(workplace / "results", "big-70b")
    assert counts == {"base": store.Verdicts(6, 0)} and store.schema_of(path.parent) == 2
    assert store.judgement_counts(workplace / "results", "big-70b", "alpaca_eval") == {}
    assert run_judge(workplace, server) == 0
    assert len(server.requests) == calls and csv.read_text() == before
    assert store.schema_of(path.parent) == schema.SCHEMA_VERSION
    assert store.judgement_counts(workplace / "results", "big-70b") == counts
    with sqlite3.connect(path) as db:
        kept = db.execute("SELECT DISTINCT bench FROM asked").fetchall()
        of_a_new_store = sqlite3.connect(":memory:", isolation_level=None)
        schema.bring_up_to_date(of_a_new_store, path, version=0)
        tables = [
            [
                set(map(str, one.execute(f"PRAGMA table_info({table})")))
                for one in (db, of_a_new_store)
            ]
            for table in ("judgements", "asked", "judges")
        ]
    assert kept == [("mt_bench",)]
    assert all(migrated == new for migrated, new in tables), "both ways end in the same tables"


def test_a_migration_from_1_1_0_that_fails_leaves_that_store(workplace, server, monkeypatch):
    path = write_store_of_1_1_0(workplace, server)
    monkeypatch.setattr(schema, "JUDGES", "CREATE TABLE nonsense")
    with pytest.raises(UserError, match="cannot be used as a judgement store"):
        store.open_store(path)
    assert store.schema_of(path.parent) == 2
    assert store.judgement_counts(path.parent, "big-70b") == {"base": store.Verdicts(6, 0)}
