"""Progress of long work on stderr: a bar with rate and end time on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from adaptrm.errors import printable

SECONDS_BETWEEN_LINES = 15.0
_silent = False


def silence() -> None:
    """From now on this process says nothing: others do the same work, and the first of them says it."""
    global _silent
    _silent = True


def is_silent() -> bool:
    return _silent


class Progress:
    """Counts up to a total."""

    def __init__(self, what: str, unit: str, total: int, bar=None, shown: bool = True):
        self._visible = shown
        self._what, self._unit, self._total, self._bar = what, unit, total, bar
        self._done, self._start, self._shown = 0, time.monotonic(), time.monotonic()

    def advance(self, count: int, note: str = "") -> None:
        """Add to what is done; ``note`` is shown beside it."""
        self._done += count
        if not self._visible:
            return
        if self._bar is not None:
            rich_bar, task = self._bar
            rich_bar.update(task, advance=count, note=note)
            return
        now = time.monotonic()
        if now - self._shown >= SECONDS_BETWEEN_LINES or self._done >= self._total:
            self._shown = now
            rate = self._done / max(now - self._start, 1e-9)
            left = (self._total - self._done) / max(rate, 1e-9)
            at = f"{self._done}/{self._total} {self._unit}, {rate:.1f}/s"
            print(f"{self._what}: {at}, {left:.0f} s left{', ' + note if note else ''}", file=sys.stderr, flush=True)


@contextmanager
def progress(what: str, unit: str, total: int, shown: bool = True) -> Iterator[Progress]:
    """Show progress while the block runs."""
    if not shown or _silent:
        yield Progress(what, unit, total, shown=False)
        return
    if not sys.stderr.isatty():
        yield Progress(what, unit, total)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
    with Bar(*columns, *times, console=Console(stderr=True)) as bar:
        yield Progress(what, unit, total, (bar, bar.add_task(what, total=total, note="")))


def say(text: str) -> None:
    """One line about what is going on, on stderr."""
    if not _silent:
        print(printable(text), file=sys.stderr, flush=True)
