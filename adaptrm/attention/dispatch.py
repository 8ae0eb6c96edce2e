"""The lowering that a program takes: by the device it is traced for, or by ``ADAPTRM_ATTENTION``.

Each lowering is a module here with ``tree_attention(q, k, v, subtree_end)``. Those of ``KERNELS`` also have
``unsupported(q, k)``: why they cannot take some arrays on the device traced for, in words, or None.
"""

import os
from functools import cache
from importlib import import_module

import jax
from jaxtyping import Array, Float, Int32

from adaptrm.errors import InputError
from adaptrm.progress import say

FORCE = "ADAPTRM_ATTENTION"  # read where a program is traced
# The platform of a device, as jax names it -> the lowering written for it.
KERNELS: dict[str, str] = {"gpu": "gpu", "tpu": "tpu"}
ANYWHERE = "xla"
LOWERINGS = (ANYWHERE, "reference", *KERNELS.values())


def tree_attention(
    q: Float[Array, "batch tokens heads dim"],
    k: Float[Array, "batch tokens kv_heads dim"],
    v: Float[Array, "batch tokens kv_heads dim"],
    subtree_end: Int32[Array, "batch tokens"],
) -> Float[Array, "batch tokens heads dim"]:
    """Attention along the paths of packed prefix trees; accumulates in float32, result in q's dtype.

    A platform without a kernel of its own, or whose kernel does not take these arrays, gets plain XLA.

    Raises:
        InputError: ``ADAPTRM_ATTENTION`` names no lowering, or one that does not take these arrays.
    """
    return import_module(f"adaptrm.attention.{_lowering(q, k)}").tree_attention(q, k, v, subtree_end)


def _lowering(q: jax.Array, k: jax.Array) -> str:
    forced = os.environ.get(FORCE)
    if forced and forced not in LOWERINGS:
        raise InputError(f"{FORCE} is {forced!r}; it must be one of: {', '.join(LOWERINGS)}")
    name = forced or KERNELS.get(platform(), ANYWHERE)
    if name not in KERNELS.values():
        return name
    if (reason := import_module(f"adaptrm.attention.{name}").unsupported(q, k)) is None:
        return name
    if forced:
        raise InputError(f"{FORCE}={name}: {reason}; unset it to take {ANYWHERE!r} instead")
    _say_once(f"attention by {ANYWHERE!r}, not by the kernel {name!r}: {reason}")
    return ANYWHERE


def platform() -> str:
    """Of the devices that the program is traced for: those of the current mesh, else jax's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


_say_once = cache(say)
