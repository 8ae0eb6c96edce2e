"""Losses against NumPy in float64, and what masked leaves and large margins do to them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refusals import refused

from adaptrm.config import LossOptions
from adaptrm.train.losses import (
    all_pairs,
    answer_cross_entropy,
    bradley_terry,
    check_loss,
    label_cross_entropy,
    plackett_luce,
    reward_loss,
)

ROWS, PAIRS = 4, 6
VALUE_AND_GRAD = jax.jit(jax.value_and_grad(lambda *given: bradley_terry(*given)["loss"]))
GROUPS = np.tile(np.repeat(np.arange(PAIRS), 2), (ROWS, 1)).astype(np.int32)
SETS = {"plackett-luce": plackett_luce, "all-pairs": all_pairs}


@pytest.fixture
def pairs():
    """Rewards, targets and weights, A or B chosen, some pairs left out."""
    rng = np.random.default_rng(0)
    rewards = rng.standard_normal((ROWS, 2 * PAIRS)).astype(np.float32) * 3
    a_wins = rng.choice([0.0, 1.0], (ROWS, PAIRS)).astype(np.float32)
    weight = rng.choice([0.0, 1.0, 0.5], (ROWS, PAIRS)).astype(np.float32)
    weight[0, :3] = 0, 1, 0.5  # each for certain
    return rewards, targets_of(a_wins), np.repeat(weight, 2, axis=1)


def targets_of(a_wins):
    return np.stack([a_wins, 1 - a_wins], -1).reshape(ROWS, -1)


def log_sigmoid(x):
    return -np.logaddexp(0, -np.float64(x))


def by_hand(rewards, targets, weights, margins=None, smoothing=0.0):
    """Pair by pair, as the papers write it."""
    sums = {"loss": 0.0, "weight": 0.0, "accuracy": 0.0, "margin": 0.0}
    for row in range(len(rewards)):
        for a in range(0, rewards.shape[1], 2):
            ahead = float(rewards[row, a]) - float(rewards[row, a + 1])
            weight, least = float(weights[row, a]), 0 if margins is None else float(margins[row, a])
            p = float(targets[row, a]) * (1 - 2 * smoothing) + smoothing
            sums["loss"] -= weight * (p * log_sigmoid(ahead - least) + (1 - p) * log_sigmoid(-ahead - least))
            ahead *= 0 if targets[row, a] == 0.5 else 1 if targets[row, a] > 0.5 else -1
            sums["weight"] += weight
            sums["accuracy"] += weight * (ahead > 0)
            sums["margin"] += weight * ahead
    return sums


def assert_sums(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == jnp.float32 and got[name].shape == ()
        np.testing.assert_allclose(got[name], value, rtol=1e-6, err_msg=name)


def test_bradley_terry_equals_the_formula(pairs):
    assert_sums(bradley_terry(*pairs), by_hand(*pairs))


def test_soft_labels_margins_and_smoothing_equal_the_formula(pairs):
    rewards, _, weights = pairs
    rng = np.random.default_rng(3)
    soft = rng.uniform(0, 1, (ROWS, PAIRS)).astype(np.float32)
    soft[0, 1] = 0.5
    margins = np.repeat(rng.uniform(0, 2, (ROWS, PAIRS)).astype(np.float32), 2, axis=1)
    for given in ((soft, None, 0.0), (soft, margins, 0.0), (soft.round(), margins, 0.1), (soft, margins, 0.25)):
        targets, least = targets_of(given[0]), 0.0 if given[1] is None else given[1]
        got = bradley_terry(rewards, targets, weights, least, given[2])
        assert_sums(got, by_hand(rewards, targets, weights, given[1], given[2]))


def test_hard_labels_with_a_margin_are_the_plain_loss_of_a_smaller_difference(pairs):
    rewards, targets, weights = pairs
    less = rewards - 0.75 * targets
    with_margin, plain = bradley_terry(*pairs, 0.75), bradley_terry(less, targets, weights)
    np.testing.assert_allclose(with_margin["loss"], plain["loss"], rtol=1e-6)
    assert float(with_margin["accuracy"]) == float(bradley_terry(*pairs)["accuracy"])


def test_centering_adds_the_square_of_the_sum(pairs):
    rewards, targets, weights = pairs
    batch = {"targets": targets, "weights": weights, "margins": np.zeros_like(weights), "groups": GROUPS}
    expected = by_hand(*pairs)
    expected["loss"] += 0.3 * float((weights[:, 0::2] * (rewards[:, 0::2] + rewards[:, 1::2]) ** 2.0).sum())
    assert_sums(reward_loss(rewards, batch, LossOptions(center_rewards=0.3)), expected)


def test_bradley_terry_gradient_equals_the_formula(pairs):
    rewards, targets, weights = pairs
    signs = 2 * targets[:, 0::2] - 1
    gradient = np.asarray(VALUE_AND_GRAD(*pairs)[1])
    margin = signs * (rewards[:, 0::2] - rewards[:, 1::2]).astype(np.float64)
    at_a = -weights[:, 0::2] * signs / (1 + np.exp(margin))
    np.testing.assert_allclose(gradient[:, 0::2], at_a, rtol=1e-5)
    assert np.array_equal(gradient[:, 1::2], -gradient[:, 0::2])
    assert (gradient[weights == 0] == 0).all()
    assert (gradient[weights > 0] != 0).all()


def test_swapping_the_responses_and_the_targets_changes_nothing(pairs):
    swap = lambda x: x.reshape(ROWS, PAIRS, 2)[..., ::-1].reshape(ROWS, -1)  # noqa: E731
    rewards, targets, weights = pairs
    one, other = bradley_terry(rewards, targets, weights), bradley_terry(swap(rewards), swap(targets), weights)
    assert all(float(one[name]) == float(other[name]) for name in one)


def test_pairs_without_a_label_count_nowhere():
    rewards = jnp.asarray([[5.0, -7.0, 1.0, 0.0]])
    targets, weights = jnp.asarray([[0.0, 1, 1, 0]]), jnp.asarray([[0.0, 0, 1, 1]])
    given = (rewards, targets, weights)
    both, alone = bradley_terry(*given), bradley_terry(*(x[:, 2:] for x in given))
    assert all(float(both[name]) == float(alone[name]) for name in both)
    assert jax.grad(lambda r: bradley_terry(r, targets, weights)["loss"])(rewards)[0, :2].tolist() == [0, 0]


@pytest.mark.parametrize("size", [60.0, 1e4, 1e30])
@pytest.mark.parametrize("kind", ["bradley-terry", *SETS])
def test_large_margins_do_not_overflow(size, kind):
    rewards = np.zeros((ROWS, 2 * PAIRS), np.float32)
    targets, weights = targets_of(np.ones((ROWS, PAIRS), np.float32)), np.ones_like(rewards)
    rewards[0, 0], rewards[1, 1] = size, size  # one pair far on the right side, one far on the wrong side
    batch = {"targets": targets, "weights": weights, "margins": np.zeros_like(weights), "groups": GROUPS}
    loss, gradient = jax.value_and_grad(lambda r: reward_loss(r, batch, LossOptions(kind=kind))["loss"])(rewards)
    rest = (ROWS * PAIRS - 2) * np.log(2)
    np.testing.assert_allclose(loss, size + rest, rtol=1e-6)
    assert np.isfinite(gradient).all()
    assert gradient[0, 0] == pytest.approx(0, abs=1e-20)
    assert gradient[1, 0] == -1 and gradient[1, 1] == 1


def test_a_reward_tie_is_not_right():
    got = bradley_terry(jnp.asarray([[2.0, 2.0]]), jnp.asarray([[1.0, 0.0]]), jnp.ones((1, 2)))
    assert (float(got["accuracy"]), float(got["weight"])) == (0, 1)
    assert float(got["loss"]) == pytest.approx(np.log(2))


def answers():
    """Log-probabilities with mass left outside of the answers, right answers, weights."""
    rng = np.random.default_rng(1)
    shares = rng.dirichlet([1.0] * 4, (ROWS, 5))[..., :3]
    right = rng.integers(0, 3, (ROWS, 5)).astype(np.float32)
    weights = rng.choice([0.0, 1.0], (ROWS, 5)).astype(np.float32)
    weights[0, :2] = 0, 1
    return np.log(shares).astype(np.float32), right, weights


def test_answer_cross_entropy_equals_the_formula():
    log_p, right, weights = answers()
    expected = {"loss": 0.0, "weight": 0.0, "accuracy": 0.0}
    for place in np.ndindex(weights.shape):
        of_answers, target, weight = log_p[place].astype(np.float64), int(right[place]), float(weights[place])
        expected["loss"] -= weight * of_answers[target]
        expected["weight"] += weight
        expected["accuracy"] += weight * (int(np.argmax(of_answers)) == target)
    got = answer_cross_entropy(log_p, right, weights)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == jnp.float32 and got[name].shape == ()
        np.testing.assert_allclose(got[name], value, rtol=1e-6)
    assert 0 < expected["accuracy"] < expected["weight"]


def test_answer_cross_entropy_pushes_the_right_answer_alone():
    log_p, right, weights = answers()
    gradient = jax.grad(lambda x: answer_cross_entropy(x, right, weights)["loss"])(log_p)
    expected = -weights[..., None] * (np.arange(3) == right[..., None])
    assert np.array_equal(gradient, expected)


@pytest.fixture
def sets():
    """Rewards, targets, weights and groups: sets of one to five, with equal targets, one without weight, some room."""
    rng = np.random.default_rng(2)
    sizes = [[3, 2, 5], [1, 4], [2, 2, 2, 2, 2], []]
    rewards = 2 * rng.standard_normal((ROWS, 12)).astype(np.float32)
    targets = rng.integers(0, 3, (ROWS, 12)).astype(np.float32)
    targets[0, :3], targets[1, 1:5] = (0, 1, 0), (3, 1, 2, 0)
    weights, groups = np.zeros((ROWS, 12), np.float32), np.full((ROWS, 12), -1, np.int32)
    for row, row_sizes in enumerate(sizes):
        for number, start in enumerate(np.cumsum([0, *row_sizes[:-1]]) if row_sizes else ()):
            own = slice(start, start + row_sizes[number])
            groups[row, own], weights[row, own] = number, 0 if (row, number) == (2, 1) else rng.choice([0.5, 1.0, 2.0])
    return rewards, targets, weights, groups


def sets_by_hand(kind, rewards, targets, weights, groups):
    sums = {"loss": 0.0, "weight": 0.0, "accuracy": 0.0, "margin": 0.0}
    for row in range(len(rewards)):
        for group in range(groups[row].max() + 1):
            own = np.flatnonzero(groups[row] == group)
            r, t, weight = rewards[row, own].astype(np.float64), targets[row, own], float(weights[row, own[0]])
            sums["weight"] += weight
            ahead = [r[i] - r[j] for i in range(len(own)) for j in range(len(own)) if t[i] > t[j]]
            if kind == "all-pairs":
                sums["loss"] += weight * np.mean([-log_sigmoid(d) for d in ahead]) if ahead else 0
            else:
                for i in range(len(own)):
                    sums["loss"] -= weight * np.log(np.exp(r[i]) / (np.exp(r[i]) + np.exp(r[t < t[i]]).sum()))
            sums["accuracy"] += weight * np.mean(np.asarray(ahead) > 0) if ahead else 0
            sums["margin"] += weight * np.mean(ahead) if ahead else 0
    return sums


@pytest.mark.parametrize("kind", SETS)
def test_losses_over_sets_equal_the_formula(kind, sets):
    assert_sums(SETS[kind](*sets), sets_by_hand(kind, *sets))


def test_plackett_luce_is_the_likelihood_of_a_ranking():
    """The probabilities of all rankings of one set sum to one."""
    from itertools import permutations

    rewards = np.asarray([[0.3, -1.2, 2.0, 0.7]], np.float32)
    ones, group = np.ones_like(rewards), np.zeros((1, 4), np.int32)
    orders = np.asarray(list(permutations(range(4))), np.float32)[:, None]
    losses = jax.vmap(lambda order: plackett_luce(rewards, order, ones, group)["loss"])(orders)
    assert np.exp(-np.asarray(losses, np.float64)).sum() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("kind", SETS)
def test_sets_of_two_are_pairs(kind, pairs):
    assert_sums(SETS[kind](*pairs, GROUPS), by_hand(*pairs))


@pytest.mark.parametrize("kind", SETS)
def test_a_set_does_not_feel_the_others_of_its_row(kind, sets):
    rewards, targets, weights, groups = sets
    first = groups == 0
    alone = np.where(first, weights, 0)
    gradient = jax.grad(lambda r: SETS[kind](r, targets, alone, groups)["loss"])(rewards)
    assert (np.asarray(gradient)[~first] == 0).all() and np.abs(gradient)[first].any()
    other = np.where(first, rewards, 100 - rewards)
    assert float(SETS[kind](rewards, targets, alone, groups)["loss"]) == float(
        SETS[kind](other, targets, alone, groups)["loss"]
    )


def test_centering_a_set_takes_twice_its_mean(sets):
    rewards, targets, weights, groups = sets
    batch = {"targets": targets, "weights": weights, "margins": 0, "groups": groups}
    expected = sets_by_hand("all-pairs", *sets)
    for row in range(ROWS):
        for group in range(groups[row].max() + 1):
            own = groups[row] == group
            expected["loss"] += 0.1 * weights[row, own][0] * (2 * rewards[row, own].mean(dtype=np.float64)) ** 2
    assert_sums(reward_loss(rewards, batch, LossOptions("all-pairs", center_rewards=0.1)), expected)


def test_label_cross_entropy_equals_the_formula():
    rng = np.random.default_rng(4)
    logits = 4 * rng.standard_normal((ROWS, 3, 7)).astype(np.float32)
    targets = rng.choice([0.0, 1.0, 0.25], (ROWS, 3, 7)).astype(np.float32)
    weights = rng.choice([0.0, 1.0, 0.5], (ROWS, 3)).astype(np.float32)
    p, y = 1 / (1 + np.exp(-logits.astype(np.float64))), targets.astype(np.float64)
    loss = -(y * np.log(p) + (1 - y) * np.log(1 - p)).mean(-1)
    first = [np.argsort(-x, axis=-1, kind="stable")[..., :3] for x in (logits, targets)]
    shared = (first[0][..., :, None] == first[1][..., None, :]).any(-1).mean(-1)
    expected = {"loss": (weights * loss).sum(), "weight": weights.sum(), "accuracy": (weights * shared).sum()}
    assert_sums(label_cross_entropy(*map(jnp.asarray, (logits, targets, weights)), 3), expected)
    big = partial(label_cross_entropy, targets=targets, weights=weights, k=3)
    assert np.isfinite(jax.grad(lambda x: big(x)["loss"])(1e30 * logits)).all()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("judge", {"center_rewards": 0.1}, "loss is of reward models"),
        ("reward", {"kind": "all-pairs", "margin": True}, "loss.margin is of single pairs"),
        ("reward", {"kind": "plackett-luce", "soft_labels": True}, "loss.soft_labels is of single pairs"),
        ("reward", {"kind": "plackett-luce", "label_smoothing": 0.1}, "loss.label_smoothing is of single pairs"),
    ],
)
def test_loss_options_that_do_not_go_together(kind, options, message):
    assert message in refused(check_loss, kind, LossOptions(**options))
