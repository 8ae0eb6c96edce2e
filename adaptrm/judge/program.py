"""The judge's jitted programs: packed questions to answers, and on to scores, rules and labels."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int32

from adaptrm.models.heads import answer_log_probabilities
from adaptrm.selection.sharded import select_sharded


@partial(jax.jit, static_argnums=(0, 1, 2))
def answer_leaves(
    definition: nnx.GraphDef,
    answers: tuple[tuple[int, ...], ...],
    dtype: str,
    state: nnx.State,
    tokens: Int32[Array, "rows tokens"],
    positions: Int32[Array, "rows tokens"],
    subtree_end: Int32[Array, "rows tokens"],
    leaves: Int32[Array, "rows leaves"],
) -> Float32[Array, "rows leaves 3"]:
    """Log-probabilities of the answers at the leaves of packed rows: the step of scoring."""
    model = nnx.merge(definition, state)
    hidden = model.model.at_leaves(tokens, positions, subtree_end, leaves, jnp.dtype(dtype))
    return answer_log_probabilities(hidden, model.unembedding, answers)


@partial(jax.jit, static_argnums=(0, 1, 2), static_argnames=("strategy", "k"))
def decide_leaves(
    definition: nnx.GraphDef,
    answers: tuple[tuple[int, ...], ...],
    dtype: str,
    state: nnx.State,
    signs: Float32[Array, " rules"],
    discrepancy_weight: Float32[Array, ""],
    fixed: Int32[Array, " k"] | None,
    seed: Array,
    tokens: Int32[Array, "rows tokens"],
    positions: Int32[Array, "rows tokens"],
    subtree_end: Int32[Array, "rows tokens"],
    leaves: Int32[Array, "rows leaves"],
    slots: Int32[Array, "rows pairs 2 rules"],
    numbers: Int32[Array, "rows pairs"],
    *,
    strategy: str,
    k: int,
) -> tuple[Int32[Array, "rows pairs k"], Float32[Array, "rows pairs"], Bool[Array, "rows pairs"]]:
    """The selected rules and margins of the pairs in packed rows, on the mesh of ``jax.set_mesh``.

    Nothing else leaves the devices. The rules are split over the tensor axis once they are scores.

    Args:
        slots: the leaf of each pair's response and rule, among the leaves of its row.
        numbers: of each pair in the whole set.

    Returns:
        Rules, margins, and whether the answers of the pair are numbers: if not, the others mean nothing.
    """
    log_p = answer_leaves(definition, answers, dtype, state, tokens, positions, subtree_end, leaves)
    rows, pairs, sides, rules = slots.shape
    asked = jnp.take_along_axis(log_p, slots.reshape(rows, -1, 1), axis=1)
    found = scores_of(asked.reshape(rows * pairs, sides, rules, -1), signs, jnp)
    scores = found["a"], found["b"], found["relevance"]
    chosen, margin = select_sharded(
        *scores, discrepancy_weight, fixed, seed, numbers.reshape(-1), strategy=strategy, k=k
    )
    good = jnp.logical_not(jnp.isnan(asked)).reshape(rows, pairs, -1).all(axis=-1)
    return chosen.reshape(rows, pairs, k), margin.reshape(rows, pairs), good


def scores_of(
    log_p: Float[Any, "pairs 2 rules 3"], signs: Float[Any, " rules"], xp: Any = np
) -> dict[str, Float[Any, "pairs rules"]]:
    """Scores, relevance, log-odds and label mass from the answers' log-probabilities (DESIGN.md section 3).

    Args:
        xp: numpy, or jax.numpy inside a program.

    Returns:
        By the attributes of ``Scores``.
    """
    shares = xp.exp(log_p - log_p.max(axis=-1, keepdims=True))
    shares = shares / shares.sum(axis=-1, keepdims=True, dtype=xp.float32)
    mass = xp.minimum(xp.exp(log_p).sum(axis=-1, dtype=xp.float32), xp.float32(1))
    # The log-odds of an answer with probability 0 is infinite; the largest float keeps the file readable by all. Of a
    # rule that was not asked about all is nan.
    log_odds = xp.nan_to_num(log_p[..., 0] - log_p[..., 1]) * signs
    log_odds = xp.where(xp.isnan(log_p[..., 0]), xp.float32(xp.nan), log_odds)
    scores = (shares[..., 0] - shares[..., 1]) * signs
    relevance = xp.clip((1 - shares[..., 2]).mean(axis=1, dtype=xp.float32), 0, 1)
    sides = {"": scores, "log_odds_": log_odds, "label_mass_": mass}
    both = {f"{name}{side}": x[:, i] for name, x in sides.items() for i, side in enumerate("ab")}
    return {"relevance": relevance, **both}
