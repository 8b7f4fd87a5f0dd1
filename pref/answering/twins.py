"""Runs with the very same weights get the very same answers: one answers, the others copy.

Seeds depend on the question alone, so in exact arithmetic twins would answer alike anyway. In bf16
on another device, with another batch size or from a server they would not, and the difference
would look like one between two losses.
"""

import json
from pathlib import Path

from pref.answering.turns import ORIGIN, TURN_FIELDS, Store, changed_settings, read_turns
from pref.answering.work import Item, Key, Run
from pref.files import disk, mt_bench, run_folders
from pref.files.console import UserError

# Fields of adapter_config.json that change what given weights do.
SCALING = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")


def identity(folder: Path, sha256: str | None) -> str | None:
    """Equal only for weights that compute the same; None if that cannot be told. folder: the
    run's; sha256: of its weights.
    """
    if (folder / run_folders.WEIGHTS["full"] / "config.json").is_file():
        return sha256
    try:
        config = disk.read_json(folder / "adapter" / "adapter_config.json")
    except UserError:
        return None
    return sha256 and disk.sha256_json([sha256, {name: config.get(name) for name in SCALING}])


def adopt(store: Store) -> int:
    """Give each run the complete conversations that another run of its folder, in this call or not,
    has had with the same weights, questions and settings. Returns their number.
    """
    total = 0
    for run in store.runs:
        own = identity(run.folder, run.sha256)
        begun = {(key.question_id, key.choice) for key in store.turns if key.run_id == run.run_id}
        for folder in sorted(run.folder.resolve().parent.iterdir()):
            path = folder / store.bench.name / "answers.jsonl"
            if folder == run.folder.resolve() or own is None or first_sha256(path) != run.sha256:
                continue
            if identity(folder, run.sha256) != own:
                continue
            copied = copy_conversations(store, run, path, begun)
            begun |= copied
            total += len(copied)
            if copied:
                print(
                    f"{run.run_id}: {len(copied)} conversations are those of {folder.name}, whose "
                    f"{'adapter' if run.model is None else 'model'} is the same",
                    flush=True,
                )
    return total


def first_sha256(path: Path) -> str | None:
    """The adapter of the first row of an answers.jsonl; None without a readable one."""
    try:
        with open(path, "rb") as file:
            return json.loads(file.readline()).get("adapter_sha256")
    except (OSError, ValueError, AttributeError):
        return None


def copy_conversations(store: Store, run: Run, path: Path, begun: set) -> set[tuple[int, int]]:
    """Add the conversations in `path` that `run` has not begun, and return the (question, choice)
    of each.
    """
    copied = set()
    for line in read_turns(path):
        question = store.questions.get(line["question_id"])
        conversation = (line["question_id"], line["choice"])
        if (
            question is not None
            and conversation not in begun
            and line["choice"] < store.settings.get("num_choices", 1)
            and line.get("adapter_sha256") == run.sha256
            and not changed_settings(line.get("settings"), store.settings_of(run))
            and line.get("question_sha256")
            == mt_bench.question_sha256(question["turns"], question["temperature"])
        ):
            fields = {name: line[name] for name in (*TURN_FIELDS, *ORIGIN) if name in line}
            store.add(Item(run, question, line["choice"]), line["turn"], **fields)
            copied.add(conversation)
    return copied


def first_of_each(store: Store, items: list[Item], missing: list[int]) -> list[int]:
    """`missing` (positions in `items`) without conversations that a twin is about to have."""
    kept, seen = [], set()
    identities = {run.run_id: identity(run.folder, run.sha256) for run in store.runs}
    for number in missing:
        item = items[number]
        own = identities[item.run.run_id]
        conversation = (own, item.question["question_id"], item.choice)
        begun = Key.of(item, 0) in store.turns
        if own is None or begun or conversation not in seen:
            kept.append(number)
        if not begun:
            seen.add(conversation)
    return kept
