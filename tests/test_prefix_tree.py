"""Prefix trees and packing: structure, visibility, rows, and the way back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptrm.prefix_tree import Node, PrefixTree, best_fit, common_prefix, pack_rows

TOKENS = st.integers(1, 9)
LEAF = st.builds(Node, st.lists(TOKENS, min_size=1, max_size=4))
# A run above others may be empty: two responses need not share a beginning.
TREE = st.recursive(
    LEAF,
    lambda below: st.builds(Node, st.lists(TOKENS, max_size=4), st.lists(below, min_size=1, max_size=3)),
    max_leaves=12,
)
EXAMPLE = Node([1, 2, 3], [Node([4, 5]), Node([6], [Node([7]), Node([8, 9])]), Node([10])])


def walk(node: Node, above: tuple[int, ...] = ()):
    """Every token, depth first, as (path of child numbers to its node, place in the node)."""
    yield from ((above, place) for place in range(len(node.tokens)))
    for number, child in enumerate(node.children):
        yield from walk(child, (*above, number))


def sequences(node: Node, before: tuple[int, ...] = ()):
    """The sequence of every leaf, depth first."""
    own = (*before, *node.tokens)
    if not node.children:
        yield own
    for child in node.children:
        yield from sequences(child, own)


def sees(subtree_end: np.ndarray) -> np.ndarray:
    """``[i, j]``: query i sees key j."""
    i, j = np.arange(len(subtree_end))[:, None], np.arange(len(subtree_end))[None, :]
    return (j <= i) & (i < subtree_end[None, :])


def test_structure_of_an_example():
    tree = PrefixTree.build(EXAMPLE)
    assert len(tree) == 10
    assert tree.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert tree.positions.tolist() == [0, 1, 2, 3, 4, 3, 4, 4, 5, 3]
    assert tree.subtree_end.tolist() == [10, 10, 10, 5, 5, 9, 7, 9, 9, 10]
    assert tree.leaves.tolist() == [4, 6, 8, 9]
    assert tree.sequence(2).tolist() == [1, 2, 3, 6, 8, 9]
    assert all(a.dtype == np.int32 for a in (tree.tokens, tree.positions, tree.subtree_end, tree.leaves))


@given(TREE)
def test_a_token_sees_its_ancestors_and_itself_alone(root):
    tree, places = PrefixTree.build(root), list(walk(root))
    ancestor = [
        [
            node_j == node_i[: len(node_j)] and (len(node_j) < len(node_i) or place_j <= place_i)
            for node_j, place_j in places
        ]
        for node_i, place_i in places
    ]
    assert np.array_equal(sees(tree.subtree_end), ancestor)


@given(TREE)
def test_leaves_stand_for_the_separate_sequences(root):
    tree, expected = PrefixTree.build(root), list(sequences(root))
    assert [tuple(tree.sequence(leaf).tolist()) for leaf in range(len(tree.leaves))] == expected
    for leaf, sequence in enumerate(expected):
        path = np.flatnonzero(sees(tree.subtree_end)[tree.leaves[leaf]])
        assert tree.positions[path].tolist() == list(range(len(sequence)))


@pytest.mark.parametrize("root", [Node([]), Node([1], [Node([2]), Node([])]), Node([], [Node([], [Node([])])])])
def test_a_leaf_without_tokens_is_an_error(root):
    with pytest.raises(ValueError, match="at least one token"):
        PrefixTree.build(root)


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(50, 80), st.none() | st.integers(1, 4))
def test_best_fit_places_every_tree_once_within_bounds(lengths, row_length, max_trees):
    rows = best_fit(lengths, row_length, max_trees)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(row and sum(lengths[i] for i in row) <= row_length for row in rows)
    assert max_trees is None or all(len(row) <= max_trees for row in rows)
    assert best_fit(np.asarray(lengths, np.int64), row_length, max_trees) == rows


@given(st.lists(st.integers(1, 50), max_size=40))
def test_best_fit_takes_the_tightest_row(lengths):
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [n for n, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=rooms.__getitem__)] -= length
        else:
            rooms.append(50 - length)
    assert sorted(50 - sum(lengths[i] for i in row) for row in best_fit(lengths, 50)) == sorted(rooms)


def test_best_fit_needs_fewer_rows_than_first_fit():
    lengths = [3, 6, 3, 6, 4, 4, 7, 7]
    first_fit: list[int] = []
    for length in lengths:
        row = next((n for n, used in enumerate(first_fit) if used + length <= 10), None)
        if row is None:
            first_fit.append(length)
        else:
            first_fit[row] += length
    assert (len(best_fit(lengths, 10)), len(first_fit)) == (4, 5)


def test_best_fit_refuses_a_tree_longer_than_a_row():
    with pytest.raises(ValueError, match="tree 1 has 11 tokens, a row 10"):
        best_fit([4, 11], 10)


@given(st.lists(TREE, min_size=1, max_size=6), st.sampled_from([1, 4]))
def test_packed_rows_hold_the_trees_and_give_results_back(roots, pad_rows_to):
    trees = [PrefixTree.build(root) for root in roots]
    row_length = max(map(len, trees)) + 7
    rows = best_fit([len(tree) for tree in trees], row_length)
    packed = pack_rows(trees, rows, row_length, sum(len(tree.leaves) for tree in trees), pad_rows_to)
    assert len(packed.tokens) % pad_rows_to == 0 and len(packed.tokens) - len(rows) < pad_rows_to
    used = np.zeros(packed.tokens.shape, bool)
    for row, members in enumerate(rows):
        start = 0
        for index in members:
            tree, span = trees[index], slice(start, start + len(trees[index]))
            used[row, span] = True
            assert np.array_equal(packed.tokens[row, span], tree.tokens)
            assert np.array_equal(packed.positions[row, span], tree.positions)
            # Its own tokens are seen as in the tree by itself, and nothing outside of it is.
            visible = sees(packed.subtree_end[row])[span]
            assert np.array_equal(visible[:, span], sees(tree.subtree_end))
            assert visible.sum() == sees(tree.subtree_end).sum()
            start = span.stop
    alone = np.arange(row_length) + 1
    assert np.array_equal(packed.subtree_end[~used], np.broadcast_to(alone, used.shape)[~used])
    # What was read at each leaf comes back to its tree, in the order of its leaves.
    read = np.take_along_axis(np.arange(packed.tokens.size).reshape(packed.tokens.shape), packed.leaves, axis=1)
    back = packed.to_owners(np.stack([read, -read], axis=-1))
    assert sorted(back) == list(range(len(trees)))
    for index, values in back.items():
        row = next(n for n, members in enumerate(rows) if index in members)
        start = sum(len(trees[i]) for i in rows[row][: rows[row].index(index)])
        assert np.array_equal(values[:, 0], row * row_length + start + trees[index].leaves)
        assert np.array_equal(values[:, 1], -values[:, 0])


def test_rows_that_are_too_small_are_an_error():
    tree = PrefixTree.build(EXAMPLE)
    with pytest.raises(ValueError):
        pack_rows([tree], [[0]], row_length=9, max_leaves=4)
    with pytest.raises(ValueError):
        pack_rows([tree], [[0]], row_length=10, max_leaves=3)


@given(st.lists(TOKENS, max_size=6), st.lists(st.lists(TOKENS, min_size=1, max_size=4), min_size=1, max_size=4))
def test_common_prefix_is_the_longest_that_leaves_each_a_token(start, ends):
    whole = [start + end for end in ends]
    length = common_prefix(whole)
    assert len(start) <= length < min(map(len, whole))
    assert all(one[:length] == whole[0][:length] for one in whole)
    at_limit = length == min(map(len, whole)) - 1
    assert at_limit or len({one[length] for one in whole}) > 1


def test_common_prefix_of_arrays():
    assert common_prefix([np.array([1, 2, 3, 4]), np.array([1, 2, 9, 4]), np.array([1, 2, 3])]) == 2
    assert common_prefix([np.array([1, 2, 3])]) == 2
    assert common_prefix([np.array([1]), np.array([1, 2])]) == 0
