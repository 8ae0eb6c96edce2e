"""The device mesh: data (across slices), fsdp (within a slice), tensor (within a layer)."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "tensor")


def make_mesh(data: int | None = None, fsdp: int = -1, tensor: int = 1, devices: Sequence | None = None) -> Mesh:
    """A mesh over all devices; one size may be -1 and takes what the others leave.

    Devices are ordered so that only ``data`` crosses slices, whose devices share a fast network.

    Args:
        data: None for one per slice.

    Raises:
        ValueError: the sizes do not multiply to the number of devices, or another axis would cross slices.
    """
    devices = jax.devices() if devices is None else devices
    slices = count_slices(devices)
    shape = [slices if data is None else data, fsdp, tensor]
    if any(size < 1 and size != -1 for size in shape):
        raise ValueError(f"mesh {dict(zip(AXES, shape, strict=True))}: a size must be at least 1, or -1 for the rest")
    if shape.count(-1) > 1:
        raise ValueError(f"mesh {dict(zip(AXES, shape, strict=True))}: at most one axis may be -1")
    if -1 in shape:
        shape[shape.index(-1)] = max(len(devices) // -int(np.prod(shape)), 1)
    sizes = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
    if np.prod(shape) != len(devices):
        raise ValueError(f"mesh {sizes} needs {np.prod(shape)} devices, there are {len(devices)}")
    if shape[0] % slices:
        raise ValueError(f"mesh {sizes}: data must be a multiple of the {slices} slices, or null for one per slice")
    auto = (AxisType.Auto,) * len(AXES)
    return Mesh(_arrange(devices, shape, slices), AXES, axis_types=auto)


def local_mesh(tensor: int = 1) -> Mesh:
    """All devices of this process, but for those that split a layer on the fsdp axis: it spreads rows and parameters.

    On a CPU on the data axis: to gather parameters there takes longer than to compute with them.

    Raises:
        ValueError: as ``make_mesh``.
    """
    devices = jax.local_devices()
    spread = {"data": -1, "fsdp": 1} if devices[0].platform == "cpu" else {}
    return make_mesh(**spread, tensor=tensor, devices=devices)


def count_slices(devices: Sequence) -> int:
    """Slices that the devices are of; GPUs are one, though jax may number their nodes as slices."""
    if devices[0].platform != "tpu":
        return 1
    return len({getattr(device, "slice_index", 0) for device in devices})


def _arrange(devices: Sequence, shape: Sequence[int], slices: int) -> np.ndarray:
    """The devices as an array; on TPUs neighbours of an axis are neighbours on the torus of their slice."""
    if devices[0].platform != "tpu":
        return np.asarray(devices).reshape(shape)
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    within = (shape[0] // slices, *shape[1:])
    return mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), devices, allow_split_physical_axes=True)
