"""SIGTERM, the notice that this machine goes away."""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from adaptrm.errors import RESTART, Stopped

AGAIN = "start the same command again to go on"
NOTHING_TO_SAVE = f"stopped by SIGTERM; what was saved is kept; {AGAIN}"
PATIENCE = 5.0  # seconds for an orderly end


@contextmanager
def stops_at_once() -> Iterator[None]:
    """SIGTERM in the block, where there is nothing to save, raises ``Stopped``.

    Where that does not end the block, it ends the process: C++ that compiles sees no signal, and some libraries swallow
    what is raised in their midst. So it does at once in an import, which an exception may crash.
    """

    def stop(_: int, frame: FrameType | None) -> None:
        if any("importlib" in inner.f_code.co_filename for inner, _ in traceback.walk_stack(frame)):
            end_here()
        raise Stopped(NOTHING_TO_SAVE)

    here, there = os.pipe()
    os.set_blocking(there, False)
    over = threading.Event()
    threading.Thread(target=_insist, args=(here, over), name="stopping", daemon=True).start()
    try:
        with on_sigterm(stop, there):
            yield
    finally:
        over.set()
        os.close(there)


def _insist(pipe: int, over: threading.Event) -> None:
    with open(pipe, "rb", buffering=0) as told:
        while signals := told.read(64):
            if signal.SIGTERM in signals and not over.wait(PATIENCE):
                end_here()


def end_here() -> None:
    """End the process whatever its other threads do; nothing is left to be saved."""
    print(f"adaptrm: {NOTHING_TO_SAVE}", file=sys.stderr, flush=True)
    os._exit(RESTART)


@contextmanager
def on_sigterm(handler: Callable, told: int = -1) -> Iterator[None]:
    """SIGTERM in the block calls a handler; only a main thread has signals.

    Args:
        told: file descriptor to which the numbers of signals are written at once, whatever the main thread does.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, told_before = signal.signal(signal.SIGTERM, handler), signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(told_before, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, before)
