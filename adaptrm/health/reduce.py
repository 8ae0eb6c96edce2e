"""``adaptrm rules reduce``: a smaller pool that keeps the most of what a judge's scores tell."""

import os
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64

from adaptrm import paths
from adaptrm.data.scores import read_batches
from adaptrm.errors import InputError
from adaptrm.health.check import check_pool_of
from adaptrm.health.measures import OWN
from adaptrm.rules import RulePool
from adaptrm.rules.rule import MAX_NAME


class Added(NamedTuple):
    """A rule that was added.

    Attributes:
        bits: of information that it adds to those before it.
        explained: share of the variance of all rules' differences that it and those before it account for.
    """

    rule: int
    bits: float
    explained: float


def most_informative(products: Float64[np.ndarray, "rules rules"], k: int) -> list[Added]:
    """Rules in the order in which a greedy search adds them, by ``log det(I + M_SS / noise) / 2`` of the chosen S.

    That is the information in Gaussian readings of the differences, each with a noise of its own of a tenth of the
    rules' mean variance. Without noise M_SS has determinant 0 as soon as two rules say the same, or there are fewer
    pairs than rules, and directions that hardly vary, which chance makes, would decide; with it a rule that hardly
    differs adds nothing. The search is within 1 - 1/e of the best set (Nemhauser, Wolsey and Fisher, 1978: the
    determinant is monotone and submodular). It does not know noise from knowledge: a rule that differs at random
    looks informative.

    Args:
        products: second moments of the rules' differences, up to a factor.
    """
    total = np.trace(products)
    noise = OWN * total / len(products) if total > 0 else 1.0
    left = products.copy()  # of the differences, given the readings of the chosen rules
    found: list[Added] = []
    for _ in range(k):
        variance = np.diagonal(left) + noise
        variance[[added.rule for added in found]] = -np.inf
        rule = int(np.argmax(variance))  # the first of equals
        left = left - np.outer(left[:, rule], left[rule]) / variance[rule]
        explained = 1 - np.trace(left) / total if total > 0 else 0.0
        found.append(Added(rule, float(np.log2(variance[rule] / noise) / 2), float(explained)))
    return found


def reduce_pool(pool: RulePool, scores: str, k: int, out: str | os.PathLike) -> dict[str, Any]:
    """Write a pool of the k most informative rules, in the order of the pool they come from.

    Returns:
        The pool's file, and of each rule in the order in which it was added what it adds.

    Raises:
        InputError: the pool has fewer rules, or the scores are not of it.
    """
    check_pool_of(scores, pool)
    if not 1 <= k <= len(pool):
        raise InputError(f"--k {k}: pool {pool.name} has {len(pool)} rules; give 1 to {len(pool)}")
    products, pairs = np.zeros((len(pool), len(pool))), 0
    for batch in read_batches(scores):
        d = np.subtract(batch.a, batch.b, dtype=np.float64)
        if not np.isfinite(d).all():
            name = batch.ids[int(np.argmin(np.isfinite(d).all(axis=1)))]
            raise InputError(f"{scores}: the scores of pair {name!r} are not all numbers; score again")
        products += d.T @ d
        pairs += len(d)
    added = most_informative(products, k)
    suffix = f"-{k}"
    kept = tuple(pool[rule] for rule in sorted(one.rule for one in added))
    smaller = RulePool(pool.name[: MAX_NAME - len(suffix)] + suffix, pool.version, kept)
    paths.write_bytes(out, smaller.to_yaml().encode())
    return {
        "pool": str(out),
        "name": smaller.name,
        "hash": smaller.hash,
        "pairs": pairs,
        "rules": k,
        "explained": added[-1].explained,
        "added": {pool[one.rule].id: {"bits": one.bits, "explained": one.explained} for one in added},
    }


def for_people(found: dict[str, Any]) -> dict[str, Any]:
    """The same with a table of what each rule adds."""
    from rich.table import Table

    table = Table(
        caption="bits: of information beside the rules above; explained: of the variance of all", caption_justify="left"
    )
    table.add_column("rule")
    for heading in ("bits", "explained %"):
        table.add_column(heading, justify="right")
    for id, of in found["added"].items():
        table.add_row(id, f"{of['bits']:.2f}", f"{100 * of['explained']:.0f}")
    return {name: value for name, value in found.items() if name not in ("added", "explained")} | {"table": table}
