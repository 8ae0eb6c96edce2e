"""What is kept of any number of scored pairs to weigh their rules: second moments, a sample, pairs with a verdict."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Float64

from adaptrm.data.preferences import hash_id
from adaptrm.data.scores import BATCH_ROWS
from adaptrm.selection.evidence import PAIRS_FITTED

EXPLAINED = 1e-9  # share of a rule's variance; one with less left of it is silent


class Evident(NamedTuple):
    """What ``Gathered`` kept; what goes along with covariates is taken out of it if that was asked for.

    Attributes:
        pairs: how many there were.
        moments: the mean of ``d_i d_j`` over all pairs.
        some: discrepancies of the sample.
        gold: discrepancies of the pairs with a verdict that is no tie.
        verdicts: 1 for response A, -1 for B.
        beside: covariates of the sample.
        slopes: what was taken out of a discrepancy, by unit of a covariate; 0 where nothing was.
        explained: what was taken out of the moments.
    """

    pairs: int
    moments: Float64[np.ndarray, "rules rules"]
    some: Float32[np.ndarray, "some_pairs rules"]
    gold: Float64[np.ndarray, "verdicts rules"]
    verdicts: Float64[np.ndarray, " verdicts"]
    beside: Float64[np.ndarray, "some_pairs covariates"]
    slopes: Float64[np.ndarray, "rules covariates"]
    explained: Float64[np.ndarray, "rules rules"]


class Gathered:
    """One pass over scored pairs; memory does not depend on their number.

    The sample is of the pairs whose ids have the smallest hashes, in that order: it depends neither on the order of the
    pairs nor on the batches that they came in.
    """

    def __init__(self, rules: int, covariates: int, gold: Mapping[str, int], most: int = PAIRS_FITTED):
        self.pairs, self._rules, self._most = 0, rules, most
        self._products = np.zeros((rules + covariates, rules + covariates))
        # Pages that are never written to take no memory.
        self._rows = np.empty((most + max(most // 4, BATCH_ROWS), rules + covariates), np.float32)
        self._keys = np.empty(len(self._rows), np.uint64)
        self._held, self._bound = 0, np.uint64(2**64 - 1)
        self._verdicts = {id: sign for id, sign in gold.items() if sign}
        self._gold: list[tuple[int, int, np.ndarray]] = []

    def add(
        self,
        ids: Sequence[str],
        a: Float32[np.ndarray, "pairs rules"],
        b: Float32[np.ndarray, "pairs rules"],
        covariates: Float64[np.ndarray, "pairs covariates"],
    ) -> None:
        """Add ``BATCH_ROWS`` pairs at most.

        Raises:
            ValueError: a value is not finite; names the pair.
        """
        rows = np.concatenate([np.subtract(a, b, dtype=np.float64), covariates], axis=1)
        if not (finite := np.isfinite(rows).all(axis=1)).all():
            name = ids[int(np.argmin(finite))]
            raise ValueError(f"the scores or covariates of pair {name!r} are not all numbers")
        self.pairs += len(rows)
        self._products += rows.T @ rows
        keys = np.fromiter(map(hash_id, ids), np.uint64, len(ids))
        if self._verdicts:
            found = [(i, self._verdicts[id]) for i, id in enumerate(ids) if id in self._verdicts]
            self._gold += [(int(keys[i]), sign, rows[i]) for i, sign in found]
        below = keys <= self._bound
        if self._held + below.sum() > len(self._rows):
            self._cut()
        end = self._held + int(below.sum())
        self._keys[self._held : end], self._rows[self._held : end] = keys[below], rows[below]
        self._held = end

    def _cut(self) -> None:
        """Keep the smallest keys, in place."""
        kept = np.zeros(self._held, bool)
        kept[np.argpartition(self._keys[: self._held], self._most - 1)[: self._most]] = True
        free, last = np.nonzero(~kept[: self._most])[0], self._most + np.nonzero(kept[self._most :])[0]
        self._keys[free], self._rows[free] = self._keys[last], self._rows[last]
        self._held, self._bound = self._most, self._keys[: self._most].max()

    def evident(self, project: bool) -> Evident:
        """What was kept, which is given up here.

        Args:
            project: take out what goes along with the covariates.
        """
        if self._held > self._most:
            self._cut()
        rules = self._rules
        rows = self._rows[np.argsort(self._keys[: self._held], kind="stable")]
        self._rows = self._keys = np.empty(0)
        some, beside = rows[:, :rules], rows[:, rules:].astype(np.float64)
        self._gold.sort(key=lambda of: of[0])
        gold = np.array([row for _, _, row in self._gold]).reshape(-1, len(self._products))
        verdicts = np.array([sign for _, sign, _ in self._gold], np.float64)
        products = self._products / max(self.pairs, 1)
        moments, slopes = products[:rules, :rules], _slopes(products, rules) * project
        explained = slopes @ products[rules:, :rules]
        left = moments - explained
        left[np.diag(left) <= EXPLAINED * np.diag(moments)] = 0
        left[:, np.diag(left) == 0] = 0
        if project:
            some = some - (beside @ slopes.T).astype(np.float32)
        unexplained = gold[:, :rules] - gold[:, rules:] @ slopes.T
        return Evident(self.pairs, left, some, unexplained, verdicts, beside, slopes, explained)


def _slopes(products: np.ndarray, rules: int) -> Float64[np.ndarray, "rules covariates"]:
    """Of the regression of each rule on the covariates, through zero: no side is the first one."""
    own, across = products[rules:, rules:], products[:rules, rules:]
    # By covariates of unit size, so that none is lost beside a larger one.
    size = np.sqrt(np.diag(own))
    unit = np.divide(1, size, out=np.zeros_like(size), where=size > 0)
    return across * unit @ np.linalg.pinv(own * np.outer(unit, unit), rcond=1e-10, hermitian=True) * unit
