"""Weights in int8 with one scale an output, as they are read; qwix rounds them.

The largest weight of an output is 127.5 times its scale, so a weight is off by at most half of that scale.
"""

from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from adaptrm.errors import InputError
from adaptrm.models.layers import narrow_projections

QUANTIZE = ("int8",)


def check_quantizer(quantize: str) -> None:
    """Raise ``InputError`` where this way to quantise is not known, or its library is not installed."""
    if quantize not in QUANTIZE:
        raise InputError(f"quantize {quantize!r}: not known; give one of: {', '.join(QUANTIZE)}")
    if find_spec("qwix") is None:
        raise InputError("quantize int8: needs qwix; pip install 'adaptrm[int8]'")


def int8_shapes(definition: nnx.GraphDef, plain: nnx.State) -> tuple[nnx.GraphDef, nnx.State]:
    """Definition and shapes of a model whose projections are int8, from its own."""

    def make(plain):
        model = nnx.merge(definition, plain)
        narrow_projections(model)
        return model

    return nnx.split(nnx.eval_shape(make, plain))


@lru_cache(maxsize=256)
def quantizer(layout: NamedSharding, scales: NamedSharding) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    """A program that rounds a block: its weights in int8, and the float32 scale of each output.

    Inputs of an output may lie on several devices, so the largest weight is found over all of them.
    """
    import qwix

    outputs = len(scales.spec)

    def narrow(block):
        found = qwix.quantize(block.astype(jnp.float32), jnp.int8, channelwise_axes=range(outputs))
        return found.qvalue, found.scale.reshape(block.shape[:outputs])

    return jax.jit(narrow, out_shardings=(layout, scales))
