"""``tree_attention(q, k, v, subtree_end)``: one lowering a file; ``leaf_attention`` at the leaves alone."""

from adaptrm.attention.dispatch import tree_attention
from adaptrm.attention.leaves import leaf_attention
from adaptrm.attention.xla import ATTENTION

__all__ = ["ATTENTION", "leaf_attention", "tree_attention"]
