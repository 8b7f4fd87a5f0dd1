"""Language models as proposers of discover.py: what they are told, how replies are read, money."""

import argparse
import gzip
import itertools
import json
import random
import shutil
import sqlite3
import threading
import time
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from doubles import completion
from scripted_server import Answer, ScriptedServer, dripping, proposal

from pref.discovery import (
    fingerprint,
    form,
    form_tables,
    model_calls,
    model_proposer,
    prompts,
    replies,
)
from pref.discovery.arms import Arm, Arms, arm_of, choose
from pref.discovery.proposals import Known, Proposal, View
from pref.discovery.proposer_arguments import (
    add_proposer_arguments,
    check_proposer_arguments,
    estimate,
    open_arms,
)
from pref.discovery.requests import OutOfBudget
from pref.files.console import UserError
from pref.training.signals import Stopped

KEY = "sk-test-0123456789"
IMPORTS = "import torch\nimport torch.nn.functional as F\n\n"
DPO = IMPORTS + "def dpo(pairs, *, beta: float = 0.1):\n    return F.softplus(-beta * pairs.rho)\n"
OTHER = IMPORTS + "def other(pairs):\n    return torch.relu(1 - 0.3 * pairs.rho)\n"
LONGER = IMPORTS + (
    "def blend(pairs, *, beta: float = 0.2):\n    z = beta * pairs.rho\n"
    "    return 0.5 * F.softplus(-z) + 0.5 * torch.relu(1 - z)\n"
)
EVIL = "import os\n\ndef evil(pairs):\n    os.system('touch /tmp/evil')\n    return pairs.rho\n"


def known(id: str, name: str, text: str = DPO, **more) -> Known:
    fields = {"by": "seed", "parents": [], "genome": None, "round": 0, "size": 4, "gradient": {}}
    return Known(id=id, name=name, text=text, **{**fields, **more})


def view_of(*more: Known, visited: float = 3.0) -> View:
    dpo = known("p0001", "dpo", gain=0.0, se=0.0, measured="proxy")
    return View([dpo, *more], dpo, visited, "SmolLM2-135M, LoRA\n160 pairs\n40 steps")


VIEW = view_of()


@pytest.fixture
def scripted(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    double = ScriptedServer()
    yield double
    double.close()


def arguments(*more: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_proposer_arguments(parser)
    args = parser.parse_args(list(more))
    check_proposer_arguments(args)
    return args


@contextmanager
def arms_of(folder: Path, server: ScriptedServer, *more: str, own=None):
    """Arms with a model `m` behind the server."""
    names = () if "--proposer" in more else ("--proposer", "m")
    args = arguments(*names, "--base_url", server.url, "--max_retries", "0", *more)
    with open_arms(args, folder, own or {}, most_proposals=96) as arms:
        yield arms


def propose(arms: Arms, size: int = 16, view: View = VIEW, round: int = 0):
    return arms.propose(view, round=round, size=size, seed=1)


def rows_of(folder: Path) -> list[dict]:
    with sqlite3.connect(folder / "requests.sqlite") as db:
        db.row_factory = sqlite3.Row
        return [dict(row) for row in db.execute("SELECT * FROM requests ORDER BY rowid")]


def asked(body: dict) -> str:
    """The task of a request, or the words of a refusal."""
    return body["messages"][-1]["content"]


def is_repair(body: dict) -> bool:
    return len(body["messages"]) == 4


class Free:
    """A proposer without a price."""

    name = "evolve"

    def propose(self, view, *, round, number, rng):
        return Proposal(DPO, self.name, "mutate", [], f"free_{number}")


# ---- reading -------------------------------------------------------------------------------------

WRITTEN = {"thought": "A hinge.", "name": "hinge", "code": OTHER}
READABLE = {
    "json": json.dumps(WRITTEN),
    "literal newlines": json.dumps(WRITTEN).replace("\\n", "\n"),
    "in a fence": f"Here it is:\n```json\n{json.dumps(WRITTEN, indent=2)}\n```\nGood luck!",
    "after an example": f'Like {{"code": "def x(pairs): pass"}}: {json.dumps(WRITTEN)}',
    "after thoughts": f'<think>{{"code": "def x"}}</think>{json.dumps(WRITTEN)}',
    "code in a fence": json.dumps(WRITTEN | {"code": f"```python\n{OTHER}```"}),
    "windows": json.dumps(WRITTEN | {"code": OTHER.replace("\n", "\r\n")}),
}


@pytest.mark.parametrize("text", READABLE.values(), ids=READABLE.keys())
def test_replies_that_can_be_read(text):
    assert replies.read(text) == ("A hinge.", "hinge", OTHER)


def test_a_fenced_block_alone_is_a_program_without_a_name():
    text = f"```\nnot code\n```\nThe loss:\n```python\n{OTHER}```\n```\nnot code\n```"
    assert replies.read(text) == ("", "loss", OTHER)


UNREADABLE = {
    "prose": "I would rather not.",
    "broken": '{"thought": "x", "name": "y", "code": "def f(pairs): return "pairs"',
    "no code": '{"thought": "x", "name": "y"}',
    "code of another type": '{"code": ["def f(pairs):"]}',
    "deep": '{"a":' * 100_000,
    "a long number": '{"code": ' + "9" * 10_000 + "}",
    "open thoughts": "<think>" + json.dumps(WRITTEN),
    "an open fence": f"```python\n{OTHER}",
    "braces": "{" * 100_000,
    "fences": "```\n" * 25_000,
}


@pytest.mark.parametrize("text", UNREADABLE.values(), ids=UNREADABLE.keys())
def test_replies_without_a_proposal(text):
    begun = time.monotonic()
    with pytest.raises(replies.Unreadable) as error:
        replies.read(text)
    assert "\n" not in str(error.value) and time.monotonic() - begun < 1


def test_names_and_thoughts_have_nothing_that_a_terminal_or_a_path_acts_upon():
    thought = "Red \x1b[31m and \u202egnp\x00\n" + "x" * 2000
    draft = replies.read(json.dumps({"thought": thought, "name": "../../Etc/A B", "code": "def x"}))
    assert draft.name == "etc_a_b"
    assert draft.thought.startswith("Red [31m and gnp x") and len(draft.thought) < 820
    assert draft.thought.isprintable()
    assert replies.clean_name("ü" * 9) == replies.clean_name(7) == "loss"
    assert replies.clean_name("a" * 23 + "__b") == "a" * 23


# ---- what a model is told ------------------------------------------------------------------------


def test_the_prompt_has_the_form_and_the_archive_with_its_noise():
    field = lambda *values: np.array(values, float)  # noqa: E731
    view = view_of(
        known("p0002", "better", LONGER, gain=0.021, se=0.008, measured="trained", seeds=3,
              gradient={"10": 0.1, "-10": 2.0, "0": 1.0}, cell="pulls-harder,stops,free",
              field=field(0.0, 0.0), size=9),
        known("p0003", "near", gain=0.001, se=0.01, measured="proxy", field=field(0.1, 0.0)),
        known("p0004", "worse", gain=-0.004, measured="proxy", field=field(0.0, 0.1)),
        known("p0005", "far", gain=-0.05, measured="proxy", field=field(5.0, 0.0)),
        known("p0006", "no", "", stopped={"at": "form", "why": "line 3: no\nloops"}),
        known("p0007", "again", stopped={"at": "duplicate", "why": "x", "near": "p0003"}),
        known("p0008", "again", stopped={"at": "duplicate", "why": "x", "near": "p0003"}),
    )  # fmt: skip
    system, user = (m["content"] for m in prompts.prompt(view, random.Random(0)).messages)
    assert form_tables.describe() in system and DPO in system and "about 3 nats" in system
    best, others = user.split("Others, as different as there are")
    assert (
        "p0002 better: gain +2.1 points +- 0.8 (trained, 3 seeds); gradient by rho, relative to "
        "DPO's: 2 at -10, 1 at 0, 0.1 at 10; pulls-harder, stops, free\n" + LONGER.rstrip()
    ) in best
    assert "p0001 dpo: gain +0.0 points +- 0.0 (proxy)" in best
    assert "p0005 far: gain -5.0 points (proxy)" in others and "p0005" not in best
    assert "Refused lately\n- no: line 3: no loops\n" in others
    assert "Proposed again in other words, and refused: near (2 times)" in others
    assert user.endswith(prompts.REPLY)


def test_every_task_is_drawn_and_names_what_is_shown():
    view = view_of(
        known("p0002", "better", LONGER, gain=0.02, size=9, cell="stops", field=np.zeros(2))
    )
    tasks = [prompts.prompt(view, random.Random(seed)) for seed in range(60)]
    assert {one.task.operator for one in tasks} == {
        "improve", "combine", "fill a cell", "simplify"
    }  # fmt: skip
    for one in tasks:
        user = one.messages[1]["content"]
        assert one.task.text in user
        assert all(f"\n{id} " in user.split("Task\n")[0] for id in one.task.parents)
    assert len({one.task.text for one in tasks}) > 8
    assert prompts.prompt(view, random.Random(3)) == prompts.prompt(view, random.Random(3))


def test_cells_are_named_in_words_until_all_are_filled():
    parts = (fingerprint.LEFT, fingerprint.RIGHT, fingerprint.SHIFT)
    assert set(itertools.chain(*parts)) == prompts.CELL_WORDS.keys()
    cells = [",".join(names) for names in itertools.product(*parts)]
    assert prompts.empty_cells(VIEW) == cells and len(cells) == 18
    full = view_of(*(known(f"p{i:04}", "x", cell=cell) for i, cell in enumerate(cells, 2)))
    assert prompts.empty_cells(full) == []
    tasks = {prompts.prompt(full, random.Random(seed)).task.operator for seed in range(40)}
    assert "fill a cell" not in tasks


# ---- a round -------------------------------------------------------------------------------------


def test_a_round_of_everything_that_a_model_may_reply(scripted, tmp_path):
    """Each kind is stopped or read by itself; none disturbs another."""
    big = json.dumps({"code": DPO, "thought": "x" * (5 * 2**20)})
    zeros = gzip.compress(b" " * 8 * 2**20, 1)
    kinds = {
        "valid": proposal(LONGER, "../Blend!"),
        "duplicate": proposal(DPO),
        "malicious": proposal(EVIL),
        "broken": completion('{"thought": "x", "code": "def f(pairs):'),
        "newlines": completion(json.dumps(WRITTEN).replace("\\n", "\n")),
        "cut off": completion(json.dumps(WRITTEN), finish="length"),
        "nan": proposal(DPO.replace("-beta * pairs.rho", "torch.log(-pairs.rho * pairs.rho)")),
        "wrong shape": proposal(DPO.replace("rho)", "rho).mean()")),
        "endless": dripping(),
        "huge": Answer(200, [completion(big)[1]["choices"][0]["message"]["content"].encode()]),
        "bomb": Answer(200, [zeros], {"Content-Encoding": "gzip"}),
        "500": (500, {"error": {"message": "overloaded"}}),
        "429": (429, {"error": {"message": "slow down"}}),
        "400": (400, {"error": {"message": "no"}}),
        "silent": Answer(200, (time.sleep(1) or b"" for _ in range(1))),
        "web page": Answer(200, [b"<html>sign in</html>"]),
        "empty": completion(""),
        "filtered": completion("", finish="content_filter"),
    }
    waiting, lock, kind_of = list(kinds), threading.Lock(), {}

    def script(body, key):
        with lock:
            kind = kind_of.setdefault(body["messages"][1]["content"], None) or waiting.pop(0)
            kind_of[body["messages"][1]["content"]] = kind
        return kinds[kind]

    scripted.script = script
    view = [view_of(visited=0.1 * number) for number in range(len(kinds))]
    found = {}
    with arms_of(tmp_path, scripted, "--timeout_s", "0.3", "--max_retries", "1") as arms:
        proposer = arms.proposers["m"]
        for number, kind in enumerate(kinds):
            # A setting of its own: a repair is told from the prompt of another kind.
            one = view[number]._replace(setting=f"setting {kind}")
            rng = random.Random(number)
            found[kind] = proposer.propose(one, round=0, number=number, rng=rng)
    read = {kind: one for kind, one in found.items() if one.stopped is None}
    assert set(read) == {"valid", "duplicate", "malicious", "newlines", "nan", "wrong shape"}
    assert read["valid"].text == LONGER and read["valid"].name == "blend"
    assert read["duplicate"].text == DPO and read["newlines"].text == OTHER
    why = {kind: one.stopped for kind, one in found.items() if one.stopped}
    assert {one["at"] for one in why.values()} == {"parse"}
    for kind, words in {
        "broken": "neither a JSON object",
        "cut off": "cut off",
        "endless": "no end",
        "huge": "no end",
        "bomb": "no end",
        "500": "the server answers 500 (Error code: 500 - overloaded)",
        "429": "the server answers 429",
        "400": "the server answers 400",
        "silent": "no reply within --timeout_s",
        "web page": "its reply is a web page",
        "empty": "empty",
        "filtered": "content filter",
    }.items():
        assert words in why[kind]["why"], kind
    # What the form refuses was asked about once more, with the words of the refusal.
    repaired = {asked(body).split("\n")[0] for body in scripted.requests if is_repair(body)}
    assert len(repaired) == len([body for body in scripted.requests if is_repair(body)]) == 3
    assert any("os" in words for words in repaired) and any("batch" in w for w in repaired)
    # What timed out was sent, and is not sent again.
    assert (
        sum("setting silent\n" in body["messages"][1]["content"] for body in scripted.requests) == 1
    )
    # The trial of an unbounded reply has not taken its size.
    assert max(len(row["reply"] or "") for row in rows_of(tmp_path)) <= model_calls.MOST_CHARS


def test_a_refused_program_is_repaired_once(scripted, tmp_path):
    scripted.script = lambda body, key: proposal(LONGER if is_repair(body) else EVIL)
    with arms_of(tmp_path, scripted, "--price_in", "1", "--price_out", "1") as arms:
        (one,) = propose(arms, 1).proposals
    assert one.text == LONGER and one.operator.endswith(", repaired") and one.stopped is None
    assert one.usd == pytest.approx(2 * 14 / 1e6)
    assert "os.system" in one.original and "torch.relu" in one.original
    assert scripted.requests[1]["messages"][2] == {"role": "assistant", "content": EVIL}
    assert form.translate(one.text)


def test_a_repair_that_is_no_better_leaves_the_first_reply(scripted, tmp_path):
    scripted.script = lambda body, key: completion("Sorry.") if is_repair(body) else proposal(EVIL)
    with arms_of(tmp_path, scripted) as arms:
        (one,) = propose(arms, 1).proposals
    assert one.text == EVIL and one.stopped is None and len(scripted.requests) == 2


def test_what_refuses_a_program_is_the_searchs_matter(scripted, tmp_path):
    """The search hands in its worker's self-test, whose words go back too."""
    scripted.script = lambda body, key: proposal(LONGER)
    args = arguments("--proposer", "m", "--base_url", scripted.url, "--max_retries", "0")
    refusal = lambda text: "self-test: NaN at margin 0"  # noqa: E731
    with open_arms(args, tmp_path, {}, most_proposals=9, refusal_of=refusal) as arms:
        propose(arms, 1)
    assert "NaN at margin 0" in asked(scripted.requests[1]) and len(scripted.requests) == 2


# ---- paid once -----------------------------------------------------------------------------------


def by_content(body, key):
    """A reply that depends on the request alone. Of the tasks, "improve" needs a repair."""
    number = zlib.crc32(asked(body).encode()) % 97
    code = EVIL if "\nImprove p" in asked(body) else LONGER.replace("0.2", f"0.{number}")
    return proposal(code, f"n{number}", completion_tokens=number * 10)


def test_a_killed_round_asks_for_what_is_missing_and_ends_the_same(scripted, tmp_path):
    """A copy of the store at each request is what kill -9 at that moment would leave."""
    copies: list[Path] = []

    def script(body, key):
        copies.append(tmp_path / str(len(copies)))
        copies[-1].mkdir()
        for file in (tmp_path / "whole").glob("requests.sqlite*"):
            shutil.copy(file, copies[-1])
        return by_content(body, key)

    scripted.script = script
    priced = ("--concurrency", "1", "--price_in", "0.25", "--price_out", "2", "--max_usd", "5")
    with arms_of(tmp_path / "whole", scripted, *priced) as arms:
        expected = propose(arms, 4).proposals
    calls = len(scripted.requests)
    assert calls > 4 and len(copies) == calls
    scripted.script = by_content
    for number, folder in enumerate([*copies, tmp_path / "whole"]):
        scripted.requests.clear()
        with arms_of(folder, scripted, *priced) as arms:
            assert propose(arms, 4).proposals == expected
        assert len(scripted.requests) == calls - number
        # The call in flight may have been charged: it counts at its highest price.
        lost = [row["lost_usd"] for row in rows_of(folder)]
        assert sum(usd > 0 for usd in lost) == (number < calls)
        if number < calls:
            request = json.loads(rows_of(folder)[number]["request"])
            size = sum(len(m["content"].encode()) + 16 for m in request["messages"])
            assert sum(lost) == pytest.approx((size * 0.25 + 4096 * 2) / 1e6)


@pytest.mark.slow
def test_the_order_of_replies_changes_nothing(scripted, tmp_path):
    dice = random.Random(5)

    def late(body, key):
        time.sleep(dice.uniform(0, 0.03))
        return by_content(body, key)

    def run(folder: str, concurrency: str, cap: str):
        money = ("--price_in", "0.25", "--price_out", "2", "--max_usd", cap)
        more = ("--concurrency", concurrency, "--proposer", "m", "evolve")
        with arms_of(tmp_path / folder, scripted, *more, *money, own={"evolve": Free()}) as arms:
            return propose(arms)

    scripted.script = by_content
    expected = run("one", "1", "0.022")
    assert "m" in expected.ended and len({one.by for one in expected.proposals}) == 2
    scripted.script = late
    assert [run(f"{trial}", "8", "0.022") for trial in range(2)] == [expected] * 2


@pytest.mark.parametrize(
    "trial", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 6))]
)
def test_the_cap_is_never_passed(scripted, tmp_path, trial):
    """T8: the server's bill, with failures that are charged and calls that were lost."""
    dice, lock, bill = random.Random(trial), threading.Lock(), []

    def script(body, key):
        with lock:
            fate, used = dice.random(), dice.randint(1, 4096)
            prompt = sum(len(m["content"]) for m in body["messages"]) // 3
            time_s = dice.uniform(0, 0.02)
        time.sleep(time_s)
        if fate < 0.1:
            return 429, {"error": {"message": "slow down"}}
        with lock:
            bill.append((prompt * 1 + used * 10) / 1e6)
        if fate < 0.2:  # charged, though it failed
            return 500, {"error": {"message": "broke"}}
        code = EVIL if fate < 0.5 else LONGER
        return proposal(code, prompt_tokens=prompt, completion_tokens=used)

    scripted.script = script
    cap = dice.uniform(0.3, 0.8)
    more = ("--price_in", "1", "--price_out", "10", "--max_usd", str(cap), "--concurrency", "8",
            "--max_retries", "1")  # fmt: skip
    spent = []
    for round in (0, 1):
        with arms_of(tmp_path, scripted, *more) as arms:
            found = propose(arms, 24, round=round)
            spent.append(arms.proposers["m"].requests.spent())
    assert "m" in found.ended and f"--max_usd {cap:g}" in found.ended["m"]
    assert 0 < sum(bill) <= spent[-1] <= cap
    with arms_of(tmp_path, scripted, *more) as arms:  # the same cap again buys nothing beyond it
        propose(arms, 24, round=1)
    assert sum(bill) <= cap


def test_out_of_budget_the_free_proposers_go_on(scripted, tmp_path):
    scripted.script = by_content
    money = ("--price_in", "1", "--price_out", "10", "--max_usd", "0.0001")
    both = ("--proposer", "m", "evolve")
    with arms_of(tmp_path, scripted, *both, *money, own={"evolve": Free()}) as arms:
        arms.check()
        found = propose(arms)
        assert [one.by for one in found.proposals] == ["evolve"] * 16 and "m" in found.ended
        with pytest.raises(OutOfBudget):
            arms.proposers["m"].propose(VIEW, round=0, number=0, rng=random.Random(0))
    with arms_of(tmp_path, scripted, *money) as arms:
        assert propose(arms) == ([], {"m": found.ended["m"]})
        with pytest.raises(UserError, match="--max_usd 0.0001"):
            arms.check()
    assert scripted.requests == []


# ---- failures of the server ----------------------------------------------------------------------

FATAL = {
    401: ("Incorrect API key", "it refuses the key"),
    403: ("Forbidden", "may not use this model"),
    404: ("no such model", "it has no such model"),
    402: ("Payment required", "no credit left"),
    429: ("insufficient_quota", "no credit left"),
}


@pytest.mark.parametrize(
    "status", [401, 429, *(pytest.param(n, marks=pytest.mark.slow) for n in (402, 403, 404))]
)
def test_what_each_request_would_meet_ends_the_search_at_once(scripted, tmp_path, status):
    message, words = FATAL[status]
    scripted.script = lambda body, key: (status, {"error": {"message": message}})
    with arms_of(tmp_path, scripted, "--max_retries", "5", "--concurrency", "2") as arms:
        with pytest.raises(UserError, match=words):
            arms.check()
        assert len(scripted.requests) == 1
    with arms_of(tmp_path, scripted, "--max_retries", "5", "--concurrency", "2") as arms:
        with pytest.raises(UserError, match=words):
            propose(arms)
        assert len(scripted.requests) <= 3
    # The account has credit again: nothing stands in the way.
    scripted.script = by_content
    with arms_of(tmp_path, scripted) as arms:
        arms.check()
        assert len(propose(arms, 3).proposals) == 3


def test_a_server_that_is_gone_ends_the_search_and_the_next_start_asks_again(scripted, tmp_path):
    scripted.script = lambda body, key: (500, {"error": {"message": "down"}})
    no_more = pytest.raises(UserError, match="takes no more .10 calls in a row.*answers 500")
    with arms_of(tmp_path, scripted, "--concurrency", "2") as arms, no_more:
        propose(arms)
    assert len(scripted.requests) <= 11
    scripted.script = by_content
    with arms_of(tmp_path, scripted) as arms:
        found = propose(arms, 8).proposals
    assert len(found) == 8 and not any(one.stopped for one in found)


def test_passing_failures_are_retried(scripted, tmp_path):
    fates = itertools.cycle((429, 500, None))

    def script(body, key):
        status = next(fates)
        return (status, {"error": {"message": "later"}}) if status else by_content(body, key)

    scripted.script = script
    with arms_of(tmp_path, scripted, "--max_retries", "3", "--concurrency", "1") as arms:
        assert not any(one.stopped for one in propose(arms, 4).proposals)


def test_the_first_question_is_asked_once(scripted, tmp_path):
    for _ in range(2):
        with arms_of(tmp_path, scripted) as arms:
            arms.check()
    assert [body["messages"] for body in scripted.requests] == [model_proposer.HELLO]
    scripted.script = lambda body, key: Answer(200, [b"<html>sign in</html>"])
    with (
        arms_of(tmp_path / "other", scripted) as arms,
        pytest.raises(UserError, match="its reply is a web page"),
    ):
        arms.check()


def test_parameters_that_a_model_refuses_are_left_out_from_then_on(scripted, tmp_path, capsys):
    def script(body, key):
        for name, instead in (("temperature", "none"), ("max_tokens", "max_completion_tokens")):
            if name in body:
                error = {"message": f"'{name}' is not supported; use {instead}", "param": name}
                return 400, {"error": error}
        return by_content(body, key)

    scripted.script = script
    with arms_of(tmp_path, scripted, "--concurrency", "1") as arms:
        expected = propose(arms, 3).proposals
    assert "trying" in capsys.readouterr().err
    kept = [set(body) - {"model", "messages"} for body in scripted.requests]
    assert kept[:2] == [{"temperature", "max_tokens"}, {"max_tokens"}]
    assert set(map(tuple, kept[2:])) == {("max_completion_tokens",)}
    count = len(scripted.requests)
    with arms_of(tmp_path, scripted) as arms:
        assert propose(arms, 3).proposals == expected and len(scripted.requests) == count
        propose(arms, 1, round=1)
    assert "temperature" not in scripted.requests[count]
    # Given parameters are sent as they are.
    with arms_of(tmp_path / "own", scripted, "--parameters", '{"temperature": 0}') as arms:
        assert "not supported" in propose(arms, 1).proposals[0].stopped["why"]
    assert set(scripted.requests[-1]) == {"model", "messages", "temperature"}


def test_a_model_whose_replies_cannot_be_read_is_given_up(scripted, tmp_path):
    stopped = {"at": "parse", "why": "its reply was cut off"}
    useless = view_of(
        *(known(f"p{i:04}", "x", "", by="m", stopped=stopped) for i in range(2, 18)),
    )
    useless_error = pytest.raises(UserError, match="none of its 16 replies could be read.*cut off")
    with arms_of(tmp_path, scripted) as arms, useless_error:
        propose(arms, view=useless)
    with arms_of(tmp_path, scripted, "--proposer", "m", "evolve", own={"evolve": Free()}) as arms:
        found = propose(arms, view=useless)
    assert {one.by for one in found.proposals} == {"evolve"} and "m" in found.ended
    assert scripted.requests == []


def test_a_signal_ends_the_round_with_the_calls_in_flight_stored(scripted, tmp_path, capsys):
    level = 0

    def script(body, key):
        nonlocal level
        level = 1
        return by_content(body, key)

    scripted.script = script
    args = arguments("--proposer", "m", "--base_url", scripted.url, "--concurrency", "2")
    where = {"most_proposals": 9, "stop_level": lambda: level}
    with open_arms(args, tmp_path, {}, **where) as arms, pytest.raises(Stopped):
        propose(arms)
    calls = len(scripted.requests)
    assert 1 <= calls <= 2 and [row["status"] for row in rows_of(tmp_path)] == ["ok"] * calls
    level, scripted.script = 0, by_content
    with arms_of(tmp_path, scripted) as arms:
        found = propose(arms, 5).proposals
    keys = [json.dumps(body["messages"]) for body in scripted.requests]
    assert len(found) == 5 and len(keys) == len(rows_of(tmp_path))


# ---- the key -------------------------------------------------------------------------------------


def test_the_key_is_in_no_file_and_on_no_screen(scripted, tmp_path, capsys):
    """T12: a server that echoes it wherever it can, also escaped within JSON within JSON."""
    escaped = "".join(f"\\u{ord(letter):04x}" for letter in KEY)
    texts = [
        json.dumps({"thought": f"{KEY} it is", "name": KEY, "code": f"# {KEY}\n{LONGER}"}),
        f'{{"thought": "{escaped}", "name": "{escaped}", "code": "# {escaped}"}}',
        f"{KEY}",
        f"```python\n# {KEY}\ndef f(pairs):\n    return {KEY}\n```",
    ]
    answers = [completion(text) for text in texts]
    answers += [(status, {"error": {"message": f"bad {KEY}"}}) for status in (400, 500, 429, 422)]
    answers += [(200, {"id": KEY, "error": KEY}), Answer(200, [f"<html>{KEY}".encode()])]
    status, full = completion(texts[0])
    full |= {"model": KEY, "system_fingerprint": KEY}
    full["choices"][0]["finish_reason"] = KEY
    answers += [(status, full), Answer(302, [b""], {"Location": f"http://x/{KEY}"})]
    replying = itertools.cycle(answers)
    lock = threading.Lock()

    def script(body, key):
        assert key == f"Bearer {KEY}"
        with lock:
            return next(replying)

    scripted.script = script
    said = []
    with arms_of(tmp_path, scripted) as arms:
        proposer = arms.proposers["m"]
        for number in range(3 * len(answers)):
            where = {"round": 0, "number": number, "rng": random.Random(number)}
            try:
                said.append(repr(proposer.propose(VIEW, **where)))
            except UserError as error:
                said.append(str(error))
            proposer.requests.fatal = None
    scripted.script = lambda body, key: (401, {"error": {"message": f"wrong key {KEY}"}})
    with arms_of(tmp_path, scripted) as arms, pytest.raises(UserError) as error:
        arms.check()
    said += [str(error.value), *capsys.readouterr()]
    said += [path.read_bytes().decode("utf-8", "replace") for path in tmp_path.rglob("*.*")]
    names = "_".join(part for part in KEY.split("-"))
    assert len(said) > 30 and "[key]" in "".join(said)
    assert KEY not in "".join(said) and names not in "".join(said)


# ---- the bandit ----------------------------------------------------------------------------------


def test_the_index_of_an_arm():
    """By hand: 6 of 12 and 9 of 24, in all 36: 0.5 + sqrt(3.5835 / 24) = 0.886 against
    0.375 + sqrt(3.5835 / 48) = 0.648; at the fair price the first is worth half.
    """
    few, many = Arm("few", 12, 6, 0.0), Arm("many", 24, 9, 0.0)
    assert choose([many, few], fair=0.0) == few
    dear = few._replace(price=0.01)
    assert choose([many, dear], fair=0.01) == many  # 0.443 < 0.648
    assert choose([many, dear], fair=0.03) == dear  # 0.665
    assert choose([many, few, Arm("new", 0, 0, 0.0)], fair=0.0).name == "new"


def test_what_the_archive_says_about_an_arm():
    gains = {"p0002": 0.02, "p0003": -0.01, "p0004": 0.01, "p0005": -0.02}
    own = [known(id, "x", by="m", gain=gain, usd=0.01) for id, gain in gains.items()]
    own.append(known("p0006", "x", by="m", stopped={"at": "form", "why": "no"}, usd=0.06))
    # Half of 0.02, 0.01, 0 (dpo), -0.01, -0.02 lie above 0: two of its five proposals.
    assert arm_of("m", view_of(*own)) == Arm("m", 5, 2, pytest.approx(0.02))
    assert arm_of("evolve", view_of(*own)) == Arm("evolve", 0, 0, 0.0)


def test_the_better_arm_is_asked_more_and_the_cap_sets_the_fair_price(scripted, tmp_path):
    by = lambda name, usd, gains, first: [  # noqa: E731
        known(f"p{first + i:04}", "x", by=name, gain=g, usd=usd) for i, g in enumerate(gains)
    ]
    scripted.script = by_content
    view = view_of(
        *by("m", 0.01, [0.01] * 15 + [-0.01] * 5, 2),
        *by("evolve", 0, [-0.01] * 18 + [0.01] * 2, 30),
    )
    money = ("--price_in", "1", "--price_out", "1", "--max_usd")
    for cap, least in (("50", True), ("0.25", False)):
        both = ("--proposer", "m", "evolve", *money, cap)
        with arms_of(tmp_path / cap, scripted, *both, own={"evolve": Free()}) as arms:
            found = propose(arms, view=view).proposals
        share = sum(one.by == "m" for one in found) / len(found)
        # 49.8 dollars for 56 places: a cent is cheap. 5 cents for 56 places: it is dear.
        assert share > 0.8 if least else share < 0.2


# ---- arguments -----------------------------------------------------------------------------------

WRONG = {
    "--max_usd is for models": ("--max_usd", "1"),
    "given twice": ("--proposer", "m", "m"),
    "written in small letters": ("--proposer", "Evolve"),
    "no price of m is known": ("--proposer", "m", "--max_usd", "1"),
    "give both or neither": ("--proposer", "m", "--price_in", "1"),
    "2 prices for 3 models": ("--proposer", "a", "b", "c", "--price_in", "1", "2", "--price_out",
                              "1", "2"),
    "must limit the tokens": ("--proposer", "gpt-4o", "--max_usd", "1", "--parameters", "{}"),
    "n cannot be given": ("--proposer", "m", "--parameters", '{"n": 2}'),
    "must be a whole number": ("--proposer", "m", "--parameters", '{"max_tokens": 0}'),
    "--concurrency 0": ("--proposer", "m", "--concurrency", "0"),
    "--timeout_s nan": ("--proposer", "m", "--timeout_s", "nan"),
    "--max_usd nan": ("--proposer", "m", "--max_usd", "nan"),
    "through a server": ("--proposer", "hf:models/x"),
    "not a name": ("--proposer", "a\nb"),
}  # fmt: skip


@pytest.mark.parametrize("words", WRONG)
def test_arguments_that_cannot_be_meant(words, monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(UserError, match=words):
        arguments(*WRONG[words])


def test_the_estimate_says_tokens_and_dollars():
    prices = ("--price_in", "0.25", "1", "--price_out", "2", "4")
    args = arguments("--proposer", "a", "evolve", "b", *prices)
    messages = [{"role": "user", "content": "x" * 7200}]  # 1,800 tokens
    a, b = estimate(args, messages, 100).splitlines()
    assert a.startswith("a: 100 proposals, 180,000 prompt and 50,000 completion tokens")
    assert "0.14 dollars at 0.25 and 2 per million" in a  # 0.045 + 0.1
    assert "0.38 dollars at 1 and 4 per million" in b
