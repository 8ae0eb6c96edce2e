"""Hugging Face folders: what is read, what is written back, and what is refused."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from ml_dtypes import bfloat16
from safetensors.numpy import save_file
from tiny import LLAMA3, tiny_config

from adaptrm.errors import InputError
from adaptrm.hf import load_weights, open_folder, save_weights
from adaptrm.models import CausalLM, ModelConfig, SequenceClassifier
from adaptrm.parallel import make_mesh


def hf_tensors(config: ModelConfig, dtype="float32", head: str | None = "lm_head", labels: int = 1, seed: int = 0):
    """Random tensors under the names and shapes of a Hugging Face Llama, written out by hand."""
    heads, kv = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    hidden, inner = config.hidden_size, config.intermediate_size
    shapes = {"model.embed_tokens.weight": (config.vocab_size, hidden), "model.norm.weight": (hidden,)}
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}."
        shapes |= {
            f"{layer}self_attn.q_proj.weight": (heads, hidden),
            f"{layer}self_attn.k_proj.weight": (kv, hidden),
            f"{layer}self_attn.v_proj.weight": (kv, hidden),
            f"{layer}self_attn.o_proj.weight": (hidden, heads),
            f"{layer}mlp.gate_proj.weight": (inner, hidden),
            f"{layer}mlp.up_proj.weight": (inner, hidden),
            f"{layer}mlp.down_proj.weight": (hidden, inner),
            f"{layer}input_layernorm.weight": (hidden,),
            f"{layer}post_attention_layernorm.weight": (hidden,),
        }
    if head is not None:
        shapes[f"{head}.weight"] = (config.vocab_size if head == "lm_head" else labels, hidden)
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def write_folder(folder: Path, config: ModelConfig, tensors: dict, shards: int = 1, **fields) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_hf() | fields))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {name: f"model-{n % shards + 1:05d}-of-{shards:05d}.safetensors" for n, name in enumerate(tensors)}
    for shard in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def raw_tensors(folder: Path) -> dict[str, tuple]:
    """Name -> (dtype, shape, bytes), read from the files by the format's own description."""
    found = {}
    for file in folder.glob("*.safetensors"):
        content = file.read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                assert name not in found
                found[name] = (entry["dtype"], tuple(entry["shape"]), data[start:end])
    return found


@pytest.mark.parametrize("dtype", ["float32", bfloat16, "float16"])
@pytest.mark.parametrize(("shards", "tied"), [(1, False), (3, False), (1, True)])
def test_load_then_export_gives_the_same_tensors(tmp_path, dtype, shards, tied):
    # Twelve layers: names sort as text, and layer 10 is not the third.
    config = tiny_config(num_hidden_layers=12, head_dim=16, tie_word_embeddings=tied)
    tensors = hf_tensors(config, dtype, None if tied else "lm_head")
    source = write_folder(tmp_path / "in", config, tensors, shards)
    _, state, _ = load_weights(open_folder(source), CausalLM, make_mesh(2, 2, 2))
    total = sum(tensor.nbytes for tensor in tensors.values())
    save_weights(state, tmp_path / "out", max_shard_bytes=total // shards + 1)
    before, after = raw_tensors(source), raw_tensors(tmp_path / "out")
    assert len(before) == len(tensors)
    assert after == before
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == 1 if shards == 1 else len(files) >= shards
    # What is written can be read again, index included.
    _, again, _ = load_weights(open_folder(write_config(tmp_path / "out", config)), CausalLM, make_mesh())
    for (path, x), (_, y) in zip(nnx.to_flat_state(state), nnx.to_flat_state(again), strict=True):
        assert x.dtype == y.dtype == np.dtype(dtype) and np.array_equal(np.asarray(x[...]), np.asarray(y[...])), path


def write_config(folder: Path, config: ModelConfig) -> Path:
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    return folder


def test_a_classifier_goes_out_as_it_came_in(tmp_path, one_device):
    config = tiny_config()
    source = write_folder(tmp_path / "in", config, hf_tensors(config, bfloat16, "score", labels=7))
    folder = open_folder(source)
    assert folder.is_classifier
    _, state, _ = load_weights(folder, SequenceClassifier, one_device, num_labels=7)
    save_weights(state, tmp_path / "out")
    assert raw_tensors(tmp_path / "out") == raw_tensors(source)


def test_another_dtype_rounds_each_value_once(tmp_path, one_device):
    config = tiny_config()
    tensors = hf_tensors(config)
    source = write_folder(tmp_path / "in", config, tensors)
    _, state, _ = load_weights(open_folder(source), CausalLM, one_device, dtype="bfloat16")
    save_weights(state, tmp_path / "out")
    expected = {name: ("BF16", x.shape, x.astype(bfloat16).tobytes()) for name, x in tensors.items()}
    assert raw_tensors(tmp_path / "out") == expected


def test_a_new_head_and_new_rows(tmp_path, one_device):
    config = tiny_config()
    tensors = hf_tensors(config)
    folder = open_folder(write_folder(tmp_path, config, tensors))
    bigger = config.vocab_size + 3
    load = lambda seed: load_weights(  # noqa: E731
        folder, SequenceClassifier, one_device, num_labels=2, dtype="float32", new_head_seed=seed, vocab_size=bigger
    )
    (_, state, read), (_, same, _), (_, other, _) = load(1), load(1), load(2)
    heads = [np.asarray(s["score"]["weight"][...]) for s in (state, same, other)]
    assert heads[0].shape == (2, config.hidden_size) and 0.05 < heads[0].std() < 0.5
    assert np.array_equal(heads[0], heads[1]) and not np.array_equal(heads[0], heads[2])
    assert read.vocab_size == bigger
    rows, stored = np.asarray(state["model"]["embed_tokens"]["weight"][...]), tensors["model.embed_tokens.weight"]
    assert np.array_equal(rows[:-3], stored)
    np.testing.assert_allclose(rows[-3:], np.repeat(stored.mean(0, keepdims=True), 3, 0), atol=1e-6)


def test_tensors_that_do_not_belong_are_all_listed(tmp_path, one_device):
    config = tiny_config()
    tensors = hf_tensors(config)
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
        del tensors[name]
    for name in ("model.layers.0.self_attn.q_proj.bias", "model.layers.2.mlp.up_proj.weight"):
        tensors[name] = np.zeros(4, np.float32)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)  # old files hold this; unused
    with pytest.raises(InputError) as caught:
        load_weights(open_folder(write_folder(tmp_path, config, tensors)), CausalLM, one_device)
    assert "missing: model.layers.1.mlp.up_proj.weight, model.norm.weight;" in str(caught.value)
    expected = "left over: model.layers.0.self_attn.q_proj.bias, model.layers.2.mlp.up_proj.weight"
    assert str(caught.value).endswith(expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"intermediate_size": 48}, "mlp.*_proj.weight has shape .* config.json says"),
        ({"num_key_value_heads": 4}, "[kv]_proj.weight has shape .* config.json says"),
        ({"vocab_size": 100}, "(lm_head|model.embed_tokens).weight has shape .* config.json says"),
        ({"num_hidden_layers": 3}, "missing: model.layers.2.input_layernorm.weight"),
        ({"tie_word_embeddings": True, "hidden_size": 16, "head_dim": 8}, "has shape .* config.json says"),
    ],
)
def test_a_config_of_another_model_is_an_error(tmp_path, one_device, change, message):
    folder = write_folder(tmp_path, tiny_config(), hf_tensors(tiny_config()), **change)
    with pytest.raises(InputError, match=message):
        load_weights(open_folder(folder), CausalLM, one_device)


def test_broken_folders_are_errors(tmp_path, one_device):
    config = tiny_config()
    with pytest.raises(InputError, match=r"no config\.json"):
        open_folder(tmp_path)
    write_config(tmp_path, config)
    with pytest.raises(InputError, match=r"model\.safetensors: missing"):
        open_folder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(InputError, match="not a whole safetensors file"):
        open_folder(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}))
    with pytest.raises(InputError, match="is not the name of a safetensors file in this folder"):
        open_folder(tmp_path)
    index.write_text("[]")
    with pytest.raises(InputError, match="not a safetensors index"):
        open_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        open_folder(tmp_path)
    other = tmp_path / "other"
    integers = {name: x.astype(np.int8) for name, x in hf_tensors(config).items()}
    with pytest.raises(InputError, match="is int8; quantised weights"):
        load_weights(open_folder(write_folder(other, config, integers)), CausalLM, one_device)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sliding_window", 1024),
        ("use_sliding_window", True),
        ("quantization_config", {"quant_method": "gptq"}),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("hidden_act", "gelu"),
        ("partial_rotary_factor", 0.5),
        ("final_logit_softcapping", 30.0),
    ],
)
def test_a_field_in_force_is_an_error_that_names_it(name, value):
    raw = tiny_config().to_hf()
    assert ModelConfig.from_hf(raw) == tiny_config()
    with pytest.raises(InputError, match=f"^here: {name} = .* is in force and not implemented"):
        ModelConfig.from_hf(raw | {name: value}, "here")


@pytest.mark.parametrize("kind", ["yarn", "linear", "dynamic", "longrope"])
@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
def test_other_rope_types_are_errors(kind, field):
    spelling = "rope_type" if kind != "linear" else "type"
    with pytest.raises(InputError, match=f"rope_type '{kind}' is in force"):
        ModelConfig.from_hf(tiny_config().to_hf() | {field: {spelling: kind, "factor": 4.0}})


def test_a_partial_rotary_factor_among_the_rope_parameters_is_an_error():
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    with pytest.raises(InputError, match="partial_rotary_factor"):
        ModelConfig.from_hf(tiny_config().to_hf() | {"rope_parameters": rope})


def test_configs_of_transformers_4_and_5_are_read_alike():
    config = tiny_config(rope_scaling=LLAMA3, rope_theta=5e5, tie_word_embeddings=True)
    four = config.to_hf()
    five = {k: v for k, v in four.items() if k not in ("rope_scaling", "rope_theta")}
    five["rope_parameters"] = {"rope_type": "llama3", "rope_theta": 5e5, **vars(LLAMA3)}
    assert ModelConfig.from_hf(four) == ModelConfig.from_hf(five) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; supported: "),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be a positive number"),
        ({"num_key_value_heads": -1}, "num_key_value_heads is -1; it must be a positive number"),
        ({"num_attention_heads": 0, "head_dim": None}, "a field has a value that cannot be"),
        ({"hidden_size": "many"}, "a field has a value that cannot be"),
        ({"vocab_size": float("inf")}, "a field has a value that cannot be"),
        ({"hidden_size": 10**30}, "it must be a positive number of usual size"),
        ({"rope_scaling": "abc"}, "a field has a value that cannot be"),
        ({"rope_scaling": [1]}, "a field has a value that cannot be"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "field 'low_freq_factor' is missing"),
    ],
)
def test_a_config_that_makes_no_sense_is_an_error(change, message):
    with pytest.raises(InputError, match=message):
        ModelConfig.from_hf(tiny_config().to_hf() | change)


def test_a_missing_field_is_an_error():
    raw = tiny_config().to_hf()
    del raw["intermediate_size"]
    with pytest.raises(InputError, match="field 'intermediate_size' is missing"):
        ModelConfig.from_hf(raw)
