"""Checkpoints of the training state, by Orbax: asynchronous, whole or not at all, restored onto any mesh."""

import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from adaptrm import paths
from adaptrm.config import CheckpointOptions
from adaptrm.errors import InputError
from adaptrm.parallel.distributed import exchanged
from adaptrm.progress import say
from adaptrm.train import remote
from adaptrm.train.state import TrainState
from adaptrm.watchdog import LOADING, doing

logging.getLogger("absl").setLevel(logging.CRITICAL)  # its errors are raised too
METADATA = "_CHECKPOINT_METADATA"  # as Orbax names it
TORN = ".torn"


def find(path: str | os.PathLike) -> tuple[str, int | None]:
    """Folder of checkpoints and step of what a user names: a run (its newest whole one), or ``RUN/checkpoints/STEP``.

    Returns:
        The step is None where a run has no whole checkpoint. The same on every process, as the first one sees it: a run
        may be going on meanwhile.
    """
    folder, _, name = str(path).rstrip("/").rpartition("/")
    if name.isdecimal() and paths.exists(paths.join(path, METADATA)):
        return folder, int(name)
    folder = paths.join(path, "checkpoints")
    return folder, exchanged(latest_step(folder))[0]


def latest_step(folder: str | os.PathLike) -> int | None:
    """The newest step whose checkpoint in a ``checkpoints/`` folder is whole."""
    if not paths.is_local(folder):
        return remote.latest(folder)
    return max((step for step in _steps(folder) if _is_whole(paths.here(folder) / str(step))), default=None)


def stored_config(checkpoint: str | os.PathLike) -> str:
    """The ``config.yaml`` of the run that a checkpoint is of.

    Raises:
        InputError: this is no checkpoint of ours.
    """
    try:
        return json.loads(paths.read_bytes(paths.join(checkpoint, METADATA)))["custom_metadata"]["config"]
    except (ValueError, KeyError, TypeError, RecursionError):  # InputError is a ValueError
        raise InputError(f"{checkpoint}: not a run folder, and not a checkpoint of adaptrm train") from None


def _steps(folder: str | os.PathLike) -> list[int]:
    return [int(name) for name in paths.names(folder) if name.isdecimal()]


def _is_whole(checkpoint: Path) -> bool:
    """Whether every part that a checkpoint lists is there: Orbax renames a folder once it is whole, but a disk that
    lost its power and a copy that was interrupted leave others."""
    try:
        stored = json.loads((checkpoint / METADATA).read_bytes())
        parts = [checkpoint / item for item in stored["item_handlers"]]
        return bool(stored["commit_timestamp_nsecs"]) and all(any(part.iterdir()) for part in parts)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


@dataclass(frozen=True)
class _Policy:
    """``remote.kept`` as Orbax asks for it."""

    options: CheckpointOptions
    scores: Mapping[int, float]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        kept = remote.kept((checkpoint.step for checkpoint in checkpoints), self.options, self.scores)
        return [checkpoint.step in kept for checkpoint in checkpoints]


class Checkpoints:
    """The ``checkpoints/`` folder of a run; each holds parameters, optimizer state, the data position and the config.

    At a remote address Orbax writes to a temporary folder here, and what is whole is copied up by a thread of its own.

    Args:
        options: None to read the parameters alone.
        config: what ``config.yaml`` says.
        step: what is restored; the newest whole one without it.

    Attributes:
        step: what is restored; None where there is nothing.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        options: CheckpointOptions | None = None,
        config: str = "",
        step: int | None = None,
    ):
        self.folder, self._options, self._config = folder, options, config
        self.step = exchanged(latest_step(folder))[0] if step is None else step
        self._ends, self._sender = ExitStack(), None
        self._sent: Future | None = None
        self._scores: dict[int, float] = {}
        if paths.is_local(folder):
            self._here, policy = paths.here(folder).absolute(), options and _Policy(options, self._scores)
            if options:
                self._put_aside()
        else:
            staging = tempfile.TemporaryDirectory(prefix="adaptrm-", ignore_cleanup_errors=True)
            self._here, policy = Path(self._ends.enter_context(staging)), _Policy(CheckpointOptions(keep=1), {})
            if self.step is not None:
                doing(f"bringing step {self.step} here", at_least=LOADING)
                remote.bring(folder, self.step, self._here, training=options is not None)
            self._sender = self._ends.enter_context(ThreadPoolExecutor(1))
        # What a kill in the middle of a save leaves is as large as a checkpoint: it is cleaned up.
        self._checkpointer = ocp.training.Checkpointer(
            self._here, preservation_policy=policy, cleanup_tmp_directories=options is not None
        )
        self._ends.callback(self._checkpointer.close)
        self._ends.callback(self._wait)

    def _put_aside(self) -> None:
        """Rename what passes for a checkpoint and is not whole: it would be in the way when its step comes.

        One older than the newest whole one was being deleted when the process was killed.
        """
        if jax.process_index() == 0:
            for step in _steps(self.folder):
                torn, aside = self._here / str(step), self._here / f"{step}{TORN}"
                if _is_whole(torn):
                    continue
                with self._told():
                    if self.step is not None and step < self.step:
                        shutil.rmtree(torn)
                        continue
                    say(f"{self.folder}/{step}: is no whole checkpoint; not used, now {aside.name}")
                    shutil.rmtree(aside, ignore_errors=True)
                    torn.rename(aside)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("torn checkpoints are put aside")

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        doing("saving what is not saved yet", at_least=LOADING)
        with self._told():
            self._ends.close()

    def save(self, step: int, state: TrainState, scores: Mapping[int, float]) -> None:
        """Save in the background; the checkpoint counts once it is whole.

        Args:
            scores: how good the model was on held-out examples after each step where that is known, higher is better.
        """
        self._scores.update(scores)
        doing(f"saving step {step}", at_least=LOADING)
        told = {"custom_metadata": {"config": self._config}}
        with self._told():  # here too of the one before, which was written in the background
            self._wait()
            saved = self._checkpointer.save_checkpointables_async(step, _plain(state), force=True, **told)
        if self._sender is not None:
            self._sent = self._sender.submit(self._send, saved, step, dict(scores))

    def _send(self, saved, step: int, scores: Mapping[int, float]) -> None:
        saved.result()
        remote.send(self._here, self.folder, step, self._options, scores)

    def _wait(self) -> None:
        """Wait until the checkpoint before has been copied up, so that it is not deleted here before that."""
        if self._sent is not None:
            self._sent.result()

    @contextmanager
    def _told(self) -> Iterator[None]:
        """One line for a disk that refuses; tensorstore tells of it in a ``ValueError`` of many lines."""
        try:
            yield
        except (OSError, ValueError) as wrong:
            by_disk = re.search(r"([^:]+) \[os_error_code", str(wrong))
            if isinstance(wrong, InputError) or not (by_disk or isinstance(wrong, OSError)):
                raise
            reason = by_disk[1].strip() if by_disk else wrong.strerror or wrong
            mend = (
                paths.WRITE[1] if paths.is_local(self.folder) else f"free space in {self._here.parent}, or set TMPDIR"
            )
            raise InputError(f"{self.folder}: a checkpoint cannot be written: {reason}; {mend}") from None

    def restore(self, like: TrainState) -> TrainState:
        """The state of ``step``, onto the shardings of ``like``."""
        abstract = jax.tree.map(_shape_of, _plain(like._replace(step=0, skipped=0)))
        plain = self._load(abstract)
        opt_state = jax.tree.unflatten(jax.tree.structure(like.opt_state), plain["optimizer"])
        step, skipped = (
            jax.device_put(np.int32(plain["position"][name]), like.step.sharding) for name in ("step", "skipped")
        )
        return TrainState(step, _fill(like.params, plain["params"]), opt_state, skipped, like.frozen)

    def restore_params(self, like: nnx.State) -> nnx.State:
        """The parameters of ``step`` alone; ``like`` holds shapes with shardings."""
        return _fill(like, self._load({"params": jax.tree.map(_shape_of, _by_name(like))})["params"])

    def _load(self, abstract: dict) -> dict:
        doing(f"restoring step {self.step}", at_least=LOADING)
        try:
            return self._checkpointer.load_checkpointables(self.step, abstract)
        except (OSError, ValueError, KeyError) as wrong:
            reason, mend = str(wrong).splitlines()[0], "without it the one before is used"
            raise InputError(f"{self.folder}/{self.step}: broken, or of another model: {reason}; {mend}") from None


def _plain(state: TrainState) -> dict:
    """The state under names that outlive our classes."""
    return {
        "params": _by_name(state.params),
        "optimizer": jax.tree.leaves(state.opt_state),
        "position": {"step": int(state.step), "skipped": int(state.skipped)},
    }


def _by_name(params: nnx.State) -> dict[str, jax.Array]:
    return {".".join(map(str, path)): param.get_value() for path, param in nnx.to_flat_state(params)}


def _fill(params: nnx.State, values: dict[str, jax.Array]) -> nnx.State:
    return nnx.from_flat_state(
        [(path, param.replace(values[".".join(map(str, path))])) for path, param in nnx.to_flat_state(params)]
    )


def _shape_of(leaf):
    if isinstance(leaf, int):
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
