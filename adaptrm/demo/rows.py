"""JSON lines of the demo's files."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from adaptrm import paths
from adaptrm.data.preferences import Pair


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with paths.writing(path) as stream:
        for row in rows:
            stream.write((json.dumps(row) + "\n").encode())


def write_pairs(path: Path, pairs: Iterable[Pair]) -> None:
    write_rows(path, (vars(pair) | {"prompt": [dict(message) for message in pair.prompt]} for pair in pairs))
