"""Gold: which response of a pair people said is the better one."""

import os
from typing import NamedTuple

from adaptrm.data.preferences import check_response
from adaptrm.data.rows import Row, read_rows
from adaptrm.errors import InputError

PREFERRED = {"a": 1, "b": -1, "tie": 0}


class Verdict(NamedTuple):
    """What people said of a pair.

    Attributes:
        preferred: +1 for response A, -1 for B, 0 where neither is better.
        reason: why they were asked, in a file of ``label --review``.
    """

    preferred: int
    reason: str | None = None


def read_gold(path: str | os.PathLike) -> dict[str, int]:
    """Verdicts by the pair's id: +1 where A is the better response, -1 for B, 0 for a tie; see ``read_verdicts``."""
    return {pair: verdict.preferred for pair, verdict in read_verdicts(path).items()}


def read_verdicts(path: str | os.PathLike) -> dict[str, Verdict]:
    """Verdicts by the pair's id, in memory.

    Args:
        path: JSONL or Parquet, rows with ``id`` and ``preferred`` (a, b, tie, or null where nobody said: left out).
            A file of ``label --review`` is one, and so are pairs with these columns.

    Raises:
        InputError: a row is no verdict or comes twice (names the line), or no row has any.
    """
    verdicts: dict[str, Verdict] = {}
    for where, row in read_rows(path):
        at = f"{path}: {where}"
        if _preferred(row, at) is None:
            continue
        if row.get("id") is None:
            raise InputError(f"{at}: has no id; a verdict needs the id of its pair, as labels and reviews have it")
        pair = check_response(str(row["id"]), "id", at)
        if pair in verdicts:
            raise InputError(f"{at}: the id {pair!r} is repeated; a pair has one verdict")
        reason = row.get("reason")
        verdicts[pair] = Verdict(PREFERRED[row["preferred"]], reason if isinstance(reason, str) else None)
    if not verdicts:
        raise InputError(f"{path}: holds no verdict; fill in preferred: a, b or tie")
    return verdicts


def _preferred(row: Row, at: str) -> str | None:
    if "preferred" not in row:
        raise InputError(f"{at}: has no preferred; a verdict is a, b or tie, and null where nobody said")
    preferred = row["preferred"]
    if preferred is not None and (not isinstance(preferred, str) or preferred not in PREFERRED):
        raise InputError(f"{at}: preferred is {preferred!r}; it must be a, b, tie or null")
    return preferred
