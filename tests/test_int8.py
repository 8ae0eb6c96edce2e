"""A judge whose projections are int8: it computes what its rounded weights say, wherever they lie."""

import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from commands import in_process, pair_rows, write_rows
from flax import nnx
from numerics import assert_equal_to
from refusals import refused
from tiny import tiny_causal_lm, tiny_pairs, tiny_pool

from adaptrm.data.scores import read_parts
from adaptrm.hf import load_weights, open_folder, save_weights
from adaptrm.judge import Judge
from adaptrm.judge.score import ScoreJob, score
from adaptrm.models import CausalLM
from adaptrm.models.layers import Weight
from adaptrm.parallel import make_mesh

POOL = tiny_pool(6)
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("qwix", reason="pip install 'adaptrm[int8]'")
    # Qwen2 has biases, which stay what they are.
    return tiny_causal_lm(tmp_path_factory.mktemp("int8") / "lm", model_type="qwen2")


def numbers(state: nnx.State) -> dict[tuple, np.ndarray]:
    return {path: np.asarray(value[...]) for path, value in nnx.to_flat_state(state)}


@pytest.fixture(scope="module")
def plain(folder, one_device):
    return numbers(load_weights(open_folder(folder), CausalLM, one_device)[1])


@pytest.fixture(scope="module")
def judge(folder, one_device) -> Judge:
    return Judge.from_pretrained(folder, POOL, mesh=one_device, quantize="int8")


@pytest.fixture(scope="module")
def narrow(judge):
    return numbers(judge._state)


def scales_of(narrow: dict) -> dict[tuple, np.ndarray]:
    """For each weight in int8 its scale, with dimensions as the weight."""
    found = {}
    for path, scale in narrow.items():
        if path[-1] == "scale":
            weight = (*path[:-1], "weight")
            found[weight] = scale.reshape(scale.shape + (1,) * (narrow[weight].ndim - scale.ndim))
    return found


@pytest.fixture(scope="module")
def rounded(narrow):
    """The weights that the int8 ones stand for."""
    scales = scales_of(narrow)
    return {p: v * scales[p] if p in scales else v for p, v in narrow.items() if p[-1] != "scale"}


def test_a_weight_is_off_by_half_its_scale_at_most_and_nothing_else_changes(plain, narrow, rounded):
    scales = scales_of(narrow)
    assert {path[-2] for path in scales} == set(PROJECTIONS) and rounded.keys() == plain.keys()
    for path, value in plain.items():
        if path not in scales:
            assert narrow[path].dtype == value.dtype and np.array_equal(narrow[path], value)
            continue
        scale, off = scales[path], np.abs(rounded[path] - value)
        assert narrow[path].dtype == np.int8 and scale.dtype == np.float32
        inputs = tuple(axis for axis, size in enumerate(scale.shape) if size == 1)
        assert_equal_to(scale, np.abs(value).max(inputs, keepdims=True) / 127.5, 1e-6)
        assert (off <= scale / 2 * (1 + 1e-4)).all() and (off > scale * 0.45).any()


@pytest.mark.parametrize(
    ("equation", "shape", "inputs"),
    [("btd,nhd->btnh", (4, 8, 32), 1), ("btnh,dnh->btd", (32, 4, 8), 2), ("btd,fd->btf", (64, 32), 1)],
)
def test_a_product_is_that_of_the_rounded_weights(equation, shape, inputs):
    rng = np.random.default_rng(0)
    outputs = shape[:-inputs]
    whole = rng.integers(-128, 128, shape).astype(np.int8)
    scale, bias = rng.uniform(1e-4, 1e-2, outputs).astype(np.float32), rng.standard_normal(outputs).astype(np.float32)
    weight = Weight(shape, ("layers",) * len(shape), inputs=inputs, bias=True)
    weight.weight, weight.scale, weight.bias = (nnx.Param(jnp.asarray(x)) for x in (whole, scale, bias))
    rounded = whole.astype(np.float64) * scale.reshape(outputs + (1,) * inputs)
    # In bfloat16 the product, what the scale makes of it, and the sum with a bias are rounded to eight bits.
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 3 * 2.0**-9)):
        x = jnp.asarray(rng.standard_normal((2, 3, *shape[-inputs:])), dtype)
        got = weight.project(equation, x)
        assert got.dtype == dtype
        assert_equal_to(got, np.einsum(equation, np.asarray(x, np.float64), rounded) + bias, tolerance)


def test_a_score_is_that_of_the_rounded_weights(folder, judge, rounded, tmp_path, one_device):
    _, state, _ = load_weights(open_folder(folder), CausalLM, one_device)
    wide = nnx.from_flat_state([(p, v.replace(jnp.asarray(rounded[p]))) for p, v in nnx.to_flat_state(state)])
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    save_weights(wide, tmp_path)
    got, of_rounded, of_whole = (
        asked.log_probabilities(tiny_pairs())
        for asked in (judge, *(Judge.from_pretrained(model, POOL, mesh=one_device) for model in (tmp_path, folder)))
    )
    assert_equal_to(got, of_rounded, 1e-5)
    assert 1e-3 < np.abs(got - of_whole).max() < 0.5


def test_the_weights_do_not_depend_on_the_devices(folder, narrow):
    several = numbers(load_weights(open_folder(folder), CausalLM, make_mesh(tensor=2), quantize="int8")[1])
    assert all(np.array_equal(several[path], value) for path, value in narrow.items())


def test_a_score_folder_is_of_one_kind_and_its_scores_of_any_devices(folder, judge, tmp_path):
    (tmp_path / "pool.yaml").write_text(POOL.to_yaml())
    pairs = write_rows(tmp_path / "pairs.jsonl", pair_rows(tiny_pairs()))
    job = {
        "pairs": str(pairs),
        "judge": str(folder),
        "rules": str(tmp_path / "pool.yaml"),
        "out": str(tmp_path / "out"),
    }
    score(ScoreJob(**job, quantize="int8", tensor=2))
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["quantize"] == "int8"
    (part,), expected = read_parts(tmp_path / "out"), judge.score(tiny_pairs())
    for name in ("a", "b", "relevance", "log_odds_a", "label_mass_b"):
        assert_equal_to(getattr(part, name), getattr(expected, name), 1e-5)
    assert "holds scores with another quantize; give another --out" in refused(score, ScoreJob(**job))
    message = refused(score, ScoreJob(**job, tensor=3))
    assert message.startswith("--tensor 3: mesh data=") and message.endswith("needs 6 devices, there are 8")


def test_without_its_library_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    model = tiny_causal_lm(tmp_path / "lm")
    assert (
        refused(Judge.from_pretrained, model, POOL, quantize="int4") == "quantize 'int4': not known; give one of: int8"
    )
    monkeypatch.setitem(sys.modules, "qwix", None)
    (tmp_path / "pool.yaml").write_text(POOL.to_yaml())
    pairs = write_rows(tmp_path / "pairs.jsonl", pair_rows(tiny_pairs(1)))
    command = (
        "score",
        "--pairs",
        pairs,
        "--judge",
        model,
        "--rules",
        tmp_path / "pool.yaml",
        "--out",
        tmp_path / "out",
    )
    code, out, err = in_process(monkeypatch, capsys, *command, "--quantize", "int8")
    assert (code, out) == (2, "")
    assert err == "adaptrm: quantize int8: needs qwix; pip install 'adaptrm[int8]'\n"
