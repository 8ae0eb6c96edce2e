"""The demo, as a newcomer runs it."""

import json

from commands import adaptrm

from adaptrm.data.preferences import load_pairs
from adaptrm.reward_model import RewardModel


def test_the_demo_runs_and_its_figures_hold(tmp_path):
    out = tmp_path / "demo"
    done = adaptrm("demo", "--out", out, "--json", long=True)
    figures = json.loads(done.stdout)
    # The world is learnable: a judge that learned nothing is at .5, and so are its labels.
    assert figures["judge_accuracy"] > 0.8
    strategies = figures["strategies"]
    assert strategies.keys() == {"max-discrepancy", "random", "all"}
    for found in strategies.values():
        assert found["accuracy"] > 0.5
    assert strategies["max-discrepancy"]["label_agreement"] > strategies["random"]["label_agreement"]
    assert figures["verified_by"]["adaptrm"] <= 1e-5
    # What it leaves is a model like any other, and its figure can be computed again.
    held_out = load_pairs(out / "held-out.jsonl")
    rewards = RewardModel.from_pretrained(out / "export").score_pairs(held_out)
    right = [(a > b) == (pair.preferred == "a") for (a, b), pair in zip(rewards, held_out, strict=True)]
    assert sum(right) / len(right) == strategies["max-discrepancy"]["accuracy"]
