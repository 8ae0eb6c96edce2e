"""A notice that this machine goes away: SIGTERM, or what jax hears of it on any of several hosts."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
from jax.experimental import multihost_utils

from adaptrm.errors import Stopped

AGAIN = "start the same command again to go on"
NOTHING_TO_SAVE = f"stopped by SIGTERM; what was saved is kept; {AGAIN}"


@contextmanager
def stops_at_once() -> Iterator[None]:
    """SIGTERM in the block, where there is nothing to save, raises ``Stopped``."""

    def stop(*_) -> None:
        raise Stopped(NOTHING_TO_SAVE)

    with _sigterm(stop):
        yield


@contextmanager
def stops_after_a_step() -> Iterator[Callable[[int], bool]]:
    """SIGTERM in the block is kept until it is asked for.

    Returns:
        Whether to stop after the step of a number, to be asked after every step; several processes all stop after the
        same one.
    """
    noticed = threading.Event()

    def reached(step: int) -> bool:
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(step)
        return noticed.is_set()

    with _sigterm(lambda *_: noticed.set()):
        yield reached
    if noticed.is_set():  # after the last step
        raise Stopped(NOTHING_TO_SAVE)


@contextmanager
def _sigterm(handler: Callable) -> Iterator[None]:
    """Several processes leave the signal to jax, which tells all of them; and only a main thread has signals."""
    if jax.distributed.is_initialized() or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
