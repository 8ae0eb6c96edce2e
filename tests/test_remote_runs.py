"""From pairs to an exported model in stores, with a kill in the middle."""

import json
import os
from dataclasses import replace
from pathlib import Path

import commands
import jax
import numpy as np
import pytest
import yaml
from commands import kill_when, pair_rows, write_rows
from stores import new_folder, upload
from tiny import tiny_causal_lm, tiny_pairs, tiny_pool

from adaptrm import cli, lock, paths
from adaptrm.config import CheckpointOptions, load_options
from adaptrm.errors import InputError
from adaptrm.export import export_run
from adaptrm.reward_model import RewardModel
from adaptrm.train import remote
from adaptrm.train.run import train


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A tiny model, a pool, pairs with preferences, and a config whose steps are few."""
    out = tmp_path_factory.mktemp("made")
    tiny_causal_lm(out / "lm")
    (out / "pool.yaml").write_text(tiny_pool(4).to_yaml())
    write_rows(out / "pairs.jsonl", pair_rows([replace(pair, preferred="a") for pair in tiny_pairs(12)]))
    section = {
        "model": {"remat": "none"},
        "data": {"row_length": 512, "rows_per_step": 4},
        "mesh": {"fsdp": 4, "tensor": 2},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0},
        "checkpoint": {"every_steps": 2, "keep": 2},
        "max_steps": 8,
        "epochs": 9,
    }
    (out / "config.yaml").write_text(yaml.safe_dump({"reward": section}))
    return out


def adaptrm(*arguments: str) -> None:
    """A command in this process."""
    cli.app(list(arguments), standalone_mode=False)


def test_only_whole_checkpoints_count(store, tmp_path):
    def checkpoint(step: int) -> None:
        (tmp_path / str(step) / "params").mkdir(parents=True)
        (tmp_path / str(step) / "params" / "w").write_bytes(bytes([step]))
        (tmp_path / str(step) / "optimizer").mkdir()
        (tmp_path / str(step) / "optimizer" / "m").write_bytes(b"m")

    assert remote.latest(store) is None
    for step in (2, 4, 6):
        checkpoint(step)
        # What a killed process left of this checkpoint, of a later one, and things that are no checkpoint.
        for name in (f"{step}/params/old", "8/params/w", "notes.txt"):
            paths.write_bytes(paths.join(store, name), b"half")
        assert remote.latest(store) == (step - 2 or None)
        remote.send(tmp_path, store, step, CheckpointOptions(keep=2), {})
        assert remote.latest(store) == step
    names = sorted(paths.files(store, deep=True))
    each = ("commit_success.txt", "optimizer/m", "params/w")
    assert names == [f"{step}/{name}" for step in (4, 6) for name in each] + ["notes.txt"]
    remote.bring(store, 6, tmp_path / "parameters", training=False)
    remote.bring(store, 6, tmp_path / "all", training=True)
    assert (tmp_path / "parameters" / "6" / "params" / "w").read_bytes() == b"\6"
    assert [p.name for p in (tmp_path / "parameters" / "6").glob("opt*")] == []
    assert (tmp_path / "all" / "6" / "optimizer" / "m").read_bytes() == b"m"
    paths.write_bytes(paths.join(store, "6/params/../../../evil"), b"x")
    with pytest.raises(InputError, match=r"holds a file with the unsafe name '6/params/../../../evil'; delete it"):
        remote.latest(store)


def labelled(store: str) -> tuple[str, ...]:
    """Score and label the pairs of a store; gives the command that trains on them."""
    pairs, scores, labels = (paths.join(store, name) for name in ("pairs.jsonl", "scores", "labels.parquet"))
    adaptrm("score", "--pairs", pairs, "--judge", f"{store}/lm", "--rules", f"{store}/pool.yaml", "--out", scores)
    adaptrm("label", "--scores", scores, "--out", labels, "--k", "2")
    run = f"{store}/run"
    return ("train", "reward", f"{store}/config.yaml", "--data", pairs, "--labels", labels, "--out", run, "--model")


def used(store: str, capsys) -> None:
    """Evaluate and export a finished run."""
    adaptrm("evaluate", f"{store}/run", "--data", f"{store}/pairs.jsonl", "--out", f"{store}/results.json")
    assert json.loads(paths.read_bytes(f"{store}/results.json"))["n"] == 12
    capsys.readouterr()
    adaptrm("export", f"{store}/run", f"{store}/out", "--verify", "--json")
    assert json.loads(capsys.readouterr().out)["verified_by"]["adaptrm"] <= 1e-5


def losses(run: str) -> list[dict]:
    lines = map(json.loads, paths.read_bytes(f"{run}/metrics.jsonl").splitlines())
    return [{k: v for k, v in line.items() if not k.endswith("per_second")} for line in lines]


@pytest.fixture(scope="module")
def uninterrupted(made, cache) -> str:
    """A store in memory with a run that nothing interrupted; its model was given as a path of another folder."""
    store = upload(made, new_folder("memory"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        adaptrm(*labelled(store), "lm")
    return store


def test_the_whole_chain_in_memory(uninterrupted, made, monkeypatch, capsys):
    store, run = uninterrupted, f"{uninterrupted}/run"
    before = losses(run)
    assert [line["step"] for line in before] == list(range(1, 9))
    told = ["config.yaml", "examples.json", "examples.sha256"]
    assert paths.names(run) == ["checkpoints", *told, "export", "metrics.jsonl"]
    assert sorted(remote._steps(f"{run}/checkpoints")) == [6, 8]
    used(store, capsys)
    # A finished run started again changes nothing; its model is the same one, seen from elsewhere.
    monkeypatch.chdir(made / "lm")
    options = {"data.pairs": f"{store}/pairs.jsonl", "data.labels": f"{store}/labels.parquet"}
    train("reward", load_options(f"{store}/config.yaml", "reward", options | {"model.pretrained": "../lm"}), run)
    assert losses(run) == before
    # An export goes over an earlier model of ours, and not over something else.
    assert export_run(run, f"{store}/out") == {}
    with pytest.raises(InputError, match="holds something that adaptrm did not write"):
        export_run(run, f"{store}/lm")
    with pytest.raises(InputError, match="is not empty and not a model folder"):
        export_run(run, f"{store}/scores")


@pytest.mark.slow
def test_the_whole_chain_on_s3_with_a_kill_in_the_middle(uninterrupted, made, s3, cache, monkeypatch, capsys):
    """Killed and started again, the run has the losses and weights of the one in memory, bit for bit."""
    store = upload(made, new_folder("s3"))
    run = f"{store}/run"
    command = (*labelled(store), f"{store}/lm")
    monkeypatch.setattr(commands, "ENV", dict(os.environ))  # it computes as this process does
    monkeypatch.setattr(commands, "QUICK", {})
    kill_when(lambda: remote.latest(f"{run}/checkpoints") is not None, *command)
    assert 0 < remote.latest(f"{run}/checkpoints") < 8
    assert ".lock" in paths.names(run) and "export" not in paths.names(run)
    # What has not ended gives its latest checkpoint.
    assert np.isfinite(RewardModel.from_pretrained(run).score_pairs(tiny_pairs(2))).all()
    monkeypatch.setattr(lock, "LEASE", 2.0)
    adaptrm(*command)
    assert ".lock" not in paths.names(run)
    assert sorted(remote._steps(f"{run}/checkpoints")) == [6, 8]
    assert losses(run) == losses(f"{uninterrupted}/run")
    weights = "run/export/model.safetensors"
    assert paths.read_bytes(f"{store}/{weights}") == paths.read_bytes(f"{uninterrupted}/{weights}")
    used(store, capsys)


def test_several_processes_need_a_folder_that_they_share(made, monkeypatch):
    options = load_options(made / "config.yaml", "reward", {"model.pretrained": str(made / "lm")})
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(InputError, match="memory://run: several processes write one run together; give a folder"):
        train("reward", options, "memory://run")
