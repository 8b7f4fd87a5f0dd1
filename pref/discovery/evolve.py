"""The proposers that need no model: `Evolve` breeds from the archive, `RandomSearch` only grows.

Regularised evolution (Real et al. 2019, arXiv:1802.01548): the population is the POPULATION newest
candidates that have a score, so that even the best leaves it and a lucky score is bred from for a
limited time; a parent is the best of a random sample. In a quarter of the draws it is the best
candidate of a random cell instead (MAP-Elites, Mouret & Clune 2015, arXiv:1504.04909).
"""

import functools
import random
from collections.abc import Iterable

from pref.discovery import breeding, genome
from pref.discovery.archive import SEED
from pref.discovery.genome import MAX_NODES, Genome
from pref.discovery.known_genomes import KNOWN_GENOMES
from pref.discovery.opaque import Unreadable, opaque
from pref.discovery.proposals import Known, Proposal, View
from pref.discovery.writing import describe, operations, write

POPULATION = 40
TOURNAMENT = 6
FROM_CELLS = 0.25
CROSSOVER = 0.25
TIE = 0.01  # in gain (a fraction) and in bits: differences below it do not decide
# The form allows 96 steps, and what is written may name more than it has.
MAX_OPERATIONS = 90
TRIES = 200


class RandomSearch:
    """Grows every loss anew: the control that evolution has to beat."""

    name = "random"

    def propose(self, view: View, *, round: int, number: int, rng: random.Random) -> Proposal:
        return _proposal(_grown(_genomes(view), rng), by=self.name, operator="grow", parents=[])


class Evolve:
    """Breeds from the best of the archive, by whomever they were proposed."""

    name = "evolve"

    def propose(self, view: View, *, round: int, number: int, rng: random.Random) -> Proposal:
        able = breedable(view)
        population, elite = able[-POPULATION:], list(best_of_cells(able).values())
        seen = _genomes(view)
        for _ in range(TRIES):
            parents = [draw_parent(population, elite, rng)]
            if rng.random() < CROSSOVER:
                parents.append(draw_parent(population, elite, rng))
            genomes = [genome_of(parent) for parent in parents]
            child, operator = breeding.offspring(genomes, rng)
            if child is not None and _is_new(child, seen):
                ids = list(dict.fromkeys(parent.id for parent in parents))
                return _proposal(child, by=self.name, operator=operator, parents=ids)
        return _proposal(_grown(seen, rng), by=self.name, operator="grow", parents=[])


def breedable(view: View) -> list[Known]:
    """Candidates with a score that were not refused, in order of id. What a rung has stopped was
    trained, and stays. Before anything has a score: DPO.
    """
    able = [
        known
        for known in view.known
        if known.gain is not None
        and (known.stopped is None or known.stopped["at"].startswith("rung"))
        and (known.genome is not None or genome_of(known) is not None)
    ]
    return able or [view.dpo]


def draw_parent(population: list[Known], elite: list[Known], rng: random.Random) -> Known:
    """The winner of a tournament, or the best of a random cell."""
    if elite and rng.random() < FROM_CELLS:
        return rng.choice(elite)
    return best(rng.sample(population, min(TOURNAMENT, len(population))))


def best(candidates: Iterable[Known]) -> Known:
    """The one with the highest gain. What is within TIE of it is tied: of these, the highest bits,
    likewise; of these the fewest steps; of these the first.
    """
    candidates = sorted(candidates, key=lambda known: (len(known.id), known.id))
    for score in (_gain, _bits):
        top = max(map(score, candidates))
        candidates = [known for known in candidates if score(known) >= top - TIE]
    return min(candidates, key=lambda known: known.size)


def best_of_cells(candidates: Iterable[Known]) -> dict[str, Known]:
    """By cell, its best candidate."""
    cells: dict[str, list[Known]] = {}
    for known in candidates:
        if known.cell is not None:
            cells.setdefault(known.cell, []).append(known)
    return {cell: best(cells[cell]) for cell in sorted(cells)}


def genome_of(known: Known) -> Genome | None:
    """What to breed from: its own genome; for a loss of losses.py the one that is known; otherwise
    its whole program as one leaf. None where the program cannot be a leaf.
    """
    if known.genome is not None:
        return genome.from_json(known.genome)
    if known.by == SEED and known.name in KNOWN_GENOMES:
        return KNOWN_GENOMES[known.name]
    return _leaf(known.text)


@functools.cache  # the same candidates are looked at for every proposal
def _leaf(text: str) -> Genome | None:
    try:
        return Genome(KNOWN_GENOMES["dpo"].beta, opaque(text))
    except Unreadable:
        return None


def _gain(known: Known) -> float:
    return known.gain if known.gain is not None else 0.0


def _bits(known: Known) -> float:
    return known.bits if known.bits is not None else 0.0


def _genomes(view: View) -> list[dict | None]:
    return [known.genome for known in view.known]


def _grown(seen: list[dict | None], rng: random.Random) -> Genome:
    """A loss grown at random, and, unless TRIES of them do not suffice, a new one."""
    for _ in range(TRIES):
        grown = genome.grow(rng)
        if _is_new(grown, seen):
            break
    return grown


def _is_new(child: Genome, seen: list[dict | None]) -> bool:
    """Whether it is none of the genomes in the archive, and short enough for the form."""
    if child.size > MAX_NODES or child.to_json() in seen:
        return False
    return operations(write(child, "loss")) <= MAX_OPERATIONS


def _proposal(child: Genome, *, by: str, operator: str, parents: list[str]) -> Proposal:
    name = describe(child)
    return Proposal(
        text=write(child, name),
        by=by,
        operator=operator,
        parents=parents,
        name=name,
        genome=child.to_json(),
    )
