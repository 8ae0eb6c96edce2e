"""Checkpoints of the training state, by Orbax: asynchronous, whole or not at all, restored onto any mesh."""

import logging
import os
import re
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from orbax.checkpoint import v1 as ocp

from adaptrm import paths
from adaptrm.errors import InputError
from adaptrm.train import remote
from adaptrm.train.state import TrainState

logging.getLogger("absl").setLevel(logging.CRITICAL)  # its errors are raised too


class Checkpoints:
    """The ``checkpoints/`` folder of a run; each holds parameters, optimizer state and the data position.

    At a remote address Orbax writes to a temporary folder here, and what is whole is copied up by a thread of its own.

    Args:
        training: False to read the parameters alone.
    """

    def __init__(self, folder: str | os.PathLike, keep: int = 1, training: bool = True):
        self.folder, self._keep = folder, keep
        self._ends, self._sender = ExitStack(), None
        self._sent: Future | None = None
        if paths.is_local(folder):
            self._here = paths.here(folder).absolute()
        else:
            staging = tempfile.TemporaryDirectory(prefix="adaptrm-", ignore_cleanup_errors=True)
            self._here = Path(self._ends.enter_context(staging))
            if (step := remote.latest(folder)) is not None:
                remote.bring(folder, step, self._here, training)
            self._sender, keep = self._ends.enter_context(ThreadPoolExecutor(1)), 1
        self._checkpointer = ocp.training.Checkpointer(
            self._here, preservation_policy=ocp.training.preservation_policies.LatestN(keep)
        )
        self._ends.callback(self._checkpointer.close)
        self._ends.callback(self._wait)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        with self._told():
            self._ends.close()

    @property
    def latest_step(self) -> int | None:
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, step: int, state: TrainState) -> None:
        """Save in the background; the checkpoint counts once it is whole."""
        with self._told():  # here too of the one before, which was written in the background
            self._wait()
            saved = self._checkpointer.save_checkpointables_async(step, _plain(state), force=True)
        if self._sender is not None:
            self._sent = self._sender.submit(self._send, saved, step)

    def _send(self, saved, step: int) -> None:
        saved.result()
        remote.send(self._here, self.folder, step, self._keep)

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
        """The latest state, onto the shardings of ``like``."""
        abstract = jax.tree.map(_shape_of, _plain(like))
        plain = self._load(abstract)
        opt_state = jax.tree.unflatten(jax.tree.structure(like.opt_state), plain["optimizer"])
        step, skipped = (
            jax.device_put(np.int32(plain["position"][name]), like.step.sharding) for name in ("step", "skipped")
        )
        return TrainState(step, _fill(like.params, plain["params"]), opt_state, skipped)

    def restore_params(self, like: nnx.State) -> nnx.State:
        """The parameters of the latest checkpoint alone; ``like`` holds shapes with shardings."""
        return _fill(like, self._load({"params": jax.tree.map(_shape_of, _by_name(like))})["params"])

    def _load(self, abstract: dict) -> dict:
        try:
            return self._checkpointer.load_checkpointables(None, abstract)
        except (ValueError, KeyError) as wrong:
            reason = str(wrong).splitlines()[0]
            raise InputError(f"{self.folder}: the checkpoint does not fit this model: {reason}") from None


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
