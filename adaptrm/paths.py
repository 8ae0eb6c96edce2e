"""Every path a user gives: local, ``gs://``, ``s3://``, ``memory://``; files appear whole or not at all.

What disks and stores raise becomes an ``InputError`` of one line here, and nowhere else.
"""

import gzip
import hashlib
import io
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import fsspec

from adaptrm.errors import InputError

EXTRAS = {"s3": "s3", "gs": "gcs", "gcs": "gcs"}  # kind of address -> the extra that installs its package
READ = ("cannot be read", "check the address, permissions and network")
WRITE = ("cannot be written", "free space or change --out")


def is_local(path: str | os.PathLike) -> bool:
    return "://" not in str(path)


def join(folder: str | os.PathLike, *names: str) -> str:
    return "/".join([str(folder).rstrip("/"), *names])


@contextmanager
def told(path: str | os.PathLike, failed: str, mend: str) -> Iterator[None]:
    """One line for whatever the calls inside raise; botocore, aiohttp and google have exceptions of their own."""
    try:
        yield
    except InputError:
        raise
    except Exception as wrong:
        if not isinstance(wrong, OSError) and type(wrong).__module__ == "builtins":  # a fault of ours
            raise
        raise InputError(f"{path}: {failed}: {_reason(wrong)}; {mend}") from None


def _reason(wrong: Exception) -> str:
    text = (getattr(wrong, "strerror", None) or str(wrong) or type(wrong).__name__).splitlines()[0].rstrip(".")
    return f"not found: {text}" if isinstance(wrong, FileNotFoundError) and " " not in text else text


def _split(path: str | os.PathLike):
    """The file system of a path, and the path in it."""
    kind = str(path).partition("://")[0]
    extra = f"pip install 'adaptrm[{EXTRAS[kind]}]'" if kind in EXTRAS else "install the package for such addresses"
    with told(path, "cannot be reached", "check the address and the credentials"):
        try:
            fs, inner = fsspec.core.url_to_fs(str(path))
        except ImportError as missing:
            raise InputError(f"{path}: cannot be reached: {_reason(missing)}; {extra}") from None
        except ValueError as wrong:
            raise InputError(f"{path}: cannot be reached: {_reason(wrong)}; give a folder, s3:// or gs://") from None
    fs.invalidate_cache()  # of listings: what other processes write shows at once
    return fs, inner.rstrip("/")


def _kind(path: str | os.PathLike) -> str | None:
    """``file``, ``directory``, ``other``, or None where there is nothing."""
    fs, inner = _split(path)
    with told(path, *READ):
        try:
            return fs.info(inner)["type"]
        except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: no store has such a name
            return None


def exists(path: str | os.PathLike) -> bool:
    return _kind(path) is not None


def is_dir(path: str | os.PathLike) -> bool:
    return _kind(path) == "directory"


def here(path: str | os.PathLike) -> Path:
    """A local path; ``~`` is the home folder, as it is for fsspec."""
    return Path(path).expanduser()


def check_apart(out: str | os.PathLike, source: str | os.PathLike) -> None:
    """Raise where a result would be written over what it is made of."""
    same = is_local(out) and is_local(source) and os.path.realpath(here(out)) == os.path.realpath(here(source))
    if same or str(out) == str(source):
        raise InputError(f"{out}: is what is read; give another --out")


def make_dir(path: str | os.PathLike) -> None:
    """Make a folder; a clear line where it cannot be made or a file is in the way. Stores have none to make."""
    if is_local(path):  # s3fs would make a bucket that is not there
        with told(path, "cannot make this folder", "give another --out"):
            os.makedirs(here(path), exist_ok=True)


def names(folder: str | os.PathLike) -> list[str]:
    """Sorted names of what is in a folder; empty where it does not exist."""
    if not is_dir(folder):
        return []
    fs, inner = _split(folder)
    with told(folder, *READ):
        entries = {entry.rstrip("/") for entry in fs.ls(inner, detail=False)}
    return sorted(entry.rsplit("/", 1)[-1] for entry in entries - {inner})


def files(folder: str | os.PathLike, deep: bool = False) -> dict[str, str]:
    """Files in a folder (``deep``: and below it) by their relative names, each with what changes when it does.

    Raises:
        InputError: a name would lead out of the folder it is copied to, or is a pattern.
    """
    fs, inner = _split(folder)
    with told(folder, *READ):
        try:
            found = fs.find(inner, detail=True) if deep else {e["name"]: e for e in fs.ls(inner, detail=True)}
        except FileNotFoundError:
            return {}
    versions = {}
    for path, info in found.items():
        name = path.removeprefix(inner + "/")
        if info["type"] != "file" or name in ("", path):
            continue
        if not {"", ".", ".."}.isdisjoint(name.split("/")) or not set("*?[]\\\0").isdisjoint(name):
            raise InputError(f"{folder}: holds a file with the unsafe name {name!r}; delete it")
        versions[name] = repr(sorted(info.items()))
    return versions


def fetch(folder: str | os.PathLike, names: Iterable[str], to: Path) -> None:
    """Copy files of a folder, by names that ``files`` gave, into a local one."""
    fs, inner = _split(folder)
    names = list(names)
    with told(folder, *READ):  # lists of equal length are copied one to one, many at a time
        fs.get([f"{inner}/{name}" for name in names], [str(to / name) for name in names])


def send(source: Path, folder: str | os.PathLike, last: str) -> None:
    """Copy all files below a local folder into another; ``last`` goes last, so that it marks a whole folder."""
    fs, inner = _split(folder)
    names = [str(file.relative_to(source)) for file in source.rglob("*") if file.is_file()]
    for some in ([name for name in names if name != last], [name for name in names if name == last]):
        with told(folder, *WRITE):
            fs.put([str(source / name) for name in some], [f"{inner}/{name}" for name in some])


def remove(folder: str | os.PathLike, names: Iterable[str]) -> None:
    """Delete files of a folder; those that are not there are no error."""
    fs, inner = _split(folder)
    for name in names:
        with told(folder, "cannot be changed", "check permissions"), suppress(FileNotFoundError):
            fs.rm_file(f"{inner}/{name}")


def create(path: str | os.PathLike, data: bytes) -> bool:
    """Write an object that must not be there yet; whether it was not. The store decides, so only one writer wins."""
    if exists(path):  # for stores that do not know the condition
        return False
    fs, inner = _split(path)
    with told(path, *WRITE):
        try:
            fs.pipe_file(inner, data, mode="create")
        except FileExistsError:
            return False
    return True


class _Remote(io.RawIOBase):
    """A stream of a store, whose errors are told under its path, whoever reads it."""

    def __init__(self, path, stream):
        self._path, self._stream, self._at = path, stream, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        start = (0, self._at, self._stream.size)[whence]
        self._at = start + offset
        return self._at

    def readinto(self, buffer) -> int:
        with told(self._path, *READ):
            self._stream.seek(self._at)  # readers of one memory:// file share its position
            data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


@contextmanager
def _opened(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    if (kind := _kind(path)) != "file":
        what = "does not exist" if kind is None else "is a folder, not a file" if kind == "directory" else "is no file"
        raise InputError(f"{path}: {what}; check the path")
    fs, inner = _split(path)
    with told(path, *READ):
        stream = fs.open(inner, "rb")
    with stream:
        yield stream if is_local(path) else io.BufferedReader(_Remote(path, stream), 1 << 20)


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
    if not is_local(path) and not str(path).endswith(".gz"):
        fs, inner = _split(path)
        with told(path, *READ), suppress(FileNotFoundError, IsADirectoryError):  # which is told below
            return fs.cat_file(inner)  # in one request: what is looked up first may be written anew before it is read
    with reading(path) as stream:
        return stream.read()


@contextmanager
def writing(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """Open for writing bytes; the file appears under its name when the block ends without an error.

    For a store it is written to a temporary file here first: closing a stream of fsspec commits it, error or not.

    Raises:
        InputError: the folder cannot be written to or is full.
    """
    fs, inner = _split(path)
    if not is_local(path):
        with _writing_to(path, tempfile.NamedTemporaryFile(prefix="adaptrm-")) as stream:
            yield stream
            stream.flush()
            with told(path, *WRITE):
                fs.put_file(stream.name, inner)
        return
    if os.path.exists(inner) and not os.path.isfile(inner):  # a folder, or a device that would be replaced
        raise InputError(f"{path}: is no file; give another --out")
    partial = f"{inner}.partial"
    with told(path, *WRITE):
        os.makedirs(os.path.dirname(inner), exist_ok=True)
        file = open(partial, "wb")  # noqa: SIM115 - closed by what follows
    try:
        with _writing_to(path, file) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        with told(path, *WRITE):
            os.replace(partial, inner)
    except BaseException:
        with suppress(OSError):
            os.remove(partial)
        raise


@contextmanager
def _writing_to(path: str | os.PathLike, file: IO[bytes]) -> Iterator[IO[bytes]]:
    """A file for a block that may read others: only what is not of those is told under this path."""
    try:
        with file:
            yield file
    except OSError as wrong:
        if wrong.filename not in (None, file.name):
            raise
        raise InputError(f"{path}: {WRITE[0]}: {_reason(wrong)}; {WRITE[1]}") from None


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    with writing(path) as stream:
        stream.write(data)


@contextmanager
def filling(folder: str | os.PathLike, last: str) -> Iterator[Path]:
    """A local folder to write files to: the folder itself, or for a store one that is sent up when the block ends.

    Args:
        last: the file that marks a whole folder.
    """
    if is_local(folder):
        make_dir(folder)
        yield here(folder)
        return
    with tempfile.TemporaryDirectory(prefix="adaptrm-") as staging:
        try:
            yield Path(staging)
        except InputError as wrong:
            raise InputError(f"{folder}: {wrong}") from None
        send(Path(staging), folder, last)
