"""Losses over the leaves of packed rows, in float32: each gives a sum, its weight, and sums of what to report."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Sums = Mapping[str, Float[Array, ""]]


def bradley_terry(
    rewards: Float[Array, "rows leaves"], signs: Float[Array, "rows leaves"], weights: Float[Array, "rows leaves"]
) -> Sums:
    """``-log sigmoid(r(chosen) - r(rejected))`` (Bradley & Terry 1952; Christiano et al. 2017, eq. 1).

    Leaves come in twos, response A and response B of a pair.

    Args:
        signs: +1 where A is chosen, -1 where B is; the same at both leaves.
        weights: of the pair; 0 where there is no pair or no label.

    Returns:
        Sums over the pairs: loss, weight, accuracy (strictly higher), margin.
    """
    sign, weight = signs[:, 0::2], weights[:, 0::2]
    margin = sign * (rewards[:, 0::2] - rewards[:, 1::2])
    return {
        "loss": (weight * -jax.nn.log_sigmoid(margin)).sum(),
        "weight": weight.sum(),
        "accuracy": (weight * (margin > 0)).sum(),
        "margin": (weight * margin).sum(),
    }


def answer_cross_entropy(
    log_probabilities: Float[Array, "rows leaves answers"],
    answers: Float[Array, "rows leaves"],
    weights: Float[Array, "rows leaves"],
) -> Sums:
    """Cross-entropy of the right answer (Yes 0, No 1, Neither 2) as the next token.

    Args:
        log_probabilities: over the whole vocabulary, so that mass outside the answers costs too.

    Returns:
        Sums over the leaves: loss, weight, accuracy.
    """
    target = answers.astype(jnp.int32)
    right = jnp.take_along_axis(log_probabilities, target[..., None], axis=-1)[..., 0]
    return {
        "loss": (weights * -right).sum(),
        "weight": weights.sum(),
        "accuracy": (weights * (log_probabilities.argmax(axis=-1) == target)).sum(),
    }


LOSSES: dict[str, Callable[..., Sums]] = {"reward": bradley_terry, "judge": answer_cross_entropy}
