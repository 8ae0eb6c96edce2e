"""Labels that people look after: reviews, verdicts that come back, calibrated probabilities, abstention."""

import hashlib
import json
import sys

import numpy as np
import pytest
from commands import in_process
from refusals import refused

pytest.importorskip("sklearn", reason="pip install 'adaptrm[gold]'")

from sklearn.metrics import brier_score_loss, log_loss

from adaptrm.calibration import held_out, method_for
from adaptrm.data.gold import read_gold
from adaptrm.data.labels import read_labels
from adaptrm.data.scores import Scores, write_manifest, write_part
from adaptrm.label import LabelJob, label

RULES = ["kind", "safe", "harm"]
TEXTS = ["The response is kind.", "The response is safe.", "The response does harm."]
SIGNS, PAIRS = [1, 1, -1], 400


def write_lines(file, rows) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def lines(file) -> list[dict]:
    return [json.loads(line) for line in open(file, encoding="utf-8")]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A score folder whose labels are right with log-odds of 1.5 times the margin, and the truth: +1 or -1 a pair."""
    root, rng = tmp_path_factory.mktemp("world"), np.random.default_rng(0)
    a, b = (rng.uniform(-1, 1, (PAIRS, 3)).astype(np.float32) for _ in range(2))
    a[:2], b[:2] = 0.25, 0.25  # ties
    margin = (a - b).sum(axis=1)
    truth = np.where(rng.random(PAIRS) < 1 / (1 + np.exp(-1.5 * margin)), 1, -1)

    def write(name: str, swap: bool = False) -> LabelJob:
        people = [("a" if t * (-1) ** swap > 0 else "b") if i % 4 == 1 else None for i, t in enumerate(truth)]
        rows = [
            {"id": f"p{i}", "prompt": f"Question {i}", "preferred": people[i]}
            | dict(zip(("response_b", "response_a") if swap else ("response_a", "response_b"), "AB", strict=True))
            for i in range(PAIRS)
        ]
        pairs = write_lines(root / f"{name}.jsonl", rows)
        digest = hashlib.sha256((root / f"{name}.jsonl").read_bytes()).hexdigest()
        known = {"rule_texts": TEXTS, "rule_signs": SIGNS}
        manifest = {"rules": RULES, "pairs": pairs, "pairs_sha256": digest, "count": PAIRS, "parts": 2}
        write_manifest(root / name, manifest | known)
        one = np.ones((PAIRS // 2, 3), np.float32)
        for part in range(2):
            rows = slice(part * PAIRS // 2, (part + 1) * PAIRS // 2)
            sides = (b[rows], a[rows]) if swap else (a[rows], b[rows])
            ids = [f"p{i}" for i in range(rows.start, rows.stop)]
            write_part(root / name, part, Scores(ids, RULES, *sides, one, one, one, one, one))
        return LabelJob(str(root / name), str(root / f"{name}-labels.jsonl"), strategy="all")

    return write, truth, margin


def gold_of(truth, some, swap: bool = False) -> list[dict]:
    return [{"id": f"p{i}", "preferred": "a" if truth[i] * (-1) ** swap > 0 else "b"} for i in some]


def with_options(job: LabelJob, **options) -> LabelJob:
    return LabelJob(**(vars(job) | options))


def test_a_review_comes_back_as_gold(world, monkeypatch, capsys, tmp_path):
    write, truth, margin = world
    job = write("round")
    review, gold, out = (str(tmp_path / name) for name in ("review.jsonl", "gold.jsonl", "labels.jsonl"))
    write_lines(tmp_path / "some.jsonl", gold_of(truth, range(0, PAIRS, 2)))
    command = ("label", "--scores", job.scores, "--strategy", "all", "--out", out, "--json")
    asked = ("--review", review, "--gold", tmp_path / "some.jsonl", "--target-error", "0.15")
    code, printed, _ = in_process(monkeypatch, capsys, *command, *asked)
    first = json.loads(printed)
    rows = lines(review)
    assert code == 0 and first["review"]["file"] == review
    for reason in ("tie", "abstained", "disagrees"):
        assert first["review"][reason] == sum(row["reason"] == reason for row in rows) > 0, reason
    assert all(row["preferred"] is None and row["id"] not in {f"p{i}" for i in range(0, PAIRS, 2)} for row in rows)
    labelled = {one.id for one in read_labels(out)}
    for row in rows:  # what disagrees has a label, what is a tie or abstained from has none
        assert (row["id"] in labelled) == (row["reason"] == "disagrees")
        at = int(row["id"][1:])
        known = sorted((r["id"], r["text"], r["sign"]) for r in row["rules"])
        assert known == sorted(zip(RULES, TEXTS, SIGNS, strict=True))
        assert sum(r["score_a"] - r["score_b"] for r in row["rules"]) == pytest.approx(margin[at], abs=1e-4)
        assert row["label"] == (None if row["reason"] == "tie" else "a" if margin[at] > 0 else "b")
        if row["reason"] == "disagrees":
            assert row["preferred_before"] not in (None, row["label"])
        if row["reason"] == "abstained":
            assert 0.5 <= row["probability"] < first["abstention"]["probability"]
    assert [row["id"] for row in rows] == sorted((row["id"] for row in rows), key=lambda name: int(name[1:]))

    filled = [row | {"preferred": p} for row, p in zip(rows, [*"abababab", "tie"] * len(rows), strict=False)][:-1]
    write_lines(tmp_path / "gold.jsonl", [*filled, rows[-1]])
    code, printed, _ = in_process(monkeypatch, capsys, *command, "--gold", gold)
    second = json.loads(printed)
    expected = {row["id"]: {"a": 1, "b": -1, "tie": 0}[row["preferred"]] for row in filled}
    assert code == 0 and read_gold(gold) == expected
    said = {one.id: (1 if one.chosen == "A" else -1, one.probability) for one in read_labels(out)}
    for pair, preferred in expected.items():
        assert said.get(pair) == ((preferred, 1.0) if preferred else None)
    signs = np.sign(margin)
    overruled = sum(signs[int(pair[1:])] * preferred < 0 for pair, preferred in expected.items())
    ties = sum(preferred == 0 for preferred in expected.values())
    assert second["gold"] == {
        **dict.fromkeys(("verdicts", "of_these_pairs"), len(filled)),
        **{"ties": ties, "overruled": overruled},
    }
    assert second["labelled"] + second["ties"] + ties == PAIRS
    # Pairs that people were asked about because they had disagreed do not tell how often labels are right.
    used = [row for row in filled if row["reason"] == "abstained" and row["preferred"] != "tie"]
    assert second["probabilities"]["gold_pairs"] == len(used) < len(filled)


def test_the_summary_says_what_scikit_learn_says(world, tmp_path):
    write, truth, margin = world
    some = range(0, PAIRS, 2)
    gold = write_lines(tmp_path / "gold.jsonl", gold_of(truth, some))
    found = label(with_options(write("numbers"), gold=gold))["probabilities"]
    at = [i for i in some if margin[i] != 0]
    right = np.sign(margin[at]) == truth[at]
    probability = held_out(np.abs(margin[at]), right, method_for(len(at)))
    assert (found["method"], found["gold_pairs"]) == ("platt", len(at))
    assert found["right"] == pytest.approx(right.mean())
    assert found["brier"] == pytest.approx(brier_score_loss(right, probability), abs=1e-6)
    assert found["nll"] == pytest.approx(log_loss(right, probability), abs=1e-6)


@pytest.mark.parametrize("strategy", ["max-discrepancy", "random"])
def test_every_strategy_gets_probabilities_that_swapping_does_not_change(world, tmp_path, strategy):
    write, truth, _ = world
    options = {"strategy": strategy, "k": 2, "target_error": 0.25}
    found = []
    for swap in (False, True):
        gold = write_lines(tmp_path / f"gold{swap}.jsonl", gold_of(truth, range(0, PAIRS, 2), swap))
        job = with_options(write(f"swap{swap}", swap), gold=gold, **options)
        summary = label(job)
        found.append(([vars(one) for one in read_labels(job.out)], summary | {"labels": None}))
    assert found[0] == found[1]
    probabilities = {one["probability"] for one in found[0][0]}
    assert len(probabilities) > 50 and min(probabilities) >= 0.5
    assert 0 < found[0][1]["abstained"] < PAIRS / 2


def test_what_is_kept_is_as_right_as_promised(world, tmp_path):
    write, truth, margin = world
    gold = write_lines(tmp_path / "gold.jsonl", gold_of(truth, range(0, PAIRS, 2)))
    job = with_options(write("kept"), gold=gold, target_error=0.2)
    found = label(job)
    others = {i: i for i in range(1, PAIRS, 2)}
    kept = [one for one in read_labels(job.out) if int(one.id[1:]) in others]
    right = [truth[int(one.id[1:])] == (1 if one.chosen == "A" else -1) for one in kept]
    assert found["abstained"] == (PAIRS - 2) // 2 - len(kept) > 0
    assert np.mean(right) >= 0.8 > np.mean(np.sign(margin)[1::2] == truth[1::2])
    assert found["abstention"]["by"] == "gold" and found["abstention"]["error_at_most"] <= 0.2


def test_few_verdicts_calibrate_nothing_and_say_so(world, tmp_path, capsys):
    write, truth, _ = world
    gold = write_lines(tmp_path / "gold.jsonl", gold_of(truth, range(2, 12)))
    job = with_options(write("few"), gold=gold)
    found = label(job)
    assert "gold knows 10 of the labels, too few to calibrate by" in capsys.readouterr().err
    assert "probabilities" not in found and found["gold"]["of_these_pairs"] == 10
    assert {one.probability for one in read_labels(job.out)} == {1.0}
    draws = with_options(job, reliability=str(tmp_path / "r.svg"))
    pytest.importorskip("matplotlib", reason="pip install 'adaptrm[plots]'")
    assert "too few verdicts to draw" in refused(label, draws)


def test_wrong_options_are_one_line_and_write_nothing(world, tmp_path, monkeypatch):
    write, truth, _ = world
    out = tmp_path / "out"
    job = with_options(write("wrong"), out=str(out / "labels.jsonl"))
    gold = write_lines(tmp_path / "gold.jsonl", gold_of(truth, range(0, PAIRS, 2)))
    strange = write_lines(tmp_path / "strange.jsonl", [{"id": "q", "preferred": "a"}])
    for options, message in [
        ({"target_error": 0.1}, "strategy all has no probabilities of its own; give people's verdicts: --gold"),
        ({"target_error": 0.7, "gold": gold}, "--target-error 0.7: must be above 0 and below .5"),
        ({"target_error": 0.01, "gold": gold}, "takes 408 gold verdicts at least"),
        ({"gold": strange}, "none of the 1 verdicts of --gold is of a pair in it"),
        ({"gold": str(tmp_path / "none.jsonl")}, "none.jsonl: does not exist"),
        ({"review": str(out / "review.parquet")}, "a review is JSONL"),
        ({"review": str(out / "labels.jsonl")}, "labels.jsonl: is what is read; give another --out"),
        ({"gold": gold, "review": gold}, "gold.jsonl: is what is read"),
        ({"reliability": str(out / "r.svg")}, "--reliability draws what --gold shows"),
        ({"reliability": str(out / "r.pdf"), "gold": gold}, "give a name that ends in .svg or .png"),
    ]:
        assert message in refused(label, with_options(job, **options))
    with monkeypatch.context() as missing:
        missing.setitem(sys.modules, "matplotlib", None)
        draws = with_options(job, gold=gold, reliability=str(out / "r.svg"))
        assert "pip install 'adaptrm[plots]'" in refused(label, draws)
    with monkeypatch.context() as missing:
        missing.setitem(sys.modules, "sklearn.linear_model", None)
        assert "pip install 'adaptrm[gold]'" in refused(label, with_options(job, gold=gold))
    assert not out.exists() or not list(out.iterdir())


def test_people_see_a_table_and_a_picture(world, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="pip install 'adaptrm[plots]'")
    write, truth, _ = world
    job = write("seen")
    gold = write_lines(tmp_path / "gold.jsonl", gold_of(truth, range(0, PAIRS, 2)))
    for name, begin in (("r.svg", b"<?xml"), ("r.png", b"\x89PNG")):
        command = ("label", "--scores", job.scores, "--out", job.out, "--gold", gold, "--reliability", tmp_path / name)
        code, out, _ = in_process(monkeypatch, capsys, *command, "--strategy", "all")
        assert code == 0 and (tmp_path / name).read_bytes().startswith(begin)
    assert "brier" in out and "0.50 to 0.55" in out and "overruled" in out
    assert "calibrated" in (tmp_path / "r.svg").read_text() or "<svg" in (tmp_path / "r.svg").read_text()
