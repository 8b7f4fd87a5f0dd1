"""The benchmarks that judge.py knows: a line for each."""

import argparse

from pref.files.benchmarks import DATA
from pref.judging import bench_alpaca_eval, bench_arena_hard, bench_folder, bench_mt_bench, judges
from pref.judging.benchmark import PROGRAM, REWARD, Bench, Benchmark
from pref.judging.reading import FIRST, Reply, Verdict

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        bench_mt_bench.BENCHMARK,
        bench_alpaca_eval.BENCHMARK,
        *bench_arena_hard.BENCHMARKS.values(),
    )
}  # fmt: skip
DEFAULT = bench_mt_bench.BENCHMARK.name


def read_bench(args: argparse.Namespace) -> Bench:
    """The benchmark that the arguments name, read from its folder and checked."""
    if args.bench in BENCHMARKS:
        benchmark = BENCHMARKS[args.bench]
        folder = args.bench_data or args.mt_bench or DATA / benchmark.name
        bench = benchmark.read(folder, args)
    else:
        bench = bench_folder.read(args)
    if args.max_tokens is not None:
        limits = {"max_tokens": args.max_tokens}
        bench = bench._replace(parameters=bench.parameters | limits)
    if (kind := judges.kind_of(args.judge)) in judges.SCORE_KINDS:  # it sees the answers alone
        grading = REWARD if kind == judges.SCORE else PROGRAM
        bench = bench._replace(
            grading=grading, prompts={}, references={}, refs="original", options={}, samples=1
        )
        if kind == judges.PROGRAM:
            bench = bench._replace(baselines={})
    return bench


def turns_of(name: str) -> int | None:
    """Turns of each answer to a benchmark; None: as many as its questions have."""
    return BENCHMARKS[name].turns if name in BENCHMARKS else None


def of_request(request: dict) -> Benchmark:
    """The benchmark whose request this is. MT-Bench's do not name it."""
    return BENCHMARKS[request.get("bench", DEFAULT)]


def read_reply(reply: Reply, request: dict, which: str = FIRST) -> Verdict:
    """The verdict in the reply to `request`, as its benchmark reads it."""
    return of_request(request).read_reply(reply, request, which)
