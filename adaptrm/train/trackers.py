"""Metrics to TensorBoard, Weights & Biases and trackio, beside ``metrics.jsonl``: numbers and options, never texts."""

import importlib.util
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

from adaptrm import paths
from adaptrm.config import TEXTS, TrainOptions
from adaptrm.errors import InputError
from adaptrm.train.metrics import MetricsLog

Log = Callable[[int, Mapping[str, float]], None]
PROJECT = "adaptrm"  # unless the tracker's own variable says otherwise
ID = "tracker-id"  # in the run folder, so that a run that goes on is one run everywhere
MODULES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}


def check_trackers(names: Sequence[str], out: str | os.PathLike) -> None:
    """Raise where a tracker cannot be used, before anything long has begun."""
    for name in names:
        if importlib.util.find_spec(MODULES[name]) is None:
            raise InputError(f"trackers: {name} is not installed; pip install 'adaptrm[{name}]', or leave it out")
    if "tensorboard" in names and not paths.is_local(out):
        raise InputError(f"trackers: tensorboard writes to a local run folder, not to {out}; leave it out")


@contextmanager
def open_metrics(out: str | os.PathLike, options: TrainOptions, start: int) -> Iterator[MetricsLog]:
    """The run's metrics, and the trackers that get the same numbers.

    Args:
        start: the run goes on after this step.
    """
    file = paths.join(out, ID)
    if options.trackers and not paths.exists(file):
        paths.write_bytes(file, secrets.token_hex(4).encode())
    with ExitStack() as opened:
        trackers = []
        for name in dict.fromkeys(options.trackers):
            known_as = paths.read_bytes(file).decode()
            try:
                trackers.append(opened.enter_context(OPEN[name](out, known_as, shown_options(options), start)))
            except InputError:
                raise
            except Exception as wrong:
                reason = f"{type(wrong).__name__}: {str(wrong)[:200]!r}"
                raise InputError(f"trackers: {name} cannot start: {reason}; mend that, or leave it out") from None
        yield opened.enter_context(MetricsLog(paths.join(out, "metrics.jsonl"), start, trackers))


def shown_options(options: TrainOptions) -> dict[str, Any]:
    """Dotted options without those that hold paths and names."""
    shown: dict[str, Any] = {}

    def walk(section: Mapping[str, Any], outer: str) -> None:
        for name, value in section.items():
            if isinstance(value, dict):
                walk(value, f"{outer}{name}.")
            elif isinstance(value, bool | int | float | str) and outer + name not in TEXTS:
                shown[outer + name] = value

    walk(asdict(options), "")
    return shown


@contextmanager
def _tensorboard(out: str | os.PathLike, _: str, options: Mapping[str, Any], start: int) -> Iterator[Log]:
    from tensorboardX import SummaryWriter

    # What an earlier attempt wrote after this step is passed over.
    purged = start + 1 if start else None
    folder = os.path.join(paths.here(out), "tensorboard")
    with SummaryWriter(folder, purge_step=purged, flush_secs=10, filename_suffix=f".{start}") as writer:
        if not start:
            writer.add_text("options", "\n".join(f"    {name}: {value}" for name, value in options.items()))

        def log(step: int, numbers: Mapping[str, float]) -> None:
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)

        yield log


@contextmanager
def _wandb(out: str | os.PathLike, known_as: str, options: Mapping[str, Any], _: int) -> Iterator[Log]:
    import wandb

    # Neither what is printed (it names examples) nor code, git remotes or the command line leave this machine.
    settings = wandb.Settings(console="off", disable_code=True, disable_git=True, x_disable_meta=True, quiet=True)
    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=_name(out),
            id=known_as,
            resume="allow",
            dir=str(paths.here(out)) if paths.is_local(out) else None,
            config=dict(options),
            settings=settings,
        )
    except wandb.Error as wrong:
        reason = str(wrong).splitlines()[0]
        raise InputError(f"trackers: wandb: {reason}; run wandb login, or set WANDB_MODE=offline") from None
    try:
        # By the step as a number like others: wandb's own count refuses the steps that a restored run repeats.
        run.define_metric("*", step_metric="step")
        yield lambda step, numbers: run.log({"step": step, **numbers})
    finally:
        run.finish()


@contextmanager
def _trackio(out: str | os.PathLike, known_as: str, options: Mapping[str, Any], _: int) -> Iterator[Log]:
    import trackio

    with redirect_stdout(sys.stderr):  # stdout is for results
        trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=f"{_name(out)}-{known_as}",
            resume="allow",
            config=dict(options),
            embed=False,
        )
    try:
        yield lambda step, numbers: trackio.log(dict(numbers), step=step)
    finally:
        with redirect_stdout(sys.stderr):
            trackio.finish()


def _name(out: str | os.PathLike) -> str:
    return Path(str(out).rstrip("/")).name


OPEN = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}
