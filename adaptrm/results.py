"""What a command found out, on stdout."""

import json
from typing import Any

from adaptrm.errors import printable
from adaptrm.progress import is_silent


def show(result: dict[str, Any], as_json: bool) -> None:
    """Print it: JSON for machines, a table for people; of several processes the first does."""
    if is_silent():
        return
    picture = result.pop("table", None)
    if as_json:
        print(json.dumps(result))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in result.items():
        shown = Text("\n".join(map(printable, _lines(value))))  # names of files are no markup
        table.add_row(name.replace("_", " "), shown)
    console.print(table)
    if picture is not None:
        console.print(picture)


def _lines(value: Any) -> list[str]:
    """A value as lines: each entry of a dictionary is one."""
    if isinstance(value, dict) and value:
        return [f"{k}: {_readable(v)}" for k, v in value.items()]
    return [_readable(value)]


def _readable(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{k}: {_readable(v)}" for k, v in value.items()) or "none"
    if isinstance(value, list):
        interval = len(value) == 2 and all(isinstance(v, float) for v in value)
        return (" to " if interval else ", ").join(map(_readable, value)) or "none"
    return "none" if value is None else str(value)
