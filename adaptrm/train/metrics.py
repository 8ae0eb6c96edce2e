"""``metrics.jsonl``: one line a logged step, cut on resume so that no step stands twice."""

import json
import os
from pathlib import Path
from typing import Any


class MetricsLog:
    """Appends lines to a run's metrics.

    Args:
        start: the run goes on after this step; later lines of an earlier attempt are cut.
    """

    def __init__(self, path: str | os.PathLike, start: int):
        self._path = Path(path)
        kept = [line for line in self._lines() if line["step"] <= start]
        partial = self._path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(partial, self._path)
        self._stream = self._path.open("a", encoding="utf-8")

    def _lines(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        lines = []
        for line in self._path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:  # the line that a killed process was writing
                break
        return lines

    def write(self, line: dict[str, Any]) -> None:
        self._stream.write(json.dumps(line) + "\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()
