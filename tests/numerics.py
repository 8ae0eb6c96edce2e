"""What "equal" means here."""

import jax
import numpy as np


def assert_equal_to(got, expected, tolerance: float, may_vanish: bool = False) -> None:
    """``max|got - expected| <= tolerance * max(1, max|expected|)`` for every array of two trees.

    Refuses arrays that are so small that anything would pass, unless they ``may_vanish`` (the gradient of the query
    of a token that sees itself alone).
    """
    got, expected = (jax.tree_util.tree_leaves_with_path(tree) for tree in (got, expected))
    assert [path for path, _ in got] == [path for path, _ in expected]
    for (path, x), (_, y) in zip(got, expected, strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        name = jax.tree_util.keystr(path)
        assert x.shape == y.shape, f"{name}: {x.shape} against {y.shape}"
        largest = np.abs(y).max()
        assert may_vanish or largest > 100 * tolerance, (
            f"{name}: values up to {largest} cannot show a difference of {tolerance}"
        )
        off = np.abs(x - y).max()
        # Written so that nan fails.
        assert off <= tolerance * max(1.0, largest), f"{name}: off by {off}, values up to {largest}"
