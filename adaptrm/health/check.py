"""``adaptrm rules check POOL --scores DIR``: does the judge read the rule?"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from adaptrm.data.preferences import Pair
from adaptrm.data.scored_pairs import pairs_of, read_scored
from adaptrm.data.scores import read_control, read_manifest
from adaptrm.errors import InputError
from adaptrm.health.measures import (
    EXPECTED,
    by_rule,
    first_direction,
    measured,
    no_opinion,
    repeated,
    same_answer,
    warnings,
)
from adaptrm.health.people import RuleVerdicts
from adaptrm.health.sums import Sums
from adaptrm.rules import RulePool
from adaptrm.selection import select

K = 5  # rules a pair, as published
AUCS = {"as_they_are": "auc", "centred": "auc_centred"}


def lengths(pairs: Sequence[Pair]) -> np.ndarray:
    """By how many characters response A is longer than B, of each pair."""
    return np.array([len(pair.response_a) - len(pair.response_b) for pair in pairs], np.float64)


def preferences(pairs: Sequence[Pair]) -> np.ndarray:
    """What people preferred: 1 for response A, -1 for B, 0 where nobody said."""
    return np.array([{"a": 1.0, "b": -1.0, None: 0.0}[pair.preferred] for pair in pairs])


def check_pool_of(scores: str, pool: RulePool) -> None:
    """Raise where a score folder was made with other rules."""
    manifest = read_manifest(scores)
    if list(pool.ids) != manifest["rules"] or pool.hash != manifest.get("pool_hash", pool.hash):
        raise InputError(
            f"{scores}: was not scored with pool {pool.name} as it is; give the pool that it was scored by"
        )


def check_scores(scores: str, pool: RulePool, pairs: str | None = None, labels: str | None = None) -> dict[str, Any]:
    """Measure a judge on a score folder; memory does not depend on the number of pairs.

    Args:
        pairs: where the scored pairs lie now; None takes the manifest's word.
        labels: a rule-label file of some of the replies.

    Returns:
        Pairs, those with a preference of people, share of the first direction, whether it answers rules of both signs
        alike, correlation with length, share of the scores that an empty response has (where ``score --control`` asked
        about one), mean AUC, agreement of votes (ties count half), which rules have no opinion, repeat others or never
        decide, all of each rule, and warnings. What needs people is empty without them. *Centred*: the mean over the
        rules is taken from each reply's scores, so that what is said by all rules alike counts nothing. What people
        preferred is one thing for all rules, so the mean AUC of centred scores is about .5 or less for a good judge
        too; a vote of centred scores that agrees with people more than by chance shows one that tells rules apart. With
        labels also what ``RuleVerdicts.found`` says; centred areas over .5 there show a judge that reads the rule.

    Raises:
        InputError: scores, pool, pairs and labels do not belong together.
    """
    check_pool_of(scores, pool)
    sums, decided, right = Sums(len(pool)), np.zeros(len(pool), np.int64), Counter()
    verdicts, k = labels and RuleVerdicts(labels, pool), min(K, len(pool))
    for batch, of_batch in read_scored(scores, pairs_of(scores, pairs), with_mass=True):
        preferred = preferences(of_batch)
        # Centred scores reach from -2 to 2: they are halved, and their differences count twice.
        centred = ((x - x.mean(axis=1, keepdims=True)) / 2 for x in (batch.a, batch.b))
        try:
            chosen = {
                "max_discrepancy": select(batch.a, batch.b, batch.relevance, k=k, ids=batch.ids),
                "all": select(batch.a, batch.b, batch.relevance, "all"),
                "max_discrepancy_centred": select(*centred, batch.relevance, k=k, discrepancy_weight=1),
            }
        except ValueError as wrong:
            raise InputError(f"{scores}: {wrong}") from None
        np.add.at(decided, chosen["max_discrepancy"].rules, 1)
        for how, selection in chosen.items():
            right[how] += float((1 + selection.preferred * preferred)[preferred != 0].sum() / 2)
        sums.add(batch.a, batch.b, batch.relevance, lengths(of_batch))
        sums.add_levels(batch.a, batch.b)
        sums.add_mass(batch.label_mass_a, batch.label_mass_b)
        sums.add_preferred(batch.a, batch.b, preferred)
        if verdicts:
            verdicts.add(of_batch, batch.a, batch.b)
    control = read_control(scores, len(pool))
    found = _found(sums, decided, right, control and control[1], pool)
    if verdicts:
        found["labels"] = verdicts.found()
    return found | {"warnings": list(warnings(found))}


def _found(
    sums: Sums, decided: np.ndarray, right: Mapping[str, float], control: np.ndarray | None, pool: RulePool
) -> dict[str, Any]:
    rules = by_rule(sums, pool.ids, decided, control)
    reasons = {id: reason for id, rule in rules.items() if (reason := no_opinion(rule))}
    again = repeated(sums.products)
    signs = np.array([rule.sign for rule in pool])
    enough = decided.sum() >= EXPECTED * len(pool)
    return {
        "pairs": sums.pairs,
        "people": sums.said,
        **measured(sums),
        **({} if control is None else {"said_of_nothing": _mean(rules, "said_of_nothing")}),
        "same_answer": same_answer(first_direction(sums.products)[1], signs),
        "mean_auc": {how: _mean(rules, name) for how, name in AUCS.items() if sums.said},
        "votes": {how: count / sums.said for how, count in right.items() if sums.said},
        "no_opinion": reasons,
        "repeats": {
            pool[rule].id: [pool[other].id, r] for rule, (other, r) in again.items() if pool[rule].id not in reasons
        },
        "never_decide": [id for id, rule in rules.items() if enough and not rule["decides"] and id not in reasons],
        "by_rule": rules,
    }


def _mean(rules: Mapping[str, Mapping[str, float]], name: str) -> float:
    return float(np.mean([rule[name] for rule in rules.values()]))
