"""How far the runs of a cell have moved from the base model, and how long their answers are.

A score may be gained by leaving the reference behind, or by writing more.
"""

from typing import NamedTuple

from pref.analysis import measures, stats
from pref.analysis.scores import Score


class Moved(NamedTuple):
    """How far a cell has moved, mean over its runs; None where that was not measured."""

    kl: float | None  # nats an answer, to the base
    tokens: float | None  # length of an answer
    cut_off: float | None  # share of answers that reached the limit of tokens
    characters: float | None = None  # length of an answer, where tokens are not counted


def movement_of(score: Score, comparison: dict) -> dict[str, Moved]:
    """Label of a cell -> how far it has moved."""
    if score.measure is measures.MT:
        return movement_of_runs(score.part["cells"], comparison["movement"])
    return movement_of_part(score.part)


def movement_of_runs(cells: list[dict], movement: list[dict]) -> dict[str, Moved]:
    """By the answers to MT-Bench. cells, movement: rows in aggregated_metrics.json."""
    row_of = {row["run_id"]: row for row in movement}

    def mean_of(cell: dict, name: str) -> float | None:
        values = [row_of[run_id][name] for run_id in cell["runs"]]
        return stats.mean(value for value in values if value is not None)

    names = ("kl", "tokens", "cut_off")
    return {cell["label"]: Moved(*(mean_of(cell, name) for name in names)) for cell in cells}


def movement_of_part(part: dict) -> dict[str, Moved]:
    """By the answers that this part is of; nothing of validation accuracy and imported tasks.

    A frontier may be over the KL of the answers to MT-Bench, which is not that of these answers.
    """
    distance = {
        row["label"]: row["kl"]
        for row in part.get("frontier", ())
        if row["kl_answers"] == part.get("bench")
    }
    return {
        cell["label"]: Moved(distance.get(cell["label"]), None, None, cell.get("length"))
        for cell in part["cells"]
    }


def moved_texts(ours: Moved, theirs: Moved) -> list[str]:
    texts_of = []
    if None not in (ours.kl, theirs.kl):
        texts_of.append(f"KL to the base {ours.kl:.2f} against {theirs.kl:.2f} nats an answer")
    elif ours.kl is not None:
        texts_of.append(f"KL to the base {ours.kl:.2f} nats an answer")
    if None not in (ours.characters, theirs.characters):
        lengths = f"{ours.characters:.0f} against {theirs.characters:.0f}"
        texts_of.append(f"answers of {lengths} characters")
    if None not in (ours.tokens, theirs.tokens):
        text = f"answers of {ours.tokens:.0f} against {theirs.tokens:.0f} tokens"
        if None not in (ours.cut_off, theirs.cut_off) and max(ours.cut_off, theirs.cut_off) > 0:
            text += f", {ours.cut_off:.1%} against {theirs.cut_off:.1%} of them cut off"
        texts_of.append(text)
    return texts_of
