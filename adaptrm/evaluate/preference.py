"""Accuracy of a scorer on preference pairs, by subset, with bootstrap intervals."""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any

import numpy as np

from adaptrm import paths
from adaptrm.data.preferences import Pair
from adaptrm.errors import InputError

Scorer = Callable[[list[Pair]], np.ndarray]
PAIRS_AT_ONCE = 256
RESAMPLES = 10_000


def evaluate_pairs(
    scorer: Scorer,
    pairs: Iterable[Pair],
    out: str | os.PathLike,
    *,
    model: str,
    dtype: str,
    suite: str = "pairs",
    counts: Mapping[str, Callable[[], int]] | None = None,
) -> dict[str, Any]:
    """Score pairs that people labelled and write ``FILE.json`` and ``FILE.rows.parquet``.

    The chosen response must score strictly higher: a tie counts as wrong. Pairs without ``preferred`` are skipped.

    Args:
        scorer: pairs to rewards ``[pairs, 2]`` of responses A and B.
        out: ``FILE.json``.
        counts: what else the result counts (rows that were skipped), asked when all pairs have been read.

    Raises:
        InputError: no pair has a preference.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not str(out).endswith(".json"):
        raise InputError(f"{out}: results are JSON; give --out FILE.json")
    right: dict[str, list[bool]] = {}
    skipped = 0
    schema = pa.schema([("id", pa.string()), ("subset", pa.string()), ("scores", pa.list_(pa.float32(), 2))])
    stream = iter(pairs)
    rows_file = str(out).removesuffix(".json") + ".rows.parquet"
    with paths.writing(rows_file) as sink, pq.ParquetWriter(sink, schema) as writer:
        while some := list(islice(stream, PAIRS_AT_ONCE)):
            known = [pair for pair in some if pair.preferred is not None]
            skipped += len(some) - len(known)
            if not known:
                continue
            rewards = np.asarray(scorer(known), np.float32)
            if not (finite := np.isfinite(rewards).all(axis=1)).all():
                name = known[int(np.argmin(finite))].id
                raise InputError(f"{model}: the reward of pair {name!r} is not finite in {dtype}; check its weights")
            scores = np.stack([r if p.preferred == "a" else r[::-1] for r, p in zip(rewards, known, strict=True)])
            subsets = [pair.subset or "all" for pair in known]
            flat = pa.FixedSizeListArray.from_arrays(pa.array(scores.reshape(-1)), 2)
            writer.write_table(pa.table([pa.array([p.id for p in known]), pa.array(subsets), flat], schema=schema))
            for subset, (chosen, rejected) in zip(subsets, scores, strict=True):
                right.setdefault(subset, []).append(bool(chosen > rejected))
        if not right:
            raise InputError("no pair says which response is preferred; there is nothing to measure")
    every = [hit for hits in right.values() for hit in hits]
    result = {
        "suite": suite,
        "model": model,
        "dtype": dtype,
        "n": len(every),
        "skipped": skipped,
        **{name: count() for name, count in (counts or {}).items()},
        "accuracy": float(np.mean(every)),
        "ci95": bootstrap_interval(every),
        "sections": {},
        "subsets": {
            name: {"n": len(hits), "accuracy": float(np.mean(hits)), "ci95": bootstrap_interval(hits)}
            for name, hits in sorted(right.items())
        },
    }
    paths.write_bytes(out, (json.dumps(result, indent=2) + "\n").encode())
    return result


def bootstrap_interval(hits: list[bool], seed: int = 0) -> list[float]:
    """95 % percentile bootstrap interval of a share.

    Resampling n zeros and ones with replacement draws a binomial number of ones, so no row is touched twice.
    """
    n = len(hits)
    draws = np.random.default_rng(seed).binomial(n, np.mean(hits), RESAMPLES) / n
    return [float(x) for x in np.quantile(draws, (0.025, 0.975))]
