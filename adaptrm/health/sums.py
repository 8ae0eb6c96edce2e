"""What is kept of any number of scored pairs: sums over them, so that memory does not depend on how many there are."""

import numpy as np
from jaxtyping import Float32, Float64, Int64

from adaptrm.data.scores import LOW_MASS

# Computing a judge in bfloat16 moves its scores by about this much (tools/compare_judges.py): a smaller difference
# says nothing.
SMALL = 0.016
LOW_RELEVANCE = 0.1  # the judge was nearly sure that the rule does not apply, to both responses
STEPS = 1024  # of a histogram, to a difference of 1; what falls into one step counts as equal
LARGEST = 4  # of a difference of centred scores


class Sums:
    """Sums over pairs of what R rules say of them.

    d is a rule's difference of scores, A - B. Nothing here depends on which response is called A: second moments are
    about zero, and what people prefer turns d round.

    Attributes:
        pairs: how many.
        products: sum of ``d d^T``.
        level, square: sums of the scores themselves, and of their squares, over both responses.
        longer: sum of d times the difference in length (A - B), ``longer_square`` of that difference's square.
        small, irrelevant, low_mass: pairs with ``|d|`` below SMALL, relevance below LOW_RELEVANCE, label mass (mean of
            the two responses) below LOW_MASS.
        mass: sum of that label mass.
        said: pairs of which people said which response is better.
        histograms: for scores as they are and centred over the rules, pairs by d of the better response against the
            other; the middle is no difference.
    """

    def __init__(self, rules: int):
        self.pairs = self.said = 0
        self.products = np.zeros((rules, rules))
        self.longer, self.longer_square = np.zeros(rules), 0.0
        self.level, self.square = np.zeros((2, rules))
        self.small, self.irrelevant, self.low_mass = np.zeros((3, rules), np.int64)
        self.mass = np.zeros(rules)
        self.histograms: Int64[np.ndarray, "2 rules bins"] = np.zeros((2, rules, 0), np.int64)

    def add(
        self,
        a: Float32[np.ndarray, "pairs rules"],
        b: Float32[np.ndarray, "pairs rules"],
        relevance: Float32[np.ndarray, "pairs rules"],
        longer: Float64[np.ndarray, " pairs"],
    ) -> None:
        """Add pairs.

        Args:
            longer: characters of response A minus those of B.
        """
        d = np.subtract(a, b, dtype=np.float64)
        self.pairs += len(d)
        self.products += d.T @ d
        self.longer += longer @ d
        self.longer_square += float(longer @ longer)
        self.small += (np.abs(d) < SMALL).sum(axis=0)
        self.irrelevant += (relevance < LOW_RELEVANCE).sum(axis=0)

    def add_levels(self, a: Float32[np.ndarray, "pairs rules"], b: Float32[np.ndarray, "pairs rules"]) -> None:
        """Add the scores themselves."""
        for x in (a, b):
            self.level += x.sum(axis=0, dtype=np.float64)
            self.square += np.square(x, dtype=np.float64).sum(axis=0)

    def add_mass(self, a: Float32[np.ndarray, "pairs rules"], b: Float32[np.ndarray, "pairs rules"]) -> None:
        """Add the label mass of pairs."""
        mass = (a + b) / 2
        self.low_mass += (mass < LOW_MASS).sum(axis=0)
        self.mass += mass.sum(axis=0, dtype=np.float64)

    def add_preferred(
        self,
        a: Float32[np.ndarray, "pairs rules"],
        b: Float32[np.ndarray, "pairs rules"],
        preferred: Float64[np.ndarray, " pairs"],
    ) -> None:
        """Add what people preferred: 1 response A, -1 B, 0 where nobody said."""
        d = np.subtract(a, b, dtype=np.float64)[preferred != 0] * preferred[preferred != 0, None]
        self.said += len(d)
        if not len(d):
            return
        if not self.histograms.size:
            self.histograms = np.zeros((2, d.shape[1], 2 * LARGEST * STEPS + 1), np.int64)
        for histogram, of in zip(self.histograms, (d, d - d.mean(axis=1, keepdims=True)), strict=True):
            steps = np.rint(of * STEPS).astype(np.int64) + LARGEST * STEPS
            # One index of a view is several times faster than two.
            np.add.at(histogram.reshape(-1), (steps + np.arange(of.shape[1]) * histogram.shape[1]).reshape(-1), 1)
