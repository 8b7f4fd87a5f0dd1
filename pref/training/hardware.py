"""The device that a run is planned for: this machine's, or a card that need not be here.

--dry_run 8                     the device of this machine
--dry_run 8 --gpu a100-80       eight cards of CARDS, held or not
--dry_run 8 --gpu_gib 80        eight cards with this memory; hours for each card of CARDS with it
"""

import argparse
import importlib.util
import os
import shutil
from typing import NamedTuple

import torch

from pref.files.console import UserError
from pref.model.ranks import Ranks

MFU = 0.4  # assumed share of a card's peak; no run on a GPU has been measured


class Card(NamedTuple):
    """A GPU by its data sheet."""

    gib: float  # memory as torch reports it, a little below what the name says
    tflops: float  # dense bf16 peak with sums in fp32, TFLOP/s


CARDS = {
    "a100-40": Card(39.4, 312),
    "a100-80": Card(79.1, 312),
    "h100": Card(79.1, 989),  # SXM; the PCIe card has 756 TFLOP/s
    "h200": Card(139.8, 989),
    "b200": Card(178.3, 2250),
    "a6000": Card(47.4, 155),
    "l40s": Card(44.4, 362),
    "l4": Card(22.0, 121),
    "rtx3090": Card(23.6, 71),
    "rtx4090": Card(23.5, 165),
}


class Device(NamedTuple):
    """What one rank of a run has."""

    name: str
    on_cuda: bool
    bytes: float  # memory
    cards: dict[str, Card]  # those that hours are given for; none on a CPU
    is_here: bool = True


def is_elsewhere(args: argparse.Namespace) -> bool:
    """Whether the run is planned for cards that need not be in this machine."""
    return bool(args.gpu or args.gpu_gib)


def planned_ranks(args: argparse.Namespace, ranks: Ranks) -> Ranks:
    """The ranks that --dry_run plans for: with this process's rank, and no group behind them."""
    if args.dry_run:
        ranks = ranks._replace(world=args.dry_run)
    return ranks._replace(device=torch.device("cuda")) if is_elsewhere(args) else ranks


def check(args: argparse.Namespace) -> None:
    """Raise UserError for a planned device without --dry_run, or two of them."""
    for option in ("gpu", "gpu_gib", "mfu"):
        if getattr(args, option) is not None and args.dry_run is None:
            raise UserError(f"--{option}: only with --dry_run")
    if args.gpu and args.gpu_gib:
        raise UserError("--gpu and --gpu_gib: give one of them")


def device_of(args: argparse.Namespace, ranks: Ranks) -> Device:
    """The device of a rank."""
    if args.gpu:
        card = CARDS[args.gpu]
        return Device(args.gpu, True, card.gib * 2**30, {args.gpu: card}, is_here=False)
    if args.gpu_gib:
        near = {n: c for n, c in CARDS.items() if abs(c.gib - args.gpu_gib) < 0.1 * args.gpu_gib}
        name = f"a card with {args.gpu_gib:g} GiB"
        return Device(name, True, args.gpu_gib * 2**30, near, is_here=False)
    if ranks.device.type == "cuda":
        found = torch.cuda.get_device_properties(ranks.device)
        return Device(found.name, True, found.total_memory, cards_named(found.name))
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / ranks.world
    return Device("CPU", False, there, {})


def cards_named(name: str) -> dict[str, Card]:
    """The card of CARDS that the driver calls `name`: "NVIDIA A100-SXM4-80GB" is a100-80."""
    text = name.lower().replace(" ", "")
    found = {n: c for n, c in CARDS.items() if all(part in text for part in n.split("-"))}
    return dict([max(found.items(), key=lambda item: len(item[0]))]) if found else {}


def can_compile(device: Device) -> bool:
    """Whether torch.compile has what it needs on the device: a C++ compiler; on CUDA Triton, which
    builds its launchers with a C compiler. Assumed of a machine that is not this one.
    """
    if not device.is_here:
        return True
    if not device.on_cuda:
        return bool(shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++"))
    compilers = (os.environ.get("CC", "gcc"), "clang", "cc")
    return bool(importlib.util.find_spec("triton") and any(map(shutil.which, compilers)))
