"""Accuracy of a scorer on preference pairs, by subset, with bootstrap intervals."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from typing import Any

import jax
import numpy as np

from adaptrm import paths
from adaptrm.data.preferences import Pair
from adaptrm.errors import InputError
from adaptrm.parallel.distributed import gathered

Scorer = Callable[[list[Pair]], np.ndarray]
Sections = Callable[[Mapping[str, "Count"]], dict[str, Any]]
PAIRS_AT_ONCE = 256
RESAMPLES = 10_000


@dataclass
class Count:
    """The pairs of a subset: all of them, those scored right, those scored equal (which are wrong)."""

    n: int = 0
    right: int = 0
    ties: int = 0

    @property
    def accuracy(self) -> float:
        return self.right / self.n


def evaluate_pairs(
    scorer: Scorer,
    pairs: Iterable[Pair],
    out: str | os.PathLike,
    *,
    model: str,
    dtype: str,
    suite: str = "pairs",
    data: str = "pairs",
    sections: Sections | None = None,
    counts: Mapping[str, Callable[[], int]] | None = None,
) -> dict[str, Any]:
    """Score pairs that people labelled and write ``FILE.json`` and ``FILE.rows.parquet``.

    The chosen response must score strictly higher: a tie counts as wrong. Pairs without ``preferred`` are skipped.
    Pairs are streamed; what stays in memory is a count a subset. Several processes share the pairs out among them,
    all get the result, process 0 writes it.

    Args:
        scorer: pairs to rewards ``[pairs, 2]`` of responses A and B.
        out: ``FILE.json``.
        data: what the pairs are called in errors.
        sections: what a benchmark adds to the result, from the counts of each subset.
        counts: what else the result counts (rows that were skipped), asked when all pairs have been read.

    Raises:
        InputError: no pair has a preference, or ``sections`` says so; nothing is written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not str(out).endswith(".json"):
        raise InputError(f"{out}: results are JSON; give --out FILE.json")
    of_subsets: dict[str, Count] = {}
    skipped = 0

    def labelled() -> Iterator[Pair]:
        nonlocal skipped
        for pair in pairs:
            if pair.preferred is None:
                skipped += 1
            else:
                yield pair

    schema = pa.schema([("id", pa.string()), ("subset", pa.string()), ("scores", pa.list_(pa.float32(), 2))])
    stream = labelled()
    rows_file = str(out).removesuffix(".json") + ".rows.parquet"
    paths.check_apart(rows_file, data)
    number, processes = jax.process_index(), jax.process_count()
    with paths.writing(rows_file) if number == 0 else BytesIO() as sink, pq.ParquetWriter(sink, schema) as writer:
        while known := list(islice(stream, PAIRS_AT_ONCE * processes)):
            # Each process takes as many together as one alone would, so that how they are packed is the same.
            mine = known[number * PAIRS_AT_ONCE : (number + 1) * PAIRS_AT_ONCE]
            rewards = np.zeros((PAIRS_AT_ONCE, 2), np.float32)
            if mine:
                rewards[: len(mine)] = scorer(mine)
            rewards = gathered(rewards).reshape(-1, 2)[: len(known)]
            if not (finite := np.isfinite(rewards).all(axis=1)).all():
                name = known[int(np.argmin(finite))].id
                raise InputError(f"{model}: the reward of pair {name!r} is not finite in {dtype}; check its weights")
            scores = np.stack([r if p.preferred == "a" else r[::-1] for r, p in zip(rewards, known, strict=True)])
            subsets = [pair.subset or "all" for pair in known]
            flat = pa.FixedSizeListArray.from_arrays(pa.array(scores.reshape(-1)), 2)
            table = pa.table([pa.array([p.id for p in known]), pa.array(subsets), flat], schema=schema)
            writer.write_table(table, row_group_size=PAIRS_AT_ONCE)
            for subset, (chosen, rejected) in zip(subsets, scores, strict=True):
                count = of_subsets.setdefault(subset, Count())
                count.n += 1
                count.right += int(chosen > rejected)
                count.ties += int(chosen == rejected)
        # In here, so that what is wrong with all rows together leaves no file of rows behind.
        if not of_subsets:
            raise InputError(f"{data}: no pair says which response is preferred; there is nothing to measure")
        in_sections = sections(of_subsets) if sections else {"sections": {}}
    every = Count(*(sum(getattr(count, name) for count in of_subsets.values()) for name in ("n", "right", "ties")))
    result = {
        "suite": suite,
        "model": model,
        "dtype": dtype,
        "n": every.n,
        "skipped": skipped,
        "ties": every.ties,
        **{name: count() for name, count in (counts or {}).items()},
        "accuracy": every.accuracy,
        "ci95": interval(resampled(every)),
        **in_sections,
        "subsets": {
            name: {"n": count.n, "accuracy": count.accuracy, "ci95": interval(resampled(count))}
            for name, count in sorted(of_subsets.items())
        },
    }
    if number == 0:
        paths.write_bytes(out, (json.dumps(result, indent=2) + "\n").encode())
    return result


def resampled(count: Count, seed: int = 0) -> np.ndarray:
    """Bootstrap draws ``[RESAMPLES]`` of a share.

    Resampling n zeros and ones with replacement draws a binomial number of ones, so no row is touched twice.
    """
    return np.random.default_rng(seed).binomial(count.n, count.accuracy, RESAMPLES) / count.n


def interval(draws: np.ndarray) -> list[float]:
    """The 95 % percentile interval of bootstrap draws."""
    return [float(x) for x in np.quantile(draws, (0.025, 0.975))]
