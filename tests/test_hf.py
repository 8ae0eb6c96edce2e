"""Hugging Face folders: what is read, and what is written back."""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from folders import hf_model, hf_tensors, raw_tensors, write_config, write_folder
from ml_dtypes import bfloat16
from tiny import LLAMA3, tiny_config

from adaptrm.errors import InputError
from adaptrm.hf import load_weights, open_folder, save_weights
from adaptrm.hf.export import model_config, write_json
from adaptrm.models import CausalLM, ModelConfig, SequenceClassifier
from adaptrm.parallel import make_mesh

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# Each with every tensor that the family can have.
FAMILY_FIELDS = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"attention_bias": True},
}


@pytest.mark.parametrize(
    ("family", "dtype", "shards", "tied"),
    [(family, dtype, 3, False) for family in FAMILY_FIELDS for dtype in ("float32", bfloat16, "float16")]
    + [("llama", bfloat16, 1, True), ("qwen3", bfloat16, 1, True)],
)
def test_load_then_export_gives_the_same_tensors(tmp_path, family, dtype, shards, tied):
    # Twelve layers: names sort as text, and layer 10 is not the third.
    fields = {"model_type": family, **FAMILY_FIELDS[family]}
    config = tiny_config(num_hidden_layers=12, head_dim=16, tie_word_embeddings=tied, **fields)
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


@pytest.mark.parametrize("labels", [1, 7])
@pytest.mark.parametrize("family", FAMILY_FIELDS)  # Qwen2.5 is a qwen2
def test_a_classifier_goes_out_as_it_came_in(tmp_path, one_device, family, labels):
    config = tiny_config(model_type=family, head_dim=16, **FAMILY_FIELDS[family])
    source = write_folder(tmp_path / "in", config, hf_tensors(config, bfloat16, "score", labels=labels))
    folder = open_folder(source)
    assert folder.is_classifier
    _, state, _ = load_weights(folder, SequenceClassifier, one_device, num_labels=labels)
    save_weights(state, tmp_path / "out")
    assert raw_tensors(tmp_path / "out") == raw_tensors(source)


@pytest.mark.parametrize("shape", [(1, 2, 4), (2, 2, 2), (1, 8, 1)])
def test_a_published_reward_model_keeps_its_vocabulary_on_any_mesh(tmp_path, shape):
    # Skywork's Llama 3.1: one row more for the pad token, so that no mesh axis divides the vocabulary; some folders
    # still carry the vocabulary head.
    config = tiny_config(vocab_size=128257, hidden_size=16)
    tensors = hf_tensors(config, bfloat16, "score")
    head = {"lm_head.weight": np.zeros((config.vocab_size, config.hidden_size), bfloat16)}
    fields = {"pad_token_id": 128256, "id2label": {"0": "LABEL_0"}, "architectures": ["LlamaForSequenceClassification"]}
    source = write_folder(tmp_path / "in", config, tensors | head, 3, **fields)
    _, state, read = load_weights(open_folder(source), SequenceClassifier, make_mesh(*shape))
    embedding = state["model"]["embed_tokens"]["weight"][...]
    assert read.vocab_size == 128257 and embedding.sharding.shard_shape(embedding.shape) == (128257, 16 // shape[1])
    save_weights(state, tmp_path / "out")
    before = raw_tensors(source)
    del before["lm_head.weight"]
    assert raw_tensors(tmp_path / "out") == before


@pytest.mark.parametrize(("written", "meant"), [(0, 0), (447, 447), (-1, None), (None, None)])
def test_a_negative_pad_token_is_none(tmp_path, written, meant):
    folder = write_folder(tmp_path, tiny_config(), hf_tensors(tiny_config(), head="score"), pad_token_id=written)
    assert open_folder(folder).pad_token_id == meant


def test_each_parameter_keeps_its_own_dtype(tmp_path, one_device):
    config = tiny_config(model_type="qwen3")
    kinds = {"norm": "float32", "embed": "float16"}
    tensors = {
        name: x.astype(next((dtype for part, dtype in kinds.items() if part in name), bfloat16))
        for name, x in hf_tensors(config).items()
    }
    source = write_folder(tmp_path / "in", config, tensors)
    _, state, _ = load_weights(open_folder(source), CausalLM, one_device)
    save_weights(state, tmp_path / "out")
    assert {dtype for dtype, *_ in raw_tensors(source).values()} == {"F32", "F16", "BF16"}
    assert raw_tensors(tmp_path / "out") == raw_tensors(source)
    # Layers lie in one array: one that differs needs a dtype to be read as.
    name = "model.layers.1.mlp.up_proj.weight"
    mixed = write_folder(tmp_path / "mixed", config, tensors | {name: tensors[name].astype("float32")})
    with pytest.raises(InputError, match=f"{name} is float32, other layers bfloat16; give a dtype"):
        load_weights(open_folder(mixed), CausalLM, one_device)
    _, state, _ = load_weights(open_folder(mixed), CausalLM, one_device, dtype="float32")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state)} == {"float32"}


@pytest.mark.parametrize("family", FAMILY_FIELDS)
def test_transformers_reads_an_exported_classifier_of_each_family(tmp_path, one_device, family):
    config = tiny_config(model_type=family, head_dim=16, **FAMILY_FIELDS[family])
    theirs = hf_model(tmp_path / "in", "ForSequenceClassification", config, num_labels=1, pad_token_id=0)
    folder = open_folder(tmp_path / "in")
    _, state, _ = load_weights(folder, SequenceClassifier, one_device)
    save_weights(state, tmp_path / "out")
    assert raw_tensors(tmp_path / "out") == raw_tensors(tmp_path / "in")  # as transformers named and wrote them
    raw = folder.raw | {"problem_type": "single_label_classification", "num_labels": 5}  # of what it was before
    write_json(tmp_path / "out" / "config.json", model_config(raw, 1, pad_token_id=0))

    import torch
    from transformers import AutoModelForSequenceClassification

    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    assert type(again) is type(theirs)
    ids = torch.arange(1, 41).reshape(2, 20)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, theirs(ids).logits)
    assert ModelConfig.from_hf(json.loads((tmp_path / "out" / "config.json").read_text())) == config


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


def test_configs_of_transformers_4_and_5_are_read_alike():
    config = tiny_config(rope_scaling=LLAMA3, rope_theta=5e5, tie_word_embeddings=True)
    four = config.to_hf()
    five = {k: v for k, v in four.items() if k not in ("rope_scaling", "rope_theta")}
    five["rope_parameters"] = {"rope_type": "llama3", "rope_theta": 5e5, **vars(LLAMA3)}
    assert ModelConfig.from_hf(four) == ModelConfig.from_hf(five) == config
    for raw in (four, five):
        assert ModelConfig.from_hf(model_config(raw, 1)) == config


@pytest.mark.parametrize("family", FAMILY_FIELDS)
def test_an_absent_field_is_what_transformers_takes_for_it(family):
    transformers = pytest.importorskip("transformers")
    sizes = {name: getattr(tiny_config(), name) for name in SIZES} | {"num_attention_heads": 32, "hidden_size": 512}
    window = {} if family == "llama" else {"sliding_window": None}
    theirs = transformers.AutoConfig.for_model(family, **sizes, **window)
    ours = ModelConfig.from_hf({"model_type": family, **sizes, **window})
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"] == 10000.0
    for name in ("num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings"):
        assert getattr(ours, name) == getattr(theirs, name), name
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert ours.head_dim == head_dim == (128 if family == "qwen3" else 16)
    # An explicit null is not the family's default.
    null = {"model_type": family, **sizes, **window, "num_key_value_heads": None}
    assert ModelConfig.from_hf(null).num_key_value_heads == 32


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": None, "layer_types": ["full_attention"] * 2}),
        ("mistral", {"attention_bias": True}),  # Mistral does not read it
        ("qwen2", {"sliding_window": 32768, "use_sliding_window": False, "max_window_layers": 1}),
        ("qwen2", {"sliding_window": 32768, "use_sliding_window": True}),  # from layer 28 on
        ("qwen2", {"sliding_window": 32768, "use_sliding_window": True, "max_window_layers": 2}),
        ("qwen2", {"sliding_window": None, "use_sliding_window": True, "max_window_layers": 0}),
        ("qwen3", {"layer_types": ["full_attention"] * 2, "sliding_window": 8, "use_sliding_window": True}),
        ("llama", {"pretraining_tp": 2, "use_cache": False, "attention_dropout": 0.1, "mlp_bias": None}),
        ("qwen2", {"rope_scaling": {"type": "default"}}),
        ("llama", {"auto_map": {"AutoTokenizer": ["tokenization.Own", None]}}),
    ],
)
def test_fields_that_are_not_in_force_are_accepted(family, fields):
    config = tiny_config(model_type=family)
    assert ModelConfig.from_hf(config.to_hf() | fields) == config
