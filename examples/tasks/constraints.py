"""Checkable instructions: a short text on a topic, under constraints that a program can check.

The idea is IFEval's (Zhou et al. 2023, arXiv 2311.07911). Texts and checkers are made for small
models, whose answers have some fifty tokens. The score is the share of a question's constraints
that the answer meets as it stands. `explain` adds "forgiving", after IFEval's loose accuracy: a
constraint counts as met if one of eight readings meets it: with and without markdown's marks, the
first line, the last line.

What the checkers count
- A word: what stands between spaces or long dashes and has a letter or a digit. "well-known",
  "don't" and "3.5" are one word each.
- A sentence ends with . ! ? or an ellipsis before a space, and with its line, cut off or not. It
  does not end after an abbreviation ("Dr.", "e.g."), after an initial, or where a lower-case word
  follows an ellipsis or a closing quote.
- Words and letters are compared without regard to case. A word is found as a whole: "art" is not
  in "party", but it is in "art's" and "art-lover". é is another letter than e.
- "Twice" and "one word in capitals" ask for as many or more; "exactly" and "at most" say so.
- A list has at least two lines with a bullet (-, *, •) or with a number (1. or 1)). JSON may
  stand in a code fence.
- An answer without a word meets nothing. Otherwise silence would avoid every comma.

To add a kind: a function (answer, value) -> (met, what was found), and a row in KINDS. Kinds that
the model always or never meets teach it nothing.
"""

import json
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

GENERATION = {"temperature": 1.0, "max_new_tokens": 48}

# ---- reading an answer ----

OPENING = "\"'“‘([{<*_"
CLOSING = "\"'”’)]}>*_"
STOPS = (".", "!", "?", "…")
ABBREVIATIONS = {"mr", "mrs", "ms", "dr", "prof", "st", "vs", "e.g", "i.e", "approx", "jr", "sr"}
BULLET = re.compile(r"\s*[-*•]\s")
NUMBERED = re.compile(r"\s*\d{1,3}[.)]\s")


def has_word(text: str) -> bool:
    return any(character.isalnum() for character in text)


def words(text: str) -> list[str]:
    return [piece for piece in re.split(r"[\s—–]+", text) if has_word(piece)]


def ends_sentence(piece: str, following: str) -> bool:
    """Whether a sentence ends with `piece`; `following` is the next piece of the line, or ""."""
    bare = piece.rstrip(CLOSING)
    if not bare.endswith(STOPS):
        return False
    goes_on = following.lstrip(OPENING)[:1].islower()
    if goes_on and (bare != piece or bare.endswith(("...", "…"))):
        return False
    name = bare.rstrip(".").lstrip(OPENING)
    initial = len(name) == 1 and name.isupper() and name != "I"
    return not initial and name.lower() not in ABBREVIATIONS


def count_sentences(text: str) -> int:
    count = 0
    for line in text.splitlines():
        mark = BULLET.match(line) or NUMBERED.match(line)
        pieces = line[mark.end() if mark else 0 :].split()
        begun = False
        for piece, following in zip(pieces, [*pieces[1:], ""]):
            begun = begun or has_word(piece)
            if begun and ends_sentence(piece, following):
                count, begun = count + 1, False
        count += begun
    return count


def marked_lines(mark: re.Pattern, text: str) -> int:
    """How many lines have a word after `mark`, a pattern for their beginning."""
    found = ((mark.match(line), line) for line in text.splitlines())
    return sum(bool(mark) and has_word(line[mark.end() :]) for mark, line in found)


def times(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def occurrences(word: str, answer: str) -> int:
    return len(re.findall(rf"(?<!\w){re.escape(word.casefold())}(?!\w)", answer.casefold()))


# ---- one function a kind: (answer with at least one word, value) -> (met, what was found) ----

Found = tuple[bool, str]
SENTENCES = {"one sentence": 1, "two sentences": 2, "three sentences": 3}


def words_at_most(answer: str, most: int) -> Found:
    number = len(words(answer))
    return number <= most, times(number, "word")


def words_at_least(answer: str, least: int) -> Found:
    number = len(words(answer))
    return number >= least, times(number, "word")


def sentences_exactly(answer: str, wanted: str) -> Found:
    number = count_sentences(answer)
    return number == SENTENCES[wanted], times(number, "sentence")


def two_sentences_at_most(answer: str, _: None) -> Found:
    number = count_sentences(answer)
    return number <= 2, times(number, "sentence")


def use_word(answer: str, word: str) -> Found:
    number = occurrences(word, answer)
    return number >= 1, f"found {times(number, 'time')}"


def use_word_twice(answer: str, word: str) -> Found:
    number = occurrences(word, answer)
    return number >= 2, f"found {times(number, 'time')}"


def avoid_word(answer: str, word: str) -> Found:
    number = occurrences(word, answer)
    return number == 0, f"found {times(number, 'time')}"


def avoid_letter(answer: str, letter: str) -> Found:
    number = answer.casefold().count(letter)
    return number == 0, f"found {times(number, 'time')}"


def begin_with(answer: str, word: str) -> Found:
    start = answer.split(maxsplit=1)[0]
    met = re.match(rf"{word.casefold()}(?!\w)", start.casefold()) is not None
    return met, f"begins with {start[:30]}"


def end_with(answer: str, word: str) -> Found:
    last = answer.rsplit(maxsplit=1)[-1]
    bare = last.rstrip(CLOSING + "".join(STOPS)).casefold()
    return re.search(rf"(?<!\w){word}$", bare) is not None, f"ends with {last[-30:]}"


def end_with_question(answer: str, _: None) -> Found:
    last = answer.rstrip().rstrip(CLOSING)[-1:]
    return last == "?", f"ends with {last}"


def no_comma(answer: str, _: None) -> Found:
    number = answer.count(",")
    return number == 0, times(number, "comma")


def digits(answer: str, _: None) -> Found:
    number = sum(character.isdigit() for character in answer)
    return number >= 1, times(number, "digit")


def colon(answer: str, _: None) -> Found:
    number = answer.count(":")
    return number >= 1, times(number, "colon")


def quotes(answer: str, _: None) -> Found:
    inside = answer.replace("“", '"').replace("”", '"').split('"')[1:-1:2]
    number = sum(map(has_word, inside))
    return number >= 1, f"{times(number, 'part')} in double quotes"


def capitals(answer: str, _: None) -> Found:
    number = sum(word.isupper() and sum(map(str.isalpha, word)) >= 2 for word in words(answer))
    return number >= 1, f"{times(number, 'word')} in capitals"


def bullets(answer: str, _: None) -> Found:
    number = marked_lines(BULLET, answer)
    return number >= 2, times(number, "bullet")


def numbered_list(answer: str, _: None) -> Found:
    number = marked_lines(NUMBERED, answer)
    return number >= 2, times(number, "numbered line")


def json_object(answer: str, key: str) -> Found:
    lines = answer.strip().split("\n")
    if len(lines) > 2 and lines[0].startswith("```") and lines[-1] == "```":
        lines = lines[1:-1]
    try:
        found = json.loads("\n".join(lines))
    except (ValueError, RecursionError):
        return False, "no JSON"
    return isinstance(found, dict) and key in found, "JSON"


class Kind(NamedTuple):
    family: str  # the question's category
    request: str  # what the prompt says, with {} for the value
    check: Callable[[str, object], Found]
    values: tuple = (None,)


LENGTH, WORDS, ENDS, MARKS, FORM = "length", "words", "beginning and end", "marks", "form"
SOME = ("often", "simple", "people", "always")
REPEATED = ("time", "many")
COMMON = ("the", "and", "is", "of")
FIRST = ("Today", "Sometimes", "Once")
KINDS = {
    "words_at_most": Kind(LENGTH, "Use at most {} words.", words_at_most, (15, 20, 25)),
    "words_at_least": Kind(LENGTH, "Use at least {} words.", words_at_least, (25, 30)),
    "sentences": Kind(LENGTH, "Write exactly {}.", sentences_exactly, tuple(SENTENCES)),
    "sentences_at_most": Kind(LENGTH, "Use at most two sentences.", two_sentences_at_most),
    "use_word": Kind(WORDS, 'Use the word "{}".', use_word, SOME),
    "use_word_twice": Kind(WORDS, 'Use the word "{}" twice.', use_word_twice, REPEATED),
    "avoid_word": Kind(WORDS, 'Do not use the word "{}".', avoid_word, COMMON),
    "avoid_letter": Kind(WORDS, 'Do not use the letter "{}".', avoid_letter, ("b", "k", "v")),
    "begin_with": Kind(ENDS, 'Begin with the word "{}".', begin_with, FIRST),
    "end_with": Kind(ENDS, 'The last word must be "{}".', end_with, ("today", "again", "more")),
    "end_with_question": Kind(ENDS, "End with a question mark.", end_with_question),
    "no_comma": Kind(MARKS, "Do not use commas.", no_comma),
    "digits": Kind(MARKS, "Use a number written in digits.", digits),
    "colon": Kind(MARKS, "Use a colon (:).", colon),
    "quotes": Kind(MARKS, 'Put a word in double quotes, "like" this.', quotes),
    "capitals": Kind(MARKS, "Write one word in CAPITAL letters.", capitals),
    "bullets": Kind(FORM, "Make a list with bullets (*).", bullets),
    "numbered_list": Kind(FORM, "Make a numbered list.", numbered_list),
    "json": Kind(FORM, 'Answer as JSON with the key "{}".', json_object, ("answer", "text")),
}


def agree(first: str, second: str) -> bool:
    """Whether one question may ask for both: for two families that leave each other free.

    A list or JSON settles how an answer begins, ends and is punctuated, so it goes with words only.
    """
    families = {KINDS[first].family, KINDS[second].family}
    return len(families) == 2 and (FORM not in families or WORDS in families)


# ---- prompts ----

FORMS = (
    "Write a short text about {}.",
    "Tell me about {}.",
    "Write a note to a friend about {}.",
    "Say something about {}.",
    "Describe {}.",
)
TOPICS = {
    "train": """
        rain in a big city, a walk in the park, a lost umbrella, the first day at a new school,
        a noisy neighbour, coffee in the morning, a journey by train, an old bicycle, the night
        sky, a visit to the dentist, tomatoes on a balcony, a long winter, an old friend, a
        clean kitchen, a cat on a roof, a birthday party, a crowded bus, a market on Saturday, a
        broken window, a letter from an aunt, a day at the beach, a power cut, a small bakery,
        the smell of fresh bread, a football match, a difficult exam, an empty house, a mountain
        path, a new pair of shoes, a school play, a garden pond, a ride on a horse, a secret
        recipe, a wedding in a village, a library, a snowman, an old photograph, a slow
        computer, a night in a tent, a bowl of soup, a museum of trains, a river after a storm,
        a wooden boat, a busy restaurant, a job interview, a forgotten key, a puppy, a family
        dinner, a concert in a church, a bad cold, an apple tree, a lighthouse, a long queue, a
        favourite song, a walk in fog, a chess club, a new neighbour, a flat tyre, a trip to the
        zoo, an island""",
    "test": """
        a thunderstorm at night, a picnic by a lake, a missing sock, the last day of a holiday,
        a quiet street, tea with honey, a flight in a small plane, a rusty car, a full moon, a
        visit to the barber, roses in a garden, a hot summer, an honest colleague, a messy desk,
        a dog in the snow, a street festival, an underground station, a shop for old books, a
        leaking tap, a postcard from a cousin, a swim in the sea, a late bus, a pizza from the
        oven, a basketball team, a piano lesson, a deserted castle, a bridge over a river, a
        warm coat, a puppet theatre, a beehive, a camel, a family recipe, a village school, a
        hospital, a kite, a diary, a cheap telephone, a campfire, a cheese sandwich, a farm in
        spring""",
}
TOPICS = {
    split: [" ".join(topic.split()) for topic in text.split(",")] for split, text in TOPICS.items()
}


# ---- the task ----


def questions(split: str, number: int, seed: int) -> list[dict]:
    """`number` questions on the split's own topics, by turns with one constraint and with two.

    Kinds take turns, so any number of questions spreads evenly over them. A larger number begins
    with the questions of a smaller one.
    """
    if split not in TOPICS:
        raise ValueError(f'there is no split "{split}": train or test')
    subjects = [form.format(topic) for topic in TOPICS[split] for form in FORMS]
    most = 2 * len(KINDS) * len(subjects)
    if not 0 < number <= most:
        raise ValueError(f"there are 1 to {most} {split} questions, not {number}")
    chance = random.Random(f"{split} {seed}")
    order = chance.sample(list(KINDS), len(KINDS))
    decks = {
        (kind, size): chance.sample(subjects, len(subjects)) for kind in order for size in (1, 2)
    }
    used = Counter()
    rows = []
    for place in range(number):
        size, first = 1 + place % 2, order[place // 2 % len(order)]
        kinds = [first]
        if size == 2:  # with the partner that the fewest questions have had
            partners = [kind for kind in order if agree(first, kind)]
            kinds.append(min(partners, key=lambda kind: (used[kind], chance.random())))
        used.update(kinds)
        constraints = [{"kind": kind, "value": chance.choice(KINDS[kind].values)} for kind in kinds]
        requests = [KINDS[one["kind"]].request.format(one["value"]) for one in constraints]
        rows.append(
            {
                "question_id": place + 1,
                "category": KINDS[first].family if size == 1 else "two constraints",
                "turns": [" ".join([decks[first, size].pop(), *requests])],
                "constraints": constraints,
            }
        )
    return rows


def check(question: dict, answer: str) -> list[Found]:
    """For each of the question's constraints, whether `answer` meets it and what was found."""
    constraints = question["constraints"]
    if not has_word(answer):
        return [(False, "no word")] * len(constraints)
    answer = unicodedata.normalize("NFC", answer)
    return [KINDS[one["kind"]].check(answer, one["value"]) for one in constraints]


def readings(answer: str) -> list[str]:
    """The answer with and without markdown's marks, its first line, its last line: eight texts."""
    lines = answer.strip().splitlines()
    cuts = [answer, *("\n".join(cut) for cut in (lines[1:], lines[:-1], lines[1:-1]))]
    return cuts + [re.sub(r"[*#`]", "", cut) for cut in cuts]


def share(met: list[bool]) -> float:
    return sum(met) / len(met)


def score(question: dict, answer: str) -> float:
    """The share of its constraints that the answer meets as it stands."""
    return share([met for met, _ in check(question, answer)])


def explain(question: dict, answer: str) -> dict:
    """What was found ("Use at most 15 words: 23 words, missed"), and the forgiving score."""
    found = check(question, answer)
    told = []
    for one, (met, text) in zip(question["constraints"], found):
        request = KINDS[one["kind"]].request.format(one["value"]).rstrip(".")
        told.append(f"{request}: {text}, {'met' if met else 'missed'}")
    read = [check(question, reading) for reading in readings(answer)]
    forgiving = [any(met for met, _ in one) for one in zip(*read)]
    return {"text": "; ".join(told), "scores": {"forgiving": share(forgiving)}}
