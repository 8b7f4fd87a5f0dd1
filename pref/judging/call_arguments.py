"""The arguments of calls to a server, the same for judge.py and discover.py."""

import argparse
import math
from collections.abc import Callable

from pref.files.console import UserError


def add_call_arguments(add: Callable, timeout_s: float) -> None:
    """Declare them with `add`, argparse's add_argument. timeout_s: the default."""
    add("--rpm", type=float, help="calls per minute at most (default: no limit)")
    add("--concurrency", type=int, default=8, help="calls in flight at a time (default 8)")
    add(
        "--timeout_s",
        type=float,
        default=timeout_s,
        help=f"seconds to wait for a reply (default {timeout_s:g})",
    )
    add(
        "--max_retries",
        type=int,
        default=5,
        help="tries after the first, with growing pauses, after HTTP 408, 409, 429, 5xx, a timeout "
        "or a lost connection (default 5)",
    )


def check_call_arguments(args: argparse.Namespace) -> None:
    """Raise UserError for a value that cannot be."""
    check_least(args, concurrency=1, max_retries=0)
    if not args.timeout_s > 0:
        raise UserError(f"--timeout_s {args.timeout_s}: must be above 0")
    if args.rpm is not None and not 0 < args.rpm < math.inf:
        raise UserError(f"--rpm {args.rpm}: must be above 0")


def check_least(args: argparse.Namespace, **least: int) -> None:
    """Raise UserError for an argument that is given and below its least value."""
    for name, value in least.items():
        if (given := getattr(args, name)) is not None and given < value:
            raise UserError(f"--{name} {given}: must be at least {value}")
