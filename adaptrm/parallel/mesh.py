"""The device mesh: data (across slices), fsdp (within a slice), tensor (within a layer)."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "tensor")


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, devices: list | None = None) -> Mesh:
    """A mesh over all devices; one size may be -1 and takes what the others leave.

    Raises:
        ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = [data, fsdp, tensor]
    if any(size < 1 and size != -1 for size in shape):
        raise ValueError(f"mesh {dict(zip(AXES, shape, strict=True))}: a size must be at least 1, or -1 for the rest")
    if shape.count(-1) > 1:
        raise ValueError(f"mesh {dict(zip(AXES, shape, strict=True))}: at most one axis may be -1")
    if -1 in shape:
        shape[shape.index(-1)] = max(len(devices) // -int(np.prod(shape)), 1)
    if np.prod(shape) != len(devices):
        sizes = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
        raise ValueError(f"mesh {sizes} needs {np.prod(shape)} devices, there are {len(devices)}")
    auto = (AxisType.Auto,) * len(AXES)
    return Mesh(np.asarray(devices).reshape(shape), AXES, axis_types=auto)


def local_mesh() -> Mesh:
    """All devices of this process on the fsdp axis: rows are spread, and so are parameters."""
    return make_mesh(devices=jax.local_devices())
