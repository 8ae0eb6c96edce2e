"""What each step has to say: read one step late, written to the metrics and shown."""

import time
from typing import Any

import jax

from adaptrm.config import TrainOptions
from adaptrm.progress import say
from adaptrm.train.metrics import MetricsLog
from adaptrm.train.throughput import Throughput
from adaptrm.watchdog import doing


class TrainingFailed(RuntimeError):
    """Training cannot go on; the last checkpoint is kept."""


class Reports:
    """Reads step n while step n + 1 runs, so that the device never waits for the host.

    Args:
        log: None in all processes but the first.
        shown: the progress bar.
    """

    def __init__(self, throughput: Throughput, options: TrainOptions, log: MetricsLog | None, shown: Any):
        self._throughput, self._options, self._log, self._shown = throughput, options, log, shown
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._clock, self._compiled = 0.0, False

    def start_step(self) -> None:
        """A step is about to be fed: after a pause for something else its time begins now."""
        if self._pending is None:
            self._clock = time.perf_counter()

    def add(self, number: int, metrics: dict[str, jax.Array]) -> None:
        """The metrics of a step that has been dispatched; those of the step before are read.

        Raises:
            TrainingFailed: so many steps were not finite that the run ends.
        """
        self._read()
        self._pending = (number, metrics)

    def flush(self) -> None:
        """Read what is still pending, and bring a remote copy of the metrics up to date."""
        self._read()
        if self._log is not None:
            self._log.flush()

    def evaluated(self, step: int, values: dict[str, float]) -> None:
        """What held-out examples say of the model after a step: a line of its own."""
        if self._log is not None:
            self._log.write({"step": step, **values})
            self._log.flush()
            loss, accuracy = values["evaluation/loss"], values["evaluation/accuracy"]
            say(f"held out, after step {step}: loss {loss:.4f}, accuracy {accuracy:.3f}")

    def _read(self) -> None:
        if self._pending is None:
            return
        number, metrics = self._pending
        self._pending = None
        doing(f"step {number}")
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}  # waits for the step
        now = time.perf_counter()
        if not values.pop("finite"):
            self._skipped(number, values)
        # The first step of a process is compiled, which says nothing of how fast the next ones are.
        seconds = now - self._clock if self._compiled else None
        self._clock, self._compiled = now, True
        if self._log is not None and number % self._options.log_every_steps == 0:
            epoch = (number - 1) // self._throughput.plan.steps_per_epoch
            told = self._throughput.of_step(number - 1, seconds)
            self._log.write({"step": number, "epoch": epoch, **values, **told})
        self._shown.advance(1, f"loss {values['loss']:.4f}, accuracy {values['accuracy']:.3f}")

    def _skipped(self, number: int, values: dict[str, float]) -> None:
        """A step that was not finite and changed nothing: said, or one too many."""
        what = (
            f"step {number}: the loss or its gradient is not finite (loss {values['loss']}, gradient norm "
            f"{values['grad_norm']})"
        )
        count, most = int(values["skipped"]), self._options.max_nonfinite_steps
        if count > most:
            so_far = f", {count} such steps so far, max_nonfinite_steps is {most}" if most else ""
            raise TrainingFailed(
                f"{what}{so_far}; the last checkpoint is kept; lower optimizer.learning_rate, give another --out"
            )
        if self._log is not None:
            say(f"{what}; skipped, the {count}. of at most {most}")
