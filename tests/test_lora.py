"""Adapters: what they compute, where they lie, what a checkpoint holds, and what is exported of them."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from commands import losses, pair_rows, write_rows
from flax import nnx
from folders import raw_tensors
from numerics import assert_equal_to
from refusals import refused
from tiny import random_state, tiny_causal_lm, tiny_config, tiny_pairs
from trees import fan, pack

from adaptrm.config import LoraOptions, ModelOptions, OptimizerOptions, parse_options
from adaptrm.export import export_run
from adaptrm.models import CausalLM, SequenceClassifier
from adaptrm.models.layers import ADAPTERS
from adaptrm.parallel import make_mesh
from adaptrm.reward_model import RewardModel
from adaptrm.train.lora import merged, with_adapters
from adaptrm.train.optimizer import make_optimizer
from adaptrm.train.run import train
from adaptrm.train.start import open_run
from adaptrm.train.state import init_state, param_shardings, trained_and_frozen

CONFIG = tiny_config(attention_bias=True, mlp_bias=True)
LORA = LoraOptions(rank=4, alpha=8.0)
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def on(mesh, model_type) -> nnx.State:
    """A random model's parameters on a mesh."""
    definition, params = random_state(model_type, CONFIG)
    return jax.device_put(params, param_shardings(definition, params, mesh))


def adapted(mesh, model_type=SequenceClassifier):
    """A model whose adapters are far from zero."""
    base = on(mesh, model_type)
    definition, params = with_adapters(model_type, CONFIG, base, LORA, 0, mesh)
    rng = np.random.default_rng(1)
    for path, param in nnx.to_flat_state(params):
        if path[-1] in ADAPTERS:
            noise = rng.standard_normal(param.shape).astype(np.float32) * 0.1
            param.set_value(jax.device_put(noise, param[...].sharding))
    return definition, params


@pytest.fixture(scope="module")
def rows():
    packed = pack([fan(9, 2, 5 + seed, seed=seed) for seed in range(6)], 4, 64, 8)
    return packed.tokens, packed.positions, packed.subtree_end


def hidden(definition, params, rows):
    return jax.jit(lambda params, rows: nnx.merge(definition, params).model(*rows))(params, rows)


def test_merged_weights_compute_what_the_adapters_do(rows):
    """On one device and on eight, which say the same."""
    found = []
    for mesh in (make_mesh(1, 1, 1, devices=jax.devices()[:1]), make_mesh(2, 2, 2)):
        with jax.set_mesh(mesh):
            definition, params = adapted(mesh)
            assert all(leaf.sharding.mesh.size == mesh.size for leaf in jax.tree.leaves(trained_and_frozen(params)[0]))
            found.append(hidden(definition, params, rows))
            found.append(hidden(*merged(definition, params), rows))
    plain = hidden(*random_state(SequenceClassifier, CONFIG), rows)
    assert np.abs(plain - found[0]).max() > 0.1
    for got in found[1:]:
        assert_equal_to(got, found[0], 1e-5)


def test_adapters_are_spread_as_their_weights_are_and_begin_as_nothing(rows):
    mesh = make_mesh(1, 4, 2)
    base = on(mesh, CausalLM)
    definition, params = with_adapters(CausalLM, CONFIG, base, LORA, 0, mesh)
    flat = dict(nnx.to_flat_state(params))
    assert {path[-2] for path in flat if path[-1] in ADAPTERS} == PROJECTIONS
    spec = lambda *path: tuple(flat["model", "layers", *path][...].sharding.spec)  # noqa: E731
    assert spec("self_attn", "q_proj", "lora_a") == (None, None, "fsdp")
    assert spec("self_attn", "q_proj", "lora_b") == (None, "tensor", None, None)
    assert spec("mlp", "down_proj", "lora_a") == (None, None, "tensor")
    assert spec("mlp", "down_proj", "lora_b") == (None, "fsdp", None)
    _, plain = merged(definition, params)
    assert_equal_to(plain, base, 0, may_vanish=True)


def test_only_adapters_and_the_head_have_optimizer_state():
    mesh = make_mesh(1, 4, 2)
    _, params = adapted(mesh)
    state = init_state(params, make_optimizer(OptimizerOptions(name="adamw")), mesh)
    trained = {path for path, _ in nnx.to_flat_state(state.params)}
    assert {path[-1] for path in trained} == {*ADAPTERS, "weight"} and ("score", "weight") in trained
    assert len(trained) == 2 * len(PROJECTIONS) + 1
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert len(moments) == 2 * len(trained)
    assert {path for path, _ in nnx.to_flat_state(state.frozen)}.isdisjoint(trained)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("lora")
    tiny_causal_lm(out / "lm")
    pairs = [replace(p, preferred="a" if len(p.response_a) > len(p.response_b) else "b") for p in tiny_pairs(12)]
    write_rows(out / "pairs.jsonl", pair_rows(pairs))
    return out


def options(folder: Path, model: dict, **section):
    given = {
        "model": {"pretrained": str(folder / "lm"), "remat": "none"} | model,
        "data": {"pairs": str(folder / "pairs.jsonl"), "labels": "human", "row_length": 512, "rows_per_step": 4},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 0, "schedule": "constant"},
        "checkpoint": {"every_steps": 1},
        "mesh": {"fsdp": 4, "tensor": 2},
    }
    return parse_options(yaml.safe_load(yaml.safe_dump(given | section)), "test")


@pytest.mark.slow
def test_a_run_with_adapters_learns_goes_on_and_is_exported(folder, tmp_path):
    lora = {"lora": {"rank": 4, "alpha": 8.0}}
    run = tmp_path / "run"
    whole = options(folder, lora, epochs=8)
    train("reward", whole, run)
    lines = losses(run)
    assert lines[-1]["loss"] < lines[0]["loss"] / 2
    pairs = tiny_pairs(3)
    exported = RewardModel.from_pretrained(run).score_pairs(pairs)
    tensors = raw_tensors(run / "export")
    base = raw_tensors(folder / "lm")
    same = {name for name in tensors if name in base and tensors[name][2] == base[name][2]}
    projections = {name for name in tensors if name.split(".")[-2] in PROJECTIONS}
    assert same == tensors.keys() - projections - {"score.weight"}
    # Without its export and its last checkpoint it is unfinished; started again it ends as it did.
    unfinished = RewardModel
    newest = max(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit())
    (run / "export").rename(tmp_path / "moved")
    np.testing.assert_allclose(unfinished.from_pretrained(run).score_pairs(pairs), exported, atol=1e-5)
    found = export_run(run, tmp_path / "again", check=True)
    assert found["adaptrm"] <= 1e-5
    (run / "checkpoints" / str(newest)).rename(tmp_path / "newest")
    train("reward", whole, run)
    assert losses(run) == lines
    assert raw_tensors(run / "export") == tensors
    # A checkpoint holds what is trained alone.
    start = open_run(run)
    assert start.model.lora == LORA
    size = sum(p.stat().st_size for p in (tmp_path / "newest").rglob("*") if p.is_file())
    assert size < (folder / "lm" / "model.safetensors").stat().st_size


def test_exported_weights_are_averaged_with_the_start(folder, tmp_path):
    for share in (0.0, 0.25):
        train("reward", options(folder, {"average_with_start": share}, max_steps=2), tmp_path / str(share))
    trained, mixed, start = (
        raw_tensors(path) for path in (tmp_path / "0.0" / "export", tmp_path / "0.25" / "export", folder / "lm")
    )
    array = lambda tensor: np.frombuffer(tensor[2], np.float32)  # noqa: E731
    for name, tensor in mixed.items():
        new = array(trained[name])
        want = new if name == "score.weight" else 0.75 * new + 0.25 * array(start[name])
        np.testing.assert_allclose(array(tensor), want, atol=1e-6, err_msg=name)
        assert name == "score.weight" or not np.allclose(new, array(start[name]), atol=1e-4), name
    (tmp_path / "0.25" / "export").rename(tmp_path / "moved")
    export_run(tmp_path / "0.25", tmp_path / "again")
    assert raw_tensors(tmp_path / "again") == mixed


@pytest.mark.parametrize("model", [{"lora": {}}, {"average_with_start": 0.5}])
def test_what_needs_a_start_says_so(folder, tmp_path, model):
    scratch = {"scratch": {"tokenizer": str(folder / "lm")}, "pretrained": None}
    found = refused(train, "reward", options(folder, scratch | model), tmp_path / "run")
    assert found == f"model.{next(iter(model))} needs weights to start from; give model.pretrained (--model)"


def test_wrong_adapter_options_name_the_key():
    for model, message in (
        ({"lora": {"rank": 0}}, "model.lora.rank: Input should be greater than 0"),
        ({"lora": {"alpha": 0}}, "model.lora.alpha: Input should be greater than 0"),
        ({"lora": {"rnak": 4}}, "model.lora.rnak: unknown key; did you mean 'rank'?"),
        ({"average_with_start": 1}, "model.average_with_start: Input should be less than 1"),
    ):
        assert message in refused(parse_options, {"model": model}, "here")
    assert parse_options({"model": {"lora": {}}}, "here").model == ModelOptions(lora=LoraOptions())
