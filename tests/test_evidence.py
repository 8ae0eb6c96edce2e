"""Evidence-weighted selection: what it is by hand, and what it makes of METHOD.md's worlds."""

import numpy as np
import pytest
from evidence_worlds import as_scores, scores_of

from adaptrm import fit_evidence
from adaptrm.selection import EvidenceWeights, fit_weights, select
from adaptrm.selection.theory import WORLDS, top_vote

PAIRS, RULES = 20_000, 100
FEWER, GOLD = 6_000, 200


def accuracy(label: np.ndarray, preference: np.ndarray) -> float:
    return float((label == preference).mean())


def test_equal_weights_are_the_published_rule():
    rng = np.random.default_rng(0)
    a, b, relevance = (rng.uniform(low, 1, (500, 12)).astype(np.float32) for low in (-1, -1, 0))
    alike = EvidenceWeights(np.full(12, 0.5, np.float32), np.eye(12, dtype=np.float32))
    published, weighed = select(a, b, relevance, k=3), select(a, b, relevance, "evidence", 3, weights=alike)
    assert np.array_equal(published.rules, weighed.rules)
    np.testing.assert_allclose(weighed.margin, published.margin, rtol=1e-5, atol=1e-6)  # 2 x .5 a rule
    np.testing.assert_allclose(weighed.probability, 1 / (1 + np.exp(-published.margin)), rtol=1e-5)


@pytest.mark.parametrize("k", [1, 4, 9])
def test_the_vote_is_that_of_the_selected_rules_alone(k):
    rng = np.random.default_rng(1)
    a, b, relevance = (rng.uniform(low, 1, (300, 9)).astype(np.float32) for low in (-1, -1, 0))
    reliability, factor = rng.normal(0.2, 0.2, 9), rng.standard_normal((9, 9))
    sigma = factor @ factor.T / 9 + np.eye(9) / 2
    weights = EvidenceWeights(reliability.astype(np.float32), sigma.astype(np.float32))
    found = select(a, b, relevance, "evidence", k, weights=weights)
    d, whole = (a - b).astype(np.float64), np.linalg.solve(sigma, reliability)
    score = relevance + 0.5 * np.abs(whole / np.abs(whole).mean() * d)
    assert (np.sort(found.rules) == np.sort(np.argsort(-score, axis=1)[:, :k])).all(axis=1).mean() > 0.99
    for row, chosen in enumerate(found.rules):
        of_chosen = np.linalg.solve(sigma[np.ix_(chosen, chosen)], reliability[chosen])
        assert found.margin[row] == pytest.approx(2 * of_chosen @ d[row, chosen], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("name", [name for name, world in WORLDS.items() if not name.startswith("nuisance")])
def test_given_nothing_but_the_discrepancies(name):
    """What METHOD.md's worlds ask of it; .01 is three standard errors."""
    world = WORLDS[name]
    preference, d = world.sample(np.random.default_rng(7), PAIRS)
    scores = as_scores(d)
    weights = fit_evidence(scores_of(d))
    five = accuracy(select(*scores, "evidence", weights=weights).preferred, preference)
    published = accuracy(top_vote(d), preference)
    if name in ("noisy 20", "junk 20", "opposed 10"):
        assert five >= 0.99
    assert five >= published - (0.01 if world.independent else 0.02)
    if name in ("alike", "sparse 8", "sparse 3", "heavy tails", "saturating"):
        assert abs(five - published) <= 0.01
    if world.independent and world.weights is not None and world.base is None:
        every = accuracy(select(*scores, "evidence", RULES, weights=weights).preferred, preference)
        assert every >= accuracy(np.sign(d @ world.weights), preference) - 0.005
    # Ten groups of rules that go along with each other look like so many preferences, and that is said.
    assert bool(weights.report["warnings"]) == (not world.independent)


@pytest.mark.parametrize("name", ["nuisance on half", "nuisance on all"])
def test_a_shared_nuisance_is_told_by_gold_or_warned_of(name):
    preference, d = WORLDS[name].sample(np.random.default_rng(7), FEWER)
    scores, given = as_scores(d), scores_of(d)
    (warning,) = fit_evidence(given).report["warnings"]
    assert warning.startswith("the hidden preference cannot be told from a nuisance that many rules share")
    published = accuracy(top_vote(d), preference)
    for seed in range(2):
        people = np.random.default_rng(seed).choice(FEWER, GOLD, replace=False)
        weights = fit_evidence(given, {given.ids[i]: int(preference[i]) for i in people})
        five = accuracy(select(*scores, "evidence", weights=weights).preferred, preference)
        assert five >= published - 0.01
        if name == "nuisance on half":
            assert five > published + 0.01 and not weights.report["warnings"]


@pytest.mark.parametrize("name", ["noisy 20", "correlated"])
def test_gold_costs_nothing_where_it_is_not_needed(name):
    """The vote of all rules is right with either weights in the noisy world; that of five is not."""
    preference, d = WORLDS[name].sample(np.random.default_rng(7), FEWER)
    given = scores_of(d)
    gold = {id: int(sign) for id, sign in zip(given.ids[:GOLD], preference, strict=False)}
    weights = fit_evidence(given, gold)
    five = accuracy(select(*as_scores(d), "evidence", weights=weights).preferred, preference)
    assert five >= (0.985 if name == "noisy 20" else accuracy(top_vote(d), preference) - 0.02)
    assert weights.report["warnings"] == []


def test_the_order_of_rules_and_of_responses_changes_nothing():
    _, d = WORLDS["noisy 20"].sample(np.random.default_rng(3), 2000)
    d = d.astype(np.float32)
    order = np.random.default_rng(4).permutation(RULES)
    sides = np.random.default_rng(5).choice(np.float32([-1, 1]), (len(d), 1))
    plain, moved, turned = fit_weights(d), fit_weights(d[:, order]), fit_weights(sides * d)
    np.testing.assert_allclose(moved.weights, plain.weights[order], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(turned.weights, plain.weights, rtol=1e-3, atol=1e-4)


def test_a_rule_that_says_nothing_weighs_nothing():
    _, d = WORLDS["noisy 20"].sample(np.random.default_rng(3), 2000)
    d[:, 30] = 0
    found = fit_weights(d.astype(np.float32))
    assert found.weights[30] == 0 and np.isfinite(found.weights).all()


@pytest.mark.parametrize(
    ("d", "message"),
    [
        (np.random.default_rng(0).standard_normal((500, 20)), "nothing in common that stands out from noise"),
        (np.zeros((500, 20)), "there are 0 and 500"),
        (np.random.default_rng(0).standard_normal((3, 20)), "there are 20 and 3"),
    ],
)
def test_what_the_data_cannot_support_is_said(d, message):
    with pytest.raises(ValueError, match=message):
        fit_weights(d.astype(np.float32))


def test_weights_of_other_rules_are_refused():
    scores = as_scores(np.random.default_rng(0).standard_normal((5, 4)))
    weights = EvidenceWeights(np.ones(3, np.float32), np.eye(3, dtype=np.float32))
    with pytest.raises(ValueError, match="the weights are of 3 rules; there are 4"):
        select(*scores, "evidence", 2, weights=weights)
    with pytest.raises(ValueError, match="'all' takes no weights; only 'evidence' does"):
        select(*scores, "all", weights=weights)
