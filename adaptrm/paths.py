"""Every path a user gives: local, ``gs://``, ``s3://``, ``memory://``; files appear whole or not at all."""

import gzip
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import fsspec
from filelock import FileLock, Timeout

from adaptrm.errors import InputError


def is_local(path: str | os.PathLike) -> bool:
    return "://" not in str(path)


def local(path: str | os.PathLike) -> Path:
    """A path that has to be on this machine's disks.

    Raises:
        InputError: it is the address of an object store.
    """
    if not is_local(path):
        raise InputError(f"{path}: must be a local folder for now; copy it from or to the object store")
    return Path(path)


def _split(path: str | os.PathLike):
    try:
        return fsspec.core.url_to_fs(str(path))
    except (ImportError, ValueError) as wrong:  # no package for this kind of address, or no such kind
        raise InputError(f"{path}: cannot be reached: {str(wrong).splitlines()[0]}") from None


def join(folder: str | os.PathLike, *names: str) -> str:
    return "/".join([str(folder).rstrip("/"), *names])


def exists(path: str | os.PathLike) -> bool:
    fs, inner = _split(path)
    return fs.exists(inner)


def is_dir(path: str | os.PathLike) -> bool:
    fs, inner = _split(path)
    return fs.isdir(inner)


def make_dir(path: str | os.PathLike) -> None:
    """Make a folder; a clear line where it cannot be made or a file is in the way."""
    fs, inner = _split(path)
    try:
        fs.makedirs(inner, exist_ok=True)
    except OSError as wrong:
        raise InputError(f"{path}: cannot make this folder: {wrong.strerror or wrong}; give another --out") from None


def names(folder: str | os.PathLike) -> list[str]:
    """Sorted names of what is in a folder; empty where it does not exist."""
    fs, inner = _split(folder)
    if not fs.isdir(inner):
        return []
    return sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(inner, detail=False))


@contextmanager
def _opened(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    fs, inner = _split(path)
    if not fs.isfile(inner):
        what = "is a folder, not a file" if fs.isdir(inner) else "does not exist"
        raise InputError(f"{path}: {what}; check the path")
    with fs.open(inner, "rb") as stream:
        yield stream


@contextmanager
def reading(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """Open for reading bytes, unpacking ``.gz``."""
    with _opened(path) as raw:
        if str(path).endswith(".gz"):
            with gzip.open(raw, "rb") as unpacked:
                yield unpacked
        else:
            yield raw


def sha256(path: str | os.PathLike) -> str:
    """Of a file's bytes as they are stored."""
    with _opened(path) as raw:
        return hashlib.file_digest(raw, "sha256").hexdigest()


def read_bytes(path: str | os.PathLike) -> bytes:
    with reading(path) as stream:
        return stream.read()


@contextmanager
def writing(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """Open for writing bytes; the file appears under its name when the block ends without an error.

    Raises:
        InputError: the folder cannot be written to or is full.
    """
    fs, inner = _split(path)
    partial = f"{inner}.partial"
    try:
        fs.makedirs(inner.rsplit("/", 1)[0], exist_ok=True)
        try:
            with fs.open(partial, "wb") as stream:
                yield stream
                if is_local(path):
                    stream.flush()
                    os.fsync(stream.fileno())
            if is_local(path):
                os.replace(partial, inner)
            else:
                fs.mv(partial, inner)
        except BaseException:
            with suppress(OSError):
                fs.rm(partial)
            raise
    except OSError as wrong:
        if wrong.filename not in (None, partial, inner):  # not of this file: what the block itself reads
            raise
        raise InputError(f"{path}: cannot be written: {wrong.strerror or wrong}; free space or change --out") from None


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    with writing(path) as stream:
        stream.write(data)


@contextmanager
def hold(folder: str | os.PathLike) -> Iterator[None]:
    """Keep a run folder to this process; the lock goes with the process, also when it is killed.

    Raises:
        InputError: another process holds it.
    """
    make_dir(folder)
    if not is_local(folder):  # object stores have no locks
        yield
        return
    lock = FileLock(Path(folder) / ".lock", blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(f"{folder}: another run holds this folder; wait for it or give another --out") from None
    except OSError as wrong:
        raise InputError(f"{folder}: cannot be written: {wrong.strerror or wrong}; give another --out") from None
    try:
        yield
    finally:
        lock.release()
