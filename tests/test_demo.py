"""The demo, as a newcomer runs it."""

import json

import pytest
from commands import adaptrm

from adaptrm.data.preferences import load_pairs
from adaptrm.demo.figures import TRAINED
from adaptrm.reward_model import RewardModel

STRATEGIES = {"fixed", "random", "relevance", "max-discrepancy", "evidence", "all", "all-weighted", "adapter"}


def figures_of(out, *options, long=False) -> dict:
    """What the demo says, once what it leaves is found to be a model like any other that gives its figure again."""
    figures = json.loads(adaptrm("demo", "--out", out, "--json", *options, long=long).stdout)
    assert figures["worlds"].keys() == {"noisy", "sparse"}
    for world in figures["worlds"].values():
        assert world["strategies"].keys() == STRATEGIES
        assert {name for name, found in world["strategies"].items() if "accuracy" in found} == set(TRAINED)
    assert figures["verified_by"]["adaptrm"] <= 1e-5
    held_out = load_pairs(out / "seed-0" / "noisy" / "held-out.jsonl")
    rewards = RewardModel.from_pretrained(out / "export").score_pairs(held_out)
    right = [(a > b) == (pair.preferred == "a") for (a, b), pair in zip(rewards, held_out, strict=True)]
    assert sum(right) / len(right) == figures["worlds"]["noisy"]["strategies"]["evidence"]["accuracy"]
    return figures


def test_the_whole_chain_runs_and_each_stage_once(tmp_path):
    out = tmp_path / "demo"
    figures = figures_of(out, "--pairs", 24)
    for world in figures["worlds"].values():
        assert all(0 < found["label_agreement"] < 1 for found in world["strategies"].values())
    assert all((out / "pictures" / file).stat().st_size > 10_000 for file in figures["pictures"])
    made = {file: file.stat().st_mtime_ns for file in (out / "seed-0").rglob("*.safetensors")}
    again = adaptrm("demo", "--out", out, "--pairs", 24)
    assert {file: file.stat().st_mtime_ns for file in (out / "seed-0").rglob("*.safetensors")} == made
    assert "train: " not in again.stderr and "evidence" in again.stdout
    refused = adaptrm("demo", "--out", out, "--pairs", 60, check=False)
    assert refused.returncode == 2 and "holds a demo of 24 pairs" in refused.stderr


@pytest.mark.slow
def test_its_figures_hold(tmp_path):
    figures = figures_of(tmp_path / "demo", long=True)
    noisy, sparse = (figures["worlds"][name]["strategies"] for name in ("noisy", "sparse"))
    for world in figures["worlds"].values():
        # The worlds are learnable: a judge that learned nothing is at .5, and so are its labels.
        assert world["judge_accuracy"] > 0.9
    for measure in ("label_agreement", "accuracy"):
        assert noisy["evidence"][measure] > noisy["max-discrepancy"][measure] + 0.1
    assert sparse["max-discrepancy"]["label_agreement"] > sparse["all"]["label_agreement"]
    asked = sparse["adapter"]
    assert asked["token_ratio"] <= 0.25
    assert asked["label_agreement"] >= asked["label_agreement_of_all_scores"] - 0.02
