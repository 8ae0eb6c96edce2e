"""Ends a process that hangs and says in what: a collective whose other end is gone never returns to Python."""

import faulthandler
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from adaptrm.errors import RESTART, printable

# Seconds that a phase may always take in which XLA compiles, or a model comes from a network.
COMPILING = 1800.0
LOADING = 4 * 3600.0
_phase: tuple[str, float] = ("starting", 0.0)


def doing(what: str, at_least: float = 0.0) -> None:
    """The main thread has got on, and does this now; work of many parts says so at each of them.

    Args:
        at_least: seconds that it may take however few the watchdog grants.
    """
    global _phase
    _phase = (what, at_least)


@contextmanager
def watching(seconds: float | None) -> Iterator[None]:
    """Where the block does the same thing for so many seconds, write the stacks of all threads and one line that names
    it, and end the process with exit code 75; None watches nothing."""
    if seconds is None:
        yield
        return
    over, tick = threading.Event(), min(1.0, seconds / 10)

    def watch() -> None:
        seen, waited = _phase, 0.0
        while not over.wait(tick):
            now = _phase
            # Ticks and no clock: a process that was suspended has not hung.
            seen, waited = now, waited + tick if now is seen else 0.0
            if waited >= max(seconds, now[1]):
                _end(now[0], waited)

    doing("starting")
    threading.Thread(target=watch, name="watchdog", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _end(what: str, waited: float) -> None:
    faulthandler.dump_traceback(sys.__stderr__)
    line = (
        f"adaptrm: {what}: nothing has moved for {waited:.0f} s; what was saved is kept; start the same command again "
        "to go on, with a larger watchdog_seconds where it was only slow"
    )
    print(printable(line), file=sys.__stderr__, flush=True)
    os._exit(RESTART)
