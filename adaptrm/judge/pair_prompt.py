"""What the Rule Adapter reads: a conversation and both responses, quoted as text inside one turn of the user."""

from collections.abc import Mapping, Sequence

from adaptrm.data.chat import ChatTokenizer
from adaptrm.data.chat_trees import conversation_tree, naming
from adaptrm.data.preferences import Pair
from adaptrm.judge.prompts import quote, transcript
from adaptrm.prefix_tree import PrefixTree

TEXT = (
    "Read the conversation and two responses of the assistant, then say which rules tell the responses apart.\n\n"
    "### Conversation\n{conversation}### Response A\n{first}\n\n### Response B\n{second}\n\n### Rules?"
)


def pair_turn(prompt: Sequence[Mapping[str, str]], first: str, second: str) -> list[dict[str, str]]:
    """The turn in which the responses stand in this order; text in them that could pass for a heading is escaped."""
    text = TEXT.format(conversation=transcript(prompt), first=quote(first), second=quote(second))
    return [{"role": "user", "content": text}]


def choice_tree(chat: ChatTokenizer, pair: Pair, pad_id: int | None, both_orders: bool = False) -> PrefixTree:
    """A pair as a tree whose leaf is where the rules' logits are read: at the reward position, as transformers does.

    The responses stand in the order of their texts, whatever their side, so that swapping A and B changes nothing.

    Args:
        both_orders: a second leaf for the other order, below the conversation that both share. Training reads both, so
            that the order says nothing.
    """
    first, second = sorted(pair.responses)
    orders = [(first, second), (second, first)] if both_orders else [(first, second)]
    with naming(pair):
        return conversation_tree(chat, [pair_turn(pair.prompt, *order) for order in orders], pad_id)
