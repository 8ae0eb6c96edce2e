"""Closed forms of the theory against simulation, the statement's proof, the worlds, and some of METHOD.md's figures."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from adaptrm.selection import select, theory
from adaptrm.selection.theory import NOISES, STRATEGIES, WORLDS

A, RULES = 0.3, 8
GAUSSIAN_WORLDS = [name for name, world in WORLDS.items() if world.noise.linear and world.base is None]


@pytest.mark.parametrize("noise", NOISES)
def test_a_noise_law_is_one_law_of_unit_variance(noise):
    law = NOISES[noise]
    drawn = np.sort(law.sample(np.random.default_rng(0), (100_000,)))
    # Kolmogorov's distance between what is drawn and the distribution; beyond 1.95 / sqrt(n) one time in a thousand.
    assert np.abs(law.cdf(drawn) - (np.arange(len(drawn)) + 0.5) / len(drawn)).max() < 1.95 / math.sqrt(len(drawn))
    m, weight = theory._half_line([law.edge])
    density = np.exp(law.log_density(m))
    assert 2 * density @ weight == pytest.approx(1, abs=1e-9)
    assert 2 * (density * m**2) @ weight == pytest.approx(1, abs=1e-6)
    middle, width = np.array([-1.1, -0.2, 0.3, 1.5]), 1e-5
    slope = (law.cdf(middle + width) - law.cdf(middle - width)) / (2 * width)
    assert np.allclose(slope, np.exp(law.log_density(middle)), atol=1e-6)


def test_log_ratios_have_the_shapes_that_the_statement_needs():
    d = np.linspace(-1, 1, 201)
    assert np.allclose(theory.log_ratio(NOISES["Gaussian"], d, 0.2, 0.5), 2 * 0.2 * d / 0.25)
    laplace = theory.log_ratio(NOISES["Laplace"], d, A)
    assert np.allclose(laplace, 2 * math.sqrt(2) * np.clip(d, -A, A))
    uniform = theory.log_ratio(NOISES["uniform"], np.array([0.0, math.sqrt(3) - 0.31, math.sqrt(3) - 0.29]), A)
    assert uniform.tolist() == [0, 0, math.inf]
    tail = theory.log_ratio(NOISES["Student t3"], np.linspace(0, 20, 2001), A)
    assert np.linspace(0, 20, 2001)[tail.argmax()] == pytest.approx(math.sqrt(1 + A**2), abs=0.01)


@pytest.mark.parametrize("noise", NOISES)
def test_ranks_by_quadrature_are_those_of_simulation(noise):
    law, draws = NOISES[noise], 100_000
    exact = theory.rank_accuracy(law, A, RULES)
    found = theory.simulate_rank_sets(law, 1, np.random.default_rng(1), draws, RULES, A).accuracy
    assert (np.abs(found - exact) < 4.5 * np.sqrt(exact * (1 - exact) / draws)).all()
    assert exact.mean() == pytest.approx(law.cdf(np.array(A)), abs=1e-9)  # a rank at random is a rule at random
    assert np.allclose(theory.rank_accuracy(law, 2 * A, RULES, scale=2), exact)
    assert (exact.argmax() == 0) == law.monotone
    if noise == "uniform":
        assert exact[0] == pytest.approx(1 - (1 - A / math.sqrt(3)) ** RULES / 2, abs=1e-9)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("noise", NOISES)
def test_the_largest_are_best_where_it_is_stated_and_only_there(noise, k):
    law, rng = NOISES[noise], np.random.default_rng(2)
    magnitudes = -np.sort(-np.abs(A + law.sample(rng, (2000, RULES))), axis=1)
    exact = theory.accuracy_given_magnitudes(magnitudes, theory.rank_sets(RULES, k), law, A)
    stated = law.linear or (law.monotone and k == 1)
    assert ((exact.max(axis=1) - exact[:, 0] < 1e-9).all()) == stated
    # Accuracy given the magnitudes averages to accuracy.
    found = theory.simulate_rank_sets(law, k, rng, 100_000, RULES, A)
    error = np.sqrt(exact.var(axis=0) / len(exact) + found.accuracy * (1 - found.accuracy) / 100_000)
    assert (np.abs(exact.mean(axis=0) - found.accuracy) < 4.5 * error).all()
    assert found.sets[0].tolist() == list(range(k))
    gains = exact[:, found.best] - exact[:, 0]
    gain, error = gains.mean(), gains.std() / math.sqrt(len(gains))
    assert gain < 1e-9 if stated else gain > 4.5 * error
    assert abs(found.gain - gain) <= 4.5 * math.hypot(found.gain_error, error)


def test_information_is_that_of_a_symmetric_channel():
    assert theory.information(np.array([0.5, 0.0, 1.0])).tolist() == [0, 1, 1]
    assert theory.information(0.89) == pytest.approx(1 + 0.89 * math.log2(0.89) + 0.11 * math.log2(0.11))


@pytest.mark.parametrize("name", WORLDS)
def test_a_world_has_the_moments_it_says(name):
    world, pairs = WORLDS[name], 5000
    preference, d = world.sample(np.random.default_rng(3), pairs)
    assert np.array_equal(d, world.sample(np.random.default_rng(3), pairs)[1])
    assert (preference.dtype, d.shape, set(preference)) == (np.int8, (pairs, theory.RULES), {-1, 1})
    signed = d * preference[:, None]
    if world.base is not None:  # saturated scores keep the sign of what they came from
        assert (np.abs(d) < 2).all() and (signed.mean(axis=0) > 0).all()
        return
    share = 1 if world.active is None else world.active / theory.RULES
    error = signed.std(axis=0) / math.sqrt(pairs)
    assert (np.abs(signed.mean(axis=0) - share * world.strength) < 5 * error).all()
    if world.active is None and world.noise.linear:
        covariance = np.cov(signed.T)
        size = np.sqrt(np.outer(np.diag(world.covariance), np.diag(world.covariance)))
        assert (np.abs(covariance - world.covariance) < 5 * math.sqrt(2 / pairs) * size).all()
        assert np.allclose(world.covariance @ world.weights, world.strength)
    assert (world.weights is None) == (world.active is not None)


@pytest.mark.parametrize("name", GAUSSIAN_WORLDS)
def test_a_vote_of_all_rules_is_as_good_as_its_formula(name):
    world, pairs = WORLDS[name], 20_000
    weights = np.ones(theory.RULES) if world.weights is None else world.weights
    preference, d = world.sample(np.random.default_rng(4), pairs)
    for weight in (weights, np.ones(theory.RULES)):
        exact = theory.linear_accuracy(world, weight)
        error = math.sqrt(exact * (1 - exact) / pairs)
        assert abs((np.sign(d @ weight) == preference).mean() - exact) <= 4.5 * error + 1e-4


def test_formulas_refuse_what_they_do_not_cover():
    for name in ("heavy tails", "saturating"):
        with pytest.raises(ValueError, match="Gaussian"):
            theory.linear_accuracy(WORLDS[name], np.ones(theory.RULES))
    with pytest.raises(ValueError, match="equal weights"):
        theory.linear_accuracy(WORLDS["sparse 3"], np.arange(theory.RULES))


def test_the_top_vote_is_the_published_selection():
    for name in ("junk 20", "sparse 3"):
        _, d = WORLDS[name].sample(np.random.default_rng(5), 1000)
        d /= 2 * np.abs(d).max()
        chosen = select(d, np.zeros_like(d), np.ones_like(d), "max-discrepancy", theory.K)
        found = STRATEGIES["top-5 by |d|"](WORLDS[name], d, None)
        assert (chosen.preferred == found).mean() > 0.999  # float32 may round two magnitudes to one


def test_em_finds_the_oracle_where_rules_are_independent_and_a_nuisance_deceives_it():
    accuracy = theory.label_accuracy(
        WORLDS["noisy 20"], ("label-free EM", "all, weighted"), np.random.default_rng(6), 2000
    )
    assert min(right for right, _ in accuracy.values()) > 0.995
    deceived = theory.label_accuracy(
        WORLDS["nuisance on half"], ("label-free EM", "all, plain"), np.random.default_rng(6), 5000
    )
    assert deceived["label-free EM"][0] == pytest.approx(0.585, abs=0.03)
    assert deceived["label-free EM"][0] < deceived["all, plain"][0] - 0.1


@pytest.fixture
def tool(monkeypatch):
    path = Path(__file__).parent.parent / "tools" / "verify_theory.py"
    spec = importlib.util.spec_from_file_location("verify_theory", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # Two worlds and two k, so that this takes seconds.
    kept = ("opposed 10", "saturating")
    monkeypatch.setattr(module, "KS", (1, 3))
    monkeypatch.setattr(module, "WORLD_FIGURES", {name: module.WORLD_FIGURES[name] for name in kept})
    return module


SMALL = ("verify_theory.py", "--pairs", "20000", "--draws", "50000", "--exact-draws", "1000")


def test_the_tool_compares_figures_and_says_where_they_differ(tool, monkeypatch, capsys):
    tool.WORLD_FIGURES["opposed 10"]["random 5"] += 0.03
    monkeypatch.setattr(sys, "argv", [*SMALL, "--json"])
    with pytest.raises(SystemExit, match=r"do not agree: opposed 10, random 5$"):
        tool.main()
    found = json.loads(capsys.readouterr().out)
    assert found["disagree"] == ["opposed 10, random 5"] and len(found["cells"]) == 2 * 8 + 2 * 5
    assert {(proof["noise"], proof["k"]) for proof in found["statement"] if proof["optimal"]} == {
        *(("Gaussian", k) for k in (1, 3)),
        ("Laplace", 1),
        ("uniform", 1),
    }
    text = tool.as_text(found)
    assert "Student t3, k = 1  fails: another set is better on " in text
    assert "20 of METHOD.md's 21 figures agree" in text


def test_the_tool_draws_and_says_what_it_needs(tool, monkeypatch, capsys, tmp_path):
    tool.WORLD_FIGURES.pop("opposed 10")
    monkeypatch.setattr(tool, "KS", (1,))
    monkeypatch.setattr(sys, "argv", [*SMALL, "--plot", str(tmp_path / "theory.png")])
    with monkeypatch.context() as missing:
        missing.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(SystemExit, match=r"pip install 'adaptrm\[plots\]'"):
            tool.main()
    pytest.importorskip("matplotlib", reason="pip install 'adaptrm[plots]'")
    tool.main()
    assert (tmp_path / "theory.png").read_bytes().startswith(b"\x89PNG")
