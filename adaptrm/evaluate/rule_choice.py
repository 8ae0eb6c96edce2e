"""How well rules are chosen before a judge is asked: against the choice that all scores make, and by the labels."""

import json
import os
from collections import Counter
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import numpy as np
from jaxtyping import Float32, Int8, Int32

from adaptrm import paths
from adaptrm.data.preferences import Pair
from adaptrm.data.scored_pairs import pairs_of, read_scored
from adaptrm.data.scores import Batch, judged, read_batches, read_manifest
from adaptrm.errors import InputError
from adaptrm.evaluate.cells import interval
from adaptrm.selection import select

ORACLE, ADAPTER, RANDOM, CONSTANT, ALL = "oracle", "adapter", "random", "constant", "all"
CHOICES = (ORACLE, ADAPTER, CONSTANT, RANDOM, ALL)
RESAMPLES = 10_000


class Chooser(Protocol):
    """What chooses rules: a ``RuleAdapter``."""

    rule_ids: tuple[str, ...]

    def predict(self, pairs: list[Pair], k: int) -> Int32[np.ndarray, "pairs k"]: ...


class Values(Counter):
    """How often each of few values came."""

    def add(self, values: np.ndarray) -> None:
        self.update(values.tolist())

    def mean(self) -> float | None:
        return sum(value * count for value, count in self.items()) / self.total() if self else None

    def ci95(self, seed: int = 0) -> list[float] | None:
        """Of the mean, by bootstrap: drawing n values again draws a multinomial number of each."""
        if not self:
            return None
        n, counts = self.total(), np.array(list(self.values()))
        draws = np.random.default_rng(seed).multinomial(n, counts / n, RESAMPLES)
        return interval(draws @ np.array(list(self)) / n)


def evaluate_rules(
    adapter: Chooser,
    scores: str,
    pairs: str | None,
    out: str | os.PathLike,
    k: int = 5,
    *,
    model: str,
    dtype: str,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure an adapter on pairs whose scores by all rules are known, and write ``FILE.json``.

    Beside the adapter stand the *oracle* (max-discrepancy over all scores), the *constant* choice (the k rules that the
    oracle selects most often on these very pairs: no constant does better), k rules at *random*, and *all* rules.

    Args:
        pairs: where the scored pairs lie now; None takes the manifest's word.

    Returns:
        ``accuracy`` is the adapter's overlap@k, the share of the oracle's rules that it chooses. Of each choice in
        ``choices``: overlap; how often its label is the oracle's, and people's (a tie counts half); regret, by how much
        less often it is people's than the oracle's label is. Of each rule how often oracle and adapter choose it,
        precision and recall.

    Raises:
        InputError: the scores are of other rules or of chosen ones, there are not so many rules, or pairs and scores
            do not belong together.
    """
    if not str(out).endswith(".json"):
        raise InputError(f"{out}: results are JSON; give --out FILE.json")
    rule_ids = list(adapter.rule_ids)
    if read_manifest(scores)["rules"] != rule_ids:
        raise InputError(f"{scores}: holds scores of other rules than the adapter's {len(rule_ids)}; give its own")
    if not 1 <= k <= len(rule_ids):
        raise InputError(f"--k {k}: the adapter knows {len(rule_ids)} rules; give 1 to {len(rule_ids)}")
    source = pairs_of(scores, pairs)
    counts = np.zeros((3, len(rule_ids)), np.int64)  # by oracle, by adapter, by both
    for batch in read_batches(scores):
        np.add.at(counts[0], _oracle(scores, batch, k), 1)
    constant = np.argsort(-counts[0], kind="stable")[:k]
    measures = ("overlap", "as_oracle", "as_people", "regret")
    found = {choice: {name: Values() for name in measures} for choice in CHOICES}
    subsets: dict[str, Values] = {}
    row = 0
    for batch, of_batch in read_scored(scores, source):
        n = len(of_batch)
        oracle = _oracle(scores, batch, k)
        random = select(batch.a, batch.b, batch.relevance, "random", k, seed=seed, first_row=row)
        chosen = {
            ORACLE: oracle,
            ADAPTER: adapter.predict(of_batch, k),
            CONSTANT: np.tile(constant, (n, 1)),
            RANDOM: random.rules,
            ALL: np.tile(np.arange(len(rule_ids)), (n, 1)),
        }
        people = np.array([{"a": 1, "b": -1, None: 0}[pair.preferred] for pair in of_batch])
        labels = {choice: _vote(batch, rules) for choice, rules in chosen.items()}
        right = {choice: (1 + label * people)[people != 0] / 2 for choice, label in labels.items()}
        for choice, values in found.items():
            hits = (oracle[:, :, None] == chosen[choice][:, None, :]).any(axis=2)
            values["overlap"].add(hits.mean(axis=1))
            values["as_oracle"].add((labels[choice] == labels[ORACLE]).astype(np.float64))
            values["as_people"].add(right[choice])
            values["regret"].add(right[ORACLE] - right[choice])
            if choice == ADAPTER:
                np.add.at(counts[1], chosen[choice], 1)
                np.add.at(counts[2], oracle[hits], 1)
                for pair, share in zip(of_batch, hits.mean(axis=1), strict=True):
                    subsets.setdefault(pair.subset or "all", Values())[float(share)] += 1
        row += n
    overlap = found[ADAPTER]["overlap"]
    result = {
        "suite": "rules",
        "model": model,
        "dtype": dtype,
        "n": row,
        "people": found[ADAPTER]["as_people"].total(),
        "rules": len(rule_ids),
        "k": k,
        "accuracy": overlap.mean(),
        "ci95": overlap.ci95(),
        "overlap_by_chance": k / len(rule_ids),
        "constant_rules": [rule_ids[rule] for rule in constant],
        "choices": {
            choice: {name: {"value": of.mean(), "ci95": of.ci95()} for name, of in values.items()}
            for choice, values in found.items()
        },
        "by_rule": {
            rule: {
                "oracle": int(by_oracle),
                "adapter": int(by_adapter),
                "precision": float(by_both / by_adapter) if by_adapter else None,
                "recall": float(by_both / by_oracle) if by_oracle else None,
            }
            for rule, by_oracle, by_adapter, by_both in zip(rule_ids, *counts, strict=True)
        },
        "sections": {},
        "subsets": {
            name: {"n": of.total(), "accuracy": of.mean(), "ci95": of.ci95()} for name, of in sorted(subsets.items())
        },
    }
    if jax.process_index() == 0:
        paths.write_bytes(out, (json.dumps(result, indent=2) + "\n").encode())
    return result


def _oracle(scores: str, batch: Batch, k: int) -> Int32[np.ndarray, "pairs k"]:
    try:
        return select(batch.a, batch.b, batch.relevance, k=k, ids=batch.ids).rules
    except ValueError as wrong:
        raise InputError(f"{scores}: {wrong}") from None


def _vote(batch: Batch, rules: Int32[np.ndarray, "pairs k"]) -> Int8[np.ndarray, " pairs"]:
    """What the given rules say of each pair: 1 for response A, -1 for B, 0 for a tie."""
    arrays: list[Float32[np.ndarray, "pairs k"]] = [judged(x, rules) for x in (batch.a, batch.b, batch.relevance)]
    return select(*arrays, "all").preferred


def for_people(result: Mapping[str, Any]) -> dict[str, Any]:
    """What was measured and, under ``table``, the choices side by side in per cent."""
    from rich.table import Table

    table = Table(
        caption="label as oracle, as people: how often its label is theirs; regret: how much less often people's than "
        "the oracle's label is",
        caption_justify="left",
    )
    for heading in ("rules chosen by", f"overlap@{result['k']} %", "label as oracle %", "as people %", "regret"):
        table.add_column(heading, justify="left" if heading == "rules chosen by" else "right")
    for choice, measures in result["choices"].items():
        table.add_row(choice, *(_per_cent(**measure) for measure in measures.values()))
    plain = {name: value for name, value in result.items() if isinstance(value, str | int)}
    return plain | {"table": table}


def _per_cent(value: float | None, ci95: list[float] | None) -> str:
    if value is None or ci95 is None:
        return "none"
    return f"{100 * value:.1f} ({100 * ci95[0]:.1f} to {100 * ci95[1]:.1f})"
