"""Tree attention equals attention over separate sequences, and skips what cannot be seen."""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numerics import assert_equal_to
from trees import deep, fan, flatten, nodes, pack

from adaptrm.attention import leaves, reference, tpu, xla
from adaptrm.prefix_tree import Node, PackedRows, PrefixTree

HEADS, DIM = 4, 8
ROWS, TOKENS, LEAVES = 2, 200, 32  # no multiple of a block: the last one is filled up
SEQUENCES, LENGTH = 64, 64
LOWERINGS = {
    "reference": reference.tree_attention,
    "xla": xla.tree_attention,
    "tpu": partial(tpu.tree_attention, interpret=True),
}


def random_arrays(packed: PackedRows, kv_heads: int, seed: int = 0, dtype=np.float32):
    """Queries, keys, values and the weights of a loss over the outputs; logits are far from uniform."""
    rng = np.random.default_rng(seed)
    rows, tokens = packed.tokens.shape
    shapes = ((HEADS, 1.5), (kv_heads, 1.5), (kv_heads, 1.0), (HEADS, 1.0))
    return [jnp.asarray(rng.standard_normal((rows, tokens, n, DIM)) * scale, dtype) for n, scale in shapes]


@lru_cache
def tree_side(lowering: str, block: int | None = None):
    """Jitted (outputs, gradients) of a lowering on packed rows; outputs of padding are set to 0."""
    attention = LOWERINGS[lowering] if block is None else partial(LOWERINGS[lowering], block=block)

    def loss(qkv, weights, subtree_end, real):
        out = jnp.where(real[..., None, None], attention(*qkv, subtree_end), 0)
        return jnp.sum((out * weights).astype(jnp.float32)), out

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@jax.jit
def flat_side(qkv, weights, row, index, first):
    """Outputs of separate sequences put back where the tree has them, and gradients of the same loss."""
    take = lambda x: x[row[:, None], index]  # noqa: E731

    def loss(qkv):
        q, k, v = map(take, qkv)
        out = reference.tree_attention(q, k, v, jnp.full(index.shape, index.shape[1]))
        out = jnp.where(first[..., None, None], out, 0)
        return jnp.sum(out * take(weights)), jnp.zeros_like(weights).at[row[:, None], index].add(out)

    return jax.value_and_grad(loss, has_aux=True)(qkv)


def check(
    packed: PackedRows, kv_heads: int, block: int, flat_shape=(SEQUENCES, LENGTH), may_vanish=False, lowering="xla"
) -> None:
    *qkv, weights = random_arrays(packed, kv_heads)
    flat = flatten(packed, *flat_shape)
    real = np.zeros(packed.tokens.shape, bool)
    np.logical_or.at(real, (flat.row[:, None], flat.index), flat.first)
    (_, out), grads = tree_side(lowering, block)(qkv, weights, packed.subtree_end, real)
    (_, dense_out), dense_grads = tree_side("reference")(qkv, weights, packed.subtree_end, real)
    (_, flat_out), flat_grads = flat_side(qkv, weights, flat.row, flat.index, flat.first)
    assert_equal_to((out, grads), (dense_out, dense_grads), 1e-5, may_vanish)
    assert_equal_to((out, grads), (flat_out, flat_grads), 1e-5, may_vanish)


FIXED = [deep(seed=1), deep(seed=2), fan(20, 8, 5), fan(33, 1, 1), deep(seed=3), fan(1, 3, 30), fan(40, 3, 9)]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("block", [16, 64, 128])
def test_equals_separate_sequences(kv_heads, block):
    packed = pack(FIXED, ROWS, TOKENS, LEAVES)
    assert (packed.owner[:, 0, 0] >= 0).all() and len(np.unique(packed.owner[..., 0])) > 5
    check(packed, kv_heads, block)


@pytest.mark.parametrize(("kv_heads", "block", "heads_a_step"), [(4, 64, 4), (2, 16, 1), (1, 128, 1)])
def test_the_tpu_kernel_equals_separate_sequences(kv_heads, block, heads_a_step, monkeypatch):
    monkeypatch.setattr(tpu, "QUERIES", heads_a_step * (HEADS // kv_heads) * block * 128 * 4)  # lanes, float32
    check(pack(FIXED, ROWS, TOKENS, LEAVES), kv_heads, block, lowering="tpu")


@pytest.mark.parametrize("branches", [1, 2, 10, 100])
def test_equals_separate_sequences_for_any_number_of_branches(branches):
    # One shape of row and of flat sequences, so that one program serves all.
    tree = fan(110, branches, 500 // branches if branches > 1 else 120)
    packed = pack([tree], 1, 640, 100)
    check(packed, 2, 128, flat_shape=(100, 360))


@settings(max_examples=25)
@given(st.lists(nodes(), min_size=1, max_size=8))
@example([Node([1])])
def test_equals_separate_sequences_for_any_trees(roots):
    packed = pack([PrefixTree.build(root) for root in roots], ROWS, TOKENS, LEAVES)
    # A single token has no gradient for its query and key.
    check(packed, 2, 16, may_vanish=True)
    check(packed, 2, 64, may_vanish=True)


@pytest.mark.parametrize("tokens", [1, 7, 8, 65])
def test_any_number_of_tokens(tokens):
    packed = pack([fan(1, 1, 1)] if tokens > 1 else [PrefixTree.build(Node([5]))], 1, tokens, 1)
    *qkv, _ = random_arrays(packed, 2)
    out = xla.tree_attention(*qkv, packed.subtree_end, block=64)
    assert_equal_to(out, reference.tree_attention(*qkv, packed.subtree_end), 1e-5)


def test_what_an_accelerator_computes_at_once_is_what_a_cpu_computes_in_turn(monkeypatch):
    packed = pack(FIXED, ROWS, TOKENS, LEAVES)
    *qkv, weights = random_arrays(packed, 2)
    found = []
    for size, every in xla.PLATFORMS.values():
        monkeypatch.setattr(xla, "PLATFORMS", {"cpu": (size, every), "default": (size, every)})
        loss = lambda *qkv: jnp.sum(xla.tree_attention(*qkv, packed.subtree_end) * weights)  # noqa: E731
        found.append(jax.value_and_grad(loss, argnums=(0, 1, 2))(*qkv))
    assert_equal_to(*found, 1e-5)


@pytest.mark.parametrize("at_once", [1, 10, 64])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_at_the_leaves_alone_it_is_what_it_is_there_among_all(at_once, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(leaves, "QUERIES_AT_ONCE", at_once)
    packed = pack(FIXED, ROWS, TOKENS, LEAVES)
    q, k, v, _ = random_arrays(packed, 2, dtype=dtype)
    here = (np.arange(ROWS)[:, None], packed.leaves)
    found = leaves.leaf_attention(q[here], k, v, packed.subtree_end, packed.leaves)
    assert found.dtype == dtype
    float32 = [x.astype(np.float32) for x in (q, k, v)]
    expected = reference.tree_attention(*float32, packed.subtree_end)[here]
    assert_equal_to(found.astype(np.float32), expected, tolerance)


def test_padding_attends_to_itself_alone():
    packed = pack([fan(3, 2, 2)], ROWS, TOKENS, LEAVES)
    *qkv, _ = random_arrays(packed, HEADS)
    out = xla.tree_attention(*qkv, packed.subtree_end, block=16)
    assert_equal_to(out[0, 7:], qkv[2][0, 7:], 1e-6)
    assert_equal_to(out[1], qkv[2][1], 1e-6)


def float64_outputs(qkv, subtree_end) -> np.ndarray:
    q, k, v = (np.asarray(x, np.float64) for x in qkv)
    k, v = (np.repeat(x, HEADS // x.shape[2], axis=2) for x in (k, v))
    i, j = np.arange(q.shape[1])[:, None], np.arange(q.shape[1])[None, :]
    seen = (j <= i) & (i < subtree_end[:, None, :])
    logits = np.einsum("binh,bjnh->bnij", q, k) * DIM**-0.5
    weights = np.where(seen[:, None], np.exp(logits - logits.max(-1, keepdims=True)), 0)
    return np.einsum("bnij,bjnh->binh", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize(("lowering", "block"), [("xla", 16), ("xla", 64), ("tpu", 16)])
def test_bfloat16_is_no_further_from_float64_than_separate_sequences_are(lowering, block):
    packed = pack(FIXED, ROWS, TOKENS, LEAVES)
    *qkv, _ = random_arrays(packed, 2, dtype=jnp.bfloat16)
    flat = flatten(packed, SEQUENCES, LENGTH)
    attention = jax.jit(partial(LOWERINGS[lowering], block=block))
    exact = flat.take(float64_outputs(qkv, packed.subtree_end))
    tree = flat.take(np.asarray(attention(*qkv, packed.subtree_end), np.float64))
    causal = np.full(flat.index.shape, LENGTH, np.int32)
    # The reference adds up in float32, so this is the error of rounding inputs and outputs.
    alone = np.asarray(reference.tree_attention(*map(flat.take, qkv), causal), np.float64)
    tree_off, flat_off = (np.abs(out - exact)[flat.first] for out in (tree, alone))
    assert flat_off.max() > 0 and tree_off.max() <= 1.5 * flat_off.max()
    assert np.sqrt((tree_off**2).mean()) <= 1.5 * np.sqrt((flat_off**2).mean())


def shapes_of(jaxpr) -> set[tuple[int, ...]]:
    """Shapes of everything a program computes, loops and inner functions included."""
    found: set[tuple[int, ...]] = set()
    for equation in jaxpr.eqns:
        found |= {tuple(out.aval.shape) for out in equation.outvars if hasattr(out.aval, "shape")}
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found |= shapes_of(inner)
    return found


@pytest.mark.parametrize("lowering", ["xla", "tpu"])
@pytest.mark.parametrize("what", ["forward", "gradient"])
def test_no_array_over_all_pairs_of_tokens(what, lowering):
    tokens = 1024
    packed = pack([fan(500, 50, 10)], 1, tokens, 50)
    *qkv, _ = random_arrays(packed, 2)

    def quadratic(attention) -> list[tuple[int, ...]]:
        run = lambda *qkv: attention(*qkv, packed.subtree_end)  # noqa: E731
        if what == "gradient":
            run = jax.grad(lambda *qkv: attention(*qkv, packed.subtree_end).sum(), argnums=(0, 1, 2))
        shapes = shapes_of(jax.make_jaxpr(run)(*qkv).jaxpr)
        assert len(shapes) > 10
        return [shape for shape in shapes if sum(size >= tokens for size in shape) > 1]

    assert quadratic(reference.tree_attention)  # the search does find such arrays
    assert not quadratic(partial(LOWERINGS[lowering], block=128))


def test_key_blocks_that_no_query_sees_are_skipped():
    tree, block = fan(512, 100, 24), 128
    count = -(-len(tree) // block)
    end = np.arange(1, count * block + 1, dtype=np.int32)
    end[: len(tree)] = tree.subtree_end
    counts, order = map(np.asarray, xla._visible_blocks(jnp.asarray(end.reshape(count, block))))
    index = np.arange(len(end))
    sees = (index[None, :] <= index[:, None]) & (index[:, None] < end[None, :])
    expected = sees.reshape(count, block, count, block).any(axis=(1, 3))
    for query_block in range(count):
        assert order[query_block, : counts[query_block]].tolist() == np.flatnonzero(expected[query_block]).tolist()
    # Far from all pairs of blocks: the prompt, the diagonal, and a neighbour where a branch crosses into the next.
    assert counts.sum() < 0.5 * count * (count + 1) / 2


@pytest.mark.parametrize("tokens", [352, 330, 321])  # whole blocks, or some of what stands after the last token
def test_key_blocks_taken_without_a_mask_are_seen_whole_by_all_queries_of_the_group(tokens):
    block, group = 16, 4
    whole_tree = pack([fan(tokens - 8 * 20 - 30, 8, 20), fan(20, 1, 10)], 1, tokens, LEAVES)
    end = xla.end_blocks(jnp.asarray(whole_tree.subtree_end), block * group).reshape(-1, block)
    whole, part = xla._whole_and_part(end, group, tokens)
    sets = [[set(row[:n].tolist()) for n, row in zip(*map(np.asarray, some), strict=True)] for some in (whole, part)]
    index, ends = np.arange(end.size), np.asarray(end).reshape(-1)
    sees = (index[None, :] <= index[:, None]) & (index[:, None] < ends[None, :])
    for b in range(-(-tokens // block)):
        own = sees.reshape(-1, block, len(end), block)[b, : max(0, tokens - b * block)]
        assert sets[0][b // group] | sets[1][b] == set(np.flatnonzero(own.any(axis=(0, 2))).tolist())
        assert not sets[0][b // group] & sets[1][b]
        assert all(own[:, c].all() for c in sets[0][b // group])
    assert sum(map(len, sets[0])) > 0


@pytest.mark.parametrize("lowering", ["xla", "tpu"])
def test_what_is_skipped_is_never_read(lowering):
    # Two trees whose runs fill whole blocks; the middle branch of the first and all of the second are nan.
    packed = pack([fan(16, 3, 16), fan(32, 2, 16)], ROWS, TOKENS, LEAVES)
    *qkv, weights = random_arrays(packed, 2)
    kept = np.zeros(packed.tokens.shape, bool)
    kept[0, :32] = kept[0, 48:64] = True
    soiled = np.where(kept[..., None, None], 0, np.nan).astype(np.float32)
    run = tree_side(lowering, 16)
    (_, out), grads = run(qkv, weights, packed.subtree_end, kept)
    (_, soiled_out), soiled_grads = run([x + soiled for x in qkv], weights, packed.subtree_end, kept)
    assert np.isfinite(out).all() and np.array_equal(out, soiled_out)
    # The shared beginning is seen by the middle branch, so its gradient may be nan; those of the other branches not.
    branches = kept.copy()
    branches[0, :16] = False
    for clean, dirty in zip(grads, soiled_grads, strict=True):
        assert np.abs(clean[branches]).max() > 1e-3 and np.array_equal(clean[branches], dirty[branches])
