"""Checkpoints at a remote address: Orbax writes here, whole checkpoints are copied up, the latest comes down."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from adaptrm import paths
from adaptrm.config import CheckpointOptions

COMMIT = "commit_success.txt"  # as Orbax marks what is whole where nothing can be renamed
TRAINING_ONLY = "optimizer/"  # twice the size of the parameters


def latest(folder: str | os.PathLike) -> int | None:
    """The newest step whose checkpoint is whole."""
    return max((step for step, names in _steps(folder).items() if COMMIT in names), default=None)


def bring(folder: str | os.PathLike, step: int, to: Path, training: bool) -> None:
    """Copy a checkpoint into a local folder; without ``training`` not what only training needs."""
    names = [name for name in _steps(folder)[step] if training or not name.startswith(TRAINING_ONLY)]
    paths.fetch(paths.join(folder, str(step)), names, to / str(step))


def kept(steps: Iterable[int], options: CheckpointOptions, scores: Mapping[int, float]) -> set[int]:
    """Of the steps with checkpoints the newest few, and with ``keep_best`` that of the best score (of equal ones the
    newest). A step without a score is one that was saved on a stop: it is the newest until its score is known."""
    steps = sorted(steps)
    scored = [step for step in steps if step in scores] if options.keep_best else []
    best = max(scored, key=lambda step: (scores[step], step), default=None)
    return {*steps[-options.keep :], *([] if best is None else [best])}


def send(
    source: Path, folder: str | os.PathLike, step: int, options: CheckpointOptions, scores: Mapping[int, float]
) -> None:
    """Copy a checkpoint up, its mark last; then delete all whole ones but those that are ``kept``."""
    _remove(folder, step, _steps(folder).get(step, []))  # what a killed process left of it
    (source / str(step) / COMMIT).touch()
    paths.send(source / str(step), paths.join(folder, str(step)), last=COMMIT)
    steps = _steps(folder)
    whole = (step for step, names in steps.items() if COMMIT in names)
    for old in steps.keys() - kept(whole, options, scores):
        _remove(folder, old, steps[old])


def _steps(folder: str | os.PathLike) -> dict[int, list[str]]:
    """Step -> names of the files of its checkpoint, whole or not."""
    steps: dict[int, list[str]] = {}
    for name in paths.files(folder, deep=True):
        step, _, inner = name.partition("/")
        if step.isdecimal() and inner:
            steps.setdefault(int(step), []).append(inner)
    return steps


def _remove(folder: str | os.PathLike, step: int, names: list[str]) -> None:
    """Delete a checkpoint, its mark first: a part of one never counts."""
    paths.remove(paths.join(folder, str(step)), sorted(names, key=lambda name: name != COMMIT))
