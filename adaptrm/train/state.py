"""The training state: step, parameters, optimizer state; born sharded over the mesh."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from adaptrm.hf.load import abstract_model, logical_axes
from adaptrm.models.config import ModelConfig
from adaptrm.parallel import constrain, sharding


class TrainState(NamedTuple):
    """A pytree; ``step`` is also the data position, ``skipped`` counts the steps up to it that were not finite."""

    step: jax.Array
    params: Any
    opt_state: Any
    skipped: jax.Array


def param_shardings(definition: nnx.GraphDef, abstract: nnx.State, mesh: Mesh) -> nnx.State:
    """A sharding for every parameter, by the table of logical axes."""
    axes = logical_axes(definition, abstract)
    shardings = {path: sharding(mesh, param.shape, axes[path]) for path, param in nnx.to_flat_state(abstract)}
    flat = [(path, param.replace(shardings[path])) for path, param in nnx.to_flat_state(abstract)]
    return nnx.from_flat_state(flat)


def init_params(model_type, config: ModelConfig, seed: int, mesh: Mesh) -> tuple[nnx.GraphDef, nnx.State]:
    """Random parameters, made on the devices that hold them."""
    definition, abstract = abstract_model(model_type, config)

    def make():
        return nnx.state(model_type(config, nnx.Rngs(seed)))

    return definition, jax.jit(make, out_shardings=param_shardings(definition, abstract, mesh))()


def init_state(params: nnx.State, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state at step 0; of shapes with shardings, a state of those.

    An optimizer's moment lies as its parameter does; what is not of its shape (Adafactor's factors) is small, and
    copied to every device.
    """
    replicated = NamedSharding(mesh, PartitionSpec())
    shapes = jax.eval_shape(optimizer.init, params)
    shardings = optax.tree_map_params(
        optimizer,
        lambda moment, param: param.sharding if moment.shape == param.shape else replicated,
        *(shapes, params),
        transform_non_params=lambda _: replicated,
    )
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params)):
        shaped = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)  # noqa: E731
        count = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
        return TrainState(count, params, jax.tree.map(shaped, shapes, shardings), count)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings)(params)
    step, skipped = jax.jit(lambda: (jnp.zeros((), jnp.int32),) * 2, out_shardings=replicated)()
    return TrainState(step, params, opt_state, skipped)


def pinned(definition: nnx.GraphDef, params: nnx.State) -> nnx.State:
    """Parameters, or what is of their shapes, pinned to the current mesh by the table of logical axes."""
    axes = logical_axes(definition, params)
    return nnx.from_flat_state(
        [(path, param.replace(constrain(param[...], *axes[path]))) for path, param in nnx.to_flat_state(params)]
    )
