"""A benchmark of the tests' own: one turn, compared with an outside model's answer in both orders.

The judge replies with a letter, or with its log-probabilities.
"""

from pref.files import mt_bench, win_rates
from pref.judging import reading
from pref.judging.benchmark import Ask, Bench, Benchmark
from pref.judging.reading import Verdict

TEMPLATE = "{question}\nA: {a}\nB: {b}\nEnd with [[A]] or [[B]]."
ARGUMENTS = {"softly": {"action": "store_true", "default": False, "help": "ask for logprobs"}}


def read(folder, args):
    questions = mt_bench.read_questions(folder / "question.jsonl", mt_bench=False)
    parameters = {"temperature": 1, "max_tokens": 16}
    return Bench(
        BENCHMARK,
        folder,
        questions,
        grading="pair",
        prompts={"duel": {"system_prompt": "", "prompt_template": TEMPLATE}},
        label="duel",
        parameters=parameters | ({"logprobs": True} if args.softly else {}),
        baselines={question["question_id"]: "gpt" for question in questions},
        options={"softly": True} if args.softly else {},
    )


def asks(bench, question, turn, answer, other):
    if answer == other:
        return [Ask(messages(question, answer, other), order="1", known=EQUAL)]
    return [
        Ask(messages(question, answer, other), order="1"),
        Ask(messages(question, other, answer), order="2"),
    ]


EQUAL = Verdict("ok", preference=1.5, reading=win_rates.EQUAL)


def messages(question, a, b):
    text = TEMPLATE.format(question=question["turns"][0], a=a[0], b=b[0])
    return [{"role": "user", "content": text}]


def find(text):
    marks = [mark for mark in "AB" if f"[[{mark}]]" in text]
    if len(marks) != 1:
        return None
    return Verdict("ok", winner=marks[0], preference=1 + (marks[0] == "B"), label=f"{marks[0]}!")


def read_reply(reply, request, which):
    if not request["parameters"].get("logprobs"):
        return reading.read_text(reply, find)
    if reply.logprobs is None or "m" not in reply.logprobs:
        return Verdict("no_token")
    return Verdict("ok", preference=1 - reply.logprobs["m"] / 10)


def check_probe(bench, logprobs):
    if bench.options.get("softly") and logprobs is None:
        return "its server gives no log-probabilities"
    return None


BENCHMARK = Benchmark(
    "duel", "Duel", read, asks, read_reply, arguments=ARGUMENTS, check_probe=check_probe
)
