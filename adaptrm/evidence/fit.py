"""``fit_evidence``: what each rule's word is worth, from scores in memory or in a folder of any size."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from adaptrm.data.scores import BATCH_ROWS, Batch, Scores, read_batches, read_manifest
from adaptrm.errors import InputError
from adaptrm.evidence.checks import ONE_THING, by_rule, directions, gold_warnings, measure, nuisance_warnings
from adaptrm.evidence.gathered import Evident, Gathered
from adaptrm.evidence.gold import fit_gold
from adaptrm.evidence.weights import EvidenceWeights
from adaptrm.selection import evidence

Covariates = Float[np.ndarray, "pairs covariates"] | Mapping[str, Float[np.ndarray, " pairs"]]


class TooLittle(InputError):
    """The scores cannot support weights."""


def fit_evidence(
    scores: Scores | str | os.PathLike,
    gold: Mapping[str, int] | None = None,
    covariates: Covariates | None = None,
    project: bool = True,
) -> EvidenceWeights:
    """What each rule's word is worth (METHOD.md section 3), from the discrepancies alone or with some verdicts.

    Second moments are of all pairs, expectation maximisation runs on 200,000 of them at most, those whose ids have the
    smallest hashes. Memory does not depend on the number of pairs in a folder.

    Args:
        scores: in memory, or their folder.
        gold: verdicts by the pair's id, 1 where response A is the better one, -1 for B, 0 for a tie, which counts
            nothing. Some 200 tell a preference from a nuisance that many rules share, which nothing else does.
        covariates: response A's minus B's, in the order of the scores, by name or as columns. The hidden preference's
            correlation with each is reported.
        project: take what goes along with the covariates for noise: the fit is to what is left of the discrepancies,
            and sigma gets what was taken out, so that the vote holds it against rules that share it.

    Returns:
        Weights with the rules' ids and a report: ``pairs``; ``pairs_fitted``; ``trust`` and ``kept`` (shrinkage: the
        shares that were kept of what the weights differ by and of the correlations; of a fit without gold); ``gold``
        (which vote the verdicts chose, its cross-validated loss and agreement beside the others'); ``alike`` and
        ``second`` (first and second direction); ``kurtosis`` of the vote and that of a preference of two values;
        ``correlations`` with covariates; ``by_rule``; and ``warnings``.

    Raises:
        InputError: too few pairs or verdicts, scores that say one thing by all rules, values that are no numbers,
            covariates of other pairs.
    """
    named = _named(covariates)
    columns = np.stack([*named.values()], axis=1) if named else None
    if isinstance(scores, Scores):
        where, rule_ids, batches = "scores", list(scores.rule_ids), _slices(scores)
    else:
        where, rule_ids, batches = str(scores), list(read_manifest(scores)["rules"]), read_batches(scores)
    return fit_batches(_beside(batches, columns), rule_ids, list(named), gold or {}, project, where)


def fit_batches(
    batches: Iterable[tuple[Batch, Float[np.ndarray, "pairs covariates"]]],
    rule_ids: Sequence[str],
    names: Sequence[str],
    gold: Mapping[str, int],
    project: bool,
    where: str,
) -> EvidenceWeights:
    """As ``fit_evidence``, from batches of scores and of their named covariates.

    Args:
        where: whose scores these are, for messages.

    Raises:
        TooLittle: the scores cannot support weights.
        InputError: as ``fit_evidence``.
    """
    gathered = Gathered(len(rule_ids), len(names), gold)
    for batch, covariates in batches:
        try:
            gathered.add(batch.ids, batch.a, batch.b, covariates)
        except ValueError as wrong:
            raise InputError(f"{where}: {wrong}") from None
    evident = gathered.evident(project)
    weights, report = _fit(evident, bool(gold), where)
    sigma = (weights.sigma + evident.explained).astype(np.float32)
    weights = EvidenceWeights(weights.a, (sigma + sigma.T) / 2, tuple(rule_ids))
    found = measure(evident, weights)
    decides, correlations = found.pop("strongest"), dict(zip(names, found.pop("correlations"), strict=True))
    report = {"pairs": evident.pairs, "pairs_fitted": len(evident.some), **report, "correlations": correlations}
    report["projected"] = list(names) if project else []
    if gold:
        said = list(gold_warnings(report["gold"]))
    else:
        report |= found
        said = list(nuisance_warnings(report, len(evident.some)))
    report |= {"warnings": said, "by_rule": by_rule(weights, rule_ids, decides)}
    return EvidenceWeights(weights.a, weights.sigma, weights.rule_ids, report)


def _fit(evident: Evident, with_gold: bool, where: str) -> tuple[evidence.EvidenceWeights, dict[str, Any]]:
    found = directions(evident.moments, evident.pairs)
    if not with_gold and found["alike"] > ONE_THING:
        raise TooLittle(
            f"{where}: the judge says one thing by all rules (their mean correlation is {found['alike']:.2f}), which "
            "leaves nothing to weigh them by; teach it with adaptrm train judge, give gold verdicts, or use strategy "
            "max-discrepancy"
        )
    try:
        alone = evidence.fit_moments(evident.some, evident.moments, evident.pairs)
    except ValueError as wrong:
        if not with_gold:
            raise TooLittle(f"{where}: {wrong}") from None
        alone = None
    if not with_gold:
        return alone.weights, found | {"trust": alone.trust, "kept": alone.kept}
    try:
        chosen = fit_gold(evident.gold, evident.verdicts, evident.moments, evident.pairs, alone and alone.weights)
    except ValueError as wrong:
        raise InputError(f"{where}: {wrong}") from None
    report = {name: value for name, value in chosen._asdict().items() if name != "weights"}
    return chosen.weights, found | {"gold": {"verdicts": len(evident.verdicts), **report}}


def _named(covariates: Covariates | None) -> dict[str, np.ndarray]:
    if covariates is None:
        return {}
    if not isinstance(covariates, Mapping):
        columns = np.atleast_2d(np.asarray(covariates, np.float64).T)
        covariates = {f"covariate {i}": column for i, column in enumerate(columns)}
    named = {name: np.asarray(column, np.float64) for name, column in covariates.items()}
    if len(shapes := {column.shape for column in named.values()}) > 1 or any(len(shape) != 1 for shape in shapes):
        raise InputError(f"covariates must be columns with a number a pair; their shapes are {sorted(shapes)}")
    return named


def _slices(scores: Scores) -> Iterator[Batch]:
    for start in range(0, len(scores), BATCH_ROWS):
        rows = slice(start, start + BATCH_ROWS)
        yield Batch(scores.ids[rows], scores.a[rows], scores.b[rows], scores.relevance[rows])


def _beside(batches: Iterable[Batch], columns: np.ndarray | None) -> Iterator[tuple[Batch, np.ndarray]]:
    row = 0
    for batch in batches:
        of_batch = np.zeros((len(batch.ids), 0)) if columns is None else columns[row : row + len(batch.ids)]
        row += len(batch.ids)
        if len(of_batch) < len(batch.ids):
            raise InputError(f"the covariates are of {len(columns)} pairs, the scores of more")
        yield batch, of_batch
    if columns is not None and row < len(columns):
        raise InputError(f"the covariates are of {len(columns)} pairs, the scores of {row}")
