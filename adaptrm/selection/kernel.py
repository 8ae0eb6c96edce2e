"""Scores to discrepancies to rules to a label, as one jitted function over ``[pairs, rules]`` arrays."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from adaptrm.selection.top_rules import all_in_range, top_rules

STRATEGIES = ("max-discrepancy", "evidence", "all", "random", "fixed", "relevance")
PAIRS_AT_ONCE = 1024  # whose covariances of selected rules exist at a time


class Evidence(NamedTuple):
    """What each rule's word is worth (METHOD.md section 3), for strategy ``evidence``.

    Attributes:
        scale: the weights of all rules, ``w = sigma^-1 a``, divided by their mean size.
        weights: w itself.
        a: mean discrepancy of a rule where the first response is the better one.
        sigma: covariance of the discrepancies, given which response is better.
    """

    scale: Float32[Array, " rules"]
    weights: Float32[Array, " rules"]
    a: Float32[Array, " rules"]
    sigma: Float32[Array, "rules rules"]


@partial(jax.jit, static_argnames=("strategy", "k"))
def select_rows(
    a: Float32[Array, "pairs rules"],
    b: Float32[Array, "pairs rules"],
    relevance: Float32[Array, "pairs rules"],
    discrepancy_weight: Float32[Array, ""],
    fixed: Int32[Array, " k"] | None,
    seed: UInt32[Array, ""],
    row: Int32[Array, " pairs"],
    evidence: Evidence | None = None,
    *,
    strategy: str,
    k: int,
) -> tuple[Int32[Array, "pairs k"], Float32[Array, " pairs"]]:
    """The k rules of each pair and the sum of their score differences (METHOD.md section 1, steps 4 and 5).

    Rules come in descending selection score, ties to the lower index; the sum runs in that order, so that swapping
    the responses negates it exactly. Strategy ``evidence`` gives the log-odds of A being better for the sum.

    Args:
        row: position of each pair in the whole set; random picks depend on (seed, row) alone.
        evidence: for strategy ``evidence``.
    """
    arrays = (a, b, relevance, discrepancy_weight, fixed, seed, row, evidence)
    return _select(*arrays, strategy, k, checked=False)[:2]


@partial(jax.jit, static_argnames=("strategy", "k"))
def checked_rows(
    a, b, relevance, discrepancy_weight, fixed, seed, row, evidence=None, *, strategy: str, k: int
) -> tuple[Int32[Array, "pairs k"], Float32[Array, " pairs"], Bool[Array, " pairs"]]:
    """As ``select_rows``, and whether all scores of each pair are in range: if not, the rest means nothing."""
    return _select(a, b, relevance, discrepancy_weight, fixed, seed, row, evidence, strategy, k, checked=True)


def _select(a, b, relevance, discrepancy_weight, fixed, seed, row, evidence, strategy: str, k: int, checked: bool):
    rules = a.shape[1]
    if strategy in ("fixed", "random"):
        chosen = drawn_rules(strategy, fixed, seed, row, rules, k)
        valid = all_in_range(a, b, relevance) if checked else None
    else:
        weight = None if strategy == "relevance" else discrepancy_weight
        chosen, valid = top_rules(a, b, relevance, weight, k, checked, None if evidence is None else evidence.scale)
    return chosen, margin_of(at(a, chosen) - at(b, chosen), chosen, evidence), valid


def margin_of(
    difference: Float32[Array, "pairs k"], chosen: Int32[Array, "pairs k"], evidence: Evidence | None
) -> Float32[Array, " pairs"]:
    """The sum of the selected differences; with evidence ``2 w_S . d_S``, the log-odds of A being better.

    The weights are those of a vote of the selected rules alone, ``w_S = sigma_SS^-1 a_S``.
    """
    if evidence is None:
        return sum_in_order(difference)
    if chosen.shape[1] == len(evidence.a):
        return sum_in_order(2 * evidence.weights[chosen] * difference)

    def of_pair(chosen):
        factor = jax.scipy.linalg.cho_factor(evidence.sigma[chosen[:, None], chosen])
        return jax.scipy.linalg.cho_solve(factor, evidence.a[chosen])

    own = jax.lax.map(of_pair, chosen, batch_size=min(PAIRS_AT_ONCE, len(chosen)))
    return sum_in_order(2 * own * difference)


def at(x: Array, chosen: Int32[Array, "pairs k"]) -> Array:
    """``[pairs, k]`` of ``[pairs, rules]``."""
    return jnp.take_along_axis(x, chosen, axis=1, mode="promise_in_bounds")


def drawn_rules(
    strategy: str,
    fixed: Int32[Array, " k"] | None,
    seed: UInt32[Array, ""],
    row: Int32[Array, " pairs"],
    rules: int,
    k: int,
) -> Int32[Array, "pairs k"]:
    """The rules of strategies that look at no score."""
    if strategy == "fixed":
        return jnp.broadcast_to(fixed, (len(row), k))
    key = jax.random.key(seed)
    draw = jax.vmap(lambda row: jax.random.permutation(jax.random.fold_in(key, row), rules)[:k])
    return jnp.sort(draw(row), axis=1).astype(jnp.int32)


def sum_in_order(picked: Float32[Array, "pairs k"]) -> Float32[Array, " pairs"]:
    """Float32 sums over k, from the first to the last."""
    start = jnp.zeros(len(picked), jnp.float32)
    return jax.lax.scan(lambda total, x: (total + x, None), start, picked.T, unroll=8)[0]
