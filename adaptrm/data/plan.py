"""Which examples share which row at which step: a pure function of lengths, seed, epoch and row length."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from adaptrm.prefix_tree import best_fit


@dataclass(frozen=True)
class PlanOptions:
    """How rows and steps are laid out.

    Attributes:
        rows_per_step: rows of a step; with ``examples_per_step`` a step has as many rows as the fullest needs,
            rounded up to a multiple of this.
        examples_per_step: exactly so many examples a step (the last of an epoch takes what is left).
    """

    row_length: int
    rows_per_step: int
    examples_per_step: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class _Epoch:
    """Rows as flat arrays: row r of step s holds ``order[bounds[i] : bounds[i + 1]]``, ``i = first_row[s] + r``."""

    order: np.ndarray
    bounds: np.ndarray
    first_row: np.ndarray

    def row(self, step: int, row: int) -> np.ndarray:
        index = self.first_row[step] + row
        if index >= self.first_row[step + 1]:
            return self.order[:0]
        return self.order[self.bounds[index] : self.bounds[index + 1]]


class Plan:
    """Rows of all steps of a training run; the data position is the number of the step.

    Attributes:
        steps_per_epoch, rows_per_step: the same in every epoch.
        max_leaves: leaves a row needs room for.
        padding: share of the computed tokens of an epoch that belongs to no example.
    """

    def __init__(self, lengths: Sequence[int], leaves: Sequence[int], options: PlanOptions, epochs: int):
        self.lengths, self.options = np.asarray(lengths, np.int32), options
        leaves = np.asarray(leaves, np.int64)
        if options.examples_per_step is None:
            # Best fit looks at lengths alone, so every epoch has rows of the same lengths and the first stands for
            # all; which of the examples of one length is where differs, so the one with most leaves counts.
            epochs = 1
            most = np.zeros(self.lengths.max() + 1, np.int64)
            np.maximum.at(most, self.lengths, leaves)
            leaves = most[self.lengths]
        self.max_leaves, widest = 0, 0
        for epoch in range(epochs):
            packed = self._pack(epoch)
            self.max_leaves = max(self.max_leaves, int(np.add.reduceat(leaves[packed.order], packed.bounds[:-1]).max()))
            widest = max(widest, int(np.diff(packed.first_row).max()))
        self.steps_per_epoch = len(packed.first_row) - 1
        self.rows_per_step = -(-widest // options.rows_per_step) * options.rows_per_step
        computed = self.steps_per_epoch * self.rows_per_step * options.row_length
        self.padding = 1 - int(self.lengths.sum(dtype=np.int64)) / computed
        # Two epochs: around their boundary rows are read ahead while steps of the last one are reported.
        self._epoch = lru_cache(maxsize=2)(self._pack)

    def _pack(self, epoch: int) -> _Epoch:
        options, count = self.options, len(self.lengths)
        random = np.random.default_rng((options.seed, epoch))
        order = random.permutation(count)
        if (size := options.examples_per_step) is None:
            rows = best_fit(self.lengths[order], options.row_length)
            rows = [order[rows[i]] for i in random.permutation(len(rows))]
            steps = [min(i, len(rows)) for i in range(0, len(rows) + options.rows_per_step, options.rows_per_step)]
        else:
            rows, steps = [], [0]
            for start in range(0, count, size):
                batch = order[start : start + size]
                rows += [batch[row] for row in best_fit(self.lengths[batch], options.row_length)]
                steps.append(len(rows))
        bounds = np.cumsum([0, *map(len, rows)])
        return _Epoch(np.concatenate(rows).astype(np.int32), bounds, np.asarray(steps))

    def row(self, step: int, row: int) -> np.ndarray:
        """Examples in a row of a step; none where the step is not full."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch).row(within, row)

    def members(self, step: int) -> np.ndarray:
        """Examples of a step, over all processes."""
        number, within = divmod(step, self.steps_per_epoch)
        epoch = self._epoch(number)
        first, last = epoch.bounds[epoch.first_row[within : within + 2]]
        return epoch.order[first:last]
