"""A training loop that is told to stop, by SIGTERM to any of its processes, stops where it can save."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax

from adaptrm.errors import Stopped
from adaptrm.parallel.distributed import wait_for_all
from adaptrm.parallel.stopping import asked
from adaptrm.preemption import NOTHING_TO_SAVE, on_sigterm


@contextmanager
def stops_when_asked() -> Iterator[Callable[[], bool]]:
    """SIGTERM in the block is kept until it is asked for.

    Returns:
        Whether to stop now. Several processes ask at the same places and are all told so at the same one.

    Raises:
        Stopped: it came, and the block has ended without saying so.
    """
    if jax.process_count() > 1:
        with asked() as ask:
            yield ask
            wait_for_all()  # what one has still to save is saved before another may end all of them
        return
    noticed = threading.Event()
    with on_sigterm(lambda *_: noticed.set()):
        yield noticed.is_set
    if noticed.is_set():
        raise Stopped(NOTHING_TO_SAVE)
