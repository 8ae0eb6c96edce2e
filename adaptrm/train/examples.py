"""Training examples: pairs with labels for the reward model, replies with rule labels for the judge."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice

import jax
import numpy as np

from adaptrm.config import DataOptions, LossOptions
from adaptrm.data.chat import ChatTokenizer
from adaptrm.data.chat_trees import pair_tree
from adaptrm.data.labels import LabelIndex, Preference, RuleLabel, read_labels, read_rule_labels
from adaptrm.data.overlap import Row, SuiteTexts, read_texts
from adaptrm.data.pipeline import TreeStore
from adaptrm.data.preferences import Pair, ResponseSet, read_pairs, read_sets
from adaptrm.data.rows import BadRows
from adaptrm.data.scored_pairs import pairs_of
from adaptrm.data.truncation import truncated
from adaptrm.errors import InputError
from adaptrm.judge.prompts import JudgePrompt
from adaptrm.parallel.distributed import exchanged
from adaptrm.prefix_tree import PrefixTree
from adaptrm.progress import say
from adaptrm.watchdog import doing

Examples = tuple[TreeStore, dict[str, int]]  # the trees; rows skipped, examples dropped, truncated, left out, mixed in
YES, NO, NEITHER = 0, 1, 2
SHARE = 64  # examples that a process tokenises before it hears of the others'


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
    """A pair or set, the tree that it makes, and what the tree has at its leaves.

    Attributes:
        source: where it was read, for messages.
        targets: one a leaf; of an adapter one a rule, at every leaf.
        weight, margin: of all leaves; without weight nothing is learnt from it.
    """

    source: str
    pair: Pair | ResponseSet
    tree: Callable[[Pair | ResponseSet], PrefixTree]
    targets: Sequence[float]
    weight: float = 1.0
    margin: float = 0.0


def reward_examples(
    options: DataOptions, chat: ChatTokenizer, pad_id: int | None, loss: LossOptions, seed: int = 0
) -> Examples:
    """A tree a pair, or a set where the loss is over sets; at each leaf the probability that it is the better one.

    Args:
        seed: draws the examples of ``data.mix``.

    Returns:
        The trees, and how many rows were skipped, how many examples dropped, truncated and mixed in, and how many left
        out for what they share with ``data.drop_overlap`` (of those mixed in, after they were drawn).
    """
    files = [source.labels for source in (options, *options.mix) if source.labels != "human"]
    if loss.soft_labels and not files:
        raise InputError("loss.soft_labels needs the probabilities of a label file (data.labels); people gave none")
    bad, mixed, margins = BadRows(options.on_bad_row), 0, False

    def tree(pair: Pair | ResponseSet) -> PrefixTree:
        return pair_tree(chat, pair, pad_id)

    def examples() -> Iterator[Example]:
        nonlocal mixed, margins
        count = 0
        for example in _examples_of(options, loss, tree, bad):
            count += example.weight > 0
            margins |= example.margin != 0
            yield example
        for number, mix in enumerate(options.mix):
            source = replace(options, pairs=mix.pairs, labels=mix.labels, mix=())
            doing("counting the examples of data.mix")
            unlisted = BadRows(options.on_bad_row, listed=False)
            have = sum(example.weight > 0 for example in _examples_of(source, loss, tree, unlisted))
            want = round(mix.weight * count)
            if want > have:
                raise InputError(
                    f"{mix.pairs or mix.labels}: has {have} examples with a label, data.mix wants {want} "
                    f"({mix.weight:g} x {count}); lower its weight"
                )
            chosen = np.zeros(have, bool)
            chosen[np.random.default_rng((seed, number)).permutation(have)[:want]] = True
            labelled = (example for example in _examples_of(source, loss, tree, bad) if example.weight > 0)
            yield from (example for example, is_chosen in zip(labelled, chosen, strict=True) if is_chosen)
            mixed += want
            say(f"mixed in {want} of {have} examples of {mix.pairs or mix.labels}")

    store, left = collect(options, bad, examples())
    if loss.margin and not margins:
        raise InputError(f"{options.pairs or options.labels}: loss.margin is set, but no pair has a number in margin")
    return store, left | ({"mixed": mixed} if options.mix else {})


def _examples_of(options: DataOptions, loss: LossOptions, tree, bad: BadRows) -> Iterator[Example]:
    """The examples of one source, not yet tokenised."""
    source = options.pairs or options.labels
    if loss.kind != "bradley-terry":
        for one in _sets(options, bad):
            yield Example(source, one, tree, one.grades, float(max(one.grades) > min(one.grades)))
        return
    labelled = without = 0
    for pair, said in preferred_pairs(options, bad):
        likely = said.probability if loss.soft_labels else 1.0
        targets = [likely, 1 - likely] if said.sign > 0 else [1 - likely, likely]
        margin = said.margin if loss.margin and said.margin is not None else 0.0
        labelled += said.sign != 0
        without += said.sign != 0 and said.margin is None
        yield Example(source, pair, tree, targets, float(said.sign != 0), margin)
    if loss.margin and without and bad.listed:
        say(f"{source}: {without} of {labelled} labelled pairs have no number in the column margin; theirs is 0")


def _sets(options: DataOptions, bad: BadRows) -> Iterator[ResponseSet]:
    """Best-of-n rows as they are; a labelled pair is a set of two."""
    if options.labels == "human" and options.pairs is not None:
        yield from read_sets(options.pairs, bad)
        return
    for pair, said in preferred_pairs(options, bad):
        yield ResponseSet(pair.id, pair.prompt, pair.responses, (float(said.sign > 0), float(said.sign < 0)))


def judge_examples(options: DataOptions, prompt: JudgePrompt) -> Examples:
    """The trees of each reply and the rules that people judged it by; the answers as targets.

    Returns:
        As ``reward_examples``.
    """
    if options.labels is None:
        raise InputError("data.labels is missing: give a rule-label file")
    bad = BadRows(options.on_bad_row)

    def pair_of(label: RuleLabel) -> Pair:
        return Pair(label.id, label.prompt, label.response, label.response)  # one response, which stands for both

    def examples() -> Iterator[Example]:
        for label in read_rule_labels(options.labels, bad):
            if not label.labels:
                continue
            at = f"{options.labels}: {label.id}"
            rules = sorted(prompt.pool.index(list(label.labels), at))
            reply = pair_of(label)
            for group in prompt.groups(rules):
                verdicts = [label.labels[prompt.pool[rule].id] for rule in group]
                targets = [NEITHER if verdict is None else YES if verdict else NO for verdict in verdicts]

                def tree(pair: Pair, group: tuple[int, ...] = group) -> PrefixTree:
                    (questions,) = prompt.reply_trees(pair.prompt, pair.response_a, group)
                    return questions.tree

                yield Example(options.labels, reply, tree, targets)

    unlisted = BadRows(options.on_bad_row, listed=False)
    return collect(options, bad, examples(), texts=map(pair_of, read_rule_labels(options.labels, unlisted)))


@dataclass(frozen=True)
class _Made:
    """What became of an example.

    Attributes:
        tree: None where it is dropped, left out or cannot be used.
        overlapping: whether it is left out for what it shares with a suite.
        refused: why it cannot be used; ``unfit`` where it does not fit a row and must.
    """

    tree: PrefixTree | None = None
    truncated: bool = False
    refused: str = ""
    unfit: bool = False
    overlapping: bool = False


def _make(example: Example, options: DataOptions, suites: SuiteTexts | None) -> _Made:
    source, pair, limit, is_cut = example.source, example.pair, options.row_length, False
    if suites is not None and suites.overlaps(pair):
        return _Made(overlapping=True)
    try:
        tree = example.tree(pair)
        if len(tree) > limit and options.overlong == "truncate":
            tree = example.tree(truncated(pair, lambda cut: len(example.tree(cut)), limit))
            is_cut = True
    except InputError as wrong:  # the template refuses it, or nothing of it fits
        return _Made(refused=f"{source}: {wrong}")
    if len(tree) <= limit:
        return _Made(tree, is_cut)
    if options.overlong != "fail":
        return _Made()
    mend = "raise data.row_length, or set data.overlong: drop or truncate"
    return _Made(refused=f"{source}: {pair.id!r} has {len(tree)} tokens, a row {limit}; {mend}", unfit=True)


def _suites(options: DataOptions, texts: Iterable[Row] | None) -> SuiteTexts | None:
    """What examples must not hold, and what of it is too common to tell; each process counts its share."""
    if not options.drop_overlap:
        return None
    suites = SuiteTexts(chain.from_iterable(map(read_texts, options.drop_overlap)))
    texts = _texts(options) if texts is None else texts
    suites.count(islice(texts, jax.process_index(), None, jax.process_count()))
    for conversations in exchanged(suites.conversations):
        suites.conversations |= conversations
    return suites


def _texts(options: DataOptions) -> Iterator[Row]:
    """The rows of the pairs or labels that examples are made of."""
    given = [source.pairs or source.labels for source in (options, *options.mix)]
    if options.scores is not None:
        given.append(pairs_of(options.scores, options.pairs))
    for source in dict.fromkeys(given):
        if source not in (None, "human"):  # whoever makes the examples says what is missing
            yield from read_texts(source, BadRows(options.on_bad_row, listed=False))


def _made(
    options: DataOptions, examples: Iterator[Example], suites: SuiteTexts | None
) -> Iterator[tuple[Example, _Made]]:
    """Examples in their order and what becomes of them; each process tokenises its share, and all get all."""
    number, count = jax.process_index(), jax.process_count()
    while block := list(islice(examples, SHARE * count)):
        mine = []
        for example in block[number::count]:
            doing("reading the examples")
            mine.append(_make(example, options, suites))
        shares = exchanged(mine)
        yield from ((example, shares[i % count][i // count]) for i, example in enumerate(block))


def collect(
    options: DataOptions,
    bad: BadRows,
    examples: Iterator[Example],
    labels: int | None = None,
    texts: Iterable[Row] | None = None,
) -> Examples:
    """Tokenise examples.

    Args:
        labels: how many targets a leaf has; None for one.
        texts: what they hold, for ``data.drop_overlap``; None reads the pairs or labels once more.
    """
    store, labelled, overlapping = TreeStore(labels), False, 0
    counts = {"dropped": 0, "truncated": 0}
    for example, made in _made(options, examples, _suites(options, texts)):
        if made.unfit:
            raise InputError(made.refused)
        if made.refused:
            bad(InputError(made.refused))
        elif made.overlapping:
            overlapping += 1
        elif made.tree is None:
            counts["dropped"] += 1
        else:
            counts["truncated"] += made.truncated
            labelled |= example.weight > 0
            store.append(made.tree, example.targets, example.weight, example.margin)
    for what, count in counts.items():
        if count:
            total = len(store) + counts["dropped"]
            say(f"{what} {count} of {total} examples: longer than a row of {options.row_length} tokens")
    left_out = {"overlapping": overlapping} if options.drop_overlap else {}
    if overlapping:
        total = len(store) + counts["dropped"] + overlapping
        say(f"left out {overlapping} of {total} examples: they share texts with {', '.join(options.drop_overlap)}")
    if not labelled:
        raise InputError(
            f"{options.pairs or options.labels or options.scores}: nothing to train on; no example has a label"
            + f" but those {overlapping} that overlap with data.drop_overlap" * (overlapping > 0)
        )
    return store.freeze(), {"skipped_rows": bad.count} | counts | left_out
