"""Scores that people already have, as a source of scores: ``--judge table:FILE``."""

import math
import os
import re
import tempfile
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from adaptrm import paths
from adaptrm.data.preferences import Pair, check_response, hash_id
from adaptrm.data.rows import read_rows
from adaptrm.data.scores import Scores
from adaptrm.errors import InputError
from adaptrm.rules import RulePool

PREFIX = "table:"
SIDES = ("a", "b")


class Table:
    """One row for each pair's id and side (a, b), and a column for each rule.

    The values lie in a temporary file; in memory stays a hash and a row number a row.

    Args:
        columns: ``RULE=COLUMN``, several by commas, where a rule's column is not called like the rule; a dotted
            column is looked for inside objects and lists (``scores.gpt4.0``).
        value_range: ``LO,HI``, mapped linearly to [-1, 1].

    Raises:
        InputError: a row is not of this form, stands twice, or a value is missing, no number or out of range.
    """

    def __init__(
        self, file: str | os.PathLike, rules: RulePool, columns: Sequence[str] = (), value_range: str = "-1,1"
    ):
        self.file, self.rules = str(file), rules
        self.columns = _columns(columns, rules)
        self.low, self.high = _range(value_range)
        self._rows: dict[int, int] = {}
        store = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the memory map
        for where, row in read_rows(file):
            at = f"{self.file}: {where}"
            if row.get("id") is None or row.get("side") not in SIDES:
                raise InputError(f"{at}: needs id (of the pair) and side (a or b)")
            key = _key(check_response(str(row["id"]), "id", at), row["side"])
            if key in self._rows:
                raise InputError(f"{at}: pair {row['id']!r}, side {row['side']} is repeated; it has one row")
            self._rows[key] = len(self._rows)
            scores = array("f", [self._score(row, rule, at) for rule in rules.ids])
            with paths.told(tempfile.gettempdir(), "cannot hold the table", "free space, or set TMPDIR"):
                scores.tofile(store)
        if not self._rows:
            raise InputError(f"{self.file}: holds no rows")
        with paths.told(tempfile.gettempdir(), "cannot hold the table", "free space, or set TMPDIR"):
            store.flush()
        self._values = np.memmap(store, np.float32, "r", shape=(len(self._rows), len(rules)))
        self._signs = np.array([rule.sign for rule in rules], np.float32)

    def __len__(self) -> int:
        return len(self._rows)

    def _score(self, row: Mapping[str, Any], rule: str, at: str) -> float:
        """The value of one rule, in [-1, 1]."""
        column = self.columns[rule]
        value = _look_up(row, column)
        if value is None:
            raise InputError(f"{at}: has no value in column {column!r}; name the column with --columns {rule}=COLUMN")
        if not isinstance(value, int | float) or not self.low <= value <= self.high:
            raise InputError(
                f"{at}: {column} is {value!r}; it must be a number from {self.low:g} to {self.high:g} (--range LO,HI)"
            )
        return min(1.0, max(-1.0, 2 * (value - self.low) / (self.high - self.low) - 1))

    def check(self, pairs: Iterable[Pair]) -> None:
        """Raise ``InputError`` where a pair has no row."""
        for pair in pairs:
            self._find(pair)

    def _find(self, pair: Pair) -> list[int]:
        rows = [self._rows.get(_key(pair.id, side)) for side in SIDES]
        if None in rows:
            side = SIDES[rows.index(None)]
            raise InputError(f"{self.file}: has no row with id {pair.id!r} and side {side}; add it, or drop the pair")
        return rows

    def score(self, pairs: Sequence[Pair]) -> Scores:
        """The scores of some pairs, the rules' signs applied; relevance and label mass 1, log-odds not known (nan)."""
        found = np.array([self._find(pair) for pair in pairs]).reshape(len(pairs), 2)
        both = np.asarray(self._values[found]) * self._signs
        one, unknown = (
            np.ones((len(pairs), len(self.rules)), np.float32),
            np.full((len(pairs), len(self.rules)), np.nan),
        )
        unknown = unknown.astype(np.float32)
        ids, rules = [pair.id for pair in pairs], list(self.rules.ids)
        return Scores(ids, rules, both[:, 0], both[:, 1], one, unknown, unknown, one, one)

    def describe(self) -> dict[str, Any]:
        """What the manifest of a score folder says of where the scores come from."""
        return {
            "model_sha256": {"table": paths.sha256(self.file)},
            "template": None,
            "columns": self.columns,
            "range": [self.low, self.high],
            "answer_token_ids": {},
            "answer_spellings_skipped": [],
        }


def _key(pair_id: str, side: str) -> int:
    return hash_id(f"{side}:{pair_id}")


def _columns(given: Sequence[str], rules: RulePool) -> dict[str, str]:
    columns = {rule: rule for rule in rules.ids}
    for entry in (entry for several in given for entry in re.split(r",(?=[\w.-]+=)", several)):
        rule, equals, column = entry.partition("=")
        if not equals or not column:
            raise InputError(f"--columns {entry}: must be RULE=COLUMN")
        rules.index([rule], f"--columns {entry}")
        columns[rule] = column
    return columns


def _range(text: str) -> tuple[float, float]:
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        low = high = math.nan
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise InputError(f"--range {text}: must be two numbers LO,HI with LO below HI, such as 1,5")
    return low, high


def _look_up(row: Any, column: str) -> Any:
    """A column by its whole name, or by dotted parts inside objects and lists; None where there is none."""
    if isinstance(row, Mapping) and column in row:
        return row[column]
    outer, dot, rest = column.partition(".")
    if not dot:
        return row[int(outer)] if isinstance(row, list) and outer.isdecimal() and int(outer) < len(row) else None
    return _look_up(_look_up(row, outer), rest)
