"""SIGTERM, the notice that this machine goes away."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from adaptrm.errors import Stopped

AGAIN = "start the same command again to go on"
NOTHING_TO_SAVE = f"stopped by SIGTERM; what was saved is kept; {AGAIN}"


@contextmanager
def stops_at_once() -> Iterator[None]:
    """SIGTERM in the block, where there is nothing to save, raises ``Stopped``."""

    def stop(*_) -> None:
        raise Stopped(NOTHING_TO_SAVE)

    with on_sigterm(stop):
        yield


@contextmanager
def on_sigterm(handler: Callable) -> Iterator[None]:
    """SIGTERM in the block calls a handler; only a main thread has signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
