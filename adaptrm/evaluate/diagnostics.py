"""What an accuracy does not say: how large the margins are, what they are worth as probabilities, and length."""

from typing import Any

import numpy as np
from jaxtyping import Float64

BINS = 10  # of the probability that the model's choice is right, from one half to one


class Diagnostics:
    """Sums over the pairs (chosen, rejected) of each row; a row counts one, whatever the number of its pairs."""

    def __init__(self):
        self._margins = np.zeros(3)  # weight, sum, sum of squares
        self._bins = np.zeros((BINS, 3))  # weight, probability, right
        self._lengths = {name: np.zeros(2) for name in ("chosen_longer", "chosen_shorter", "same_length")}

    def add(
        self, scores: Float64[np.ndarray, " responses"], lengths: Float64[np.ndarray, " responses"], chosen: int
    ) -> None:
        """Count a row: rewards and characters of its responses, the chosen ones first."""
        margins = (scores[:chosen, None] - scores[None, chosen:]).ravel()
        longer = (lengths[:chosen, None] - lengths[None, chosen:]).ravel()
        weight, right = np.full(margins.size, 1 / margins.size), (margins > 0).astype(float)
        self._margins += [1, (weight * margins).sum(), (weight * margins**2).sum()]
        # How probable the model holds its own choice, by Bradley-Terry; of two equal rewards it is one half.
        probability = 1 / (1 + np.exp(-np.minimum(np.abs(margins), 700)))
        right_or_tied = np.where(margins == 0, 0.5, right)
        bins = np.minimum(((probability - 0.5) * 2 * BINS).astype(int), BINS - 1)
        np.add.at(self._bins, bins, np.stack([weight, weight * probability, weight * right_or_tied], axis=1))
        for name, inside in zip(self._lengths, (longer > 0, longer < 0, longer == 0), strict=True):
            self._lengths[name] += [weight[inside].sum(), (weight * right)[inside].sum()]

    def found(self) -> dict[str, Any]:
        """Margins with their standard deviation; the expected calibration error and its table; accuracy by length."""
        count, total, squares = self._margins
        mean = total / count
        table = [
            {
                "from": 0.5 + 0.5 * one / BINS,
                "to": 0.5 + 0.5 * (one + 1) / BINS,
                "rows": weight,
                "probability": probability / weight,
                "right": right / weight,
            }
            for one, (weight, probability, right) in enumerate(self._bins.tolist())
            if weight
        ]
        gaps = sum(row["rows"] * abs(row["probability"] - row["right"]) for row in table)
        return {
            "margins": {"mean": mean, "standard_deviation": max(squares / count - mean**2, 0.0) ** 0.5},
            "calibration": {"error": gaps / count, "reliability": table},
            "length_bias": {
                name: {"n": weight, "accuracy": right / weight if weight else None}
                for name, (weight, right) in ((name, sums.tolist()) for name, sums in self._lengths.items())
            },
        }
