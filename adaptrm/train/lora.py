"""Low-rank adapters over a frozen model (Hu et al. 2021, LoRA): what is trained, and its merge into plain weights."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from adaptrm.config import LoraOptions, ModelOptions
from adaptrm.hf.load import abstract_model
from adaptrm.models.config import ModelConfig
from adaptrm.models.layers import ADAPTERS, add_adapters
from adaptrm.products import product
from adaptrm.train.state import param_shardings, trained_and_frozen


def model_shapes(
    model_type, config: ModelConfig, options: ModelOptions, num_labels: int = 1
) -> tuple[nnx.GraphDef, nnx.State]:
    """Definition and shapes of all that a training step holds, in the dtypes that it is held in."""
    definition, plain = abstract_model(model_type, config, num_labels)
    if options.lora is None:
        return definition, plain
    definition, shapes = adapted(definition, plain, options.lora)
    trained, frozen = trained_and_frozen(shapes)
    narrow = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, options.dtype), frozen)
    return definition, nnx.merge_state(trained, narrow)


def adapted(definition: nnx.GraphDef, plain: nnx.State, options: LoraOptions) -> tuple[nnx.GraphDef, nnx.State]:
    """Definition and shapes of a model with adapters, from its own."""

    def make(plain):
        model = nnx.merge(definition, plain)
        add_adapters(model, options.rank, options.alpha)
        return model

    return nnx.split(nnx.eval_shape(make, plain))


def with_adapters(
    model_type, config: ModelConfig, base: nnx.State, options: LoraOptions, seed: int, mesh: Mesh, num_labels: int = 1
) -> tuple[nnx.GraphDef, nnx.State]:
    """A model with new adapters, which change nothing yet: B is zero, A is random; both float32, as is the head."""
    definition, shapes = adapted(*abstract_model(model_type, config, num_labels), options)
    places = dict(nnx.to_flat_state(param_shardings(definition, shapes, mesh)))
    base, out = dict(nnx.to_flat_state(base)), []
    for number, (path, param) in enumerate(nnx.to_flat_state(shapes)):
        if path in base:
            value = base[path].get_value()
            value = value.astype(jnp.float32) if path[0] == "score" else value
        else:
            made = partial(_first, path[-1], param.shape, seed, number)
            value = jax.jit(made, out_shardings=places[path].get_value())()
        out.append((path, param.replace(value)))
    return definition, nnx.from_flat_state(out)


def _first(name: str, shape: tuple[int, ...], seed: int, number: int) -> jax.Array:
    if name == "lora_b":
        return jnp.zeros(shape)
    fan_in = math.prod(shape[2:])  # past layers and rank
    return jax.random.normal(jax.random.fold_in(jax.random.key(seed), number), shape) * fan_in**-0.5


def merged(definition: nnx.GraphDef, params: nnx.State) -> tuple[nnx.GraphDef, nnx.State]:
    """The plain model, in float32, that computes what the adapted one does; each parameter stays where it lies."""
    model = nnx.merge(definition, params)
    for _, module in nnx.iter_modules(model):
        if getattr(module, "lora_a", None) is not None:
            place = module.weight.get_value().sharding
            merge = jax.jit(partial(_merge, module.inputs, module.lora_scale), out_shardings=place)
            module.weight.set_value(merge(*(getattr(module, name)[...] for name in ("weight", *ADAPTERS))))
            del module.lora_a, module.lora_b, module.lora_scale
    definition, plain = nnx.split(model)
    return definition, jax.tree.map(lambda x: x.astype(jnp.float32), plain)


def _merge(inputs: int, scale: float, weight: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    out, given = "uvw"[: weight.ndim - 1 - inputs], "xyz"[:inputs]
    return weight.astype(jnp.float32) + scale * product(f"l{out}r,lr{given}->l{out}{given}", b, a)
