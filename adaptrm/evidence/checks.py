"""Whether the hidden preference of a fit without gold can be told from a nuisance that many rules share."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from adaptrm.evidence.gathered import Evident
from adaptrm.selection.evidence import EvidenceWeights, noise_edge

# Rules with this mean correlation say one thing, and nothing is left to weigh them by: 24 rules with 77 % of their
# variance in one direction (SmolLM2 as it is, which does not read the rule: 82 %).
ONE_THING = 0.75
# Of the vote beyond a preference of two values. METHOD.md's worlds without a nuisance have at most .02, those with one
# .5 and more, the correlated one 1.6.
KURTOSIS, ERRORS = 0.1, 5
# Of what the second direction stands out from noise, beside the first. The worlds as above: 0 and .12, the correlated
# one .8.
SECOND = 0.25
CORRELATED = 0.5  # a quarter of the variance of the hidden preference
CHANCE_ERRORS = 2  # standard errors
STRONGEST = 5  # rules a pair, as published
ROWS = 4096  # at a time


def directions(moments: Float64[np.ndarray, "rules rules"], pairs: int) -> dict[str, float]:
    """How the first two principal directions of the standardised discrepancies stand out.

    Returns:
        ``alike``: the mean correlation of as many rules with such a first direction. ``second``: how far the second
        direction stands out from noise, beside the first.
    """
    speaks = np.diag(moments) > 0
    count = int(speaks.sum())
    if count < 2 or not pairs:
        return {"alike": 0.0, "second": 0.0}
    deviation = np.sqrt(np.diag(moments)[speaks])
    *_, second, first = np.linalg.eigvalsh(moments[np.ix_(speaks, speaks)] / np.outer(deviation, deviation))
    edge = noise_edge(count, pairs)
    beside = max(second - edge, 0) / (first - edge) if first > edge else 0.0
    return {"alike": float((first - 1) / (count - 1)), "second": float(beside)}


def measure(evident: Evident, weights: EvidenceWeights) -> dict[str, Any]:
    """What the weights make of the sample.

    Returns:
        ``kurtosis`` of the vote under independent rules, that which a preference of two values gives it
        (``two_point``: noise adds what each rule's own fourth cumulant says, so heavy tails are no nuisance) and its
        standard ``error``; ``correlations`` of the hidden preference, by its posterior mean, with each covariate;
        ``strongest``: how often each rule is one of the five with the largest evidence.
    """
    rules = len(weights.a)
    a, sigma = weights.a.astype(np.float64), weights.sigma - evident.explained
    vote, whole = a / np.diag(sigma), weights.weights.astype(np.float64)
    votes, fourth, second, beside = [], np.zeros(rules), np.zeros(rules), []
    strongest = np.zeros(rules, np.int64)
    for start in range(0, len(evident.some), ROWS):
        d = evident.some[start : start + ROWS].astype(np.float64)
        votes.append(d @ vote)
        square = d * d
        second += square.sum(axis=0)
        fourth += (square * square).sum(axis=0)
        covariates = evident.beside[start : start + ROWS]
        d += covariates @ evident.slopes.T  # as the labels see it
        hidden = np.tanh(d @ whole)
        beside.append([hidden @ covariates, (covariates**2).sum(axis=0), np.full(covariates.shape[1], hidden @ hidden)])
        top = np.argpartition(-np.abs(whole * d), min(STRONGEST, rules) - 1, axis=1)[:, :STRONGEST]
        strongest += np.bincount(top.ravel(), minlength=rules)
    count, y = len(evident.some), np.concatenate(votes)
    second, fourth = second / count, fourth / count
    total = (y**2).mean()
    noise = (vote**2 * (second - a**2)).sum()
    own = (vote**4 * (fourth - 3 * second**2 + 2 * a**4)).sum()  # cumulants add; that of a Z is -2 a^4
    kurtosis = (y**4).mean() / total**2
    # Of a ratio of means, by its first derivatives.
    error = (y**4 / total**2 - 2 * kurtosis * y**2 / total).std() / math.sqrt(count)
    along, size, hidden_size = np.sum(beside, axis=0)
    scale = np.sqrt(size * hidden_size)
    return {
        "kurtosis": float(kurtosis),
        "two_point": float(3 + (own - 2 * max(total - noise, 0) ** 2) / total**2),
        "error": float(error),
        "correlations": np.divide(along, scale, out=np.zeros_like(along), where=scale > 0).tolist(),
        "strongest": (strongest / count).tolist(),
    }


def nuisance_warnings(found: Mapping[str, Any], pairs: int) -> Iterator[str]:
    """Why the hidden preference may be something else, by what ``measure`` and ``directions`` found."""
    beyond = found["kurtosis"] - found["two_point"]
    if beyond > max(KURTOSIS, ERRORS * found["error"]):
        yield (
            "the hidden preference cannot be told from a nuisance that many rules share, such as length or tone: the "
            f"vote has kurtosis {found['kurtosis']:.2f}, a preference would give it {found['two_point']:.2f}; give "
            "gold verdicts, or covariates to take out"
        )
    if found["second"] > SECOND:
        yield (
            f"a second direction stands out {found['second']:.2f} times as far as the first: nothing says which of the "
            "two is the preference; give gold verdicts"
        )
    for name, r in found["correlations"].items():
        if abs(r) > max(CORRELATED, ERRORS / math.sqrt(pairs)):
            yield f"the hidden preference has correlation {r:.2f} with {name}: take it out, or give gold verdicts"


def gold_warnings(gold: Mapping[str, Any]) -> Iterator[str]:
    """Why the verdicts may have chosen nothing."""
    gain, error = gold["gain"]
    if gain < CHANCE_ERRORS * error:
        yield (
            f"no vote of these rules agrees with the gold verdicts beyond chance ({100 * gold['agreement']:.0f} % of "
            f"{gold['verdicts']}): give more verdicts, or do not train on these labels"
        )


def by_rule(weights: EvidenceWeights, ids: Sequence[str], decides: Sequence[float]) -> dict[str, dict[str, float]]:
    """Of each rule, those with the largest weight first.

    Returns:
        ``reliability``: correlation of its discrepancy with the hidden preference. ``weight``: of its discrepancy in
        the vote of all, in units of the mean size. ``redundancy``: share of its variance given the preference that the
        other rules account for. ``decides``: as given.
    """
    a, sigma = weights.a.astype(np.float64), weights.sigma.astype(np.float64)
    whole = np.linalg.solve(sigma, a)
    columns = {
        "reliability": a / np.sqrt(np.diag(sigma) + a**2),
        "weight": whole / (np.abs(whole).mean() or 1),
        "redundancy": 1 - 1 / (np.diag(sigma) * np.diag(np.linalg.inv(sigma))),
        "decides": decides,
    }
    order = np.argsort(-np.abs(whole), kind="stable")
    return {ids[i]: {name: float(values[i]) for name, values in columns.items()} for i in order}
