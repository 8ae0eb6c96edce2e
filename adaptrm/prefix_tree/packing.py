"""Several trees in one row: which trees share a row, the rows as arrays, and results back to their owners."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32

from adaptrm.prefix_tree.tree import PrefixTree

# Rows for scoring come in these lengths and no others, so that few programs are compiled: four to each doubling, and
# sixteen where none of the four has little padding, as for a few trees.
ROW_LENGTHS, FINE_ROW_LENGTHS = (
    tuple(2**exponent * (steps + step) // steps for exponent in range(8, 17) for step in range(steps))
    for steps in (4, 16)
)
LITTLE_PADDING = 0.05


def best_fit(lengths: Sequence[int], row_length: int, max_trees: int | None = None) -> list[list[int]]:
    """Assign trees to rows by best-fit decreasing: the longest first, each to the fullest row that still takes it.

    Args:
        lengths: tokens of each tree.
        row_length: tokens a row.
        max_trees: at most this many trees share a row.

    Returns:
        For each row the indices of its trees. Equal lengths are taken in the order given, so the result is a
        pure function of the arguments.

    Raises:
        ValueError: a tree is longer than a row.
    """
    order = np.argsort(-np.asarray(lengths, np.int64), kind="stable")
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = defaultdict(list)  # free tokens -> open rows
    open_rooms = 0  # bit r is set when some open row has r free tokens: the tightest fit is one shift away
    for index in order.tolist():
        length = int(lengths[index])
        if length > row_length:
            raise ValueError(f"tree {index} has {length} tokens, a row {row_length}")
        fits = open_rooms >> length
        if fits:
            room = length + (fits & -fits).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                open_rooms &= ~(1 << room)
        else:
            room, row = row_length, len(rows)
            rows.append([])
        rows[row].append(index)
        left = room - length
        if left and (max_trees is None or len(rows[row]) < max_trees):
            by_room[left].append(row)
            open_rooms |= 1 << left
    return rows


def choose_row_length(lengths: Sequence[int], rows_at_once: int) -> tuple[int, list[list[int]]]:
    """The shortest row length that is nearly all tokens of these trees, and which trees share a row.

    So rows of like trees come in like lengths. Where none has so little padding, that with the least.

    Args:
        lengths: tokens of each tree.
        rows_at_once: rows are computed this many at a time, so their number is filled up to a multiple of it.

    Returns:
        One of these lengths (a multiple of the longest where a tree is longer still), and the trees of each row.
    """
    longest, total = max(lengths), sum(lengths)
    best: tuple[int, int, list[list[int]]] | None = None
    for known in (ROW_LENGTHS, FINE_ROW_LENGTHS):
        steps = [n for n in known if n >= longest] or [-(-longest // known[-1]) * known[-1]]
        for row_length in steps[: len(known) // 3]:
            rows = best_fit(lengths, row_length)
            computed = -(-len(rows) // rows_at_once) * rows_at_once * row_length
            if best is None or computed < best[0]:
                best = computed, row_length, rows
            if total >= (1 - LITTLE_PADDING) * computed:
                return row_length, rows
            if row_length * rows_at_once >= total:
                break
    assert best is not None
    return best[1], best[2]


@dataclass(frozen=True, eq=False)
class PackedRows:
    """Rows of trees, padded to one shape.

    Attributes:
        tokens, positions, subtree_end: padding tokens see themselves only.
        leaves: index of each leaf's last token in its row; 0 where there is none.
        owner: (tree, leaf of the tree) of each leaf; (-1, -1) where there is none.
    """

    tokens: Int32[np.ndarray, "rows tokens"]
    positions: Int32[np.ndarray, "rows tokens"]
    subtree_end: Int32[np.ndarray, "rows tokens"]
    leaves: Int32[np.ndarray, "rows leaves"]
    owner: Int32[np.ndarray, "rows leaves 2"]

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """What a program reads: tokens, positions, subtree_end, leaves."""
        return self.tokens, self.positions, self.subtree_end, self.leaves

    def to_owners(self, values: np.ndarray) -> dict[int, np.ndarray]:
        """Values read at the leaves, ``[rows, leaves, ...]`` -> for each tree ``[its leaves, ...]``."""
        real = self.owner[..., 0] >= 0
        owner, flat = self.owner[real], np.asarray(values)[real]
        order = np.lexsort((owner[:, 1], owner[:, 0]))
        owner, flat = owner[order], flat[order]
        trees, starts = np.unique(owner[:, 0], return_index=True)
        return dict(zip(trees.tolist(), np.split(flat, starts[1:]), strict=True))


def pack_rows(
    trees: Sequence[PrefixTree], rows: Sequence[Sequence[int]], row_length: int, max_leaves: int, pad_rows_to: int = 1
) -> PackedRows:
    """Lay trees out in rows.

    Args:
        trees: what the indices in ``rows`` point to.
        rows: tree indices of each row, as ``best_fit`` gives them.
        row_length: tokens a row.
        max_leaves: leaves a row has room for.
        pad_rows_to: the number of rows is filled up to a multiple of this with empty rows.
    """
    count = -(-max(len(rows), 1) // pad_rows_to) * pad_rows_to
    packed = PackedRows(
        tokens=np.zeros((count, row_length), np.int32),
        positions=np.zeros((count, row_length), np.int32),
        subtree_end=np.tile(np.arange(1, row_length + 1, dtype=np.int32), (count, 1)),
        leaves=np.zeros((count, max_leaves), np.int32),
        owner=np.full((count, max_leaves, 2), -1, np.int32),
    )
    for row, members in enumerate(rows):
        start = leaf = 0
        for index in members:
            tree = trees[index]
            span, own = slice(start, start + len(tree)), slice(leaf, leaf + len(tree.leaves))
            packed.tokens[row, span] = tree.tokens
            packed.positions[row, span] = tree.positions
            packed.subtree_end[row, span] = tree.subtree_end + start
            packed.leaves[row, own] = tree.leaves + start
            packed.owner[row, own, 0] = index
            packed.owner[row, own, 1] = np.arange(len(tree.leaves))
            start, leaf = span.stop, own.stop
    return packed
