"""The packing plan and the pipeline behind it: what comes at which step, and that nothing else does."""

import sys
from threading import Event

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trees import deep, fan

from adaptrm.data.pipeline import RowSource, TreeStore, batches, one_ahead
from adaptrm.data.plan import Plan, PlanOptions

ROW = 60
EXAMPLES = st.lists(st.tuples(st.integers(1, ROW), st.integers(1, 4)), min_size=1, max_size=40)
OPTIONS = st.builds(PlanOptions, st.just(ROW), st.integers(1, 4), st.none() | st.integers(1, 12), st.integers(0, 9))


def epoch_rows(plan: Plan, epoch: int) -> list[list[list[int]]]:
    """``[step][row]`` -> examples, through the public face."""
    first = epoch * plan.steps_per_epoch
    return [
        [plan.row(first + step, row).tolist() for row in range(plan.rows_per_step)]
        for step in range(plan.steps_per_epoch)
    ]


@given(EXAMPLES, OPTIONS, st.integers(1, 3))
def test_every_example_comes_once_an_epoch_within_bounds(examples, options, epochs):
    lengths, leaves = zip(*examples, strict=True)
    plan = Plan(lengths, leaves, options, epochs)
    assert plan.rows_per_step % options.rows_per_step == 0
    for epoch in range(epochs):
        steps = epoch_rows(plan, epoch)
        rows = [row for step in steps for row in step]
        assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
        assert all(sum(lengths[i] for i in row) <= ROW for row in rows)
        assert all(sum(leaves[i] for i in row) <= plan.max_leaves for row in rows)
        sizes = [sum(map(len, step)) for step in steps]
        assert all(sizes)  # a step without examples would divide by a weight of zero
        if (size := options.examples_per_step) is not None:
            whole, rest = divmod(len(lengths), size)
            assert sizes == [size] * whole + [rest] * (rest > 0)
        for step, members in enumerate(steps):
            flat = [i for row in members for i in row]
            at = epoch * plan.steps_per_epoch + step
            assert plan.members(at).tolist() == flat
            # Beyond the rows of a step there is nothing, not the next step.
            assert plan.row(at, plan.rows_per_step).tolist() == []


@given(EXAMPLES, OPTIONS, st.integers(1, 3))
def test_the_plan_is_a_pure_function_of_its_arguments(examples, options, epochs):
    lengths, leaves = zip(*examples, strict=True)
    one, other = Plan(lengths, leaves, options, epochs), Plan(np.array(lengths, np.int32), leaves, options, epochs)
    # Whatever was asked before: the other is read backwards, as after a restart.
    backwards = [epoch_rows(other, epoch) for epoch in reversed(range(epochs))][::-1]
    assert [epoch_rows(one, epoch) for epoch in range(epochs)] == backwards
    shape = lambda plan: (plan.steps_per_epoch, plan.rows_per_step, plan.max_leaves, plan.padding)  # noqa: E731
    assert shape(one) == shape(other)
    if options.examples_per_step is None:
        # Rows of every epoch have the same lengths, so a longer run is the same run at first.
        assert shape(one) == shape(Plan(lengths, leaves, options, epochs + 2))


@pytest.mark.parametrize("exact", [None, 8])
def test_epochs_and_seeds_differ_in_order(exact):
    rng = np.random.default_rng(0)
    lengths, leaves = rng.integers(5, 40, 100), np.full(100, 2)
    plan = Plan(lengths, leaves, PlanOptions(ROW, 4, exact, seed=3), 3)
    other = Plan(lengths, leaves, PlanOptions(ROW, 4, exact, seed=4), 3)
    orders = [str(epoch_rows(p, epoch)) for p in (plan, other) for epoch in range(3)]
    assert len(set(orders)) == 6
    # Not only the order of the rows: who shares a row changes too.
    together = [{frozenset(row) for step in epoch_rows(plan, epoch) for row in step} for epoch in range(2)]
    assert len(together[0] & together[1]) < len(together[0]) / 2


def test_packing_does_not_sort_the_epoch_by_length():
    lengths = np.arange(31, 61)  # each fills a row of its own
    plan = Plan(lengths, np.ones(30), PlanOptions(ROW, 1, seed=1), 2)
    orders = [[lengths[plan.row(step, 0)[0]] for step in range(30 * epoch, 30 * epoch + 30)] for epoch in range(2)]
    assert orders[0] != orders[1]
    for order in orders:
        assert abs(np.corrcoef(order, np.arange(30))[0, 1]) < 0.5


def test_room_for_leaves_holds_in_every_epoch():
    # Of the examples of one length some have many leaves; which of them share a row changes from epoch to epoch.
    lengths = [20] * 12
    leaves = [1] * 9 + [50] * 3
    for exact in (None, 5):
        plan = Plan(lengths, leaves, PlanOptions(ROW, 2, exact), 20)
        most = max(
            sum(leaves[i] for i in row) for epoch in range(20) for step in epoch_rows(plan, epoch) for row in step
        )
        assert most <= plan.max_leaves <= 150
        assert most > 52, "no row held two of them: the test shows nothing"


def test_room_for_leaves_is_tight_where_all_are_alike():
    plan = Plan([20] * 7, [2] * 7, PlanOptions(ROW, 2), 2)
    assert plan.max_leaves == 6


def test_padding_is_the_share_of_computed_tokens_without_an_example():
    # Rows of 60: 50 + 10, 40 + 20, 30; two rows a step, so two steps and one empty row.
    plan = Plan([50, 40, 30, 20, 10], [1] * 5, PlanOptions(ROW, 2), 1)
    assert (plan.steps_per_epoch, plan.rows_per_step) == (2, 2)
    assert plan.padding == pytest.approx(1 - 150 / 240)
    # Three examples a step: at most two rows whatever their order, so again two steps of two rows.
    plan = Plan([30] * 6, [1] * 6, PlanOptions(ROW, 1, 3), 2)
    assert (plan.steps_per_epoch, plan.rows_per_step) == (2, 2)
    assert plan.padding == pytest.approx(1 - 180 / 240)


def test_an_example_longer_than_a_row_is_an_error():
    with pytest.raises(ValueError, match="has 61 tokens, a row 60"):
        Plan([5, 61], [1, 1], PlanOptions(ROW, 2), 1)


TREES = [tree for i in range(6) for tree in (deep(seed=i), fan(3 + i, 2, 4 + i % 3, seed=i), fan(5, 1, 2 + i, seed=i))]
TARGETS = [np.linspace(-1, i, len(tree.leaves)).astype(np.float32) for i, tree in enumerate(TREES)]
WEIGHTS = [np.full(len(tree.leaves), 1 / (1 + i), np.float32) for i, tree in enumerate(TREES)]


@pytest.fixture(scope="module")
def store() -> TreeStore:
    made = TreeStore()
    for tree, targets, weights in zip(TREES, TARGETS, WEIGHTS, strict=True):
        made.append(tree, targets.tolist(), weights.tolist(), margin=float(weights[0]) + 1)
    return made.freeze()


@pytest.fixture(scope="module", params=[None, 5], ids=["rows", "exact"])
def plan(store, request) -> Plan:
    return Plan(store.lengths, store.leaves, PlanOptions(ROW, 4, request.param, seed=1), 2)


def assert_same(one, other):
    """Rows or batches, to the byte."""
    assert one.keys() == other.keys()
    for name, values in one.items():
        assert values.dtype == other[name].dtype, name
        np.testing.assert_array_equal(values, other[name], err_msg=name)


def test_the_store_gives_back_what_was_put_in(store):
    assert len(store) == len(TREES)
    assert store.lengths.tolist() == [len(tree) for tree in TREES]
    assert store.leaves.tolist() == [len(tree.leaves) for tree in TREES]
    for index in (4, 0, len(TREES) - 1, *range(len(TREES))):
        tree, at_leaves = store[index]
        for name in ("tokens", "positions", "subtree_end", "leaves"):
            np.testing.assert_array_equal(getattr(tree, name), getattr(TREES[index], name), err_msg=name)
        np.testing.assert_array_equal(at_leaves["targets"], TARGETS[index])
        np.testing.assert_array_equal(at_leaves["weights"], WEIGHTS[index])
        np.testing.assert_array_equal(at_leaves["margins"], WEIGHTS[index] + 1)
        assert all(values.dtype == np.float32 for values in at_leaves.values())


def test_an_empty_store_is_empty():
    assert len(TreeStore().freeze()) == 0


def test_rows_hold_the_trees_of_the_plan_and_nothing_else(store, plan):
    stop = 2 * plan.steps_per_epoch
    source = RowSource(store, plan, range(plan.rows_per_step), 0, stop)
    assert len(source) == stop * plan.rows_per_step
    empty = 0
    for index in range(len(source)):
        row, members = source[index], plan.row(*divmod(index, plan.rows_per_step)).tolist()
        empty += not members
        start = leaf = 0
        for number, i in enumerate(members):
            tree, count = TREES[i], len(TREES[i].leaves)
            span, own = slice(start, start + len(tree)), slice(leaf, leaf + count)
            np.testing.assert_array_equal(row["tokens"][span], tree.tokens)
            np.testing.assert_array_equal(row["positions"][span], tree.positions)
            np.testing.assert_array_equal(row["subtree_end"][span], tree.subtree_end + start)
            np.testing.assert_array_equal(row["leaves"][own], tree.leaves + start)
            np.testing.assert_array_equal(row["targets"][own], TARGETS[i])
            np.testing.assert_array_equal(row["weights"][own], WEIGHTS[i])
            assert (row["groups"][own] == number).all()
            start, leaf = span.stop, own.stop
        assert row["tokens"].shape == (ROW,) and row["leaves"].shape == (plan.max_leaves,)
        np.testing.assert_array_equal(row["subtree_end"][start:], np.arange(start, ROW) + 1)
        assert not row["weights"][leaf:].any() and (row["groups"][leaf:] == -1).all()
        assert not row["leaves"][leaf:].any()
    if plan.options.examples_per_step is not None:
        assert empty, "no step was short of rows: the test shows nothing"


def test_batches_are_the_same_with_and_without_grain(store, plan, monkeypatch):
    pytest.importorskip("grain")
    rows = plan.rows_per_step
    source = RowSource(store, plan, range(rows), 0, 2 * plan.steps_per_epoch)
    with_grain = list(batches(source, rows))
    monkeypatch.setitem(sys.modules, "grain", None)  # what an import finds where Grain is not installed
    without = list(batches(source, rows))
    assert len(with_grain) == len(without) == 2 * plan.steps_per_epoch
    for one, other in zip(with_grain, without, strict=True):
        assert_same(one, other)
    for number, batch in enumerate(without):
        for row in range(rows):
            assert_same({name: values[row] for name, values in batch.items()}, source[number * rows + row])


def test_two_processes_together_have_the_whole_step(store, plan):
    rows, stop = plan.rows_per_step, 2 * plan.steps_per_epoch
    half = rows // 2
    whole = batches(RowSource(store, plan, range(rows), 0, stop), rows)
    first = batches(RowSource(store, plan, range(half), 0, stop), half)
    second = batches(RowSource(store, plan, range(half, rows), 0, stop), rows - half)
    count = 0
    for one, left, right in zip(whole, first, second, strict=True):
        assert_same(one, {name: np.concatenate([left[name], right[name]]) for name in left})
        count += 1
    assert count == stop


def test_a_run_that_goes_on_sees_what_was_left(store, plan):
    rows, stop = plan.rows_per_step, 2 * plan.steps_per_epoch
    whole = list(batches(RowSource(store, plan, range(rows), 0, stop), rows))
    fresh = Plan(store.lengths, store.leaves, plan.options, 2)
    for start in (1, plan.steps_per_epoch, stop - 1, stop):
        rest = list(batches(RowSource(store, fresh, range(rows), start, stop), rows))
        assert len(rest) == stop - start
        for one, other in zip(rest, whole[start:], strict=True):
            assert_same(one, other)


def test_one_item_is_made_ahead_and_no_more():
    made = [Event() for _ in range(4)]

    def items():
        for number, event in enumerate(made):
            event.set()
            yield number

    feed = one_ahead(items())
    assert next(feed) == 0 and made[1].wait(60) and not made[2].is_set()
    assert next(feed) == 1 and made[2].wait(60) and not made[3].is_set()
    assert list(feed) == [2, 3]


def test_what_making_an_item_raises_comes_in_its_place():
    feed = one_ahead(1 / number for number in (2, 1, 0))
    assert [next(feed), next(feed)] == [0.5, 1]
    with pytest.raises(ZeroDivisionError):
        next(feed)
    assert list(one_ahead(iter(()))) == []
