"""The Pallas Mosaic GPU kernels of tree attention for Hopper: outputs, gradients of queries, gradients of keys.

Flash attention (Dao et al. 2022; Shah et al. 2024 for Hopper) over blocks of 64 queries and 128 keys, of which each
kernel visits those on its list. A block of threads is two warpgroups that compute, and one that copies and stays ahead
of them. Those two share the keys of two query heads and take turns: one is at its softmax while the other has the
matrix unit, as in jax/experimental/pallas/ops/gpu/attention_mgpu.py.

Every kernel reads ``order`` [batch, blocks, columns], whose first ``counts[..., 1]`` entries are the blocks to visit,
and whose first ``counts[..., 0]`` need no mask. Tokens are whole blocks of keys.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from adaptrm.attention.xla import MASKED

QUERIES, KEYS = 64, 128  # of a block; a matrix instruction of a warpgroup has 64 rows
STAGES = 2  # blocks to visit that shared memory holds at a time
LOG2_E = math.log2(math.e)  # the hardware's exponential is that of 2
MATRIX = plgpu.Layout.WGMMA
A_ROW, A_COLUMN = MATRIX.reduce(1), MATRIX.reduce(0)  # one number for each row, for each column


def attended(q, k, v, end, order, counts, interpret):
    """Outputs [batch, tokens, heads, dim], and logarithms to base 2 of the softmax's sums [batch, heads, tokens]."""
    batch, tokens, heads, dim = q.shape
    group = heads // k.shape[2]
    compute = _computing(group)
    scale = dim**-0.5 * LOG2_E
    product, cast, filled = (partial(f, interpret=interpret) for f in (_product, _cast, _filled))

    def attend(q, k, v, end, order, counts, out, log_total, *scratch):
        q_smem, k_smem, v_smem, end_smem, log_total_smem, mine_ready, ready, used, turn = scratch
        row, block, me = map(lax.axis_index, ("row", "block", "warpgroup"))
        head = lax.axis_index("heads") * compute + me
        queries = pl.ds(block * QUERIES, QUERIES)

        def pass_turn():
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        @pl.when(me < compute)
        def _compute():
            _registers(compute, copies=False)
            plgpu.copy_gmem_to_smem(q.at[row, queries, head], q_smem.at[me], mine_ready.at[me])
            plgpu.barrier_wait(mine_ready.at[me])
            pl.when(me == 1)(pass_turn)

            def step(number, carry, masked):
                sums, top, total = carry
                slot = lax.rem(number, jnp.int32(STAGES))
                plgpu.barrier_wait(ready.at[slot])
                logits = product(q_smem.at[me], k_smem.at[slot], transposed=True, once_issued=pass_turn)
                if masked:
                    query, key = _indices(logits.shape, block * QUERIES, order[row, block, number] * KEYS, cast)
                    logits = _masked(logits, query, key, _down(cast(end_smem[slot], A_COLUMN), logits.shape))
                new_top = jnp.maximum(top, logits.max(axis=1) * scale)
                shrink = jnp.exp2(top - new_top)
                weights = jnp.exp2(logits * scale - _across(new_top, logits.shape))
                total = total * shrink + weights.sum(axis=1)
                sums *= _across(shrink, sums.shape)
                sums, total, weights = lax.optimization_barrier((sums, total, weights.astype(v.dtype)))
                pass_turn()
                sums = product(weights, v_smem.at[slot], sums)
                plgpu.barrier_arrive(used.at[slot])
                return sums, new_top, total

            # Far above masked logits, so that these weigh 0 also where a query has met no other yet.
            top = filled(MASKED * scale / 2, (QUERIES,), A_ROW)
            start = filled(0.0, (QUERIES, dim), MATRIX), top, filled(0.0, (QUERIES,), A_ROW)
            sums, top, total = _visit(counts.at[row, block], step, start)
            pl.when(me == 0)(pass_turn)
            q_smem.at[me][...] = (sums / _across(total, sums.shape)).astype(out.dtype)
            log_total_smem.at[me][...] = top + jnp.log(total) * LOG2_E
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_smem.at[me], out.at[row, queries, head])
            plgpu.copy_smem_to_gmem(log_total_smem.at[me], log_total.at[row, head, queries])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(me == compute)
        def _copy():
            _registers(compute, copies=True)
            _copy_keys((k, v, end), (k_smem, v_smem, end_smem), order, counts, ready, used, group // compute)

    scratch = (
        _tile((compute, QUERIES, dim), q.dtype),
        *_key_tiles(dim, k.dtype),
        plgpu.SMEM((compute, QUERIES), jnp.float32),
        plgpu.Barrier(num_barriers=compute),
        plgpu.Barrier(num_arrivals=3, num_barriers=STAGES),
        plgpu.Barrier(num_arrivals=compute, num_barriers=STAGES),
        plgpu.Barrier(num_arrivals=compute),
    )
    out_type = jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((batch, heads, tokens), jnp.float32)
    grid = heads // compute, tokens // QUERIES, batch
    return _call(attend, out_type, scratch, grid, compute, interpret)(q, k, v, end, order, counts)


def query_gradient(q, k, v, end, grad, log_total, delta, order, counts, interpret):
    """The gradient of the queries, from that of the outputs and its product with them, ``delta``."""
    batch, tokens, heads, dim = q.shape
    group = heads // k.shape[2]
    compute = _computing(group)
    product, cast, filled = (partial(f, interpret=interpret) for f in (_product, _cast, _filled))

    def differentiate_queries(q, k, v, end, grad, log_total, delta, order, counts, dq, *scratch):
        q_smem, grad_smem, log_total_smem, delta_smem, *key_smem, mine_ready, ready, used = scratch
        k_smem, v_smem, end_smem = key_smem
        row, block, me = map(lax.axis_index, ("row", "block", "warpgroup"))
        head = lax.axis_index("heads") * compute + me
        queries = pl.ds(block * QUERIES, QUERIES)

        @pl.when(me < compute)
        def _compute():
            _registers(compute, copies=False)
            plgpu.copy_gmem_to_smem(q.at[row, queries, head], q_smem.at[me], mine_ready.at[me])
            plgpu.copy_gmem_to_smem(grad.at[row, queries, head], grad_smem.at[me], mine_ready.at[me])
            plgpu.copy_gmem_to_smem(log_total.at[row, head, queries], log_total_smem.at[me], mine_ready.at[me])
            plgpu.copy_gmem_to_smem(delta.at[row, head, queries], delta_smem.at[me], mine_ready.at[me])
            plgpu.barrier_wait(mine_ready.at[me])
            log_total_row, delta_row = cast(log_total_smem[me], A_ROW), cast(delta_smem[me], A_ROW)

            def step(number, sums, masked):
                slot = lax.rem(number, jnp.int32(STAGES))
                plgpu.barrier_wait(ready.at[slot])
                for first in range(0, KEYS, QUERIES):  # registers do not hold more keys at a time
                    keys = pl.ds(first, QUERIES)
                    logits = product(q_smem.at[me], k_smem.at[slot, keys], transposed=True)
                    if masked:
                        first_key = order[row, block, number] * KEYS + first
                        query, key = _indices(logits.shape, block * QUERIES, first_key, cast)
                        logits = _masked(logits, query, key, _down(cast(end_smem[slot, keys], A_COLUMN), logits.shape))
                    weights = jnp.exp2(logits * (dim**-0.5 * LOG2_E) - _across(log_total_row, logits.shape))
                    dweights = product(grad_smem.at[me], v_smem.at[slot, keys], transposed=True)
                    dlogits = weights * (dweights - _across(delta_row, weights.shape))
                    sums = product(dlogits.astype(k.dtype), k_smem.at[slot, keys], sums)
                plgpu.barrier_arrive(used.at[slot])
                return sums

            sums = _visit(counts.at[row, block], step, filled(0.0, (QUERIES, dim), MATRIX))
            q_smem.at[me][...] = (sums * dim**-0.5).astype(dq.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_smem.at[me], dq.at[row, queries, head])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(me == compute)
        def _copy():
            _registers(compute, copies=True)
            _copy_keys((k, v, end), (k_smem, v_smem, end_smem), order, counts, ready, used, group // compute)

    scratch = (
        *[_tile((compute, QUERIES, dim), q.dtype)] * 2,
        *[plgpu.SMEM((compute, QUERIES), jnp.float32)] * 2,
        *_key_tiles(dim, k.dtype),
        plgpu.Barrier(num_arrivals=4, num_barriers=compute),
        plgpu.Barrier(num_arrivals=3, num_barriers=STAGES),
        plgpu.Barrier(num_arrivals=compute, num_barriers=STAGES),
    )
    grid = heads // compute, tokens // QUERIES, batch
    run = _call(differentiate_queries, jax.ShapeDtypeStruct(q.shape, q.dtype), scratch, grid, compute, interpret)
    return run(q, k, v, end, grad, log_total, delta, order, counts)


def key_gradients(q, k, v, end, grad, log_total, delta, order, counts, interpret):
    """What each query head adds to the gradients of its keys and values: two of [batch, tokens, heads, dim], float32.

    Here a warpgroup has 64 keys for its rows, and the lists are of the query blocks that see a key block.
    """
    batch, tokens, heads, dim = q.shape
    group = heads // k.shape[2]
    compute = KEYS // QUERIES
    product, cast, filled = (partial(f, interpret=interpret) for f in (_product, _cast, _filled))

    def differentiate_keys(q, k, v, end, grad, log_total, delta, order, counts, dk, dv, *scratch):
        k_smem, v_smem, end_smem, out_smem, *query_smem, mine_ready, ready, used = scratch
        q_smem, grad_smem, log_total_smem, delta_smem = query_smem
        row, block, me, head = map(lax.axis_index, ("row", "block", "warpgroup", "heads"))

        @pl.when(me < compute)
        def _compute():
            _registers(compute, copies=False)
            first_key = block * KEYS + me * QUERIES
            keys, kv_head = pl.ds(first_key, QUERIES), lax.div(head, jnp.int32(group))
            plgpu.copy_gmem_to_smem(k.at[row, keys, kv_head], k_smem.at[me], mine_ready.at[me])
            plgpu.copy_gmem_to_smem(v.at[row, keys, kv_head], v_smem.at[me], mine_ready.at[me])
            plgpu.copy_gmem_to_smem(end.at[row, keys], end_smem.at[me], mine_ready.at[me])
            plgpu.barrier_wait(mine_ready.at[me])

            def step(number, carry, masked):
                dk_sums, dv_sums = carry
                slot = lax.rem(number, jnp.int32(STAGES))
                plgpu.barrier_wait(ready.at[slot])
                logits = product(k_smem.at[me], q_smem.at[slot], transposed=True)
                if masked:
                    key, query = _indices(logits.shape, first_key, order[row, block, number] * QUERIES, cast)
                    logits = _masked(logits, query, key, _across(cast(end_smem[me], A_ROW), logits.shape))
                log_total_column = _down(cast(log_total_smem[slot], A_COLUMN), logits.shape)
                weights = jnp.exp2(logits * (dim**-0.5 * LOG2_E) - log_total_column)
                dv_sums = product(weights.astype(q.dtype), grad_smem.at[slot], dv_sums)
                dweights = product(v_smem.at[me], grad_smem.at[slot], transposed=True)
                dlogits = weights * (dweights - _down(cast(delta_smem[slot], A_COLUMN), weights.shape))
                dk_sums = product(dlogits.astype(q.dtype), q_smem.at[slot], dk_sums)
                plgpu.barrier_arrive(used.at[slot])
                return dk_sums, dv_sums

            zeros = filled(0.0, (QUERIES, dim), MATRIX)
            dk_sums, dv_sums = _visit(counts.at[row, block], step, (zeros, zeros))
            for sums, out in ((dk_sums * dim**-0.5, dk), (dv_sums, dv)):
                out_smem.at[me][...] = sums
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_smem.at[me], out.at[row, keys, head])
                plgpu.wait_smem_to_gmem(0)

        @pl.when(me == compute)
        def _copy():
            _registers(compute, copies=True)

            def copy(number, slot):
                queries = pl.ds(order[row, block, number] * QUERIES, QUERIES)
                plgpu.copy_gmem_to_smem(q.at[row, queries, head], q_smem.at[slot], ready.at[slot])
                plgpu.copy_gmem_to_smem(grad.at[row, queries, head], grad_smem.at[slot], ready.at[slot])
                plgpu.copy_gmem_to_smem(log_total.at[row, head, queries], log_total_smem.at[slot], ready.at[slot])
                plgpu.copy_gmem_to_smem(delta.at[row, head, queries], delta_smem.at[slot], ready.at[slot])

            _stay_ahead(counts[row, block, 1], used, copy)

    scratch = (
        *[_tile((compute, QUERIES, dim), k.dtype)] * 2,
        plgpu.SMEM((compute, QUERIES), jnp.int32),
        _tile((compute, QUERIES, dim), jnp.float32),
        *[_tile((STAGES, QUERIES, dim), q.dtype)] * 2,
        *[plgpu.SMEM((STAGES, QUERIES), jnp.float32)] * 2,
        plgpu.Barrier(num_arrivals=3, num_barriers=compute),
        plgpu.Barrier(num_arrivals=4, num_barriers=STAGES),
        plgpu.Barrier(num_arrivals=compute, num_barriers=STAGES),
    )
    out_type = (jax.ShapeDtypeStruct(q.shape, jnp.float32),) * 2
    run = _call(differentiate_keys, out_type, scratch, (heads, tokens // KEYS, batch), compute, interpret)
    return run(q, k, v, end, grad, log_total, delta, order, counts)


def _call(kernel, out_type, scratch, grid: tuple[int, int, int], compute: int, interpret):
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=scratch,
        grid=grid,
        grid_names=("heads", "block", "row"),
        num_threads=compute + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )


def _computing(group: int) -> int:
    """Warpgroups that compute, one query head each: two where two heads have the same keys."""
    return 2 if group % 2 == 0 else 1


def _registers(compute: int, copies: bool) -> None:
    """Those that copying can do without go to two that compute; one alone has enough."""
    if compute == 2:
        plgpu.set_max_registers(40, action="decrease") if copies else plgpu.set_max_registers(232, action="increase")


def _tile(shape: tuple[int, ...], dtype):
    """Shared memory in the order that matrix instructions read."""
    columns = 128 // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(128)))


def _key_tiles(dim: int, dtype):
    """Places for blocks of keys, of values, and of the ends of the keys' subtrees."""
    return *[_tile((STAGES, KEYS, dim), dtype)] * 2, plgpu.SMEM((STAGES, KEYS), jnp.int32)


def _copy_keys(arrays, places, order, counts, ready, used, steps_a_kv_head: int) -> None:
    """Copies the key blocks that this block of queries visits."""
    (k, v, end), (k_smem, v_smem, end_smem) = arrays, places
    row, block = map(lax.axis_index, ("row", "block"))
    kv_head = lax.div(lax.axis_index("heads"), jnp.int32(steps_a_kv_head))

    def copy(number, slot):
        keys = pl.ds(order[row, block, number] * KEYS, KEYS)
        plgpu.copy_gmem_to_smem(k.at[row, keys, kv_head], k_smem.at[slot], ready.at[slot])
        plgpu.copy_gmem_to_smem(v.at[row, keys, kv_head], v_smem.at[slot], ready.at[slot])
        plgpu.copy_gmem_to_smem(end.at[row, keys], end_smem.at[slot], ready.at[slot])

    _stay_ahead(counts[row, block, 1], used, copy)


def _stay_ahead(count, used, copy) -> None:
    """``copy(number, slot)`` for each on the list, as soon as what lay in the slot is used."""

    @pl.loop(0, count)
    def _step(number):
        slot = lax.rem(number, jnp.int32(STAGES))

        @pl.when(number >= STAGES)
        def _wait():
            plgpu.barrier_wait(used.at[slot])

        copy(number, slot)

    @pl.loop(lax.max(count - STAGES, 0), count)
    def _last(number):
        plgpu.barrier_wait(used.at[lax.rem(number, jnp.int32(STAGES))])


def _visit(counts, step, carry):
    """``step(number, carry, masked)`` for each on the list."""
    carry = lax.fori_loop(0, counts[0], partial(step, masked=False), carry)
    return lax.fori_loop(counts[0], counts[1], partial(step, masked=True), carry)


def _product(a, b, start=None, transposed=False, once_issued=lambda: None, interpret=None):
    """``start + a @ b`` in float32 and in registers; ``b`` is in shared memory, ``a`` there or in registers.

    ``once_issued`` is called while the matrix unit is at it.
    """
    if interpret:  # it knows no products with registers
        found = jnp.dot(a[...], b[...].T if transposed else b[...], preferred_element_type=jnp.float32)
        once_issued()
        return found if start is None else start + found
    b = b.transpose((1, 0)) if transposed else b
    if start is not None:
        return pl.run_state(lambda sums: plgpu.wgmma(sums, a, b))(plgpu.ACC.init(start))

    def from_zero(sums):
        plgpu.wgmma(sums, a, b)
        once_issued()
        return sums[...]

    return pl.run_scoped(from_zero, plgpu.ACC((QUERIES, b.shape[1]), jnp.float32))


def _cast(x, layout, interpret):
    return x if interpret else plgpu.layout_cast(x, layout)


def _filled(value: float, shape: tuple[int, ...], layout, interpret):
    return _cast(jnp.full(shape, value, jnp.float32), layout, interpret)


def _indices(shape: tuple[int, int], first_row, first_column, cast):
    """Each element's row and column in the whole matrix."""
    rows, columns = (cast(lax.broadcasted_iota(jnp.int32, shape, axis), MATRIX) for axis in (0, 1))
    return rows + first_row, columns + first_column


def _masked(logits, query, key, end):
    return jnp.where((key <= query) & (query < end), logits, MASKED)


def _across(x, shape: tuple[int, int]):
    """A number for each row, in every column."""
    return lax.broadcast_in_dim(x, shape, [0])


def _down(x, shape: tuple[int, int]):
    """A number for each column, in every row."""
    return lax.broadcast_in_dim(x, shape, [1])
