"""A search's folder as discover.py leaves it, made up: for tests of what reads one.

Every candidate has a true gain over DPO. The proxy and training see it on the same pairs, which are
noise of their own, and the confirmation sees it on others: so the winner's curse is in it.
"""

import hashlib
import json
import random
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pref.discovery import fingerprint
from pref.discovery.archive import Archive, encode
from pref.discovery.proposals import Proposal

LOSS = """import torch
import torch.nn.functional as F


def {name}(pairs, *, {parameters}):
{body}
    return (losses, {{'preference': losses}})
"""
BODIES = (
    "    z = beta * pairs.rho\n    losses = F.softplus(-z)",
    "    z = beta * pairs.rho\n    losses = torch.relu(1.0 - z)",
    "    means = pairs.mean()\n    z = beta * means.rho\n    losses = torch.square(1.0 - z)",
    "    a, b = pairs.log_ratios\n    z = beta * (a - b)\n"
    "    losses = F.softplus(-z) + weight * torch.relu(-a)",
    "    a, b = pairs.log_ratios\n    anchor = 0.5 * (torch.square(a) + torch.square(b))\n"
    "    losses = F.softplus(-beta * pairs.delta) + weight * anchor",
    "    z = beta * pairs.rho\n    mix = torch.sigmoid(z / 0.05)\n"
    "    losses = mix * F.softplus(-z) + (1.0 - mix) * torch.exp(torch.clamp(-z, max=20.0))",
)
SEEDS = {"dpo": 0, "hinge": 1, "ipo": 2, "td_dpo": 4, "discopop": 5}
OPERATORS = ("mutate beta", "mutate a number", "swap operator", "wrap", "hoist", "new subtree")
TASKS = ("improve", "combine", "fill a cell", "simplify")
REFUSALS = (
    ("parse", "the reply is cut off: raise max_tokens"),
    ("form", "line 4: it reduces over the batch: return one loss per pair, never a mean"),
    ("form", "line 3: 'os' is no name of the form"),
    ("selftest", "is not finite on ordinary pairs"),
    ("range", "pushes badly ranked pairs the wrong way on 71 % of the grid"),
    ("proxy", "accuracy 0.38 below 0.5 - 3 SE"),
)
PAIRS = 115
SETTINGS = {
    "model": "quickstart/SmolLM2-135M-Instruct",
    "data": "quickstart/data/preferences",
    "preset": "hour",
    "seed": 0,
    "max_proposals": 60,
    "rung": [6, 3, 3],
    "seeds_per_rung": [1, 2, 3],
    "seeds_from": list(SEEDS),
    "coupled": False,
    "proxy": "on",
    "proposer": ["evolve"],
    "parameters": None,
    "train_args": "--global_batch 8 --per_device_batch 8 --max_steps 12",
    "task": "",
    "task_args": "",
    "gen_args": "",
    "features": "",
    "identity": {},
    "versions": {"pref": "1.3.0"},
}


class Made(NamedTuple):
    """A made-up proposal and what is true of it."""

    proposal: Proposal
    id: str
    round: int
    program: str
    true_gain: float
    refusal: tuple[str, str] | None

    @property
    def label(self) -> str:
        return f"{self.id}_{self.proposal.name}"


def write_archive(
    folder: Path,
    proposals: int = 60,
    arms: tuple[str, ...] = ("evolve", "gpt-5-mini"),
    trained: int = 6,  # candidates that were trained with; 0: the proxy alone
    confirmed: bool = True,
    hostile: str = "",  # the thought, original text and reason of p0007, and part of its proposer
    seed: int = 0,
) -> Path:
    """Write a search's folder and return it."""
    draw = random.Random(seed)
    made: list[Made] = []
    for number in range(1, proposals + 1):
        made.append(propose(number, made, arms, draw))
    if hostile:
        made[6] = refused_with(made[6], hostile)
    archive = Archive.open(folder)
    for round in range(made[-1].round + 1):
        events = [event for one in made if one.round == round for event in fate(one, made, draw)]
        archive.append_step(f"round {round}", events)
    for one in made:
        archive.write_proposal(one.id, one.proposal)
        if not (one.refusal and one.refusal[0] in ("parse", "form")):
            archive.write_program(one.id, one.program, {})
    state = archive.state()
    alive = [one for one in made if state.entries[one.id].reached_proxy]
    looks = {one.id: -state.entries[one.id].proxy["difference"] for one in alive}
    best = sorted(alive[1:], key=lambda one: looks[one.id])[:trained]
    if trained:
        train(archive, [alive[0], *best], draw)
        write_run(folder / "results" / "dpo_b0.1_s101", draw)
    if confirmed:
        confirm(archive, sorted(best, key=lambda one: -one.true_gain)[:3], draw)
    write_control(folder, proposals, draw)
    write_json(folder / "settings.json", SETTINGS)
    write_json(folder / "split.json", {"val": [f"pair{n}" for n in range(PAIRS)]})
    return folder


# ---- proposals ----------------------------------------------------------------------------------


def propose(number: int, earlier: list[Made], arms: tuple[str, ...], draw: random.Random) -> Made:
    """The next proposal: a seed, or one bred from a good earlier one."""
    id = f"p{number:04}"
    if number <= len(SEEDS):
        name, kind = list(SEEDS.items())[number - 1]
        seed = Proposal(text="", by="seed", operator="seed", parents=[], name=name)
        true = 0.0 if name == "dpo" else draw.gauss(-0.01, 0.01)
        return Made(seed, id, 0, loss_text(f"{id}_{name}", kind, draw), true, None)
    by = draw.choice(arms)
    alive = [made for made in earlier if made.refusal is None and not is_copy(made.id)]
    best = sorted(draw.sample(alive, min(5, len(alive))), key=lambda made: -made.true_gain)
    crossed = draw.random() < 0.25 and len(best) > 1
    operator = draw.choice(OPERATORS if by == "evolve" else TASKS)
    name = draw.choice(("blend", "tilt", "calm_tail", "held_margin"))
    proposal = Proposal(
        text="",
        by=by,
        operator="crossover" if crossed and by == "evolve" else operator,
        parents=[made.id for made in best[: 2 if crossed else 1]],
        name=name,
        usd=0.0 if by == "evolve" else 0.0021,
    )
    if by != "evolve":
        proposal.thought = "Let the gradient of well ranked pairs fade more slowly."
        proposal.original = "```python\ndef loss(pairs): ...\n```"
    true = min(0.05, best[0].true_gain + draw.gauss(-0.003, 0.01))
    kinds = REFUSALS[1:] if by == "evolve" else REFUSALS
    refusal = draw.choice(kinds) if draw.random() < (0.12 if by == "evolve" else 0.4) else None
    text = loss_text(f"{id}_{name}", draw.randrange(len(BODIES)), draw)
    return Made(proposal, id, (number - 6) // 16 + 1, text, true, refusal)


def is_copy(id: str) -> bool:
    """Every ninth proposal is a duplicate of an earlier one."""
    return int(id[1:]) > 10 and int(id[1:]) % 9 == 0


def loss_text(name: str, kind: int, draw: random.Random) -> str:
    body = BODIES[kind]
    values = {"beta": round(10 ** draw.uniform(-1.6, 0), 4), "weight": round(draw.random(), 3)}
    own = [f"{key}: float = {value}" for key, value in values.items() if key in body]
    return LOSS.format(name=name, parameters=", ".join(own), body=body)


def refused_with(one: Made, hostile: str) -> Made:
    """The proposal with hostile text wherever a model or a server has a say."""
    proposal = one.proposal
    proposal.by, proposal.operator = f"model {hostile}", f"improve {hostile}"
    proposal.name = f"name {hostile}"
    proposal.thought = proposal.original = hostile
    return one._replace(refusal=("form", hostile))


def fate(one: Made, made: list[Made], draw: random.Random) -> list[dict]:
    """The events of a proposal up to the proxy."""
    proposal = one.proposal
    given = {"by": proposal.by, "operator": proposal.operator, "parents": proposal.parents}
    given |= {"name": proposal.name, "sha256": "0" * 64, "usd": proposal.usd, "genome": None}
    events = [{"event": "proposed", "id": one.id, "round": one.round, **given}]
    at, why = one.refusal or ("", "")
    if at in ("parse", "form"):
        return [*events, {"event": "stopped", "id": one.id, "at": at, "why": why}]
    parameters, sha = {"beta": 0.1}, hashlib.sha256(one.program.encode()).hexdigest()
    events.append({"event": "read", "id": one.id, "sha256": sha, "parameters": parameters})
    events[-1]["size"] = one.program.count("(") + one.program.count("*")
    if at in ("selftest", "range"):
        return [*events, {"event": "stopped", "id": one.id, "at": at, "why": why}]
    number = int(one.id[1:])
    if is_copy(one.id):
        near = draw.choice([m for m in made[: number - 1] if m.refusal is None]).id
        stop = {"event": "stopped", "id": one.id, "at": "duplicate", "near": near}
        return [*events, stop | {"why": f"behaves as {near}", "distance": 0.012}]
    sides = (fingerprint.LEFT, fingerprint.RIGHT, fingerprint.SHIFT)
    cell = ",".join(draw.choices(names, weights=(5, 3, 1)[: len(names)])[0] for names in sides)
    events.append({"event": "fingerprint", "id": one.id, "cell": cell, "gradient": {"0": 1.0}})
    events.append(proxy_event(one.id, one.true_gain - 0.2 * bool(one.refusal), number == 1, draw))
    if one.refusal:
        events.append({"event": "stopped", "id": one.id, "at": at, "why": why})
    return events


def proxy_event(id: str, gain: float, dpo: bool, draw: random.Random) -> dict:
    se = 0.0 if dpo else round(draw.uniform(0.014, 0.026), 4)
    difference = round(gain + draw.gauss(0, se), 4)
    event = {"event": "proxy", "id": id, "acc": 0.62 + difference, "bits": 0.05 + difference / 3}
    return event | {"difference": difference, "se": se, "seeds": 2}


def write_control(folder: Path, proposals: int, draw: random.Random) -> None:
    """The random search: as many proposals, none of them bred."""
    events = []
    for number in range(1, proposals + 1):
        id = f"p{number:04}"
        dpo = number == 1
        given = {"by": "seed" if dpo else "control", "operator": "grow", "parents": []}
        given |= {"name": "dpo" if dpo else "grown", "sha256": "0" * 64, "usd": 0.0, "genome": None}
        events.append({"event": "proposed", "id": id, "round": number // 16, **given})
        events.append({"event": "fingerprint", "id": id, "cell": "", "gradient": {}})
        events.append(proxy_event(id, 0.0 if dpo else draw.gauss(-0.01, 0.015), dpo, draw))
    Archive.open(folder, "control").append_step("round 0", events)


# ---- training -----------------------------------------------------------------------------------


def train(archive: Archive, chosen: list[Made], draw: random.Random) -> None:
    """Racing: all with one seed, half with three, three with six; DPO in every seed."""
    hard = np.array([draw.gauss(0.55, 1.0) for _ in range(PAIRS)])  # below 0: ranked wrong
    own = {one.id: np.array([draw.gauss(0, 0.15) for _ in range(PAIRS)]) for one in chosen}
    left, first = chosen, 101
    for rung, count in enumerate((1, 2, 3)):
        seeds = list(range(first, first + count))
        ids = [one.id for one in left]
        events = [{"event": "rung", "k": rung, "ids": ids, "seeds": seeds}]
        for seed in seeds:
            noise = np.array([draw.gauss(0, 0.1) for _ in range(PAIRS)])
            events += [run_of(one, hard + own[one.id] + noise, seed, rung) for one in left]
        first += count
        kept = sorted(left[1:], key=lambda one: -one.true_gain)[: max(3, len(left) // 2)]
        why = "the upper 90 % limit of its difference to the best is below 0"
        events += [
            {"event": "stopped", "id": one.id, "at": f"rung{rung}", "why": why}
            for one in left[1:]
            if one not in kept
        ]
        archive.append_step(f"rung {rung}", events)
        left = [left[0], *kept]


def run_of(one: Made, hard: np.ndarray, seed: int, rung: int) -> dict:
    """One training run: a pair is ranked right if it is not too hard for this loss."""
    correct = (hard + 3.0 * one.true_gain > 0).astype(float)
    run = {"event": "trained", "id": one.id, "seed": seed, "status": "finished", "rung": rung}
    run |= {"run_id": f"{one.label}_s{seed}", "acc_ref": float(correct.mean())}
    return run | {"correct": encode(correct)}


def write_run(folder: Path, draw: random.Random) -> None:
    """A DPO run with the log-probs of its validation pairs before and after."""
    rows = []
    for step in (0, 24):
        for n in range(PAIRS):
            chosen, rejected = -draw.uniform(40, 200), -draw.uniform(40, 200)
            moved = (draw.gauss(0.8, 1.5), draw.gauss(-0.6, 1.5)) if step else (0.0, 0.0)
            row = {"id": f"pair{n}", "step": step, "ref_chosen": chosen, "ref_rejected": rejected}
            row |= {"policy_chosen": chosen + moved[0], "policy_rejected": rejected + moved[1]}
            rows.append(row | {"len_chosen": 34, "len_rejected": 30})
    folder.mkdir(parents=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "val_pairs.jsonl").write_text(lines, encoding="utf-8")
    write_json(folder / "args.json", {"loss": "dpo", "beta": 0.1, "seed": 101})


def confirm(archive: Archive, finalists: list[Made], draw: random.Random) -> None:
    """confirmation.json, and the events around it."""
    ids, seeds = [one.id for one in finalists], [201, 202, 203, 204, 205]
    archive.append({"event": "looked", "ids": ids, "seeds": seeds, "again": False})
    rows = []
    for one in finalists:
        value = one.true_gain + draw.gauss(0, 0.006) if rows else 0.03
        row = {"id": one.id, "name": one.proposal.name, "difference": value, "low": value - 0.018}
        row |= {"high": value + 0.018, "p_holm": 0.03, "dpo_beta": 0.2, "detectable": 0.025}
        rows.append(row | {"word": "better" if value > 0.018 else "undecided"})
    texts = [f"{row['id']}_{row['name']} is {row['word']}" for row in rows]
    verdict = f"{'; '.join(texts)} (229 unseen pairs, 5 new seeds, dpo with beta 0.2)"
    content = {"verdict": verdict, "margin": 0.01, "pairs": 229, "seeds": seeds, "dpo_beta": 0.2}
    content |= {"candidates": rows, "confirmatory": True}
    write_json(archive.folder / "confirmation.json", content)
    archive.append({"event": "confirmed", "verdict": verdict, "ids": ids})


def write_json(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
