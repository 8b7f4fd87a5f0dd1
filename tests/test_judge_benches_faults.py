"""What protects money and work, for each benchmark: kill -9, the cap, batch files, retries."""

import json
import os
import signal

import pytest
from bench_workplace import PREPARED, make_answers, make_data, rows_of, run_bench, verdict
from judge_workplace import KEY, refusal

from pref.files.console import UserError
from pref.judging import benchmarks
from pref.judging.server_judge import PROBE

pytestmark = pytest.mark.slow

NAMES = [name for name in PREPARED if name in benchmarks.BENCHMARKS]


@pytest.fixture(scope="module", params=NAMES)
def prepared(request, tmp_path_factory):
    """A benchmark's name and data folder."""
    return request.param, make_data(tmp_path_factory.mktemp("bench"), request.param)


@pytest.fixture
def bench(prepared, tmp_path, monkeypatch, server):
    """The benchmark's name, and a folder with its data and two runs that have answered it."""
    name, data = prepared
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).symlink_to(data)
    questions = data / benchmarks.BENCHMARKS[name].question_file
    make_answers(tmp_path, name, questions)
    server.answer = lambda body: verdict(name)
    return name, tmp_path


def paid(server) -> list[dict]:
    """Requests other than the probe's."""
    return [body for body in server.requests if body["messages"][-1] != PROBE[-1]]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_killed_capped_and_continued(bench, server):
    """kill -9 loses the call in flight alone; the cap holds; in the end all is there."""
    name, folder = bench
    # 1) kill -9 while the third call is in flight.
    child = os.fork()
    if child == 0:  # the server's thread stays with the parent
        run_bench(folder, name, server)
        os._exit(0)

    def kill(body):
        if len(paid(server)) == 3:
            os.kill(child, signal.SIGKILL)
        return verdict(name)

    server.answer = kill
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and len(paid(server)) == 3
    # 2) A cap for a call or two; 3 completion tokens are 3 dollars.
    server.answer = lambda body: verdict(name)
    cap = paid(server)[0]["max_tokens"] + 4
    prices = ("--price_in", "0", "--price_out", "1e6", "--max_retries", "0")
    with pytest.raises(UserError, match=f"--max_usd {cap}.0: .* raise --max_usd"):
        run_bench(folder, name, server, "--max_usd", str(cap), *prices)
    assert 4 <= len(paid(server)) <= 5
    # 3) Without a cap: what is left, and nothing twice but the call that was in flight.
    assert run_bench(folder, name, server, *prices) == 0
    rows = rows_of(folder, name)
    requests = {row["request_sha256"] for row in rows}
    assert len(paid(server)) == len(requests) + 1 and {row["status"] for row in rows} == {"ok"}
    costs = {row["request_sha256"]: row["cost_usd"] for row in rows}
    assert sorted(costs.values(), key=str)[-2:] == [None, None], "the first two had no price"
    assert sum(cost for cost in costs.values() if cost) == 3 * (len(requests) - 2)
    calls = len(server.requests)
    assert run_bench(folder, name, server) == 0 and len(server.requests) == calls


def test_a_batch_comes_back_and_what_failed_is_asked_again(bench, server):
    name, folder = bench
    batch, output = folder / "batch.jsonl", folder / "output.jsonl"
    assert run_bench(folder, name, server, "--dry_run", "--requests", str(batch)) == 0
    assert paid(server) == [], "the probe alone"
    lines = [json.loads(line) for line in batch.read_text().splitlines()]
    results = []
    for number, line in enumerate(lines):
        status, body = verdict(name) if number else refusal(500, "oops")
        response = {"status_code": status, "body": body}
        results.append({"custom_id": line["custom_id"], "response": response})
    output.write_text("".join(json.dumps(row) + "\n" for row in results))
    assert run_bench(folder, name, server, "--import_results", str(output)) == 1
    rows = rows_of(folder, name)
    assert len({row["request_sha256"] for row in rows}) == len(lines)
    assert sorted({row["status"] for row in rows}) == ["http_500", "ok"]
    assert run_bench(folder, name, server) == 1 and paid(server) == []
    assert run_bench(folder, name, server, "--retry_failed") == 0
    assert [(body["messages"]) for body in paid(server)] == [lines[0]["body"]["messages"]]
    assert {row["bench"] for row in rows_of(folder, name)} == {name}
