"""Rows of files, of ``datasets`` sets and of hub names, streamed; and what becomes of rows that cannot be used."""

import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from adaptrm import paths
from adaptrm.errors import InputError
from adaptrm.progress import say

Row = Mapping[str, Any]
Source = str | os.PathLike | Iterable[Row]
OnBadRow = Literal["fail", "skip"]
HUB_NAME = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(:(?P<config>[^:/]+))??(:(?P<split>[^:/]+))?")
FILE_ENDINGS = (".jsonl", ".json", ".parquet", ".gz")


class BadRows:
    """What becomes of rows that cannot be used: ``fail`` raises, ``skip`` lists each on stderr and counts it.

    A fault of the whole file (absent, not whole) is raised by whoever reads it, whatever is said here.

    Args:
        listed: False skips in silence, for a second reading of the same rows.
    """

    def __init__(self, on_bad_row: OnBadRow = "fail", listed: bool = True):
        if on_bad_row not in ("fail", "skip"):
            raise InputError(f"on_bad_row is {on_bad_row!r}; it must be fail or skip")
        self.on_bad_row, self.listed, self.count = on_bad_row, listed, 0

    def __call__(self, wrong: InputError) -> None:
        if self.on_bad_row == "fail":
            raise wrong
        self.count += 1
        if self.listed:
            say(f"skipped {wrong}")


def rows_of(source: Source, bad: BadRows) -> Iterator[tuple[str, Row]]:
    """The rows of a source, each with where it stands.

    Args:
        source: a JSONL(.gz) or Parquet file; a folder of ``Dataset.save_to_disk``; a name on the Hugging Face hub,
            ``owner/name``, ``owner/name:split`` or ``owner/name:config:split``, where no such path exists; or
            anything that yields rows, such as a ``datasets`` set.

    Raises:
        InputError: the source cannot be read, or ``bad`` says so of a row.
    """
    if not isinstance(source, str | os.PathLike):
        yield from _rows_of_object(source, "pairs")
    elif _is_saved(source):
        yield from _rows_of_object(_load(source, lambda datasets: datasets.load_from_disk(str(source))), str(source))
    elif hub := hub_name(source):
        yield from _rows_of_hub(source, **hub)
    else:
        yield from read_rows(source, bad)


def source_hash(source: Source) -> str:
    """SHA-256 of a source: of a file's bytes; of anything else, of its rows as canonical JSON, a line each."""
    if isinstance(source, str | os.PathLike) and not _is_saved(source) and not hub_name(source):
        return paths.sha256(source)
    digest = hashlib.sha256()
    for _, row in rows_of(source, BadRows()):
        digest.update(canonical(row) + b"\n")
    return digest.hexdigest()


def canonical(row: Row) -> bytes:
    """A row as JSON that does not depend on the order of its columns."""
    return json.dumps(row, sort_keys=True, ensure_ascii=True, default=str).encode()


def read_rows(path: str | os.PathLike, bad: BadRows | None = None) -> Iterator[tuple[str, Row]]:
    """The rows of a JSONL(.gz) or Parquet file, each with where it stands; a .json file may be one list, read whole.

    Raises:
        InputError: the file is absent or not whole, or ``bad`` (by default always) says so of a row.
    """
    bad = bad or BadRows()
    if str(path).endswith(".parquet"):
        import pyarrow.lib
        import pyarrow.parquet

        with paths.reading(path) as stream:
            try:
                table = pyarrow.parquet.ParquetFile(stream)
                number = 0
                for batch in table.iter_batches(1024):
                    for row in batch.to_pylist():
                        number += 1
                        yield f"row {number}", row
            except (pyarrow.lib.ArrowException, OSError, UnicodeDecodeError) as wrong:  # a text that is not UTF-8
                raise InputError(f"{path}: not a whole Parquet file: {str(wrong).splitlines()[0]}") from None
        return
    with paths.reading(path) as stream:
        try:
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                if number == 1 and str(path).endswith(".json") and line.lstrip()[:1] == b"[":
                    yield from _items(path, line + stream.read(), bad)
                    return
                row, fault = _parse(line)
                if fault:
                    bad(InputError(f"{path}: line {number}: {fault}"))
                else:
                    yield f"line {number}", row
        except (EOFError, OSError, zlib.error) as wrong:
            raise InputError(f"{path}: not a whole gzip file: {wrong}") from None


def _items(path: str | os.PathLike, text: bytes, bad: BadRows) -> Iterator[tuple[str, Row]]:
    """The objects of a JSON list."""
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as wrong:
        raise InputError(f"{path}: begins as a list, but is not valid JSON: {wrong}") from None
    for number, item in enumerate(items, 1):
        if isinstance(item, dict):
            yield f"item {number}", item
        else:
            bad(InputError(f"{path}: item {number}: must be a JSON object, is {type(item).__name__}"))


def _parse(line: bytes) -> tuple[Any, str | None]:
    """The object of a line, and what is wrong with it."""
    mend = "; a file holds one object a line (jq -c '.[]' makes lines of a list)" if line.lstrip()[:1] == b"[" else ""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as wrong:
        place = isinstance(wrong, json.JSONDecodeError)
        return None, f"not valid JSON: {f'{wrong.msg} at column {wrong.pos + 1}' if place else wrong}{mend}"
    return row, None if isinstance(row, dict) else f"must be a JSON object, is {type(row).__name__}{mend}"


def _rows_of_object(source: Iterable[Row], name: str) -> Iterator[tuple[str, Row]]:
    if isinstance(source, Mapping):  # a DatasetDict is one
        splits = ", ".join(map(str, source)) or "none"
        first = next(iter(source), "train")
        one = f"pairs[{first!r}]" if name == "pairs" else paths.join(name, str(first))
        raise InputError(f"{name}: is a set of splits ({splits}); give one of them, such as {one}")
    if hasattr(source, "with_format"):  # a datasets set may be set to yield arrays
        source = source.with_format(None)
    yield from ((f"row {number}", row) for number, row in enumerate(source))


def _is_saved(path: str | os.PathLike) -> bool:
    """Whether this is a folder of ``save_to_disk``."""
    return paths.is_dir(path) and bool({"state.json", "dataset_dict.json"} & set(paths.names(path)))


def hub_name(source: str | os.PathLike) -> dict[str, str | None] | None:
    """Name, config and split of a data set on the hub; None where this is a path."""
    found = HUB_NAME.fullmatch(source) if isinstance(source, str) else None
    if found is None or source.endswith(FILE_ENDINGS) or paths.exists(source):
        return None
    return found.groupdict()


def _rows_of_hub(source: str, name: str, config: str | None, split: str | None) -> Iterator[tuple[str, Row]]:
    # The False is for datasets 3, which would ask; later versions run no code of a data set at all.
    options = {"streaming": True, "trust_remote_code": False}
    splits = _load(source, lambda datasets: datasets.load_dataset(name, config, **options))
    if split is None and len(splits) == 1:
        (split,) = splits
    if split not in splits:
        wrong = "has several splits" if split is None else f"has no split {split!r}"
        one = ":".join(filter(None, [name, config, next(iter(splits))]))
        raise InputError(f"{source}: {wrong}; it has {', '.join(splits)}: give one of them, such as {one}")
    rows = _rows_of_object(splits[split], source)
    while (found := _load(source, lambda _: next(rows, None))) is not None:  # the network may go at any row
        yield found


def _load(source: str | os.PathLike, read):
    """What ``read`` makes of the package ``datasets``; one clear line for everything that it raises."""
    try:
        import datasets

        return read(datasets)
    except ImportError as wrong:
        raise InputError(f"{source}: reading it needs the package datasets ({wrong}); pip install datasets") from None
    except Exception as wrong:  # datasets raises many kinds, for a name, a config, a file, the network
        reason = " ".join(str(wrong).split())[:300] or type(wrong).__name__
        hint = f"no such file, and the hub does not give it ({reason}); check the name, or the network"
        message = f"not a whole folder of save_to_disk: {reason}" if paths.is_dir(source) else hint
        raise InputError(f"{source}: {message}") from None
