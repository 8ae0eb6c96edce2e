"""The training state: step, parameters, optimizer state; born sharded over the mesh."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from adaptrm.hf.load import abstract_model, logical_axes, random_model
from adaptrm.models.config import ModelConfig
from adaptrm.models.layers import ADAPTERS
from adaptrm.parallel import constrain, sharding


class TrainState(NamedTuple):
    """A pytree; ``step`` is also the data position, ``skipped`` counts the steps up to it that were not finite.

    ``params`` are those that are trained, ``frozen`` the others: no checkpoint holds them.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    skipped: jax.Array
    frozen: Any = nnx.State({})

    @property
    def whole(self) -> nnx.State:
        """All parameters of the model."""
        return nnx.merge_state(self.params, self.frozen)


def param_shardings(definition: nnx.GraphDef, abstract: nnx.State, mesh: Mesh) -> nnx.State:
    """A sharding for every parameter, by the table of logical axes."""
    axes = logical_axes(definition, abstract)
    shardings = {path: sharding(mesh, param.shape, axes[path]) for path, param in nnx.to_flat_state(abstract)}
    flat = [(path, param.replace(shardings[path])) for path, param in nnx.to_flat_state(abstract)]
    return nnx.from_flat_state(flat)


def init_params(
    model_type, config: ModelConfig, seed: int, mesh: Mesh, num_labels: int = 1
) -> tuple[nnx.GraphDef, nnx.State]:
    """Random parameters, made on the devices that hold them."""
    definition, abstract = abstract_model(model_type, config, num_labels)

    def make():
        return nnx.state(random_model(model_type, config, seed, num_labels))

    return definition, jax.jit(make, out_shardings=param_shardings(definition, abstract, mesh))()


def init_state(params: nnx.State, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state at step 0; of shapes with shardings, a state of those.

    An optimizer's moment lies as its parameter does; what is not of its shape (Adafactor's factors) is small, and
    copied to every device. Parameters that are not trained have none.
    """
    params, frozen = trained_and_frozen(params)
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
        return TrainState(count, params, jax.tree.map(shaped, shapes, shardings), count, frozen)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings)(params)
    step, skipped = jax.jit(lambda: (jnp.zeros((), jnp.int32),) * 2, out_shardings=replicated)()
    return TrainState(step, params, opt_state, skipped, frozen)


def pinned(axes: Mapping[tuple, tuple[str, ...]], params: nnx.State) -> nnx.State:
    """Parameters, or what is of their shapes, pinned to the current mesh by their logical axes."""
    return nnx.from_flat_state(
        [(path, param.replace(constrain(param[...], *axes[path]))) for path, param in nnx.to_flat_state(params)]
    )


def trained_and_frozen(params: nnx.State) -> tuple[nnx.State, nnx.State]:
    """What is trained of a model, and what is not: with adapters those and a reward's head, else everything."""
    flat = nnx.to_flat_state(params)
    if not any(path[-1] in ADAPTERS for path, _ in flat):
        return params, nnx.State({})
    trained = {path for path, _ in flat if path[-1] in ADAPTERS or path[0] == "score"}
    pick = lambda wanted: nnx.from_flat_state([(p, v) for p, v in flat if (p in trained) == wanted])  # noqa: E731
    return pick(True), pick(False)
