"""Hugging Face folders that cannot be used, by accident or by design: one line each, and nothing of theirs is run."""

import json
import pickle
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from folders import hf_tensors, write_config, write_folder
from refusals import refused
from safetensors.numpy import save_file
from tiny import tiny_config, tiny_tokenizer

from adaptrm.data.chat import ChatTokenizer
from adaptrm.errors import InputError
from adaptrm.hf import load_weights, open_folder
from adaptrm.models import CausalLM, SequenceClassifier
from adaptrm.reward_model import RewardModel


@pytest.fixture
def folder(tmp_path) -> Path:
    """A whole causal language model in two shards."""
    return write_folder(tmp_path / "model", tiny_config(), hf_tensors(tiny_config()), shards=2)


# --- the index ----------------------------------------------------------------------------------------------------

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    "shard",
    [
        "../elsewhere.safetensors",
        "/etc/elsewhere.safetensors",
        "sub/elsewhere.safetensors",
        "..",
        "model.bin",
        "a\0.safetensors",
        "a\nb.safetensors",
        "\ud800.safetensors",
        pytest.param("x" * 5000 + ".safetensors", id="long name"),
        7,
        None,
        [],
    ],
)
def test_an_index_that_points_elsewhere_is_refused(folder, shard):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = shard
    (folder / INDEX).write_text(json.dumps(index))
    assert "is not the name of a safetensors file in this folder" in refused(open_folder, folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "must hold a JSON object"),
        ("{}", "has no weight_map"),
        ('{"weight_map": []}', "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        pytest.param("[" * 100_000, "not valid JSON", id="deep list"),
        pytest.param('{"weight_map":' * 100_000, "not valid JSON", id="deep object"),
        (b"\xff\xfe", "not valid JSON"),
    ],
)
def test_an_index_that_is_none_is_refused(folder, content, message):
    (folder / INDEX).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert f"{INDEX}: {message}" in refused(open_folder, folder)


def test_an_index_that_does_not_describe_its_shards_is_refused(folder):
    text = (folder / INDEX).read_text()
    index = json.loads(text)
    name = next(name for name, shard in index["weight_map"].items() if shard == FIRST)
    index["weight_map"][name] = SECOND
    (folder / INDEX).write_text(json.dumps(index))
    assert f"{INDEX}: says that {name} is in {SECOND}, which lacks it" in refused(open_folder, folder)
    index["weight_map"] |= {name: FIRST, "model.ghost.weight": FIRST}
    (folder / INDEX).write_text(json.dumps(index))
    assert f"{INDEX}: says that model.ghost.weight is in {FIRST}, which lacks it" in refused(open_folder, folder)
    (folder / INDEX).write_text(text)
    whole = (folder / SECOND).read_bytes()
    (folder / SECOND).write_bytes((folder / FIRST).read_bytes())
    assert f"is in {FIRST} too" in refused(open_folder, folder)
    (folder / SECOND).unlink()
    assert f"{SECOND}: missing; download it again" in refused(open_folder, folder)
    # The hub's own cache is made of links.
    (folder / "blob").write_bytes(whole)
    (folder / SECOND).symlink_to(folder / "blob")
    assert len(open_folder(folder).tensors) == len(index["weight_map"]) - 1


def test_one_file_is_taken_before_an_index_as_transformers_does(folder):
    save_file(hf_tensors(tiny_config()), folder / "model.safetensors")
    assert {stored.file.name for stored in open_folder(folder).tensors.values()} == {"model.safetensors"}


# --- the weights --------------------------------------------------------------------------------------------------


def safetensors(header, data: bytes = b"", size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict:
    return {"model.norm.weight": {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x08",
        safetensors(b"{}", size=1000),
        safetensors(b"{}", size=2**63),
        safetensors(b"not json"),
        pytest.param(safetensors(b'{"a":' * 100_000), id="deep"),
        safetensors(b'{"\xff": 1}'),
        safetensors(entry([4], 0, 16), bytes(8)),
        safetensors(entry([4], 8, 24), bytes(16)),
        safetensors(entry([4], -16, 0), bytes(16)),
        safetensors(entry([2**40], 0, 2**42), bytes(16)),
        safetensors(entry([2**60, 2**60], 0, 16), bytes(16)),
        safetensors(entry([4], 0, 16, "Q4\nQ5"), bytes(16)),
    ],
)
def test_a_broken_file_is_refused(tmp_path, content):
    write_config(tmp_path, tiny_config())
    (tmp_path / "model.safetensors").write_bytes(content)
    assert "model.safetensors: not a whole safetensors file" in refused(open_folder, tmp_path)


def test_a_truncated_file_is_refused(folder):
    content = (folder / SECOND).read_bytes()
    for length in (4, 100, len(content) - 1):
        (folder / SECOND).write_bytes(content[:length])
        assert f"{SECOND}: not a whole safetensors file" in refused(open_folder, folder)


def test_nothing_is_read_or_allocated_before_shapes_are_checked(tmp_path, one_device):
    # A shape that no memory holds, in a file of a few bytes.
    config = tiny_config()
    folder = write_folder(tmp_path, config, hf_tensors(config))
    header = json.loads((folder / "model.safetensors").read_bytes()[8:].split(b"}}")[0] + b"}}")
    assert header["model.norm.weight"]["shape"] == [32]
    nothing = {name: {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]} for name in header}
    (folder / "model.safetensors").write_bytes(safetensors(nothing))
    message = refused(load_weights, open_folder(folder), CausalLM, one_device)
    assert "has shape (0, 4611686018427387904), config.json says" in message


@pytest.mark.parametrize("dtype", ["F64", "F8_E4M3", "I8", "U8", "BOOL", "F4"])
def test_quantised_or_other_dtypes_are_refused(tmp_path, one_device, dtype):
    bits = {"F64": 64, "F4": 4}.get(dtype, 8)
    config = tiny_config()
    header, end = {}, 0
    for name, tensor in hf_tensors(config).items():
        start, end = end, end + tensor.size * bits // 8
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    write_config(tmp_path, config)
    (tmp_path / "model.safetensors").write_bytes(safetensors(header, bytes(end)))
    message = refused(load_weights, open_folder(tmp_path), CausalLM, one_device)
    assert f"is {dtype}; weights must be one of F32, F16, BF16, not quantised" in message


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_a_pickle_is_never_read(tmp_path, name):
    class Attack:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "run",))

    write_config(tmp_path, tiny_config())
    (tmp_path / name).write_bytes(pickle.dumps(Attack()))
    message = refused(open_folder, tmp_path)
    assert f"model.safetensors: missing; {name} is a pickle, which may run code and is never read" in message
    assert not (tmp_path / "run").exists()


def test_folders_without_config_or_weights_are_refused(tmp_path):
    assert "no config.json here" in refused(open_folder, tmp_path)
    write_config(tmp_path, tiny_config())
    assert "model.safetensors: missing; only safetensors are read" in refused(open_folder, tmp_path)


# --- tensors that are not those of the model ----------------------------------------------------------------------


def test_tensors_that_do_not_belong_are_listed(tmp_path, one_device):
    config = tiny_config()
    tensors = hf_tensors(config)
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
        del tensors[name]
    for name in ("model.layers.0.self_attn.q_proj.bias", "model.layers.2.mlp.up_proj.weight"):
        tensors[name] = np.zeros(4, np.float32)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)  # old files hold this; unused
    message = refused(load_weights, open_folder(write_folder(tmp_path, config, tensors)), CausalLM, one_device)
    assert "missing: model.layers.1.mlp.up_proj.weight, model.norm.weight;" in message
    expected = "left over: model.layers.0.self_attn.q_proj.bias, model.layers.2.mlp.up_proj.weight"
    assert message.endswith(expected)


def test_hundreds_of_missing_tensors_are_counted(tmp_path, one_device):
    tensors = {f"transformer.h.{i}\n.weight": np.zeros(1, np.float32) for i in range(500)}
    folder = write_folder(tmp_path, tiny_config(num_hidden_layers=100), tensors)
    message = refused(load_weights, open_folder(folder), CausalLM, one_device)
    assert "missing: lm_head.weight, model.embed_tokens.weight, model.layers.0.input_layernorm.weight, " in message
    assert " and 897 more; left over: 'transformer.h.0\\n.weight', " in message
    assert message.endswith(" and 494 more")


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
    assert re.search(message, refused(load_weights, open_folder(folder), CausalLM, one_device))


@pytest.mark.parametrize(
    ("family", "fields", "name"),
    [
        ("llama", {"attention_bias": True}, "self_attn.k_proj.bias"),
        ("llama", {"mlp_bias": True}, "mlp.down_proj.bias"),
        ("qwen2", {}, "self_attn.k_proj.bias"),
        ("qwen3", {}, "self_attn.k_norm.weight"),
    ],
)
def test_biases_and_norms_that_are_missing_or_not_expected_are_errors(tmp_path, one_device, family, fields, name):
    plain, special = tiny_config(), tiny_config(model_type=family, **fields)
    folder = write_folder(tmp_path / "lacks", special, hf_tensors(plain))
    assert f"missing: model.layers.0.{name}" in refused(load_weights, open_folder(folder), CausalLM, one_device)
    folder = write_folder(tmp_path / "has", plain, hf_tensors(special))
    assert f"left over: model.layers.0.{name}" in refused(load_weights, open_folder(folder), CausalLM, one_device)


def test_a_tied_head_that_differs_from_the_embedding_is_an_error(tmp_path, one_device):
    config = tiny_config(tie_word_embeddings=True)
    tensors = hf_tensors(config)
    folder = open_folder(write_folder(tmp_path / "differs", config, tensors))
    message = refused(load_weights, folder, CausalLM, one_device)
    assert "tie_word_embeddings is true in config.json, but lm_head.weight is stored and differs" in message
    load_weights(folder, SequenceClassifier, one_device, new_head_seed=0)  # which has no vocabulary head
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    load_weights(open_folder(write_folder(tmp_path / "same", config, tensors)), CausalLM, one_device)


@pytest.mark.parametrize(
    ("heads", "fields", "message"),
    [
        ({"score.weight": (2, 32)}, {}, "score.weight gives 2 labels, 1 needed; a reward model has one"),
        ({"score.weight": (1, 32)}, {"num_labels": 2}, "config.json names 2 labels .* score.weight has 1"),
        ({"score.weight": (1, 32)}, {"id2label": {"0": "a", "1": "b", "2": "c"}}, "config.json names 3 labels"),
        ({"score.weight": (2, 32)}, {"id2label": {"0": "a"}}, "config.json names 1 labels .* score.weight has 2"),
        ({"score.weight": (1, 32), "score.bias": (1,)}, {}, "missing: none; left over: score.bias"),
        ({"v_head.summary.weight": (1, 32)}, {}, "no score.weight; its head is v_head.summary.weight; only a linear"),
        ({"regression_layer.weight": (1, 32)}, {}, "no score.weight; its head is regression_layer.weight; only a"),
        ({"lm_head.weight": (448, 32)}, {}, "no score.weight; this is not a reward model, train one from it first"),
        ({}, {}, "no score.weight; this is not a reward model, train one from it first"),
    ],
)
def test_heads_that_are_not_one_reward_are_errors(tmp_path, one_device, heads, fields, message):
    tensors = hf_tensors(tiny_config(), head=None) | {name: np.ones(shape, "float32") for name, shape in heads.items()}
    folder = write_folder(tmp_path, tiny_config(), tensors, **fields)
    assert re.search(message, refused(RewardModel.from_pretrained, folder, mesh=one_device))


@pytest.mark.parametrize("pad", [448, 10**30, "0", [0], 1.5, True])
def test_a_pad_token_that_is_none_is_an_error(tmp_path, pad):
    folder = write_folder(tmp_path, tiny_config(), hf_tensors(tiny_config(), head="score"), pad_token_id=pad)
    assert "config.json: pad_token_id is " in refused(RewardModel.from_pretrained, folder)


# --- config.json and code --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("", "not valid JSON"),
        ("[1]", "must hold a JSON object"),
        ("null", "must hold a JSON object"),
        pytest.param('{"a":' * 100_000, "not valid JSON", id="deep"),
        pytest.param('{"vocab_size": ' + "9" * 5000 + "}", "not valid JSON", id="long number"),
        (b"\xff\xfe\xfd", "not valid JSON"),
    ],
)
def test_a_config_that_is_no_json_object_is_refused(folder, content, message):
    (folder / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert f"config.json: {message}" in refused(open_folder, folder)


def test_code_in_the_folder_is_never_run(folder, one_device):
    tiny_tokenizer(folder)
    (folder / "own.py").write_text(f"open({str(folder / 'run')!r}, 'w')\nclass Own: pass\n")
    own = {"auto_map": {"AutoConfig": "own.Own", "AutoTokenizer": ["own.Own", "own.Own"]}}
    for name in ("config.json", "tokenizer_config.json"):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | own))
    try:
        ChatTokenizer.from_folder(folder)
    except InputError as refused:
        assert str(refused).isprintable()
    load_weights(open_folder(folder), CausalLM, one_device)
    assert not (folder / "run").exists()
