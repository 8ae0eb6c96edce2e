"""``select``: which rules decide a pair, and what they say."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int8, Int32

from adaptrm.selection.evidence import EvidenceWeights, fit_weights
from adaptrm.selection.kernel import STRATEGIES, Evidence, checked_rows


@dataclass(frozen=True, eq=False)
class Selection:
    """The rules that decide each pair, and the label they give.

    Attributes:
        rules: positions of the selected rules.
        preferred: +1 for response A, -1 for B, 0 for a tie.
        margin: sum of ``a - b`` over the selected rules; of ``evidence`` the log-odds of A being better.
        probability: that A is better; 1, .5 or 0 where the strategy has no model of it.
    """

    rules: Int32[np.ndarray, "pairs k"]
    preferred: Int8[np.ndarray, " pairs"]
    margin: Float32[np.ndarray, " pairs"]
    probability: Float32[np.ndarray, " pairs"]

    @classmethod
    def of(cls, rules: np.ndarray, margin: np.ndarray, strategy: str) -> "Selection":
        """The labels that margins give."""
        preferred = np.sign(margin).astype(np.int8)
        if strategy != "evidence":
            return cls(rules, preferred, margin, (preferred.astype(np.float32) + 1) / 2)
        of_preferred = 1 / (1 + np.exp(-np.abs(margin)))  # so that swapping the responses gives exactly the rest to 1
        return cls(rules, preferred, margin, np.where(preferred < 0, 1 - of_preferred, of_preferred))


def select(
    a: Float32[np.ndarray, "pairs rules"],
    b: Float32[np.ndarray, "pairs rules"],
    relevance: Float32[np.ndarray, "pairs rules"],
    strategy: str = "max-discrepancy",
    k: int = 5,
    discrepancy_weight: float = 0.5,
    rules: Sequence[int] | None = None,
    weights: EvidenceWeights | None = None,
    seed: int = 0,
    ids: Sequence[str] | None = None,
    first_row: int = 0,
) -> Selection:
    """Select the rules of each pair and label it.

    Strategies: ``max-discrepancy`` takes the top k of ``relevance + discrepancy_weight * |a - b|`` (the published
    rule, METHOD.md section 1); ``evidence`` weighs each rule's ``a - b`` by what its word is worth, and so the vote
    (METHOD.md section 3); ``all`` every rule; ``relevance`` the top k of relevance; ``random`` k at random; ``fixed``
    the given ``rules`` in the given order.

    Args:
        a, b: scores in [-1, 1].
        relevance: in [0, 1].
        rules: positions for ``fixed``.
        weights: for ``evidence``; None fits them on the given scores.
        ids: of the pairs, for messages.
        first_row: position of the first pair in the whole set, which ``random`` depends on.

    Raises:
        ValueError: shapes differ, a value is out of range or not finite (names the pair), or an argument is wrong.
    """
    a, b, relevance = (np.asarray(x, np.float32) for x in (a, b, relevance))
    if a.ndim != 2 or a.shape != b.shape or a.shape != relevance.shape:
        raise ValueError(f"a, b and relevance must be [pairs, rules]; they are {a.shape}, {b.shape}, {relevance.shape}")
    k, fixed = resolve_k(strategy, k, discrepancy_weight, rules, a.shape[1])
    evidence = evidence_of(strategy, weights, a, b)
    chosen, margin, valid = checked_rows(
        a,
        b,
        relevance,
        jnp.float32(discrepancy_weight),
        fixed,
        jnp.uint32(seed % 2**32),
        np.arange(first_row, first_row + len(a), dtype=np.int32),
        evidence,
        strategy=strategy,
        k=k,
    )
    if not np.asarray(valid).all():
        for name, values, low in (("a", a, -1), ("b", b, -1), ("relevance", relevance, 0)):
            _check_range(name, values, low, ids, first_row)
    return Selection.of(np.asarray(chosen), np.asarray(margin), strategy)


def evidence_of(strategy: str, weights: EvidenceWeights | None, a: np.ndarray, b: np.ndarray) -> Evidence | None:
    """What the kernel takes of weights, fitted on the scores if there are none.

    Raises:
        ValueError: the strategy takes none, they are of another number of rules, or the scores cannot support any.
    """
    if strategy != "evidence":
        if weights is not None:
            raise ValueError(f"strategy {strategy!r} takes no weights; only 'evidence' does")
        return None
    if weights is None:
        weights = fit_weights(a - b)
    if weights.a.shape != a.shape[1:]:
        raise ValueError(f"the weights are of {len(weights.a)} rules; there are {a.shape[1]}")
    return weights.arrays()


def resolve_k(
    strategy: str, k: int, discrepancy_weight: float, rules: Sequence[int] | None, count: int
) -> tuple[int, Int32[jnp.ndarray, " k"] | None]:
    """How many rules a strategy selects, and which if they are fixed.

    Raises:
        ValueError: an argument is wrong.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy {strategy!r} is unknown; known: {', '.join(STRATEGIES)}")
    if not np.isfinite(discrepancy_weight):
        raise ValueError(f"discrepancy_weight is {discrepancy_weight}; it must be a finite number")
    if strategy != "fixed" and rules is not None:
        raise ValueError(f"strategy {strategy!r} takes no rules; only 'fixed' does")
    if strategy == "all":
        return count, None
    if strategy != "fixed":
        if not 1 <= k <= count:
            raise ValueError(f"k is {k}; with {count} rules it must be 1 to {count}")
        return k, None
    fixed = np.asarray([] if rules is None else rules, np.int32)
    if fixed.ndim != 1 or not len(fixed) or fixed.min() < 0 or fixed.max() >= count or len(set(fixed)) < len(fixed):
        raise ValueError(f"strategy 'fixed' needs distinct rules between 0 and {count - 1}; got {rules}")
    return len(fixed), jnp.asarray(fixed)


def _check_range(name: str, values: np.ndarray, low: float, ids: Sequence[str] | None, first_row: int) -> None:
    good = (values >= low) & (values <= 1)  # nan compares false
    if good.all():
        return
    row, rule = (int(i[0]) for i in np.nonzero(~good))
    pair = f"row {first_row + row}" if ids is None else f"pair {ids[row]!r}"
    raise ValueError(f"{name} of {pair}, rule {rule}, is {values[row, rule]}; it must be in [{low}, 1]")
