"""Random trees for tests, and the separate sequences that packed trees stand for."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from adaptrm.prefix_tree import Node, PackedRows, PrefixTree, best_fit, pack_rows


def nodes(longest_run: int = 9, depth: int = 3, vocab: int = 400) -> st.SearchStrategy[Node]:
    """Nested runs up to the given depth; at most three continue one."""
    # Ids do not matter to what is drawn, so they follow from the run's length: examples stay small.
    run = st.integers(1, longest_run).map(lambda n: [(7 * n + 3 * i) % vocab for i in range(n)])
    below = st.builds(Node, run)
    for _ in range(depth - 1):
        below = st.builds(Node, run, st.lists(below, max_size=3))
    return below


def fan(prefix: int, branches: int, each: int, vocab: int = 400, seed: int = 0) -> PrefixTree:
    """One beginning, many continuations of equal length."""
    rng = np.random.default_rng(seed)
    run = lambda n: rng.integers(3, vocab, n).tolist()  # noqa: E731
    return PrefixTree.build(Node(run(prefix), [Node(run(each)) for _ in range(branches)]))


def deep(vocab: int = 400, seed: int = 0) -> PrefixTree:
    """Depth 3 with runs of different lengths: 56 tokens, 5 leaves."""
    rng = np.random.default_rng(seed)
    run = lambda n: rng.integers(3, vocab, n).tolist()  # noqa: E731
    left = Node(run(5), [Node(run(7)), Node(run(1)), Node(run(4))])
    right = Node(run(9), [Node(run(3), [Node(run(2)), Node(run(6))])])
    return PrefixTree.build(Node(run(19), [left, right]))


def pack(trees: Sequence[PrefixTree], rows: int, row_length: int, max_leaves: int) -> PackedRows:
    """Rows of one shape; trees that do not fit are left out."""
    kept: list[PrefixTree] = []
    for tree in trees:
        more = [*kept, tree]
        if len(tree) <= row_length and len(best_fit([len(t) for t in more], row_length)) <= rows:
            kept = more
    fit = best_fit([len(t) for t in kept], row_length)
    return pack_rows(kept, fit, row_length, max_leaves, pad_rows_to=rows)


@dataclass(frozen=True)
class Flat:
    """The separate sequences of packed rows, each filled up to one length.

    Attributes:
        row: of each sequence.
        index: where each of its tokens lies in the row.
        last: place of its last token.
        first: True where a token of a tree occurs in a sequence for the first time, and never for filling.
    """

    row: np.ndarray
    index: np.ndarray
    last: np.ndarray
    first: np.ndarray

    def take(self, array):
        """``[rows, tokens, ...]`` -> ``[sequences, length, ...]``."""
        return array[self.row[:, None], self.index]


def flatten(packed: PackedRows, sequences: int, length: int) -> Flat:
    """One sequence a leaf, in the order of rows and leaves; those that are not there repeat token 0 of row 0."""
    flat = Flat(
        row=np.zeros(sequences, np.int32),
        index=np.zeros((sequences, length), np.int32),
        last=np.zeros(sequences, np.int32),
        first=np.zeros((sequences, length), bool),
    )
    seen: set[tuple[int, int]] = set()
    for number, (row, slot) in enumerate(np.argwhere(packed.owner[..., 0] >= 0)):
        leaf = packed.leaves[row, slot]
        before = np.arange(leaf + 1)
        path = before[packed.subtree_end[row, : leaf + 1] > leaf]
        flat.row[number] = row
        flat.index[number, : len(path)] = path
        flat.last[number] = len(path) - 1
        flat.first[number, : len(path)] = [(row, token) not in seen for token in path]
        seen |= {(row, token) for token in path}
    return flat
