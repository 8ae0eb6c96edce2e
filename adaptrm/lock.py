"""A folder that one process at a time writes to: a file lock on disks, a lease on object stores."""

import ctypes
import json
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from os import PathLike

from filelock import FileLock, Timeout

from adaptrm import paths
from adaptrm.errors import InputError
from adaptrm.progress import say

LOCK = ".lock"
LEASE = 60.0  # seconds; a holder that shows no sign of life for so long is dead
SIGNS = 6  # of life a lease
HELD = "another run holds this folder; wait for it or give another --out"


class _Lost(BaseException):
    """Raised in the thread that held a folder; no ``except Exception`` on its way holds it up."""


@contextmanager
def hold(folder: str | PathLike) -> Iterator[None]:
    """Keep a folder to this process; the lock goes with the process, on an object store ``LEASE`` after a kill.

    Raises:
        InputError: another process holds it; on an object store also where one took it from this one, which had
            shown no sign of life for too long.
    """
    with (_file_lock if paths.is_local(folder) else _lease)(folder):
        yield


@contextmanager
def _file_lock(folder: str | PathLike) -> Iterator[None]:
    paths.make_dir(folder)
    lock = FileLock(paths.here(folder) / LOCK, blocking=False)
    try:
        lock.acquire()
    except Timeout:  # a lock on NFS may outlive its machine
        raise InputError(f"{folder}: {HELD}; if none runs, delete {paths.join(folder, LOCK)}") from None
    except OSError as wrong:
        raise InputError(f"{folder}: cannot be written: {wrong.strerror or wrong}; give another --out") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _lease(folder: str | PathLike) -> Iterator[None]:
    """An object with its holder's token and a count that the holder raises; no clock of another machine is read."""
    file, owner = paths.join(folder, LOCK), secrets.token_hex(8)
    _take(folder, file, owner)
    ended, holder = threading.Event(), threading.get_ident()

    def show_life() -> None:
        count = 0
        while not ended.wait(LEASE / SIGNS):
            count += 1
            with suppress(InputError):  # the store does not answer; it may the next time
                if _owner(file) != owner:
                    # No signal: jobs that a script starts in the background ignore SIGINT.
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(holder), ctypes.py_object(_Lost))
                    return
                paths.write_bytes(file, _sign(owner, count))

    thread = threading.Thread(target=show_life, daemon=True)
    thread.start()
    try:
        try:
            yield
        finally:
            ended.set()
            thread.join()
            with suppress(InputError):
                if _owner(file) == owner:
                    paths.remove(folder, [LOCK])
    except _Lost:
        raise InputError(f"{folder}: another run took this folder over; look which of the two should go on") from None


def _take(folder: str | PathLike, file: str, owner: str) -> None:
    """Make the lock object, or take over that of a holder which is dead."""
    first, start = None, time.monotonic()
    while not paths.create(file, _sign(owner, 0)):
        sign = _content(file)
        if first is None:
            first = sign
            say(f"{folder}: another run left its lock here; waiting up to {LEASE:.0f} s for a sign of its life")
        elif sign not in (None, first):
            raise InputError(f"{folder}: {HELD}")
        if time.monotonic() - start > LEASE:
            paths.write_bytes(file, _sign(owner, 0))
            time.sleep(LEASE / 30)  # others that waited here have written too by now: the last one holds it
            if _owner(file) != owner:
                raise InputError(f"{folder}: {HELD}")
            return
        time.sleep(LEASE / SIGNS / 10)


def _sign(owner: str, count: int) -> bytes:
    return json.dumps({"owner": owner, "signs": count}).encode()


def _content(file: str) -> bytes | None:
    """What stands in the lock object; None where it has gone since it was seen."""
    try:
        return paths.read_bytes(file) if paths.exists(file) else None
    except InputError:
        if paths.exists(file):
            raise
        return None


def _owner(file: str) -> str | None:
    try:
        content = _content(file)
        return None if content is None else json.loads(content)["owner"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return None
