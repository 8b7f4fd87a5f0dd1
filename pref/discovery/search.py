"""The search: rounds of proposals, rungs of training, in an order that the settings fix.

    round 0     the seeds, DPO first: read, measured on the proxy
    round r     proposals bred from the archive as of the end of round r - 1; read, compared with
                everything before them, measured on the proxy
    rung 0.i    the best by proxy are trained, in a few instalments, so that what training says
                is bred from
    fresh 0.i   a candidate that has become the best of all trained ones is trained again, with
                seeds that it was not chosen by
    control     the same number of proposals at random, up to the proxy
    rung 1 ...  the best by training go on with more seeds

Each step reads what the earlier ones left in the archive and adds its events at its end. So a
search that was killed takes up the step that had not ended, and neither the number of processes nor
the order in which they finish has a part in the result.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pref.analysis import stats
from pref.discovery import estimates, fingerprint, seeds
from pref.discovery.archive import SEED, Archive, Entry, State
from pref.discovery.arms import Arms
from pref.discovery.evolve import RandomSearch
from pref.discovery.proposals import Known, Proposal, View
from pref.discovery.settings import Settings
from pref.discovery.split import Split
from pref.files.console import UserError
from pref.training.signals import Stopped

PROXY_SEEDS = tuple(range(1, 9))  # of each candidate's proxy
MOST_INSTALMENTS = 4  # of rung 0
ROUNDS_PER_INSTALMENT = 4
LEAST_PER_INSTALMENT = 3


# ---- the order of things ------------------------------------------------------------------------


class Step(NamedTuple):
    kind: str  # "round", "rung", "fresh" or "control"
    number: int = 0  # of the round, or of the rung
    part: int = 0  # of rung 0's instalments

    @property
    def name(self) -> str:
        if self.kind == "control":
            return self.kind
        is_part = self.kind == "fresh" or (self.kind == "rung" and self.number == 0)
        return f"{self.kind} {self.number}" + (f".{self.part}" if is_part else "")


def plan(settings: Settings) -> list[Step]:
    """All steps of a search, in order."""
    parts, rounds = instalments(settings), settings.rounds
    after = {-(-rounds * (i + 1) // len(parts)): i for i in range(len(parts))}
    steps = []
    for number in range(rounds + 1):
        steps.append(Step("round", number))
        if number in after and number:
            steps.append(Step("rung", 0, after[number]))
            if len(settings.rung) > 1:
                steps.append(Step("fresh", 0, after[number]))
    if settings.proxy != "off" and settings.proposer != ("random",):
        steps.append(Step("control"))
    return steps + [Step("rung", k) for k in range(1, len(settings.rung))]


def instalments(settings: Settings) -> list[int]:
    """How many candidates each instalment of rung 0 trains. 12 in 50 rounds: 3, 3, 3, 3."""
    count = settings.rung[0]
    parts = min(
        MOST_INSTALMENTS, settings.rounds // ROUNDS_PER_INSTALMENT, count // LEAST_PER_INSTALMENT
    )
    parts = max(1, parts)
    return [count // parts + (i < count % parts) for i in range(parts)]


# ---- a search -----------------------------------------------------------------------------------


@dataclass
class Search:
    """What every step needs."""

    folder: Path
    settings: Settings
    archive: Archive
    arms: Arms
    open_workers: Callable  # () -> Workers, a context manager
    visited: float  # nats
    setting: str  # three lines for a model's prompt
    proxy_steps: int
    proxy_rate: float
    stop_level: Callable[[], int] = lambda: 0  # 1: save and stop, 2: at once
    until: float | None = None  # time.monotonic(): no step begins after it
    rung_only: bool = False  # training is for a cluster
    pairs: Split = Split(train=0, val=0)
    batch: int = 8  # pairs in a step
    fields: dict[str, np.ndarray] = field(default_factory=dict)  # of the archive, by id
    workers: object = None
    sandbox: str = ""  # what stands between a candidate's text and this machine

    @property
    def state(self) -> State:
        return self.archive.state()

    def field_of(self, id: str) -> np.ndarray | None:
        if id not in self.fields:
            found = self.archive.field_of(id)
            if found is None:
                return None
            self.fields[id] = found
        return self.fields[id]

    def is_stopped(self) -> bool:
        return self.stop_level() > 0

    def log(self, text: str) -> None:
        print(text, flush=True)


class OutOfTime(Exception):
    """--max_hours have passed."""


@contextmanager
def working(search: Search) -> Iterator[object]:
    """The worker processes, kept from one round to the next."""
    if search.workers is None:
        search.workers = search.open_workers().__enter__()
        if search.workers.sandbox != search.sandbox:  # said once, and where it changes
            search.sandbox = search.workers.sandbox
            search.log(f"sandbox: {search.sandbox}")
    yield search.workers


def rest(search: Search) -> None:
    """End the worker processes: training needs the cores and the memory."""
    if search.workers is not None:
        search.workers.__exit__(None, None, None)
        search.workers = None


def run(search: Search, take_rung: Callable[[Search, Step], bool]) -> bool:
    """Take every step that has not ended. Returns False if a signal stopped the search.

    take_rung: takes a step of kind "rung" or "fresh"; False if a signal stopped it. Raises
    OutOfTime.
    """
    try:
        for step in plan(search.settings):
            if search.archive.has(step.name):
                continue
            if search.is_stopped():
                return False
            if search.until is not None and time.monotonic() > search.until:
                raise OutOfTime
            if step.kind == "round":
                take_round(search, step.number)
                if bred_something(search, step.number):
                    search.log(round_line(search, step.number))
            elif step.kind == "control":
                take_control(search)
            else:
                rest(search)
                if not take_rung(search, step):
                    return False
    except Stopped:  # while models were asked: the round is taken again, from what is stored
        return False
    finally:
        rest(search)
    return not search.is_stopped()


# ---- a round ------------------------------------------------------------------------------------


def take_round(search: Search, number: int) -> None:
    """Propose, read, compare, measure; then add the events of all that."""
    proposals, events = propose(search, number)
    first = search.state.next_number()
    candidates = {f"p{first + i:04}": proposal for i, proposal in enumerate(proposals)}
    for id, proposal in candidates.items():
        search.archive.write_proposal(id, proposal)
        events.append(proposed_event(id, number, proposal))
    events += judge(search, number, candidates)
    search.archive.append_step(f"round {number}", events)
    if number == 0:
        check_seeds(search)


def propose(search: Search, number: int) -> tuple[list[Proposal], list[dict]]:
    """The round's proposals, and events about proposers that have none left."""
    if number == 0:
        return [seed_proposal(name) for name in search.settings.seeds_from], []
    size, seed = search.settings.proposals_of(number), search.settings.seed
    bred = search.arms.propose(view_of(search), round=number, size=size, seed=seed)
    events = []
    for name, why in bred.ended.items():
        if name not in search.state.ended:
            search.log(f"{name} proposes no more: {why}")
            events.append({"event": "ended", "by": name, "why": why})
    return bred.proposals, events


def seed_proposal(name: str) -> Proposal:
    return Proposal(text=seeds.SEEDS[name], by=SEED, operator=SEED, parents=[], name=name)


def proposed_event(id: str, number: int, proposal: Proposal) -> dict:
    return {
        "event": "proposed",
        "id": id,
        "round": number,
        "by": proposal.by,
        "operator": proposal.operator,
        "parents": proposal.parents,
        "name": proposal.name,
        "usd": proposal.usd,
        "genome": proposal.genome,
    }


def judge(search: Search, number: int, candidates: dict[str, Proposal]) -> list[dict]:
    """The events of the candidates of a round, from the form to the proxy, in order of id."""
    events: dict[str, list[dict]] = {id: [] for id in candidates}

    def stop(id: str, at: str, why: str, **more) -> None:
        events[id].append({"event": "stopped", "id": id, "at": at, "why": why, **more})

    # 1) Read and tested, each for itself.
    jobs = []
    for id, proposal in candidates.items():
        if proposal.stopped:
            stop(id, **proposal.stopped)
        else:
            coupled = search.settings.coupled
            name = f"{id}_{proposal.name}"
            jobs.append({"id": id, "text": proposal.text, "name": name, "coupled": coupled})
    if not jobs:
        return [event for of_one in events.values() for event in of_one]
    with working(search) as workers:
        results = {result["id"]: result for result in workers.read(jobs)}
    for id, result in results.items():
        events[id] += read_events(search, id, result)
        if result["stopped"]:
            stop(id, **result["stopped"])

    # 2) Compared with everything before them, and with each other in order of id.
    passed = []
    for id, result in results.items():
        if result["stopped"]:
            continue
        near = None if candidates[id].by == SEED else nearest(search, id)
        if near is not None and near[1] < fingerprint.NEAR:
            why = f"behaves like {near[0]} (distance {near[1]:.3f})"
            stop(id, "duplicate", why, near=near[0], distance=round(near[1], 6))
        else:
            passed.append(id)

    # 3) Measured on the proxy.
    if search.settings.proxy != "off" and passed:
        texts = {id: results[id]["program"]["text"] for id in passed}
        for id, event in measure(search, texts).items():
            if event["event"] == "stopped":
                stop(id, event["at"], event["why"])
            else:
                events[id].append(event)
    return [event for of_one in events.values() for event in of_one]


def read_events(search: Search, id: str, result: dict) -> list[dict]:
    """What reading a candidate has given; its program, self-test and fingerprint go to files."""
    events, program = [], result.get("program")
    if program:
        search.archive.write_program(id, program["text"], result.get("selftest") or {})
        events.append(
            {
                "event": "read",
                "id": id,
                "sha256": program["sha256"],
                "size": program["steps"],
                "parameters": program["parameters"],
            }
        )
    if result.get("field") is not None and len(result["field"]):
        search.archive.write_field(id, np.asarray(result["field"]))
        search.fields[id] = search.archive.field_of(id)  # as it will be read again
    if not result["stopped"]:
        gradient = result["gradient"]
        events.append(
            {"event": "fingerprint", "id": id, "cell": result["cell"], "gradient": gradient}
        )
    return events


def nearest(search: Search, id: str) -> tuple[str, float] | None:
    """The earlier candidate that behaves most like `id`, and the distance; stopped ones count."""
    own, ids = search.field_of(id), [*search.state.entries, *search.fields]
    earlier = [other for other in dict.fromkeys(ids) if other < id]
    fields = {other: search.field_of(other) for other in earlier}
    distances = {
        other: fingerprint.distance(own, values)
        for other, values in fields.items()
        if values is not None
    }
    if own is None or not distances:
        return None
    nearest = min(distances, key=lambda other: (distances[other], other))
    return nearest, distances[nearest]


def measure(search: Search, texts: dict[str, str]) -> dict[str, dict]:
    """Train the proxy with each program, by id. Returns a `proxy` or `stopped` event of each."""
    jobs = [
        {
            "id": id,
            "text": text,
            "seeds": list(PROXY_SEEDS),
            "steps": search.proxy_steps,
            "learning_rate": search.proxy_rate,
        }
        for id, text in texts.items()
    ]
    with working(search) as workers:
        outcomes = {outcome["id"]: outcome for outcome in workers.proxy(jobs)}
    dpo_id = next(iter(search.state.entries), next(iter(texts)))
    of_dpo = outcomes.get(dpo_id) or search.archive.proxy_of(dpo_id)
    if of_dpo["stopped"]:
        raise UserError(
            f"DPO itself does not learn on the proxy: {of_dpo['stopped']['why']}; look at the "
            "pairs, or search with --proxy off"
        )
    events = {}
    for id, outcome in outcomes.items():
        search.archive.write_proxy(id, outcome)
        if outcome["stopped"]:
            events[id] = {"event": "stopped", **outcome["stopped"]}
            continue
        own, dpo = (np.array(one["correct"], dtype=float) for one in (outcome, of_dpo))
        compared = stats.difference(own, dpo, paired=True)
        events[id] = {
            "event": "proxy",
            "id": id,
            "acc": float(own.mean()),
            "bits": float(np.mean(outcome["bits"])),
            "difference": compared.estimate,
            "se": compared.se,
            "seeds": len(own),
        }
    return events


def check_seeds(search: Search) -> None:
    """Raise UserError if DPO did not get through: nothing could be compared with it."""
    dpo = search.state.dpo
    if dpo.stopped:
        raise UserError(f"dpo stopped at {dpo.stopped['at']}: {dpo.stopped['why']}")


# ---- what a proposer sees -----------------------------------------------------------------------


def view_of(search: Search) -> View:
    """The archive as of the last step that has ended."""
    measured = estimates.gains(search.state)
    known = [
        known_of(search, entry, measured.get(entry.id)) for entry in search.state.entries.values()
    ]
    return View(known=known, dpo=known[0], visited=search.visited, setting=search.setting)


def known_of(search: Search, entry: Entry, gain: estimates.Gain | None) -> Known:
    known = Known(
        id=entry.id,
        name=entry.name,
        text=search.archive.text_of(entry.id),
        by=entry.by,
        parents=entry.parents,
        genome=entry.genome,
        round=entry.round,
        size=entry.size,
        gradient=entry.gradient,
        field=search.field_of(entry.id),
        cell=entry.cell,
        stopped=entry.stopped,
        usd=entry.usd,
    )
    if entry.proxy is not None:
        known.bits = entry.proxy["bits"]
    if gain is not None:
        known.gain, known.se = gain.gain, gain.gain_se
        known.measured, known.seeds = gain.measured, len(entry.runs)
    return known


def bred_something(search: Search, number: int) -> bool:
    return any(entry.round == number for entry in search.state.entries.values())


def round_line(search: Search, number: int) -> str:
    """A line on the terminal about a round."""
    entries = [entry for entry in search.state.entries.values() if entry.round == number]
    stopped: dict[str, int] = {}
    for entry in entries:
        if entry.stopped:
            stopped[entry.stopped["at"]] = stopped.get(entry.stopped["at"], 0) + 1
    parts = [f"{count} {at}" for at, count in stopped.items()]
    text = f"round {number} of {search.settings.rounds}: {len(entries)} proposals"
    if parts:
        text += f", stopped: {', '.join(parts)}"
    measured = {
        id: gain for id, gain in estimates.gains(search.state).items() if id != search.state.dpo.id
    }
    if measured:
        best = max(measured, key=lambda id: measured[id].rank)
        gain = measured[best]
        label = search.state.entries[best].label
        text += f"; best {label} {100 * gain.gain:+.1f} ± {100 * gain.gain_se:.1f} points over dpo"
        text += f" ({gain.measured}, shrunk)"
    return text


# ---- the control --------------------------------------------------------------------------------


def take_control(search: Search) -> None:
    """As many proposals at random, up to the proxy, in an archive of their own."""
    with working(search) as workers:
        control = replace(
            search,
            archive=Archive.open(search.folder, "control"),
            arms=Arms([RandomSearch()], most_proposals=search.settings.max_proposals),
            fields={},
            workers=workers,
        )
        for number in range(search.settings.rounds + 1):
            if search.is_stopped():
                return
            if not control.archive.has(f"round {number}"):
                take_round(control, number)
    search.archive.append_step("control", [])
    search.log("control, at random: " + round_line(control, search.settings.rounds))
