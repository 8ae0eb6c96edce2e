"""Examples to device: trees kept on local disk, read in rows by the plan, prefetched by Grain."""

import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from adaptrm import paths
from adaptrm.data.plan import Plan
from adaptrm.prefix_tree import PrefixTree, pack_rows

Row = Mapping[str, np.ndarray]
Item = TypeVar("Item")
LEAF_VALUES = ("targets", "weights", "margins")


class TreeStore:
    """Trees and the values at their leaves, in a temporary file; once frozen, 16 bytes an example stay in memory.

    Args:
        labels: targets a leaf has; None is one, without a dimension of its own.
    """

    def __init__(self, labels: int | None = None):
        self.target_shape = () if labels is None else (labels,)
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the store
        self._digest = hashlib.sha256()
        self._offsets: list[int] = [0]
        self.lengths: list[int] = []
        self.leaves: list[int] = []
        self._words: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def digest(self) -> str:
        """SHA-256 of all that was appended, in its order."""
        return self._digest.hexdigest()

    def _told(self):
        return paths.told(tempfile.gettempdir(), "cannot hold the examples", "free space, or set TMPDIR")

    def append(
        self, tree: PrefixTree, targets: Sequence[float], weights: float | Sequence[float], margin: float = 0.0
    ) -> None:
        """Put a tree at the end; one weight or margin, or one leaf's targets, are those of all its leaves."""
        leaves = (len(tree.leaves),)
        values = zip((targets, weights, margin), (leaves + self.target_shape, leaves, leaves), strict=True)
        floats = [np.broadcast_to(np.asarray(value, np.float32), shape).ravel() for value, shape in values]
        parts = (tree.tokens, tree.positions, tree.subtree_end, tree.leaves, np.concatenate(floats).view(np.int32))
        record = np.concatenate(parts)
        with self._told():
            self._file.write(record.tobytes())
        self._digest.update(record.tobytes())
        self._offsets.append(self._offsets[-1] + len(record))
        self.lengths.append(len(tree))
        self.leaves.append(len(tree.leaves))

    def freeze(self) -> "TreeStore":
        """End of writing: lists become arrays, the file a memory map."""
        with self._told():
            self._file.flush()
        self._words = np.memmap(self._file, np.int32, "r") if len(self) else np.zeros(0, np.int32)
        self._offsets = np.asarray(self._offsets, np.int64)
        self.lengths, self.leaves = np.asarray(self.lengths, np.int32), np.asarray(self.leaves, np.int32)
        return self

    def __getitem__(self, index: int) -> tuple[PrefixTree, dict[str, np.ndarray]]:
        """A tree and what it has at its leaves, by the names in ``LEAF_VALUES``."""
        words = np.asarray(self._words[self._offsets[index] : self._offsets[index + 1]])
        size, leaves = int(self.lengths[index]), int(self.leaves[index])
        *tree, floats = np.split(words, [size, 2 * size, 3 * size, 3 * size + leaves])
        targets, rest = np.split(floats.view(np.float32), [-2 * leaves])
        values = (targets.reshape(leaves, *self.target_shape), *rest.reshape(2, leaves))
        return PrefixTree(*tree), dict(zip(LEAF_VALUES, values, strict=True))

    def visible_pairs(self, index: int) -> int:
        """How many (query, key) of a tree attention has to look at: each token sees those before it on its branch."""
        start, size = self._offsets[index], int(self.lengths[index])
        return int(self._words[start + size : start + 2 * size].sum(dtype=np.int64)) + size


class RowSource:
    """Random access to the rows of a plan: element i is one of this process's rows.

    Args:
        rows: which rows of every step this process needs.
        start, stop: steps.
    """

    def __init__(self, store: TreeStore, plan: Plan, rows: Sequence[int], start: int, stop: int):
        self._store, self._plan, self._rows, self._start, self._stop = store, plan, list(rows), start, stop

    def __len__(self) -> int:
        return (self._stop - self._start) * len(self._rows)

    def __getitem__(self, index: int) -> Row:
        step, position = divmod(int(index), len(self._rows))
        return self._row(self._plan.row(self._start + step, self._rows[position]))

    def _row(self, members: Sequence[int]) -> Row:
        options, room = self._plan.options, self._plan.max_leaves
        examples = [self._store[index] for index in members]
        trees = [tree for tree, _ in examples]
        packed = pack_rows(trees, [range(len(trees))], options.row_length, room)
        row = {name: getattr(packed, name)[0] for name in ("tokens", "positions", "subtree_end", "leaves")}
        row["groups"] = packed.owner[0, :, 0]  # which example of the row a leaf is of
        for name in LEAF_VALUES:
            row[name] = np.zeros((room, *self._store.target_shape) if name == "targets" else room, np.float32)
            if examples:
                values = np.concatenate([at_leaves[name] for _, at_leaves in examples])
                row[name][: len(values)] = values
        return row


def batches(source: RowSource, rows: int) -> Iterator[Row]:
    """Batches of ``rows`` rows in order, read ahead by Grain's threads.

    Accelerator images often lack Grain; there the rows are read in line.
    """
    try:
        import grain
    except ImportError:
        for start in range(0, len(source), rows):
            members = [source[start + i] for i in range(rows)]
            yield {name: np.stack([m[name] for m in members]) for name in members[0]}
        return
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4 * rows)
    yield from grain.MapDataset.source(source).to_iter_dataset(options).batch(rows)


def one_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items; while one is used, a thread makes the next. What making one raises comes in its place."""
    with ThreadPoolExecutor(1) as thread:
        pending = thread.submit(next, items, None)
        while (item := pending.result()) is not None:
            pending = thread.submit(next, items, None)
            yield item
