"""``tree_attention(q, k, v, subtree_end)``: one signature, one lowering a file."""

from adaptrm.attention.dispatch import tree_attention
from adaptrm.attention.xla import ATTENTION

__all__ = ["ATTENTION", "tree_attention"]
