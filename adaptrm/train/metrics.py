"""``metrics.jsonl``: one line a logged step, cut on resume so that no step stands twice."""

import io
import json
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

from adaptrm import paths
from adaptrm.progress import say


def read_metrics(path: str | os.PathLike, last: int) -> list[dict[str, Any]]:
    """The lines up to a step."""
    if not paths.exists(path):
        return []
    lines = []
    for line in paths.read_bytes(path).decode().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:  # the line that a killed process was writing
            break
    return [line for line in lines if line["step"] <= last]


class MetricsLog:
    """Appends lines to a run's metrics; an object store, which cannot append, gets them all at each ``flush``.

    Args:
        start: the run goes on after this step; later lines of an earlier attempt are cut.
        trackers: get each line too, as a step and its numbers.
    """

    def __init__(self, path: str | os.PathLike, start: int, trackers: Sequence[Callable[[int, dict], None]] = ()):
        self._path, self._trackers = path, list(trackers)
        kept = "".join(json.dumps(line) + "\n" for line in read_metrics(path, start)).encode()
        paths.write_bytes(path, kept)
        # Without a buffer: what a full disk refuses is told where it is written, and a kill loses no line.
        self._stream = open(path, "ab", buffering=0) if paths.is_local(path) else io.BytesIO(kept)  # noqa: SIM115
        self._stream.seek(0, os.SEEK_END)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None or issubclass(kind, Exception):  # after an interrupt others may hold the folder
            self.flush()
        self._stream.close()

    def write(self, line: dict[str, Any]) -> None:
        """Numbers that JSON does not know (infinite, or none at all) become null."""
        line = {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in line.items()}
        with paths.told(self._path, *paths.WRITE):
            self._stream.write((json.dumps(line) + "\n").encode())
        numbers = {name: x for name, x in line.items() if name != "step" and isinstance(x, int | float)}
        for tracker in list(self._trackers):
            try:
                tracker(line["step"], numbers)
            except Exception as wrong:  # somebody else's code, somebody else's service: no reason to end a training
                self._trackers.remove(tracker)
                say(f"warning: a tracker failed and is told no more: {type(wrong).__name__}: {str(wrong)[:200]!r}")

    def flush(self) -> None:
        """Bring a store's copy up to date."""
        if not paths.is_local(self._path):
            paths.write_bytes(self._path, self._stream.getvalue())
