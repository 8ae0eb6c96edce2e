"""The training loop: batches in, metrics out one step late, checkpoints on the way."""

import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from adaptrm import paths
from adaptrm.config import TrainOptions
from adaptrm.data.pipeline import RowSource, TreeStore, batches
from adaptrm.data.plan import Plan
from adaptrm.errors import InputError, Stopped
from adaptrm.parallel import sharding
from adaptrm.progress import progress
from adaptrm.train.checkpoint import Checkpoints
from adaptrm.train.metrics import MetricsLog
from adaptrm.train.preemption import AGAIN, stops_after_a_step
from adaptrm.train.reports import Reports
from adaptrm.train.state import TrainState
from adaptrm.train.throughput import Throughput
from adaptrm.watchdog import COMPILING, doing


def device_batches(store: TreeStore, plan: Plan, mesh: Mesh, start: int, stop: int) -> Iterator[dict[str, jax.Array]]:
    """The batches of steps start to stop, spread over the mesh; each process reads the rows its devices hold."""
    count = plan.rows_per_step
    layout = sharding(mesh, (count, 1), ("rows", "tokens"))
    held = layout.addressable_devices_indices_map((count, 1)).values()
    mine = sorted({row for index in held for row in range(*index[0].indices(count))})
    place_of = {row: at for at, row in enumerate(mine)}

    def to_device(local: np.ndarray) -> jax.Array:
        shape = (count, local.shape[1])
        pick = lambda index: local[[place_of[row] for row in range(*index[0].indices(count))], index[1]]  # noqa: E731
        return jax.make_array_from_callback(shape, sharding(mesh, shape, ("rows", "tokens")), pick)

    for rows in batches(RowSource(store, plan, mine, start, stop), len(mine)):
        yield {name: to_device(local) for name, local in rows.items()}


def run_steps(
    step_fn: Callable,
    state: TrainState,
    store: TreeStore,
    plan: Plan,
    mesh: Mesh,
    options: TrainOptions,
    steps: int,
    out: str | os.PathLike,
    throughput: Throughput,
    config: str,
) -> TrainState:
    """Train up to ``steps``, from where the newest checkpoint stands.

    Args:
        throughput: what each step is measured by.
        config: what the run's config.yaml says, kept in every checkpoint.

    Raises:
        TrainingFailed: more losses or gradients than ``max_nonfinite_steps`` are not finite.
        Stopped: this machine goes away; the step that ran has ended and is saved.
    """
    folder = paths.join(out, "checkpoints")
    with stops_after_a_step() as noticed:
        with Checkpoints(folder, options.checkpoint, config) as checkpoints:
            _check_shared(out, checkpoints.step)
            if checkpoints.step is not None:
                state = checkpoints.restore(state)
            start, stopped = int(state.step), False
            first = jax.process_index() == 0
            logged = MetricsLog(paths.join(out, "metrics.jsonl"), start) if first else nullcontext()
            with logged as log, jax.set_mesh(mesh), progress("train", "steps", steps - start, first) as shown:
                reports = Reports(throughput, options, log, shown)
                feed = device_batches(store, plan, mesh, start, steps)
                for number in range(start + 1, steps + 1):
                    reports.start_step()
                    doing(f"reading the rows of step {number}")
                    batch = next(feed)
                    doing(f"step {number}", at_least=COMPILING if number == start + 1 else 0)
                    state, metrics = step_fn(state, batch)
                    reports.add(number, metrics)
                    stopped = noticed(number)
                    if stopped or number % options.checkpoint.every_steps == 0 or number == steps:
                        reports.flush()  # before the checkpoint: what goes on from it has every line up to it
                        checkpoints.save(number, state)
                    if stopped:
                        break
        if stopped:  # only now is the checkpoint whole
            raise Stopped(f"stopped by SIGTERM after step {number} of {steps}, saved; {AGAIN}")
    return state


def _check_shared(out: str | os.PathLike, latest: int | None) -> None:
    """Raise where processes see other checkpoints: they would wait for each other for ever."""
    if jax.process_count() > 1:
        try:
            multihost_utils.assert_equal(np.int32(-1 if latest is None else latest))
        except AssertionError:
            raise InputError(f"{out}: processes see other checkpoints here; the run folder must be shared") from None
