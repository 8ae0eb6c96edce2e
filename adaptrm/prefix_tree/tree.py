"""The prefix tree: one shared beginning, many continuations, laid out depth first in one row of tokens.

Everything attention needs is one integer a token: ``subtree_end[j]``, the index one past the last token
below token j's node. Key j is visible to query i exactly when ``j <= i < subtree_end[j]``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int32


@dataclass(frozen=True)
class Node:
    """A run of tokens and the runs that continue it."""

    tokens: Sequence[int]
    children: Sequence["Node"] = ()


@dataclass(frozen=True, eq=False)
class PrefixTree:
    """A tree of token runs as flat arrays.

    Attributes:
        tokens: token ids, depth first.
        positions: position of each token in the sequence from the root to it (what RoPE sees).
        subtree_end: index one past the last token below the token's node.
        leaves: index of the last token of each leaf, depth first.
    """

    tokens: Int32[np.ndarray, " tokens"]
    positions: Int32[np.ndarray, " tokens"]
    subtree_end: Int32[np.ndarray, " tokens"]
    leaves: Int32[np.ndarray, " leaves"] = field(repr=False)

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def build(cls, root: Node) -> "PrefixTree":
        """Lay a nested tree out depth first.

        Raises:
            ValueError: a leaf has no tokens (nothing could be read there).
        """
        tokens: list[np.ndarray] = []
        positions: list[np.ndarray] = []
        ends: list[np.ndarray] = []
        leaves: list[int] = []

        def visit(node: Node, start: int, depth: int) -> int:
            run = np.asarray(node.tokens, np.int32)
            if not len(run) and not node.children:
                raise ValueError("a leaf of a prefix tree needs at least one token")
            tokens.append(run)
            positions.append(np.arange(depth, depth + len(run), dtype=np.int32))
            ends.append(np.zeros(len(run), np.int32))
            slot = len(ends) - 1
            end = start + len(run)
            if not node.children:
                leaves.append(end - 1)
            for child in node.children:
                end = visit(child, end, depth + len(run))
            ends[slot][:] = end
            return end

        visit(root, 0, 0)
        return cls(
            np.concatenate(tokens), np.concatenate(positions), np.concatenate(ends), np.asarray(leaves, np.int32)
        )

    def sequence(self, leaf: int) -> Int32[np.ndarray, " length"]:
        """The tokens from the root to a leaf, as the separate sequence that the tree stands for."""
        last = self.leaves[leaf]
        index = np.arange(last + 1)
        return self.tokens[: last + 1][self.subtree_end[index] > last]


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the longest common beginning that leaves every sequence at least one token of its own."""
    limit = min(len(s) for s in sequences) - 1
    first = np.asarray(sequences[0][:limit])
    for other in sequences[1:]:
        differ = np.flatnonzero(first[:limit] != np.asarray(other[:limit]))
        limit = int(differ[0]) if len(differ) else limit
    return limit
