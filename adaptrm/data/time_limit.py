"""A time limit for code that is not ours, such as a model folder's chat template, in whatever thread it runs."""

import ctypes
import threading
import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")
TICK = 0.1  # seconds between two looks at the clock

_lock = threading.Lock()
_deadlines: dict[int, float] = {}  # by thread
_watchdog: threading.Thread | None = None
_raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc
_raise_in.argtypes = (ctypes.c_ulong, ctypes.py_object)


class _Overrun(BaseException):
    """Raised inside the call; no ``except Exception`` on its way holds it up."""


def run_within(seconds: float, call: Callable[[], Result]) -> Result:
    """What ``call()`` returns.

    A signal reaches the main thread alone and another thread for the call would cost more than most calls, so one
    watchdog thread raises an exception in the thread that is late. It takes effect between two steps of Python code: a
    single step that takes long (a huge power) ends late.

    Raises:
        TimeoutError: the call took longer and was ended.
    """
    thread = threading.get_ident()
    try:
        try:
            _start(thread, seconds)
            return call()
        finally:
            _stop(thread)
    except _Overrun:
        _stop(thread)  # the exception may have come before the first had done its work
        raise TimeoutError(f"takes longer than {seconds:g} s") from None


def _start(thread: int, seconds: float) -> None:
    global _watchdog
    with _lock:
        _deadlines[thread] = time.monotonic() + seconds
        if _watchdog is None or not _watchdog.is_alive():  # a forked process has none
            _watchdog = threading.Thread(target=_watch, name="adaptrm-time-limit", daemon=True)
            _watchdog.start()


def _stop(thread: int) -> None:
    with _lock:
        if _deadlines.pop(thread, None) is None:
            _raise_in(thread, ctypes.py_object())  # takes back what has not been raised yet


def _watch() -> None:
    while True:
        time.sleep(TICK)
        with _lock:
            now = time.monotonic()
            for thread in [thread for thread, deadline in _deadlines.items() if deadline < now]:
                del _deadlines[thread]
                _raise_in(thread, _Overrun)
