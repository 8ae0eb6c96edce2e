"""The training loop: batches in, metrics out one step late, checkpoints on the way."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from uuid import uuid4

import jax
from jax.sharding import Mesh

from adaptrm import paths
from adaptrm.config import TrainOptions
from adaptrm.data.pipeline import TreeStore
from adaptrm.data.plan import Plan
from adaptrm.errors import InputError, Stopped
from adaptrm.parallel.distributed import exchanged, told_to_all
from adaptrm.preemption import AGAIN, NOTHING_TO_SAVE
from adaptrm.progress import progress
from adaptrm.train.checkpoint import Checkpoints
from adaptrm.train.evaluation import Evaluations, HeldOut
from adaptrm.train.feed import device_batches
from adaptrm.train.metrics import read_metrics
from adaptrm.train.preemption import stops_when_asked
from adaptrm.train.reports import Reports
from adaptrm.train.state import TrainState
from adaptrm.train.throughput import Throughput
from adaptrm.train.trackers import open_metrics
from adaptrm.watchdog import COMPILING, doing


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
    held_out: HeldOut | None,
) -> TrainState:
    """Train up to ``steps``, from where the newest checkpoint stands.

    Args:
        throughput: what each step is measured by.
        config: what the run's config.yaml says, kept in every checkpoint.
        held_out: what the run is evaluated on.

    Raises:
        TrainingFailed: more losses or gradients than ``max_nonfinite_steps`` are not finite.
        Stopped: this machine goes away; the step that ran has ended and is saved, an evaluation is made again.
    """
    folder = paths.join(out, "checkpoints")
    with stops_when_asked() as noticed:
        with Checkpoints(folder, options.checkpoint, config) as checkpoints:
            _check_shared(out)
            if checkpoints.step is not None:
                state = checkpoints.restore(state)
            number = start = int(state.step)
            first = jax.process_index() == 0
            with told_to_all(out):
                earlier = read_metrics(paths.join(out, "metrics.jsonl"), start) if first else []
            earlier = exchanged(earlier)[0]  # which evaluations there are is decided alike
            logged = open_metrics(out, options, start) if first else nullcontext()
            with logged as log, jax.set_mesh(mesh), progress("train", "steps", steps, first, start) as shown:
                reports = Reports(throughput, options, log, shown)
                evaluations = Evaluations(held_out, earlier, steps, reports, noticed)
                # Before the first step, or where the run was stopped before it.
                stopped = evaluations.after(start, state.whole)
                feed = device_batches(store, plan, mesh, start, steps)
                while number < steps and not (stopped or evaluations.enough):
                    number += 1
                    reports.start_step()
                    doing(f"reading the rows of step {number}")
                    batch = next(feed)
                    doing(f"step {number}", at_least=COMPILING if number == start + 1 else 0)
                    state, metrics = step_fn(state, batch)
                    reports.add(number, metrics)
                    stopped = noticed() or evaluations.after(number, state.whole)
                    last = stopped or evaluations.enough or number == steps
                    if last or number % options.checkpoint.every_steps == 0:
                        reports.flush()  # before the checkpoint: what goes on from it has every line up to it
                        checkpoints.save(number, state, evaluations.scores)
        if stopped:  # only now is the checkpoint whole
            if number == start:  # in the evaluation before the first step
                raise Stopped(NOTHING_TO_SAVE)
            raise Stopped(f"stopped by SIGTERM after step {number} of {steps}, saved; {AGAIN}")
    return state


def _check_shared(out: str | os.PathLike) -> None:
    """Raise where processes see other folders here: each would save what no other finds, and none could go on."""
    if jax.process_count() == 1:
        return
    # A new name each time: a network file system remembers for a while that a file was not there.
    mark = paths.here(out) / f".shared-{exchanged(uuid4().hex)[0]}"
    with told_to_all(out) as first:
        if first:
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
    seen = exchanged(mark.exists())
    if jax.process_index() == 0:
        mark.unlink()
    if not all(seen):
        raise InputError(f"{out}: process {seen.index(False)} sees another folder here; the run folder must be shared")
