"""Markdown of texts from outside: names of files, models, subsets and tokens stay text."""

import re
from collections.abc import Sequence

from adaptrm import paths
from adaptrm.data.rows import hub_name
from adaptrm.errors import printable

# What Markdown would read as more than text, and what it would make a link or a mention of.
MARKUP = re.compile(r"[\\`*_{}\[\]()<>#|~$&!:@]|(?<=www)\.", re.IGNORECASE)
LONGEST = 200  # characters of a text from outside


def one_line(text: str) -> str:
    """A text without line ends and what cannot be printed, not too long."""
    shown = printable(text)
    return shown if len(shown) <= LONGEST else f"{shown[:LONGEST]}..."


def plain(text: str) -> str:
    """A text as Markdown that shows just that, on one line."""
    return MARKUP.sub(r"\\\g<0>", one_line(text))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of Markdown under a header; all columns but the first are numbers."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def on_hub(model: str) -> bool:
    """Whether this names a model on the hub, not a path."""
    return model.count("/") == 1 and not paths.exists(model)


def model_name(path: str) -> str:
    """What a model may be called in public: not its folders, but the run where it is of one; a hub name is itself."""
    parts = path.rstrip("/").split("/")
    shown = 2 if on_hub(path) or parts[-1] == "export" else 3 if parts[-2:-1] == ["checkpoints"] else 1
    return "/".join(parts[-shown:])


def data_name(source: str) -> str:
    """What a data set may be called in public: the name of its file, or that on the hub."""
    return source if hub_name(source) else source.rstrip("/").rpartition("/")[2]
