"""Weights of the rules from a few pairs of which people said which response is better, and all the others.

Some two hundred verdicts cannot weigh a hundred rules one by one. They can say which of a few directions of what the
rules say is the preference, and these are known well from all pairs: the plain vote, the vote that the discrepancies
alone suggest, and the factors that rules share. Cross-validation on the verdicts chooses between these.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from adaptrm.selection.evidence import EvidenceWeights, noise_edge

LEAST_VERDICTS = 20  # of which cross-validation can tell anything
FOLDS = 10
RIDGE = 1.0  # a normal prior of unit variance on the log-odds that directions of unit size which go together give
MOST_FACTORS = 10
LEAST_OWN = 0.01  # share of a rule's variance that no factor accounts for
VOTERS = 5  # rules a pair, as published
STEPS = 50  # of Newton's method, at most


class GoldFit(NamedTuple):
    """Weights that verdicts chose.

    Attributes:
        losses: mean negative log-likelihood of each candidate on verdicts that it was not fitted to, half of it by the
            vote of all rules and half by that of the five with the largest evidence; log 2 is chance.
        chosen: the candidate taken.
        gain: by how much its loss is below chance, and the standard error of that.
        agreement: of the vote of all rules with the verdicts that it was not fitted to.
    """

    weights: EvidenceWeights
    losses: dict[str, float]
    chosen: str
    gain: list[float]
    agreement: float
    factors: int


def fit_gold(
    d: Float64[np.ndarray, "verdicts rules"],
    verdicts: Float64[np.ndarray, " verdicts"],
    moments: Float64[np.ndarray, "rules rules"],
    pairs: int,
    alone: EvidenceWeights | None,
) -> GoldFit:
    """Choose a vote by verdicts, and the weights that give it.

    A vote w comes as reliabilities ``a = c S w`` and ``sigma = S - a a^T``, where S are the second moments of the
    rules by their factors: then ``sigma^-1 a = w`` for one c (Sherman & Morrison 1950), and a vote of some rules only
    is what they tell of the vote of all.

    Args:
        d: discrepancies of the pairs with a verdict.
        verdicts: 1 for response A, -1 for B.
        moments: the mean of ``d_i d_j`` over all pairs.
        alone: weights from the discrepancies alone, where there are any.

    Raises:
        ValueError: the verdicts are too few.
    """
    if len(verdicts) < LEAST_VERDICTS:
        raise ValueError(
            f"{len(verdicts)} gold verdicts on these pairs, less ties, are too few; give {LEAST_VERDICTS}, better 200"
        )
    speaks = np.diag(moments) > 0
    deviation = np.sqrt(np.diag(moments)[speaks])
    shared = factors(moments[np.ix_(speaks, speaks)] / np.outer(deviation, deviation), pairs)
    own = 1 - (shared**2).sum(axis=1)
    scores = np.zeros((len(speaks), shared.shape[1]))
    scores[speaks] = shared / own[:, None] / deviation[:, None]
    plain = speaks.astype(float)[:, None]
    candidates = {"plain": plain}
    if alone is not None:
        candidates["alone"] = alone.weights.astype(np.float64)[:, None]
    if shared.shape[1]:
        candidates |= {"factors": scores, "factors and plain": np.concatenate([scores, plain], axis=1)}
    turned = d * verdicts[:, None]  # the better response's discrepancies
    whole = np.eye(len(speaks))
    whole[np.ix_(speaks, speaks)] = (shared @ shared.T + np.diag(own)) * np.outer(deviation, deviation)
    tried = {name: _cross_validated(turned, directions, whole) for name, directions in candidates.items()}
    chosen = min(tried, key=lambda name: tried[name].mean())
    weights = _standing_for(_vote(turned, candidates[chosen]), whole)
    gains = math.log(2) - tried[chosen].mean(axis=0)
    return GoldFit(
        EvidenceWeights(*(x.astype(np.float32) for x in weights)),
        {name: float(losses.mean()) for name, losses in tried.items()},
        chosen,
        [float(gains.mean()), float(gains.std(ddof=1) / math.sqrt(len(gains)))],
        float((np.sign(math.log(2) - tried[chosen][0]) + 1).mean() / 2),
        shared.shape[1],
    )


def _standing_for(log_odds: np.ndarray, whole: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """a and sigma of a vote, given the second moments of the rules."""
    weights = log_odds / 2  # the log-odds are 2 w . d
    size = float(weights @ whole @ weights)
    a = whole @ weights * ((math.sqrt(1 + 4 * size) - 1) / (2 * size) if size > 0 else 1.0)
    return a, whole - np.outer(a, a)


def factors(correlation: Float64[np.ndarray, "rules rules"], pairs: int) -> Float64[np.ndarray, "rules factors"]:
    """Loadings of the factors that stand out from noise, by iterated principal factors (Harman 1976, chapter 8)."""
    count = len(correlation)
    many = min(int((np.linalg.eigvalsh(correlation) > noise_edge(count, pairs)).sum()), MOST_FACTORS, count - 1)
    own = np.ones(count)
    loadings = np.zeros((count, max(many, 0)))
    for _ in range(20 if loadings.size else 0):
        values, vectors = np.linalg.eigh(correlation - np.diag(own))
        loadings = vectors[:, ::-1][:, :many] * np.sqrt(np.maximum(values[::-1][:many], 0))
        # Loadings that leave a rule nothing of its own are shortened.
        common = (loadings**2).sum(axis=1)
        loadings *= np.sqrt(np.minimum(1, (1 - LEAST_OWN) / np.maximum(common, LEAST_OWN)))[:, None]
        own = 1 - (loadings**2).sum(axis=1)
    return loadings


def _cross_validated(
    turned: np.ndarray, directions: np.ndarray, whole: np.ndarray
) -> Float64[np.ndarray, "2 verdicts"]:
    """Negative log-likelihood of each verdict, by a vote fitted to the others: of all rules, and of a few.

    That of all tells more of a vote from few verdicts; that of a few is what labels are made by.
    """
    fold = np.arange(len(turned)) % FOLDS
    losses = np.zeros((2, len(turned)))
    for left_out in range(FOLDS):
        log_odds = _vote(turned[fold != left_out], directions)
        a, sigma = _standing_for(log_odds, whole)
        rows = turned[fold == left_out]
        top = np.argsort(-np.abs(rows * log_odds), axis=1, kind="stable")[:, :VOTERS]
        own = np.linalg.solve(sigma[top[:, :, None], top[:, None]], a[top][..., None])[..., 0]
        of_few = (2 * own * np.take_along_axis(rows, top, axis=1)).sum(axis=1)
        losses[:, fold == left_out] = np.logaddexp(0, -np.stack([rows @ log_odds, of_few]))
    return losses


def _vote(turned: np.ndarray, directions: np.ndarray) -> Float64[np.ndarray, " rules"]:
    """Weights of the log-odds by logistic regression on directions, without a constant: no side is the first one."""
    size = np.sqrt(((turned @ directions) ** 2).mean(axis=0))
    directions = directions / np.where(size > 0, size, 1)
    x = turned @ directions
    found, ridge = np.zeros(x.shape[1]), RIDGE * x.shape[1]
    for _ in range(STEPS):
        wrong = 1 / (1 + np.exp(np.clip(x @ found, -30, 30)))
        curvature = (x * (wrong * (1 - wrong))[:, None]).T @ x + ridge * np.eye(len(found))
        step = np.linalg.solve(curvature, x.T @ wrong - ridge * found)
        found += step
        if np.abs(step).max() < 1e-8:
            break
    return directions @ found
