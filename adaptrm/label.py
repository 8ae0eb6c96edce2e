"""``adaptrm label``: a score folder and its pairs to a label file."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from adaptrm import paths
from adaptrm.data.labels import Label, write_labels
from adaptrm.data.scored_pairs import pairs_of, read_scored
from adaptrm.data.scores import Batch, chosen_rules, judged, read_manifest
from adaptrm.errors import InputError
from adaptrm.evidence.checks import by_rule
from adaptrm.evidence.job import EvidenceOptions, weighed
from adaptrm.health.check import lengths
from adaptrm.health.measures import main_warnings, measured
from adaptrm.health.sums import Sums
from adaptrm.progress import say
from adaptrm.selection import EvidenceWeights, Selection, select


@dataclass(frozen=True)
class LabelJob:
    """What ``adaptrm label`` is asked for.

    Attributes:
        pairs: where the pairs lie now; None takes the manifest's word.
        rules: ids for strategy ``fixed``.
        gold: people's verdicts, by which strategy ``evidence`` fits weights.
        evidence: more of that strategy.
    """

    scores: str
    out: str
    pairs: str | None = None
    strategy: str = "max-discrepancy"
    k: int = 5
    discrepancy_weight: float = 0.5
    rules: tuple[str, ...] = ()
    seed: int = 0
    gold: str | None = None
    evidence: EvidenceOptions = field(default_factory=EvidenceOptions)


def label(job: LabelJob) -> dict[str, Any]:
    """Select rules, label the pairs and write the labels; ties are left out and counted.

    Where an adapter chose the rules of each pair, exactly these decide, whatever ``k`` is.

    Returns:
        Pairs, labels, ties, agreement with the pairs' own ``preferred`` (None where they have none), the rules that
        decided most often, and whether the judge reads them: share of the first direction of its differences, their
        correlation with length. With strategy ``evidence`` the report of its weights too.

    Raises:
        InputError: scores and pairs do not belong together, or an argument is wrong.
    """
    source = pairs_of(job.scores, job.pairs)
    paths.check_apart(job.out, source)
    manifest = read_manifest(job.scores)
    rule_ids, all_judged = list(manifest["rules"]), chosen_rules(manifest) is None
    if not all_judged and job.strategy not in ("max-discrepancy", "all"):
        raise InputError(
            f"{job.scores}: an adapter chose the rules of each pair, and these decide; leave out --strategy "
            f"{job.strategy}, or score all rules"
        )
    if unknown := [rule for rule in job.rules if rule not in rule_ids]:
        raise InputError(f"{job.scores}: has no rule {unknown[0]!r}; its rules are in manifest.json")
    fixed = [rule_ids.index(rule) for rule in job.rules] or None
    strategy, weights = weighed(job.scores, source, job.strategy, job.gold, job.evidence)
    counts: Counter[str] = Counter()
    decided, sums = np.zeros(len(rule_ids), np.int64), Sums(len(rule_ids))

    def labels() -> Iterator[Label]:
        row = 0
        for scores, pairs in read_scored(job.scores, source, chosen=True):
            try:
                chosen = _selection(job, scores, strategy, fixed, weights, row)
            except ValueError as wrong:
                raise InputError(f"{job.scores}: {wrong}") from None
            np.add.at(decided, chosen.rules[chosen.preferred != 0], 1)
            if all_judged:
                sums.add(scores.a, scores.b, scores.relevance, lengths(pairs))
            said = (chosen.preferred, chosen.rules, chosen.margin, chosen.probability)
            for pair, sign, selected, margin, p in zip(pairs, *(x.tolist() for x in said), strict=True):
                counts["pairs"] += 1
                if sign == 0:
                    counts["ties"] += 1
                    continue
                if pair.preferred is not None:
                    counts["compared"] += 1
                    counts["agree"] += (pair.preferred == "a") == (sign > 0)
                sides = (pair.response_a, pair.response_b)[::sign]
                rules = tuple(rule_ids[rule] for rule in selected)
                yield Label(pair.id, pair.prompt, *sides, rules, abs(margin), max(p, 1 - p))
            row += len(scores.ids)

    written = write_labels(job.out, labels())
    health = measured(sums) if all_judged else {}
    for warning in main_warnings(health, sums.pairs, len(rule_ids)) if all_judged else ():
        say(f"{job.scores}: {warning}")
    evidence = {}
    if weights is not None:
        rules = by_rule(weights, rule_ids, decided / max(counts["pairs"], 1))
        evidence = {"evidence": dict(weights.report) | {"by_rule": rules}}
    most = np.argsort(-decided, kind="stable")[:10].tolist()
    return {
        "labels": str(job.out),
        "strategy": strategy,
        "pairs": counts["pairs"],
        "labelled": written,
        "ties": counts["ties"],
        "agreement": counts["agree"] / counts["compared"] if counts["compared"] else None,
        "compared": counts["compared"],
        "deciding_rules": {rule_ids[rule]: int(decided[rule]) for rule in most if decided[rule]},
        **health,
        **evidence,
    }


def _selection(
    job: LabelJob,
    scores: Batch,
    strategy: str,
    fixed: list[int] | None,
    weights: EvidenceWeights | None,
    row: int,
) -> Selection:
    """The rules that decide some pairs and what they say; those that were judged, where an adapter chose them."""
    if scores.rules is None:
        how = (strategy, job.k, job.discrepancy_weight, fixed, weights)
        arrays = (scores.a, scores.b, scores.relevance)
        return select(*arrays, *how, seed=job.seed, ids=scores.ids, first_row=row)
    arrays = (judged(x, scores.rules) for x in (scores.a, scores.b, scores.relevance))
    chosen = select(*arrays, "all", discrepancy_weight=job.discrepancy_weight, ids=scores.ids)
    return replace(chosen, rules=judged(scores.rules, chosen.rules))
