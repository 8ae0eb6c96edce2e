"""Placement on the mesh, and numbers that do not depend on it."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from numerics import assert_equal_to
from tiny import random_state, tiny_config
from trees import deep, fan, pack

from adaptrm.hf.load import abstract_model, logical_axes
from adaptrm.models import CausalLM, ModelConfig, RopeScaling, SequenceClassifier
from adaptrm.models.layers import at_leaves
from adaptrm.parallel import constrain, make_mesh, partition_spec, sharding
from adaptrm.parallel.mesh import AXES
from adaptrm.train.state import param_shardings


def abstract(data: int, fsdp: int, tensor: int) -> AbstractMesh:
    return AbstractMesh((data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * 3)


def test_partition_spec_follows_the_table():
    mesh = abstract(2, 4, 2)
    assert partition_spec(mesh, (16, 128), ("rows", "tokens")) == PartitionSpec(("data", "fsdp"), None)
    spec = partition_spec(mesh, (3, 8, 64, 32), ("layers", "heads", "head_dim", "embed"))
    assert spec == PartitionSpec(None, ("tensor",), None, ("fsdp",))


def test_a_dimension_that_does_not_divide_is_replicated():
    spec = partition_spec(abstract(1, 4, 2), (2, 3, 8, 30), ("layers", "kv_heads", "head_dim", "embed"))
    assert spec == PartitionSpec(None, None, None, None)
    # Rows are split over the product of two axes: 4 rows divide each of them, and not both.
    assert partition_spec(abstract(2, 4, 1), (4, 8), ("rows", "tokens")) == PartitionSpec(None, None)


def test_wrong_logical_axes_are_errors():
    mesh = abstract(1, 4, 2)
    with pytest.raises(ValueError, match=r"unknown logical axis 'haeds'; known: .*heads"):
        partition_spec(mesh, (8, 8), ("haeds", "embed"))
    with pytest.raises(ValueError, match=r"use mesh axis \['tensor'\] twice"):
        partition_spec(mesh, (8, 8), ("heads", "mlp"))
    # A collision is an error where the sizes would not divide, too: it must not show up on another mesh only.
    with pytest.raises(ValueError, match=r"use mesh axis \['fsdp'\] twice"):
        partition_spec(mesh, (3, 5), ("rows", "embed"))
    with pytest.raises(ValueError, match="has 2 dimensions"):
        partition_spec(mesh, (8, 8), ("embed",))


def test_mesh_sizes():
    assert dict(make_mesh().shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    assert dict(make_mesh(2, -1, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(make_mesh(1, 1, -1).shape) == {"data": 1, "fsdp": 1, "tensor": 8}
    with pytest.raises(ValueError, match="needs 6 devices, there are 8"):
        make_mesh(3, 2, 1)
    with pytest.raises(ValueError, match="needs 6 devices, there are 8"):
        make_mesh(3, -1, 2)
    with pytest.raises(ValueError, match="at most one axis may be -1"):
        make_mesh(-1, -1)


@dataclass(frozen=True)
class Chip:
    """What a mesh looks at of a device."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v4"
    core_on_chip: int = 0


def chips(slices: int, platform: str = "tpu") -> list[Chip]:
    """Slices of 2 x 2 x 2 chips, told in an order that mixes them."""
    places = list(np.ndindex(2, 2, 2))
    return [Chip(8 * s + i, s, place, platform) for i, place in enumerate(places) for s in range(slices)]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, (2, 8, 1)),
        ({"tensor": 2}, (2, 4, 2)),
        ({"tensor": 4}, (2, 2, 4)),
        ({"data": 4}, (4, 4, 1)),
        ({"data": -1, "fsdp": 1, "tensor": 2}, (8, 1, 2)),
    ],
)
def test_only_data_crosses_slices(sizes, expected):
    devices = chips(2)
    mesh = make_mesh(**sizes, devices=devices)
    assert mesh.devices.shape == expected
    assert set(mesh.devices.flat) == set(devices)
    for i, copy in enumerate(mesh.devices):
        assert {chip.slice_index for chip in copy.flat} == {i * 2 // expected[0]}
    assert make_mesh(devices=chips(1)).devices.shape == (1, 8, 1)


def test_an_axis_other_than_data_that_would_cross_slices_is_an_error():
    with pytest.raises(
        ValueError, match="data=1 x fsdp=16 x tensor=1: data must be a multiple of the 2 slices, or nul"
    ):
        make_mesh(1, devices=chips(2))
    with pytest.raises(ValueError, match="multiple of the 3 slices"):
        make_mesh(2, devices=chips(3))


def test_gpu_nodes_are_no_slices():
    """jax numbers the nodes of GPUs as slices; parameters may be spread over nodes."""
    devices = chips(2, "gpu")
    mesh = make_mesh(devices=devices)
    assert mesh.devices.shape == (1, 16, 1) and list(mesh.devices.flat) == devices


def test_a_parameter_without_logical_axes_is_an_error():
    definition, state = abstract_model(CausalLM, tiny_config())
    model = nnx.merge(definition, state)
    model.extra = nnx.Param(jax.ShapeDtypeStruct((8, 8), jnp.float32))
    with pytest.raises(ValueError, match=r"parameters without logical axes: .*extra"):
        logical_axes(*nnx.split(model))


LLAMA31_8B = ModelConfig(
    model_type="llama",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=131072,
    rope_theta=500000.0,
    rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
)


def test_the_shardings_of_llama31_8b_are_those_written_down(tmp_path):
    """A change of the table shows as a change of tests/llama31_8b_shardings.txt, for review."""
    lines = ["# Llama-3.1-8B: shape, logical axes, and the mesh axes that split each dimension (- where none does)"]
    # As it is, and with the pad token of a reward model: no tensor axis divides that vocabulary.
    for model_type, vocab in ((CausalLM, 128256), (SequenceClassifier, 128257)):
        definition, state = abstract_model(model_type, replace(LLAMA31_8B, vocab_size=vocab))
        axes = logical_axes(definition, state)
        shapes = {path: param.shape for path, param in nnx.to_flat_state(state)}
        for shape in ((1, 8, 1), (1, 4, 2), (2, 8, 2), (1, 1, 16)):
            mesh = abstract(*shape)
            named = " ".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
            lines.append(f"\n{model_type.__name__} on {named}")
            for path, place in nnx.to_flat_state(param_shardings(definition, state, mesh)):
                split = " ".join("-" if entry is None else str(entry) for entry in place.get_value().spec)
                sizes = " ".join(map(str, shapes[path]))
                lines.append(f"{'.'.join(map(str, path))} [{sizes}] {' '.join(axes[path])}: {split}")
    written, found = Path(__file__).with_name("llama31_8b_shardings.txt"), tmp_path / "llama31_8b_shardings.txt"
    found.write_text("\n".join(lines) + "\n")
    assert found.read_text() == written.read_text(), f"if this change is meant, copy {found} there"


def test_constrain_needs_a_mesh_to_act():
    x = np.zeros((8, 4, 2), np.float32)
    pinned = jax.jit(lambda x: constrain(x, "rows", "tokens", "hidden"))
    assert pinned(x).sharding.is_fully_replicated
    mesh = make_mesh(2, 4, 1)
    with jax.set_mesh(mesh):
        assert pinned(x).sharding.is_equivalent_to(sharding(mesh, x.shape, ("rows", "tokens", "hidden")), 3)


@partial(jax.jit, static_argnums=0)
def loss_and_gradients(definition, state, tokens, positions, subtree_end, leaves):
    def loss(state):
        model = nnx.merge(definition, state)
        hidden = at_leaves(model.model(tokens, positions, subtree_end), leaves)
        logits = jnp.einsum("bmd,vd->bmv", hidden, model.unembedding)
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) * jnp.sin(1 + leaves)) * 10, hidden

    (value, hidden), grads = jax.value_and_grad(loss, has_aux=True)(state)
    alone = nnx.merge(definition, state).model.at_leaves(tokens, positions, subtree_end, leaves)
    return {"loss": value, "hidden": hidden, "hidden at the leaves alone": alone, "gradients": grads}


CONFIGS = {
    # SmolLM2's 9 heads over 3: no axis of 2 or more divides the heads, so they are replicated.
    "9 heads over 3": tiny_config(
        hidden_size=72, num_attention_heads=9, num_key_value_heads=3, attention_bias=True, mlp_bias=True
    ),
    # A vocabulary with one row for a pad token, as reward models have: no axis divides it.
    "8 heads over 4": tiny_config(
        model_type="qwen3",
        vocab_size=449,
        num_attention_heads=8,
        num_key_value_heads=4,
        attention_bias=True,
        tie_word_embeddings=True,
    ),
}
TREES = [deep(seed=s) for s in range(9)] + [fan(20, 8, 4, seed=s) for s in range(5)]


@pytest.fixture(scope="module")
def on_one_device():
    found = {}
    for name, config in CONFIGS.items():
        definition, state = random_state(CausalLM, config)
        packed = pack(TREES, 8, 128, 24)
        rows = (packed.tokens, packed.positions, packed.subtree_end, packed.leaves)
        found[name] = definition, state, rows, loss_and_gradients(definition, state, *rows)
    return found


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("9 heads over 3", (1, 8, 1)),
        ("9 heads over 3", (2, 2, 2)),
        ("8 heads over 4", (8, 1, 1)),
        ("8 heads over 4", (2, 2, 2)),
        ("8 heads over 4", (1, 2, 4)),
        ("8 heads over 4", (1, 1, 8)),
    ],
)
def test_eight_devices_equal_one(on_one_device, name, shape):
    definition, state, rows, expected = on_one_device[name]
    mesh = make_mesh(*shape)
    axes = logical_axes(definition, state)
    placed = jax.tree.map(lambda leaf: leaf, state)
    for path, variable in nnx.to_flat_state(placed):
        variable.set_value(jax.device_put(variable[...], sharding(mesh, variable.shape, axes[path])))
    split = [not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(placed)]
    assert any(split) or shape == (8, 1, 1)
    with jax.set_mesh(mesh):
        given = [jax.device_put(x, sharding(mesh, x.shape, ("rows", "tokens"))) for x in rows]
        got = loss_and_gradients(definition, placed, *given)
    assert_equal_to(got, expected, 1e-5)
