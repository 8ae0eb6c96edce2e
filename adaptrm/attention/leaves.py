"""Tree attention of a few queries of each row: what the last layer needs where only the leaves are read off it.

Dense over the keys of a row, a few queries at a time: of a layer it is so little that no block is worth skipping.

Shape suffixes: B batch, T tokens, M queries, N query heads, K kv heads, G query heads a kv head, H head dim.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from adaptrm.attention.xla import MASKED
from adaptrm.products import product

QUERIES_AT_ONCE = 64  # logits exist for this many queries of a row at a time


def leaf_attention(
    q: Float[Array, "batch queries heads dim"],
    k: Float[Array, "batch tokens kv_heads dim"],
    v: Float[Array, "batch tokens kv_heads dim"],
    subtree_end: Int32[Array, "batch tokens"],
    leaves: Int32[Array, "batch queries"],
) -> Float[Array, "batch queries heads dim"]:
    """``tree_attention`` at the tokens ``leaves`` alone; accumulates in float32, result in q's dtype."""
    batch, count, heads, dim = q.shape
    at_once = min(QUERIES_AT_ONCE, count)
    key_T = jnp.arange(k.shape[1])

    def some(args):
        q_BMKGH, leaves_BM = args
        logits = product("bmkgh,btkh->bkgmt", q_BMKGH, k, jnp.float32) * dim**-0.5
        leaf = leaves_BM[:, :, None]
        sees = (key_T <= leaf) & (leaf < subtree_end[:, None])
        weights = jax.nn.softmax(jnp.where(sees[:, None, None], logits, MASKED), axis=-1)
        return product("bkgmt,btkh->bmkgh", weights.astype(v.dtype), v, jnp.float32)

    def chunks(x_BM):
        x_BM = jnp.pad(x_BM, ((0, 0), (0, -count % at_once), *[(0, 0)] * (x_BM.ndim - 2)))
        return x_BM.reshape(batch, -1, at_once, *x_BM.shape[2:]).swapaxes(0, 1)

    grouped = q.reshape(batch, count, k.shape[2], -1, dim)
    out = jax.lax.map(some, (chunks(grouped), chunks(leaves))).swapaxes(0, 1)
    return out.reshape(batch, -1, heads, dim)[:, :count].astype(q.dtype)
