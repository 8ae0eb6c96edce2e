"""A run measured on held-out examples: every few steps, and until that is enough."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from adaptrm.config import DataOptions, EvaluationOptions, Kind, LossOptions, TrainOptions
from adaptrm.data.pipeline import TreeStore
from adaptrm.data.plan import Plan
from adaptrm.errors import InputError
from adaptrm.train.feed import device_batches
from adaptrm.train.reports import Reports
from adaptrm.train.step import Answers, loss_sums
from adaptrm.watchdog import COMPILING, doing

ACCURACY = "evaluation/accuracy"


def held_out_data(kind: Kind, options: TrainOptions) -> DataOptions | None:
    """Where held-out examples come from, made as those of the training are; None where nothing is held out.

    What overlaps with a suite stays in: it may be the suite.

    Raises:
        InputError: an option needs held-out examples and there are none, or checkpoints come where none is measured.
    """
    held, checkpoint = options.evaluation, options.checkpoint
    if held.pairs is None and held.labels is None and held.scores is None:
        for name, asked in (("evaluation.stop_after", held.stop_after), ("checkpoint.keep_best", checkpoint.keep_best)):
            if asked:
                raise InputError(f"{name} needs held-out examples: give evaluation.pairs")
        return None
    if kind == "judge" and (held.labels is None or held.pairs is not None):
        raise InputError("a judge is evaluated on rule labels: give evaluation.labels, and no evaluation.pairs")
    if checkpoint.keep_best and checkpoint.every_steps % held.every_steps:
        raise InputError(
            f"checkpoint.keep_best needs an evaluation at every checkpoint: checkpoint.every_steps is "
            f"{checkpoint.every_steps}, no multiple of evaluation.every_steps {held.every_steps}"
        )
    if kind != "adapter":
        if held.scores is not None:
            raise InputError(f"evaluation.scores is of adapters; train {kind} takes none")
        return replace(options.data, pairs=held.pairs, labels=held.labels or "human", mix=(), drop_overlap=())
    if (held.labels is None) == (held.scores is None):
        raise InputError(
            "an adapter is evaluated on labels or scores: give one of evaluation.labels, evaluation.scores"
        )
    return replace(options.data, pairs=held.pairs, labels=held.labels, scores=held.scores, drop_overlap=())


@lru_cache(maxsize=8)
def make_evaluation(kind: Kind, definition: nnx.GraphDef, answers: Answers | None, dtype: str, loss: LossOptions):
    """The jitted ``(params, batch) -> sums`` of a loss over packed rows."""
    return jax.jit(lambda params, batch: loss_sums(kind, definition, params, batch, answers, dtype, "none", loss))


@dataclass(frozen=True)
class HeldOut:
    """Held-out examples, and the program that measures a model on them.

    Args:
        program: as ``make_evaluation`` gives it.
        plan: of one epoch.
    """

    program: Callable[..., Mapping[str, jax.Array]]
    store: TreeStore
    plan: Plan
    mesh: Mesh
    options: EvaluationOptions

    def measure(self, params: nnx.State, stopped: Callable[[], bool]) -> dict[str, float] | None:
        """Loss, accuracy and what else is trained on, as means over the labelled examples; their number as weight.

        The same on every process; None where ``stopped``, asked before each batch, says so.
        """
        totals: Counter[str] = Counter()
        sums: Mapping[str, jax.Array] = {}
        count = self.plan.steps_per_epoch
        for number, batch in enumerate(device_batches(self.store, self.plan, self.mesh, 0, count), start=1):
            doing(f"measuring what is held out, batch {number} of {count}", at_least=COMPILING if number == 1 else 0)
            if stopped():
                return None
            ahead = self.program(params, batch)
            totals.update({name: float(value) for name, value in sums.items()})  # one late: two are on the devices
            sums = ahead
        totals.update({name: float(value) for name, value in sums.items()})
        weight = totals.pop("weight")
        means = {f"evaluation/{name}": total / max(weight, 1e-9) for name, total in totals.items()}
        return means | {"evaluation/weight": weight}


class Evaluations:
    """The evaluations of a run: those that its metrics tell of, and those to come.

    Args:
        held_out: None where nothing is held out.
        lines: of the metrics up to the step from which the run goes on; other lines among them are passed over.
        steps: of the whole run.
        stopped: whether the run is to stop now.

    Attributes:
        scores: the accuracy after each step that was evaluated.
    """

    def __init__(
        self,
        held_out: HeldOut | None,
        lines: Iterable[Mapping[str, Any]],
        steps: int,
        reports: Reports,
        stopped: Callable[[], bool],
    ):
        self._held_out, self._steps, self._reports, self._stopped = held_out, steps, reports, stopped
        self.scores: dict[int, float] = {line["step"]: line[ACCURACY] for line in lines if ACCURACY in line}

    @property
    def enough(self) -> bool:
        """Whether the last ``stop_after`` evaluations found no better accuracy than one before them."""
        if self._held_out is None or (most := self._held_out.options.stop_after) is None or not self.scores:
            return False
        found = list(self.scores.values())
        return len(found) - 1 - found.index(max(found)) >= most

    def after(self, step: int, params: nnx.State) -> bool:
        """Evaluate after a step where that is due, unless the metrics tell of it already.

        Returns:
            Whether the run is to stop; an evaluation that was going on is broken off for that.
        """
        if self._held_out is None or (step % self._held_out.options.every_steps and step != self._steps):
            return False
        if step in self.scores:
            return False
        self._reports.flush()
        values = self._held_out.measure(params, self._stopped)
        if values is None:
            return True
        self._reports.evaluated(step, values)
        self.scores[step] = values[ACCURACY]
        return self._stopped()
