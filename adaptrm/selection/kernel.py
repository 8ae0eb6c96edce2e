"""Scores to discrepancies to rules to a label, as one jitted function over ``[pairs, rules]`` arrays."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from adaptrm.selection.top_rules import all_in_range, top_rules

STRATEGIES = ("max-discrepancy", "all", "random", "fixed", "relevance")


@partial(jax.jit, static_argnames=("strategy", "k"))
def select_rows(
    a: Float32[Array, "pairs rules"],
    b: Float32[Array, "pairs rules"],
    relevance: Float32[Array, "pairs rules"],
    discrepancy_weight: Float32[Array, ""],
    fixed: Int32[Array, " k"] | None,
    seed: UInt32[Array, ""],
    row: Int32[Array, " pairs"],
    *,
    strategy: str,
    k: int,
) -> tuple[Int32[Array, "pairs k"], Float32[Array, " pairs"]]:
    """The k rules of each pair and the sum of their score differences (METHOD.md section 1, steps 4 and 5).

    Rules come in descending selection score, ties to the lower index; the sum runs in that order, so that swapping
    the responses negates it exactly.

    Args:
        row: position of each pair in the whole set; random picks depend on (seed, row) alone.
    """
    arrays = (a, b, relevance, discrepancy_weight, fixed, seed, row)
    return _select(*arrays, strategy, k, checked=False)[:2]


@partial(jax.jit, static_argnames=("strategy", "k"))
def checked_rows(
    a, b, relevance, discrepancy_weight, fixed, seed, row, *, strategy: str, k: int
) -> tuple[Int32[Array, "pairs k"], Float32[Array, " pairs"], Bool[Array, " pairs"]]:
    """As ``select_rows``, and whether all scores of each pair are in range: if not, the rest means nothing."""
    return _select(a, b, relevance, discrepancy_weight, fixed, seed, row, strategy, k, checked=True)


def _select(a, b, relevance, discrepancy_weight, fixed, seed, row, strategy: str, k: int, checked: bool):
    rules = a.shape[1]
    if strategy in ("fixed", "random"):
        chosen = drawn_rules(strategy, fixed, seed, row, rules, k)
        valid = all_in_range(a, b, relevance) if checked else None
    else:
        weight = None if strategy == "relevance" else discrepancy_weight
        chosen, valid = top_rules(a, b, relevance, weight, k, checked)
    return chosen, sum_in_order(at(a, chosen) - at(b, chosen)), valid


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
