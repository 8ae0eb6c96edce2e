"""Hugging Face folders of random weights, by hand or by transformers, and what is read or refused of them."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from adaptrm.models import ModelConfig


def hf_tensors(config: ModelConfig, dtype="float32", head: str | None = "lm_head", labels: int = 1, seed: int = 0):
    """Random tensors under the names and shapes of Hugging Face, written out by hand."""
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
        if config.model_type == "qwen2" or config.attention_bias:
            shapes |= {f"{layer}self_attn.{p}_proj.bias": (kv if p in "kv" else heads,) for p in "qkv"}
        if config.attention_bias:
            shapes[f"{layer}self_attn.o_proj.bias"] = (hidden,)
        if config.mlp_bias:
            shapes |= {f"{layer}mlp.{p}_proj.bias": (hidden if p == "down" else inner,) for p in ("gate", "up", "down")}
        if config.model_type == "qwen3":
            shapes |= {f"{layer}self_attn.{p}_norm.weight": (config.head_dim,) for p in "qk"}
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


def write_config(folder: Path, config: ModelConfig) -> Path:
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    return folder


def hf_model(folder, kind: str, config: ModelConfig, seed: int = 0, **extra):
    """A random transformers model, saved to ``folder``; attention is far from uniform, norms and biases are seen."""
    torch = pytest.importorskip("torch")
    import transformers

    torch.manual_seed(seed)
    raw = {k: v for k, v in config.to_hf().items() if k not in ("model_type", "rope_scaling")}
    rope = {"rope_type": "default"}
    if config.rope_scaling is not None:
        rope = {"rope_type": "llama3", **vars(config.rope_scaling)}
    rope["rope_theta"] = raw.pop("rope_theta")
    name = config.family.name
    model = getattr(transformers, f"{name}{kind}")(
        getattr(transformers, f"{name}Config")(
            **raw,
            rope_parameters=rope,
            initializer_range=config.hidden_size**-0.5,
            attn_implementation="eager",
            **extra,
        )
    ).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight += 0.1 * torch.randn_like(weight)
            if "bias" in name:
                assert not weight.any()  # transformers starts them at zero
                weight += 0.2 * torch.randn_like(weight)
    model.save_pretrained(folder)
    return model
