"""``fit_evidence``: the same weights however pairs come, covariates, gold, files of weights, and what is refused."""

import json

import jax
import numpy as np
import pytest
from evidence_worlds import PAIRS, RULES, STRENGTHS, gold_of, rows_of, scores_of, some_world, write_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from refusals import refused

from adaptrm import EvidenceWeights, fit_evidence, paths, select
from adaptrm.evidence.checks import ONE_THING
from adaptrm.evidence.gathered import Gathered
from adaptrm.evidence.gold import LEAST_VERDICTS, factors, fit_gold
from adaptrm.parallel import make_mesh
from adaptrm.selection.evidence import _reliabilities


def close(one: EvidenceWeights, other: EvidenceWeights, order=slice(None)) -> None:
    np.testing.assert_allclose(one.a, other.a[order], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(one.sigma, other.sigma[order][:, order], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("with_gold", [False, True])
def test_a_folder_gives_what_its_scores_give(tmp_path, with_gold):
    preference, longer, d = some_world(nuisance=0.2)
    scores = scores_of(d)
    gold = gold_of(scores, preference) if with_gold else None
    options = {"gold": gold, "covariates": {"length": longer}}
    here, there = (
        fit_evidence(given, **options) for given in (scores, write_folder(tmp_path / "scores", scores, part=170))
    )
    np.testing.assert_allclose(there.a, here.a, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(there.sigma, here.sigma, rtol=1e-5, atol=1e-6)
    assert here.rule_ids == there.rule_ids == tuple(scores.rule_ids)
    assert here.report["pairs"] == here.report["pairs_fitted"] == there.report["pairs"] == PAIRS
    assert list(here.report["by_rule"]) == list(there.report["by_rule"])
    assert here.report["projected"] == ["length"]


@settings(max_examples=6)
@given(seed=st.integers(0, 2**32 - 1), with_gold=st.booleans())
def test_sides_and_the_order_of_rules_and_pairs_change_nothing(seed, with_gold):
    preference, longer, d = some_world(nuisance=0.2)
    scores, rng = scores_of(d), np.random.default_rng(seed)
    gold = gold_of(scores, preference) if with_gold else {}
    plain = fit_evidence(scores, gold, longer)

    sides = rng.choice([-1, 1], PAIRS)
    turned = {id: sign * int(sides[i]) for i, (id, sign) in enumerate(gold.items())}
    close(fit_evidence(scores_of(sides[:, None] * d), turned, sides * longer), plain)
    order = rng.permutation(RULES)
    moved = fit_evidence(scores_of(d[:, order]), gold, longer)
    close(moved, plain, order)
    pairs = rng.permutation(PAIRS)
    close(fit_evidence(rows_of(scores, pairs), gold, longer[pairs]), plain)

    relevance = np.ones_like(scores.a)
    one = select(scores.a, scores.b, relevance, "evidence", 3, weights=plain)
    other = select(scores.b, scores.a, relevance, "evidence", 3, weights=plain)
    assert np.array_equal(one.rules, other.rules) and np.array_equal(one.margin, -other.margin)
    of_moved = select(scores.a[:, order], scores.b[:, order], relevance, "evidence", 3, weights=moved)
    assert (of_moved.preferred == one.preferred).mean() > 0.99


def test_the_sample_is_of_the_smallest_hashes_whatever_the_batches():
    rng = np.random.default_rng(0)
    d = rng.uniform(-1, 1, (500, 3)).astype(np.float32)
    ids = [f"p{i}" for i in range(500)]
    found = []
    for size in (500, 7, 1):
        gathered = Gathered(3, 1, {}, most=40)
        for start in range(0, 500, size):
            rows = slice(start, start + size)
            gathered.add(ids[rows], d[rows], 0 * d[rows], d[rows, :1])
            if gathered._held > 60:  # what a full buffer does
                gathered._cut()
        found.append(gathered.evident(project=False))
    from adaptrm.data.preferences import hash_id

    smallest = sorted(range(500), key=lambda i: hash_id(ids[i]))[:40]
    for evident in found:
        assert np.array_equal(evident.some, d[smallest])
        assert evident.pairs == 500
        np.testing.assert_allclose(evident.moments, d.T.astype(float) @ d / 500, rtol=1e-6)


def test_what_goes_along_with_a_covariate_is_reported_and_taken_out():
    preference, longer, d = some_world(pairs=4000, nuisance=0.9)
    scores = scores_of(d)
    labels = {}
    for project in (False, True):
        weights = fit_evidence(scores, covariates={"length": longer}, project=project)
        chosen = select(scores.a, scores.b, scores.relevance, "evidence", RULES, weights=weights)
        labels[project] = (chosen.preferred == preference).mean()
        warned = [warning for warning in weights.report["warnings"] if "with length: take it out" in warning]
        correlation = weights.report["correlations"]["length"]
        assert abs(correlation) < 0.1 if project else correlation > 0.7, correlation
        assert bool(warned) is not project
        # Length is independent of the preference here, so it has no part in the rules' reliability once taken out.
        size = np.abs(d).max() / 2
        if project:
            np.testing.assert_allclose(weights.a, STRENGTHS / size, atol=0.03 / size)
    assert labels[False] < 0.7 and labels[True] > 0.9


def test_the_report_says_what_the_numbers_of_a_rule_are():
    preference, _, d = some_world(pairs=4000)
    d[:, 1] = d[:, 0] + 0.1 * np.random.default_rng(1).standard_normal(len(d))
    weights = fit_evidence(scores_of(d))
    rules = weights.report["by_rule"]
    assert list(rules) == sorted(rules, key=lambda id: -abs(rules[id]["weight"]))
    assert np.mean([abs(rule["weight"]) for rule in rules.values()]) == pytest.approx(1)
    assert sum(rule["decides"] for rule in rules.values()) == pytest.approx(5)
    for i in range(2, RULES):  # rules of their own: correlation with the truth
        truth = np.corrcoef(d[:, i], preference)[0, 1]
        assert rules[f"r{i}"]["reliability"] == pytest.approx(truth, abs=0.05)
    assert all((rules[f"r{i}"]["redundancy"] > 0.8) == (i < 2) for i in range(RULES))


def test_gold_turns_a_judge_that_prefers_the_worse_response():
    preference, _, d = some_world(pairs=2000)
    scores = scores_of(-d)
    weights = fit_evidence(scores, gold_of(scores, preference, 200))
    chosen = select(scores.a, scores.b, scores.relevance, "evidence", 5, weights=weights)
    assert (chosen.preferred == preference).mean() > 0.9
    # What is said of a pair is as sure as it should be.
    assert -np.log(np.where(preference > 0, chosen.probability, 1 - chosen.probability)).mean() < 0.3
    gold = weights.report["gold"]
    assert gold["verdicts"] == 200 and gold["losses"][gold["chosen"]] == min(gold["losses"].values()) < 0.3
    assert weights.report["warnings"] == []


def test_gold_that_agrees_with_no_vote_is_warned_of():
    _, _, d = some_world(pairs=2000)
    scores = scores_of(d)
    coins = np.random.default_rng(5).choice([-1, 1], 200)
    (warning,) = fit_evidence(scores, gold_of(scores, coins, 200)).report["warnings"]
    assert warning.startswith("no vote of these rules agrees with the gold verdicts beyond chance (")


def test_a_vote_comes_back_from_the_reliabilities_that_stand_for_it():
    preference, _, d = some_world(pairs=3000)
    found = fit_gold(d, preference.astype(float), d.T @ d / len(d), len(d), None)
    assert found.chosen != "alone" and found.factors == 1
    whole = found.weights.sigma + np.outer(found.weights.a, found.weights.a)
    np.testing.assert_allclose(np.diag(whole), (d**2).mean(axis=0), rtol=1e-5)
    # The vote's log-odds are those of the preference: as often right as they say.
    said = 1 / (1 + np.exp(-np.abs(2 * d @ found.weights.weights)))
    assert (np.sign(d @ found.weights.weights) == preference).mean() == pytest.approx(said.mean(), abs=0.03)


def test_factors_are_those_the_rules_were_made_of():
    rng = np.random.default_rng(0)
    loadings = np.zeros((20, 2))
    loadings[:10, 0], loadings[10:, 1] = 0.7, 0.5
    x = rng.standard_normal((20_000, 2)) @ loadings.T
    x += rng.standard_normal(x.shape) * np.sqrt(1 - (loadings**2).sum(axis=1))
    found = factors(np.corrcoef(x.T), len(x))
    np.testing.assert_allclose(found @ found.T, loadings @ loadings.T, atol=0.03)
    assert factors(np.corrcoef(rng.standard_normal((5, 1000))), 1000).shape == (5, 0)


def test_devices_share_the_pairs():
    _, _, d = some_world(pairs=640)
    d = d.astype(np.float32)
    variance = (d**2).mean(axis=0)
    mesh = make_mesh(8)
    over = jax.device_put(d, NamedSharding(mesh, PartitionSpec("data")))
    one, several = (np.asarray(_reliabilities(x, variance, STRENGTHS.astype(np.float32))) for x in (d, over))
    np.testing.assert_allclose(several, one, rtol=1e-5)


def test_weights_in_files_are_the_same_and_can_be_read(tmp_path):
    preference, longer, d = some_world()
    scores = scores_of(d)
    for name, options in {"alone": {"covariates": longer}, "gold": {"gold": gold_of(scores, preference)}}.items():
        weights = fit_evidence(scores, **options)
        file = tmp_path / f"{name}.json"
        weights.save(file)
        again = EvidenceWeights.load(file)
        assert np.array_equal(again.a, weights.a) and np.array_equal(again.sigma, weights.sigma)
        assert (again.rule_ids, again.report) == (weights.rule_ids, weights.report)
        assert again.a.dtype == again.sigma.dtype == np.float32
        written = json.loads(file.read_text())
        assert written["rules"]["r3"]["a"] == pytest.approx(weights.a[3], rel=1e-6)
        assert max(map(len, file.read_text().splitlines())) < 300
    EvidenceWeights(weights.a, weights.sigma).save("memory://weights/plain.json")
    again = EvidenceWeights.load("memory://weights/plain.json")
    assert np.array_equal(again.sigma, weights.sigma) and again.rule_ids == tuple(map(str, range(RULES)))


GOOD = {
    "evidence_weights": 1,
    "report": {},
    "rules": {"r": {"a": 1, "sigma": [1, 0.5]}, "s": {"a": 0, "sigma": [0.5, 1]}},
}


@pytest.mark.parametrize(
    "broken",
    [
        b"\xff",
        b"[]",
        b"{}",
        json.dumps(GOOD | {"evidence_weights": 2}).encode(),
        json.dumps(GOOD | {"report": 3}).encode(),
        json.dumps(GOOD | {"rules": {}}).encode(),
        json.dumps(GOOD).replace('"a": 0', '"a": NaN').encode(),
        json.dumps(GOOD).replace('"a": 0', '"a": null').encode(),
        json.dumps(GOOD).replace("[0.5, 1]", "[0.4, 1]").encode(),
        json.dumps(GOOD).replace("[0.5, 1]", "[0.5]").encode(),
        json.dumps(GOOD).replace("0.5", "2").encode(),  # no covariance
    ],
)
def test_files_that_are_no_weights_are_refused(tmp_path, broken):
    file = tmp_path / "weights.json"
    paths.write_bytes(file, json.dumps(GOOD).encode())
    assert EvidenceWeights.load(file).sigma[0, 1] == 0.5
    paths.write_bytes(file, broken)
    assert refused(EvidenceWeights.load, file).startswith(f"{file}: not evidence weights; make them with adaptrm label")


def test_what_cannot_be_fitted_is_said_in_one_line(tmp_path):
    preference, longer, d = some_world()
    scores, rng = scores_of(d), np.random.default_rng(0)
    one_thing = scores_of(rng.standard_normal((PAIRS, 1)) + 0.3 * rng.standard_normal((PAIRS, RULES)))
    message = refused(fit_evidence, one_thing)
    assert message.startswith("scores: the judge says one thing by all rules (their mean correlation is 0.9")
    assert fit_evidence(one_thing, gold_of(one_thing, np.sign(one_thing.a[:, 0]))).report["alike"] > ONE_THING
    folder = write_folder(tmp_path / "noise", scores_of(rng.standard_normal((PAIRS, RULES))), 300)
    assert refused(fit_evidence, folder).startswith(f"{folder}: the rules have nothing in common that stands out")
    assert "4 pairs; there are 8 and 3" in refused(fit_evidence, rows_of(scores, slice(3)))
    assert "4 pairs; there are 0 and 0" in refused(fit_evidence, rows_of(scores, slice(0)))
    few = gold_of(scores, preference, LEAST_VERDICTS - 1) | {"p100": 0, "elsewhere": 1}
    assert refused(fit_evidence, scores, few).startswith(
        "scores: 19 gold verdicts on these pairs, less ties, are too few"
    )
    assert "of 599 pairs, the scores of more" in refused(fit_evidence, scores, None, longer[1:])
    assert "of 601 pairs, the scores of 600" in refused(fit_evidence, scores, None, np.append(longer, 1))
    assert "their shapes are" in refused(fit_evidence, scores, None, {"x": longer, "y": longer[1:]})
    scores.a[7, 2] = np.nan
    assert "the scores or covariates of pair 'p7' are not all numbers" in refused(fit_evidence, scores)
    assert "this is not a score folder" in refused(fit_evidence, tmp_path / "none")
