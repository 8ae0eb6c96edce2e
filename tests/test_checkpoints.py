"""Checkpoints: which are kept, which are whole, what is in them, and what a run may start from."""

import json
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import pair_rows, write_rows
from flax import nnx
from safetensors.numpy import load_file
from stores import new_folder
from tiny import tiny_causal_lm, tiny_pairs

from adaptrm import paths
from adaptrm.config import CheckpointOptions, TrainOptions, parse_options
from adaptrm.errors import InputError
from adaptrm.export import export_run
from adaptrm.reward_model import RewardModel
from adaptrm.train import remote
from adaptrm.train.checkpoint import Checkpoints, find, latest_step, stored_config
from adaptrm.train.run import train
from adaptrm.train.start import read_options
from adaptrm.train.state import TrainState


def state(step: int) -> TrainState:
    """A state whose arrays say which step they are of."""
    params = nnx.State({"w": nnx.Param(jnp.full(4, step, jnp.float32))})
    return TrainState(jnp.int32(step), params, (jnp.full(4, -step, jnp.float32),), jnp.int32(0))


def save(folder: str | Path, options: CheckpointOptions, steps: list[int], scores: dict[int, float] | None = None):
    """Save steps; of the scores of a run those are known that are not of later steps."""
    with Checkpoints(folder, options, "reward: {}\n") as checkpoints:
        for step in steps:
            checkpoints.save(step, state(step), {n: score for n, score in (scores or {}).items() if n <= step})


def kept(folder: str | Path) -> list[int]:
    if paths.is_local(folder):
        return sorted(int(name) for name in paths.names(folder) if name.isdecimal())
    return sorted(remote._steps(folder))


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "checkpoints") if request.param == "local" else new_folder("memory")


def test_the_newest_few_and_the_best_are_kept(folder):
    options = CheckpointOptions(keep=2, keep_best=True)
    scores = {1: 0.5, 2: 0.9, 3: 0.7, 4: 0.9, 5: 0.8}
    save(folder, options, [1, 2, 3, 4, 5, 6], scores)
    assert kept(folder) == [4, 5, 6]  # of two that are equally good the newer one
    scores |= {7: 0.1, 8: 0.95}
    save(folder, options, [7, 8], scores)  # a run that goes on still knows which was best
    assert kept(folder) == [7, 8]
    scores |= {9: 0.3, 10: 0.2}
    save(folder, options, [9, 10], scores)
    assert kept(folder) == [8, 9, 10]
    save(folder, CheckpointOptions(keep=1), [11], scores)
    assert kept(folder) == [11]


def test_the_best_is_kept_whose_score_is_known_only_after_it_was_saved(folder):
    options = CheckpointOptions(keep=1, keep_best=True)
    save(folder, options, [1, 2], {1: 0.5})  # stopped after step 2, before that was measured
    scores = {1: 0.5, 2: 0.9, 3: 0.7, 4: 0.6}
    save(folder, options, [3, 4], scores)
    assert kept(folder) == [2, 4]


def test_a_checkpoint_holds_the_config_of_its_run(folder):
    save(folder, CheckpointOptions(), [3])
    assert stored_config(f"{folder}/3") == "reward: {}\n"
    assert find(f"{folder}/3") == (folder, 3)
    for none in (folder, f"{folder}/4"):
        with pytest.raises(InputError, match="not a run folder, and not a checkpoint of adaptrm train"):
            stored_config(none)


def unfinished(folder: Path, step: int) -> None:
    (folder / f"{step}").mkdir()
    (folder / f"{step}" / "params").mkdir()


def not_committed(folder: Path, step: int) -> None:
    shutil.copytree(folder / "2", folder / f"{step}")
    file = folder / f"{step}" / "_CHECKPOINT_METADATA"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"commit_timestamp_nsecs": None}))


def cut_off(folder: Path, step: int) -> None:
    shutil.copytree(folder / "2", folder / f"{step}")
    shutil.rmtree(folder / f"{step}" / "optimizer")


def emptied(folder: Path, step: int) -> None:
    """What is left after a loss of power: names of files without their content."""
    shutil.copytree(folder / "2", folder / f"{step}")
    for file in (folder / f"{step}").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")


def in_progress(folder: Path, step: int) -> None:
    shutil.copytree(folder / "2", folder / f"{step}.orbax-checkpoint-tmp")


@pytest.mark.parametrize("torn", [unfinished, not_committed, cut_off, emptied, in_progress])
def test_what_is_not_whole_is_never_picked_up(tmp_path, torn, capsys):
    folder, options = tmp_path / "checkpoints", CheckpointOptions(keep=2)
    save(folder, options, [1, 2])
    torn(folder, 3)
    assert latest_step(folder) == 2
    with Checkpoints(folder) as reader:  # looks, and touches nothing
        params = reader.restore_params(state(0).params)
    assert params["w"].get_value()[0] == 2
    left = {path.name for path in folder.iterdir()} - {"1", "2"}
    assert left == {"3.orbax-checkpoint-tmp" if torn is in_progress else "3"}
    with Checkpoints(folder, options) as checkpoints:
        assert checkpoints.step == 2
        restored = checkpoints.restore(state(0))
        assert (int(restored.step), restored.opt_state[0][0]) == (2, -2)
        checkpoints.save(3, state(3), {})  # its place is free again
        checkpoints.save(4, state(4), {})
    said = f"{folder}/3: is no whole checkpoint; not used, now 3.torn" in capsys.readouterr().err
    assert said == (torn is not in_progress)
    assert {path.name for path in folder.iterdir()} == {"3", "4"} | ({"3.torn"} if said else set())
    assert latest_step(folder) == 4


def test_a_deletion_that_was_cut_off_is_finished(tmp_path):
    options = CheckpointOptions(keep=2)
    save(tmp_path, options, [1, 2])
    (tmp_path / "1" / "_CHECKPOINT_METADATA").unlink()
    save(tmp_path, options, [3])
    assert {path.name for path in tmp_path.iterdir()} == {"2", "3"}


def test_a_broken_checkpoint_is_one_line(tmp_path):
    save(tmp_path, CheckpointOptions(), [1, 2])
    for file in (tmp_path / "2" / "params").rglob("*"):
        if file.is_file() and file.name != "_METADATA":
            file.write_bytes(b"\0" * file.stat().st_size)
    message = rf"^{tmp_path}/2: broken, or of another model: .*; without it the one before is used"
    with pytest.raises(InputError, match=message), Checkpoints(tmp_path) as reader:
        reader.restore_params(state(0).params)


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path):
    """No file may have more than 100 bytes: what a full disk looks like to who writes."""
    folder, options = tmp_path / "checkpoints", CheckpointOptions(keep=1)
    save(folder, options, [1])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    message = rf"^{folder}: a checkpoint cannot be written: File too large; free space or change --out$"
    with pytest.raises(InputError, match=message), Checkpoints(folder, options) as checkpoints:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        try:
            checkpoints.save(2, state(2), {})
            checkpoints.save(3, state(3), {})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with Checkpoints(folder, options) as checkpoints:
        assert checkpoints.step == 1
        assert int(checkpoints.restore(state(0)).step) == 1
        checkpoints.save(2, state(2), {})
    assert kept(folder) == [2]


# --- what a run may start from ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A tiny model, pairs, and a run of four steps with a checkpoint a step."""
    out = tmp_path_factory.mktemp("made")
    tiny_causal_lm(out / "lm")
    write_rows(out / "pairs.jsonl", pair_rows([replace(pair, preferred="a") for pair in tiny_pairs(8)]))
    train("reward", options(out, pretrained=str(out / "lm")), out / "first")
    return out


def options(made: Path, learning_rate: float = 1e-2, **model) -> TrainOptions:
    section = {
        "model": {"remat": "none", **model},
        "data": {"pairs": str(made / "pairs.jsonl"), "labels": "human", "row_length": 256, "rows_per_step": 4},
        "optimizer": {"learning_rate": learning_rate, "schedule": "constant", "warmup_steps": 0},
        "mesh": {"fsdp": 4, "tensor": 2},
        "checkpoint": {"every_steps": 1, "keep": 3},
        "epochs": 2,
        "max_steps": 3,
    }
    return parse_options(section, "test")


def weights(run: Path) -> dict[str, np.ndarray]:
    return load_file(run / "export" / "model.safetensors")


def test_a_named_checkpoint_comes_before_the_pretrained_model(made, tmp_path, monkeypatch):
    """With a learning rate of 0 a run exports what it started from."""
    monkeypatch.chdir(made)
    tiny_causal_lm(tmp_path / "other", seed=1)
    named = options(made, 0.0, pretrained=str(tmp_path / "other"), checkpoint="first")
    train("reward", named, tmp_path / "newest")
    want, got = weights(made / "first"), weights(tmp_path / "newest")
    assert want.keys() == got.keys() and all((want[name] == got[name]).all() for name in want)
    assert read_options(tmp_path / "newest")[1].model.pretrained == str(made / "lm")
    # One checkpoint, moved away from its run.
    shutil.copytree(made / "first" / "checkpoints" / "1", tmp_path / "7")
    train("reward", options(made, 0.0, checkpoint=str(tmp_path / "7")), tmp_path / "earlier")
    assert any((want[name] != tensor).any() for name, tensor in weights(tmp_path / "earlier").items())
    pairs = tiny_pairs(3)
    one = RewardModel.from_pretrained(tmp_path / "7").score_pairs(pairs)
    np.testing.assert_array_equal(RewardModel.from_pretrained(tmp_path / "earlier").score_pairs(pairs), one)


def test_a_run_s_own_checkpoint_comes_before_a_named_one(made, tmp_path):
    run, first = tmp_path / "run", tmp_path / "first"
    shutil.copytree(made / "first", first)
    some = options(made, checkpoint=str(first))
    train("reward", replace(some, max_steps=2), run)
    # What it started from is written down, and stays though the run that it names is another one by now.
    assert read_options(run)[1].model.checkpoint == str(first / "checkpoints" / "2")
    shutil.rmtree(first / "checkpoints" / "2")
    with pytest.raises(InputError, match="another max_steps"):
        train("reward", some, run)
    export_run(run / "checkpoints" / "2", tmp_path / "own" / "export")
    shutil.rmtree(run / "export")
    train("reward", replace(some, max_steps=2), run)
    own = weights(tmp_path / "own")
    assert all((own[name] == tensor).all() for name, tensor in weights(run).items())
    assert any((own[name] != tensor).any() for name, tensor in weights(made / "first").items())


def test_a_named_checkpoint_of_another_kind_or_place_is_an_error(made, tmp_path):
    with pytest.raises(InputError, match=r"first: is of train reward, not of train judge; give another model"):
        train("judge", options(made, checkpoint=str(made / "first")), tmp_path / "run")
    with pytest.raises(InputError, match=rf"^{made}/lm: no config.yaml; this is not a run folder of adaptrm train"):
        train("reward", options(made, checkpoint=str(made / "lm")), tmp_path / "run")
    assert jax.process_count() == 1 and not (tmp_path / "run" / "config.yaml").exists()
