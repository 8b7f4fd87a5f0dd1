"""Answer a benchmark's questions with every trained run and with the untrained model.

    python gen_mtbench.py results/ --base
        all runs in results/ and the base model -> results/<run_id>/mt_bench/answers.jsonl
    python gen_mtbench.py results/dpo_b0.1_s42 --num_questions 8 --max_new_tokens 64
        a quick look at one run: eight questions, short answers
    python gen_mtbench.py results/ --base --kl
        also log-probabilities of each answer under its run and under the base: choices[].logp and
        logp_base in answers.jsonl
    torchrun --nproc_per_node 8 gen_mtbench.py results/ --base
        the same files from eight GPUs, which take questions from one counter
    python gen_mtbench.py results/ --base --bench alpaca_eval
        another benchmark's questions, which prep_data.py --alpaca_eval has put into
        data/alpaca_eval -> results/<run_id>/alpaca_eval/answers.jsonl
    python gen_mtbench.py results/ --questions mine.json --temperature 0.7 --export alpaca_eval
        other questions -> results/<run_id>/mine/answers.jsonl, and model_outputs.json next to it
        for the program alpaca_eval
    OPENAI_API_KEY=x python gen_mtbench.py results/ --base_url http://localhost:8000/v1
        the same files from an OpenAI-compatible server that serves each run under its run id

Reads   results/<run_id>/args.json and adapter/ or model/ (from train_pref.py), and the questions
        in data/<bench>/ (from prep_data.py; --bench mt_bench by default) or the file of
        --questions.
Writes  results/<run_id>/<bench, or the stem of the questions' file>/answers.jsonl in FastChat's
        schema, plus what reproduces each answer; until all is answered, turns.<rank>.jsonl.

Turn 2 sees the model's own answer to turn 1. Temperatures are MT-Bench's, by category; nothing else
shapes what is drawn (FastChat's script applies the model's own top_p too). Each (question, choice,
turn) has its own seed, and rows of a batch do not see each other: neither other runs nor a restart
change an answer. Another batch size, device or version of torch does so in fp32 only where two
tokens are equally good to six digits, in bf16 more often; and in bf16 the experts of a mixture see
the rest of the batch. Runs with the same weights share their answers. The base is loaded once for
all adapters; the models of --tune full, one after the other. Every turn is on disk as soon
as it is answered: after an interruption, run the same command again. Exit code 1: some answers are
missing; the output names those that were refused.
"""

import pref.files.interrupts  # noqa: F401  isort: skip

import argparse
import contextlib
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from pref.answering import local, questions, served, summary, twins, work
from pref.answering.turns import Store
from pref.answering.work import Base, Bench, Item, Loaded, Run, Sampling
from pref.files import benchmarks, console, disk, run_folders
from pref.files.console import UserError
from pref.model import chat, loading, server, template

PROMPT_ENDS = 600  # characters of the first prompt that are shown at either end

# ---- arguments -----------------------------------------------------------------------------------

# Too long for a line of the declaration.
HELP = {
    "quant": "quantisation of the base model under adapters; auto: as in training",
    "bench": "mt_bench, alpaca_eval, arena_hard_v0.1, arena_hard_v2.0, or another with a folder in "
    "data/ (default: %(default)s)",
    "bench_data": "its data folder (default: data/<bench>)",
    "mt_bench": "data folder of mt_bench (default: %(default)s)",
    "questions": "other questions: JSONL or a JSON list of objects with question_id, turns and "
    "optionally category, or with instruction (AlpacaEval)",
    "temperature": "for all questions; 0 is greedy (default: the benchmark's; MT-Bench's is by "
    "category, alpaca_eval 0.7, arena_hard 0)",
    "max_new_tokens": "most tokens per turn (default: the benchmark's; mt_bench 1024, alpaca_eval "
    "2048, arena_hard 4096)",
    "batch_size": f"answers in flight (0: {local.ROWS_ON_CPU} on CPU, on a GPU what fits)",
    "kl": "then compute log-probabilities of each answer under its run and under the base, for "
    "the KL divergence on the policy's own answers",
    "base_url": "let an OpenAI-compatible server answer; it serves each run under its run id",
    "served_base": "that server's name for the base model (default: --model)",
    "export": "also write what another program reads; alpaca_eval: model_outputs.json",
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="%(prog)s results [run ...] [--option VALUE ...]  (--help explains all of them)",
        description=__doc__,
        formatter_class=console.HelpFormatter,
        allow_abbrev=False,
    )
    dtypes = ["auto", "bfloat16", "float32"]
    add = parser.add_argument
    add("results", type=Path, nargs="+", help="results folder, or run folders in it")
    add("--base", action="store_true", help="answer with the untrained model too (run id: base)")
    add("--model", help="base model (default: the one the runs were trained on)")
    add("--quant", choices=["auto", "nf4", "none"], default="auto", help=HELP["quant"])
    add("--dtype", choices=dtypes, default="auto", help="auto: bf16 if the hardware computes it")

    add = parser.add_argument_group("questions").add_argument
    add("--bench", default=benchmarks.MT_BENCH, metavar="NAME", help=HELP["bench"])
    add("--bench_data", type=Path, metavar="DIR", help=HELP["bench_data"])
    usual = questions.MT_BENCH_FOLDER
    add("--mt_bench", type=Path, default=usual, metavar="DIR", help=HELP["mt_bench"])
    add("--questions", type=Path, metavar="FILE", help=HELP["questions"])
    add("--num_questions", type=int, help="this many, spread over the file (default: all)")
    add("--num_choices", type=int, default=1, help="answers per question, each with its own seed")
    add("--temperature", type=float, help=HELP["temperature"])
    add("--max_new_tokens", type=int, help=HELP["max_new_tokens"])
    add("--seed", type=int, default=42, help="seed for sampling")

    add = parser.add_argument_group("how they are answered").add_argument
    add("--batch_size", type=int, default=0, help=HELP["batch_size"])
    add("--kl", action="store_true", help=HELP["kl"])
    add("--base_url", help=HELP["base_url"])
    add("--served_base", metavar="NAME", help=HELP["served_base"])
    add("--concurrency", type=int, default=32, help="conversations at a time with the server")
    add("--timeout_s", type=float, default=600, help="seconds to wait for one answer of the server")
    add("--export", choices=list(EXPORTS), help=HELP["export"])
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """Raise UserError for a value out of range."""
    for name in ("max_new_tokens", "num_choices", "concurrency", "timeout_s"):
        value = getattr(args, name)
        if value is not None and not value >= 1:  # nor NaN
            raise UserError(f"--{name} {value}: must be at least 1")
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: must be 0 or more")
    if args.batch_size < 0:
        raise UserError(f"--batch_size {args.batch_size}: must be 0 (automatic) or more")
    if args.temperature is not None and not 0 <= args.temperature < 10:
        raise UserError(f"--temperature {args.temperature}: must be from 0 (greedy) to below 10")
    is_mt_bench = benchmarks.name_of(args.bench) == benchmarks.MT_BENCH
    if args.questions and (args.bench_data or not is_mt_bench):
        raise UserError("--questions: the file takes the place of --bench and --bench_data")
    if args.mt_bench != questions.MT_BENCH_FOLDER and (args.bench_data or not is_mt_bench):
        raise UserError(
            f"--mt_bench {args.mt_bench}: the data folder of mt_bench; give --bench_data alone"
        )
    if args.base_url and "RANK" in os.environ:
        raise UserError(
            "--base_url: the server has the GPUs; start gen_mtbench.py without torchrun"
        )


# ---- who answers ---------------------------------------------------------------------------------


def collect_runs(args: argparse.Namespace) -> tuple[list[Run], Base]:
    """The runs to answer for, and the base model under all of them.

    Raises UserError if there is nothing to answer with, or the runs need different base models.
    """
    # 1) Trained runs that have weights. With --base there need not be any.
    has_runs = any(
        (folder / "args.json").is_file()
        for path in args.results
        for folder in (path, *path.glob("*"))
    )
    folders = run_folders.find_runs(args.results) if has_runs or not args.base else []
    named = [path for path in args.results if path.resolve().name == run_folders.BASE_RUN]
    if named and not args.base:
        raise UserError(f"{named[0]}: the untrained model answers with --base; give that as well")
    runs = [run for folder in folders if (run := read_run(folder)) is not None]
    place = args.results[0]
    if not runs and not args.base:
        raise UserError(
            f"{place}: no trained runs here; train with train_pref.py, or give --base --model MODEL"
        )
    for run_id, count in Counter(run.run_id for run in runs).items():
        if count > 1:
            raise UserError(
                f"{place}: run id {run_id} is in {count} of these folders; answer for one folder "
                "at a time"
            )

    base = base_of(args, runs)

    # 2) The untrained model as a run of its own, first.
    if args.base:
        results = (runs[0].folder if runs else named[0]).parent if runs or named else place
        runs.insert(0, base_run(results / run_folders.BASE_RUN, base))
    return runs, base


def base_of(args: argparse.Namespace, runs: list[Run]) -> Base:
    """The base model that all runs were trained on, unless the arguments name another one."""
    place = args.results[0]
    models = sorted({model for run in runs if (model := run.record.get("model"))})
    # A model whose parameters were all trained is not quantised, whatever the adapters' base is.
    quants = {run.record.get("quant") for run in runs if run.model is None}
    # Of several names of one folder, the one that leads there.
    model = next(iter([m for m in models if Path(m).is_dir()] + models), None)
    if not (args.model or all(work.may_be_same_model(name, model) for name in models)):
        raise UserError(
            f"{place}: runs have different base models ({', '.join(models)}); "
            "answer for them separately"
        )
    if len(quants) > 1 and args.quant == "auto":
        raise UserError(
            f"{place}: runs were trained with different quantisation of the base "
            f"({sorted(map(str, quants))}); give --quant"
        )
    quant = next(iter(quants), "none")
    base = Base(
        model=args.model or model,
        quant=quant if args.quant == "auto" else args.quant,
    )
    needs_model = args.base or args.kl or not args.base_url
    if base.model is None and needs_model:
        raise UserError(f"{place}: no run here records its base model; give --model")
    return base


def read_run(folder: Path) -> Run | None:
    """A trained run; None, with a line to the user, for one without finished weights."""
    record = disk.read_json(folder / "args.json")
    if record.get("run_id") == run_folders.BASE_RUN:
        return None
    if (folder / "metrics.jsonl").is_file() and not (folder / "summary.json").is_file():
        print(f"{folder}: training has not finished; left out", flush=True)
        return None
    weights = run_folders.weights_of(folder)
    sha256 = run_folders.weights_sha256(folder)
    if sha256 is None:
        is_finished = (folder / "summary.json").is_file()
        why = "removed since, or the run diverged" if is_finished else "unfinished or diverged"
        print(f"{folder}: no {weights.name} ({why}); left out", flush=True)
        return None
    is_full = run_folders.tune_of(record) == "full"
    return Run(
        folder=folder,
        run_id=folder.resolve().name,
        adapter=None if is_full else weights,
        model=weights if is_full else None,
        sha256=sha256,
        record=record,
    )


def base_run(folder: Path, base: Base) -> Run:
    """The run `base`: a folder with args.json and answers, like the others, but no weights."""
    record = {
        "run_id": run_folders.BASE_RUN,
        "loss": None,
        "beta": None,
        "tau": None,
        "seed": None,
        "mode": "full",
        "model": base.model,
        "quant": base.quant,
        "versions": disk.versions(),
    }
    if (folder / "args.json").is_file():
        old = disk.read_json(folder / "args.json")
        same = work.may_be_same_model(old.get("model"), base.model)
        if not same or old.get("quant") != base.quant:
            raise UserError(
                f"{folder}: holds answers of base model {old.get('model')} "
                f"(quant {old.get('quant')}), not of {base.model} (quant {base.quant}); "
                "remove the folder"
            )
    elif os.environ.get("RANK", "0") == "0":
        disk.write_json(folder / "args.json", record)
    return Run(folder, run_folders.BASE_RUN, adapter=None, sha256=None, record=record)


# ---- what is asked -------------------------------------------------------------------------------


def load_bench(args: argparse.Namespace) -> Bench:
    """The questions that the arguments name. Raises UserError for those that cannot be asked."""
    is_mt_bench = benchmarks.name_of(args.bench) == benchmarks.MT_BENCH
    folder = args.bench_data or (args.mt_bench if is_mt_bench else None)
    bench = questions.load_bench(
        args.bench, folder, args.questions, args.temperature, args.num_questions
    )
    if args.export and any(len(question["turns"]) > 1 for question in bench.questions):
        raise UserError(
            f"--export {args.export}: its format holds one turn per question, but {bench.name} has "
            "questions with several; leave the option out"
        )
    return bench


def print_asked(bench: Bench, sampling: Sampling) -> None:
    """How a benchmark is answered that does not fix it: every such number is a choice."""
    if not bench.free:
        return
    temperatures = sorted({question["temperature"] for question in bench.questions})
    shown = ", ".join(f"{temperature:g}" for temperature in temperatures)
    print(
        f"{bench.name}: {len(bench.questions)} questions, temperature {shown}, up to "
        f"{sampling.max_new_tokens} tokens. The benchmark fixes neither (--temperature, "
        "--max_new_tokens); report both",
        flush=True,
    )


def export_alpaca_eval(store: Store, table: dict[str, list[dict]]) -> None:
    """Write model_outputs.json next to each run's answers.jsonl, as alpaca_eval reads it."""
    for run in store.runs:
        outputs = []
        for row in table[run.run_id]:
            question = store.questions[row["question_id"]]
            outputs.append(
                {
                    "dataset": question.get("dataset") or store.bench.name,
                    "instruction": question["turns"][0],
                    "output": row["choices"][0]["turns"][0],
                    "generator": run.run_id,
                }
            )
        text = json.dumps(outputs, indent=1, ensure_ascii=False) + "\n"
        disk.write_text(store.folder(run) / "model_outputs.json", text)


EXPORTS = {"alpaca_eval": export_alpaca_eval}


# ---- the stage -----------------------------------------------------------------------------------


def settings_of(
    args: argparse.Namespace, base: Base, dtype: str, sampling: Sampling, client
) -> dict:
    """What an answer depends on besides question and adapter; written to each row."""
    settings = {
        "model": base.model,
        "quant": base.quant if client is None else None,
        "dtype": dtype if client is None else None,
        "max_new_tokens": sampling.max_new_tokens,
        "seed": sampling.seed,
    }
    if client is None:
        # Without the model, answers that are complete can still be summed up; load_author says what
        # is wrong with it.
        with contextlib.suppress(UserError):
            settings |= template.settings_of(chat.load_tokenizer(base.model))
    else:
        settings["server"] = server.address(client)
    if args.num_choices > 1:
        settings["num_choices"] = args.num_choices
    return settings


def show_prompt(author: local.Author, bench: Bench) -> None:
    messages = work.conversation(bench.questions[0], [])
    text = chat.render(author.tokenizer, messages, generation_prompt=True)
    if len(text) > 2 * PROMPT_ENDS:  # its ends show what the template makes of it
        left_out = f" [{len(text) - 2 * PROMPT_ENDS:,} characters not shown] "
        text = text[:PROMPT_ENDS] + left_out + text[-PROMPT_ENDS:]
    model = "the model" if author.loaded.full is None else author.loaded.model
    print(f"first prompt as {model} sees it:\n" + json.dumps(text, ensure_ascii=False), flush=True)


def print_next(args: argparse.Namespace, bench: Bench, runs: list[Run]) -> None:
    """Where the answers are, and the command that judges them."""
    folder = run_folders.folder_of(runs[-1].folder)
    print(f"\nanswers: {folder}/<run_id>/{bench.name}/answers.jsonl")
    results = " ".join(map(str, args.results))
    if bench.folder is None:  # questions of the user's own, which no judge here knows
        return
    if bench.name == benchmarks.MT_BENCH:
        usual = bench.folder == questions.MT_BENCH_FOLDER
        data = "" if usual else f" --mt_bench {bench.folder}"
    else:
        usual = bench.folder == benchmarks.usual_folder(bench.name)
        data = f" --bench {bench.name}" + ("" if usual else f" --bench_data {bench.folder}")
    command = f"python judge.py {results}{data} --judge"
    if (task := benchmarks.task_file(bench.folder)) is not None:
        print(f"next: {command} py:{task}    (its path, if it is in another folder)", flush=True)
        return
    command += " MODEL"
    print(f"next: {command} [--base_url URL], or --judge hf:FOLDER", flush=True)


def share_answers(store: Store, workers: work.Workers) -> None:
    """Every rank gets the other ranks' answers, and every run its twins'."""
    if workers.is_main:
        gather(store)
    work.wait_for_all()
    store.load()


def gather(store: Store) -> dict[str, list[dict]]:
    """Write answers.jsonl, once more if runs with the same weights share new ones."""
    table = store.gather()
    if twins.adopt(store):
        table = store.gather()
    return table


def answer_with(
    load: Callable[[Loaded], local.Author],
    loaded: Loaded,
    store: Store,
    items: list[Item],
    missing: list[Item],
    workers: work.Workers,
    kl: bool,
) -> None:
    """Load a model, answer `missing` with it and, if `kl`, compute the log-probabilities that it
    can. Nothing is loaded if there is nothing to do. items: all conversations of this call.
    """
    unscored = work.from_main(store.unscored(items, loaded)) if kl else []
    if not missing and not unscored:
        return
    author = load(loaded)
    if workers.is_main:
        show_prompt(author, store.bench)
    local.answer_all(author, missing, workers)
    if kl:
        work.wait_for_all()
        share_answers(store, workers)
        unscored = work.from_main(store.unscored(items, loaded))
        local.score_all(author, items, unscored, workers)
    del author
    local.free_memory()


def main(argv: list[str] | None = None) -> int:
    # 1) Everything that can be wrong without a model: arguments, runs, questions, the server's key.
    args = parse_args(argv)
    check_args(args)
    runs, base = collect_runs(args)
    bench = load_bench(args)
    client = None
    if args.base_url:
        client = server.open_client("--base_url", args.base_url, args.timeout_s, max_retries=5)

    # 2) What an earlier start has answered already, and what is missing.
    workers = work.init_workers()
    dtype = loading.pick_dtype(args.dtype, workers.device)
    sampling = Sampling(args.seed, args.max_new_tokens or bench.max_new_tokens)
    settings = settings_of(args, base, local.dtype_name(dtype), sampling, client)
    store = Store(runs, bench, settings, args.batch_size or args.concurrency, workers.rank)
    items = work.all_items(runs, bench, args.num_choices)
    if workers.is_main:
        print_asked(bench, sampling)
        twins.adopt(store)
    numbers = twins.first_of_each(store, items, store.unanswered(items))
    missing = [items[number] for number in work.from_main(numbers)]

    try:
        # 3) The server answers ...
        if client is not None:
            name = args.served_base or base.model
            served.answer_all(client, store, missing, sampling, name, args.concurrency)

        # 4) ... or the engine, which also computes log-probabilities, of a server's answers too:
        # with one model after the other.
        def load(loaded: Loaded) -> local.Author:
            return local.load_author(
                store, loaded, dtype, workers.device, sampling, batch_size=args.batch_size
            )

        for loaded in work.loads_of(runs, base):
            own = [item for item in missing if client is None and item.run in loaded.runs]
            answer_with(load, loaded, store, items, own, workers, args.kl)
        work.wait_for_all()
    finally:
        # 5) answers.jsonl from the turns, also after an error: complete answers are usable.
        table = gather(store) if workers.is_main else {}

    # 6) The summary, and whether anything is missing.
    if not workers.is_main:
        return 0
    if args.export:
        EXPORTS[args.export](store, table)
    summary.print_summary(store, table)
    summary.print_notes(store, table)
    summary.print_cut(store, table, sampling)
    summary.print_unlike(store, table)
    summary.print_failures(store)
    print_next(args, bench, runs)
    return 0 if summary.is_complete(store, table, args.kl) else 1


if __name__ == "__main__":
    console.run_main(main)
