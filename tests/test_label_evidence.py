"""``label --strategy evidence``: weights fitted, saved, applied, by gold; and what it refuses."""

import json

import numpy as np
import pytest
from commands import in_process, write_rows
from evidence_worlds import PAIRS, RULES, gold_of, scores_of, some_world, write_folder

from adaptrm import EvidenceWeights, fit_evidence, select
from adaptrm.data.labels import read_labels
from adaptrm.data.preferences import hash_id

K = 3


@pytest.fixture
def world(tmp_path):
    preference, longer, d = some_world(nuisance=0.2)
    scores = scores_of(d)
    return scores, preference, longer, write_folder(tmp_path / "scores", scores, 250, longer, preference)


@pytest.fixture
def label(monkeypatch, capsys, tmp_path, world):
    """Run ``adaptrm label``; gives its exit code, what it found or printed, and what it said."""

    def run(
        *options, strategy: str = "evidence", out: str = "labels.jsonl", as_json: bool = True, scores: str = world[3]
    ):
        command = ("label", "--scores", scores, "--k", K, "--strategy", strategy, "--out", tmp_path / out, *options)
        code, printed, said = in_process(monkeypatch, capsys, *command, *(["--json"] if as_json else []))
        return code, json.loads(printed) if as_json and not code else printed, said

    return run


def test_labels_are_those_of_the_fit(label, world, tmp_path):
    scores, _, longer, _ = world
    code, found, said = label("--save-weights", tmp_path / "weights.json")
    assert code == 0 and said == ""
    weights = fit_evidence(scores, covariates={"length": longer}, project=False)
    chosen = select(scores.a, scores.b, scores.relevance, "evidence", K, weights=weights)
    labels = list(read_labels(tmp_path / "labels.jsonl"))
    assert [one.chosen[0] for one in labels] == ["b" if sign < 0 else "a" for sign in chosen.preferred]
    margins, probabilities = (
        np.array([getattr(one, name) for one in labels]) for name in ("rule_margin", "probability")
    )
    np.testing.assert_allclose(margins, np.abs(chosen.margin), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(probabilities, 1 / (1 + np.exp(-margins)), rtol=1e-5)
    assert found["strategy"] == "evidence" and found["agreement"] > 0.8
    report = found["evidence"]
    assert report["correlations"].keys() == {"length"} and report["projected"] == []
    assert sum(rule["decides"] for rule in report["by_rule"].values()) == pytest.approx(K)

    # The file gives the same labels, and says what it was fitted to.
    saved = (tmp_path / "labels.jsonl").read_text()
    code, again, _ = label("--weights", tmp_path / "weights.json")
    assert code == 0 and (tmp_path / "labels.jsonl").read_text() == saved
    assert again["evidence"] == report

    code, printed, _ = label("--weights", tmp_path / "weights.json", as_json=False)
    assert code == 0 and "redundancy" in printed and "kurtosis of the vote" in printed and "{" not in printed
    for id, rule in report["by_rule"].items():
        (line,) = (line.split() for line in printed.splitlines() if line.startswith(f"{id} "))
        assert line[1:3] == [f"{rule['reliability']:.2f}", f"{rule['weight']:.2f}"]


def test_gold_and_length_reach_the_fit(label, world, tmp_path):
    scores, preference, longer, _ = world
    gold = gold_of(scores, preference)
    rows = [{"id": id, "preferred": "a" if sign > 0 else "b"} for id, sign in gold.items()]
    file = write_rows(tmp_path / "gold.jsonl", rows)
    code, found, _ = label("--gold", file, "--project-length", "--save-weights", tmp_path / "weights.json")
    half = {id: sign for id, sign in gold.items() if hash_id(id) % 2}  # the others calibrate
    assert code == 0 and 30 < found["evidence"]["gold"]["verdicts"] == len(half) < 70
    assert found["probabilities"]["gold_pairs"] == len(gold) - len(half)
    assert found["evidence"]["projected"] == ["length"]
    expected = fit_evidence(scores, half, {"length": longer})
    np.testing.assert_allclose(EvidenceWeights.load(tmp_path / "weights.json").a, expected.a, rtol=1e-4, atol=1e-6)


def test_without_gold_it_abstains_by_what_it_believes_and_says_so(label, tmp_path):
    code, found, said = label("--target-error", "0.01", "--review", tmp_path / "review.jsonl")
    assert code == 0 and "abstains by what strategy evidence believes of itself; --gold would check it" in said
    doubt = [1 - one.probability for one in read_labels(tmp_path / "labels.jsonl")]
    asked = [json.loads(line) for line in (tmp_path / "review.jsonl").read_text().splitlines()]
    left = [1 - row["probability"] for row in asked if row["reason"] == "abstained"]
    assert len(left) == found["abstained"] > 0 and min(left) >= max(doubt)
    assert np.mean(doubt) <= 0.01 < np.mean([*doubt, *left])
    assert found["abstention"]["by"] == "the model's own probabilities"


def test_scores_that_support_nothing_fall_back_only_if_told(label, tmp_path):
    noise = scores_of(np.random.default_rng(0).standard_normal((PAIRS, RULES)))
    folder = write_folder(tmp_path / "noise", noise, 600)
    code, _, said = label(scores=folder)
    assert code == 2 and said.startswith(f"adaptrm: {folder}: the rules have nothing in common")
    assert not (tmp_path / "labels.jsonl").exists()
    code, found, said = label("--fall-back", scores=folder)
    assert code == 0 and said.rstrip().endswith("; labelled by max-discrepancy, as --fall-back says")
    assert found["strategy"] == "max-discrepancy" and "evidence" not in found
    fallen = (tmp_path / "labels.jsonl").read_text()
    assert label(strategy="max-discrepancy", scores=folder)[0] == 0
    assert (tmp_path / "labels.jsonl").read_text() == fallen


def test_warnings_are_said(label, tmp_path):
    rng = np.random.default_rng(0)
    d = 0.4 * rng.choice([-1, 1], (3000, 1)) + rng.standard_normal((3000, 1)) + rng.standard_normal((3000, RULES))
    _, found, said = label(scores=write_folder(tmp_path / "nuisance", scores_of(d), 3000))
    assert "the hidden preference cannot be told from a nuisance" in said
    assert found["evidence"]["warnings"] and all(warning in said for warning in found["evidence"]["warnings"])


@pytest.mark.parametrize(
    ("options", "strategy", "message"),
    [
        (("--weights", "w.json"), "all", "--weights goes with --strategy evidence; the strategy is all"),
        (("--fall-back",), "max-discrepancy", "--fall-back goes with --strategy evidence"),
        (("--weights", "w.json", "--project-length"), "evidence", "--project-length is for weights that are fitted"),
        (("--weights", "{0}/none.json"), "evidence", "{0}/none.json: does not exist"),
        (("--weights", "{0}/other.json"), "evidence", "{0}/other.json: of other rules than "),
        (("--gold", "{0}/none.jsonl"), "evidence", "{0}/none.jsonl: does not exist"),
    ],
)
def test_what_does_not_go_together_is_refused(label, tmp_path, options, strategy, message):
    one = np.ones(1, np.float32)
    EvidenceWeights(one, one[None], ("another",)).save(tmp_path / "other.json")
    code, _, said = label(*(option.format(tmp_path) for option in options), strategy=strategy)
    assert code == 2 and said.startswith(f"adaptrm: {message.format(tmp_path)}") and len(said.splitlines()) == 1
