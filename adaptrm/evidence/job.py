"""The weights that ``adaptrm label --strategy evidence`` votes with."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from adaptrm.data.scored_pairs import read_scored
from adaptrm.data.scores import Batch, read_manifest
from adaptrm.errors import InputError
from adaptrm.evidence.fit import TooLittle, fit_batches
from adaptrm.evidence.weights import EvidenceWeights
from adaptrm.health.check import lengths
from adaptrm.progress import say


@dataclass(frozen=True)
class EvidenceOptions:
    """What is asked of strategy ``evidence``.

    Attributes:
        weights: file of weights to label by; None fits them on the scores.
        save_weights: where to write those that were fitted.
        fall_back: label by ``max-discrepancy`` where the scores cannot support weights.
        project_length: take what goes along with length for noise.
    """

    weights: str | None = None
    save_weights: str | None = None
    fall_back: bool = False
    project_length: bool = False


def weighed(
    scores: str, source: str, strategy: str, gold: Mapping[str, int], options: EvidenceOptions
) -> tuple[str, EvidenceWeights | None]:
    """The strategy to label a score folder by, and its weights if that is ``evidence``.

    Args:
        source: the scored pairs.
        gold: verdicts to fit by, by the pair's id.

    Raises:
        TooLittle: the scores cannot support weights, and nothing says to fall back.
        InputError: the options do not go together, or the files do not.
    """
    given = [f"--{name.replace('_', '-')}" for name, value in vars(options).items() if value]
    if strategy != "evidence":
        if given:
            raise InputError(f"{given[0]} goes with --strategy evidence; the strategy is {strategy}")
        return strategy, None
    if options.weights is not None and len(given) > 1:
        other = next(flag for flag in given if flag != "--weights")
        raise InputError(
            f"{other} is for weights that are fitted here, --weights names some that were; give one of them"
        )
    rule_ids = list(read_manifest(scores)["rules"])
    if options.weights is not None:
        weights = EvidenceWeights.load(options.weights)
        if list(weights.rule_ids) != rule_ids:
            raise InputError(f"{options.weights}: of other rules than {scores}; fit weights on scores of its pool")
        return strategy, weights
    try:
        weights = _fitted(scores, source, rule_ids, gold, options.project_length)
    except TooLittle as wrong:
        if not options.fall_back:
            raise
        say(f"{wrong}; labelled by max-discrepancy, as --fall-back says")
        return "max-discrepancy", None
    for warning in weights.report["warnings"]:
        say(f"{scores}: {warning}")
    if options.save_weights is not None:
        weights.save(options.save_weights)
    return strategy, weights


def _fitted(
    scores: str, source: str, rule_ids: list[str], gold: Mapping[str, int], project_length: bool
) -> EvidenceWeights:
    def batches() -> Iterator[tuple[Batch, np.ndarray]]:
        for batch, pairs in read_scored(scores, source):
            yield batch, lengths(pairs)[:, None]

    return fit_batches(batches(), rule_ids, ["length"], gold, project_length, scores)
