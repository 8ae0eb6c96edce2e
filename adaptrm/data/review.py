"""Pairs for people to look at: what ``label --review`` writes and, filled in, ``--gold`` reads."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from adaptrm import paths
from adaptrm.data.preferences import Pair
from adaptrm.data.scores import Batch
from adaptrm.errors import InputError

# Why a pair is for people: its rules cancel out; its label is not sure enough; its label is not what people preferred.
TIE, ABSTAINED, DISAGREES = "tie", "abstained", "disagrees"


class RuleTexts(NamedTuple):
    """Of each rule of a score folder what people read; texts and signs are None in folders that do not hold them."""

    ids: list[str]
    texts: list[str | None]
    signs: list[int | None]

    @classmethod
    def of(cls, manifest: dict[str, Any]) -> "RuleTexts":
        ids = list(manifest["rules"])
        unknown = [None] * len(ids)
        return cls(ids, *(manifest.get(name, unknown) for name in ("rule_texts", "rule_signs")))


def review_row(pair: Pair, reason: str, label: int, probability: float, rules: list[dict[str, Any]]) -> dict[str, Any]:
    """One line of a review: ``preferred`` is for people to fill in with a, b or tie.

    Args:
        label: what the rules prefer; +1, -1, or 0 for neither.
        probability: that the label is right.
        rules: of ``said_by``.
    """
    return {
        "id": pair.id,
        "reason": reason,
        "preferred": None,
        "prompt": [dict(m) for m in pair.prompt],
        "response_a": pair.response_a,
        "response_b": pair.response_b,
        "label": {1: "a", -1: "b", 0: None}[label],
        "probability": probability,
        "preferred_before": pair.preferred,
        "rules": rules,
    }


def said_by(texts: RuleTexts, selected: list[int], scores: Batch, row: int) -> list[dict[str, Any]]:
    """The selected rules of a pair, and the score of each response: higher speaks for it, whatever the rule's sign."""
    number = lambda value: round(float(value), 6) if np.isfinite(value) else None  # noqa: E731
    return [
        {
            "id": texts.ids[rule],
            "text": texts.texts[rule],
            "sign": texts.signs[rule],
            "score_a": number(scores.a[row, rule]),
            "score_b": number(scores.b[row, rule]),
        }
        for rule in selected
    ]


@contextmanager
def reviewing(path: str | os.PathLike | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """What writes a row to a review, JSONL in the order of the pairs; it appears whole. Without a path, to nowhere."""
    if path is None:
        yield lambda row: None
        return
    if str(path).endswith((".parquet", ".gz")):
        raise InputError(f"{path}: a review is JSONL, which people can fill in; give another name")
    encode = json.JSONEncoder(ensure_ascii=False).encode
    with paths.writing(path) as stream:
        yield lambda row: stream.write((encode(row) + "\n").encode())
