"""Rules that were chosen for each pair before the judge is asked: by what, and what that saves."""

from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int32

from adaptrm.data.preferences import Pair
from adaptrm.judge.prompts import JudgePrompt

COUNTED = 128  # pairs: enough for a ratio, and with all rules they may have many tokens


class Chooser(Protocol):
    """What chooses the rules to ask about each pair: a ``RuleAdapter``."""

    rule_ids: tuple[str, ...]

    def predict(self, pairs: list[Pair], k: int) -> Int32[np.ndarray, "pairs k"]: ...

    def tokens(self, pair: Pair) -> int: ...

    def describe(self) -> dict[str, Any]: ...


def token_costs(
    prompt: JudgePrompt, adapter: Chooser, pairs: list[Pair], rules: Int32[np.ndarray, "pairs k"]
) -> dict[str, Any]:
    """What the judge reads of the first pairs with the chosen rules, in tokens, against what it reads with all.

    Returns:
        Tokens of the adapter, of the judge with the chosen rules and with all, of how many pairs; the judge's ratio,
        and the same with what the adapter reads on top.
    """

    def judge(pair: Pair, asked: Iterable[int]) -> int:
        trees = prompt.pair_trees(pair.prompt, pair.response_a, pair.response_b, list(asked))
        return sum(len(questions.tree) for questions in trees)

    pairs = pairs[:COUNTED]
    few = sum(judge(pair, map(int, chosen)) for pair, chosen in zip(pairs, rules[: len(pairs)], strict=True))
    every = sum(judge(pair, range(len(prompt.pool))) for pair in pairs)
    own = sum(map(adapter.tokens, pairs))
    return {
        "token_costs": {"pairs": len(pairs), "adapter": own, "judge": few, "judge_all_rules": every},
        "token_ratio": few / every,
        "token_ratio_with_adapter": (few + own) / every,
    }
