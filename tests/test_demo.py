"""The demo, as a newcomer runs it."""

import json

import pytest
from commands import adaptrm

from adaptrm.data.preferences import load_pairs
from adaptrm.reward_model import RewardModel


def figures_of(out, *options) -> dict:
    """What the demo says, once what it leaves is found to be a model like any other that gives its figure again."""
    figures = json.loads(adaptrm("demo", "--out", out, "--json", *options, long=True).stdout)
    assert figures["strategies"].keys() == {"max-discrepancy", "random", "all"}
    assert figures["verified_by"]["adaptrm"] <= 1e-5
    held_out = load_pairs(out / "held-out.jsonl")
    rewards = RewardModel.from_pretrained(out / "export").score_pairs(held_out)
    right = [(a > b) == (pair.preferred == "a") for (a, b), pair in zip(rewards, held_out, strict=True)]
    assert sum(right) / len(right) == figures["strategies"]["max-discrepancy"]["accuracy"]
    return figures


def test_the_whole_chain_runs(tmp_path):
    figures = figures_of(tmp_path / "demo", "--pairs", 96)
    assert all(0 < found["label_agreement"] < 1 for found in figures["strategies"].values())


@pytest.mark.slow
def test_its_figures_hold(tmp_path):
    figures = figures_of(tmp_path / "demo")
    # The world is learnable: a judge that learned nothing is at .5, and so are its labels.
    assert figures["judge_accuracy"] > 0.8
    strategies = figures["strategies"]
    for found in strategies.values():
        assert found["accuracy"] > 0.5
    assert strategies["max-discrepancy"]["label_agreement"] > strategies["random"]["label_agreement"]
