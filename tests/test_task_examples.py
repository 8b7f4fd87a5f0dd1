"""The tasks in examples/tasks: their questions, and every checker on answers judged by hand."""

import importlib.util
import json
import math
import re
import sys
import time
from collections import Counter

import pytest
from conftest import ROOT


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"examples/tasks/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


constraints, sentiment = load("constraints"), load("sentiment")
TASKS = pytest.mark.parametrize("task", [constraints, sentiment], ids=lambda task: task.__name__)


def asked(*pairs) -> dict:
    """A question with these constraints, each (kind, value)."""
    return {"constraints": [{"kind": kind, "value": value} for kind, value in pairs]}


# ---- constraints: reading ----


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("Rain fell. It was cold! Was it? Yes…", 4),
        ("Dr. Weber met Mrs. Lang, e.g. on Monday.", 1),
        ("J. Marsh wrote it. I read it.", 2),
        ("It was he and I. We left.", 2),
        ("Wait... it moved.", 1),
        ("Wait... It moved.", 2),
        ("Well ... yes", 1),
        ('"Stop!" he said. "Why?" She ran.', 3),
        ("It costs 3.50 at shop.example today.", 1),
        ("all small. no capitals. fine", 3),
        ("What?! No!!! Good.", 3),
        ("**One here.** Two here.", 2),
        ("1. Eggs.\n2. Milk\n- Salt. More salt.", 4),
        ("A heading\n\nOne line.\n   \n...\n", 2),
        ("cut off in the mid", 1),
        ("  trailing space.   ", 1),
        ("¿Qué es? Él vino.", 2),
        ("... !!! ???", 0),
        ("", 0),
    ],
)
def test_sentences_are_counted(text, number):
    assert constraints.count_sentences(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It's a well-known 3.5 litre jug.", 6),
        ("Tea—hot tea – please - now", 5),
        ("  one\ttwo\n\nthree  ", 3),
        ("... !!! — * #", 0),
        ("naïve Ænima 東京 שלום", 4),
        ("**bold** *x*", 2),
    ],
)
def test_words_are_counted(text, number):
    assert len(constraints.words(text)) == number


# ---- constraints: every kind, with answers that meet it and that miss it ----

CHECKS = {
    ("words_at_most", 15): (
        ["Rain.", "a b c d e f g h i j k l m n o ...", "- *\n" + "wet " * 15],
        ["a b c d e f g h i j k l m n o p", "wet " * 16],
    ),
    ("words_at_least", 25): (["wet " * 25, "one—two " * 12 + "x"], ["wet " * 24, "- " * 30 + "x"]),
    ("sentences", "one sentence"): (["Rain fell on Mr. Hill.", "Rain"], ["Rain. Sun.", "a\nb"]),
    ("sentences", "two sentences"): (["Rain! Sun", "Ah. Then b c."], ["Rain", "One. Two. Thr"]),
    ("sentences", "three sentences"): (
        ["One two. Three? Four!  \n"],
        ["One. Two.", "A b. C d. E f. G"],
    ),
    ("sentences_at_most", None): (["One.", "One. Two."], ["One. Two. Three"]),
    ("use_word", "often"): (
        ["Often it rains.", "rain (often)", "**often**", "more-often-than-not"],
        ["It softens.", "oftener", "of ten", "often_"],
    ),
    ("use_word_twice", "time"): (
        ["Time after time", "time, time, time"],
        ["One time.", "times, timely"],
    ),
    ("avoid_word", "the"): (["There they are", "Theatre"], ["THE end", 'say "the"', "the-end"]),
    ("avoid_letter", "b"): (["Rain fell.", "ß"], ["A bee", "B", "rain\n\nab"]),
    ("begin_with", "Today"): (
        ["Today, rain.", "today", "  \nToday's rain", "TODAY: rain"],
        ["Todays rain", "**Today** it rains", '"Today"', "It is Today", "Todayish"],
    ),
    ("end_with", "today"): (
        [
            "It rains today",
            "Rain today!\n",
            'He said "today."',
            "Today",
            "**today**.",
            "(today…)",
            "rain—today",
        ],
        ["today it rains", "It rains today, too", "todays", "yesterday", "today:"],
    ),
    ("end_with_question", None): (
        ["Why?", 'He asked: "Why?"  \n', "**Why?**", "Why?!?"],
        ["Why? Because.", "Why?!", "Why", "Why ？"],
    ),
    ("no_comma", None): (["Rain; sun", "1.5 litres"], ["Rain, sun", "1,000"]),
    ("digits", None): (["7 hills", "in 1999", "٣"], ["seven", "VII", "½"]),
    ("colon", None): (["Note: rain", "10:30"], ["Note; rain", "Note"]),
    ("quotes", None): (
        ['a "wet" day', "“Wet” day", 'x "" "wet" y'],
        ['a "wet day', "'wet'", '"" rain', 'rain " " rain', '"...": no'],
    ),
    ("capitals", None): (
        ["so WET", "A TV set", "I'M in", "B2B"],
        ["So Wet", "I am A. B.", "X1", "sO"],
    ),
    ("bullets", None): (
        ["* rain\n* sun", "Here:\n  - rain\n\n  • sun\n", "*\train\r\n* sun"],
        ["* rain", "*rain\n*sun", "* * *\n- - -\nrain", "1. rain\n2. sun", "rain * sun\n"],
    ),
    ("numbered_list", None): (
        ["1. rain\n2. sun", "So:\n1) rain\n\n 2) sun"],
        ["1. rain", "1.rain\n2.sun", "1.\n2.\nrain", "* rain\n* sun", "1234. a\n1235. b"],
    ),
    ("json", "text"): (
        [
            '{"text": "rain"}',
            ' {"a": [1], "text": null}\n',
            '```json\n{"text": 1}\n```',
            '```\n{"text": 1}\n```\n',
        ],
        [
            '{"Text": 1}',
            '{"text": "ra',
            '["text"]',
            '"text"',
            'Here: {"text": 1}',
            "{'text': 1}",
            "7",
            "[" * 100_000 + "1",
        ],
    ),
}


def test_every_kind_has_answers_by_hand():
    assert {kind for kind, _ in CHECKS} == set(constraints.KINDS)


@pytest.mark.parametrize(
    ("kind", "value", "answer", "met"),
    [
        pytest.param(*key, answer, met, id=f"{key[0]}-{met}-{place}")
        for key, answers in CHECKS.items()
        for met, some in zip((True, False), answers)
        for place, answer in enumerate(some)
    ],
)
def test_a_constraint_is_met_or_missed(kind, value, answer, met):
    question = asked((kind, value))
    assert constraints.score(question, answer) == float(met)
    assert constraints.explain(question, answer)["text"].endswith(", met" if met else ", missed")


@pytest.mark.parametrize("answer", ["", "   \n\t", "...", "**", "\x00\x1f", "\u200b\ufeff", "🌧"])
def test_an_answer_without_a_word_meets_nothing(answer):
    for kind, (_, _, _, values) in constraints.KINDS.items():
        question = asked((kind, values[0]))
        assert constraints.score(question, answer) == 0
        assert constraints.explain(question, answer)["scores"] == {"forgiving": 0}


def test_the_score_is_the_share_and_the_explanation_says_what_was_found():
    question = asked(("words_at_most", 15), ("no_comma", None))
    answer = "wet, " * 23
    assert constraints.score(question, "wet " * 23) == 0.5
    assert constraints.explain(question, answer) == {
        "text": "Use at most 15 words: 23 words, missed; Do not use commas: 23 commas, missed",
        "scores": {"forgiving": 0.0},
    }


@pytest.mark.parametrize(
    ("kind", "value", "answer"),
    [
        ("begin_with", "Today", "**Today** it rains."),
        ("begin_with", "Today", "Sure, here it is:\nToday it rains."),
        ("end_with_question", None, "Does it rain?\nI hope this helps."),
        ("sentences", "one sentence", "## Rain\nIt rains.\nI hope this helps!"),
        ("json", "text", '`{"text": "rain"}`'),
    ],
)
def test_the_forgiving_reading_takes_marks_and_outer_lines_off(kind, value, answer):
    question = asked((kind, value), ("words_at_least", 25))
    assert constraints.score(question, answer) == 0
    assert constraints.explain(question, answer)["scores"] == {"forgiving": 0.5}


def test_a_decomposed_letter_counts_like_a_composed_one():
    assert constraints.score(asked(("use_word", "people")), "people\u0301") == 0
    assert constraints.score(asked(("words_at_most", 15)), "cafe\u0301 " * 15) == 1


# ---- questions ----


@pytest.mark.parametrize("number", [1, 7, 19, 40, 97, 300, 1500])
def test_kinds_are_evenly_spread(number):
    rows = constraints.questions("train", number, 3)
    kinds = [[one["kind"] for one in row["constraints"]] for row in rows]
    assert [len(both) for both in kinds] == [1 + place % 2 for place in range(number)]
    for some, most_apart in (
        ([both[0] for both in kinds if len(both) == 1], 1),
        ([both[0] for both in kinds if len(both) == 2], 1),
        ([kind for both in kinds for kind in both], 4),
    ):
        counts = [some.count(kind) for kind in constraints.KINDS]
        assert max(counts) - min(counts) <= most_apart


def test_two_constraints_leave_each_other_free():
    families = {name: kind.family for name, kind in constraints.KINDS.items()}
    pairs = {
        tuple(sorted(families[one["kind"]] for one in row["constraints"]))
        for row in constraints.questions("train", 9000, 0)
        if len(row["constraints"]) == 2
    }
    assert pairs == {
        ("beginning and end", "length"),
        ("beginning and end", "marks"),
        ("beginning and end", "words"),
        ("form", "words"),
        ("length", "marks"),
        ("length", "words"),
        ("marks", "words"),
    }


def test_a_word_to_use_is_not_in_a_topic_and_has_no_letter_to_avoid():
    kinds = constraints.KINDS
    asked_for = {
        word
        for name in ("use_word", "use_word_twice", "begin_with", "end_with", "json")
        for word in kinds[name].values
    }
    given = {
        word for topics in constraints.TOPICS.values() for one in topics for word in one.split()
    }
    assert not {word for word in asked_for if word.lower() in given}
    assert not set("".join(asked_for).lower()) & set(kinds["avoid_letter"].values)


def test_the_category_is_the_family_or_two_constraints():
    for row in constraints.questions("test", 200, 0):
        first, *more = row["constraints"]
        family = constraints.KINDS[first["kind"]].family
        assert row["category"] == ("two constraints" if more else family)
        for one in row["constraints"]:
            assert constraints.KINDS[one["kind"]].request.format(one["value"]) in row["turns"][0]


@TASKS
def test_questions_are_rows_of_a_benchmark(task):
    rows = task.questions("train", 120, 7)
    assert json.loads(json.dumps(rows)) == rows
    assert [row["question_id"] for row in rows] == list(range(1, 121))
    assert len({row["turns"][0] for row in rows}) == 120
    assert all(len(row["turns"]) == 1 and row["category"] for row in rows)
    assert "  " not in "".join(row["turns"][0] for row in rows)


@TASKS
def test_questions_depend_on_the_seed_and_on_nothing_else(task):
    rows = task.questions("train", 90, 7)
    assert load(task.__name__).questions("train", 90, 7) == rows
    assert task.questions("train", 40, 7) == rows[:40]
    assert task.questions("train", 90, 8) != rows


@TASKS
def test_splits_share_no_topic(task):
    """No topic of one split is in a prompt of the other, and each is in one of its own."""
    prompts = {
        split: [row["turns"][0] for row in task.questions(split, min(900, most(task, split)), 0)]
        for split in ("train", "test")
    }
    topics = {split: topics_of(task, split) for split in prompts}
    assert len(topics["train"]) >= 60 and len(topics["test"]) >= 40
    for mine, other in (("train", "test"), ("test", "train")):
        text = "\n".join(prompts[mine])
        assert all(re.search(rf"\b{re.escape(topic)}\b", text) for topic in topics[mine])
        assert not [t for t in topics[other] if re.search(rf"\b{re.escape(t)}\b", text)]


def most(task, split: str) -> int:
    """How many questions there are, from the error for too many."""
    with pytest.raises(
        ValueError, match=r"^there are 1 to \d+ \w+ questions, not 1000000$"
    ) as caught:
        task.questions(split, 1_000_000, 0)
    return int(str(caught.value).split()[4])


def topics_of(task, split: str) -> set[str]:
    if task is constraints:
        return set(task.TOPICS[split])
    return {topic for splits in task.TOPICS.values() for topic in task.listed(splits[split])}


@TASKS
def test_there_are_so_many_questions_and_no_more(task):
    every = task.questions("test", most(task, "test"), 0)
    assert len({row["turns"][0] for row in every}) == most(task, "test")
    for number in (0, -1, most(task, "test") + 1):
        with pytest.raises(ValueError, match=f"test questions, not {number}$"):
            task.questions("test", number, 0)
    with pytest.raises(ValueError, match='no split "dev": train or test'):
        task.questions("dev", 5, 0)


# ---- scores computed once more, without the task's code ----

ANSWERS = (
    "Today I often sat by the lake, and it rained.",
    "Sometimes people ask: is it far? It is not. Time and time again, many go; many stay!",
    'He said "No comma here". Was it so?',
    "ONE thing is clear: 3 ducks, 2 geese and a fox live here today.",
    "1. Bread\n2. Salted butter\n3. Jam from the vale",
    "* Bring a coat.\n* Bring boots.",
    '{"text": "Always simple", "answer": 4}',
    "once more",
    "Rain " * 26 + "?",
)


def recount(kind: str, value, text: str) -> bool:
    """The simple kinds in other words; the answers above have none of the hard cases."""
    low = text.lower()
    found = re.findall(r"[a-z]+", low)
    return {
        "words_at_most": lambda: len(re.findall(r"\S*\w\S*", text)) <= value,
        "words_at_least": lambda: len(re.findall(r"\S*\w\S*", text)) >= value,
        "use_word": lambda: value in found,
        "use_word_twice": lambda: Counter(found)[value] > 1,
        "avoid_word": lambda: value not in set(found),
        "avoid_letter": lambda: value not in set(low),
        "begin_with": lambda: found[0] == value.lower() and low[0].isalpha(),
        "end_with": lambda: (
            re.sub(r"\W", " ", low).split()[-1] == value and text[-1] in ".?!" + value
        ),
        "end_with_question": lambda: text.strip().endswith("?"),
        "no_comma": lambda: len(text.split(",")) == 1,
        "digits": lambda: bool(set(text) & set("0123456789")),
        "colon": lambda: text.find(":") != -1,
        "quotes": lambda: bool(re.search('"[^"]+"', text)),
        "capitals": lambda: bool(re.search(r"\b[A-Z]{2,}\b", text)),
        "bullets": lambda: text[:2] == "* " and "\n* " in text,
        "numbered_list": lambda: text[:3] == "1. " and "\n2. " in text,
        "json": lambda: text[0] == "{" and f'"{value}":' in text,
    }[kind]()


def test_scores_are_recomputed_from_answers(tmp_path):
    """answers.jsonl as gen_mtbench.py writes it, read by code that shares nothing with the task."""
    known = [row for row in constraints.questions("test", 900, 1) if "sentences" not in str(row)]
    path = tmp_path / "answers.jsonl"
    lines = []
    for row in known:
        choices = [{"index": i, "turns": [answer]} for i, answer in enumerate(ANSWERS)]
        lines.append(json.dumps({"question_id": row["question_id"], "choices": choices}))
    path.write_text("\n".join(lines), encoding="utf-8")

    by_id, met = {row["question_id"]: row for row in known}, Counter()
    for line in path.read_text(encoding="utf-8").splitlines():
        answer = json.loads(line)
        question = by_id[answer["question_id"]]
        for choice in answer["choices"]:
            text = choice["turns"][0]
            again = [recount(one["kind"], one["value"], text) for one in question["constraints"]]
            assert constraints.score(question, text) == sum(again) / len(again), (question, text)
            met.update((one["kind"], ok) for one, ok in zip(question["constraints"], again))
    seen = {kind for kind, _ in met}
    assert len(seen) == 17 and len(met) == 2 * len(seen)  # each kind was met and missed


# ---- speed ----


@pytest.mark.parametrize(
    "answer",
    [
        "." * 100_000 + "x",
        '"' * 100_000 + "x",
        "(" * 100_000 + "x",
        "a\n" * 20_000,
        " " * 100_000 + "x",
    ],
    ids=["stops", "quotes", "brackets", "lines", "spaces"],
)
def test_a_long_odd_answer_takes_no_long_time(answer):
    """A checker whose time grows with the square of the length would take minutes."""
    start = time.perf_counter()
    for kind, (_, _, _, values) in constraints.KINDS.items():
        constraints.score(asked((kind, values[-1])), answer)
    assert time.perf_counter() - start < 20


# ---- sentiment ----


def test_sentiment_is_vaders_compound_rescaled():
    """Hand-worked: VADER's lexicon rates "great" 3.1; compound = s / sqrt(s * s + 15)."""
    pytest.importorskip("vaderSentiment")
    compound = 3.1 / math.sqrt(3.1**2 + 15)
    assert sentiment.score({}, "great") == pytest.approx((compound + 1) / 2, abs=1e-4)
    assert sentiment.score({}, "The table has legs") == 0.5
    low, high = (sentiment.score({}, text) for text in ("A horrible day.", "A lovely day."))
    assert 0 <= low < 0.5 < high <= 1
    assert sentiment.explain({}, "great") == {
        "text": "positive 1.0, neutral 0.0, negative 0.0, compound 0.6249",
        "scores": {},
    }


def test_an_answer_without_a_word_has_no_sentiment():
    """Also ":)", which VADER's lexicon would rate as glad."""
    pytest.importorskip("vaderSentiment")
    for answer in ("", "  \n", "...", ":)"):
        assert sentiment.score({}, answer) == 0
        assert sentiment.explain({}, answer) == {"text": "no word", "scores": {}}


def test_without_vader_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    fresh = load("sentiment")
    assert fresh.questions("test", 3, 0)  # needs no VADER
    with pytest.raises(ImportError, match="sentiment.py needs VADER: pip install vaderSentiment"):
        fresh.score({}, "great")
