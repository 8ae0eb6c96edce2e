"""Tree attention for Hopper GPUs: Pallas Mosaic GPU kernels (gpu_kernels.py) that skip what no query sees.

Which key blocks a query block sees follows from ``subtree_end`` alone: those that begin no later than its last query,
and whose largest ``subtree_end`` lies beyond its first. The lists are worked out once a batch, here; the kernels' loops
run over them alone.

Shape suffixes: B batch, T tokens, C key blocks, S block size, M query heads, K kv heads, H head dim.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int32

from adaptrm.attention import gpu_kernels
from adaptrm.attention.gpu_kernels import KEYS, QUERIES
from adaptrm.attention.xla import ATTENTION, end_blocks, pad_tokens

HEAD_DIMS = (64, 128)  # larger ones do not fit shared memory, others not a tile of 128 bytes
HOPPER = re.compile(r"\b(H100|H200|H800|H20|GH200)\b")
# Versions of CUDA whose assembler breaks masks, by jax's attention_mgpu.py; no number tells 12.9.0 from 12.9.1.
MISCOMPILED = range(12080, 12091)


def unsupported(q: Array, k: Array) -> str | None:
    """Why the kernels cannot take these queries and keys on the device that is traced for, or None if they can."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = jax.devices()[0].device_kind if device is None else device.device_kind
    cuda = re.search(r"cuda (\d+)", jax.devices()[0].client.platform_version)
    heads, dim = q.shape[2:]
    if not HOPPER.search(kind):
        return f"its instructions are those of Hopper GPUs, and this is {kind}"
    if cuda and int(cuda[1]) in MISCOMPILED:
        return f"CUDA {int(cuda[1]) // 1000}.{int(cuda[1]) // 10 % 100} may compile it wrongly; jax[cuda13] does not"
    if q.dtype not in (jnp.bfloat16, jnp.float16) or k.dtype != q.dtype:
        return f"it takes bfloat16 or float16, and these are {q.dtype} queries and {k.dtype} keys"
    if dim not in HEAD_DIMS:
        return f"it takes heads of dimension {' or '.join(map(str, HEAD_DIMS))}, and these have {dim}"
    if heads % k.shape[2]:
        return f"{heads} query heads are no multiple of {k.shape[2]} key heads"
    return None


def tree_attention(
    q: Float[Array, "batch tokens heads dim"],
    k: Float[Array, "batch tokens kv_heads dim"],
    v: Float[Array, "batch tokens kv_heads dim"],
    subtree_end: Int32[Array, "batch tokens"],
    interpret=None,
) -> Float[Array, "batch tokens heads dim"]:
    """Attention along the paths of packed prefix trees; accumulates in float32, result in q's dtype.

    Args:
        interpret: parameters of Pallas' interpreter of Mosaic GPU, to run what it knows on a CPU: blocks, loops,
            copies, barriers and masks. The matrix instructions it does not know become plain products.
    """
    tokens = q.shape[1]
    end = end_blocks(subtree_end, KEYS).reshape(len(q), -1)
    q, k, v = (pad_tokens(x, KEYS) for x in (q, k, v))
    return _attend(q, k, v, end, interpret)[:, :tokens]


def _sees(end_BT: Int32[Array, "batch tokens"]) -> tuple[Bool[Array, "batch query_blocks key_blocks"], ...]:
    """Whether some query of a block sees some key of a block, and whether each sees each."""
    query = jnp.arange(0, end_BT.shape[1], QUERIES)[:, None]
    key = jnp.arange(0, end_BT.shape[1], KEYS)[None, :]
    end_BCS = end_BT.reshape(len(end_BT), -1, KEYS)
    some = (key < query + QUERIES) & (end_BCS.max(axis=-1)[:, None, :] > query)
    each = (key + KEYS <= query + 1) & (end_BCS.min(axis=-1)[:, None, :] >= query + QUERIES)
    return some, each


def _lists(some: Bool[Array, "batch rows columns"], each: Bool[Array, "batch rows columns"]) -> tuple[Array, Array]:
    """The columns of each row, first those that need no mask, both kinds ascending; the counts of these, and of all."""
    order = jnp.argsort(jnp.where(each, 0, jnp.where(some, 1, 2)), axis=-1, stable=True)
    counts = jnp.stack([each.sum(axis=-1), some.sum(axis=-1)], axis=-1)
    return order.astype(jnp.int32), counts.astype(jnp.int32)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, end, interpret):
    return _forward(q, k, v, end, interpret)[0]


def _forward(q, k, v, end, interpret):
    found = gpu_kernels.attended(q, k, v, end, *_lists(*_sees(end)), interpret=interpret)
    out, log_total = checkpoint_name(found, ATTENTION)
    return out, (q, k, v, end, out, log_total)


def _backward(interpret, saved, grad):
    q, k, v, end, out, log_total = saved
    some, each = _sees(end)
    # The softmax's own term (Dao et al. 2022, appendix B).
    delta_BMT = jnp.einsum("btmh,btmh->bmt", out, grad, preferred_element_type=jnp.float32)
    arrays = q, k, v, end, grad, log_total, delta_BMT
    dq = gpu_kernels.query_gradient(*arrays, *_lists(some, each), interpret=interpret)
    seen_by = _lists(some.swapaxes(1, 2), each.swapaxes(1, 2))
    found = gpu_kernels.key_gradients(*arrays, *seen_by, interpret=interpret)
    # The query heads of a kv head add up, in float32.
    dk, dv = (x.reshape(*k.shape[:3], -1, k.shape[3]).sum(axis=3).astype(k.dtype) for x in found)
    return dq, dk, dv, np.zeros(end.shape, jax.dtypes.float0)


_attend.defvjp(_forward, _backward)
