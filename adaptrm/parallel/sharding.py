"""One table from logical axes to mesh axes, and how arrays are placed by it."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

# What each dimension of a parameter or an activation is, and the mesh axes that split it.
MESH_AXES: dict[str, tuple[str, ...]] = {
    "rows": ("data", "fsdp"),
    "tokens": (),
    "hidden": (),
    "layers": (),
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "labels": (),
    "rank": (),
}


def partition_spec(mesh: Mesh | AbstractMesh, shape: Sequence[int], logical: Sequence[str]) -> PartitionSpec:
    """The partition of an array by the table; a dimension that does not divide its mesh axes is replicated.

    Raises:
        ValueError: ranks differ, a name is not in the table, or two dimensions claim one mesh axis.
    """
    if len(shape) != len(logical):
        raise ValueError(f"shape {tuple(shape)} has {len(shape)} dimensions, logical axes {tuple(logical)}")
    entries: list[tuple[str, ...] | None] = []
    used: set[str] = set()
    for size, name in zip(shape, logical, strict=True):
        if name not in MESH_AXES:
            raise ValueError(f"unknown logical axis {name!r}; known: {', '.join(MESH_AXES)}")
        axes = MESH_AXES[name]
        if used & set(axes):
            raise ValueError(f"logical axes {tuple(logical)} use mesh axis {sorted(used & set(axes))} twice")
        used |= set(axes)
        ways = 1
        for axis in axes:
            ways *= mesh.shape[axis]
        entries.append(axes if axes and size % ways == 0 else None)
    return PartitionSpec(*entries)


def sharding(mesh: Mesh, shape: Sequence[int], logical: Sequence[str]) -> NamedSharding:
    """As ``partition_spec``, on a mesh of real devices."""
    return NamedSharding(mesh, partition_spec(mesh, shape, logical))


def constrain(x: jax.Array, *logical: str) -> jax.Array:
    """Pin an activation to the current mesh (``jax.set_mesh``); without one there is nothing to pin."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(mesh, x.shape, logical))


def place(value: np.ndarray, target: jax.sharding.Sharding) -> jax.Array:
    """Put a host array on the mesh; every process takes its own slices of the same array."""
    return jax.make_array_from_callback(value.shape, target, lambda index: value[index])
