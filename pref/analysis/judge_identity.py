"""Judges: which ratings may be compared, what a judge is called, and how its files are named.

Ratings are comparable if they have the same `JudgeKey`. judge.py writes the hash of a judge's whole
identity (model, parameters, server, prompts, references) as `judge_id`. Judgements of version 1.0
have none; their key is what is recorded of them, the parameters at the most. A judge goes by its
name, prompts and references. Only where two identities share these, the title also says in what
they differ.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable

from pref.analysis import judge_validation, texts
from pref.analysis.runs import JudgeKey
from pref.files import disk, judgements

LONGEST_SLUG = 60
# A reward model is trained for nothing else: those of 0.6 B rank answers well. What is smaller than
# this (billions) is a model for tests.
REWARD_SMOKE_BELOW_B = 0.5


# ---- identity -----------------------------------------------------------------------------------


def key_of(row: dict) -> JudgeKey:
    """The judge of one row of judgements.csv."""
    judge_id = row.get("judge_id")
    if judge_id is None and (settings := describe_settings(row)):
        judge_id = disk.sha256_json(settings)[:16]
    return JudgeKey(row["judge"], row["prompts"], row["refs"], judge_id)


def is_program(judge: str) -> bool:
    """Whether a judge is a task's program (judge.py --judge py:FILE): its scores are the truth."""
    return judge.startswith("py:")


def describe_judge(key: JudgeKey, rows: list[dict]) -> dict:
    """What a score depends on besides the answers, and whether it measures anything.

    rows: judgements by this judge, at least one.
    """
    params_b, too_small = judge_size(key.judge, rows)
    facts = judge_validation.judge_facts(key.judge, rows[0].get("validation"), too_small)
    if is_program(key.judge):  # there is nothing that it could agree with
        facts |= {"as_humans": None, "agreement_text": None}
    return {
        "judge": key.judge,
        "judge_params_b": params_b,
        "smoke_test": facts.pop("smoke_test"),
        "prompts": key.prompts,
        "refs": key.refs,
        "grading": "single",
        "judge_id": key.judge_id,
        **{name: rows[0].get(name) for name in ("judge_address", "judge_settings")},
        "title": rows[0].get("title") or plain_title(key),
        **facts,
    }


def judge_size(judge: str, rows: list[dict]) -> tuple[float | None, bool]:
    """Billions of parameters of a judge, None if unknown; and whether that is too few for the
    judgements of a judge that was not validated to measure anything.
    """
    if is_program(judge):
        return None, False
    sizes = [row.get("judge_params_b") for row in rows if row["judge"] == judge]
    sizes = [size for size in sizes if size is not None and 0 < size < math.inf]
    size = min(sizes) if sizes else judgements.params_from_name(judge)
    trained_for_it = any(row["judge"] == judge and row.get("grading") == "reward" for row in rows)
    least = REWARD_SMOKE_BELOW_B if trained_for_it else judgements.SMOKE_TEST_BELOW_B
    return size, size is not None and size < least


# ---- titles -------------------------------------------------------------------------------------


def add_titles(rows: Iterable[dict]) -> None:
    """Give every judgement of a study the `title` of its judge.

    "judge gpt-5-mini, prompts mt_bench, refs original", and behind it in what this judge differs
    from others that share all of that.
    """
    rows = list(rows)
    examples: dict[JudgeKey, dict] = {}  # a row by each judge
    for row in rows:
        examples.setdefault(key_of(row), row)
    sharing: dict[str, list[JudgeKey]] = defaultdict(list)  # plain title -> judges
    for key in examples:
        sharing[plain_title(key)].append(key)
    title_of = {
        key: ", ".join([title, *differing_parts(key, [examples[other] for other in keys])])
        for title, keys in sharing.items()
        for key in keys
    }
    for row in rows:
        row["title"] = title_of[key_of(row)]


def plain_title(key: JudgeKey) -> str:
    if is_program(key.judge):  # is shown the answer alone
        return f"judge {key.judge}"
    parts = [f"judge {key.judge}"]
    parts += [f"{name} {getattr(key, name)}" for name in ("prompts", "refs") if getattr(key, name)]
    return ", ".join(parts)


def differing_parts(key: JudgeKey, examples: list[dict]) -> list[str]:
    """In what one judge differs from others of the same plain title; empty if there are none.

    examples: a row by each of these judges, its own included.
    """
    if len(examples) == 1:
        return []
    if key.judge_id is None:
        return ["settings not recorded"]
    described = {key_of(row).judge_id: flat(describe_settings(row)) for row in examples}
    described.pop(None, None)
    own = described[key.judge_id]
    names = sorted({name for settings in described.values() for name in settings})
    differing = [
        name for name in names if len({other.get(name) for other in described.values()}) > 1
    ]
    parts = [f"{name} {own.get(name, 'not set')}" for name in differing]
    alike = [other for other in described.values() if other == own]
    return parts if len(alike) == 1 else [*parts, f"id {key.judge_id}"]


def describe_settings(row: dict) -> dict[str, str]:
    """Name -> text of what a judge was asked with: its parameters, and the server's address."""
    text = row.get("judge_settings") or "{}"
    try:
        settings = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        settings = {"settings": text}
    if row.get("judge_address"):
        settings["address"] = row["judge_address"]
    return {
        name: value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        for name, value in settings.items()
    }


def flat(settings: dict[str, str]) -> dict[str, str]:
    """`settings` with an object's entries beside the rest, and only the start of a hash: of a
    program, one entry for each of its files and packages.
    """
    found = {}
    for name, text in settings.items():
        try:
            entries = json.loads(text)
        except (ValueError, RecursionError):
            entries = None
        if isinstance(entries, dict) and entries:
            found |= {f"{name} of {key}": value for key, value in entries.items()}
        else:
            found[name] = text
    return {name: texts.setting_text(value) for name, value in found.items()}


def smoke_mark(judge: dict) -> str:
    """The label of scores by a judge that is too small, or whose validation warns; or ""."""
    if not judge.get("smoke_test"):  # an imported task has no judge
        return ""
    if warnings := judge.get("judge_warnings"):
        return f"WARNING on the judge: {'; '.join(warnings)}: these scores measure nothing"
    return (
        f"SMOKE TEST: judge of {judge['judge_params_b']:.3g}B parameters, "
        "these scores measure nothing"
    )


# ---- names of files -----------------------------------------------------------------------------


PLACES = ("bench", "category", "task", "baseline")  # what a part is about, besides its judge


def file_suffix(part: dict, parts: list[dict]) -> str:
    """What the files of one part of a measure carry in their names: nothing if there is one part.

    Else as many of PLACES as tell it from the others, and the judge's name where several judged
    there.
    """
    pieces, beside = [], parts
    for place in PLACES:
        names = {other.get(place) for other in beside}
        if len(names) > 1:
            pieces.append(unique_slug(part[place], names))
            beside = [other for other in beside if other[place] == part[place]]
    return "".join(f"_{piece}" for piece in pieces if piece) + judge_suffix(part, beside)


def unique_slug(name: str | None, names: set[str | None]) -> str:
    """A name as far as a file can have it, with a hash where it had to be changed, or where it is
    another's in other letters.
    """
    if not name:
        return ""
    same = [other for other in names if other and other.lower() == name.lower()]
    if re.fullmatch(r"[A-Za-z0-9._-]{1,40}", name) and len(same) == 1:
        return name
    return f"{slug_of(name)}-{disk.sha256_json(name)[:8]}"


def judge_suffix(judge: dict, all_judges: list[dict]) -> str:
    """What a judge's files carry in their names: nothing if there is one judge.

    Else the judge's name, as far as a file can have it. A name that had to be changed, or that
    another judge has too, is followed by a hash: no two judges share a file, whatever they are
    called and whether or not the file system tells upper from lower case.
    """
    if len(all_judges) == 1:
        return ""
    slug = slug_of(judge["judge"])
    same = [other for other in all_judges if slug_of(other["judge"]).lower() == slug.lower()]
    if slug != judge["judge"] or len(same) > 1:
        identity = [judge[name] for name in ("judge", "prompts", "refs", "judge_id")]
        slug = f"{slug}-{disk.sha256_json(identity)[:8]}".removeprefix("-")
    return f"_{slug}"


def slug_of(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "-", name).strip("-.")[:LONGEST_SLUG]
