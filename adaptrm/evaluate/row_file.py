"""``FILE.rows.parquet``: what each row of a benchmark was scored, and read back."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from adaptrm import paths
from adaptrm.errors import InputError
from adaptrm.evaluate.suite import Row


def rows_file(result: str | os.PathLike) -> str:
    """Where the rows of ``FILE.json`` lie."""
    return str(result).removesuffix(".json") + ".rows.parquet"


def check_out(out: str | os.PathLike, *sources: str | os.PathLike | None) -> None:
    """Raise where results have no name, or would be written over what is read; to be asked before long work.

    Args:
        out: ``FILE.json``.
        sources: what is read; None where there is none.

    Raises:
        InputError: it is no JSON file, or a source is one of the files.
    """
    if not str(out).endswith(".json"):
        raise InputError(f"{out}: results are JSON; give --out FILE.json")
    for source in sources:
        for file in (out, rows_file(out)) if source is not None else ():
            paths.check_apart(file, source)


def _schema():
    import pyarrow as pa

    fields = {"id": pa.string(), "subset": pa.string(), "prompt": pa.uint64(), "chosen": pa.int32()}
    return pa.schema([*fields.items(), ("scores", pa.list_(pa.float32()))])


@contextmanager
def writing_rows(file: str, first: bool) -> Iterator[Any]:
    """Write rows, ``write(rows)``, the scores of their first scorer; the file appears whole or not at all.

    Args:
        first: False writes nothing, in processes that are not the first.
    """
    if not first:
        yield lambda rows: None
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _schema()

    def write(rows: Sequence[Row]) -> None:
        columns = ([getattr(row, name) for row in rows] for name in schema.names[:-1])
        scores = [row.scores[0].astype(np.float32) for row in rows]
        writer.write_table(pa.table([*columns, scores], schema=schema), row_group_size=len(rows))

    with paths.writing(file) as sink, pq.ParquetWriter(sink, schema) as writer:
        yield write


def read_scored(file: str) -> Iterator[Row]:
    """The rows that were written, one scorer each.

    Raises:
        InputError: the file is absent or not one of these.
    """
    import pyarrow.parquet as pq
    from pyarrow.lib import ArrowException

    with paths.reading(file) as stream:
        try:
            table = pq.ParquetFile(stream)
            if set(_schema().names) - set(table.schema_arrow.names):
                raise InputError(f"{file}: is no file of rows that adaptrm evaluate writes; evaluate again")
            for batch in table.iter_batches(1024, columns=_schema().names):
                for row in batch.to_pylist():
                    scores = np.array([row.pop("scores")], np.float64)
                    yield Row(**row, scores=scores, tie=np.zeros(1))
        except (ArrowException, OSError) as wrong:
            raise InputError(f"{file}: not a whole Parquet file: {str(wrong).splitlines()[0]}") from None
