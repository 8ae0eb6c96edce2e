"""The Hopper kernels: blocks, loops, copies, barriers and masks in Pallas' interpreter; the rest by compilers alone.

The interpreter knows no matrix instructions with an operand in registers, so that products are plain ones there; for
the same reason it takes float32, which shows every wrong index.
"""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P
from jax.sharding import Mesh, NamedSharding
from numerics import assert_equal_to
from trees import deep, fan, flatten, pack

from adaptrm.attention import gpu, reference, xla
from adaptrm.plan import devices_of

TOKENS, DIM = 384, 64
FIXED = [fan(100, 3, 30), deep(seed=1), fan(20, 8, 5), deep(seed=2)]  # and some padding
SEQUENCES, LENGTH = 24, 160
# The case of one block of keys runs on any jax: half a minute on 0.10.
since_0_11 = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="jax 0.10 compiles a kernel anew for each block")


def interpreter():
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # public since jax 0.12

    return InterpretGPUParams()


def random_arrays(heads: int, kv_heads: int, dtype=np.float32, tokens: int = TOKENS):
    """Queries, keys, values and the weights of a loss over the outputs; logits are far from uniform."""
    rng = np.random.default_rng(0)
    shapes = ((heads, 1.2), (kv_heads, 1.2), (kv_heads, 1.0), (heads, 1.0))
    return [jnp.asarray(rng.standard_normal((1, tokens, n, DIM)) * scale, dtype) for n, scale in shapes]


@lru_cache
def side(lowering: str):
    """Jitted (outputs, gradients) on packed rows; outputs of padding are set to 0."""
    lowerings = {"gpu": lambda *arrays: gpu.tree_attention(*arrays, interpret=interpreter()), "xla": xla.tree_attention}
    attention = lowerings.get(lowering, reference.tree_attention)

    def loss(qkv, weights, subtree_end, real):
        out = jnp.where(real[..., None, None], attention(*qkv, subtree_end), 0)
        return jnp.sum(out.astype(jnp.float32) * weights), out

    run = jax.value_and_grad(loss, has_aux=True)
    # In one program the interpreter's threads would wait for those of the program.
    return run if lowering == "gpu" else jax.jit(run)


def real_tokens(flat, packed) -> np.ndarray:
    real = np.zeros(packed.tokens.shape, bool)
    np.logical_or.at(real, (flat.row[:, None], flat.index), flat.first)
    return real


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tokens"),
    [
        pytest.param(2, 1, TOKENS, marks=since_0_11, id="two-heads-a-block"),
        pytest.param(2, 1, 128, marks=pytest.mark.slow, id="one-block-of-keys"),
        pytest.param(4, 2, TOKENS, marks=[since_0_11, pytest.mark.slow], id="two-kv-heads"),
        pytest.param(3, 1, 370, marks=[since_0_11, pytest.mark.slow], id="one-head-a-block-and-no-whole-blocks"),
    ],
)
def test_equals_the_reference(heads, kv_heads, tokens):
    packed = pack(FIXED, 1, tokens, 32)
    assert len(np.unique(packed.owner[..., 0])) >= 3  # trees, and none
    *qkv, weights = random_arrays(heads, kv_heads, tokens=tokens)
    real = real_tokens(flatten(packed, SEQUENCES, LENGTH), packed)
    assert 0 < (~real).sum() < 100
    (_, out), grads = side("gpu")(qkv, weights, packed.subtree_end, real)
    (_, dense_out), dense_grads = side("reference")(qkv, weights, packed.subtree_end, real)
    assert_equal_to((out, grads), (dense_out, dense_grads), 1e-5)


@since_0_11
@pytest.mark.slow
def test_bfloat16_is_no_further_from_exact_than_separate_sequences_and_the_xla_lowering_are():
    packed = pack(FIXED, 1, TOKENS, 32)
    *qkv, weights = random_arrays(2, 1, jnp.bfloat16)
    flat = flatten(packed, SEQUENCES, LENGTH)
    args = weights, packed.subtree_end, real_tokens(flat, packed)
    (_, exact), exact_grads = side("reference")([x.astype(jnp.float32) for x in qkv], *args)
    (_, out), grads = side("gpu")(qkv, *args)
    _, xla_grads = side("xla")(qkv, *args)
    alone = reference.tree_attention(*map(flat.take, qkv), np.full(flat.index.shape, LENGTH, np.int32))
    pairs = [(flat.take(out)[flat.first], alone[flat.first], flat.take(exact)[flat.first])]
    for tree, other, true in [*pairs, *zip(grads, xla_grads, exact_grads, strict=True)]:
        off, allowed = (np.abs(np.asarray(x, np.float64) - np.asarray(true, np.float64)) for x in (tree, other))
        assert allowed.max() > 0 and off.max() <= 1.5 * allowed.max()
        assert np.sqrt((off**2).mean()) <= 1.5 * np.sqrt((allowed**2).mean())


@since_0_11
@pytest.mark.slow
def test_what_is_skipped_is_never_read():
    # Blocks of keys: a beginning, and two branches that do not see each other. The first is nan.
    packed = pack([fan(128, 2, 128)], 1, TOKENS, 2)
    *qkv, weights = random_arrays(2, 1)
    kept = (np.arange(TOKENS) // 128 != 1)[None]
    soiled = np.where(kept[..., None, None], 0, np.nan).astype(np.float32)
    (_, out), grads = side("gpu")(qkv, weights, packed.subtree_end, kept)
    (_, soiled_out), soiled_grads = side("gpu")([x + soiled for x in qkv], weights, packed.subtree_end, kept)
    assert np.isfinite(out).all() and np.array_equal(out, soiled_out)
    for clean, dirty in zip(grads, soiled_grads, strict=True):
        assert np.abs(clean[:, 256:]).max() > 1e-3 and np.array_equal(clean[:, 256:], dirty[:, 256:])


@pytest.mark.parametrize("transposed", [False, True], ids=["keys-of-queries", "queries-of-keys"])
def test_lists_of_blocks(transposed):
    packed = pack([fan(300, 20, 25), deep(seed=1), fan(128, 2, 64), fan(30, 3, 40)], 2, 1024, 64)
    seen = np.asarray(reference.visible(jnp.asarray(packed.subtree_end)))
    seen = seen.reshape(2, 1024 // gpu.QUERIES, gpu.QUERIES, 1024 // gpu.KEYS, gpu.KEYS)
    some, each = seen.any(axis=(2, 4)), seen.all(axis=(2, 4))
    found = gpu._sees(jnp.asarray(packed.subtree_end))
    if transposed:
        some, each, *found = (x.swapaxes(1, 2) for x in (some, each, *found))
    order, counts = map(np.asarray, gpu._lists(*found))
    assert each.any() and 0 < (some & ~each).sum() < some.size / 2
    for at in np.ndindex(some.shape[:2]):
        whole, count = counts[at]
        assert order[at][:whole].tolist() == np.flatnonzero(each[at]).tolist()
        masked = order[at][whole:count].tolist()
        assert masked == sorted(masked) and set(np.flatnonzero(some[at] & ~each[at])) <= set(masked)
        assert count < some.shape[2] or some[at].all()
    # A block may be on a list though no query sees a key of it: its keys end within the block of queries.
    assert counts[..., 1].sum() <= 1.2 * some.sum()


def gradients(q, k, v, subtree_end):
    run = lambda *qkv: gpu.tree_attention(*qkv, subtree_end).astype(jnp.float32).sum()  # noqa: E731
    return jax.value_and_grad(run, argnums=(0, 1, 2))(q, k, v)


def shapes(rows, heads, kv_heads, dim, sharding=None, tokens=4096, dtype=jnp.bfloat16):
    """Queries, keys, values and ends."""
    arrays = [((rows, tokens, n, dim), dtype) for n in (heads, kv_heads, kv_heads)] + [((rows, tokens), jnp.int32)]
    return [jax.ShapeDtypeStruct(*array, sharding=sharding) for array in arrays]


def test_lowers_for_cuda_and_names_what_the_backward_pass_needs():
    args = shapes(1, 4, 2, 128, tokens=200)
    traced = jax.jit(gradients).trace(*args)
    assert str(traced.jaxpr).count(f"name[name={xla.ATTENTION}]") == 2
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 3


def test_takes_the_arrays_of_large_models_on_hopper_alone():
    (q, k, *_), (narrow, *_), (exact, *_) = shapes(1, 4, 2, 128), shapes(1, 4, 2, 32), shapes(1, 4, 2, 64, dtype="f4")
    assert gpu.unsupported(q, k).endswith("this is cpu")
    mesh = lambda kind: jax.sharding.AbstractMesh(  # noqa: E731
        (1,), ("data",), abstract_device=jax.sharding.AbstractDevice(device_kind=kind, platform="gpu", num_cores=None)
    )
    with jax.sharding.use_abstract_mesh(mesh("NVIDIA A100-SXM4-80GB")):
        assert gpu.unsupported(q, k).endswith("this is NVIDIA A100-SXM4-80GB")
    with jax.sharding.use_abstract_mesh(mesh("NVIDIA H100 80GB HBM3")):
        assert gpu.unsupported(q, k) is None
        assert gpu.unsupported(narrow, narrow).endswith("64 or 128, and these have 32")
        assert gpu.unsupported(exact, exact).endswith("float32 queries and float32 keys")


@pytest.mark.slow
@pytest.mark.aot_gpu
@pytest.mark.parametrize("heads", [32, 64], ids=["8b", "70b"])
@pytest.mark.parametrize("target", ["h100:1", "h100:8"])
def test_compiles_for_h100(target, heads):
    pytest.importorskip("jax_cuda13_plugin", reason="pip install 'adaptrm[cuda]'")
    devices = devices_of(target)[1]
    mesh = Mesh(np.array(devices), ("data",))
    spec = P("data")
    run = jax.shard_map(gradients, mesh=mesh, in_specs=(spec,) * 4, out_specs=(P(), (spec,) * 3), check_vma=False)
    args = shapes(len(devices), heads, 8, 128, NamedSharding(mesh, spec))
    compiled = jax.jit(run).lower(*args).compile({"xla_gpu_autotune_level": 0})
    # Twice the queries in float32: what query heads add to the gradients of keys and values.
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 4096 * heads * 128 * 4
