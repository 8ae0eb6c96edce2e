"""``adaptrm label``: a score folder and its pairs to a label file."""

from collections import Counter
from collections.abc import Iterator, Set
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from adaptrm import paths
from adaptrm.confidence import confidence_of, halves
from adaptrm.data.gold import read_verdicts
from adaptrm.data.labels import Label, write_labels
from adaptrm.data.review import ABSTAINED, DISAGREES, TIE, RuleTexts, review_row, reviewing, said_by
from adaptrm.data.scored_pairs import pairs_of, read_scored
from adaptrm.data.scores import Batch, chosen_rules, judged, read_batches, read_manifest
from adaptrm.errors import InputError
from adaptrm.evidence.checks import by_rule
from adaptrm.evidence.job import EvidenceOptions, weighed
from adaptrm.health.check import lengths
from adaptrm.health.measures import main_warnings, measured
from adaptrm.health.sums import Sums
from adaptrm.progress import say
from adaptrm.reliability import check_drawable, draw
from adaptrm.selection import EvidenceWeights, Selection, select


@dataclass(frozen=True)
class LabelJob:
    """What ``adaptrm label`` is asked for.

    Attributes:
        pairs: where the pairs lie now; None takes the manifest's word.
        rules: ids for strategy ``fixed``.
        gold: people's verdicts; they are the labels of their pairs, and calibrate the others' probabilities. Where
            strategy ``evidence`` fits weights, half of them do so, and the other half calibrates.
        evidence: more of that strategy.
        review: where to write the pairs that people should look at.
        target_error: share of wrong labels that may be kept; what is less sure gets no label.
        reliability: where to draw a reliability diagram.
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
    review: str | None = None
    target_error: float | None = None
    reliability: str | None = None


def label(job: LabelJob) -> dict[str, Any]:
    """Select rules, label the pairs and write the labels; ties and what is not sure enough are left out and counted.

    Where an adapter chose the rules of each pair, exactly these decide, whatever ``k`` is.

    Returns:
        Pairs, labels, ties, agreement of the rules with the pairs' own ``preferred`` (None where they have none), the
        rules that decided most often, and whether the judge reads them: share of the first direction of its
        differences, their correlation with length. With gold how good the probabilities are and how many labels people
        overruled, with a target error below what it abstains and how often, with a review why pairs are in it;
        with strategy ``evidence`` the report of its weights.

    Raises:
        InputError: scores and pairs do not belong together, or an argument is wrong.
    """
    source = pairs_of(job.scores, job.pairs)
    _check_files(job, source)
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
    verdicts = {} if job.gold is None else read_verdicts(job.gold)
    fits = job.strategy == "evidence" and job.evidence.weights is None
    fitting, checking = halves(verdicts) if fits else ({}, verdicts)
    strategy, weights = weighed(job.scores, source, job.strategy, fitting, job.evidence)
    counts: Counter[str] = Counter()
    decided, sums = np.zeros(len(rule_ids), np.int64), Sums(len(rule_ids))

    def selected(scores: Batch, row: int) -> Selection:
        try:
            return _selection(job, scores, strategy, fixed, weights, row)
        except ValueError as wrong:
            raise InputError(f"{job.scores}: {wrong}") from None

    def selections(some: Set[str] | None) -> Iterator[tuple[list[str], Selection]]:
        row = 0
        for scores in read_batches(job.scores, chosen=True):
            if some is None or not some.isdisjoint(scores.ids):
                yield scores.ids, selected(scores, row)
            row += len(scores.ids)

    confidence, told = confidence_of(selections, strategy, checking, job.target_error, job.scores)
    if job.reliability and "probabilities" not in told:
        raise InputError("--reliability: too few verdicts to draw; it shows probabilities that gold calibrated")

    def labels(review) -> Iterator[Label]:
        row, texts = 0, RuleTexts.of(manifest)
        for scores, pairs in read_scored(job.scores, source, chosen=True):
            chosen = selected(scores, row)
            np.add.at(decided, chosen.rules[chosen.preferred != 0], 1)
            if all_judged:
                sums.add(scores.a, scores.b, scores.relevance, lengths(pairs))
            said = (chosen.preferred, chosen.rules, chosen.margin, confidence.probability(chosen))
            said = zip(pairs, *(x.tolist() for x in said), confidence.sure(chosen).tolist(), strict=True)
            for at, (pair, sign, rules, margin, p, sure) in enumerate(said):
                counts["pairs"] += 1
                disagrees = False
                if pair.preferred is not None and sign:
                    disagrees = (pair.preferred == "a") != (sign > 0)
                    counts["compared"] += 1
                    counts["agree"] += not disagrees
                if (verdict := verdicts.get(pair.id)) is not None:
                    counts["gold"] += 1
                    counts["overruled"] += sign * verdict.preferred < 0
                    sign, p, reason = verdict.preferred, 1.0, None
                    counts["gold_ties"] += sign == 0
                else:
                    reason = TIE if sign == 0 else ABSTAINED if not sure else DISAGREES if disagrees else None
                if reason is not None:
                    counts[reason] += 1
                if reason is not None and job.review is not None:
                    review(review_row(pair, reason, sign, p, said_by(texts, rules, scores, at)))
                if sign == 0 or reason == ABSTAINED:
                    continue
                sides = (pair.response_a, pair.response_b)[::sign]
                yield Label(pair.id, pair.prompt, *sides, tuple(rule_ids[r] for r in rules), margin * sign or 0.0, p)
            row += len(scores.ids)

    with reviewing(job.review) as review:
        written = write_labels(job.out, labels(review))
    if job.reliability:
        draw(told["probabilities"], job.reliability)
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
        "ties": counts[TIE],
        "abstained": counts[ABSTAINED],
        "agreement": counts["agree"] / counts["compared"] if counts["compared"] else None,
        "compared": counts["compared"],
        "deciding_rules": {rule_ids[rule]: int(decided[rule]) for rule in most if decided[rule]},
        **_about_people(job, len(verdicts), counts),
        **told,
        **health,
        **evidence,
    }


def _about_people(job: LabelJob, verdicts: int, counts: Counter[str]) -> dict[str, Any]:
    """What people said and what they are asked."""
    found: dict[str, Any] = {}
    if job.gold is not None:
        of_pairs = {"of_these_pairs": counts["gold"], "ties": counts["gold_ties"], "overruled": counts["overruled"]}
        found["gold"] = {"verdicts": verdicts, **of_pairs}
    if job.review is not None:
        found["review"] = {
            "file": str(job.review),
            **{reason: counts[reason] for reason in (TIE, ABSTAINED, DISAGREES)},
        }
    return found


def _check_files(job: LabelJob, source: str) -> None:
    """Raise where a file that is written is another one, or a picture cannot be drawn."""
    if job.reliability is not None:
        if job.gold is None:
            raise InputError("--reliability draws what --gold shows of the probabilities; give both")
        check_drawable(job.reliability)
    written = [file for file in (job.out, job.review, job.reliability) if file is not None]
    for place, file in enumerate(written):
        for other in (source, *filter(None, [job.gold]), *written[:place]):
            paths.check_apart(file, other)


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
