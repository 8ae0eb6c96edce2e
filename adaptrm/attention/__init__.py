"""``tree_attention(q, k, v, subtree_end)``: one signature, one lowering a file."""

from adaptrm.attention.xla import tree_attention

__all__ = ["tree_attention"]
