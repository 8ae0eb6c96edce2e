"""No example of a packed row feels another: rewards stay to the bit, gradients too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import random_state, tiny_config
from trees import deep, fan

from adaptrm.config import LossOptions
from adaptrm.models import SequenceClassifier
from adaptrm.models.heads import label_logits
from adaptrm.models.layers import at_leaves
from adaptrm.prefix_tree import PrefixTree, pack_rows
from adaptrm.train.step import loss_sums

TREES = [fan(20, 2, 9, seed=0), fan(11, 4, 6, seed=1), deep(seed=2), fan(3, 2, 30, seed=3)]
ROW, LEAVES, CHANGED = 224, 16, 1


def batch_of(trees: list[PrefixTree], weigh_all: bool = True) -> dict[str, np.ndarray]:
    """All in one row; by choice with no weight on the one that is changed."""
    packed = pack_rows(trees, [range(len(trees))], ROW, LEAVES)
    batch = {name: getattr(packed, name) for name in ("tokens", "positions", "subtree_end", "leaves")}
    groups = packed.owner[..., 0]
    weights = (groups >= 0) & (weigh_all | (groups != CHANGED))
    first = np.pad(groups[:, :-1], ((0, 0), (1, 0)), constant_values=-1) != groups
    floats = {"targets": first & (groups >= 0), "weights": weights, "margins": np.zeros_like(groups)}
    return batch | {"groups": groups} | {name: value.astype(np.float32) for name, value in floats.items()}


def changed(tree: PrefixTree) -> PrefixTree:
    return PrefixTree((tree.tokens + 17) % 400 + 3, tree.positions, tree.subtree_end, tree.leaves)


@pytest.mark.parametrize("kind", ["plackett-luce", "bradley-terry"])
def test_a_changed_example_changes_no_other(kind):
    definition, params = random_state(SequenceClassifier, tiny_config(), num_labels=1)
    # Bradley-Terry takes its leaves in twos.
    trees = [fan(9 + i, 2, 8 + 3 * i, seed=i) for i in range(4)] if kind == "bradley-terry" else TREES
    others = [changed(tree) if i == CHANGED else tree for i, tree in enumerate(trees)]

    @jax.jit
    def run(params, batch):
        def loss(params):
            sums = loss_sums("reward", definition, params, batch, None, "float32", "none", LossOptions(kind))
            return sums["loss"]

        model = nnx.merge(definition, params)
        hidden = model.model(batch["tokens"], batch["positions"], batch["subtree_end"], jnp.dtype("float32"), "none")
        rewards = label_logits(at_leaves(hidden, batch["leaves"]), model.score.weight[...])[..., 0]
        return rewards, jax.grad(loss)(params)

    one, other = (run(params, batch_of(given, weigh_all=False)) for given in (trees, others))
    groups = batch_of(trees)["groups"]
    np.testing.assert_array_equal(*(np.asarray(rewards)[groups != CHANGED] for rewards, _ in (one, other)))
    moved = np.abs(np.asarray(one[0]) - np.asarray(other[0]))[groups == CHANGED]
    assert (moved > 1e-3).all(), "the change cannot be seen: the test shows nothing"
    for left, right in zip(jax.tree.leaves(one[1]), jax.tree.leaves(other[1]), strict=True):
        assert np.abs(left).max() > 0
        np.testing.assert_allclose(left, right, rtol=0, atol=1e-6 * float(np.abs(left).max()))
    # With its weight it does move the gradient.
    moved = run(params, batch_of(others))[1]
    gaps = [np.abs(a - b).max() for a, b in zip(jax.tree.leaves(one[1]), jax.tree.leaves(moved), strict=True)]
    assert max(gaps) > 1e-4
