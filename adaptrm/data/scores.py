"""Score folders: a manifest and Parquet parts, each written whole or not at all."""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

from adaptrm import paths
from adaptrm.errors import InputError

# Column of a part -> attribute of Scores.
COLUMNS = {
    "scores_a": "a",
    "scores_b": "b",
    "relevance": "relevance",
    "log_odds_a": "log_odds_a",
    "log_odds_b": "log_odds_b",
    "label_mass_a": "label_mass_a",
    "label_mass_b": "label_mass_b",
}

RULES = "rules"  # a column where an adapter chose: which rules were judged
CONTROL = "control.parquet"
BATCH_ROWS, BUFFER_BYTES = 4096, 1 << 20
# Of a manifest: where pairs and models lay and what the rules say; what all these held is compared by its hash.
FOR_READERS = {"pairs", "model", "adapter", "rule_texts", "rule_signs"}
LOW_MASS = 0.1  # below it the judge was mostly about to say something else than an answer


@dataclass(frozen=True, eq=False)
class Scores:
    """What a judge says of N pairs by R rules.

    Attributes:
        ids: of the pairs.
        rule_ids: of the rules.
        a, b: score of each response, ``(P(Yes) - P(No)) / label mass`` times the rule's sign, in [-1, 1].
        relevance: ``1 - P(Neither) / label mass``, averaged over the two responses, in [0, 1].
        log_odds_a, log_odds_b: ``log P(Yes) - log P(No)`` times the rule's sign; nan where not known, null in files.
        label_mass_a, label_mass_b: ``P(Yes) + P(No) + P(Neither)``.
        rules: positions of the rules that were judged, where they were chosen for each pair; of others all is nan.
    """

    ids: list[str]
    rule_ids: list[str]
    a: Float32[np.ndarray, "pairs rules"]
    b: Float32[np.ndarray, "pairs rules"]
    relevance: Float32[np.ndarray, "pairs rules"]
    log_odds_a: Float32[np.ndarray, "pairs rules"]
    log_odds_b: Float32[np.ndarray, "pairs rules"]
    label_mass_a: Float32[np.ndarray, "pairs rules"]
    label_mass_b: Float32[np.ndarray, "pairs rules"]
    rules: Int32[np.ndarray, "pairs k"] | None = None

    def __len__(self) -> int:
        return len(self.ids)


assert [f.name for f in fields(Scores)][2:-1] == list(COLUMNS.values())


def judged(values: np.ndarray, rules: Int32[np.ndarray, "pairs k"] | None) -> np.ndarray:
    """``[pairs, k]`` of ``[pairs, rules]``: what is said of the rules that were judged; None where all were."""
    return values if rules is None else np.take_along_axis(values, rules, axis=1)


def part_name(number: int) -> str:
    return f"part-{number:05d}.parquet"


def write_manifest(folder: str | os.PathLike, manifest: dict[str, Any]) -> None:
    """Write the manifest, or check that the folder was made under the same one.

    Raises:
        InputError: the folder holds scores of something else; names the first field that differs.
    """
    file = paths.join(folder, "manifest.json")
    if paths.exists(file):
        check_manifest(folder, manifest)
        return
    if any(name.startswith("part-") for name in paths.names(folder)):
        raise InputError(f"{folder}: holds parts without a manifest.json; give another --out or delete the folder")
    paths.write_bytes(file, (json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode())


def check_manifest(folder: str | os.PathLike, manifest: dict[str, Any]) -> None:
    """Raise where the folder was made under another manifest, and name the first field that differs."""
    stored = read_manifest(folder)
    for name in sorted((stored.keys() | manifest.keys()) - FOR_READERS):
        if stored.get(name) != manifest.get(name):
            raise InputError(f"{folder}: holds scores with another {name}; give another --out or delete the folder")


def read_manifest(folder: str | os.PathLike) -> dict[str, Any]:
    file = paths.join(folder, "manifest.json")
    if not paths.exists(file):
        raise InputError(f"{folder}: no manifest.json; this is not a score folder, make one with adaptrm score")
    try:
        manifest = json.loads(paths.read_bytes(file))
        kinds = {"rules": list, "parts": int, "pairs": str, "pairs_sha256": str}
        good = all(type(manifest[name]) is kind for name, kind in kinds.items())
        if not good or not all(isinstance(rule, str) for rule in manifest["rules"]):
            raise ValueError(manifest)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"{file}: not a manifest; make the scores again with adaptrm score") from None
    return manifest


def write_part(folder: str | os.PathLike, number: int, scores: Scores) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rules = len(scores.rule_ids)
    columns = {"id": pa.array(scores.ids, pa.string())}
    for column, attribute in COLUMNS.items():
        flat = np.ascontiguousarray(getattr(scores, attribute), np.float32).reshape(-1)
        # from_pandas: nan is null
        columns[column] = pa.FixedSizeListArray.from_arrays(pa.array(flat, from_pandas=True), rules)
    if scores.rules is not None:
        chosen = pa.array(np.ascontiguousarray(scores.rules, np.int32).reshape(-1))
        columns[RULES] = pa.FixedSizeListArray.from_arrays(chosen, scores.rules.shape[1])
    with paths.writing(paths.join(folder, part_name(number))) as stream:
        pq.write_table(pa.table(columns), stream)


class Batch(NamedTuple):
    """What selection reads of some pairs, the label mass where it is asked for, chosen rules; as in ``Scores``."""

    ids: list[str]
    a: Float32[np.ndarray, "pairs rules"]
    b: Float32[np.ndarray, "pairs rules"]
    relevance: Float32[np.ndarray, "pairs rules"]
    label_mass_a: Float32[np.ndarray, "pairs rules"] | None = None
    label_mass_b: Float32[np.ndarray, "pairs rules"] | None = None
    rules: Int32[np.ndarray, "pairs k"] | None = None


def read_parts(folder: str | os.PathLike) -> Iterator[Scores]:
    """The parts of a finished folder, one at a time.

    Raises:
        InputError: parts are missing, or a part is broken or of another shape.
    """
    manifest = read_manifest(folder)
    rules = list(manifest["rules"])
    for file in _parts(folder, manifest):
        yield read_part(file, rules)


def read_batches(folder: str | os.PathLike, with_mass: bool = False, chosen: bool = False) -> Iterator[Batch]:
    """What selection reads of a finished folder, in order; memory does not depend on how large its parts are.

    The next batch is read while the caller works on one.

    Args:
        with_mass: read the label mass too.
        chosen: the caller can work with scores of the rules that an adapter chose.

    Raises:
        InputError: as ``read_parts``; an adapter chose the rules, and the caller needs all.
    """
    manifest = read_manifest(folder)
    rules, k = len(manifest["rules"]), chosen_rules(manifest)
    if k is not None and not chosen:
        raise InputError(
            f"{folder}: holds scores of {k} rules a pair that an adapter chose, and this needs those of all"
        )
    asked = [name for name in Batch._fields[1:] if with_mass or name not in Batch._field_defaults]
    columns = [column for column, attribute in COLUMNS.items() if attribute in asked] + [RULES] * (k is not None)
    batches = (batch for file in _parts(folder, manifest) for batch in _read_batches(file, rules, columns))
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = thread.submit(next, batches, None)
            yield batch


def _parts(folder: str | os.PathLike, manifest: dict[str, Any]) -> list[str]:
    parts = [name for name in paths.names(folder) if name.startswith("part-") and name.endswith(".parquet")]
    if len(parts) != manifest["parts"] or parts != [part_name(i) for i in range(len(parts))]:
        raise InputError(
            f"{folder}: has {len(parts)} of {manifest['parts']} parts; run the same adaptrm score again, it continues"
        )
    return [paths.join(folder, name) for name in parts]


def _read_batches(file: str, rules: int, columns: list[str]) -> Iterator[Batch]:
    import pyarrow.parquet as pq

    with _part_errors(file, rules), paths.reading(file) as stream:
        # The buffer keeps a row group, which may be the whole of a part made elsewhere, from being read at once.
        part = pq.ParquetFile(stream, buffer_size=BUFFER_BYTES)
        for rows in part.iter_batches(BATCH_ROWS, columns=["id", *columns]):
            arrays = {COLUMNS.get(column, column): _column(rows[column], column, rules) for column in columns}
            yield Batch(rows["id"].to_pylist(), **arrays)


def read_part(file: str | os.PathLike, rules: list[str]) -> Scores:
    import pyarrow.parquet as pq

    with _part_errors(file, len(rules)), paths.reading(file) as stream:
        table = pq.read_table(stream)
        columns = [*COLUMNS, *[RULES] * (RULES in table.column_names)]
        arrays = {
            COLUMNS.get(column, column): _column(table[column].combine_chunks(), column, len(rules))
            for column in columns
        }
        return Scores(table["id"].to_pylist(), rules, **arrays)


def chosen_rules(manifest: dict[str, Any]) -> int | None:
    """How many rules of each pair were judged, where an adapter chose them; None where all were."""
    return manifest.get("k") if "adapter_sha256" in manifest else None


def _column(lists, column: str, rules: int) -> np.ndarray:
    """A column of lists, of scores or of rules that were chosen."""
    if column != RULES:
        return _array(lists, rules)
    chosen = lists.flatten().to_numpy(zero_copy_only=False).astype(np.int32, copy=False).reshape(len(lists), -1)
    if not ((chosen >= 0) & (chosen < rules)).all():
        raise ValueError(f"{RULES} names others than 0 to {rules - 1}")
    return chosen


def _array(lists, rules: int) -> Float32[np.ndarray, "pairs rules"]:
    """A column of lists as an array; null is nan."""
    flat = lists.flatten().to_numpy(zero_copy_only=False)
    return flat.astype(np.float32, copy=False).reshape(len(lists), rules)


def write_control(folder: str | os.PathLike, ids: list[str], scores: Float32[np.ndarray, "pairs rules"]) -> None:
    """Write the scores of an empty response to the prompts of some pairs."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    flat = pa.array(np.ascontiguousarray(scores, np.float32).reshape(-1))
    rows = pa.FixedSizeListArray.from_arrays(flat, scores.shape[1])
    with paths.writing(paths.join(folder, CONTROL)) as stream:
        pq.write_table(pa.table({"id": pa.array(ids, pa.string()), "scores": rows}), stream)


def read_control(folder: str | os.PathLike, rules: int) -> tuple[list[str], Float32[np.ndarray, "pairs rules"]] | None:
    """What ``write_control`` wrote; None where there is none."""
    import pyarrow.parquet as pq

    file = paths.join(folder, CONTROL)
    if not paths.exists(file):
        return None
    with _part_errors(file, rules), paths.reading(file) as stream:
        table = pq.read_table(stream)
        return table["id"].to_pylist(), _array(table["scores"].combine_chunks(), rules)


@contextmanager
def _part_errors(file: str | os.PathLike, rules: int) -> Iterator[None]:
    """One line for what is no part of a score folder."""
    import pyarrow.lib

    try:
        yield
    except (pyarrow.lib.ArrowException, OSError, KeyError, ValueError) as wrong:
        reason = str(wrong).splitlines()[0]
        raise InputError(f"{file}: not a part of a score folder with {rules} rules: {reason}") from None
