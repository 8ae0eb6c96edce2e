"""The training state: step, parameters, optimizer state; born sharded over the mesh."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from adaptrm.hf.load import abstract_model, logical_axes
from adaptrm.models.config import ModelConfig
from adaptrm.parallel import sharding


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
    """The state at step 0; the optimizer's moments lie as their parameters do. Of shapes, a state of shapes."""
    replicated = NamedSharding(mesh, PartitionSpec())
    placed = jax.tree.map(lambda p: p.sharding, params)
    abstract = jax.eval_shape(optimizer.init, params)
    shardings = optax.tree_map_params(
        optimizer, lambda _, s: s, abstract, placed, transform_non_params=lambda _: replicated
    )
    step, skipped = jax.jit(lambda: (jnp.zeros((), jnp.int32),) * 2, out_shardings=replicated)()
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params)):  # those of a checkpoint come
        opt_state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
    else:
        opt_state = jax.jit(optimizer.init, out_shardings=shardings)(params)
    return TrainState(step, params, opt_state, skipped)
