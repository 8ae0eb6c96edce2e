"""The tool that measures labels of real text: how it splits, draws and reckons; and, slow, that it runs to its end."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from commands import ENV

from adaptrm.data.preferences import Pair
from adaptrm.health.people import areas
from adaptrm.rules import RulePool
from adaptrm.rules.check import check_pool

TOOLS = Path(__file__).parent.parent / "tools"


@pytest.fixture
def tool(monkeypatch):
    """The two modules of the tool as one."""
    monkeypatch.syspath_prepend(str(TOOLS))
    return SimpleNamespace(
        **{k: v for name in ("real_text", "real_labels") for k, v in vars(importlib.import_module(name)).items()}
    )


def pair(prompt: int, response: str) -> Pair:
    return Pair(f"{prompt} {response}", ({"role": "user", "content": f"{prompt}?"},), response, "other", "a")


def test_all_replies_to_a_prompt_are_on_one_side_and_a_third_of_the_prompts_on_the_smaller(tool):
    sides = [{tool.in_third(pair(prompt, response)) for response in "xyz"} for prompt in range(300)]
    assert all(len(side) == 1 for side in sides)
    assert 70 < sum(side == {True} for side in sides) < 130


def test_each_prompt_has_its_turn_before_any_has_a_second(tool):
    pairs = [
        pair(prompt, response) for prompt, response in [(0, "a"), (0, "b"), (1, "a"), (0, "c"), (2, "a"), (1, "b")]
    ]
    assert [one.id for one in tool.turns(pairs)] == ["0 a", "1 a", "2 a", "0 b", "1 b", "0 c"]


def test_the_rarer_verdict_is_kept_and_as_many_of_the_commoner(tool):
    rows = [{"id": i, "labels": {"rare": i < 10, "even": i % 2 == 0, "never": False}} for i in range(100)]
    kept = tool.balanced(rows, fewest=8)
    counts = {
        rule: [sum(row["labels"].get(rule) is verdict for row in kept) for verdict in (True, False)]
        for rule in ("rare", "even", "never")
    }
    assert counts == {"rare": [10, 10], "even": [50, 50], "never": [0, 8]}
    assert all(rows[row["id"]]["labels"].items() >= row["labels"].items() for row in kept)
    measured = tool.with_both_verdicts(rows, 11)
    assert len(measured) == 100 and {tuple(row["labels"]) for row in measured} == {("even",)}


def test_errors_are_those_of_clusters(tool):
    x = np.random.default_rng(0).standard_normal(40)
    plain = x.std(ddof=1) / 40**0.5
    assert tool.clustered(x, np.arange(40)) == pytest.approx((x.mean(), plain))
    assert tool.clustered(np.repeat(x, 3), np.repeat(np.arange(40), 3)) == pytest.approx((x.mean(), plain))
    mean, error = tool.clustered(np.array([1.0, 1.0, 0.0, 0.0]), np.array([0, 0, 1, 1]))
    assert (mean, error) == pytest.approx((0.5, 0.5))
    drawn = [
        tool.clustered(np.repeat(y, 5), np.repeat(np.arange(30), 5)) for y in np.random.default_rng(1).random((400, 30))
    ]
    means, errors = np.transpose(drawn)
    assert errors.mean() == pytest.approx(means.std(), rel=0.1)


def test_the_error_of_a_mean_area_is_that_of_new_replies(tool):
    def drawn(seed):
        rng = np.random.default_rng(seed)
        truth = rng.random((30, 4)) < 0.4
        return truth + rng.standard_normal(truth.shape) + rng.standard_normal((30, 1)), np.where(truth, 1, -1)

    found = [tool.mean_area(*drawn(seed), np.arange(30)) for seed in range(40)]
    means, errors = ([one[name] for one in found] for name in ("mean_auc", "error"))
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.3)
    assert means[0] == pytest.approx(areas(*drawn(0))[0].mean())


def test_agreement_counts_a_tie_half_and_takes_the_mean_of_draws(tool, monkeypatch):
    monkeypatch.setattr(sys.modules["real_labels"], "DRAWS", 6)
    rng = np.random.default_rng(0)
    truth = rng.choice([-1, 1], 200)
    a = (0.2 * truth[:, None] + rng.uniform(-0.3, 0.3, (200, 8))).clip(-1, 1).astype(np.float32)
    scores = SimpleNamespace(a=a, b=-a, relevance=np.ones_like(a))
    found = tool.agreements(scores, truth)
    assert found.keys() == tool.STRATEGIES.keys()
    np.testing.assert_array_equal(found["all rules"], (1 + np.sign(a.sum(axis=1)) * truth) / 2)
    assert len(set(found["random 5"])) > 2 and 0.5 < found["random 5"].mean() < 1
    silent = SimpleNamespace(a=0 * a, b=0 * a, relevance=np.ones_like(a))
    assert isinstance(tool.agreements(silent, truth)["evidence, top 5"], str)
    assert (tool.agreements(silent, truth)["all rules"] == 0.5).all()


def test_the_propositions_pass_their_own_check(tool):
    found = check_pool(str(tool.POOL))
    assert (found["errors"], found["findings"], found["rules"]) == (0, [], 24)
    assert {rule.sign for rule in RulePool.load(tool.POOL)} == {1, -1}


@pytest.mark.slow
def test_it_runs_to_its_end_and_goes_on(smollm2, data, tmp_path):
    few = ("--pairs", "4", "--replies", "8", "--held-out", "8", "--fewest", "1", "--steps", "2", "--longest", "1500")
    command = [
        sys.executable,
        str(TOOLS / "real_labels.py"),
        "--smollm2",
        smollm2,
        "--data",
        data,
        "--out",
        tmp_path,
        *few,
    ]
    for _ in range(2):
        done = subprocess.run([*map(str, command)], env=ENV, capture_output=True, text=True, timeout=3600)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found == json.loads((tmp_path / "result.json").read_text())
    assert found["pairs"]["all"]["pairs"] == 16 and set(found["minutes"]) == {
        "prepare",
        "score, as it is",
        "teach",
        "score, taught",
    }
    assert set(found["reads"]) == {"longer", "refusal words", "TF-IDF", "as it is", "taught"}
    assert "| taught | max-discrepancy, top 5 |" in (tmp_path / "result.md").read_text()
    again = subprocess.run([*map(str, command), "--pairs", "6"], env=ENV, capture_output=True, text=True, timeout=600)
    assert again.returncode == 1 and "an earlier run had other options" in again.stderr
