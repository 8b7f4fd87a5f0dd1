"""UserError, exit codes, text tables"""

import os
import sys
import time
from collections.abc import Callable


class UserError(Exception):
    """A mistake of the user's that the program can name: place, fact, remedy. Printed without a
    traceback.
    """


def run_main(main: Callable[[], int | None]) -> None:
    """Run a stage's `main`. Exit codes: 0 done, 1 incomplete, 2 user's mistake (one line on
    stderr), 130 Ctrl-C.
    """
    try:
        code = main() or 0
    except UserError as error:
        if (rank := os.environ.get("RANK", "0")) != "0":
            # Under torchrun most mistakes meet every rank. Rank 0 says so and torchrun ends the
            # others meanwhile; what only this rank has met is said all the same.
            time.sleep(5)
        print(f"error{f' (rank {rank})' if rank != '0' else ''}: {error}", file=sys.stderr)
        code = 2
    except BrokenPipeError:  # the reader (`| head`) went away: not a mistake
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:  # no permission, disk full, a file where a folder should be: the message names the path
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted: run the same command again to continue", file=sys.stderr)
        code = 130
    sys.exit(code)


def print_rows(rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
