"""Selection over a mesh equals selection on one device, bit for bit, for every mesh shape and strategy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from adaptrm.parallel import make_mesh
from adaptrm.plan import devices_of
from adaptrm.selection import STRATEGIES, EvidenceWeights, select, select_sharded
from adaptrm.selection.top_rules import TILE

PAIRS, K = 37, 5
SHAPES = [(1, 8, 1), (8, 1, 1), (1, 1, 8), (2, 2, 2), (1, 2, 4), (4, 1, 2)]


def some_scores(rules: int, seed: int = 0, pairs: int = PAIRS) -> list[np.ndarray]:
    """a, b, relevance; half of the pairs hold few values, so that rules of different shards tie."""
    rng = np.random.default_rng(seed)
    arrays = [rng.uniform(low, 1, (pairs, rules)).astype(np.float32) for low in (-1, -1, 0)]
    for x in arrays:
        x[::2] = np.round(2 * x[::2]) / 2
    return arrays


def some_weights(rules: int) -> EvidenceWeights:
    rng = np.random.default_rng(2)
    loading = rng.standard_normal((rules, 3)) / 4
    sigma = np.diag(rng.uniform(0.2, 2, rules)) + loading @ loading.T
    return EvidenceWeights(rng.uniform(-0.1, 0.6, rules).astype(np.float32), sigma.astype(np.float32))


def sharded(mesh, arrays, strategy: str, k: int, weight: float, fixed, first_row: int = 0, evidence=None):
    """Within a jitted program that is given placed scores, as the judge's is."""

    @jax.jit
    def program(a, b, relevance):
        rest = (jnp.float32(weight), fixed, jnp.uint32(3), first_row + jnp.arange(len(arrays[0])), evidence)
        return select_sharded(a, b, relevance, *rest, strategy=strategy, k=k)

    rows, rules = arrays[0].shape
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    by_pair, by_rule = rows % ways == 0, rules % mesh.shape["tensor"] == 0
    spec = PartitionSpec(("data", "fsdp") if by_pair else None, "tensor" if by_rule else None)
    with jax.set_mesh(mesh):
        chosen, margin = program(*(jax.device_put(x, NamedSharding(mesh, spec)) for x in arrays))
    return np.asarray(chosen), np.asarray(margin)


@pytest.mark.parametrize(("shape", "rules"), [*((shape, 13) for shape in SHAPES), ((2, 2, 2), 16)], ids=str)
def test_every_mesh_equals_one_device(shape, rules):
    arrays, mesh = some_scores(rules), make_mesh(*shape)
    for weight in (0.5, -0.5):  # below 0 every score of a rule may be less than that of a rule that is none
        expected = select(*arrays, k=K, discrepancy_weight=weight)
        chosen, margin = sharded(mesh, arrays, "max-discrepancy", K, weight, None)
        assert np.array_equal(chosen, expected.rules)
        assert np.array_equal(margin, expected.margin)


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 1, 8)], ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_equals_one_device(shape, strategy):
    rules, arrays = 11, some_scores(11, seed=1)
    fixed = [7, 0, 10, 3] if strategy == "fixed" else None
    weights = some_weights(rules) if strategy == "evidence" else None
    expected = select(*arrays, strategy, K, 0.5, fixed, weights, seed=3, first_row=1000)
    k = {"fixed": 4, "all": rules}.get(strategy, K)
    evidence = None if weights is None else weights.arrays()
    placed = None if fixed is None else jnp.asarray(fixed, jnp.int32)
    chosen, margin = sharded(make_mesh(*shape), arrays, strategy, k, 0.5, placed, 1000, evidence)
    assert np.array_equal(chosen, expected.rules)
    if weights is None:
        assert np.array_equal(margin, expected.margin)
    else:  # a solution of equations, by another compiled program
        np.testing.assert_allclose(margin, expected.margin, rtol=1e-5, atol=1e-5)


def test_more_shards_than_rules():
    arrays = some_scores(3)
    expected = select(*arrays, k=2)
    chosen, margin = sharded(make_mesh(1, 1, 8), arrays, "max-discrepancy", 2, 0.5, None)
    assert np.array_equal(chosen, expected.rules)
    assert np.array_equal(margin, expected.margin)


def test_tiles_within_shards():
    arrays = some_scores(70, pairs=2 * TILE + 3)  # shards of 18 rules, the last with two that are none
    expected = select(*arrays, k=K)
    chosen, margin = sharded(make_mesh(1, 2, 4), arrays, "max-discrepancy", K, 0.5, None)
    assert np.array_equal(chosen, expected.rules)
    assert np.array_equal(margin, expected.margin)


def test_only_candidates_travel():
    """The rule axis gathers k candidates a shard and no scores: nothing of [pairs, rules] is there in one place."""
    mesh, rules = make_mesh(1, 2, 4), 128
    placed = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "tensor"))
    scores = jax.ShapeDtypeStruct((64, rules), jnp.float32, sharding=placed)
    rows = jax.ShapeDtypeStruct((64,), jnp.int32)
    rest = (jnp.float32(0.5), None, jnp.uint32(0), rows)
    program = jax.jit(partial(select_sharded, strategy="max-discrepancy", k=K))
    with jax.set_mesh(mesh):
        text = program.lower(scores, scores, scores, *rest).compile().as_text()
    assert "all-gather" in text
    assert f"[32,{4 * K}]" in text  # candidates
    assert f",{rules}]" not in text


def compiles_for(target: str) -> None:
    _, devices = devices_of(target)
    mesh = make_mesh(1, len(devices) // 2, 2, devices=devices)
    one = NamedSharding(mesh, PartitionSpec())
    scores = jax.ShapeDtypeStruct((4096, 100), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(("fsdp",))))
    weight, seed = (jax.ShapeDtypeStruct((), dtype, sharding=one) for dtype in (jnp.float32, jnp.uint32))
    row = jax.ShapeDtypeStruct((4096,), jnp.int32, sharding=one)
    for strategy in ("max-discrepancy", "random"):
        program = jax.jit(partial(select_sharded, strategy=strategy, k=K))
        with jax.set_mesh(mesh):
            compiled = program.lower(scores, scores, scores, weight, None, seed, row).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 2**24


@pytest.mark.slow
@pytest.mark.aot_tpu
def test_it_compiles_for_a_tpu_slice():
    pytest.importorskip("libtpu", reason="pip install 'adaptrm[tpu]'")
    compiles_for("v5p:2x2x2")


@pytest.mark.slow
@pytest.mark.aot_gpu
def test_it_compiles_for_gpus():
    pytest.importorskip("jax_cuda13_plugin", reason="pip install 'adaptrm[cuda]'")
    compiles_for("h100:8")
