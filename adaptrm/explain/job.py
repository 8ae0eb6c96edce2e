"""``adaptrm explain``: one pair's rewards, the rules that decided it, and what they say of each response."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from adaptrm.data.labels import read_labels
from adaptrm.data.preferences import Pair, read_pairs
from adaptrm.data.review import RuleTexts
from adaptrm.data.scored_pairs import pairs_of, read_scored
from adaptrm.data.scores import Batch, judged, read_manifest
from adaptrm.errors import InputError

STRATEGIES = ("max-discrepancy", "evidence", "all", "relevance")  # whose choice follows from the pair's own scores
NUMBERS = ("score_a", "score_b", "difference", "relevance", "selection_score")
SIDES = {1: "a", -1: "b", 0: None}


@dataclass(frozen=True)
class ExplainJob:
    """What ``adaptrm explain`` is asked for.

    Attributes:
        model: the reward model.
        id: of the pair; None takes the first.
        scores: score folder of these pairs; or
        judge: a model that is asked now about the rules of the pool ``rules``.
        labels: a label file: its rules decided, whatever they were selected by. It needs neither scores nor a judge.
        rules: pool with the rules' texts, where no score folder holds them.
        weights: file of weights, of strategy ``evidence``.
    """

    model: str
    pairs: str
    id: str | None = None
    scores: str | None = None
    judge: str | None = None
    labels: str | None = None
    rules: str | None = None
    strategy: str = "max-discrepancy"
    k: int = 5
    discrepancy_weight: float = 0.5
    weights: str | None = None
    template: str = "conversation-first"
    dtype: str = "float32"

    def check(self) -> None:
        """Raise where the options do not go together."""
        labelled, evidence = self.labels is not None, self.strategy == "evidence"
        wrong = {
            "a reward alone explains nothing: give --scores DIR, --judge MODEL with --rules POOL, or --labels FILE": (
                self.scores is None and self.judge is None and not labelled
            ),
            "--scores and --judge both say what the judge says; give one": None not in (self.scores, self.judge),
            "--judge needs --rules POOL, which it is asked about": self.judge is not None and self.rules is None,
            "--labels names the rules that decided; leave out --strategy and --weights": (
                labelled and (self.strategy != "max-discrepancy" or self.weights is not None)
            ),
            f"--strategy {self.strategy}: what it selects does not follow from the pair; give --labels FILE": (
                self.strategy not in STRATEGIES
            ),
            "--strategy evidence and --weights FILE (of adaptrm label --save-weights) go together": (
                evidence != (self.weights is not None)
            ),
        }
        for message, is_so in wrong.items():
            if is_so:
                raise InputError(message)


class Verdict(NamedTuple):
    """What rules say: their ids, +1 for A, -1 for B or 0, the margin of A over B, the probability that A is better."""

    rules: list[str]
    preferred: int
    margin: float
    probability: float


def explain(job: ExplainJob) -> dict[str, Any]:
    """Rewards, deciding rules and their scores of one pair.

    Returns:
        The pair; of both responses the reward, the difference A - B and its sigmoid ``probability_a`` (Bradley-Terry);
        what the rules prefer, with margin and probability; whether both agree (None where one of them has no
        preference); of each deciding rule, in the order of selection, text, sign, the score of each response, their
        difference, relevance and selection score (None where no judge was asked).

    Raises:
        InputError: the options do not go together, there is no such pair, or files do not belong together.
    """
    from adaptrm.evidence.weights import EvidenceWeights
    from adaptrm.judge import Judge
    from adaptrm.reward_model import RewardModel
    from adaptrm.rules import RulePool

    job.check()
    pool = None if job.rules is None else RulePool.load(job.rules)
    texts = None if pool is None else RuleTexts(list(pool.ids), [r.text for r in pool], [r.sign for r in pool])
    scores = None
    if job.scores is not None:
        pair, scores = _scored(job, pool)
        texts = texts or RuleTexts.of(read_manifest(job.scores))
    elif (pair := next((pair for pair in read_pairs(job.pairs) if job.id in (None, pair.id)), None)) is None:
        raise InputError(f"{job.pairs}: has no pair {job.id!r}" if job.id else f"{job.pairs}: holds no pairs")
    elif job.judge is not None:
        found = Judge.from_pretrained(job.judge, pool, job.template, job.dtype).score([pair])
        scores = Batch(found.ids, found.a, found.b, found.relevance)
    weights = None if job.weights is None else EvidenceWeights.load(job.weights)
    verdict = _decided(job, scores, texts, weights) if job.labels is None else _labelled(job, pair)
    if texts is None:
        texts = RuleTexts(verdict.rules, *[[None] * len(verdict.rules)] * 2)
    if unknown := [rule for rule in verdict.rules if rule not in texts.ids]:
        raise InputError(f"{job.labels}: rule {unknown[0]!r} is not among those of {job.rules or job.scores}")
    a, b = RewardModel.from_pretrained(job.model, job.dtype).score_pairs([pair])[0].tolist()
    if not math.isfinite(a) or not math.isfinite(b):
        raise InputError(f"{job.model}: the reward of pair {pair.id!r} is not finite in {job.dtype}; check its weights")
    by_rewards, by_rules = (a > b) - (a < b), verdict.preferred
    probability = 0.5 + 0.5 * math.tanh((a - b) / 2)  # the sigmoid, and no overflow
    preferred = {"rewards": SIDES[by_rewards], "rules": SIDES[by_rules], "people": pair.preferred}
    return {
        "model": job.model,
        "id": pair.id,
        "prompt": [dict(message) for message in pair.prompt],
        "response_a": pair.response_a,
        "response_b": pair.response_b,
        "rewards": {"a": a, "b": b, "difference": a - b, "probability_a": probability},
        "rules": {
            "selected_by": job.labels or job.strategy,
            "margin": verdict.margin,
            "probability_a": verdict.probability,
        },
        "preferred": preferred,
        "agree": by_rewards == by_rules if by_rewards and by_rules else None,
        "deciding_rules": [_said(job, scores, texts, texts.ids.index(rule), weights) for rule in verdict.rules],
    }


def _scored(job: ExplainJob, pool) -> tuple[Pair, Batch]:
    """The pair and what the score folder holds of it."""
    from adaptrm.health.check import check_pool_of

    if pool is not None:
        check_pool_of(job.scores, pool)
    for scores, pairs in read_scored(job.scores, pairs_of(job.scores, job.pairs), chosen=True):
        for at, pair in enumerate(pairs):
            if job.id in (None, pair.id):
                return pair, Batch([pair.id], *(None if x is None else x[at : at + 1] for x in scores[1:]))
    raise InputError(f"{job.scores}: holds no scores of a pair {job.id!r}; give an --id of {job.pairs}")


def _decided(job: ExplainJob, scores: Batch, texts: RuleTexts, weights) -> Verdict:
    """What the strategy makes of the scores; of rules that an adapter chose exactly these decide, as in ``label``."""
    from adaptrm.selection import select

    few = scores.rules is not None
    if weights is not None and (few or list(weights.rule_ids) != texts.ids):
        raise InputError(f"{job.weights}: of other rules than those that were scored; fit weights on all of these")
    arrays = (judged(x, scores.rules) for x in (scores.a, scores.b, scores.relevance))
    how = ("all" if few else job.strategy, job.k, job.discrepancy_weight)
    try:
        chosen = select(*arrays, *how, weights=weights, ids=scores.ids)
    except ValueError as wrong:
        raise InputError(f"{job.scores or job.judge}: {wrong}") from None
    rules = judged(scores.rules, chosen.rules) if few else chosen.rules
    said = (int(chosen.preferred[0]), float(chosen.margin[0]), float(chosen.probability[0]))
    return Verdict([texts.ids[rule] for rule in rules[0]], *said)


def _labelled(job: ExplainJob, pair: Pair) -> Verdict:
    """What a label file says of the pair."""
    label = next((label for label in read_labels(job.labels) if label.id == pair.id), None)
    if label is None or not label.rules:
        what = "has no label" if label is None else "names no rules in the label"
        raise InputError(f"{job.labels}: {what} of pair {pair.id!r}; give --scores or --judge")
    for sign in (1, -1):
        if (label.prompt, (label.chosen, label.rejected)[::sign]) == (pair.prompt, pair.responses):
            probability = label.probability if sign > 0 else 1 - label.probability
            return Verdict(list(label.rules), sign, sign * label.rule_margin or 0.0, probability)
    raise InputError(f"{job.labels}: the label of {pair.id!r} is of other texts than {job.pairs}; label again")


def _said(job: ExplainJob, scores: Batch | None, texts: RuleTexts, rule: int, weights) -> dict[str, Any]:
    """One rule and what the judge says of it."""
    from adaptrm.selection.top_rules import selection_score

    found = {"id": texts.ids[rule], "text": texts.texts[rule], "sign": texts.signs[rule]}
    if scores is None or math.isnan(scores.a[0, rule]):
        return found | dict.fromkeys(NUMBERS)
    a, b, relevance = (x[0, rule] for x in (scores.a, scores.b, scores.relevance))
    scale = None if weights is None else weights.arrays().scale[rule]
    score = selection_score(a, b, relevance, None if job.strategy == "relevance" else job.discrepancy_weight, scale)
    return found | dict(zip(NUMBERS, map(float, (a, b, a - b, relevance, score)), strict=True))
