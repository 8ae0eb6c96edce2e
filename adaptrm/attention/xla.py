"""Blockwise tree attention in plain XLA: runs anywhere, skips what a query block cannot see, O(tokens) memory.

Flash attention (Dao et al. 2022) over blocks of queries and keys, with the list of visible key blocks of each query
block worked out from ``subtree_end`` alone: key block c is visible to query block b when c <= b and the largest
``subtree_end`` in c lies beyond b's first query. What several query blocks see whole they take at once, without a mask.
Differentiated by hand, because a loop whose length depends on the data has no automatic reverse.

Shape suffixes: B batch, T tokens, M query heads, K kv heads, G query heads a kv head, H head dim, I items (the kv heads
of all rows), N blocks, S block size, X queries of a block by G.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int32

from adaptrm.products import product

ATTENTION = "attention"  # names what the backward pass would need a second forward pass for
MASKED = -1e30  # finite, so that a query without a visible key in a block gives 0 and not nan
# Tokens in a block, and how items are computed. A CPU computes small products as fast as large ones, so its blocks hold
# less that is masked, and one item at a time: of a batch of small products XLA gives each to all cores, which costs
# more than it saves. An accelerator wants its matrix units full, few iterations, and all items at once.
PLATFORMS = {"cpu": (64, lax.map), "default": (128, lambda function, items: jax.vmap(function)(items))}
GROUP = 4  # query blocks that take together the key blocks that all of them see whole


def tree_attention(
    q: Float[Array, "batch tokens heads dim"],
    k: Float[Array, "batch tokens kv_heads dim"],
    v: Float[Array, "batch tokens kv_heads dim"],
    subtree_end: Int32[Array, "batch tokens"],
    block: int | None = None,
) -> Float[Array, "batch tokens heads dim"]:
    """Attention along the paths of packed prefix trees; accumulates in float32, result in q's dtype.

    Args:
        block: tokens in a block; by the platform that the program is compiled for if not given.
    """
    return _attend(q, k, v, subtree_end, block)


def _compiled(function, block: int | None, *arrays):
    """The function's result, as suits the platform that the program is compiled for."""
    choices = {name: partial(function, block=block or size, every=every) for name, (size, every) in PLATFORMS.items()}
    return lax.platform_dependent(*arrays, **choices)


def pad_tokens(x_BT: Array, block: int) -> Array:
    """Rows filled up to whole blocks, with zeros after the tokens."""
    return jnp.pad(x_BT, ((0, 0), (0, -x_BT.shape[1] % block), *[(0, 0)] * (x_BT.ndim - 2)))


def _blocks(x_BTMH: Array, kv_heads: int, block: int) -> Float[Array, "items blocks group_size dim"]:
    """The query heads of a kv head stand side by side, so that one product serves them all."""
    x_BTMH = pad_tokens(x_BTMH, block)
    batch, tokens, _, dim = x_BTMH.shape
    x_BNSKGH = x_BTMH.reshape(batch, tokens // block, block, kv_heads, -1, dim)
    return x_BNSKGH.transpose(0, 3, 1, 4, 2, 5).reshape(batch * kv_heads, tokens // block, -1, dim)


def _tokens(x_INXH: Array, shape: tuple[int, ...], block: int) -> Float[Array, "batch tokens heads dim"]:
    """Blocks back where they came from; ``shape`` is of batch, tokens and kv heads."""
    batch, tokens, kv_heads = shape
    _, count, _, dim = x_INXH.shape
    x_BKNGSH = x_INXH.reshape(batch, kv_heads, count, -1, block, dim)
    return x_BKNGSH.transpose(0, 2, 4, 1, 3, 5).reshape(batch, count * block, -1, dim)[:, :tokens]


def end_blocks(subtree_end_BT: Array, block: int) -> Int32[Array, "batch blocks size"]:
    """Padding sees itself alone, so that every query has a visible key."""
    batch, tokens = subtree_end_BT.shape
    index = jnp.arange(tokens + -tokens % block, dtype=jnp.int32)
    return jnp.where(index < tokens, pad_tokens(subtree_end_BT, block), index + 1).reshape(batch, -1, block)


def _visible(subtree_end_BT: Array, kv_heads: int, block: int) -> tuple[Array, Array, Array]:
    """Of each item the ends of each block's subtrees, and what ``_visible_blocks`` says."""
    end_BNS = end_blocks(subtree_end_BT, block)
    return tuple(jnp.repeat(x, kv_heads, axis=0) for x in (end_BNS, *jax.vmap(_visible_blocks)(end_BNS)))


def _visible_blocks(end_NS: Int32[Array, "blocks size"]) -> tuple[Array, Array]:
    """For each query block: how many key blocks it sees, and their indices in front, ascending."""
    return _listed(_sees(end_NS))


def _sees(end_NS: Int32[Array, "blocks size"]) -> Bool[Array, "blocks blocks"]:
    """Whether a query block (row) sees something of a key block (column)."""
    count, size = end_NS.shape
    block = jnp.arange(count)
    return (block[None, :] <= block[:, None]) & (end_NS.max(axis=1)[None, :] > block[:, None] * size)


def _listed(chosen: Bool[Array, "rows blocks"]) -> tuple[Array, Array]:
    """Of each row: how many blocks are chosen, and their indices in front, ascending."""
    return chosen.sum(axis=1), jnp.argsort(~chosen, axis=1, stable=True)


def _whole_and_part(end_NS: Int32[Array, "blocks size"], group: int, tokens: int) -> tuple[tuple, tuple]:
    """Of each group of query blocks the key blocks that all its tokens see whole; of each block what else it sees.

    Most of what a tree's branches see is their common beginning, which takes no mask, and of which a larger product
    makes less work. What stands after the last of the ``tokens`` may see anything.
    """
    count, size = end_NS.shape
    first = jnp.arange(0, count, group)[:, None] * size
    last = jnp.minimum(first + group * size, tokens) - 1
    whole = ((jnp.arange(count) + 1) * size <= first) & (end_NS.min(axis=1) > last)
    return _listed(whole), _listed(_sees(end_NS) & ~jnp.repeat(whole, group, axis=0))


def _products(q_XH, k_SH):
    """Scaled logits [X, S] of queries against keys, in float32."""
    return product("xh,sh->xs", q_XH, k_SH, jnp.float32) * k_SH.shape[-1] ** -0.5


def _logits(q_XH, k_SH, end_S, query_block, key_block):
    """``_products`` of a query block and a key block, masked."""
    size = len(k_SH)
    logits = _products(q_XH, k_SH)
    query = query_block * size + jnp.arange(size)[:, None]
    key = key_block * size + jnp.arange(size)[None, :]
    sees = (key <= query) & (query < end_S[None, :])
    return jnp.where(sees, logits.reshape(-1, size, size), MASKED).reshape(logits.shape)


def _attended(q_BTMH, k_BTKH, v_BTKH, end_BT, block, every):
    """Outputs [batch, tokens, heads, dim] and the logarithms of the softmax's sums [batch, tokens, heads, 1]."""
    tokens, kv_heads, dim = k_BTKH.shape[1:]
    block = min(block, -(-tokens // 8) * 8)
    group = min(GROUP, -(-tokens // block))

    def item(args):
        q_NXH, k_NSH, v_NSH, end_NS, whole, part = args
        _, size, _ = q_NXH.shape

        def add(carry, logits, v_SH):
            top, total, out = carry
            new_top = jnp.maximum(top, logits.max(axis=-1))
            # Of a query that has seen no key yet all weights are 1; its own key comes last, and shrinks them to 0.
            weights = jnp.exp(logits - new_top[:, None])
            shrink = jnp.exp(top - new_top)
            attended = product("xs,sh->xh", weights.astype(v_SH.dtype), v_SH, jnp.float32)
            return new_top, total * shrink + weights.sum(axis=-1), out * shrink[:, None] + attended

        def query_group(args):
            g, q_CXH, (whole_count, whole_order), part = args
            q_XH = q_CXH.reshape(group * size, dim)

            def whole_block(j, carry):
                c = whole_order[j]
                return add(carry, _products(q_XH, k_NSH[c]), v_NSH[c])

            start = jnp.full(len(q_XH), MASKED), jnp.zeros(len(q_XH)), jnp.zeros((len(q_XH), dim))
            carry = lax.fori_loop(0, whole_count, whole_block, start)

            def query_block(args):
                b, q_XH, (count, order), carry = args

                def key_block(j, carry):
                    c = order[j]
                    return add(carry, _logits(q_XH, k_NSH[c], end_NS[c], b, c), v_NSH[c])

                top, total, out = lax.fori_loop(0, count, key_block, carry)
                return (out / total[:, None]).astype(q_XH.dtype), (top + jnp.log(total))[:, None]

            carry = jax.tree.map(lambda x: x.reshape(group, size, *x.shape[1:]), carry)
            return lax.map(query_block, (g * group + jnp.arange(group), q_CXH, part, carry))

        groups = jax.tree.map(lambda x: x.reshape(-1, group, *x.shape[1:]), (q_NXH, part))
        found = lax.map(query_group, (jnp.arange(len(groups[0])), groups[0], whole, groups[1]))
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)

    q_BTMH, k_BTKH, v_BTKH = (pad_tokens(x, block * group) for x in (q_BTMH, k_BTKH, v_BTKH))
    end_BNS = end_blocks(end_BT, block * group).reshape(len(end_BT), -1, block)
    lists = jax.vmap(partial(_whole_and_part, group=group, tokens=tokens))(end_BNS)
    sides = (_blocks(x, kv_heads, block) for x in (q_BTMH, k_BTKH, v_BTKH))
    of_items = jax.tree.map(lambda x: jnp.repeat(x, kv_heads, axis=0), (end_BNS, *lists))
    found = every(item, (*sides, *of_items))
    return tuple(_tokens(x, k_BTKH.shape[:3], block)[:, :tokens] for x in found)


def _gradients(q_BTMH, k_BTKH, v_BTKH, end_BT, out_BTMH, log_total_BTM1, grad_BTMH, block, every):
    """Gradients of queries, keys and values."""
    tokens, kv_heads, dim = k_BTKH.shape[1:]
    block = min(block, -(-tokens // 8) * 8)
    scale = dim**-0.5
    # sum over h of out * d out: the softmax's own term (Dao et al. 2022, appendix B).
    delta_BTM1 = (out_BTMH.astype(jnp.float32) * grad_BTMH.astype(jnp.float32)).sum(axis=-1, keepdims=True)

    def item(args):
        q_NXH, k_NSH, v_NSH, log_total_NX1, delta_NX1, grad_NXH, end_NS, counts, order = args

        def query_block(carry, args):
            b, q_XH, log_total_X1, delta_X1, grad_XH = args

            def key_block(j, carry):
                dq, dk, dv = carry
                c = order[b, j]
                logits = _logits(q_XH, k_NSH[c], end_NS[c], b, c)
                weights = jnp.exp(logits - log_total_X1)
                dweights = product("xh,sh->xs", grad_XH, v_NSH[c], jnp.float32)
                dlogits = (weights * (dweights - delta_X1) * scale).astype(q_XH.dtype)
                weights = weights.astype(q_XH.dtype)
                dq = dq + product("xs,sh->xh", dlogits, k_NSH[c], jnp.float32)
                dk = dk.at[c].add(product("xs,xh->sh", dlogits, q_XH, jnp.float32))
                dv = dv.at[c].add(product("xs,xh->sh", weights, grad_XH, jnp.float32))
                return dq, dk, dv

            dq, dk, dv = lax.fori_loop(0, counts[b], key_block, (jnp.zeros(q_XH.shape, jnp.float32), *carry))
            return (dk, dv), dq

        zeros = (jnp.zeros(k_NSH.shape, jnp.float32), jnp.zeros(v_NSH.shape, jnp.float32))
        blocks = jnp.arange(len(q_NXH))
        (dk, dv), dq = lax.scan(query_block, zeros, (blocks, q_NXH, log_total_NX1, delta_NX1, grad_NXH))
        return dq.astype(q_NXH.dtype), dk.astype(k_NSH.dtype), dv.astype(v_NSH.dtype)

    given = q_BTMH, k_BTKH, v_BTKH, log_total_BTM1, delta_BTM1, grad_BTMH
    sides = (_blocks(x, kv_heads, block) for x in given)
    found = every(item, (*sides, *_visible(end_BT, kv_heads, block)))
    return tuple(_tokens(x, k_BTKH.shape[:3], block) for x in found)


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
