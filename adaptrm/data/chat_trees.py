"""Conversations as prefix trees whose leaves are where a reward is read."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from adaptrm.data.chat import ChatTokenizer
from adaptrm.data.preferences import Pair, ResponseSet, continued
from adaptrm.errors import InputError
from adaptrm.prefix_tree import Node, PrefixTree, common_prefix


def conversation_tree(
    chat: ChatTokenizer, conversations: Sequence[Sequence[Mapping[str, str]]], pad_id: int | None
) -> PrefixTree:
    """Conversations as one tree: their longest common beginning once, then the rest of each as a leaf.

    A reward is read at the last token that is not pad, as transformers does; that is the end of the conversation
    unless the pad token can end one.
    """
    ids = [chat.encode_chat(conversation) for conversation in conversations]
    cut = common_prefix(ids)
    tree = PrefixTree.build(Node(ids[0][:cut], [Node(rest[cut:]) for rest in ids]))
    if pad_id is None or not np.isin(tree.tokens[tree.leaves], pad_id).any():
        return tree
    leaves = []
    for last in tree.leaves.tolist():
        path = np.flatnonzero(tree.subtree_end[: last + 1] > last)
        real = path[tree.tokens[path] != pad_id]
        if not len(real):
            raise InputError("a conversation holds pad tokens alone; it has no reward")
        leaves.append(real[-1])
    return replace(tree, leaves=np.asarray(leaves, np.int32))


def pair_tree(chat: ChatTokenizer, pair: Pair | ResponseSet, pad_id: int | None) -> PrefixTree:
    """The prompt once, then response A and response B (all responses of a set)."""
    with naming(pair):
        return conversation_tree(chat, [continued(pair.prompt, one) for one in pair.responses], pad_id)


def pair_length(chat: ChatTokenizer, pair: Pair | ResponseSet) -> int:
    """Tokens of the longest conversation of a pair, or of a set."""
    with naming(pair):
        return max(len(chat.encode_chat(continued(pair.prompt, one))) for one in pair.responses)


@contextmanager
def naming(pair: Pair | ResponseSet) -> Iterator[None]:
    """Say which pair it is that a template refuses: it has no system role, wants roles that take turns, ..."""
    try:
        yield
    except InputError as wrong:
        raise InputError(f"pair {pair.id!r}: {wrong}; mend the pair or drop it") from None
