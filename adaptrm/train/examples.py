"""Training examples: pairs with labels for the reward model, replies with rule labels for the judge."""

from collections.abc import Iterator

from adaptrm.config import DataOptions
from adaptrm.data.chat import ChatTokenizer
from adaptrm.data.chat_trees import pair_tree
from adaptrm.data.labels import LabelIndex, read_labels, read_rule_labels
from adaptrm.data.pipeline import TreeStore
from adaptrm.data.preferences import Pair, read_pairs
from adaptrm.errors import InputError
from adaptrm.judge.prompts import JudgePrompt
from adaptrm.prefix_tree import PrefixTree
from adaptrm.progress import say

YES, NO, NEITHER = 0, 1, 2


def signed_pairs(options: DataOptions) -> Iterator[tuple[Pair, int]]:
    """Pairs with +1 where response A is chosen, -1 where B is, 0 where nothing says which.

    ``pairs`` with ``labels`` keeps the pairs' own order of responses, whatever the labels say; so runs with other
    labels share trees and plan.
    """
    if options.labels is None:
        raise InputError("data.labels is missing: give a label file, or 'human' for the preferences of data.pairs")
    if options.labels == "human":
        if options.pairs is None:
            raise InputError("data.pairs is missing: labels 'human' are the preferences in it")
        for pair in read_pairs(options.pairs):
            yield pair, {"a": 1, "b": -1, None: 0}[pair.preferred]
    elif options.pairs is None:
        for label in read_labels(options.labels):
            yield Pair(label.id, label.prompt, label.chosen, label.rejected, "a"), 1
    else:
        index = LabelIndex(options.labels)
        for pair in read_pairs(options.pairs):
            yield pair, index.sign(pair)
        if index.unused:
            raise InputError(f"{options.labels}: {index.unused} labels have no pair in {options.pairs}; label again")


def reward_examples(options: DataOptions, chat: ChatTokenizer, pad_id: int | None) -> TreeStore:
    """A tree a pair; sign and weight at both of its leaves."""
    return _collect(
        options,
        (
            (pair.id, pair_tree(chat, pair, pad_id), [float(sign)] * 2, [float(sign != 0)] * 2)
            for pair, sign in signed_pairs(options)
        ),
    )


def judge_examples(options: DataOptions, prompt: JudgePrompt) -> TreeStore:
    """The trees of each reply and the rules that people judged it by; the answers as targets."""
    if options.labels is None:
        raise InputError("data.labels is missing: give a rule-label file")

    def examples():
        for label in read_rule_labels(options.labels):
            if not label.labels:
                continue
            at = f"{options.labels}: {label.id}"
            rules = sorted(prompt.pool.index(list(label.labels), at))
            for questions in prompt.reply_trees(label.prompt, label.response, rules):
                verdicts = [label.labels[prompt.pool[rule].id] for rule in questions.rules]
                targets = [NEITHER if verdict is None else YES if verdict else NO for verdict in verdicts]
                yield label.id, questions.tree, targets, [1.0] * len(targets)

    return _collect(options, examples())


def _collect(options: DataOptions, examples: Iterator[tuple[str, PrefixTree, list, list]]) -> TreeStore:
    store, dropped, labelled = TreeStore(), 0, False
    for name, tree, targets, weights in examples:
        if len(tree) > options.row_length:
            if options.overlong == "fail":
                raise InputError(
                    f"{options.pairs or options.labels}: {name!r} has {len(tree)} tokens, a row {options.row_length}; "
                    "raise data.row_length, or set data.overlong: drop"
                )
            dropped += 1
            continue
        labelled |= any(weights)
        store.append(tree, targets, weights)
    if dropped:
        say(f"dropped {dropped} of {dropped + len(store)} examples: longer than a row of {options.row_length} tokens")
    if not labelled:
        raise InputError(f"{options.labels}: nothing to train on; no example has a label")
    return store.freeze()
