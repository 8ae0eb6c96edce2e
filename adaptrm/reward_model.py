"""``RewardModel``: one score a conversation."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float32

from adaptrm.data.chat_trees import conversation_tree, pair_length, pair_tree
from adaptrm.data.preferences import Pair, ResponseSet
from adaptrm.train.classifier import Classifier


class RewardModel(Classifier):
    """A sequence classifier with one label, its tokenizer and chat template."""

    kind = "reward"

    def score(self, conversations: Sequence[Sequence[Mapping[str, str]]]) -> Float32[np.ndarray, " conversations"]:
        """The reward of each conversation, a list of messages ``{"role", "content"}``."""
        trees = (conversation_tree(self.chat, [one], self.pad[1]) for one in conversations)
        return np.array([rewards[0, 0] for rewards in self.logits(trees)], np.float32)

    def score_sets(self, sets: Sequence[ResponseSet | Pair]) -> list[Float32[np.ndarray, " responses"]]:
        """The rewards of the responses of each set, in their order; a prompt is computed once."""
        trees = (pair_tree(self.chat, one, self.pad[1]) for one in sets)
        return [rewards[:, 0].astype(np.float32) for rewards in self.logits(trees)]

    def score_pairs(self, pairs: Sequence[Pair]) -> Float32[np.ndarray, "pairs 2"]:
        """The rewards of responses A and B of each pair."""
        return np.array(self.score_sets(pairs), np.float32).reshape(-1, 2)

    def pair_length(self, pair: Pair) -> int:
        """Tokens of the longer of a pair's two conversations."""
        return pair_length(self.chat, pair)
