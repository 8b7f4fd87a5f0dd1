"""From settings to a search that can take its steps: pairs, features, how far training moves."""

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pref.discovery import (
    feature_pass,
    horizon,
    proposer_arguments,
    rungs,
    search,
    settings,
    split,
    stand_in,
)
from pref.discovery.archive import Archive
from pref.discovery.evolve import Evolve, RandomSearch
from pref.discovery.features import Features
from pref.discovery.search import Search
from pref.discovery.settings import Settings
from pref.discovery.workers import Workers
from pref.files import console
from pref.files.console import UserError
from pref.sweeping.scheduler import Stop

# Before the pilot says how far training moves: log-ratios, in nats, and the peak learning rate of
# the proxy, in the unit of features.py.
VISITED, PROXY_RATE = 10.0, 0.3


@contextmanager
def opened(args: argparse.Namespace, chosen: Settings, stop: Stop) -> Iterator[Search]:
    """The search in args.folder, with everything that its steps need. Raises UserError."""
    # 1) The same search as before? Its pairs; who proposes, with one question to each model.
    folder = args.folder.resolve()
    check_name(folder)
    settings.record(folder, chosen)
    if chosen.is_stand_in:
        pairs, steps, batch, _ = stand_in.read(Path(chosen.features))
    else:
        pairs = split.write_search(Path(chosen.data), folder)
        steps, batch = chosen.steps(pairs.train), chosen.training().global_batch
    own = {"evolve": Evolve(), "random": RandomSearch()}
    with proposer_arguments.open_arms(
        args,
        folder,
        own,
        most_proposals=chosen.max_proposals,
        coupled=chosen.coupled,
        stop_level=lambda: stop.level,
    ) as arms:
        archive = Archive.open(folder)
        to_do = [step for step in search.plan(chosen) if not archive.has(step.name)]
        if any(step.kind == "round" for step in to_do):
            arms.check()

        # 2) How far training moves, and what the proxy needs for it, is looked up later.
        yield Search(
            folder=folder,
            settings=chosen,
            archive=archive,
            arms=arms,
            open_workers=lambda: open_workers(None, VISITED, batch),
            visited=VISITED,
            setting=setting_text(chosen, pairs, steps, VISITED),
            proxy_steps=steps,
            proxy_rate=PROXY_RATE,
            pairs=pairs,
            batch=batch,
            stop_level=lambda: stop.level,
            until=time.monotonic() + 3600 * args.max_hours if args.max_hours else None,
            rung_only=args.rung_only,
        )


def check_name(folder: Path) -> None:
    """Grid files, in which the folder is named, separate values by spaces."""
    if any(letter.isspace() or letter == "#" for letter in str(folder)):
        raise UserError(f"{folder}: a search's folder must have no space and no # in its path")


def look_ahead(one: Search) -> bool:
    """What rounds need to know first, where some are left: how far a DPO run moves the policy, and
    with which learning rate the proxy moves as far. Returns False if a signal stopped it.
    """
    chosen = one.settings
    kinds = {step.kind for step in search.plan(chosen) if not one.archive.has(step.name)}
    if not chosen.is_stand_in and not kinds & {"round", "control"}:
        return True

    # 1) The features, whose pass leaves the reference's log-probs for the runs.
    path, features = None, None
    if chosen.proxy != "off" or chosen.is_stand_in:
        path = Path(chosen.features) if chosen.features else compute_features(one)
        features = Features.load(path)

    # 2) The pilot: DPO with rung 0's first seed, which rung 0 then finds trained.
    if chosen.is_stand_in:
        one.proxy_rate = stand_in.read(path).learning_rate
        pilot = horizon.pilot(
            features, steps=one.proxy_steps, batch=one.batch, learning_rate=one.proxy_rate
        )
    else:
        run = rungs.pilot(one)
        if run is None:
            return False
        pilot = horizon.of_run(run, one.proxy_steps)
        if features is not None:
            one.proxy_rate = horizon.match_rate(
                features, pilot, steps=one.proxy_steps, batch=one.batch
            )
    one.log(
        f"pilot: after {one.proxy_steps} steps of dpo 90 % of the log-ratios lie within "
        f"{pilot.visited:.2g} nats; learning rate of the proxy {one.proxy_rate:.2g}"
    )
    if pilot.note and not chosen.is_stand_in:
        one.log(f"note: {pilot.note}")

    # 3) What follows from it.
    one.visited = pilot.visited
    one.setting = setting_text(chosen, one.pairs, one.proxy_steps, one.visited)
    one.open_workers = lambda: open_workers(path, one.visited, one.batch)
    return True


def compute_features(one: Search) -> Path:
    begun = time.monotonic()
    path = feature_pass.compute(
        one.settings.model,
        one.folder / "data" / "search",
        one.settings.given_train_args(),
        one.folder / "features",
        one.is_stopped,
    )
    if (seconds := time.monotonic() - begun) > 5:
        one.log(f"features of the pairs: {seconds:.0f} s")
    return path


def open_workers(features: Path | None, visited: float, batch: int) -> Workers:
    count = max(1, console.usable_cores())
    return Workers(count, features, {"visited": visited, "batch": batch})


def setting_text(chosen: Settings, pairs: split.Split, steps: int, visited: float) -> str:
    """Three lines for a model's prompt. No path: it would be a part of what is paid for once."""
    if chosen.is_stand_in:
        return (
            "Model: none; a linear policy on features of the responses stands in for it.\n"
            f"Pairs: {pairs.train} to train on, {pairs.val} others to measure accuracy on.\n"
            f"Training: {steps} AdamW steps; dpo moves log-ratios by about {visited:.2g} nats."
        )
    args = chosen.training()
    rate = f"{args.learning_rate:g}"
    return (
        f"Model: {Path(chosen.model).name}, trained with LoRA (rank {args.lora_r}).\n"
        f"Pairs: {pairs.train} to train on, {pairs.val} others to measure accuracy on.\n"
        f"Training: {steps} AdamW steps of {args.global_batch} pairs, peak learning rate {rate}; "
        f"dpo moves log-ratios by about {visited:.2g} nats."
    )
