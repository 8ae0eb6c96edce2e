"""Numbers about a judge from sums over pairs, and what is wrong in plain words."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Int64

from adaptrm.data.scores import LOW_MASS
from adaptrm.health.sums import LOW_RELEVANCE, SMALL, Sums

# One direction says more than all others together. SmolLM2-135M as it is, which does not read the rule: .82 over 24
# rules (METHOD.md section 2), .91 over safety-24 on 12 pairs; the demo's judge, which learned to: .12 over 24. Good and
# bad responses differ in much at once, so a judge that reads has a first direction too, but what 24 rules are asked for
# is not one number.
ONE_DIRECTION = 0.5
# A quarter of the variance of the vote is length.
LENGTH = 0.5
NEARLY_ALL = 0.95  # of the pairs
# A tenth of the variance is the rule's own: 1 - r^2 of two rules that nearly say the same.
OWN = 0.1
REPEATS = (1 - OWN) ** 0.5
# Nine tenths of what the judge says of responses it says of none. It may still tell two responses apart by the rest.
OF_NOTHING = 0.9
SAME_ANSWER = 0.9  # share of the first direction
FEW = 10  # pairs that say nothing yet: chance alone makes one direction out of them
EXPECTED = 10  # times a rule would decide if all did alike; one that never did is then no chance
ERRORS = 2  # standard errors
NAMED = 5  # rules in a line


def first_direction(products: Float64[np.ndarray, "rules rules"]) -> tuple[float, Float64[np.ndarray, " rules"]]:
    """The first principal component of differences: its share of their variance, and its loadings.

    Second moments about zero, as which response is A means nothing, and not correlations: rules are selected by how
    far they differ, and one that hardly does moves no label.
    """
    values, vectors = np.linalg.eigh(products)
    total = np.trace(products)
    return (float(values[-1] / total) if total > 0 else 0.0), vectors[:, -1]


def correlations(products: Float64[np.ndarray, "rules rules"]) -> Float64[np.ndarray, "rules rules"]:
    """Correlation about zero of each two rules' differences; 0 where one never differs."""
    spread = np.sqrt(np.diagonal(products))
    return _ratio(products, np.outer(spread, spread))


def repeated(products: Float64[np.ndarray, "rules rules"]) -> dict[int, tuple[int, float]]:
    """Rules that say what an earlier one says: which, and their correlation (below 0: the opposite)."""
    alike = correlations(products)
    kept: list[int] = []
    found = {}
    for rule in range(len(products)):
        nearest = max(kept, key=lambda other: abs(alike[rule, other]), default=None)
        if nearest is not None and abs(alike[rule, nearest]) >= REPEATS:
            found[rule] = nearest, float(alike[rule, nearest])
        else:
            kept.append(rule)
    return found


def auc(histogram: Int64[np.ndarray, "rules bins"]) -> Float64[np.ndarray, " rules"]:
    """Area under the ROC curve of each rule's d against what people preferred, each pair in both orders.

    Such a pair has d once for the better response and -d once for the other, so the area is the chance that one pair's
    d and another's sum to more than 0.
    """
    share = histogram / histogram.sum(axis=1, keepdims=True)
    mirrored = share[:, ::-1]
    return (share * (np.cumsum(mirrored, axis=1) - mirrored / 2)).sum(axis=1)


def agreement(histogram: Int64[np.ndarray, "rules bins"]) -> Float64[np.ndarray, " rules"]:
    """Share of the pairs where a rule prefers what people prefer; one without a difference counts half."""
    middle = histogram.shape[1] // 2
    right = histogram[:, middle + 1 :].sum(axis=1) + histogram[:, middle] / 2
    return right / histogram.sum(axis=1)


def same_answer(loadings: Float64[np.ndarray, " rules"], signs: Float64[np.ndarray, " rules"]) -> float | None:
    """Whether the first direction says Yes to rules for and against a response at once.

    Returns:
        Share of the squared loadings of the rules with sign -1 that go along with those of sign 1 in the *answer*: 0
        for a judge to whom good responses are good, 1 for one that says Yes, or No, to whatever it is asked. None
        where the pool has one sign only, or one of them no part in this direction.
    """
    answers = loadings * signs
    for_it, against = answers[signs > 0], answers[signs < 0]
    whole = (against**2).sum()
    if not len(for_it) or whole == 0 or (lean := (for_it * np.abs(for_it)).sum()) == 0:
        return None
    return float((against**2)[against * lean > 0].sum() / whole)


def said_of_nothing(sums: Sums, control: Float32[np.ndarray, "pairs rules"]) -> Float64[np.ndarray, " rules"]:
    """Share of each rule's mean square score that is there without any response.

    Args:
        control: scores of an empty response to some prompts; their mean over prompts is what is there.
    """
    nothing = control.mean(axis=0, dtype=np.float64)
    level, square = sums.level / (2 * sums.pairs), sums.square / (2 * sums.pairs)
    return np.clip(_ratio(2 * nothing * level - nothing**2, square), 0, 1)


def measured(sums: Sums) -> dict[str, Any]:
    """The two numbers that need neither pool nor people."""
    share, _ = first_direction(sums.products)
    length = _ratio(sums.longer.sum(), np.sqrt(max(sums.products.sum(), 0) * sums.longer_square))
    return {"first_direction": share, "length_correlation": float(length)}


def by_rule(
    sums: Sums,
    ids: Sequence[str],
    decided: Int64[np.ndarray, " rules"],
    control: Float32[np.ndarray, "pairs rules"] | None,
) -> dict[str, dict[str, float]]:
    """What is known of each rule.

    Args:
        decided: pairs that it was selected for.
        control: scores of an empty response, where they were asked for.
    """
    variance = np.diagonal(sums.products)
    columns = {
        "spread": np.sqrt(variance / sums.pairs),
        "small": sums.small / sums.pairs,
        "irrelevant": sums.irrelevant / sums.pairs,
        "label_mass": sums.mass / sums.pairs,
        "low_mass": sums.low_mass / sums.pairs,
        "length_correlation": _ratio(sums.longer, np.sqrt(variance * sums.longer_square)),
        "decides": decided / sums.pairs,
    }
    for name, histogram in zip(("", "_centred"), sums.histograms, strict=True):
        if sums.said:
            columns |= {f"auc{name}": auc(histogram), f"agreement{name}": agreement(histogram)}
    if control is not None:
        columns["said_of_nothing"] = said_of_nothing(sums, control)
    return {id: {name: float(values[rule]) for name, values in columns.items()} for rule, id in enumerate(ids)}


def no_opinion(rule: Mapping[str, float]) -> str | None:
    """Why a rule says nothing about nearly all pairs, by what ``by_rule`` knows of it."""
    reasons = {
        "irrelevant": f"relevance below {LOW_RELEVANCE:g}",
        "low_mass": f"label mass below {LOW_MASS:g}",
        "small": f"differences below {SMALL:g}",
    }
    return next((reason for name, reason in reasons.items() if rule[name] >= NEARLY_ALL), None)


def main_warnings(found: Mapping[str, Any], pairs: int, rules: int) -> Iterator[str]:
    """What ``measured`` says that nobody should train on without knowing."""
    if pairs < FEW:
        return
    if rules > 1 and (share := found["first_direction"]) > ONE_DIRECTION:
        yield (
            f"one direction carries {100 * share:.0f} % of what the judge says by {rules} rules: it may not read the "
            "rule; teach it with adaptrm train judge, or take another"
        )
    length = found["length_correlation"]
    if abs(length) > max(LENGTH, ERRORS / pairs**0.5):
        which = "longer" if length > 0 else "shorter"
        yield f"the judge prefers the {which} response: its mean difference has correlation {length:.2f} with length"


def warnings(found: Mapping[str, Any]) -> Iterator[str]:
    """All that is wrong with what ``check_scores`` found."""
    pairs, rules = found["pairs"], found["by_rule"]
    if pairs < FEW:
        yield f"{pairs} pairs are too few to say anything about the judge; score at least {FEW}, better hundreds"
        return
    yield from main_warnings(found, pairs, len(rules))
    if (found["same_answer"] or 0) > SAME_ANSWER:
        yield "its first direction is Yes, or No, to rules for and rules against a response at once"
    if (share := found.get("said_of_nothing", 0)) > OF_NOTHING:
        yield f"{100 * share:.0f} % of what the judge says of responses it says of an empty one too"
    if silent := found["no_opinion"]:
        yield f"no opinion on nearly all pairs by {_named(silent, len(rules))}; drop them, or write them anew"
    if again := found["repeats"]:
        said = {rule: f"{rule} = {other} ({r:+.2f})" for rule, (other, r) in again.items()}
        yield f"another rule says the same as {_named(said.values(), len(rules))}; adaptrm rules reduce drops them"
    if never := found["never_decide"]:
        yield f"max-discrepancy never selects {_named(never, len(rules))}"
    if (said := found.get("labels")) and not tells_rules_apart(said):
        yield (
            "less what it says of all rules alike, its answers cannot be told from chance: mean AUC "
            f"{said['mean_auc']['centred']:.2f} against people's labels of {said['rules']} rules on {said['replies']} "
            "replies"
        )
    for how, vote in found["votes"].items():
        error = ERRORS * 0.5 / found["people"] ** 0.5
        if how == "max_discrepancy" and vote < 0.5 + error:
            state = "points at the worse response" if vote < 0.5 - error else "cannot be told from chance"
            yield f"its vote {state}: it agrees with people on {100 * vote:.0f} % of {found['people']} pairs"


def tells_rules_apart(said: Mapping[str, Any]) -> bool:
    """Whether people's labels show a judge to answer each rule better than chance, by what ``RuleVerdicts`` found."""
    return said["rules"] < 2 or said["mean_auc"]["centred"] > 0.5 + ERRORS * said["chance_error"]


def _named(names, rules: int) -> str:
    """``3 of 24 rules: a, b, c``."""
    names = list(names)
    rest = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{len(names)} of {rules} rules: {', '.join(names[:NAMED])}{rest}"


def _ratio(x, y):
    """``x / y``, 0 where y is."""
    return np.divide(x, y, out=np.zeros(np.shape(x)), where=np.asarray(y) > 0)
