"""Training examples: pairs with labels for the reward model, replies with rule labels for the judge."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from adaptrm.config import DataOptions, LossOptions
from adaptrm.data.chat import ChatTokenizer
from adaptrm.data.chat_trees import pair_tree
from adaptrm.data.labels import LabelIndex, Preference, read_labels, read_rule_labels
from adaptrm.data.pipeline import TreeStore
from adaptrm.data.preferences import Pair, read_pairs
from adaptrm.data.rows import BadRows
from adaptrm.data.truncation import truncated
from adaptrm.errors import InputError
from adaptrm.judge.prompts import JudgePrompt
from adaptrm.prefix_tree import PrefixTree
from adaptrm.progress import say
from adaptrm.watchdog import doing

YES, NO, NEITHER = 0, 1, 2


def preferred_pairs(options: DataOptions, bad: BadRows) -> Iterator[tuple[Pair, Preference]]:
    """Pairs with what the labels say of them.

    ``pairs`` with ``labels`` keeps the pairs' own order of responses, whatever the labels say; so runs with other
    labels share trees and plan.
    """
    if options.labels is None:
        raise InputError("data.labels is missing: give a label file, or 'human' for the preferences of data.pairs")
    if options.labels == "human":
        if options.pairs is None:
            raise InputError("data.pairs is missing: labels 'human' are the preferences in it")
        for pair in read_pairs(options.pairs, bad):
            yield pair, Preference({"a": 1, "b": -1, None: 0}[pair.preferred], margin=pair.margin)
    elif options.pairs is None:
        for label in read_labels(options.labels):
            said = Preference(1, label.probability, label.margin)
            yield Pair(label.id, label.prompt, label.chosen, label.rejected, "a"), said
    else:
        index = LabelIndex(options.labels)
        for pair in read_pairs(options.pairs, bad):
            yield pair, index.preference(pair)
        if index.unused:
            raise InputError(f"{options.labels}: {index.unused} labels have no pair in {options.pairs}; label again")


@dataclass(frozen=True)
class Example:
    """A pair, the tree that it makes, and what the tree has at its leaves.

    Attributes:
        targets: one a leaf.
        weight, margin: of all leaves; without weight nothing is learnt from it.
    """

    pair: Pair
    tree: Callable[[Pair], PrefixTree]
    targets: list[float]
    weight: float = 1.0
    margin: float = 0.0


def reward_examples(
    options: DataOptions, chat: ChatTokenizer, pad_id: int | None, loss: LossOptions
) -> tuple[TreeStore, dict[str, int]]:
    """A tree a pair; at each leaf the probability that it is the better one.

    Returns:
        The trees, and how many rows were skipped, how many examples dropped or truncated.
    """
    if loss.soft_labels and options.labels == "human":
        raise InputError("loss.soft_labels needs the probabilities of a label file (data.labels); people gave none")
    bad = BadRows(options.on_bad_row)

    def tree(pair: Pair) -> PrefixTree:
        return pair_tree(chat, pair, pad_id)

    def examples() -> Iterator[Example]:
        labelled = without = 0
        for pair, said in preferred_pairs(options, bad):
            likely = said.probability if loss.soft_labels else 1.0
            targets = [likely, 1 - likely] if said.sign > 0 else [1 - likely, likely]
            margin = said.margin if loss.margin and said.margin is not None else 0.0
            labelled += said.sign != 0
            without += said.sign != 0 and said.margin is None
            yield Example(pair, tree, targets, float(said.sign != 0), margin)
        if loss.margin and without:
            if without == labelled:
                raise InputError("loss.margin is set, but no pair has a number in the column margin; add it, or unset")
            say(f"{without} of {labelled} labelled pairs have no number in the column margin: theirs is 0")

    return _collect(options, bad, examples())


def judge_examples(options: DataOptions, prompt: JudgePrompt) -> tuple[TreeStore, dict[str, int]]:
    """The trees of each reply and the rules that people judged it by; the answers as targets.

    Returns:
        As ``reward_examples``.
    """
    if options.labels is None:
        raise InputError("data.labels is missing: give a rule-label file")
    bad = BadRows(options.on_bad_row)

    def examples() -> Iterator[Example]:
        for label in read_rule_labels(options.labels, bad):
            if not label.labels:
                continue
            at = f"{options.labels}: {label.id}"
            rules = sorted(prompt.pool.index(list(label.labels), at))
            reply = Pair(label.id, label.prompt, label.response, label.response)  # one response, which stands for both
            for group in prompt.groups(rules):
                verdicts = [label.labels[prompt.pool[rule].id] for rule in group]
                targets = [NEITHER if verdict is None else YES if verdict else NO for verdict in verdicts]

                def tree(pair: Pair, group: tuple[int, ...] = group) -> PrefixTree:
                    (questions,) = prompt.reply_trees(pair.prompt, pair.response_a, group)
                    return questions.tree

                yield Example(reply, tree, targets)

    return _collect(options, bad, examples())


def _collect(options: DataOptions, bad: BadRows, examples: Iterator[Example]) -> tuple[TreeStore, dict[str, int]]:
    store, limit, labelled = TreeStore(), options.row_length, False
    counts = {"dropped": 0, "truncated": 0}
    source = options.pairs or options.labels
    for example in examples:
        doing("reading the examples")
        pair, make_tree = example.pair, example.tree
        try:
            tree = make_tree(pair)
            if len(tree) > limit and options.overlong == "truncate":
                tree = make_tree(truncated(pair, lambda cut, make=make_tree: len(make(cut)), limit))
                counts["truncated"] += 1
        except InputError as wrong:  # the template refuses it, or nothing of it fits
            bad(InputError(f"{source}: {wrong}"))
            continue
        if len(tree) > limit:
            if options.overlong == "fail":
                raise InputError(
                    f"{source}: {pair.id!r} has {len(tree)} tokens, a row {limit}; "
                    "raise data.row_length, or set data.overlong: drop or truncate"
                )
            counts["dropped"] += 1
            continue
        labelled |= example.weight > 0
        store.append(tree, example.targets, example.weight, example.margin)
    for what, count in counts.items():
        if count:
            total = len(store) + counts["dropped"]
            say(f"{what} {count} of {total} examples: longer than a row of {limit} tokens")
    if not labelled:
        raise InputError(f"{source}: nothing to train on; no example has a label")
    return store.freeze(), {"skipped_rows": bad.count} | counts
