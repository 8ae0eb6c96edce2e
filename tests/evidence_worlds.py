"""Scores with given discrepancies, and folders of them."""

from pathlib import Path

import numpy as np
from commands import write_rows

from adaptrm.data.rows import source_hash
from adaptrm.data.scores import Scores, write_manifest, write_part

PAIRS, RULES = 600, 8
STRENGTHS = np.linspace(0.1, 0.5, RULES)


def some_world(seed: int = 0, pairs: int = PAIRS, nuisance: float = 0.0) -> tuple[np.ndarray, ...]:
    """Preference, difference in length (whole numbers, half of the rules go along with it) and discrepancies."""
    rng = np.random.default_rng(seed)
    preference = rng.choice([-1, 1], pairs)
    longer = rng.integers(-50, 51, pairs)
    d = STRENGTHS * preference[:, None] + 0.4 * rng.standard_normal((pairs, RULES))
    d[:, ::2] += nuisance * (longer / 29)[:, None]
    return preference, longer, d


def as_scores(d: np.ndarray) -> tuple[np.ndarray, ...]:
    """a, b and relevance with these discrepancies, up to a factor; relevance 1 everywhere."""
    half = (d / np.abs(d).max()).astype(np.float32)
    return half, -half, np.ones_like(half)


def scores_of(d: np.ndarray) -> Scores:
    a, b, one = as_scores(d)
    ids, rules = [f"p{i}" for i in range(len(d))], [f"r{i}" for i in range(d.shape[1])]
    return Scores(ids, rules, a, b, one, a, b, one, one)


def rows_of(scores: Scores, rows: slice | np.ndarray) -> Scores:
    """Some of the pairs, in this order."""
    arrays = {name: x[rows] for name, x in vars(scores).items() if isinstance(x, np.ndarray)}
    return Scores(ids=np.array(scores.ids)[rows].tolist(), rule_ids=scores.rule_ids, **arrays)


def write_folder(where: Path, scores: Scores, part: int, longer: np.ndarray | None = None, prefers=None) -> str:
    """A score folder and its pairs beside it.

    Args:
        longer: by how many characters response A is longer than B; between -50 and 50.
        prefers: 1 where people prefer A, -1 for B.
    """
    count = len(scores)
    longer = np.zeros(count, int) if longer is None else longer
    prefers = np.zeros(count, int) if prefers is None else prefers
    rows = [
        {
            "id": id,
            "prompt": "?",
            "response_a": "a" * (51 + int(more)),
            "response_b": "b" * 51,
            "preferred": {1: "a", -1: "b", 0: None}[int(sign)],
        }
        for id, more, sign in zip(scores.ids, longer, prefers, strict=True)
    ]
    pairs = str(write_rows(Path(f"{where}.jsonl"), rows))
    parts = -(-count // part)
    known = {"pairs": pairs, "pairs_sha256": source_hash(pairs), "count": count, "parts": parts}
    write_manifest(where, {"rules": scores.rule_ids} | known)
    for number in range(parts):
        write_part(where, number, rows_of(scores, slice(number * part, (number + 1) * part)))
    return str(where)


def gold_of(scores, preference: np.ndarray, count: int = 100) -> dict[str, int]:
    return {id: int(sign) for id, sign in zip(scores.ids[:count], preference, strict=False)}
