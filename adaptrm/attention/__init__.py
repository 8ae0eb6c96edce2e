"""``tree_attention(q, k, v, subtree_end)``: one signature, one lowering a file."""

from adaptrm.attention.xla import ATTENTION, tree_attention

__all__ = ["ATTENTION", "tree_attention"]
