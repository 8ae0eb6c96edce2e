"""What each rule's word is worth, from the discrepancies alone: evidence-weighted selection (METHOD.md section 3).

The model: a hidden preference Z in {-1, +1}, and discrepancies ``d | Z ~ N(a Z, sigma)`` over the rules. Expectation
maximisation (Dempster et al. 1977) over Z finds the rules' reliabilities a, with ``sigma`` diagonal; what the
reliabilities leave of the second moments gives its other entries. Both are shrunk as far as the data cannot tell.
"""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from adaptrm.selection.kernel import Evidence

PASSES = 30  # of expectation maximisation, at most
SETTLED = 1e-4  # the largest change of a reliability, beside the largest reliability
LEAST_VARIANCE = 1e-3  # of a rule given Z, beside its variance: no rule is certain


@dataclass(frozen=True, eq=False)
class EvidenceWeights:
    """What each rule's word is worth.

    Attributes:
        a: mean discrepancy of each rule where response A is the better one; its negative where B is.
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


def fit_weights(d: Float32[np.ndarray, "pairs rules"]) -> EvidenceWeights:
    """Weights from the discrepancies alone.

    Raises:
        ValueError: the data cannot support it; says why.
    """
    pairs, rules = d.shape
    d = jnp.asarray(d)
    moments = np.asarray(second_moments(d), np.float64) / pairs
    variance = np.diag(moments)
    first = first_reliabilities(moments)
    a = reliabilities(d, variance, first)
    halves = [reliabilities(d[start::2], variance, a) for start in (0, 1)]
    ...
