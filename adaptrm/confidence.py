"""How far the labels of a score folder can be trusted: by gold where there is some, else by the strategy's model."""

from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from adaptrm.calibration import (
    FEW,
    Believed,
    Calibration,
    Threshold,
    fit,
    held_out,
    measured,
    method_for,
    threshold_by_gold,
)
from adaptrm.data.gold import Verdict
from adaptrm.data.preferences import hash_id
from adaptrm.data.review import DISAGREES
from adaptrm.errors import InputError
from adaptrm.progress import say
from adaptrm.selection import Selection

# Ids and selections of all pairs, batch by batch; or of those batches alone that hold one of the given pairs.
Selections = Callable[[Set[str] | None], Iterator[tuple[list[str], Selection]]]
MODELS = ("evidence",)  # strategies that have probabilities of their own


@dataclass(frozen=True)
class Confidence:
    """What is known of labels beside their margins; by default nothing."""

    calibration: Calibration | None = None
    threshold: Threshold | None = None

    def probability(self, chosen: Selection) -> np.ndarray:
        """That the preferred response of each pair is the better one; .5 for a tie."""
        if self.calibration is None:
            return np.maximum(chosen.probability, 1 - chosen.probability)
        return np.where(chosen.preferred == 0, 0.5, self.calibration(np.abs(chosen.margin)))

    def sure(self, chosen: Selection) -> np.ndarray:
        """Whether to label each pair rather than abstain."""
        return np.abs(chosen.margin) >= (0.0 if self.threshold is None else self.threshold.size)


def halves(verdicts: Mapping[str, Verdict]) -> tuple[dict[str, int], dict[str, Verdict]]:
    """Verdicts to fit weights by, and others to calibrate on: what was fitted to a pair cannot be measured on it.

    Which half a verdict is of depends on the id of its pair alone. Those on pairs that were picked for disagreeing fit
    no weights; see ``confidence_of``.
    """
    fitting = {pair: one for pair, one in verdicts.items() if hash_id(pair) % 2}
    checking = {pair: one for pair, one in verdicts.items() if pair not in fitting}
    return {pair: one.preferred for pair, one in fitting.items() if one.reason != DISAGREES}, checking


def confidence_of(
    selections: Selections, strategy: str, verdicts: Mapping[str, Verdict], target_error: float | None, scores: str
) -> tuple[Confidence, dict[str, Any]]:
    """Calibrate on the verdicts and find below what to abstain.

    Verdicts on pairs that people were asked about because they disagreed (the reason of a review) are left out: labels
    that were picked for being doubted are wrong more often than others of their margin.

    Args:
        verdicts: people's, by the pair's id.
        target_error: share of wrong labels that may be kept; None abstains from none.
        scores: the score folder, for messages.

    Returns:
        The confidence, and what to tell of it: how good the probabilities are on pairs that they were not fitted to.

    Raises:
        InputError: no verdict is of these pairs, or the target error cannot be kept.
    """
    if target_error is not None and not 0 < target_error < 0.5:
        raise InputError(f"--target-error {target_error:g}: must be above 0 and below .5")
    if not verdicts:
        if target_error is None:
            return Confidence(), {}
        if strategy not in MODELS:
            raise InputError(
                f"--target-error: strategy {strategy} has no probabilities of its own; give people's verdicts: --gold"
            )
        say(f"{scores}: abstains by what strategy {strategy} believes of itself; --gold would check it")
        believed = Believed()
        for _, chosen in selections(None):
            believed.add(Confidence().probability(chosen)[chosen.preferred != 0])
        threshold = believed.threshold(target_error)
        return Confidence(None, threshold), {"abstention": _told(threshold, target_error, None)}

    gold = _on_gold(selections(verdicts.keys()), verdicts)
    if not gold.known:
        raise InputError(f"{scores}: none of the {len(verdicts)} verdicts of --gold is of a pair in it; ids must match")
    calibration, found = None, {}
    if len(gold.sizes) < FEW:
        say(
            f"{scores}: gold knows {len(gold.sizes)} of the labels, too few to calibrate by: the probabilities are "
            f"those of strategy {strategy}; give {FEW} verdicts or more"
        )
    else:
        method = method_for(len(gold.sizes))
        calibration = fit(gold.sizes, gold.right, method)
        calibrated = measured(held_out(gold.sizes, gold.right, method), gold.right)
        own = measured(gold.probability, gold.right)
        del own["reliability"]
        told = {"method": method, "gold_pairs": len(gold.sizes), "right": float(gold.right.mean())}
        found = {"probabilities": told | calibrated | ({"uncalibrated": own} if strategy in MODELS else {})}
        if gold.right.mean() <= 0.5:
            wrong = 100 * (1 - gold.right.mean())
            say(f"{scores}: by gold {wrong:.0f} % of the labels are wrong: do not train on them")
    if target_error is None:
        return Confidence(calibration), found
    threshold = threshold_by_gold(gold.sizes, gold.right, target_error)
    found["abstention"] = _told(threshold, target_error, calibration)
    return Confidence(calibration, threshold), found


class _Gold(NamedTuple):
    """Labels that people know to be right or wrong; ``known`` counts ties and what was picked too."""

    sizes: np.ndarray
    right: np.ndarray
    probability: np.ndarray
    known: int


def _on_gold(selections: Iterator[tuple[list[str], Selection]], verdicts: Mapping[str, Verdict]) -> _Gold:
    columns, known = [], 0
    for ids, chosen in selections:
        at = [row for row, pair in enumerate(ids) if pair in verdicts]
        known += len(at)
        at = [row for row in at if verdicts[ids[row]].reason != DISAGREES]
        said = np.array([verdicts[ids[row]].preferred for row in at])
        preferred, margin = chosen.preferred[at], chosen.margin[at].astype(np.float64)
        usable = (said != 0) & (preferred != 0)
        own = Confidence().probability(chosen)[at].astype(np.float64)
        columns.append(np.stack([np.abs(margin), said == preferred, own])[:, usable])
    sizes, right, own = np.concatenate(columns, axis=1) if columns else np.zeros((3, 0))
    return _Gold(sizes, right.astype(bool), own, known)


def _told(threshold: Threshold, target_error: float, calibration: Calibration | None) -> dict[str, Any]:
    """An abstention threshold for the summary; below ``probability`` no label is kept."""
    found = {"target_error": target_error, "margin": threshold.size, "kept": threshold.kept, "error": threshold.error}
    if threshold.at_most is None:
        return found | {"by": "the model's own probabilities"}
    at = {} if calibration is None else {"probability": float(calibration(np.array([threshold.size]))[0])}
    return found | at | {"error_at_most": threshold.at_most, "by": "gold"}
