"""Tree attention on a TPU: a flash kernel in Pallas (Mosaic) that visits only what can be seen.

Flash attention (Dao et al. 2022). The rows of a batch lie one behind the other, as trees do within a row, so that the
kernels know one long row only. Which query block sees which key block follows from ``subtree_end``; the list of these
pairs lies in scalar memory, and the grid has one step a pair: what is not visible is neither loaded nor waited for.

Logits have the keys along the sublanes and the queries along the lanes: the softmax then reduces over whole registers,
its statistics are one row, and the gradients of keys and values need no transposition.

Shape suffixes: B batch, T tokens of all rows, N blocks, S block size, M query heads, K kv heads, G query heads a kv
head, X queries of a block by G, H head dim, P pairs of blocks.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from adaptrm.attention.dispatch import platform
from adaptrm.attention.xla import ATTENTION, MASKED, end_blocks, pad_tokens
from adaptrm.products import precision_of

BLOCK = 128  # tokens in a block: the lanes of a register, and as small as branches ask for
# Bytes of the queries in one step of the grid, all its heads together: enough work to hide what a step costs, little
# enough that float32 logits and sums fit into MEMORY beside them. XLA allows a kernel 16 MiB unless it asks for more;
# every TPU since v5e has at least 64.
QUERIES = 2**19
MEMORY = 2**25
AHEAD = 2  # heads
MOST_PAIRS = 2**17  # of blocks, in a list of 512 KiB in scalar memory
END = np.int32(2**31 - 1)  # behind the last pair


def unsupported(q: Float[Array, "batch tokens heads dim"], k: Float[Array, "batch tokens kv_heads dim"]) -> str | None:
    """Why this kernel cannot take the arrays, in words; None where it can."""
    batch, tokens, heads, dim = q.shape
    blocks, group = -(-tokens // BLOCK), heads // k.shape[2]
    if platform() != "tpu":
        return f"it is for TPUs, and this program is for a {platform()}"
    if q.dtype not in (jnp.bfloat16, jnp.float32) or k.dtype != q.dtype:
        return f"it takes bfloat16 or float32, not {q.dtype} queries with {k.dtype} keys"
    if dim > 256:
        return f"heads of {dim} numbers are larger than 256"
    if group * _bytes(q, BLOCK) > 2 * QUERIES:
        return f"{group} query heads of {dim} {q.dtype} numbers to a key head do not fit into its memory"
    if batch * blocks * (blocks + 1) // 2 > MOST_PAIRS:
        return f"{batch} rows of {tokens} tokens have more pairs of blocks than its scalar memory holds"
    return None


def tree_attention(
    q: Float[Array, "batch tokens heads dim"],
    k: Float[Array, "batch tokens kv_heads dim"],
    v: Float[Array, "batch tokens kv_heads dim"],
    subtree_end: Int32[Array, "batch tokens"],
    block: int = BLOCK,
    interpret: bool = False,
) -> Float[Array, "batch tokens heads dim"]:
    """Attention along the paths of packed prefix trees; accumulates in float32, result in q's dtype.

    Args:
        block: tokens in a block, on a TPU a multiple of 128.
        interpret: compute what the kernels would, on any device.
    """
    return _attend(q, k, v, subtree_end, block, interpret)


def _visible_pairs(end_BNS: Int32[Array, "batch blocks size"]) -> tuple[Array, Array, Array]:
    """Pairs of blocks that see each other, by query block and by key block, and their number.

    A pair is ``first << 16 | second << 1 | masked``, where blocks count through all rows, and masked is 0 where every
    query sees every key. In front of the list is -1, behind its pairs ``END``.
    """
    batch, count, size = end_BNS.shape
    block = jnp.arange(count, dtype=jnp.int32)
    query, key = block[:, None], block[None, :]
    sees = (key <= query) & (end_BNS.max(axis=2)[:, None, :] > query * size)
    masked = (key == query) | (end_BNS.min(axis=2)[:, None, :] < (query + 1) * size)
    start = jnp.arange(batch, dtype=jnp.int32)[:, None, None] * count

    def listed(first, second):
        pairs = (start + first) << 16 | (start + second) << 1 | masked
        pairs = jnp.sort(jnp.where(sees, pairs, END).reshape(-1))[: batch * count * (count + 1) // 2]
        return jnp.pad(pairs, 1, constant_values=(-1, END))

    return listed(query, key), listed(key, query), sees.sum(dtype=jnp.int32)


def _first(pairs_ref, step):
    return pairs_ref[step + 1] >> 16


def _second(pairs_ref, step):
    return (pairs_ref[step + 1] >> 1) & 0x7FFF


def _at_the_first_pair(pairs_ref, compute) -> None:
    """Of the block that this step's output is for."""
    step = pl.program_id(1)
    pl.when(_first(pairs_ref, step - 1) != _first(pairs_ref, step))(compute)


def _at_the_last_pair(pairs_ref, compute) -> None:
    step = pl.program_id(1)
    pl.when(_first(pairs_ref, step + 1) != _first(pairs_ref, step))(compute)


def _with_bias(pairs_ref, end_ref, queries_first: bool, group: int, compute) -> None:
    """``compute`` with what to add to the logits [S, X] of a step: 0 where a query sees a key, ``MASKED`` elsewhere."""
    step, size = pl.program_id(1), end_ref.shape[1]
    masked = pairs_ref[step + 1] & 1
    blocks = _first(pairs_ref, step), _second(pairs_ref, step)
    query_block, key_block = blocks if queries_first else blocks[::-1]

    @pl.when(masked == 1)
    def _():
        query = query_block * size + lax.broadcasted_iota(jnp.int32, (size, size), 1)
        key = key_block * size + lax.broadcasted_iota(jnp.int32, (size, size), 0)
        end = jnp.broadcast_to(end_ref[...], (size, size)).T
        bias_SS = jnp.where((key <= query) & (query < end), 0.0, MASKED)
        compute(jnp.concatenate([bias_SS] * group, axis=1))

    @pl.when(masked == 0)
    def _():
        compute(0.0)


def _for_each_head(heads: int, begin, use) -> None:
    """``use(head, begin(head))`` for the kv heads of a step; what begins are products, which the softmax waits for.

    They begin ``AHEAD`` heads early, so that matrix and vector units work side by side: a third fewer cycles in the
    schedules of the compiler.
    """
    begun = [begin(head) for head in range(min(AHEAD, heads))]
    for head in range(heads):
        if head + AHEAD < heads:
            begun.append(begin(head + AHEAD))
        use(head, begun.pop(0))


def _product(x, y, contract: tuple[int, int]) -> Array:
    """Of two matrices, summed in float32 over the given axis of each."""
    axes = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(x, y, axes, precision=precision_of(x, y), preferred_element_type=jnp.float32)


def _logits(q_XH, k_SH, bias_SX) -> Float[Array, "size queries"]:
    return _product(k_SH, q_XH, (1, 1)) * k_SH.shape[1] ** -0.5 + bias_SX


def _attended_kernel(pairs_ref, end_ref, q_ref, k_ref, v_ref, out_ref, log_total_ref, top_ref, total_ref, sum_ref):
    heads, group, size, dim = q_ref.shape

    def begin():
        top_ref[...] = jnp.full_like(top_ref, MASKED)
        total_ref[...] = jnp.zeros_like(total_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    def add(bias_SX):
        def attend(head, logits_SX):
            # What a query without a visible key so far adds is multiplied by 0 when its first visible key comes.
            top_1X = jnp.maximum(top_ref[head], logits_SX.max(axis=0, keepdims=True))
            weights_SX = jnp.exp(logits_SX - top_1X)
            shrink_1X = jnp.exp(top_ref[head] - top_1X)
            top_ref[head] = top_1X
            total_ref[head] = total_ref[head] * shrink_1X + weights_SX.sum(axis=0, keepdims=True)
            add_HX = _product(v_ref[head], weights_SX.astype(v_ref.dtype), (0, 0))
            sum_ref[head] = sum_ref[head] * shrink_1X + add_HX

        _for_each_head(heads, lambda head: _logits(q_ref[head].reshape(-1, dim), k_ref[head], bias_SX), attend)

    def end():
        for head in range(heads):
            out_XH = (sum_ref[head] / total_ref[head]).T
            out_ref[head] = out_XH.reshape(group, size, dim).astype(out_ref.dtype)
            log_total_ref[head] = top_ref[head] + jnp.log(total_ref[head])

    _at_the_first_pair(pairs_ref, begin)
    _with_bias(pairs_ref, end_ref, True, group, add)
    _at_the_last_pair(pairs_ref, end)


def _for_each_softmax(q_ref, k_ref, v_ref, grad_ref, log_total_ref, delta_ref, bias_SX, use) -> None:
    """``use(head, q, grad, weights, dlogits)`` for the kv heads of a step.

    ``dlogits`` is the gradient of the logits before they were scaled (Dao et al., appendix B).
    """

    def begin(head):
        q_XH, grad_XH = (ref[head].reshape(-1, ref.shape[-1]) for ref in (q_ref, grad_ref))
        return q_XH, grad_XH, _logits(q_XH, k_ref[head], bias_SX), _product(v_ref[head], grad_XH, (1, 1))

    def softmax(head, begun):
        q_XH, grad_XH, logits_SX, dweights_SX = begun
        weights_SX = jnp.exp(logits_SX - log_total_ref[head])
        dlogits_SX = weights_SX * (dweights_SX - delta_ref[head])
        use(head, q_XH, grad_XH, weights_SX.astype(q_XH.dtype), dlogits_SX.astype(q_XH.dtype))

    _for_each_head(q_ref.shape[0], begin, softmax)


def _dq_kernel(pairs_ref, end_ref, q_ref, k_ref, v_ref, grad_ref, log_total_ref, delta_ref, dq_ref, sum_ref):
    heads, group, size, dim = q_ref.shape

    def begin():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    def add(bias_SX):
        def use(head, _q, _grad, _weights, dlogits_SX):
            sum_ref[head] += _product(k_ref[head], dlogits_SX, (0, 0))

        _for_each_softmax(q_ref, k_ref, v_ref, grad_ref, log_total_ref, delta_ref, bias_SX, use)

    def end():
        for head in range(heads):
            dq_XH = sum_ref[head].T * dim**-0.5
            dq_ref[head] = dq_XH.reshape(group, size, dim).astype(dq_ref.dtype)

    _at_the_first_pair(pairs_ref, begin)
    _with_bias(pairs_ref, end_ref, True, group, add)
    _at_the_last_pair(pairs_ref, end)


def _dkv_kernel(
    pairs_ref, end_ref, q_ref, k_ref, v_ref, grad_ref, log_total_ref, delta_ref, dk_ref, dv_ref, dk_sum_ref, dv_sum_ref
):
    def begin():
        dk_sum_ref[...] = jnp.zeros_like(dk_sum_ref)
        dv_sum_ref[...] = jnp.zeros_like(dv_sum_ref)

    def add(bias_SX):
        def use(head, q_XH, grad_XH, weights_SX, dlogits_SX):
            dk_sum_ref[head] += _product(dlogits_SX, q_XH, (1, 0))
            dv_sum_ref[head] += _product(weights_SX, grad_XH, (1, 0))

        _for_each_softmax(q_ref, k_ref, v_ref, grad_ref, log_total_ref, delta_ref, bias_SX, use)

    def end():
        dk_ref[...] = (dk_sum_ref[...] * q_ref.shape[-1] ** -0.5).astype(dk_ref.dtype)
        dv_ref[...] = dv_sum_ref[...].astype(dv_ref.dtype)

    _at_the_first_pair(pairs_ref, begin)
    _with_bias(pairs_ref, end_ref, False, q_ref.shape[1], add)
    _at_the_last_pair(pairs_ref, end)


def _bytes(q: Array, block: int) -> int:
    """That the queries of one head and block take in memory: registers have 128 lanes."""
    return block * max(q.shape[-1], 128) * q.dtype.itemsize


def _call(kernel, pairs_P, number, queries_first: bool, inputs, kinds: str, outputs, scratch, block, interpret):
    """A kernel over the listed pairs of blocks, for as many kv heads in a step as ``QUERIES`` allow.

    Args:
        kinds: of inputs and outputs, a letter each: Q [K, G, T, H], K [K, T, H], R (statistics) [K, N, 1, X],
            E (``subtree_end``) [1, T].
        scratch: shapes of float32 numbers a kv head.
    """
    kv_heads, group, _, dim = inputs[1].shape
    fit = QUERIES // (group * _bytes(inputs[1], block))
    heads = max(n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and n <= max(fit, 1))
    query, key = (_first, _second) if queries_first else (_second, _first)
    specs = {
        "Q": pl.BlockSpec((heads, group, block, dim), lambda h, i, pairs: (h, 0, query(pairs, i), 0)),
        "K": pl.BlockSpec((heads, block, dim), lambda h, i, pairs: (h, key(pairs, i), 0)),
        "R": pl.BlockSpec((heads, None, 1, group * block), lambda h, i, pairs: (h, query(pairs, i), 0, 0)),
        "E": pl.BlockSpec((1, block), lambda h, i, pairs: (0, key(pairs, i))),
    }
    run = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(kv_heads // heads, number),
            in_specs=[specs[kind] for kind in kinds[: len(inputs)]],
            out_specs=[specs[kind] for kind in kinds[len(inputs) :]],
            scratch_shapes=[pltpu.VMEM((heads, *shape), jnp.float32) for shape in scratch],
        ),
        out_shape=outputs,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=MEMORY),
        interpret=interpret,
        name=kernel.__name__.strip("_"),
    )
    return run(pairs_P, *inputs)


def _queries(x_BTMH: Array, kv_heads: int, block: int) -> Float[Array, "kv_heads group tokens dim"]:
    """All rows one behind the other; the query heads of a kv head stand side by side."""
    x_BTMH = pad_tokens(x_BTMH, block)
    return x_BTMH.reshape(-1, kv_heads, x_BTMH.shape[2] // kv_heads, x_BTMH.shape[3]).transpose(1, 2, 0, 3)


def _keys(x_BTKH: Array, block: int) -> Float[Array, "kv_heads tokens dim"]:
    x_BTKH = pad_tokens(x_BTKH, block)
    return x_BTKH.reshape(-1, *x_BTKH.shape[2:]).transpose(1, 0, 2)


def _rows(x_KGTH: Array, shape: tuple[int, ...]) -> Float[Array, "batch tokens heads dim"]:
    """The inverse of ``_queries``, and with a group of one of ``_keys``."""
    batch, tokens, heads, dim = shape
    return x_KGTH.transpose(2, 0, 1, 3).reshape(batch, -1, heads, dim)[:, :tokens]


def _ends_and_pairs(end_BT: Array, block: int) -> tuple[Array, tuple[Array, Array, Array]]:
    """``subtree_end`` [1, T] where all rows are one, and what ``_visible_pairs`` gives."""
    end_BNS = end_blocks(end_BT, block)
    start_B = jnp.arange(len(end_BNS), dtype=jnp.int32) * (end_BNS.shape[1] * block)
    return (end_BNS + start_B[:, None, None]).reshape(1, -1), _visible_pairs(end_BNS)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q, k, v, end, block, interpret):
    return _forward(q, k, v, end, block, interpret)[0]


def _forward(q, k, v, end, block, interpret):
    end_1T, (pairs_P, _, number) = _ends_and_pairs(end, block)
    q_KGTH = _queries(q, k.shape[2], block)
    kv_heads, group, tokens, dim = q_KGTH.shape
    statistics = (kv_heads, tokens // block, 1, group * block)
    out_KGTH, log_total_KN1X = _call(
        *(_attended_kernel, pairs_P, number, True),
        *((end_1T, q_KGTH, _keys(k, block), _keys(v, block)), "EQKKQR"),
        [jax.ShapeDtypeStruct(q_KGTH.shape, q.dtype), jax.ShapeDtypeStruct(statistics, jnp.float32)],
        *([(1, group * block), (1, group * block), (dim, group * block)], block, interpret),
    )
    out, log_total_KN1X = checkpoint_name((_rows(out_KGTH, q.shape), log_total_KN1X), ATTENTION)
    return out, (q, k, v, end, out, log_total_KN1X)


def _backward(block, interpret, saved, grad_BTMH):
    q, k, v, end, out_BTMH, log_total_KN1X = saved
    end_1T, (by_query_P, by_key_P, number) = _ends_and_pairs(end, block)
    q_KGTH, grad_KGTH = (_queries(x, k.shape[2], block) for x in (q, grad_BTMH))
    kv_heads, group, _, dim = q_KGTH.shape
    # sum over h of out * d out: the softmax's own term.
    delta_BTM1 = (out_BTMH.astype(jnp.float32) * grad_BTMH.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    delta_KGNS = _queries(delta_BTM1, k.shape[2], block).reshape(kv_heads, group, -1, block)
    delta_KN1X = delta_KGNS.swapaxes(1, 2).reshape(log_total_KN1X.shape)
    k_KTH, v_KTH = _keys(k, block), _keys(v, block)
    inputs = end_1T, q_KGTH, k_KTH, v_KTH, grad_KGTH, log_total_KN1X, delta_KN1X
    (dq_KGTH,) = _call(
        *(_dq_kernel, by_query_P, number, True, inputs, "EQKKQRRQ"),
        *([jax.ShapeDtypeStruct(q_KGTH.shape, q.dtype)], [(dim, group * block)], block, interpret),
    )
    dk_KTH, dv_KTH = _call(
        *(_dkv_kernel, by_key_P, number, False, inputs, "EQKKQRRKK"),
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k_KTH, v_KTH)],
        *([(block, dim), (block, dim)], block, interpret),
    )
    dk, dv = (_rows(x[:, None], k.shape) for x in (dk_KTH, dv_KTH))
    return _rows(dq_KGTH, q.shape), dk, dv, np.zeros(end.shape, jax.dtypes.float0)


_attend.defvjp(_forward, _backward)
