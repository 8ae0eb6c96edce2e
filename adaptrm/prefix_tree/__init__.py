"""Prefix trees of tokens: many continuations of one beginning in one forward pass."""

from adaptrm.prefix_tree.packing import PackedRows, best_fit, choose_row_length, pack_rows
from adaptrm.prefix_tree.tree import Node, PrefixTree, common_prefix

__all__ = ["Node", "PackedRows", "PrefixTree", "best_fit", "choose_row_length", "common_prefix", "pack_rows"]
