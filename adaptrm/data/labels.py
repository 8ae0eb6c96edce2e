"""Label files: which response of a pair is chosen, by which rules; and rule labels that people gave."""

import json
import os
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from adaptrm import paths
from adaptrm.data.preferences import Pair, check_prompt, check_reply, check_response, hash_id, margin_of
from adaptrm.data.rows import BadRows, Row, read_rows
from adaptrm.data.seen import Seen
from adaptrm.errors import InputError


@dataclass(frozen=True)
class Label:
    """One line of a label file.

    Attributes:
        rules: ids of the rules that decided.
        rule_margin: sum of the selected score differences, chosen minus rejected.
        probability: that chosen is the better one, at least .5.
        margin: by how much chosen should win in the loss, where the file says so.
    """

    id: str
    prompt: tuple[Mapping[str, str], ...]
    chosen: str
    rejected: str
    rules: tuple[str, ...]
    rule_margin: float
    probability: float
    margin: float | None = None

    def to_row(self) -> dict[str, Any]:
        """TRL's conversational form."""
        return {
            "id": self.id,
            "prompt": [dict(m) for m in self.prompt],
            "chosen": [{"role": "assistant", "content": self.chosen}],
            "rejected": [{"role": "assistant", "content": self.rejected}],
            "rules": list(self.rules),
            "rule_margin": self.rule_margin,
            "probability": self.probability,
        }


def write_labels(path: str | os.PathLike, labels: Iterator[Label]) -> int:
    """Write a label file, JSONL or Parquet by its name, streaming; it appears whole. Returns the number of rows."""
    count, encode = 0, json.JSONEncoder(ensure_ascii=False).encode
    with paths.writing(path) as stream:
        if not str(path).endswith(".parquet"):
            for label in labels:
                stream.write((encode(label.to_row()) + "\n").encode())
                count += 1
            return count
        import pyarrow as pa
        import pyarrow.parquet as pq

        message = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
        schema = pa.schema(
            [
                ("id", pa.string()),
                *((name, message) for name in ("prompt", "chosen", "rejected")),
                ("rules", pa.list_(pa.string())),
                ("rule_margin", pa.float64()),
                ("probability", pa.float64()),
            ]
        )
        with pq.ParquetWriter(stream, schema) as writer:
            rows: list[dict] = []
            for label in labels:
                rows.append(label.to_row())
                count += 1
                if len(rows) == 1024:
                    writer.write_table(pa.Table.from_pylist(rows, schema))
                    rows = []
            writer.write_table(pa.Table.from_pylist(rows, schema))
    return count


def read_labels(path: str | os.PathLike) -> Iterator[Label]:
    """Stream a label file.

    Raises:
        InputError: a row is not a label; names the line.
    """
    seen = Seen()
    for where, row in read_rows(path):
        at = f"{path}: {where}"
        if row.get("id") is None or not {"prompt", "chosen", "rejected"} <= row.keys():
            raise InputError(f"{at}: needs id, prompt, chosen, rejected; make label files with adaptrm label")
        sides = [check_reply(row[side], side, at) for side in ("chosen", "rejected")]
        key = hash_id(check_response(str(row["id"]), "id", at))
        if key in seen:
            raise InputError(f"{at}: the id {row['id']!r} is repeated; a pair has one label")
        seen.add(key)
        probability = row.get("probability", 1.0)
        if not isinstance(probability, int | float) or not 0.5 <= probability <= 1:
            raise InputError(f"{at}: probability is {probability!r}; it must be .5 to 1")
        rules, margin = row.get("rules") or [], row.get("rule_margin") or 0
        if not isinstance(rules, list) or not isinstance(margin, int | float) or not abs(margin) < 1e9:
            raise InputError(f"{at}: rules must be a list of ids, rule_margin a number below 1e9")
        prompt, rules = check_prompt(row["prompt"], at), tuple(map(str, rules))
        yield Label(str(row["id"]), prompt, *sides, rules, float(margin), float(probability), margin_of(row))


class Preference(NamedTuple):
    """What is said of a pair.

    Attributes:
        sign: +1 where response A is chosen, -1 where B is, 0 where nothing says which.
        probability: that the chosen one is the better one.
        margin: by how much it should win; None where nothing says so.
    """

    sign: int
    probability: float = 1.0
    margin: float | None = None


class LabelIndex:
    """Labels joined to pairs by id; once read, 25 bytes a label in memory, and 4 for each of its rules.

    Args:
        rules_of: the positions of the rules that decided, the same number for each label.
    """

    def __init__(self, path: str | os.PathLike, rules_of: Callable[[Label], Sequence[int]] = lambda label: ()):
        self.path = str(path)
        keys, texts, said, rules = array("Q"), array("Q"), array("f"), array("i")
        for label in read_labels(path):
            rules.extend(rules_of(label))
            keys.append(hash_id(label.id))
            texts.append(hash_id(label.chosen))
            said.extend((label.probability, np.nan if label.margin is None else label.margin))
        order = np.argsort(np.asarray(keys, np.uint64), kind="stable")
        self._keys, self._chosen = np.asarray(keys, np.uint64)[order], np.asarray(texts, np.uint64)[order]
        self._said = np.asarray(said, np.float32).reshape(-1, 2)[order]
        self._rules = np.asarray(rules, np.int32).reshape(len(keys), -1 if keys else 0)[order]
        self._used = np.zeros(len(keys), bool)

    def _at(self, pair: Pair) -> int | None:
        at = int(np.searchsorted(self._keys, np.uint64(hash_id(pair.id))))
        return at if at < len(self._keys) and int(self._keys[at]) == hash_id(pair.id) else None

    def rules(self, pair: Pair) -> list[int]:
        """What ``rules_of`` said of a pair's label; nothing where it has none."""
        at = self._at(pair)
        return [] if at is None else self._rules[at].tolist()

    def preference(self, pair: Pair) -> Preference:
        if (at := self._at(pair)) is None:
            return Preference(0)
        self._used[at] = True
        sides = [hash_id(pair.response_a), hash_id(pair.response_b)]
        if (chosen := int(self._chosen[at])) not in sides:
            raise InputError(
                f"{self.path}: the chosen response of {pair.id!r} is neither response of the pair; label again"
            )
        probability, margin = self._said[at].tolist()
        return Preference(1 if chosen == sides[0] else -1, probability, None if np.isnan(margin) else margin)

    @property
    def unused(self) -> int:
        """Labels whose pair has not come by."""
        return int((~self._used).sum())


@dataclass(frozen=True)
class RuleLabel:
    """People's verdicts on one reply: rule id -> true, false, or None where the rule does not apply."""

    id: str
    prompt: tuple[Mapping[str, str], ...]
    response: str
    labels: Mapping[str, bool | None]


def read_rule_labels(path: str | os.PathLike, bad: BadRows | None = None) -> Iterator[RuleLabel]:
    """Stream a rule-label file ``{id, prompt, response, labels: {rule_id: true|false|null}}``.

    Raises:
        InputError: a row is not one, and ``bad`` (by default always) raises; names the line.
    """
    if str(path).endswith(".parquet"):  # its columns are the same in every row: an absent rule would read as null
        raise InputError(f"{path}: rule labels are JSONL; Parquet cannot tell an absent rule from null")
    bad = bad or BadRows()
    for where, row in read_rows(path, bad):
        try:
            label = _rule_label(row, where, f"{path}: {where}")
        except InputError as wrong:
            bad(wrong)
        else:
            yield label


def _rule_label(row: Row, where: str, at: str) -> RuleLabel:
    labels = row.get("labels")
    if not isinstance(labels, Mapping) or not all(value in (True, False, None) for value in labels.values()):
        raise InputError(f"{at}: labels must map rule ids to true, false or null")
    prompt, response = check_prompt(row.get("prompt"), at), check_response(row.get("response"), "response", at)
    return RuleLabel(str(row.get("id", where)), prompt, response, dict(labels))
