"""How often a label is right: probabilities calibrated on gold, how good they are, and below what to abstain.

All of it is of the *size* of a pair's margin, and of whether the response that the margin prefers is the better one.
So swapping the responses swaps the probability, and ``P(A better) + P(B better) = 1``, whatever is fitted.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64

from adaptrm.errors import InputError

FEW = 30  # gold pairs: fewer say nothing about a curve
# Gold pairs from which on isotonic regression does not overfit (scikit-learn's user guide, 1.16.3.2).
ISOTONIC = 1000
FOLDS = 10
BINS = 10  # of the probabilities from .5 to 1
CONFIDENCE = 0.95  # that a threshold keeps its promise
STARTS = (0.2, 0.5, 1.0)  # shares of the labels, the surest ones, from which on more and more are tried
STEP = 0.05
FINE = 1 << 13  # bins of a model's own probabilities

Sizes = Float64[np.ndarray, " pairs"]
Right = Bool[np.ndarray, " pairs"]


@dataclass(frozen=True)
class Calibration:
    """The probability that a label is right, by the size of its margin.

    Attributes:
        most: no label is surer than so many gold pairs can show (Laplace's rule of succession).
    """

    method: str
    curve: Callable[[Sizes], Sizes]
    most: float

    def __call__(self, sizes: Sizes) -> Sizes:
        return np.clip(self.curve(np.asarray(sizes, np.float64)), 0.5, self.most)


def method_for(pairs: int) -> str:
    """Platt's one slope, or isotonic regression where there is enough to learn a whole curve from."""
    return "isotonic" if pairs >= ISOTONIC else "platt"


def fit(sizes: Sizes, right: Right, method: str) -> Calibration:
    """Fit on gold pairs.

    Args:
        sizes: ``|margin|`` of each, above 0.
        right: whether its label is what people said.

    Raises:
        InputError: scikit-learn is missing.
    """
    curve = {"platt": _platt, "isotonic": _isotonic}[method](np.asarray(sizes, np.float64), np.asarray(right, bool))
    return Calibration(method, curve, (len(sizes) + 1) / (len(sizes) + 2))


def _platt(sizes: Sizes, right: Right) -> Callable[[Sizes], Sizes]:
    """``sigmoid(slope * size)``; without an intercept, as a margin of 0 prefers neither (Platt 1999).

    Its targets are drawn in as in his section 2.2, so that labels that are all right have a slope too.
    """
    with _sklearn():
        from sklearn.linear_model import LogisticRegression
    scale = math.sqrt(np.mean(sizes**2))
    doubt = 1 / (len(sizes) + 2)
    weights = np.where(right, 1 - doubt, doubt)
    model = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-8, max_iter=1000)
    both = np.concatenate([sizes, sizes])[:, None] / scale, np.repeat([1, 0], len(sizes))
    slope = max(float(model.fit(*both, np.concatenate([weights, 1 - weights])).coef_[0, 0]), 0.0) / scale
    return lambda sizes: 1 / (1 + np.exp(-slope * sizes))


def _isotonic(sizes: Sizes, right: Right) -> Callable[[Sizes], Sizes]:
    """The best curve that never falls; on each pair in both orders it is this one."""
    with _sklearn():
        from sklearn.isotonic import IsotonicRegression
    return IsotonicRegression(y_min=0.5, y_max=1.0, out_of_bounds="clip").fit(sizes, right).predict


@contextmanager
def _sklearn() -> Iterator[None]:
    try:
        yield
    except ImportError:
        raise InputError("--gold calibrates with scikit-learn: pip install 'adaptrm[gold]'") from None


def held_out(sizes: Sizes, right: Right, method: str) -> Sizes:
    """The probability of each pair by a curve that was fitted without it."""
    folds = np.random.default_rng(0).permutation(len(sizes)) % FOLDS
    found = np.empty(len(sizes))
    for fold in range(FOLDS):
        held = folds == fold
        found[held] = fit(sizes[~held], right[~held], method)(sizes[held])
    return found


def measured(probability: Sizes, right: Right) -> dict[str, Any]:
    """How good probabilities are.

    Returns:
        Brier score, negative log-likelihood in nats (absent where a certain label is wrong: it is infinite), expected
        calibration error, and the reliability table that it is of: pairs, mean probability and share of right labels.
    """
    probability, right = np.asarray(probability, np.float64), np.asarray(right, bool)
    bins = np.minimum(((probability - 0.5) * 2 * BINS).astype(int), BINS - 1)
    table = [
        {
            "from": 0.5 + 0.5 * one / BINS,
            "to": 0.5 + 0.5 * (one + 1) / BINS,
            "pairs": int(of_bin.sum()),
            "probability": float(probability[of_bin].mean()),
            "right": float(right[of_bin].mean()),
        }
        for one in range(BINS)
        if (of_bin := bins == one).any()
    ]
    of_truth = np.where(right, probability, 1 - probability)
    likelihood = {"nll": float(-np.log(of_truth).mean())} if (of_truth > 0).all() else {}
    gaps = [row["pairs"] * abs(row["probability"] - row["right"]) for row in table]
    return {
        "brier": float(np.mean((probability - right) ** 2)),
        **likelihood,
        "calibration_error": sum(gaps) / len(right),
        "reliability": table,
    }


@dataclass(frozen=True)
class Threshold:
    """Below which size of the margin to abstain.

    Attributes:
        kept: share of the labels that stays.
        error: of those, as gold or the model says.
        at_most: what the error of other labels is at most, with ``CONFIDENCE``; None without gold.
    """

    size: float
    kept: float
    error: float
    at_most: float | None = None


def threshold_by_gold(sizes: Sizes, right: Right, target: float) -> Threshold:
    """The lowest threshold that is shown to keep labels of which at most ``target`` are wrong.

    Gold pairs must be drawn as the others are. More and more labels are kept until the exact binomial bound of their
    error (Clopper & Pearson 1934) is above the target, from a few starts that share the doubt: fixed-sequence testing,
    so that the promise holds for the threshold that is taken (Learn then Test, Angelopoulos et al. 2021, section 2.3).
    Sizes are not fitted to gold: nothing has to be held out.

    Raises:
        InputError: no threshold can be shown to keep the target.
    """
    from scipy.stats import binomtest

    doubt = (1 - CONFIDENCE) / len(STARTS)
    least = math.ceil(math.log(doubt) / math.log(1 - target))
    if least > len(sizes):
        raise InputError(
            f"--target-error {target:g}: takes {least} gold verdicts at least, all of them right, to be shown; there "
            f"are {len(sizes)}: give more, or a larger error"
        )
    order = np.sort(sizes)[::-1]

    def keeping(share: float) -> Threshold:
        size = order[round(share * len(order)) - 1]
        kept = sizes >= size
        wrong, number = int((~right[kept]).sum()), int(kept.sum())
        bound = binomtest(wrong, number, alternative="less").proportion_ci(1 - doubt).high
        return Threshold(float(size), number / len(sizes), wrong / number, float(bound))

    shown = []
    for start in STARTS:
        tried = map(keeping, np.arange(start, 1 + STEP / 2, STEP))
        shown += takewhile(lambda threshold: threshold.at_most <= target, tried)
    if shown:
        return min(shown, key=lambda threshold: threshold.size)
    surest = keeping(STARTS[0])
    raise InputError(
        f"--target-error {target:g}: by gold {100 * surest.error:.3g} % of the surest {100 * surest.kept:.0f} % of the "
        f"labels are wrong, and up to {100 * surest.at_most:.3g} % may be: give more verdicts, a larger error, or "
        "better rules"
    )


class Believed:
    """How many labels a model thinks wrong, by its probability; memory does not depend on the number of labels."""

    def __init__(self):
        self._labels, self._wrong = np.zeros(FINE, np.int64), np.zeros(FINE)

    def add(self, probability: Sizes) -> None:
        bins = np.minimum(((np.asarray(probability, np.float64) - 0.5) * 2 * FINE).astype(int), FINE - 1)
        self._labels += np.bincount(bins, minlength=FINE)
        self._wrong += np.bincount(bins, 1 - probability, minlength=FINE)

    def threshold(self, target: float) -> Threshold:
        """The lowest size, as log-odds, above which the model thinks at most ``target`` of the labels wrong.

        Raises:
            InputError: it thinks more of its surest labels wrong.
        """
        labels, wrong = (np.cumsum(x[::-1])[::-1] for x in (self._labels, self._wrong))
        error = wrong / np.maximum(labels, 1)
        good = np.flatnonzero((error <= target) & (labels > 0))
        if not len(good):
            raise InputError(f"--target-error {target:g}: no label is that sure; give a larger error, or better rules")
        probability = 0.5 + 0.5 * good[0] / FINE
        size = math.log(probability / (1 - probability))
        return Threshold(size, float(labels[good[0]] / labels[0]), float(error[good[0]]))
