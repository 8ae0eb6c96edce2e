"""One step: remat, accumulation and optimizers change memory and work, never what is meant."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from numerics import assert_equal_to
from refusals import refused
from tiny import random_state, tiny_config
from trees import fan, pack

from adaptrm.config import LossOptions, OptimizerOptions
from adaptrm.hf.load import logical_axes
from adaptrm.models import SequenceClassifier
from adaptrm.models.decoder import Remat
from adaptrm.parallel import make_mesh, sharding
from adaptrm.train.optimizer import learning_rate, make_optimizer
from adaptrm.train.state import init_state
from adaptrm.train.step import loss_sums, make_step

CONFIG = tiny_config(hidden_size=16, intermediate_size=32, head_dim=4)
REMATS = Remat.__args__
SGD = OptimizerOptions(name="sgd", learning_rate=1.0, clip_norm=0.5, warmup_steps=0)
OPTIMIZERS = [OptimizerOptions(name=name, weight_decay=0.1) for name in ("adamw", "adafactor", "sgd")]


@pytest.fixture(scope="module")
def batch() -> dict[str, np.ndarray]:
    """Pairs in 8 rows, with weights that differ from part to part."""
    packed = pack([fan(9, 2, 5 + seed % 7, seed=seed) for seed in range(20)], 8, 64, 8)
    rng = np.random.default_rng(0)
    held = (packed.owner[..., 0] >= 0)[:, ::2]
    assert held.any(axis=1).all() and not held.all()
    better = rng.choice([0.0, 1.0], held.shape)
    return {
        **{name: getattr(packed, name) for name in ("tokens", "positions", "subtree_end", "leaves")},
        "targets": np.stack([better, 1 - better], axis=-1).reshape(8, 8).astype(np.float32),
        "margins": np.zeros((8, 8), np.float32),
        "groups": np.zeros((8, 8), np.float32),
        "weights": np.repeat(held * rng.uniform(0.2, 1.0, held.shape), 2, axis=1).astype(np.float32),
    }


def mesh_of(*shape: int):
    return make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])


def run(mesh, options: OptimizerOptions, *batches):
    """State and metrics after a step for each batch."""
    definition, params = random_state(SequenceClassifier, CONFIG)
    axes = logical_axes(definition, params)
    for path, param in nnx.to_flat_state(params):
        param.set_value(jax.device_put(param[...], sharding(mesh, param.shape, axes[path])))
    state = init_state(params, make_optimizer(options), mesh)
    step = make_step("reward", definition, options, 10, None, "float32", "none", LossOptions())
    told = []
    with jax.set_mesh(mesh):
        for arrays in batches:
            rows = {k: jax.device_put(x, sharding(mesh, x.shape, ("rows", "tokens"))) for k, x in arrays.items()}
            state, metrics = step(state, rows)
            told.append(jax.device_get(metrics))
    return state, told


def values(state):
    return {".".join(map(str, path)): np.asarray(param[...]) for path, param in nnx.to_flat_state(state.params)}


@pytest.mark.parametrize("shape", [pytest.param((1, 1, 1), marks=pytest.mark.slow), (1, 2, 2)])
def test_remat_keeps_less_and_changes_no_gradient(batch, shape):
    definition, params = random_state(SequenceClassifier, CONFIG)

    def loss(params, remat):
        return loss_sums("reward", definition, params, batch, None, "float32", remat, LossOptions())["loss"]

    kept, gradients = {}, {}
    with jax.set_mesh(mesh_of(*shape)):
        for remat in REMATS:
            residuals = jax.eval_shape(lambda params, remat=remat: jax.vjp(lambda p: loss(p, remat), params)[1], params)
            kept[remat] = sum(leaf.size for leaf in jax.tree.leaves(residuals))
            if shape == (1, 1, 1):
                gradients[remat] = jax.jit(jax.grad(loss), static_argnums=1)(params, remat)
    assert kept["layer"] < kept["attention"] < kept["dots"] < kept["none"]
    for gradient in gradients.values():
        assert_equal_to(gradient, gradients["none"], 1e-6)


@pytest.mark.parametrize(("parts", "shape"), [pytest.param(4, (1, 1, 1), marks=pytest.mark.slow), (2, (1, 2, 2))])
def test_accumulated_parts_equal_the_whole(batch, parts, shape):
    whole, (told,) = run(mesh_of(1, 1, 1), SGD, batch)
    got, (metrics,) = run(mesh_of(*shape), replace(SGD, accumulate_steps=parts), batch)
    assert_equal_to(values(got), values(whole), 1e-6)
    assert_equal_to(metrics, told, 1e-6, may_vanish=True)
    if shape != (1, 1, 1):
        assert all(x.sharding.mesh.size == 4 for x in jax.tree.leaves(got.params))
        split = [x for x in jax.tree.leaves(got.params) if not x.sharding.is_fully_replicated]
        assert len(split) > len(jax.tree.leaves(got.params)) - 3


@pytest.mark.parametrize("options", OPTIMIZERS, ids=lambda options: options.name)
def test_an_optimizer_does_the_same_on_a_mesh(options):
    optimizer, mesh = make_optimizer(options), mesh_of(1, 2, 2)
    rng = np.random.default_rng(0)
    host = {"weight": rng.standard_normal((2, 256, 128)), "norm": rng.standard_normal((2, 128))}
    axes = {"weight": ("layers", "mlp", "embed"), "norm": ("layers", "embed")}
    gradients = [{name: rng.standard_normal(x.shape) for name, x in host.items()} for _ in range(2)]

    def on(arrays, place):
        return nnx.State({name: nnx.Param(place(name, x)) for name, x in arrays.items()})

    def steps(place):
        params = on(host, place)
        state = init_state(params, optimizer, mesh).opt_state
        for gradient in gradients:
            updates, state = jax.jit(optimizer.update)(on(gradient, place), state, params)
        return updates

    one = steps(lambda _, x: jax.device_put(x.astype(np.float32), NamedSharding(mesh, PartitionSpec())))
    many = steps(lambda name, x: jax.device_put(x.astype(np.float32), sharding(mesh, x.shape, axes[name])))
    assert_equal_to(many, one, 1e-5)


def test_moments_lie_as_their_parameters_and_factors_are_small():
    mesh = mesh_of(1, 2, 2)
    place = sharding(mesh, (2, 256, 128), ("layers", "mlp", "embed"))
    weight = jax.device_put(jnp.ones((2, 256, 128)), place)
    params = nnx.State({"weight": nnx.Param(weight)})
    for options in (OptimizerOptions(), OptimizerOptions(mu_dtype="bfloat16")):
        moments = [x for x in jax.tree.leaves(init_state(params, make_optimizer(options), mesh).opt_state) if x.ndim]
        assert [x.shape for x in moments] == [weight.shape] * 2
        assert [x.sharding for x in moments] == [place] * 2
        assert sorted(str(x.dtype) for x in moments) == sorted([options.mu_dtype, "float32"])
    factored = init_state(params, make_optimizer(OptimizerOptions(name="adafactor")), mesh).opt_state
    assert sorted(x.shape for x in jax.tree.leaves(factored)) == [(), (1,), (2, 128), (2, 256)]
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)
    for options in (OptimizerOptions(), OptimizerOptions(name="adafactor"), SGD):
        real, shaped = (init_state(p, make_optimizer(options), mesh) for p in (params, shapes))
        alike = lambda a, b: (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding)  # noqa: E731
        assert all(jax.tree.leaves(jax.tree.map(alike, real, shaped)))


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_optimizers_are_those_of_optax(name):
    options = OptimizerOptions(name=name, learning_rate=0.01, clip_norm=1e9, weight_decay=0.0, warmup_steps=2)
    schedule = learning_rate(options, 5)
    theirs = {
        "adamw": optax.adamw(schedule, weight_decay=0.0),
        "adafactor": optax.adafactor(schedule, multiply_by_parameter_scale=False),
    }[name]
    ours = make_optimizer(options)
    rng = np.random.default_rng(0)
    params = {"weight": jnp.asarray(rng.standard_normal((3, 130, 140)), jnp.float32), "norm": jnp.ones(7)}
    states = theirs.init(params), ours.init(params)
    for number in range(4):
        gradient = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), p.dtype), params)
        want, states = theirs.update(gradient, states[0], params), (None, states[1])
        got, state = ours.update(gradient, states[1], params)
        want, states = want[0], (want[1], state)
        assert_equal_to(jax.tree.map(lambda u: schedule(number) * u, got), want, 1e-7, may_vanish=True)  # noqa: B023


def test_a_step_that_is_not_finite_leaves_the_rate_where_the_metrics_say(batch):
    """With SGD a step's length tells its rate."""
    broken = batch | {"weights": np.full_like(batch["weights"], np.nan)}
    _, before = random_state(SequenceClassifier, CONFIG)
    state, told = run(mesh_of(1, 1, 1), SGD, broken, broken, batch)
    assert [bool(metrics["finite"]) for metrics in told] == [False, False, True]
    assert told[-1]["learning_rate"] == pytest.approx(0.8) == float(learning_rate(SGD, 10)(2))
    assert told[-1]["grad_norm"] > 0.5
    moved = optax.global_norm(jax.tree.map(lambda a, b: a - b, state.params, before))
    assert float(moved) == pytest.approx(0.8 * 0.5, rel=1e-4)


def test_an_option_that_an_optimizer_has_no_use_for_is_an_error():
    found = refused(make_optimizer, OptimizerOptions(name="adafactor", mu_dtype="bfloat16"))
    assert found == "optimizer.mu_dtype is bfloat16; adafactor has no first moment, only adamw"
