"""A parameter on the mesh, block by block, so that no process needs host memory for more than one block.

A block holds rows of one layer, the same rows of every device's shard. So all processes run one program, which
communicates nothing when a block is written and gathers no more than that block when it is read.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

BLOCK_BYTES = 64 << 20


@dataclass(frozen=True)
class Blocks:
    """How a parameter is cut.

    Attributes:
        shape: of the parameter, layer dimension included.
        layout: of the parameter on the mesh; layers are not split.
        stacked: whether the first dimension is layers.
        itemsize: bytes of an element on the host.
        most: bytes of a block, unless one row of each shard is more.
    """

    shape: tuple[int, ...]
    layout: NamedSharding
    stacked: bool
    itemsize: int
    most: int

    @cached_property
    def axis(self) -> int:
        """The dimension whose rows are counted."""
        return int(self.stacked)

    @cached_property
    def shard(self) -> tuple[int, ...]:
        return self.layout.shard_shape(self.shape)

    @cached_property
    def rows(self) -> int:
        """Of each shard, in a block."""
        held = self.shard[self.axis]
        tensor = math.prod(self.shape[self.axis :]) * self.itemsize
        return min(max(self.most * held // tensor, 1), held)

    @cached_property
    def shape_of_one(self) -> tuple[int, ...]:
        """Of a block, over all devices."""
        ways = self.shape[self.axis] // self.shard[self.axis]
        return (1,) * self.axis + (self.rows * ways, *self.shape[self.axis + 1 :])

    @cached_property
    def span(self) -> list[tuple[int, int]]:
        """Begin and end, in each dimension of a block, of what the devices of this process hold."""
        indices = self.layout.addressable_devices_indices_map(self.shape_of_one).values()
        by_dimension = zip(*(bounds_of(index, self.shape_of_one) for index in indices), strict=True)
        return [(min(low for low, _ in bounds), max(high for _, high in bounds)) for bounds in by_dimension]

    def first_rows(self) -> Iterator[int]:
        """Where the blocks of a layer begin in each shard; the last may overlap the one before: one program for all."""
        held = self.shard[self.axis]
        return (min(row, held - self.rows) for row in range(0, held, self.rows))

    def parts(self, row: int) -> Iterator[tuple[slice, int]]:
        """The rows of a block that lie together, and the row of the parameter that they begin at."""
        held = self.shard[self.axis]
        for number in range(self.shape[self.axis] // held):
            yield slice(number * self.rows, (number + 1) * self.rows), number * held + row

    def read(self, read: Callable, row: int) -> jax.Array:
        """One block onto the devices.

        Args:
            read: ``read(first, sizes)`` gives that part of the layer, as a host array; it is asked for what the
                devices of this process hold.
        """
        axis, begin, parts = self.axis, [low for low, _ in self.span], {}
        sizes = (self.rows, *(high - low for low, high in self.span[axis + 1 :]))

        def pick(index: Sequence[slice]) -> np.ndarray:
            bounds = bounds_of(index, self.shape_of_one)
            first = bounds[axis][0] // self.rows * self.shard[axis] + row
            if first not in parts:
                parts[first] = read((first, *begin[axis + 1 :]), sizes)
            rest = zip(bounds, begin, strict=True)
            columns = tuple(slice(low - start, high - start) for (low, high), start in rest)[axis + 1 :]
            return parts[first][(None,) * axis + (slice(None), *columns)]

        return jax.make_array_from_callback(self.shape_of_one, self.layout, pick)

    def write(self, stack: jax.Array, block: jax.Array, layer: int, row: int) -> jax.Array:
        """Write one block in place: ``stack`` is donated. Both may lack dimensions at the end, as scales do."""
        stack = _writer(stack.sharding)(stack, block, self._first(layer, row)[: stack.ndim])
        return jax.block_until_ready(stack)  # else blocks that wait to be written fill the host

    def gather(self, stack: jax.Array, layer: int, row: int) -> jax.Array:
        """One block, whole in every process."""
        size = (1,) * self.axis + (self.rows, *self.shard[self.axis + 1 :])
        block = _gatherer(self.layout, size, stack.is_fully_addressable)(stack, self._first(layer, row))
        return jax.block_until_ready(block)

    def _first(self, layer: int, row: int) -> np.ndarray:
        return np.asarray([layer, row, *[0] * len(self.shape)][1 - self.axis :][: len(self.shape)], np.int32)


def layout_of(array: jax.Array) -> NamedSharding:
    """The sharding of an array over a mesh; that of an array on one device over a mesh of one."""
    if isinstance(array.sharding, NamedSharding):
        return array.sharding
    (device,) = array.sharding.device_set
    return NamedSharding(Mesh(np.asarray([device]), ("one",)), PartitionSpec(*[None] * array.ndim))


def bounds_of(index: Sequence[slice], shape: Sequence[int]) -> list[tuple[int, int]]:
    return [cut.indices(size)[:2] for cut, size in zip(index, shape, strict=True)]


def zeros(layout: NamedSharding, shape: tuple[int, ...], dtype: np.dtype) -> jax.Array:
    """What blocks are written into."""
    return _zeros(layout, shape, dtype)()


@lru_cache(maxsize=256)
def _zeros(layout: NamedSharding, shape: tuple[int, ...], dtype: np.dtype):
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=layout)


@lru_cache(maxsize=256)
def _writer(layout: NamedSharding):
    def write(stack, block, first):
        return jax.lax.dynamic_update_slice(stack, block.astype(stack.dtype), first)

    specs = (layout.spec, layout.spec, PartitionSpec())
    shards = jax.shard_map(write, mesh=layout.mesh, in_specs=specs, out_specs=layout.spec, check_vma=False)
    return jax.jit(shards, donate_argnums=0)


@lru_cache(maxsize=256)
def _gatherer(layout: NamedSharding, size: tuple[int, ...], is_here: bool):
    def take(stack, first):
        return jax.lax.dynamic_slice(stack, first, size)

    specs = (layout.spec, PartitionSpec())
    shards = jax.shard_map(take, mesh=layout.mesh, in_specs=specs, out_specs=layout.spec, check_vma=False)
    return jax.jit(shards, out_shardings=layout if is_here else NamedSharding(layout.mesh, PartitionSpec()))
