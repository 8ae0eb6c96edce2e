"""Weights by the rules' ids, with how they were found, in a file that people can read."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from adaptrm import paths
from adaptrm.errors import InputError
from adaptrm.selection import evidence

FORMAT = 1


@dataclass(frozen=True, eq=False)
class EvidenceWeights(evidence.EvidenceWeights):
    """What each rule's word is worth, for ``select(..., "evidence", weights=...)``.

    Selection knows neither files nor ids, so these are added here.

    Attributes:
        rule_ids: of the rules.
        report: how it was fitted, what it rests on, ``by_rule`` and ``warnings``; see ``fit_evidence``.
    """

    rule_ids: tuple[str, ...] = ()
    report: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: str | os.PathLike) -> None:
        """Write JSON: the report first, then of each rule its reliability a and its row of sigma."""
        ids = self.rule_ids or tuple(map(str, range(len(self.a))))
        rules = [
            f"  {json.dumps(id)}: {json.dumps({'a': _short(a), 'sigma': list(map(_short, row))})}"
            for id, a, row in zip(ids, self.a, self.sigma, strict=True)
        ]
        head = json.dumps({"evidence_weights": FORMAT, "report": self.report}, indent=1)
        text = head.removesuffix("\n}") + ',\n "rules": {\n' + ",\n".join(rules) + "\n }\n}\n"
        paths.write_bytes(path, text.encode())

    @classmethod
    def load(cls, path: str | os.PathLike) -> "EvidenceWeights":
        """Read what ``save`` wrote.

        Raises:
            InputError: the file cannot be read, or holds no weights.
        """
        text = paths.read_bytes(path)
        try:
            found = json.loads(text)
            rules, report = found["rules"], found["report"]
            a = np.array([rule["a"] for rule in rules.values()], np.float32)
            sigma = np.array([rule["sigma"] for rule in rules.values()], np.float32)
            if found["evidence_weights"] != FORMAT or not isinstance(report, dict):
                raise ValueError(found["evidence_weights"])
            if sigma.shape != (len(a), len(a)) or not np.isfinite(a).all() or not np.array_equal(sigma, sigma.T):
                raise ValueError(sigma.shape)
            np.linalg.cholesky(sigma.astype(np.float64))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, np.linalg.LinAlgError):
            raise InputError(f"{path}: not evidence weights; make them with adaptrm label --save-weights") from None
        return cls(a, sigma, tuple(rules), report)


def _short(value: np.float32) -> float:
    """The shortest decimal that is this float32."""
    return float(str(value))
