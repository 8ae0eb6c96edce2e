"""Blockwise tree attention in plain XLA: runs anywhere, skips what a query block cannot see, O(tokens) memory.

Flash attention (Dao et al. 2022) over blocks of queries and keys, with the list of visible key blocks of each query
block worked out from ``subtree_end`` alone: key block c is visible to query block b when c <= b and the largest
``subtree_end`` in c lies beyond b's first query. Differentiated by hand, because a loop whose length depends on the
data has no automatic reverse.

Shape suffixes: B batch, T tokens, N blocks, S block size, M query heads, K kv heads, G query heads a kv head,
X queries of a block by G, H head dim.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int32

ATTENTION = "attention"  # names what the backward pass would need a second forward pass for
# Tokens in a block. A CPU computes small products as fast as large ones, and smaller blocks hold less that is masked;
# an accelerator wants its matrix units full and few iterations.
BLOCK = {"cpu": 64, "default": 128}
MASKED = -1e30  # finite, so that a query without a visible key in a block gives 0 and not nan


def tree_attention(
    q: Float[Array, "batch tokens heads dim"],
    k: Float[Array, "batch tokens kv_heads dim"],
    v: Float[Array, "batch tokens kv_heads dim"],
    subtree_end: Int32[Array, "batch tokens"],
    block: int | None = None,
) -> Float[Array, "batch tokens heads dim"]:
    """Attention along the paths of packed prefix trees; accumulates in float32, result in q's dtype.

    Args:
        block: tokens in a block; ``BLOCK`` of the platform that the program is compiled for if not given.
    """
    return _attend(q, k, v, subtree_end, block)


def _compiled(function, block: int | None, *arrays):
    """The function's result, with the given block size or the platform's own."""
    if block is not None:
        return function(*arrays, block=block)
    return lax.platform_dependent(*arrays, **{name: partial(function, block=size) for name, size in BLOCK.items()})


def _pad(x_BT: Array, block: int) -> Array:
    """Rows filled up to whole blocks, with zeros after the tokens."""
    return jnp.pad(x_BT, ((0, 0), (0, -x_BT.shape[1] % block), *[(0, 0)] * (x_BT.ndim - 2)))


def _key_blocks(x_BTKH: Array, block: int) -> Float[Array, "batch blocks kv_heads size dim"]:
    x_BTKH = _pad(x_BTKH, block)
    return x_BTKH.reshape(len(x_BTKH), -1, block, *x_BTKH.shape[2:]).transpose(0, 1, 3, 2, 4)


def _query_blocks(x_BTMH: Array, kv_heads: int, block: int) -> Float[Array, "batch blocks kv_heads group_size dim"]:
    """The query heads of a kv head stand side by side, so that one product serves them all."""
    x_BTMH = _pad(x_BTMH, block)
    batch, tokens, _, dim = x_BTMH.shape
    x_BNSKGH = x_BTMH.reshape(batch, tokens // block, block, kv_heads, -1, dim)
    return x_BNSKGH.transpose(0, 1, 3, 4, 2, 5).reshape(batch, tokens // block, kv_heads, -1, dim)


def _tokens_of_keys(x_BNKSH: Array, tokens: int) -> Float[Array, "batch tokens kv_heads dim"]:
    batch, _, kv_heads, _, dim = x_BNKSH.shape
    return x_BNKSH.transpose(0, 1, 3, 2, 4).reshape(batch, -1, kv_heads, dim)[:, :tokens]


def _tokens_of_queries(x_BNKXH: Array, tokens: int, block: int) -> Float[Array, "batch tokens heads dim"]:
    batch, count, kv_heads, _, dim = x_BNKXH.shape
    x_BNKGSH = x_BNKXH.reshape(batch, count, kv_heads, -1, block, dim)
    return x_BNKGSH.transpose(0, 1, 4, 2, 3, 5).reshape(batch, count * block, -1, dim)[:, :tokens]


def _end_blocks(subtree_end_BT: Array, block: int) -> Int32[Array, "batch blocks size"]:
    """Padding sees itself alone, so that every query has a visible key."""
    batch, tokens = subtree_end_BT.shape
    index = jnp.arange(tokens + -tokens % block, dtype=jnp.int32)
    return jnp.where(index < tokens, _pad(subtree_end_BT, block), index + 1).reshape(batch, -1, block)


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


def _attended(q_BTMH, k_BTKH, v_BTKH, end_BT, block):
    """Outputs [batch, tokens, heads, dim] and the logarithms of the softmax's sums [batch, tokens, heads, 1]."""
    tokens, kv_heads, dim = k_BTKH.shape[1:]
    block = min(block, -(-tokens // 8) * 8)

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
            return (out / total[..., None]).astype(q_KXH.dtype), (top + jnp.log(total))[..., None]

        return lax.map(query_block, (jnp.arange(len(q_NKXH)), q_NKXH))

    keys, values = _key_blocks(k_BTKH, block), _key_blocks(v_BTKH, block)
    found = lax.map(row, (_query_blocks(q_BTMH, kv_heads, block), keys, values, _end_blocks(end_BT, block)))
    return tuple(_tokens_of_queries(x, tokens, block) for x in found)


def _gradients(q_BTMH, k_BTKH, v_BTKH, end_BT, out_BTMH, log_total_BTM1, grad_BTMH, block):
    """Gradients of queries, keys and values."""
    tokens, kv_heads, dim = k_BTKH.shape[1:]
    block = min(block, -(-tokens // 8) * 8)
    scale = dim**-0.5
    # sum over h of out * d out: the softmax's own term (Dao et al. 2022, appendix B).
    delta_BTM1 = (out_BTMH.astype(jnp.float32) * grad_BTMH.astype(jnp.float32)).sum(axis=-1, keepdims=True)

    def row(args):
        q_NKXH, k_NKSH, v_NKSH, end_NS, log_total_NKX1, delta_NKX1, grad_NKXH = args
        counts, order = _visible_blocks(end_NS)

        def query_block(carry, args):
            b, q_KXH, log_total_KX1, delta_KX1, grad_KXH = args

            def key_block(j, carry):
                dq, dk, dv = carry
                c = order[b, j]
                logits = _logits(q_KXH, k_NKSH[c], end_NS[c], b, c).reshape(*q_KXH.shape[:2], -1)
                weights = jnp.where(logits > MASKED / 2, jnp.exp(logits - log_total_KX1), 0.0)
                dweights = jnp.einsum("kxh,ksh->kxs", grad_KXH, v_NKSH[c], preferred_element_type=jnp.float32)
                dlogits = (weights * (dweights - delta_KX1) * scale).astype(q_KXH.dtype)
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
        (dk, dv), dq = lax.scan(query_block, zeros, (blocks, q_NKXH, log_total_NKX1, delta_NKX1, grad_NKXH))
        return dq.astype(q_NKXH.dtype), dk.astype(k_NKSH.dtype), dv.astype(v_NKSH.dtype)

    keys, values = _key_blocks(k_BTKH, block), _key_blocks(v_BTKH, block)
    query_side = q_BTMH, log_total_BTM1, delta_BTM1, grad_BTMH
    q, log_total, delta, grad = (_query_blocks(x, kv_heads, block) for x in query_side)
    dq, dk, dv = lax.map(row, (q, keys, values, _end_blocks(end_BT, block), log_total, delta, grad))
    return _tokens_of_queries(dq, tokens, block), _tokens_of_keys(dk, tokens), _tokens_of_keys(dv, tokens)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, end, block):
    return _forward(q, k, v, end, block)[0]


def _forward(q, k, v, end, block):
    out, log_total = checkpoint_name(_compiled(_attended, block, q, k, v, end), ATTENTION)
    return out, (q, k, v, end, out, log_total)


def _backward(block, saved, grad_out):
    end = saved[3]
    return *_compiled(_gradients, block, *saved, grad_out), np.zeros(end.shape, jax.dtypes.float0)


_attend.defvjp(_forward, _backward)
