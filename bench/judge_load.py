"""judge.py under load: how close its rate comes to concurrency / latency, and whether memory and
files hold up.

    python bench/judge_load.py [--calls 5000] [--latency_ms 100] [--concurrency 64]

A server on loopback, in a process of its own, answers every call after the given time. The rate is
calls over the seconds of judge.py's asking, measured inside it; the ideal is concurrency / latency.
The last line is one JSON object.
"""

import argparse
import asyncio
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"


def serve(latency: float) -> None:
    """A server that reads requests with a Content-Length and answers each after `latency` seconds.
    Prints its port.
    """
    reply = {
        "id": "x",
        "object": "chat.completion",
        "created": 1,
        "model": "load-70b",
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": "Good. " * 60 + "[[7]]"},
            }
        ],
        "usage": {"prompt_tokens": 900, "completion_tokens": 150, "total_tokens": 1050},
    }
    body = json.dumps(reply).encode()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n"):
            lines = head.decode("latin-1").lower().split("\r\n")
            length = next(
                (int(line.split(":")[1]) for line in lines if line.startswith("content-length:")), 0
            )
            await reader.readexactly(length)
            await asyncio.sleep(latency if length else 0)
            writer.write(HEAD % (len(body), body))
            await writer.drain()

    async def forgiving(reader, writer) -> None:
        try:
            await handle(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def main() -> None:
        server = await asyncio.start_server(forgiving, "127.0.0.1", 0, backlog=1024)
        print(server.sockets[0].getsockname()[1], flush=True)
        await server.serve_forever()

    asyncio.run(main())


def make_runs(folder: Path, calls: int) -> None:
    """Runs with 80 answers of about 2 kB per turn, all different: 160 calls each."""
    import prep_data
    from pref.files.mt_bench import read_questions

    prep_data.main(["--mt_bench", "nvidia", "--out", str(folder / "mt")])
    questions = read_questions(folder / "mt" / "question.jsonl")
    for number in range(-(-calls // 160)):
        run = folder / "results" / f"run{number:02}"
        (run / "mt_bench").mkdir(parents=True)
        (run / "args.json").write_text("{}")
        rows = []
        for key in (question["question_id"] for question in questions):
            turns = [f"{number} {key} {turn} " + "word " * 400 for turn in (1, 2)]
            rows.append({"question_id": key, "choices": [{"index": 0, "turns": turns}]})
        (run / "mt_bench" / "answers.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=5000)
    parser.add_argument("--latency_ms", type=float, default=100)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--serve", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve is not None:
        serve(args.serve)
    import judge
    from pref.files.judgements import read_judgements
    from pref.judging import calls

    os.environ["OPENAI_API_KEY"] = "none"
    seconds, memory = [], []
    original = calls.judge_pending

    def timed(judge_, pending, **more):
        memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)
        begun = time.monotonic()
        result = original(judge_, pending, **more)
        seconds.append(time.monotonic() - begun)
        memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)
        return result

    calls.judge_pending = timed
    server = subprocess.Popen(
        [sys.executable, __file__, "--serve", str(args.latency_ms / 1000)], stdout=subprocess.PIPE
    )
    try:
        port = int(server.stdout.readline())
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            make_runs(folder, args.calls)
            url = f"http://127.0.0.1:{port}/v1"
            code = judge.main(
                [
                    str(folder / "results"),
                    "--mt_bench",
                    str(folder / "mt"),
                    "--judge",
                    "load-70b",
                    "--base_url",
                    url,
                    "--concurrency",
                    str(args.concurrency),
                ]
            )
            tables = [
                read_judgements(path)
                for path in (folder / "results").glob("*/mt_bench/judgements.csv")
            ]
    finally:
        server.kill()
    rows = [row for table in tables for row in table]
    calls, ideal = len(rows), args.concurrency / args.latency_ms * 1000
    intact = (
        code == 0
        and all(row["score"] == 7 for row in rows)
        and len({r["request_sha256"] for r in rows}) == calls
    )
    print(
        json.dumps(
            {
                "calls": calls,
                "seconds": seconds[0],
                "rate": calls / seconds[0],
                "ideal": ideal,
                "share_of_ideal": calls / seconds[0] / ideal,
                "csv_intact": intact,
                "mib_before_and_after": memory,
            }
        )
    )


if __name__ == "__main__":
    main()
