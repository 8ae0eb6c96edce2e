"""Batches of packed rows, placed on the mesh."""

from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from adaptrm.data.pipeline import RowSource, TreeStore, batches, one_ahead
from adaptrm.data.plan import Plan
from adaptrm.parallel import sharding


def device_batches(store: TreeStore, plan: Plan, mesh: Mesh, start: int, stop: int) -> Iterator[dict[str, jax.Array]]:
    """The batches of steps start to stop, spread over the mesh; each process reads the rows its devices hold."""
    count = plan.rows_per_step
    layout = sharding(mesh, (count, 1), ("rows", "tokens"))
    held = layout.addressable_devices_indices_map((count, 1)).values()
    mine = sorted({row for index in held for row in range(*index[0].indices(count))})
    place_of = {row: at for at, row in enumerate(mine)}

    def to_device(local: np.ndarray) -> jax.Array:
        shape = (count, *local.shape[1:])
        axes = ("rows", *["tokens"] * (local.ndim - 1))
        pick = lambda index: local[([place_of[row] for row in range(*index[0].indices(count))], *index[1:])]  # noqa: E731
        return jax.make_array_from_callback(shape, sharding(mesh, shape, axes), pick)

    read = batches(RowSource(store, plan, mine, start, stop), len(mine))
    return one_ahead({name: to_device(local) for name, local in rows.items()} for rows in read)
