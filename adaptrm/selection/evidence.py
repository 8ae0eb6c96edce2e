"""What each rule's word is worth, from the discrepancies alone: evidence-weighted selection (METHOD.md section 3).

The model: a hidden preference Z in {-1, +1}, and discrepancies ``d | Z ~ N(a Z, sigma)`` over the rules. Expectation
maximisation over Z (Dempster et al. 1977) finds the reliabilities a under a diagonal sigma: what rules have in common
tells of Z. What a leaves of the second moments is sigma. Both are shrunk as far as the data cannot tell: the weights
towards their mean, which is the published rule, by how far two halves of the pairs agree on them (empirical Bayes); the
correlations in sigma towards none (Schaefer & Strimmer 2005).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32

from adaptrm.selection.kernel import Evidence

PAIRS_FITTED = 200_000  # spread over all; the second moments are of all
PASSES = 30  # of expectation maximisation, at most
SETTLED = 1e-4  # the largest change of a reliability, beside the largest reliability
CERTAIN = 0.95  # no rule is more than so many standard deviations right
LEAST_VARIANCE = 1e-3  # of a rule given Z, beside its variance


@dataclass(frozen=True, eq=False)
class EvidenceWeights:
    """What each rule's word is worth.

    Attributes:
        a: mean discrepancy of each rule where response A is the better one; where B is, its negative.
        sigma: covariance of the discrepancies, given which response is better.
    """

    a: Float32[np.ndarray, " rules"]
    sigma: Float32[np.ndarray, "rules rules"]

    @property
    def weights(self) -> Float32[np.ndarray, " rules"]:
        """Of the best linear vote of all rules, ``sigma^-1 a``: half the log-odds that a discrepancy of 1 gives."""
        return np.linalg.solve(self.sigma.astype(np.float64), self.a).astype(np.float32)

    def arrays(self) -> Evidence:
        """What the selection kernel takes."""
        weights = self.weights
        return Evidence(weights / np.abs(weights).mean(), weights, self.a, self.sigma)


class Fit(NamedTuple):
    """Weights, and how far the data told of them.

    Attributes:
        trust: share of what the weights differ by that is kept; 0 is the published rule.
        kept: share of the correlations given Z.
    """

    weights: EvidenceWeights
    trust: float
    kept: float


def fit_weights(discrepancies: Float32[np.ndarray, "pairs rules"]) -> EvidenceWeights:
    """Weights from the discrepancies alone; a rule that never tells two responses apart gets none.

    Raises:
        ValueError: the rules have nothing in common that stands out from noise; there may be too few pairs.
    """
    pairs, rules = discrepancies.shape
    moments = np.zeros((rules, rules))
    for start in range(0, pairs, PAIRS_FITTED):
        moments += np.asarray(_second_moments(discrepancies[start : start + PAIRS_FITTED]), np.float64)
    some = discrepancies[:: math.ceil(pairs / PAIRS_FITTED) or 1]
    return fit_moments(some, moments / max(pairs, 1), pairs).weights


def noise_edge(rules: int, pairs: int) -> float:
    """The largest component that noise alone gives a correlation matrix, in 19 of 20 sets (Johnstone 2001)."""
    edge = (math.sqrt(pairs) + math.sqrt(rules)) ** 2
    spread = (math.sqrt(pairs) + math.sqrt(rules)) * (1 / math.sqrt(pairs) + 1 / math.sqrt(rules)) ** (1 / 3)
    return (edge + 0.98 * spread) / pairs


def fit_moments(
    some: Float32[np.ndarray, "some_pairs rules"], moments: Float[np.ndarray, "rules rules"], pairs: int
) -> Fit:
    """As ``fit_weights``, from some of the pairs and the second moments of all.

    Args:
        moments: the mean of ``d_i d_j`` over all pairs. About zero, as no side is the first one.
        pairs: so many the moments are of.
    """
    speaks = np.diag(moments) > 0
    count = int(speaks.sum())
    if count < 2 or pairs < 4:
        raise ValueError(f"evidence needs 2 rules that tell responses apart and 4 pairs; there are {count} and {pairs}")
    moments = moments[np.ix_(speaks, speaks)]
    variance = np.diag(moments)
    deviation = np.sqrt(variance)
    values, vectors = np.linalg.eigh(moments / np.outer(deviation, deviation))
    if values[-1] <= (noise := noise_edge(count, pairs)):
        raise ValueError(
            f"the rules have nothing in common that stands out from noise (their first component has {values[-1]:.2f}, "
            f"noise alone up to {noise:.2f}); give more pairs, gold labels, or use strategy max-discrepancy"
        )
    first = vectors[:, -1] * np.sqrt(values[-1] - 1) * deviation
    first *= np.sign(vectors[:, -1].sum()) or 1.0  # rules are right more often than wrong
    some = np.ascontiguousarray(some[:, speaks])
    fitted = np.asarray(_reliabilities(some, variance, first), np.float64)
    halves = [np.asarray(_reliabilities(some[start::2], variance, fitted), np.float64) for start in (0, 1)]

    given = np.maximum(variance - fitted**2, LEAST_VARIANCE * variance)
    weights = fitted / given
    one, other = (
        _same_size(half / np.maximum(variance - half**2, LEAST_VARIANCE * variance), weights) for half in halves
    )
    common, noise = np.cov(one, other)[0, 1], np.var(one - other, ddof=1) / 4
    trust = max(common, 0.0) / (max(common, 0.0) + noise) if noise > 0 else 1.0
    weights = weights.mean() + trust * (weights - weights.mean())

    a, sigma = np.zeros(len(speaks)), np.eye(len(speaks))
    a[speaks] = weights * given
    sigma[np.ix_(speaks, speaks)], kept = _shrunk(moments - np.outer(fitted, fitted), given, pairs)
    return Fit(EvidenceWeights(a.astype(np.float32), sigma.astype(np.float32)), float(trust), float(kept))


def _same_size(weights: np.ndarray, like: np.ndarray) -> np.ndarray:
    return weights * np.abs(like).mean() / np.abs(weights).mean()


def _shrunk(left: np.ndarray, variance: np.ndarray, pairs: int) -> tuple[np.ndarray, float]:
    """A covariance with these variances, its correlations shrunk by what their errors are of them; and what is kept."""
    correlation = np.clip(left / np.sqrt(np.outer(variance, variance)), -1, 1)
    np.fill_diagonal(correlation, 0)
    errors = ((1 - correlation**2) ** 2 / pairs).sum() - len(variance) / pairs
    kept = max(0.0, 1 - errors / max((correlation**2).sum(), 1e-12))
    return (kept * correlation + np.eye(len(variance))) * np.sqrt(np.outer(variance, variance)), kept


@jax.jit
def _second_moments(d: Float32[Array, "pairs rules"]) -> Float32[Array, "rules rules"]:
    return jnp.matmul(d.T, d, precision=lax.Precision.HIGHEST)


@jax.jit
def _reliabilities(
    d: Float32[Array, "pairs rules"], variance: Float32[Array, " rules"], start: Float32[Array, " rules"]
) -> Float32[Array, " rules"]:
    """Expectation maximisation under a diagonal sigma, from a start; the variances of the rules are kept."""
    product = lambda x, y: jnp.matmul(x, y, precision=lax.Precision.HIGHEST)  # noqa: E731
    most = CERTAIN * jnp.sqrt(variance)

    def better(state):
        a, _, passes = state
        given = jnp.maximum(variance - a * a, LEAST_VARIANCE * variance)
        expected = jnp.tanh(product(d, a / given))  # of Z, by pair
        new = jnp.clip(product(expected, d) / len(d), -most, most)
        return new, jnp.abs(new - a).max() / jnp.abs(new).max(), passes + 1

    unsettled = lambda state: (state[1] > SETTLED) & (state[2] < PASSES)  # noqa: E731
    return lax.while_loop(unsettled, better, (jnp.clip(start, -most, most), jnp.float32(jnp.inf), 0))[0]
