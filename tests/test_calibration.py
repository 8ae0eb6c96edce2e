"""Probabilities that are calibrated on gold, measures of them, and thresholds that keep a promised error."""

import sys

import numpy as np
import pytest
from refusals import refused

pytest.importorskip("sklearn", reason="pip install 'adaptrm[gold]'")

from sklearn.metrics import brier_score_loss, log_loss

from adaptrm import calibration
from adaptrm.calibration import Believed, fit, held_out, measured, method_for, threshold_by_gold

LAWS = {
    # The margin is log-odds, three times too large.
    "temperature 3": lambda sizes: 1 / (1 + np.exp(-sizes / 3)),
    # Beyond some margin nothing is surer: no slope fits it.
    "level": lambda sizes: np.where(sizes > 1, 0.85, 0.55),
}


def drawn(law: str, pairs: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Sizes of margins, and whether their labels are right."""
    rng = np.random.default_rng(seed)
    sizes = np.abs(rng.normal(0, 4, pairs)) + 1e-3
    return sizes, rng.random(pairs) < LAWS[law](sizes)


@pytest.mark.parametrize(("law", "pairs"), [("temperature 3", 500), ("temperature 3", 3000), ("level", 3000)])
def test_a_known_miscalibration_is_mended(law, pairs):
    method = method_for(pairs)
    assert method == ("platt" if pairs == 500 else "isotonic")
    found = fit(*drawn(law, pairs), method)
    sizes, right = drawn(law, 100_000, seed=1)
    probability = found(sizes)
    off = np.abs(probability - LAWS[law](sizes)).mean()
    assert off < 0.02, off
    before, after = measured(1 / (1 + np.exp(-sizes)), right), measured(probability, right)
    assert all(after[name] < before[name] for name in ("brier", "nll", "calibration_error"))
    best = measured(LAWS[law](sizes), right)
    assert after["nll"] < best["nll"] + 0.01 < before["nll"]


def test_a_curve_needs_more_than_a_slope_where_it_is_no_slope():
    sizes, right = drawn("level", 20_000, seed=1)
    platt, isotonic = (measured(fit(*drawn("level", 3000), m)(sizes), right)["nll"] for m in ("platt", "isotonic"))
    assert isotonic < platt - 0.01


@pytest.mark.parametrize("method", ["platt", "isotonic"])
def test_probabilities_rise_with_the_margin_and_stay_between_a_half_and_what_gold_can_show(method):
    sizes, right = drawn("temperature 3", 200)
    for outcome in (right, np.ones(200, bool), np.zeros(200, bool)):
        probability = fit(sizes, outcome, method)(np.concatenate([[0], np.sort(sizes), [1e6]]))
        assert (np.diff(probability) >= 0).all() and probability.min() >= 0.5 and probability.max() <= 201 / 202
        if not outcome.any():  # labels that are always wrong are no better than a coin
            assert probability.max() == 0.5


def test_the_curve_of_the_sizes_is_the_curve_of_each_pair_in_both_orders():
    from sklearn.isotonic import IsotonicRegression

    sizes, right = drawn("temperature 3", 400)
    signed = IsotonicRegression(out_of_bounds="clip").fit(np.r_[sizes, -sizes], np.r_[right, ~right])
    np.testing.assert_allclose(fit(sizes, right, "isotonic").curve(sizes), signed.predict(sizes), atol=1e-12)
    np.testing.assert_allclose(signed.predict(-sizes), 1 - signed.predict(sizes), atol=1e-12)


@pytest.mark.parametrize("method", ["platt", "isotonic"])
def test_no_pair_is_measured_by_a_curve_that_was_fitted_to_it(method):
    sizes, right = drawn("temperature 3", 60)
    whole, moved = held_out(sizes, right, method), 0
    for pair in np.argsort(sizes)[-3:]:
        other = right.copy()
        other[pair] = ~other[pair]
        changed = held_out(sizes, other, method)
        assert changed[pair] == whole[pair]
        moved += (changed != whole).any()
    assert moved


def test_measures_are_those_of_scikit_learn():
    sizes, right = drawn("temperature 3", 300)
    probability = held_out(sizes, right, "platt")
    found = measured(probability, right)
    np.testing.assert_allclose(found["brier"], brier_score_loss(right, probability), rtol=1e-12)
    np.testing.assert_allclose(found["nll"], log_loss(right, probability), rtol=1e-12)
    assert sum(row["pairs"] for row in found["reliability"]) == 300
    for row in found["reliability"]:
        inside = (probability >= row["from"] - 1e-12) & (probability < row["to"] + 1e-12)
        assert inside.sum() == row["pairs"] and row["from"] <= row["probability"] <= row["to"]
        np.testing.assert_allclose(row["right"], right[inside].mean())
    # Nine in ten right where all were certain: the error is a tenth, and the likelihood none.
    certain = measured(np.ones(10), np.arange(10) > 0)
    assert "nll" not in certain and certain["brier"] == pytest.approx(0.1) == certain["calibration_error"]


def test_a_threshold_keeps_its_promise_on_fresh_pairs():
    target, broken, kept = 0.2, 0, []
    fresh, _ = drawn("temperature 3", 50_000, seed=1)
    wrong = 1 - LAWS["temperature 3"](fresh)
    for seed in range(60):
        found = threshold_by_gold(*drawn("temperature 3", 2000, seed=10 + seed), target)
        above = fresh >= found.size
        broken += wrong[above].mean() > target
        kept.append(above.mean())
        assert found.error <= found.at_most <= target
    assert broken <= 3  # each has a chance of .05 at most
    best = np.mean(np.cumsum(np.sort(wrong)) / np.arange(1, len(wrong) + 1) <= target)
    assert np.mean(kept) > 0.7 * best  # and it does not keep it by throwing labels away


def test_a_promise_that_cannot_be_kept_is_refused():
    sizes, right = drawn("temperature 3", 100)
    assert "takes 135 gold verdicts at least" in refused(threshold_by_gold, sizes, right, 0.03)
    found = refused(threshold_by_gold, sizes, np.zeros(100, bool), 0.2)
    assert "by gold 100 % of the surest 20 % of the labels are wrong" in found


def test_a_model_that_believes_itself_abstains_by_its_own_probabilities():
    believed, rng = Believed(), np.random.default_rng(0)
    probability = 1 / (1 + np.exp(-np.abs(rng.normal(0, 3, 20_000))))
    for some in np.split(probability, 4):
        believed.add(some)
    found = believed.threshold(0.05)
    kept = probability >= 1 / (1 + np.exp(-found.size))
    assert 0.045 < (1 - probability[kept]).mean() <= 0.05 and found.at_most is None
    assert found.error == pytest.approx((1 - probability[kept]).mean(), abs=1e-6)
    assert found.kept == pytest.approx(kept.mean(), abs=1e-6)
    unsure = Believed()
    unsure.add(np.full(10, 0.6))
    assert "no label is that sure" in refused(unsure.threshold, 0.1)


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    assert "pip install 'adaptrm[gold]'" in refused(calibration.fit, *drawn("level", 40), "platt")
