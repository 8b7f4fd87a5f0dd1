"""AlpacaEval 2.0: what a judge is asked, and how its reply becomes a preference.

A judge sees one instruction and two outputs, which are called m (the first) and M (the second), and
names the better one. Which is shown first is decided by the instruction (`order_of`). The requests
and, with log-probabilities, the preferences are those of the package alpaca_eval (version 0.6.6,
annotator weighted_alpaca_eval_gpt4_turbo); tests/test_alpaca_eval.py compares them.

How a preference is found (--preference):

    weighted   from the probabilities of m and M as the first token: AlpacaEval's way
    sampled    from the letters of several replies (--samples)
    binary     from the letter of one reply at temperature 0
    both       the same in both orders, so that the position does not count

The last three are for servers without log-probabilities, and another judge each. With --max_tokens
above 1 the judge may reason before it names a letter.
"""

import argparse
import math
import random
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from pref.files import benchmarks, win_rates
from pref.files.alpaca_eval_download import BASELINE, END, PROMPT, START
from pref.files.console import UserError
from pref.files.judgements import ORDERS, RUN_IS_A, RUN_IS_B
from pref.judging import annotations, reading
from pref.judging.benchmark import PAIR, Ask, Bench, Benchmark, Choices
from pref.judging.identity import TOKEN_LIMITS
from pref.judging.reading import Reply, Verdict

NAME = "alpaca_eval"
# The package leaves temperature and top_p at their neutral values: log-probabilities are then the
# model's own, also on servers that divide by the temperature first.
FIRST_TOKEN = {"max_tokens": 1, "temperature": 1, "top_p": 1}
TOP = 5  # of the first token's alternatives
WEIGHTED, SAMPLED, BINARY, BOTH = "weighted", "sampled", "binary", "both"
PARAMETERS = {
    WEIGHTED: FIRST_TOKEN | {"logprobs": True, "top_logprobs": TOP},
    SAMPLED: FIRST_TOKEN,
    BINARY: {"max_tokens": 1, "temperature": 0},
    BOTH: {"max_tokens": 1, "temperature": 0},
}
SAMPLES = 4  # --samples
REASONED_TOKENS = 500  # of a reply that reasons, for a first estimate
SEED = "0"  # of the package's annotator

JOINER = "\u200d"  # zero width
FIELDS = ("instruction", "output_1", "output_2")  # in the order in which they are filled
FIRST, SECOND = "m", "M"  # the two outputs' names in the prompt
MOST_LOGPROB = 1e-3  # rounding; more than this is no log-probability
# A letter that is a word of its own: "M", "**M**", "'m'", "{M}", but not the m of "I'm".
ALONE = re.compile(r"(?<!\w)(?<!\w['’])[mM](?!\w)(?!['’]\w)")


# ---- what is sent --------------------------------------------------------------------------------


def order_of(instruction: str) -> str:
    """Which answer the package shows first: RUN_IS_A or RUN_IS_B."""
    switched = random.Random(f"is_switched_outputs{instruction}{SEED}").choices([False, True], k=1)
    return RUN_IS_A if switched[0] else RUN_IS_B


def messages(template: str, instruction: str, baseline: str, run: str, order: str) -> list[dict]:
    """The prompt's messages. baseline, run: the two outputs.

    The texts go in one after the other, so that "{output_1}" within an instruction is filled as
    well, and the whole is split afterwards: an output that holds END cuts off what follows it, and
    one that holds START begins a message. That is what the package sends; `neutralise` prevents it.
    """
    first, second = (run, baseline) if order == RUN_IS_A else (baseline, run)
    prompt = template
    for field, text in zip(FIELDS, (instruction, first, second)):
        prompt = prompt.replace(f"{{{field}}}", text, 1)
    return split(prompt)


def split(prompt: str) -> list[dict]:
    """The messages of a prompt in ChatML."""
    return [message_of(part) for part in prompt.strip().split(START)[1:]]


def message_of(part: str) -> dict:
    """One message: the role on the first line, then the content, up to the first END."""
    role, _, content = part.partition("\n")
    message = {"role": role.strip(), "content": content.split(END, 1)[0].strip()}
    if message["role"].startswith("system "):  # "system name=example_user": further fields
        pairs = [word.partition("=") for word in message["role"].split(" ")[1:] if word]
        if all(equals and name not in message for name, equals, _ in pairs):
            return message | {"role": "system"} | {name: value for name, _, value in pairs}
    return message


def neutralise(text: str) -> str:
    """`text` with a zero-width joiner in START and END, so that they no longer split the prompt."""
    for token in (START, END):
        text = text.replace(token, f"{token[:2]}{JOINER}{token[2:]}")
    return text


def asks(
    bench: Bench, question: dict, turn: int, answer: list[str], other: list[str] | None
) -> list[Ask]:
    """One comparison, or with --preference both one in each order. Two equal answers are a draw for
    which nobody is asked.
    """
    texts = [question["turns"][0], other[0], answer[0]]
    is_equal = texts[1] == texts[2]
    if bench.options.get("neutralise"):
        texts = [neutralise(text) for text in texts]
    orders = ORDERS if bench.options.get("preference") == BOTH else [order_of(question["turns"][0])]
    draw = Verdict("ok", preference=win_rates.DRAW, reading=win_rates.EQUAL) if is_equal else None
    template = bench.prompts[NAME]["prompt_template"]
    return [Ask(messages(template, *texts, order), order, known=draw) for order in orders]


# ---- what comes back -----------------------------------------------------------------------------


def read_reply(reply: Reply, request: dict, which: str = reading.FIRST) -> Verdict:
    """The preference in a reply, as its request asked for it. which: has no meaning here."""
    parameters = request["parameters"]
    if parameters.get("logprobs"):
        return read_logprobs(reply.logprobs or {}, parameters.get("top_logprobs", TOP))
    return read_letter(reply, reasons=may_reason(parameters))


def may_reason(parameters: dict) -> bool:
    """Whether a judge may write more than the letter."""
    limits = [v for k, v in parameters.items() if k in TOKEN_LIMITS]
    return max(limits, default=math.inf) > 1


def read_logprobs(top: dict[str, float], most: int = TOP) -> Verdict:
    """The preference by the log-probabilities of the likeliest first tokens, of which `most` were
    asked for.

    Only the tokens "m" and "M" count, not " M" or "model"; if one is missing its probability is 0,
    if both are, there is no preference. A server that gives one token more than it was asked for
    adds the one that it has sampled; with it, a preference would depend on the draw.
    """
    if any(math.isnan(logprob) or logprob > MOST_LOGPROB for logprob in top.values()):
        return Verdict("no_logprobs")
    likeliest = sorted(top, key=top.get, reverse=True)[:most]
    found = {token: top[token] for token in likeliest if token in (FIRST, SECOND)}
    if not found:
        return Verdict("no_token" if top else "no_logprobs")
    if len(found) == 1:
        return Verdict("ok", preference=1.0 + (SECOND in found))
    return Verdict("ok", preference=win_rates.of_log_odds(found[SECOND] - found[FIRST]))


def read_letter(reply: Reply, reasons: bool) -> Verdict:
    """The letter that a reply names.

    reasons: the judge may write more; its letter is the last that stands alone on the last line
    behind its thoughts, if it came to its end. Otherwise the reply must be the letter, and nothing
    else.
    """
    if reasons:
        verdict = reading.read_text(reply, find_letter, needs_end=True)
        return verdict._replace(status="no_token") if verdict.status == "parse" else verdict
    text = reply.text.strip()
    if text in (FIRST, SECOND):
        return letter_verdict(text)
    return Verdict("no_token" if text else "empty")


def find_letter(text: str) -> Verdict | None:
    lines = text.rstrip().split("\n")
    found = ALONE.findall(lines[-1])
    return letter_verdict(found[-1]) if found else None


def letter_verdict(letter: str) -> Verdict:
    second = letter == SECOND
    return Verdict("ok", winner="B" if second else "A", preference=1.0 + second)


def choices(bench: Bench) -> Choices:
    """A local judge is asked for the probabilities of the two letters as its first token."""
    return Choices(
        prefix="",
        texts=(FIRST, SECOND),
        closing="",
        read=lambda probabilities: Verdict("ok", preference=1 + probabilities[1]),
    )


NO_LOGPROBS = (
    "the server gives no log-probabilities of the first token (choices[0].logprobs.content[0]"
    ".top_logprobs), from which AlpacaEval 2 takes its preferences. Serve the model with them, or "
    "choose another way, whose win rates are labelled as such and not comparable with published "
    f"ones: --preference {SAMPLED} --samples K (the letters of K replies), --preference {BINARY} "
    f"(the letter of one reply) or --preference {BOTH} (one reply in each order)"
)


def check_probe(bench: Bench, logprobs: dict | None) -> str | None:
    """The complaint that a server gives no log-probabilities where they are needed."""
    if not bench.parameters.get("logprobs"):
        return None
    read = read_logprobs(logprobs or {})
    return NO_LOGPROBS if read.status == "no_logprobs" else None


# ---- files and arguments -------------------------------------------------------------------------


def read(folder: Path, args: argparse.Namespace) -> Bench:
    """Questions and the judge prompt of a data folder, with the arguments applied."""
    data = benchmarks.open_folder(NAME, folder)
    questions = benchmarks.read_questions(data)
    for question in questions:
        if len(question["turns"]) != 1:
            raise UserError(
                f"{data.questions_file}: question {question['question_id']} has "
                f"{len(question['turns'])} turns; AlpacaEval's instructions have one"
            )
    template = read_template(data.folder / PROMPT)
    options: dict = {}
    if args.preference != WEIGHTED:
        options["preference"] = args.preference
        if may_reason(args.parameters or {"max_tokens": args.max_tokens or 1}):
            options["reasons"] = True
    if args.neutralise:
        options["neutralise"] = True
    system, benchmark = split(template)[0], BENCHMARK
    if options.get("reasons"):
        benchmark = benchmark._replace(completion_tokens=REASONED_TOKENS)
    return Bench(
        benchmark=benchmark,
        folder=data.folder,
        questions=[q | {"category": q.get("category") or q.get("dataset")} for q in questions],
        grading=PAIR,
        prompts={
            NAME: {
                "system_prompt": system["content"] if system["role"] == "system" else "",
                "prompt_template": template,
            }
        },
        label="own" if options else benchmarks.label_of(data),
        parameters=PARAMETERS[args.preference],
        baselines={question["question_id"]: BASELINE for question in questions},
        options=options,
        samples=(args.samples or SAMPLES) if args.preference == SAMPLED else 1,
    )


def read_template(path: Path) -> str:
    """The judge prompt. Raises UserError if it cannot be filled in and split."""
    try:
        template = path.read_bytes().decode()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run python prep_data.py --alpaca_eval") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: {error}") from None
    fields = re.findall(r"{([^ \s]+?)}", template)
    if fields != list(FIELDS):
        listed = ", ".join(f"{{{field}}}" for field in FIELDS)
        raise UserError(f"{path}: must hold {listed}, each once and in this order, and no other")
    text = template.strip()
    if not (text.startswith(START) and text.endswith(END)):
        raise UserError(f"{path}: must begin with {START} and end with {END}")
    return template


ARGUMENTS = {
    "preference": {
        "choices": tuple(PARAMETERS),
        "default": WEIGHTED,
        "help": "where AlpacaEval's preference comes from: log-probabilities of the first token "
        "(weighted), the letters of --samples replies (sampled), the letter of one reply at "
        "temperature 0 (binary), or of one in each order (both). The last three serve where a "
        "server gives no log-probabilities, and are labelled own (default weighted)",
    },
    "samples": {
        "type": int,
        "metavar": "K",
        "help": f"replies per question of --preference sampled (default {SAMPLES})",
    },
    "neutralise": {
        "action": "store_true",
        "default": False,
        "help": "put a zero-width joiner into <|im_start|> and <|im_end|> of instructions and "
        "answers; without, they cut and split the judge's prompt, as in the package alpaca_eval. "
        "Labelled own",
    },
    "import_annotations": {
        "type": Path,
        "metavar": "FILE",
        "help": "store the judgements of an annotations.json of alpaca_eval that belong to these "
        "answers; --judge names its annotator, or the annotator's model; send nothing",
    },
}


def check(args: argparse.Namespace) -> None:
    """Raise UserError for arguments that do not fit together."""
    way, parameters = args.preference, args.parameters
    if args.samples is not None and way != SAMPLED:
        raise UserError("--samples K: only with --preference sampled")
    if args.samples is not None and args.samples < 1:
        raise UserError(f"--samples {args.samples}: must be at least 1")
    if (args.judge or "").startswith("hf:") and way != WEIGHTED:
        raise UserError(
            f"--preference {way} is for a judge behind a server: hf:PATH says the probabilities of "
            "both letters"
        )
    if args.import_annotations and (way != WEIGHTED or args.neutralise):
        raise UserError(
            "--import_annotations is for AlpacaEval's own way: no --preference, and no --neutralise"
        )
    if parameters is None:
        return
    top = parameters.get("top_logprobs")
    if way == WEIGHTED and not (parameters.get("logprobs") and type(top) is int and top >= 2):
        raise UserError(
            '--parameters: --preference weighted needs "logprobs": true and "top_logprobs" (5)'
        )
    if way != WEIGHTED and parameters.get("logprobs"):
        raise UserError(f"--parameters: --preference {way} reads letters; leave out logprobs")


# ---- what is printed -----------------------------------------------------------------------------


def notes(bench: Bench, items: Iterable) -> list[str]:
    """How many of each run's prompts are not as they should be, because an instruction or an answer
    holds START or END. items: `store.Item`s.
    """
    expected = split(bench.prompts[NAME]["prompt_template"])
    tail = expected[-1]["content"].rsplit("{output_2}", 1)[-1]
    cut = defaultdict(set)
    for item in items:
        sent = item.request["messages"]
        if len(sent) != len(expected) or not sent[-1]["content"].endswith(tail):
            cut[item.model_id].add((item.question_id, item.choice))
    return [
        f"run {run}: {len(found)} prompts hold control tokens, {START} or {END}, which cut or "
        "split them as in the package alpaca_eval; --neutralise prevents it (labelled own)"
        for run, found in sorted(cut.items())
    ]


BENCHMARK = Benchmark(
    name=NAME,
    title="AlpacaEval 2",
    read=read,
    asks=asks,
    read_reply=read_reply,
    question_file="questions.json",
    arguments=ARGUMENTS,
    check=check,
    check_probe=check_probe,
    choices=choices,
    notes=notes,
    export=annotations.write_annotations,
    completion_tokens=1,
)
