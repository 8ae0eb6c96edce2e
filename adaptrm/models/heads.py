"""What is read off the hidden states: answers of a judge, rewards, labels. All in float32."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from adaptrm.products import product

POSITIONS_AT_ONCE = 256  # vocabulary logits exist for this many positions at a time


def answer_log_probabilities(
    hidden: Float[Array, "rows leaves hidden"],
    unembedding: Float[Array, "vocab hidden"],
    answers: tuple[tuple[int, ...], ...],
) -> Float[Array, "rows leaves answers"]:
    """Log-probability of each answer as the next token, its spellings pooled, over the whole vocabulary.

    Args:
        answers: for each answer the token ids of its spellings.
    """
    rows, leaves, dim = hidden.shape
    at_once = min(POSITIONS_AT_ONCE, leaves)
    chunks = jnp.pad(hidden, ((0, 0), (0, -leaves % at_once), (0, 0))).reshape(rows, -1, at_once, dim)

    # The answers' few rows of the vocabulary by themselves: where it is split over devices, no logits are gathered.
    spellings = jnp.take(unembedding, jnp.asarray([i for ids in answers for i in ids]), axis=0)
    edges = np.cumsum([len(ids) for ids in answers])[:-1].tolist()

    @jax.checkpoint
    def chunk(hidden):
        logits = lambda rows: product("bmd,vd->bmv", hidden, rows.astype(hidden.dtype), jnp.float32)  # noqa: E731
        pooled = [jax.nn.logsumexp(of_one, axis=-1) for of_one in jnp.split(logits(spellings), edges, axis=-1)]
        return jnp.stack(pooled, -1) - jax.nn.logsumexp(logits(unembedding), axis=-1, keepdims=True)

    out = jax.lax.map(chunk, chunks.swapaxes(0, 1))
    return out.swapaxes(0, 1).reshape(rows, -1, len(answers))[:, :leaves]


def label_logits(
    hidden: Float[Array, "rows leaves hidden"], weight: Float[Array, "labels hidden"]
) -> Float[Array, "rows leaves labels"]:
    """The linear head in float32: one label is the reward."""
    return product("bmd,ld->bml", hidden.astype(jnp.float32), weight.astype(jnp.float32))
