"""Dense tree attention: the reference that every other lowering is tested against."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from adaptrm.products import product


def visible(subtree_end: Int32[Array, "batch tokens"]) -> Bool[Array, "batch tokens tokens"]:
    """``[b, i, j]``: query i of row b sees key j, that is ``j <= i < subtree_end[b, j]``."""
    index = jnp.arange(subtree_end.shape[-1])
    return (index[None, None, :] <= index[None, :, None]) & (index[None, :, None] < subtree_end[:, None, :])


def tree_attention(
    q: Float[Array, "batch tokens heads dim"],
    k: Float[Array, "batch tokens kv_heads dim"],
    v: Float[Array, "batch tokens kv_heads dim"],
    subtree_end: Int32[Array, "batch tokens"],
) -> Float[Array, "batch tokens heads dim"]:
    """Attention along the paths of packed prefix trees, softmax and sums in float32, result in q's dtype."""
    batch, tokens, _, dim = q.shape
    grouped = q.reshape(batch, tokens, k.shape[2], -1, dim).astype(jnp.float32)
    logits = product("bikgh,bjkh->bkgij", grouped, k.astype(jnp.float32)) * dim**-0.5
    logits = jnp.where(visible(subtree_end)[:, None, None], logits, -jnp.inf)
    out = product("bkgij,bjkh->bikgh", jax.nn.softmax(logits, axis=-1), v.astype(jnp.float32))
    return out.reshape(q.shape).astype(q.dtype)
