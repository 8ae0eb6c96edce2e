"""``RewardModel``: one score a conversation."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from adaptrm.data.chat_trees import conversation_tree, pair_length, pair_tree
from adaptrm.data.preferences import Pair, ResponseSet, check_messages, check_prompt
from adaptrm.errors import InputError
from adaptrm.train.classifier import Classifier

# How turns begin in texts that a chat template has written: ChatML, Llama 3, Gemma, Mistral, Phi, DeepSeek.
TURN = re.compile(r"<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|\[INST\]|<\|(?:user|assistant)\|>|<｜User｜>")

Conversation = Sequence[Mapping[str, str]]


class BestOfN(NamedTuple):
    """The best of some responses.

    Attributes:
        index: of the response with the largest reward; of equals the first.
        rewards: of all of them.
    """

    index: int
    rewards: Float32[np.ndarray, " responses"]


class RewardModel(Classifier):
    """A sequence classifier with one label, its tokenizer and chat template."""

    kind = "reward"

    def score(self, conversations: Sequence[Conversation]) -> Float32[np.ndarray, " conversations"]:
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

    def best_of_n(self, prompt: str | Conversation, responses: Sequence[str]) -> BestOfN:
        """The best of n responses to a prompt, which is computed once; a response may be empty.

        Args:
            prompt: messages, the last one of the user; a text is one message of the user.

        Raises:
            InputError: there are no responses, the prompt or one of them is none, or a reward is not finite.
        """
        if not len(responses):
            raise InputError("responses: there are none to choose from; give at least one")
        rewards = np.array(self._rewards([prompt] * len(responses), responses, "prompt"), np.float32)
        return BestOfN(int(rewards.argmax()), rewards)

    def reward_function(
        self, column: str | None = None, end: str = "", name: str = "reward_model"
    ) -> Callable[..., list[float]]:
        """What TRL's ``GRPOTrainer`` takes as ``reward_funcs``, and Tunix' ``GRPOLearner`` as ``reward_fns``.

        It is called with ``prompts``, ``completions`` and the data set's other columns, a value a completion each, and
        gives a reward a completion, a float. Equal prompts (GRPO repeats each) are computed once. A completion is a
        text or one message of the assistant, and may be empty.

        A prompt is messages, the last one of the user, or a text, which becomes one message of the user in *this*
        model's chat template. So it must not have been through the policy's: TRL gives messages as the data set has
        them, Tunix gives what the policy reads. For Tunix keep what the user asked in another column and name it.

        Args:
            column: where the prompts are, in place of ``prompts``: texts or messages (in Tunix, whose batches are
                arrays, an array of objects).
            end: what the policy's decoder leaves at the end of a completion, which is taken off: in Tunix with vLLM the
                text of its end token.
            name: what trainers log the rewards under.

        Raises:
            InputError: by the function: there is no such column; a prompt or a completion is none; a text in
                ``prompts`` holds what begins a turn in a chat template; a reward is not finite.
        """

        def reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
            if column is None:
                for row, prompt in enumerate(prompts):
                    if isinstance(prompt, str) and (TURN.search(prompt) or self.chat.special_strings(prompt)):
                        raise InputError(
                            f"prompts[{row}]: a chat template has written this text; keep the messages, or what the "
                            "user asked, in another column and give reward_function(column=...) its name"
                        )
                return self._rewards(prompts, completions, "prompts", end)
            if column not in columns:
                raise InputError(f"column {column!r}: the trainer gives none; it gives {', '.join(columns) or 'none'}")
            return self._rewards(columns[column], completions, column, end)

        reward.__name__ = name
        return reward

    def _rewards(self, prompts: Sequence[Any], completions: Sequence[Any], where: str, end: str = "") -> list[float]:
        """The reward of each completion of the prompt beside it; equal prompts are one tree."""
        if len(prompts) != len(completions):
            raise InputError(f"{where}: there are {len(prompts)} for {len(completions)} completions; give one each")
        replies = [_reply(one, f"completions[{row}]").removesuffix(end) for row, one in enumerate(completions)]
        rows: dict[tuple[tuple[str, str], ...], list[int]] = {}
        for row, prompt in enumerate(prompts):
            prompt = prompt.tolist() if isinstance(prompt, np.ndarray) else prompt
            messages = check_prompt(prompt, f"{where}[{row}]")
            rows.setdefault(tuple((m["role"], m["content"]) for m in messages), []).append(row)
        sets = [
            ResponseSet(
                f"{where}[{group[0]}]",
                tuple({"role": role, "content": content} for role, content in messages),
                tuple(replies[row] for row in group),
                (0.0,) * len(group),
            )
            for messages, group in rows.items()
        ]
        rewards = np.zeros(len(replies), np.float32)
        for group, of_group in zip(rows.values(), self.score_sets(sets), strict=True):
            rewards[group] = of_group
        if not (finite := np.isfinite(rewards)).all():
            raise InputError(
                f"the reward of completions[{int(finite.argmin())}] is not finite; check weights and dtype"
            )
        return rewards.tolist()

    def pair_length(self, pair: Pair) -> int:
        """Tokens of the longer of a pair's two conversations."""
        return pair_length(self.chat, pair)


def _reply(value: Any, where: str) -> str:
    """A completion, which may be empty: a text, or one message of the assistant."""
    given = [{"role": "assistant", "content": value}] if isinstance(value, str) else value
    if not isinstance(given, list | tuple):
        raise InputError(f"{where}: is no text and no list of messages")
    messages = check_messages(given, "it", where)
    if [message["role"] for message in messages] != ["assistant"]:
        raise InputError(
            f"{where}: must be a text or one message of the assistant; tools and more turns have no reward"
        )
    return messages[0]["content"]
