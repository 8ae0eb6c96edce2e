"""Training: it learns, resumes bit for bit, and says the same on any mesh."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from commands import adaptrm, kill_when, losses, pair_rows, write_rows
from flax import nnx
from tiny import tiny_causal_lm, tiny_pairs, tiny_pool

from adaptrm.config import LossOptions, OptimizerOptions, parse_options
from adaptrm.data.chat import ChatTokenizer
from adaptrm.data.plan import Plan, PlanOptions
from adaptrm.errors import InputError
from adaptrm.hf import load_weights, open_folder
from adaptrm.lock import hold
from adaptrm.models import SequenceClassifier
from adaptrm.parallel import make_mesh
from adaptrm.reward_model import RewardModel
from adaptrm.train.examples import reward_examples
from adaptrm.train.feed import device_batches
from adaptrm.train.optimizer import make_optimizer
from adaptrm.train.reports import TrainingFailed
from adaptrm.train.run import train
from adaptrm.train.state import init_state
from adaptrm.train.step import make_step

LAUNCHER = Path(__file__).parent.parent / "launch" / "local.sh"
ROW = 512


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny language model, pairs whose longer response is preferred, and a config."""
    out = tmp_path_factory.mktemp("train")
    tiny_causal_lm(out / "lm")
    pairs = [replace(p, preferred="a" if len(p.response_a) > len(p.response_b) else "b") for p in tiny_pairs(24)]
    write_rows(out / "pairs.jsonl", pair_rows(pairs))
    section = {
        "model": {"pretrained": str(out / "lm"), "remat": "none"},
        "data": {"pairs": str(out / "pairs.jsonl"), "labels": "human", "row_length": ROW, "rows_per_step": 4},
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 2},
        "checkpoint": {"every_steps": 2, "keep": 2},
        "epochs": 3,
    }
    (out / "config.yaml").write_text(yaml.safe_dump({"reward": section}))
    return out


def options(folder: Path, **changes):
    section = yaml.safe_load((folder / "config.yaml").read_text())["reward"]
    for key, value in changes.items():
        outer, _, inner = key.partition("__")
        section[outer] = section.get(outer, {}) | {inner: value} if inner else value
    return parse_options(section, "test")


@pytest.fixture(scope="module")
def whole_run(folder) -> Path:
    """A run that nothing interrupts, by the command line."""
    adaptrm("train", "reward", folder / "config.yaml", "--out", folder / "whole")
    return folder / "whole"


def test_a_run_leaves_what_the_contract_names(whole_run):
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "export"} <= {p.name for p in whole_run.iterdir()}
    lines = losses(whole_run)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    expected = {"step", "epoch", "loss", "accuracy", "margin", "learning_rate", "grad_norm", "weight", "pairs"}
    assert lines[0].keys() == expected | {"skipped", "padding"}
    assert sum(line["pairs"] for line in lines) == 3 * 24


def test_it_learns(folder, tmp_path):
    train("reward", options(folder, epochs=12, mesh={"fsdp": 1, "data": 4, "tensor": 2}), tmp_path / "run")
    lines = losses(tmp_path / "run")
    assert lines[0]["loss"] == pytest.approx(np.log(2), abs=0.3)
    assert np.mean([line["loss"] for line in lines[-5:]]) < 0.4


def test_killed_and_started_again_it_gives_the_same_losses_and_weights(folder, whole_run, tmp_path):
    run = tmp_path / "run"
    metrics = run / "metrics.jsonl"
    command = ("train", "reward", folder / "config.yaml", "--out", run)
    kill_when(lambda: metrics.exists() and metrics.read_text().count("\n") >= 3, *command)
    adaptrm(*command)
    assert losses(run) == losses(whole_run)
    weights = "export/model.safetensors"
    assert (run / weights).read_bytes() == (whole_run / weights).read_bytes()


def test_a_finished_run_started_again_changes_nothing(folder, whole_run):
    before = losses(whole_run)
    adaptrm("train", "reward", folder / "config.yaml", "--out", whole_run)
    assert losses(whole_run) == before


def test_two_processes_equal_one(folder, whole_run, tmp_path):
    command = ("train", "reward", folder / "config.yaml", "--out", tmp_path / "two")
    adaptrm(*command, prefix=("bash", str(LAUNCHER)))
    one, two = losses(whole_run), losses(tmp_path / "two")
    assert (tmp_path / "two" / "examples.sha256").read_bytes() == (whole_run / "examples.sha256").read_bytes()
    assert [line["pairs"] for line in one] == [line["pairs"] for line in two]
    np.testing.assert_allclose([x["loss"] for x in two], [x["loss"] for x in one], rtol=1e-5)
    np.testing.assert_allclose([x["grad_norm"] for x in two], [x["grad_norm"] for x in one], rtol=1e-5)


def test_the_launcher_gives_the_exit_code_of_what_failed(folder, tmp_path):
    failed = adaptrm("train", "reward", "absent", "--out", tmp_path / "x", prefix=("bash", str(LAUNCHER)), check=False)
    assert failed.returncode == 2
    assert "absent: no such config" in failed.stderr


MESHES = [(1, 1, 8), (2, 2, 2)]
MORE_MESHES = [(8, 1, 1), (1, 8, 1), (1, 4, 2), (2, 1, 4)]


@pytest.mark.parametrize("meshes", [MESHES, pytest.param(MORE_MESHES, marks=pytest.mark.slow)])
def test_every_mesh_equals_one_device(folder, tmp_path, meshes):
    """Invariant 4: loss, gradients, and parameters after a step of plain SGD, with 9 heads and 3 KV heads."""
    tiny_causal_lm(tmp_path / "lm", hidden_size=36, num_attention_heads=9, num_key_value_heads=3)
    data = options(folder).data
    chat = ChatTokenizer.from_folder(tmp_path / "lm")
    store, _ = reward_examples(data, chat, 0, LossOptions())
    plan = Plan(store.lengths, store.leaves, PlanOptions(ROW, 8), 1)
    # At a rate of 1 and without clipping, the gradient is what a parameter has moved by.
    sgd = OptimizerOptions(name="sgd", learning_rate=1.0, schedule="constant", warmup_steps=0, clip_norm=1e9)

    def step(mesh):
        source = open_folder(tmp_path / "lm")
        definition, params, _ = load_weights(source, SequenceClassifier, mesh, dtype="float32", new_head_seed=0)
        before = jax.tree.map(np.array, nnx.to_pure_dict(params))
        program = make_step("reward", definition, sgd, 1, None, "float32", "layer", LossOptions())
        with jax.set_mesh(mesh):
            state = init_state(params, make_optimizer(sgd), mesh)
            state, metrics = program(state, next(device_batches(store, plan, mesh, 0, 1)))
        for path, param in nnx.to_flat_state(state.params):
            assert param.sharding.mesh.shape == mesh.shape, path
        after = jax.tree.map(np.array, nnx.to_pure_dict(state.params))
        gradient = jax.tree.map(np.subtract, before, after)
        return np.asarray(metrics["loss"]), gradient, after

    reference = step(make_mesh(1, 1, 1, devices=jax.devices()[:1]))
    for shape in meshes:
        for path, (want, got) in zip(
            jax.tree_util.tree_leaves_with_path(reference),
            zip(jax.tree.leaves(reference), jax.tree.leaves(step(make_mesh(*shape))), strict=True),
            strict=True,
        ):
            bound = 1e-5 * max(1.0, np.abs(want).max())
            assert np.abs(want - got).max() <= bound, (shape, path[0])


@pytest.mark.slow
def test_a_checkpoint_goes_on_on_another_mesh(folder, tmp_path):
    first = options(folder, mesh={"fsdp": 4, "tensor": 2}, max_steps=4, checkpoint__every_steps=2)
    straight = options(folder, mesh={"fsdp": 4, "tensor": 2}, max_steps=4)
    train("reward", straight, tmp_path / "straight")
    # A run that stops after two of its four steps: the schedule is that of the whole.
    train("reward", first, tmp_path / "moved")
    for name in ("4", "export"):
        target = tmp_path / "moved" / ("checkpoints" if name == "4" else "") / name
        _remove(target)
    train("reward", replace(first, mesh=replace(first.mesh, data=2, fsdp=2)), tmp_path / "moved")
    for a, b in zip(losses(tmp_path / "straight"), losses(tmp_path / "moved"), strict=True):
        assert a["pairs"] == b["pairs"]
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-5)


def _remove(path: Path) -> None:
    import shutil

    assert path.is_dir(), path
    shutil.rmtree(path)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(folder, tmp_path):
    wild = options(folder, optimizer__learning_rate=1e30, optimizer__warmup_steps=0, mesh={"fsdp": 4, "tensor": 2})
    with pytest.raises(TrainingFailed, match=r"step \d+: the loss or its gradient is not finite"):
        train("reward", replace(wild, checkpoint=replace(wild.checkpoint, every_steps=1)), tmp_path / "run")
    kept = [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()]
    assert kept and all(name.isdigit() for name in kept)
    for line in losses(tmp_path / "run"):
        assert np.isfinite(line["loss"])


def test_a_folder_belongs_to_one_run(folder, whole_run):
    with pytest.raises(InputError, match="another optimizer"):
        train("reward", options(folder, optimizer__learning_rate=1.0), whole_run)
    with pytest.raises(InputError, match="train reward"):
        train("judge", options(folder), whole_run)


def test_a_run_does_not_go_on_with_other_data(folder, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_bytes((folder / "pairs.jsonl").read_bytes())
    some = options(folder, data__pairs=str(pairs), max_steps=2, mesh={"fsdp": 4, "tensor": 2})
    train("reward", some, tmp_path / "run")
    pairs.write_text(pairs.read_text().replace("bake bread", "boil pasta"))
    with pytest.raises(InputError, match="have changed since this run began"):
        train("reward", some, tmp_path / "run")


def test_a_process_that_fails_ends_the_others(folder, whole_run, tmp_path):
    """Only the first process looks at the lock; the second would wait for it for ever."""
    with hold(tmp_path / "held"):
        command = ("train", "reward", folder / "config.yaml", "--out", tmp_path / "held")
        refused = adaptrm(*command, prefix=("timeout", "120", "bash", str(LAUNCHER)), check=False)
    assert refused.returncode == 2
    assert "another run holds this folder" in refused.stderr


def test_rows_too_short_for_a_pair_are_an_error_or_dropped(folder, tmp_path, capsys):
    mesh = {"fsdp": 4, "tensor": 2}
    with pytest.raises(InputError, match=r"'p\d+' has \d+ tokens, a row 256; raise data.row_length"):
        train("reward", options(folder, data__row_length=256, mesh=mesh), tmp_path / "run")
    train("reward", options(folder, data__row_length=256, data__overlong="drop", epochs=1, mesh=mesh), tmp_path / "run")
    assert "longer than a row of 256 tokens" in capsys.readouterr().err


def test_label_files_train_by_themselves_and_joined_to_their_pairs(folder, tmp_path):
    """Labels alone put the chosen response first; joined to pairs they keep the pairs' order: the same losses."""
    pairs = [p for p in tiny_pairs(24)]
    rows = []
    for i, pair in enumerate(pairs):
        sides = (pair.response_a, pair.response_b)[:: -1 if i % 2 else 1]
        chosen, rejected = ([{"role": "assistant", "content": side}] for side in sides)
        rows.append({"id": pair.id, "prompt": [dict(m) for m in pair.prompt], "chosen": chosen, "rejected": rejected})
    labels = str(write_rows(tmp_path / "labels.jsonl", rows))
    mesh = {"fsdp": 4, "tensor": 2}
    train("reward", options(folder, data__labels=labels, max_steps=4, mesh=mesh), tmp_path / "joined")
    train("reward", options(folder, data__labels=labels, data__pairs=None, max_steps=4, mesh=mesh), tmp_path / "alone")
    for a, b in zip(losses(tmp_path / "joined"), losses(tmp_path / "alone"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-5)
    # A label less is a pair without weight; the trees and the plan stay.
    labels = str(write_rows(tmp_path / "fewer.jsonl", rows[:-4]))
    train("reward", options(folder, data__labels=labels, epochs=1, mesh=mesh), tmp_path / "fewer")
    assert sum(line["weight"] for line in losses(tmp_path / "fewer")) == 20
    assert sum(line["pairs"] for line in losses(tmp_path / "fewer")) == 24


def test_sets_train_with_pairs_mixed_in(folder, tmp_path, monkeypatch):
    responses = {"chosen_list": ["Mix flour."], "rejected_list": ["I refuse.", "No.", "Never mix."]}
    write_rows(tmp_path / "sets.jsonl", [{"prompt": f"How do I bake bread {i}?", **responses} for i in range(8)])
    (tmp_path / "pairs.jsonl").write_bytes((folder / "pairs.jsonl").read_bytes())

    def sets(where: Path | str):
        return options(
            folder,
            loss={"kind": "all-pairs", "center_rewards": 0.01},
            data__pairs=str(Path(where) / "sets.jsonl"),
            data__mix=[{"pairs": str(Path(where) / "pairs.jsonl"), "weight": 0.5}],
            mesh={"fsdp": 4, "tensor": 2},
            epochs=1,
        )

    monkeypatch.chdir(tmp_path)
    made = train("reward", sets(""), tmp_path / "run")
    assert (made["sets"], made["mixed"]) == (12, 4)
    lines = losses(tmp_path / "run")
    assert sum(line["sets"] for line in lines) == sum(line["weight"] for line in lines) == 12
    monkeypatch.chdir(folder)  # the run knows its files from any folder
    train("reward", sets(tmp_path), tmp_path / "run")
    with pytest.raises(InputError, match="another data"):
        train("reward", replace(sets(tmp_path), data=replace(sets(tmp_path).data, mix=())), tmp_path / "run")


def test_a_judge_learns_rule_labels(folder, tmp_path):
    pool = tiny_pool(4)
    (tmp_path / "pool.yaml").write_text(pool.to_yaml())
    rows = [
        {
            "id": p.id,
            "prompt": [dict(m) for m in p.prompt],
            "response": side,
            "labels": {"r0": True, "r1": False, "r3": None},  # what a rule says, it says of every reply
        }
        for p in tiny_pairs(12)
        for side in (p.response_a, p.response_b)
    ]
    labels = write_rows(tmp_path / "rule-labels.jsonl", rows)
    section = {
        "model": {"pretrained": str(folder / "lm"), "remat": "none"},
        "data": {"labels": str(labels), "rules": str(tmp_path / "pool.yaml"), "row_length": 512, "rows_per_step": 4},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2},
        "mesh": {"fsdp": 4, "tensor": 2},
        "epochs": 20,
    }
    result = train("judge", parse_options(section, "test"), tmp_path / "run")
    assert result["replies"] == 24
    lines = losses(tmp_path / "run")
    assert lines[-1]["accuracy"] > 0.9 > lines[0]["accuracy"]
    # Only labelled rules are trained: three a reply, one of them as Neither.
    assert sum(line["weight"] for line in lines) == 20 * 24 * 3
    with pytest.raises(InputError, match="rule 'r0' is not in pool"):
        (tmp_path / "other.yaml").write_text(pool.to_yaml().replace("id: r0", "id: x0"))
        other = parse_options(section | {"data": section["data"] | {"rules": str(tmp_path / "other.yaml")}}, "test")
        train("judge", other, tmp_path / "other")


def test_exact_batches_hold_exactly_so_many_pairs(folder, tmp_path):
    exact = options(folder, epochs=1, mesh={"fsdp": 4, "tensor": 2}, data__exact_batch=True, data__pairs_per_step=7)
    exact = replace(exact, data=replace(exact.data, rows_per_step=8))
    train("reward", exact, tmp_path / "run")
    assert [line["pairs"] for line in losses(tmp_path / "run")] == [7, 7, 7, 3]


def test_a_run_in_progress_gives_its_latest_checkpoint(folder, whole_run, tmp_path):
    run = tmp_path / "run"
    train("reward", options(folder, mesh={"fsdp": 4, "tensor": 2}), run)
    pairs = tiny_pairs(3)
    finished = RewardModel.from_pretrained(run).score_pairs(pairs)
    _remove(run / "export")
    np.testing.assert_array_equal(RewardModel.from_pretrained(run).score_pairs(pairs), finished)
    assert jnp.isfinite(finished).all()
