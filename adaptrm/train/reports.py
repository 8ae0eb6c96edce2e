"""What each step has to say: read one step late, written to the metrics and shown."""

import time
from typing import Any

import jax

from adaptrm.config import TrainOptions
from adaptrm.data.plan import Plan
from adaptrm.train.metrics import MetricsLog


class TrainingFailed(RuntimeError):
    """Training cannot go on; the last checkpoint is kept."""


class Reports:
    """Reads step n while step n + 1 runs, so that the device never waits for the host.

    Args:
        log: None in all processes but the first.
        shown: the progress bar.
        unit: what an example is called (pairs, replies).
    """

    def __init__(self, plan: Plan, options: TrainOptions, log: MetricsLog | None, shown: Any, unit: str):
        self._plan, self._options, self._log, self._shown, self._unit = plan, options, log, shown, unit
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._clock = time.perf_counter()

    def add(self, number: int, metrics: dict[str, jax.Array]) -> None:
        """The metrics of a step that has been dispatched; those of the step before are read.

        Raises:
            TrainingFailed: the loss or gradient of that step is not finite.
        """
        self._read()
        self._pending = (number, metrics)

    def flush(self) -> None:
        """Read what is still pending, and bring a remote copy of the metrics up to date."""
        self._read()
        if self._log is not None:
            self._log.flush()

    def _read(self) -> None:
        if self._pending is None:
            return
        number, metrics = self._pending
        self._pending = None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}  # waits for the step
        now = time.perf_counter()
        if not values.pop("finite"):
            raise TrainingFailed(
                f"step {number}: the loss or its gradient is not finite (loss {values['loss']}, gradient norm "
                f"{values['grad_norm']}); the last checkpoint is kept; lower optimizer.learning_rate, give another "
                "--out"
            )
        tokens, examples = self._plan.step_size(number - 1)
        line = {"step": number, "epoch": (number - 1) // self._plan.steps_per_epoch, **values, self._unit: examples}
        seconds, self._clock = now - self._clock, now
        line |= {"tokens_per_second": tokens / seconds, f"{self._unit}_per_second": examples / seconds}
        if self._log is not None and number % self._options.log_every_steps == 0:
            self._log.write(line)
        self._shown.advance(1, f"loss {values['loss']:.4f}, accuracy {values['accuracy']:.3f}")
