"""Scores to discrepancies to rules to a label, as one jitted function over ``[pairs, rules]`` arrays."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, UInt32

STRATEGIES = ("max-discrepancy", "all", "random", "fixed", "relevance")


@partial(jax.jit, static_argnames=("strategy", "k"))
def select_rows(
    a: Float32[Array, "pairs rules"],
    b: Float32[Array, "pairs rules"],
    relevance: Float32[Array, "pairs rules"],
    discrepancy_weight: Float32[Array, ""],
    fixed: Int32[Array, " k"] | None,
    seed: UInt32[Array, ""],
    first_row: Int32[Array, ""],
    *,
    strategy: str,
    k: int,
) -> tuple[Int32[Array, "pairs k"], Float32[Array, " pairs"]]:
    """The k rules of each pair and the sum of their score differences (METHOD.md section 1, steps 4 and 5).

    Rules come in descending selection score, ties to the lower index; the sum runs in that order, so that swapping
    the responses negates it exactly.

    Args:
        first_row: position of the first pair in the whole set; random picks depend on (seed, row) alone.
    """
    pairs, rules = a.shape
    difference = a - b
    if strategy == "fixed":
        chosen = jnp.broadcast_to(fixed, (pairs, k))
    elif strategy == "random":
        key = jax.random.key(seed)
        draw = jax.vmap(lambda row: jax.random.permutation(jax.random.fold_in(key, row), rules)[:k])
        chosen = jnp.sort(draw(first_row + jnp.arange(pairs)), axis=1).astype(jnp.int32)
    elif strategy == "relevance":
        chosen = jax.lax.top_k(relevance, k)[1]
    else:
        weighted = discrepancy_weight * jnp.abs(difference)
        # Keeps product and sum two roundings, as the contract says: a fused multiply-add would order near-ties
        # differently. (XLA for CPUs removes an optimization_barrier before LLVM contracts the two.)
        weighted = jnp.where(jnp.isnan(weighted), 0.0, weighted)
        chosen = jax.lax.top_k(relevance + weighted, k)[1]
    picked = jnp.take_along_axis(difference, chosen, axis=1)
    margin, _ = jax.lax.scan(lambda total, x: (total + x, None), jnp.zeros(pairs, jnp.float32), picked.T)
    return chosen, margin
