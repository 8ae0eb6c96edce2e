"""SIGTERM to one of several processes stops all: at once, or in a block that asks all at the same of its questions."""

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from jax._src import distributed  # jax has no public way to tell other processes something

from adaptrm.errors import Stopped
from adaptrm.preemption import NOTHING_TO_SAVE, end_here

KEY = "adaptrm/stop"
LOOK = 0.5  # seconds between two looks whether another process was told
ANSWER = 15_000  # milliseconds for all processes to say where they are; one that does not is gone
LAST = 2.0  # seconds by which process 0 outlives the others, which it serves
_lock = threading.Lock()
_asked: int | None = None  # how often the block that runs has asked; None outside of one
_stop_at: int | None = None  # the question that is answered with yes


def stop_together(number: int, count: int) -> threading.Event:
    """From now on SIGTERM to any process ends all of them with exit code 75, where no block of ``asked`` runs.

    By a thread of its own: the main thread may wait in C++ for another process, and sees no signal there.

    Args:
        number: of this process, of ``count``.

    Returns:
        To be set once all have joined; before that this process ends alone.
    """
    joined = threading.Event()
    here, there = os.pipe()
    os.set_blocking(there, False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(there, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(here, joined, number, count), name="stopping", daemon=True).start()
    return joined


@contextmanager
def asked() -> Iterator[Callable[[], bool]]:
    """A block in which there is something to save.

    Returns:
        Whether to stop now. All processes ask at the same places, and the same question is answered with yes in all.

    Raises:
        Stopped: the block was to stop, now or later, and has ended without saying so.
    """
    global _asked
    with _lock:
        _asked = 0

    def ask() -> bool:
        global _asked
        with _lock:  # which is held while the processes agree
            _asked += 1
            return _asked == _stop_at

    try:
        yield ask
    finally:
        with _lock:
            _asked = None
    if _stop_at is not None:
        raise Stopped(NOTHING_TO_SAVE)


def _watch(pipe: int, joined: threading.Event, number: int, count: int) -> None:
    while True:
        ready, _, _ = select.select([pipe], [], [], LOOK)
        signalled = bool(ready) and signal.SIGTERM in os.read(pipe, 64)
        if signalled and not joined.is_set():
            end_here()
        if signalled or (joined.is_set() and _others_told()):
            _stop(number, count)
            return


def _others_told() -> bool:
    with suppress(Exception):  # it is not there, or this process has left
        return bool(distributed.global_state.client.key_value_try_get(KEY))
    return False


def _stop(number: int, count: int) -> None:
    """Tell the others, and agree with them on when; end here and now where one of them has nothing to save."""
    global _stop_at
    with _lock:
        places = [None]
        with suppress(Exception):  # one of the others is gone
            client = distributed.global_state.client
            client.key_value_set(KEY, "told", allow_overwrite=True)
            client.key_value_set(f"{KEY}/{number}", str(-1 if _asked is None else _asked))
            places = [int(client.blocking_key_value_get(f"{KEY}/{other}", ANSWER)) for other in range(count)]
        if None not in places and -1 not in places:
            _stop_at = max(places) + 1
            return
        if number == 0:
            time.sleep(LAST)
        end_here()
