"""Held-out evaluation inside a run: what it says, that it goes on after a kill, and stopping early."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import CLOCKED, pair_rows, write_rows
from tiny import tiny_causal_lm, tiny_pairs

from adaptrm.config import EvaluationOptions, parse_options
from adaptrm.errors import InputError, Stopped
from adaptrm.reward_model import RewardModel
from adaptrm.train import evaluation
from adaptrm.train.evaluation import Evaluations, held_out_data
from adaptrm.train.run import train


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A tiny model, pairs to train on and others to evaluate on; the longer response is preferred."""
    out = tmp_path_factory.mktemp("evaluation")
    tiny_causal_lm(out / "lm")
    pairs = [replace(p, preferred="a" if len(p.response_a) > len(p.response_b) else "b") for p in tiny_pairs(24)]
    write_rows(out / "train.jsonl", pair_rows(pairs[:16]))
    write_rows(out / "held.jsonl", pair_rows(pairs[16:]))
    return out


def options(made: Path, mesh: dict | None = None, **evaluation):
    section = {
        "model": {"pretrained": str(made / "lm"), "remat": "none"},
        "data": {"pairs": str(made / "train.jsonl"), "labels": "human", "row_length": 512, "rows_per_step": 4},
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 0},
        "mesh": mesh or {"fsdp": 4, "tensor": 2},
        "checkpoint": {"every_steps": 2},
        "evaluation": {"pairs": str(made / "held.jsonl"), "every_steps": 2} | evaluation,
        "max_steps": 4,
        "epochs": 9,
    }
    return parse_options(section, "test")


def lines(run: Path, held_out: bool) -> list[dict]:
    every = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in every if ("evaluation/loss" in line) == held_out]


def numbers(line: dict) -> dict:
    """A line without what depends on the clock."""
    return {k: v for k, v in line.items() if k not in CLOCKED and not k.endswith("per_second")}


@pytest.fixture(scope="module")
def run(made) -> Path:
    train("reward", options(made), made / "run")
    return made / "run"


def test_what_it_says_is_what_the_model_does(made, run):
    told = lines(run, held_out=True)
    assert [line["step"] for line in told] == [0, 2, 4]
    assert told[0].keys() == {"step"} | {f"evaluation/{name}" for name in ("loss", "accuracy", "margin", "weight")}
    pairs = [p for p in tiny_pairs(24)][16:]
    rewards = RewardModel.from_pretrained(run).score_pairs(pairs)
    longer = [len(p.response_a) > len(p.response_b) for p in pairs]
    right = [(a > b) == first and a != b for (a, b), first in zip(rewards, longer, strict=True)]
    assert told[-1]["evaluation/accuracy"] == pytest.approx(sum(right) / len(pairs))
    assert told[-1]["evaluation/weight"] == len(pairs)
    assert told[-1]["evaluation/loss"] < told[0]["evaluation/loss"]


@pytest.mark.slow
def test_training_is_the_same_without_and_evaluation_on_any_mesh(made, run, tmp_path):
    train("reward", options(made, {"data": 2, "fsdp": 1, "tensor": 4}), tmp_path / "other")
    for one, other in zip(lines(run, True), lines(tmp_path / "other", True), strict=True):
        assert other == pytest.approx(one, abs=1e-5)
    without = replace(options(made), evaluation=EvaluationOptions())
    train("reward", without, tmp_path / "without")
    told = [[numbers(line) for line in lines(folder, False)] for folder in (run, tmp_path / "without")]
    assert told[0] == told[1]


def test_stopping_early_goes_on_as_it_was_after_a_break(made, tmp_path):
    """With a rate of 0 nothing gets better: two evaluations after the first are enough, in one go or in two."""
    still = options(made, stop_after=2)
    still = replace(still, optimizer=replace(still.optimizer, learning_rate=0.0), max_steps=40)
    result = train("reward", still, tmp_path / "run")
    assert result["steps"] == 4
    whole = (tmp_path / "run" / "metrics.jsonl").read_text()
    # Killed after the checkpoint of step 2, in the middle of the evaluation line of step 4.
    before = [line for line in whole.splitlines(keepends=True) if json.loads(line)["step"] <= 2]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(before) + '{"step": 4, "evalua')
    for name in ("checkpoints/4", "export"):
        _remove(tmp_path / "run" / name)
    assert train("reward", still, tmp_path / "run")["steps"] == 4
    assert [x["step"] for x in lines(tmp_path / "run", True)] == [0, 2, 4]
    # What has ended by itself stays ended.
    assert train("reward", still, tmp_path / "run")["steps"] == 4
    assert [x["step"] for x in lines(tmp_path / "run", True)] == [0, 2, 4]


def _remove(path: Path) -> None:
    import shutil

    shutil.rmtree(path)


@pytest.mark.parametrize(
    ("accuracies", "enough"),
    [([], False), ([0.5], False), ([0.5, 0.5], False), ([0.5, 0.4, 0.5], True), ([0.5, 0.4, 0.6], False)],
)
def test_enough_is_so_many_without_a_better_one(accuracies, enough):
    held_out = SimpleNamespace(options=EvaluationOptions(pairs="x", stop_after=2))
    told = [{"step": 2 * at, "evaluation/accuracy": value} for at, value in enumerate(accuracies)]
    told.insert(1, {"step": 1, "loss": 0.7})
    assert Evaluations(held_out, told, 99, None, lambda: False).enough == enough


@pytest.mark.parametrize(
    ("evaluation", "checkpoint", "message"),
    [
        ({"pairs": None, "stop_after": 2}, {}, "evaluation.stop_after needs held-out examples: give evaluation.pairs"),
        ({"pairs": None}, {"keep_best": True}, "checkpoint.keep_best needs held-out examples: give evaluation.pairs"),
        (
            {},
            {"keep_best": True, "every_steps": 3},
            "every_steps is 3, no multiple of evaluation.every_steps",
        ),
    ],
)
def test_what_needs_an_evaluation_says_so(made, evaluation, checkpoint, message):
    asked = options(made, **evaluation)
    with pytest.raises(InputError, match=message):
        held_out_data("reward", replace(asked, checkpoint=replace(asked.checkpoint, **checkpoint)))


def test_a_judge_is_evaluated_on_rule_labels(made):
    with pytest.raises(InputError, match=r"a judge is evaluated on rule labels: give evaluation.labels, and no"):
        held_out_data("judge", options(made))
    labels = replace(options(made, pairs=None), evaluation=EvaluationOptions(labels="rule-labels.jsonl"))
    assert held_out_data("judge", labels).labels == "rule-labels.jsonl"


def test_the_best_checkpoint_is_kept(made, tmp_path):
    best = options(made)
    best = replace(best, checkpoint=replace(best.checkpoint, keep=1, keep_best=True), max_steps=8)
    train("reward", best, tmp_path / "run")
    told = {line["step"]: line["evaluation/accuracy"] for line in lines(tmp_path / "run", True) if line["step"]}
    first_choice = max(told, key=lambda step: (told[step], step))
    kept = {int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir()}
    assert kept == {first_choice, 8}


@pytest.mark.parametrize("number", [1, 2])
def test_a_stop_breaks_an_evaluation_off_and_it_is_made_again(made, run, tmp_path, monkeypatch, number):
    """SIGTERM in the middle of an evaluation: of the first, before any step, and of that after step 2."""
    real, calls = evaluation.device_batches, []

    def terminated(*given):
        calls.append(given)
        for batch in real(*given):
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(evaluation, "device_batches", terminated)
    with pytest.raises(Stopped) as stopped:
        train("reward", options(made), tmp_path / "run")
    if number == 1:
        assert str(stopped.value).startswith("stopped by SIGTERM; what was saved is kept; start")
        assert not list((tmp_path / "run" / "checkpoints").iterdir())
    else:
        assert str(stopped.value).startswith("stopped by SIGTERM after step 2 of 4, saved; start")
        assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["2"]
    assert [line["step"] for line in lines(tmp_path / "run", True)] == [0][: number - 1]
    train("reward", options(made), tmp_path / "run")
    for held_out in (True, False):
        told = [[numbers(line) for line in lines(folder, held_out)] for folder in (tmp_path / "run", run)]
        assert told[0] == told[1]
