"""Losses against NumPy in float64, and what masked leaves and large margins do to them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptrm.train.losses import answer_cross_entropy, bradley_terry

ROWS, PAIRS = 4, 6
VALUE_AND_GRAD = jax.jit(jax.value_and_grad(lambda *given: bradley_terry(*given)["loss"]))


@pytest.fixture
def pairs():
    """Rewards, signs and weights with both signs and pairs left out."""
    rng = np.random.default_rng(0)
    rewards = rng.standard_normal((ROWS, 2 * PAIRS)).astype(np.float32) * 3
    sign = rng.choice([-1.0, 1.0], (ROWS, PAIRS)).astype(np.float32)
    weight = rng.choice([0.0, 1.0, 0.5], (ROWS, PAIRS)).astype(np.float32)
    weight[0, :3] = 0, 1, 0.5  # each for certain
    return rewards, np.repeat(sign, 2, axis=1), np.repeat(weight, 2, axis=1)


def by_hand(rewards, signs, weights):
    """Pair by pair, as the paper writes it."""
    sums = {"loss": 0.0, "weight": 0.0, "accuracy": 0.0, "margin": 0.0}
    for row in range(len(rewards)):
        for a in range(0, rewards.shape[1], 2):
            chosen, rejected = (a, a + 1) if signs[row, a] > 0 else (a + 1, a)
            margin = float(rewards[row, chosen]) - float(rewards[row, rejected])
            weight = float(weights[row, a])
            sums["loss"] += weight * float(np.logaddexp(0, -margin))
            sums["weight"] += weight
            sums["accuracy"] += weight * (margin > 0)
            sums["margin"] += weight * margin
    return sums


def test_bradley_terry_equals_the_formula(pairs):
    got, expected = bradley_terry(*pairs), by_hand(*pairs)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == jnp.float32 and got[name].shape == ()
        np.testing.assert_allclose(got[name], value, rtol=1e-6)


def test_bradley_terry_gradient_equals_the_formula(pairs):
    rewards, signs, weights = pairs
    gradient = np.asarray(VALUE_AND_GRAD(*pairs)[1])
    margin = signs[:, 0::2] * (rewards[:, 0::2] - rewards[:, 1::2]).astype(np.float64)
    at_a = -weights[:, 0::2] * signs[:, 0::2] / (1 + np.exp(margin))
    np.testing.assert_allclose(gradient[:, 0::2], at_a, rtol=1e-5)
    assert np.array_equal(gradient[:, 1::2], -gradient[:, 0::2])
    assert (gradient[weights == 0] == 0).all()
    assert (gradient[weights > 0] != 0).all()


def test_swapping_the_responses_and_the_sign_changes_nothing(pairs):
    rewards, signs, weights = pairs
    swapped = rewards.reshape(ROWS, PAIRS, 2)[..., ::-1].reshape(ROWS, -1)
    one, other = bradley_terry(rewards, signs, weights), bradley_terry(swapped, -signs, weights)
    assert all(float(one[name]) == float(other[name]) for name in one)


def test_pairs_without_a_label_count_nowhere():
    rewards = jnp.asarray([[5.0, -7.0, 1.0, 0.0]])
    signs, weights = jnp.asarray([[0.0, 0, 1, 1]]), jnp.asarray([[0.0, 0, 1, 1]])
    both, alone = bradley_terry(rewards, signs, weights), bradley_terry(*(x[:, 2:] for x in (rewards, signs, weights)))
    assert all(float(both[name]) == float(alone[name]) for name in both)
    assert jax.grad(lambda r: bradley_terry(r, signs, weights)["loss"])(rewards)[0, :2].tolist() == [0, 0]


@pytest.mark.parametrize("size", [60.0, 1e4, 1e30])
def test_large_margins_do_not_overflow(size):
    rewards = np.zeros((ROWS, 2 * PAIRS), np.float32)
    signs, weights = np.ones_like(rewards), np.ones_like(rewards)
    rewards[0, 0], rewards[1, 1] = size, size  # one pair far on the right side, one far on the wrong side
    loss, gradient = VALUE_AND_GRAD(rewards, signs, weights)
    rest = (ROWS * PAIRS - 2) * np.log(2)
    np.testing.assert_allclose(loss, size + rest, rtol=1e-6)
    assert np.isfinite(gradient).all()
    assert gradient[0, 0] == pytest.approx(0, abs=1e-20)
    assert gradient[1, 0] == -1 and gradient[1, 1] == 1


def test_a_reward_tie_is_not_right():
    rewards, ones = jnp.asarray([[2.0, 2.0]]), jnp.ones((1, 2))
    got = bradley_terry(rewards, ones, ones)
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
