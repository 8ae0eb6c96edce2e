"""Margins, calibration and length bias, against a plain count over all pairs of every row."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptrm.evaluate.diagnostics import Diagnostics

response = st.tuples(st.integers(-8, 8), st.integers(1, 3))  # reward in halves, characters
rows = st.lists(st.tuples(st.lists(response, min_size=1, max_size=3), st.lists(response, min_size=1, max_size=3)))


@given(rows.filter(bool))
def test_any_rows_equal_a_plain_count(rows):
    diagnostics, pairs = Diagnostics(), []
    for chosen, rejected in rows:
        rewards, lengths = np.array([*chosen, *rejected], float).T
        diagnostics.add(rewards / 2, lengths, len(chosen))
        # A row counts one: each of its pairs a part of it.
        share = 1 / (len(chosen) * len(rejected))
        pairs += [(share, (a - b) / 2, of_a - of_b) for a, of_a in chosen for b, of_b in rejected]
    found = diagnostics.found()
    mean = sum(share * margin for share, margin, _ in pairs) / len(rows)
    variance = sum(share * (margin - mean) ** 2 for share, margin, _ in pairs) / len(rows)
    assert found["margins"]["mean"] == pytest.approx(mean, abs=1e-12)
    assert found["margins"]["standard_deviation"] == pytest.approx(math.sqrt(variance), abs=1e-6)
    for name, inside in (
        ("chosen_longer", lambda longer: longer > 0),
        ("chosen_shorter", lambda longer: longer < 0),
        ("same_length", lambda longer: longer == 0),
    ):
        of = [(share, margin > 0) for share, margin, longer in pairs if inside(longer)]
        n = sum(share for share, _ in of)
        assert found["length_bias"][name]["n"] == pytest.approx(n)
        if of:
            expected = sum(share * right for share, right in of) / n
            assert found["length_bias"][name]["accuracy"] == pytest.approx(expected)
    # Ten bins of probability from one half to one; a tie says one half, and half is right.
    error = 0.0
    for at in range(10):
        low, high = 0.5 + at / 20, 0.55 + at / 20
        of = [(share, 1 / (1 + math.exp(-abs(margin))), margin) for share, margin, _ in pairs]
        of = [(share, p, 0.5 if margin == 0 else margin > 0) for share, p, margin in of if low <= p < high]
        entry = next((entry for entry in found["calibration"]["reliability"] if abs(entry["from"] - low) < 1e-9), None)
        assert (entry is not None) == bool(of)
        if of:
            n = sum(share for share, _, _ in of)
            probability, right = (sum(one[0] * one[i] for one in of) / n for i in (1, 2))
            wanted = {"from": low, "to": high, "rows": n, "probability": probability, "right": right}
            assert entry == {name: pytest.approx(value) for name, value in wanted.items()}
            error += n * abs(probability - right)
    assert found["calibration"]["error"] == pytest.approx(error / len(rows))


def test_rewards_far_apart_are_certain():
    diagnostics = Diagnostics()
    diagnostics.add(np.array([1e6, 0.0]), np.array([1, 2]), 1)
    (entry,) = diagnostics.found()["calibration"]["reliability"]
    assert (entry["to"], entry["probability"], entry["right"]) == (1, 1, 1)
