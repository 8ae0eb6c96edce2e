"""Trees through a jitted program, one batch of rows at a time, and what it reads at their leaves back to them."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from adaptrm.parallel.distributed import to_host
from adaptrm.parallel.sharding import place, sharding
from adaptrm.prefix_tree import PrefixTree, choose_row_length, pack_rows

LEAVES_STEP = 64  # leaves a row come in multiples of this, so that few programs are compiled


def read_leaves(trees: Sequence[PrefixTree], mesh: Mesh, program: Callable[..., jax.Array]) -> dict[int, np.ndarray]:
    """Run a program over packed rows.

    Args:
        program: takes tokens, positions, subtree_end ``[rows, tokens]`` and leaves ``[rows, leaves]``, gives
            ``[rows, leaves, ...]``.

    Returns:
        For each tree ``[its leaves, ...]``.
    """
    # One row a device at a time: longer rows already fill the device, and fewer rows waste less on padding.
    at_once = mesh.shape["data"] * mesh.shape["fsdp"]
    row_length, rows = choose_row_length([len(tree) for tree in trees], at_once)
    most = max(sum(len(trees[i].leaves) for i in row) for row in rows)
    packed = pack_rows(trees, rows, row_length, -(-most // LEAVES_STEP) * LEAVES_STEP, at_once)
    out = []
    with jax.set_mesh(mesh):
        for start in range(0, len(packed.tokens), at_once):
            arrays = (packed.tokens, packed.positions, packed.subtree_end, packed.leaves)
            batch = [x[start : start + at_once] for x in arrays]
            placed = (place(x, sharding(mesh, x.shape, ("rows", "tokens"))) for x in batch)
            out.append(to_host(program(*placed)))
    return packed.to_owners(np.concatenate(out))
