"""Trees through a jitted program, a few rows at a time, and what it reads at their leaves back to them."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from adaptrm.parallel.distributed import to_host
from adaptrm.parallel.sharding import place, sharding
from adaptrm.prefix_tree import PackedRows, PrefixTree, choose_row_length, pack_rows

LEAVES_STEP = 64  # leaves a row come in these many, or twice as many and so on, so that few programs are compiled


def rows_at_once(mesh: Mesh) -> int:
    """One row a device at a time: longer rows already fill the device, and fewer rows waste less on padding."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def pack_trees(trees: Sequence[PrefixTree], mesh: Mesh) -> PackedRows:
    """Rows for ``over_rows``, of one of few shapes."""
    at_once = rows_at_once(mesh)
    row_length, rows = choose_row_length([len(tree) for tree in trees], at_once)
    most = max(sum(len(trees[i].leaves) for i in row) for row in rows)
    room = LEAVES_STEP << (-(-most // LEAVES_STEP) - 1).bit_length()
    return pack_rows(trees, rows, row_length, room, at_once)


def over_rows(arrays: Sequence[np.ndarray], mesh: Mesh, program: Callable[..., Any]) -> Any:
    """What a program gives for all rows, some rows at a time.

    Args:
        arrays: ``[rows, ...]``, as many rows as the mesh takes at once, or a multiple.
        program: takes a batch of the arrays, gives arrays ``[rows, ...]``.
    """
    at_once = rows_at_once(mesh)
    # The device begins with the next batch while the host reads this one. Devices of a CPU share cores, and a
    # collective of theirs gives up where two steps wait for each other.
    ahead = 0 if mesh.devices.flat[0].platform == "cpu" else 1
    out, running = [], deque()
    with jax.set_mesh(mesh):
        for start in range(0, len(arrays[0]), at_once):
            batch = [x[start : start + at_once] for x in arrays]
            logical = [("rows", *["tokens"] * (x.ndim - 1)) for x in batch]
            running.append(
                program(*(place(x, sharding(mesh, x.shape, axes)) for x, axes in zip(batch, logical, strict=True)))
            )
            if len(running) > ahead:
                out.append(jax.tree.map(to_host, running.popleft()))
        out += [jax.tree.map(to_host, left) for left in running]
    return jax.tree.map(lambda *parts: np.concatenate(parts), *out)


def read_leaves(trees: Sequence[PrefixTree], mesh: Mesh, program: Callable[..., jax.Array]) -> dict[int, np.ndarray]:
    """Run a program over packed rows.

    Args:
        program: takes tokens, positions, subtree_end ``[rows, tokens]`` and leaves ``[rows, leaves]``, gives
            ``[rows, leaves, ...]``.

    Returns:
        For each tree ``[its leaves, ...]``.
    """
    packed = pack_trees(trees, mesh)
    return packed.to_owners(over_rows(packed.arrays, mesh, program))
