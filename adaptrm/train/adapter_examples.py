"""Training examples of the Rule Adapter: pairs, and which rules should be chosen for them."""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float32

from adaptrm.config import DataOptions
from adaptrm.data.chat import ChatTokenizer
from adaptrm.data.labels import Label, LabelIndex, read_labels
from adaptrm.data.preferences import Pair, read_pairs
from adaptrm.data.rows import BadRows
from adaptrm.data.scored_pairs import pairs_of, read_scored
from adaptrm.data.scores import read_manifest
from adaptrm.errors import InputError
from adaptrm.judge.pair_prompt import choice_tree
from adaptrm.train.examples import Example, Examples, collect

Target = Float32[np.ndarray, " rules"]


def adapter_examples(
    options: DataOptions,
    chat: ChatTokenizer,
    pad_id: int | None,
    rule_ids: Sequence[str],
    k: int,
    both_orders: bool,
) -> Examples:
    """A tree a pair with the targets of all rules at each leaf.

    Labels give k-hot targets, as published: 1 for the rules that decided. Scores give soft ones: half the selection
    score, ``(relevance + |a - b| / 2) / 2``, which lies in [0, 1]; cross-entropy then learns its mean given the pair.

    Args:
        rule_ids: the rules that the targets are of.
        k: rules of a label.
        both_orders: a leaf for either order of the responses (``choice_tree``).

    Raises:
        InputError: no labels and no scores, or both; they are of other rules, or other numbers of them.
    """
    if (options.labels is None) == (options.scores is None) or options.labels == "human":
        raise InputError("an adapter needs one of data.labels (a label file) and data.scores (a score folder)")
    if options.mix:
        raise InputError("data.mix is of reward models; put the pairs of an adapter into one file")
    if not k <= len(rule_ids):
        raise InputError(f"loss.k is {k}; with {len(rule_ids)} rules it must be 1 to {len(rule_ids)}")
    bad = BadRows(options.on_bad_row)
    source = options.pairs or options.labels or options.scores
    wanted = _soft(options, rule_ids) if options.labels is None else _hot(options, rule_ids, k, bad)

    def tree(pair: Pair):
        return choice_tree(chat, pair, pad_id, both_orders)

    examples = (Example(source, pair, tree, target, float(known)) for pair, target, known in wanted)
    return collect(options, bad, examples, len(rule_ids))


def _hot(options: DataOptions, rule_ids: Sequence[str], k: int, bad: BadRows) -> Iterator[tuple[Pair, Target, bool]]:
    """Pairs, the rules that decided, and whether there is a label at all."""
    position = {rule: number for number, rule in enumerate(rule_ids)}

    def rules_of(label: Label) -> list[int]:
        at = f"{options.labels}: label {label.id!r}"
        if unknown := [rule for rule in label.rules if rule not in position]:
            raise InputError(f"{at}: rule {unknown[0]!r} is not in the pool; give the pool of the labels (--rules)")
        if len(label.rules) != k:
            raise InputError(f"{at}: was decided by {len(label.rules)} rules, loss.k is {k}; set it to their number")
        return [position[rule] for rule in label.rules]

    def target(rules: list[int]) -> Target:
        hot = np.zeros(len(rule_ids), np.float32)
        hot[rules] = 1
        return hot

    if options.pairs is None:
        for label in read_labels(options.labels):
            yield Pair(label.id, label.prompt, label.chosen, label.rejected), target(rules_of(label)), True
        return
    index = LabelIndex(options.labels, rules_of)
    for pair in read_pairs(options.pairs, bad):
        yield pair, target(index.rules(pair)), index.preference(pair).sign != 0
    if index.unused:
        raise InputError(f"{options.labels}: {index.unused} labels have no pair in {options.pairs}; label again")


def _soft(options: DataOptions, rule_ids: Sequence[str]) -> Iterator[tuple[Pair, Target, bool]]:
    """Pairs and half their selection scores."""
    if read_manifest(options.scores)["rules"] != list(rule_ids):
        raise InputError(f"{options.scores}: holds scores of other rules; give the pool that they are of (--rules)")
    for scores, pairs in read_scored(options.scores, pairs_of(options.scores, options.pairs)):
        targets = (scores.relevance + np.abs(scores.a - scores.b) / 2) / 2
        if not (good := np.isfinite(targets).all(axis=1)).all():
            raise InputError(
                f"{options.scores}: the scores of pair {scores.ids[int(np.argmin(good))]!r} are no numbers"
            )
        for pair, target in zip(pairs, targets, strict=True):
            yield pair, target, True
