"""Weights from Hugging Face safetensors, tensor by tensor, onto the mesh."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open

from adaptrm import paths
from adaptrm.errors import InputError
from adaptrm.hf.cache import local_copy
from adaptrm.hf.keys import Key, key_table
from adaptrm.models.config import ModelConfig, read_config_json
from adaptrm.models.decoder import CausalLM, SequenceClassifier
from adaptrm.parallel import place, sharding


def resolve_model(model: str | os.PathLike) -> Path:
    """The local folder of MODEL: a Hugging Face folder, a run of ours (its ``export/``), or a hub name.

    Raises:
        InputError: there is no such folder, or the hub or the store cannot be reached.
    """
    if not paths.is_local(model):
        for candidate in (model, paths.join(model, "export")):
            if paths.exists(paths.join(candidate, "config.json")):
                return local_copy(candidate)
        raise InputError(f"{model}: no config.json here or in export/; give a Hugging Face folder or a finished run")
    folder = Path(model)
    for candidate in (folder, folder / "export"):
        if (candidate / "config.json").is_file():
            return candidate
    if folder.exists():
        raise InputError(f"{model}: no config.json here or in export/; give a Hugging Face folder or a finished run")
    if str(model).count("/") > 1 or str(model).startswith((".", "/", "~")):
        raise InputError(f"{model}: this folder does not exist; check the path")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
        return Path(snapshot_download(str(model), allow_patterns=patterns))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as wrong:
        reason = str(wrong).splitlines()[0][:200]
        raise InputError(
            f"{model}: no such folder, and the hub does not give it ({reason}); check the name, or the network"
        ) from None


@dataclass(frozen=True)
class Folder:
    """A Hugging Face folder: its raw config, and in which file each tensor lies."""

    path: Path
    raw: dict[str, Any]
    files: dict[str, Path]

    @property
    def config(self) -> ModelConfig:
        return ModelConfig.from_hf(self.raw, str(self.path / "config.json"))

    @property
    def is_classifier(self) -> bool:
        return "score.weight" in self.files


def open_folder(model: str | os.PathLike) -> Folder:
    """Read config and tensor index of MODEL.

    Raises:
        InputError: no safetensors, a broken file, or an index that points outside the folder.
    """
    path = resolve_model(model)
    raw = read_config_json((path / "config.json").read_bytes(), str(path / "config.json"))
    index = path / "model.safetensors.index.json"
    files: dict[str, Path] = {}
    if index.is_file():
        try:
            weight_map = json.loads(index.read_bytes())["weight_map"]
            shards = sorted({str(shard) for shard in weight_map.values()})
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{index}: not a safetensors index; download the model again") from None
        for shard in shards:
            if Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise InputError(f"{index}: {shard!r} is not the name of a safetensors file in this folder")
    else:
        shards = ["model.safetensors"]
    for shard in shards:
        if not (path / shard).is_file():
            raise InputError(f"{path / shard}: missing; only safetensors are read, convert other formats first")
        with _open(path / shard) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                if name in files:
                    raise InputError(f"{path / shard}: tensor {name} is in {files[name].name} too")
                files[name] = path / shard
    return Folder(path, raw, files)


def _open(file: Path):
    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as wrong:
        raise InputError(f"{file}: not a whole safetensors file ({wrong}); download it again") from None


def load_weights(
    folder: Folder,
    model_type: type[CausalLM] | type[SequenceClassifier],
    mesh: Mesh,
    *,
    num_labels: int = 1,
    dtype: str | None = None,
    new_head_seed: int | None = None,
    vocab_size: int | None = None,
) -> tuple[nnx.GraphDef, nnx.State, ModelConfig]:
    """Build a model and fill it, each parameter placed on the mesh by the table of logical axes.

    Args:
        dtype: of the parameters; None keeps what is stored.
        new_head_seed: make a fresh ``score`` head where the folder has none (a causal language model).
        vocab_size: at least the folder's; rows that the folder does not have are the mean of the others.

    Raises:
        InputError: tensors are missing or left over (all are listed), or a shape is not what the config says.
    """
    config = folder.config
    if vocab_size is not None and vocab_size != config.vocab_size:
        config = ModelConfig(**{**vars(config), "vocab_size": vocab_size})
    definition, abstract = abstract_model(model_type, config, num_labels)
    table = key_table(abstract)
    wanted = {name for key in table for name in key.names}
    stored = {name for name in folder.files if not name.endswith("rotary_emb.inv_freq")}
    fresh = {"score.weight"} if new_head_seed is not None and not folder.is_classifier else set()
    unused = {"lm_head.weight"} if model_type is SequenceClassifier or config.tie_word_embeddings else set()
    missing, left_over = sorted(wanted - stored - fresh), sorted(stored - wanted - unused)
    if missing or left_over:
        raise InputError(
            f"{folder.path}: the tensors are not those of {model_type.__name__}; "
            f"missing: {', '.join(missing) or 'none'}; left over: {', '.join(left_over) or 'none'}"
        )
    axes = logical_axes(definition, abstract)
    flat = {}
    for key in table:
        if key.names[0] in fresh:
            noise = np.random.default_rng(new_head_seed).standard_normal(key.shape)
            value = (noise * config.hidden_size**-0.5).astype(dtype or "float32")
        else:
            value = _read(folder, key, dtype, more_rows=config.vocab_size - folder.config.vocab_size)
        flat[key.path] = place(value, sharding(mesh, key.shape, axes[key.path]))
    state = jax.tree.map(lambda leaf: leaf, abstract)
    for path, variable in nnx.to_flat_state(state):
        variable.set_value(flat[path])
    return definition, state, config


def abstract_model(model_type, config: ModelConfig, num_labels: int = 1) -> tuple[nnx.GraphDef, nnx.State]:
    """Definition and shapes of a model, with nothing allocated."""
    extra = {"num_labels": num_labels} if model_type is SequenceClassifier else {}
    return nnx.split(nnx.eval_shape(lambda: model_type(config, nnx.Rngs(0), **extra)))


def logical_axes(definition: nnx.GraphDef, abstract: nnx.State) -> dict[tuple, tuple[str, ...]]:
    """The logical axes of every parameter by its path; each parameter's module names them."""
    model = nnx.merge(definition, abstract)
    axes = {}
    for path, module in nnx.iter_modules(model):
        if hasattr(module, "axes"):
            axes[(*path, "weight")] = tuple(module.axes)
    unnamed = [path for path, _ in nnx.to_flat_state(abstract) if path not in axes]
    if unnamed:
        raise ValueError(f"parameters without logical axes: {unnamed}")
    return axes


def _read(folder: Folder, key: Key, dtype: str | None, more_rows: int) -> np.ndarray:
    """One parameter, layer by layer into one array; ``more_rows`` of the vocabulary are not stored."""
    out: np.ndarray | None = None
    for i, name in enumerate(key.names):
        with _open(folder.files[name]) as tensors:
            tensor = tensors.get_tensor(name)
        expected = key.tensor_shape
        missing = more_rows if name.endswith(("embed_tokens.weight", "lm_head.weight")) else 0
        if tensor.shape != (expected[0] - missing, *expected[1:]):
            raise InputError(f"{folder.files[name]}: {name} has shape {tensor.shape}, config.json says {expected}")
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise InputError(f"{folder.files[name]}: {name} is {tensor.dtype}; quantised weights are not supported")
        if missing:
            mean = tensor.astype(np.float32).mean(axis=0, keepdims=True).astype(tensor.dtype)
            tensor = np.concatenate([tensor, np.repeat(mean, missing, axis=0)])
        if out is None:
            out = np.empty((len(key.names), *key.tensor_shape), dtype or tensor.dtype)
        elif dtype is None and tensor.dtype != out.dtype:
            raise InputError(f"{folder.files[name]}: {name} is {tensor.dtype}, other layers {out.dtype}; give a dtype")
        out[i] = tensor
    return out.reshape(key.shape)
