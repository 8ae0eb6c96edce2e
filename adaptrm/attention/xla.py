"""Blockwise tree attention in plain XLA: runs anywhere, skips what a query block cannot see, O(tokens) memory.

Flash attention (Dao et al. 2022) over blocks of queries and keys, with the list of visible key blocks of each query
block worked out from ``subtree_end`` alone: key block c is visible to query block b when c <= b and the largest
``subtree_end`` in c lies beyond b's first query. Differentiated by hand, because a loop whose length depends on the
data has no automatic reverse.

Shape suffixes: B batch, N blocks, S block size, K kv heads, G query heads a kv head, H head dim.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int32

ATTENTION = "attention"  # names what the backward pass would need a second forward pass for
BLOCK = 128
MASKED = -1e30  # finite, so that a query without a visible key in a block gives 0 and not nan


def tree_attention(
    q: Float[Array, "batch tokens heads dim"],
    k: Float[Array, "batch tokens kv_heads dim"],
    v: Float[Array, "batch tokens kv_heads dim"],
    subtree_end: Int32[Array, "batch tokens"],
    block: int = BLOCK,
) -> Float[Array, "batch tokens heads dim"]:
    """Attention along the paths of packed prefix trees; accumulates in float32, result in q's dtype."""
    batch, tokens, heads, dim = q.shape
    kv_heads = k.shape[2]
    block = min(block, -(-tokens // 8) * 8)
    missing = -tokens % block
    if missing:
        fill = lambda x: jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0)))  # noqa: E731
        q, k, v = fill(q), fill(k), fill(v)
        own = jnp.broadcast_to(jnp.arange(tokens + 1, tokens + missing + 1, dtype=jnp.int32), (batch, missing))
        subtree_end = jnp.concatenate([subtree_end, own], axis=1)
    count = (tokens + missing) // block
    q_BNKXH = (
        q.reshape(batch, count, block, kv_heads, heads // kv_heads, dim)
        .transpose(0, 1, 3, 4, 2, 5)
        .reshape(batch, count, kv_heads, -1, dim)
    )
    split = lambda x: x.reshape(batch, count, block, kv_heads, dim).transpose(0, 1, 3, 2, 4)  # noqa: E731
    out = _attend(q_BNKXH, split(k), split(v), subtree_end.reshape(batch, count, block))
    out = out.reshape(batch, count, kv_heads, heads // kv_heads, block, dim).transpose(0, 1, 4, 2, 3, 5)
    return out.reshape(batch, tokens + missing, heads, dim)[:, :tokens]


def _visible_blocks(end_NS: Int32[Array, "blocks size"]) -> tuple[Array, Array]:
    """For each query block: how many key blocks it sees, and their indices in front, ascending."""
    count, size = end_NS.shape
    block = jnp.arange(count)
    sees = (block[None, :] <= block[:, None]) & (end_NS.max(axis=1)[None, :] > block[:, None] * size)
    return sees.sum(axis=1), jnp.argsort(~sees, axis=1, stable=True)


def _logits(q_KXH, k_KSH, end_S, query_block, key_block):
    """Scaled logits [K, G, S, S] of a query block against a key block, masked, in float32."""
    kv_heads, _, dim = q_KXH.shape
    size = k_KSH.shape[1]
    logits = jnp.einsum("kxh,ksh->kxs", q_KXH, k_KSH, preferred_element_type=jnp.float32) * dim**-0.5
    query = query_block * size + jnp.arange(size)[:, None]
    key = key_block * size + jnp.arange(size)[None, :]
    sees = (key <= query) & (query < end_S[None, :])
    return jnp.where(sees, logits.reshape(kv_heads, -1, size, size), MASKED)


@jax.custom_vjp
def _attend(q, k, v, end):
    return _forward(q, k, v, end)[0]


def _forward(q_BNKXH, k_BNKSH, v_BNKSH, end_BNS):
    kv_heads, _, dim = q_BNKXH.shape[2:]

    def row(args):
        q_NKXH, k_NKSH, v_NKSH, end_NS = args
        counts, order = _visible_blocks(end_NS)

        def query_block(args):
            b, q_KXH = args

            def key_block(j, carry):
                top, total, out = carry
                c = order[b, j]
                logits = _logits(q_KXH, k_NKSH[c], end_NS[c], b, c).reshape(kv_heads, q_KXH.shape[1], -1)
                new_top = jnp.maximum(top, logits.max(axis=-1))
                weights = jnp.where(logits > MASKED / 2, jnp.exp(logits - new_top[..., None]), 0.0)
                shrink = jnp.exp(top - new_top)
                add = jnp.einsum(
                    "kxs,ksh->kxh", weights.astype(v_NKSH.dtype), v_NKSH[c], preferred_element_type=jnp.float32
                )
                return new_top, total * shrink + weights.sum(axis=-1), out * shrink[..., None] + add

            shape = q_KXH.shape[:2]
            start = (jnp.full(shape, MASKED), jnp.zeros(shape), jnp.zeros((*shape, dim)))
            top, total, out = lax.fori_loop(0, counts[b], key_block, start)
            return (out / total[..., None]).astype(q_KXH.dtype), top + jnp.log(total)

        return lax.map(query_block, (jnp.arange(len(q_NKXH)), q_NKXH))

    out, log_total = checkpoint_name(lax.map(row, (q_BNKXH, k_BNKSH, v_BNKSH, end_BNS)), ATTENTION)
    return out, (q_BNKXH, k_BNKSH, v_BNKSH, end_BNS, out, log_total)


def _backward(saved, grad_out):
    q_BNKXH, k_BNKSH, v_BNKSH, end_BNS, out_BNKXH, log_total_BNKX = saved
    scale = q_BNKXH.shape[-1] ** -0.5
    # sum over h of out * d out: the softmax's own term (Dao et al. 2022, appendix B).
    delta_BNKX = jnp.einsum("bnkxh,bnkxh->bnkx", out_BNKXH.astype(jnp.float32), grad_out.astype(jnp.float32))

    def row(args):
        q_NKXH, k_NKSH, v_NKSH, end_NS, log_total_NKX, delta_NKX, grad_NKXH = args
        counts, order = _visible_blocks(end_NS)

        def query_block(carry, args):
            b, q_KXH, log_total_KX, delta_KX, grad_KXH = args

            def key_block(j, carry):
                dq, dk, dv = carry
                c = order[b, j]
                logits = _logits(q_KXH, k_NKSH[c], end_NS[c], b, c).reshape(*q_KXH.shape[:2], -1)
                weights = jnp.where(logits > MASKED / 2, jnp.exp(logits - log_total_KX[..., None]), 0.0)
                dweights = jnp.einsum("kxh,ksh->kxs", grad_KXH, v_NKSH[c], preferred_element_type=jnp.float32)
                dlogits = (weights * (dweights - delta_KX[..., None]) * scale).astype(q_KXH.dtype)
                weights = weights.astype(q_KXH.dtype)
                product = partial(jnp.einsum, preferred_element_type=jnp.float32)
                dq = dq + product("kxs,ksh->kxh", dlogits, k_NKSH[c])
                dk = dk.at[c].add(product("kxs,kxh->ksh", dlogits, q_KXH))
                dv = dv.at[c].add(product("kxs,kxh->ksh", weights, grad_KXH))
                return dq, dk, dv

            dq, dk, dv = lax.fori_loop(0, counts[b], key_block, (jnp.zeros(q_KXH.shape, jnp.float32), *carry))
            return (dk, dv), dq

        zeros = (jnp.zeros(k_NKSH.shape, jnp.float32), jnp.zeros(v_NKSH.shape, jnp.float32))
        blocks = jnp.arange(len(q_NKXH))
        (dk, dv), dq = lax.scan(query_block, zeros, (blocks, q_NKXH, log_total_NKX, delta_NKX, grad_NKXH))
        return dq.astype(q_NKXH.dtype), dk.astype(k_NKSH.dtype), dv.astype(v_NKSH.dtype)

    dq, dk, dv = lax.map(row, (q_BNKXH, k_BNKSH, v_BNKSH, end_BNS, log_total_BNKX, delta_BNKX, grad_out))
    return dq, dk, dv, np.zeros(end_BNS.shape, jax.dtypes.float0)


_attend.defvjp(_forward, _backward)
