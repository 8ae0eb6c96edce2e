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

    def __init__(self, what: str, unit: str, total: int, done: int = 0, bar=None, shown: bool = True):
        self._visible = shown
        self._what, self._unit, self._total, self._bar = what, unit, total, bar
        self._done, self._shown = done, time.monotonic()
        self._since: tuple[float, int] | None = None

    def advance(self, count: int, note: str = "") -> None:
        """Add to what is done; ``note`` is shown beside it."""
        self._done += count
        if not self._visible:
            return
        now = time.monotonic()
        if self._since is None:  # what comes first is compiled first, which says nothing of the rest
            self._since = now, self._done
        pace = self._pace(now)
        if self._bar is not None:
            rich_bar, task = self._bar
            rich_bar.update(task, completed=self._done, pace=pace, note=note)
        elif now - self._shown >= SECONDS_BETWEEN_LINES or self._done >= self._total:
            self._shown = now
            parts = (f"{self._done}/{self._total} {self._unit}", pace, note)
            print(f"{self._what}: {', '.join(filter(None, parts))}", file=sys.stderr, flush=True)

    def _pace(self, now: float) -> str:
        """Rate and end time, as soon as they are known."""
        began, before = self._since
        rate = (self._done - before) / max(now - began, 1e-9)
        if not rate:
            return ""
        pace = f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each"
        left = (self._total - self._done) / rate
        if left <= 0:
            return pace
        day = "%a " if left > 12 * 3600 else ""
        return f"{pace}, ends {time.strftime(f'{day}%H:%M:%S', time.localtime(time.time() + left))}"


@contextmanager
def progress(what: str, unit: str, total: int, shown: bool = True, done: int = 0) -> Iterator[Progress]:
    """Show progress while the block runs.

    Args:
        done: so many of the total were done before.
    """
    if not shown or _silent:
        yield Progress(what, unit, total, done, shown=False)
        return
    if not sys.stderr.isatty():
        yield Progress(what, unit, total, done)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    count = (TextColumn("{task.description}"), BarColumn(bar_width=16), MofNCompleteColumn(), TextColumn(unit))
    fields = (TextColumn("{task.fields[pace]}"), TextColumn("{task.fields[note]}"))
    with Bar(*count, *fields, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total, completed=done, pace="compiling the first", note="")
        yield Progress(what, unit, total, done, (bar, task))


def say(text: str) -> None:
    """One line about what is going on, on stderr."""
    if not _silent:
        print(printable(text), file=sys.stderr, flush=True)
