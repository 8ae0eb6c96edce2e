"""Weights from Hugging Face safetensors, tensor by tensor, onto the mesh."""

import os
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open

from adaptrm import paths
from adaptrm.errors import InputError
from adaptrm.hf.cache import local_copy
from adaptrm.hf.keys import Key, key_table
from adaptrm.models.config import ModelConfig, label_count, read_json
from adaptrm.models.decoder import CausalLM, SequenceClassifier
from adaptrm.parallel import place, sharding

HEAD = "score.weight"
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
DTYPES = ("F32", "F16", "BF16")


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
        patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt"]
        # Mistral's folders hold their weights a second time, in another layout.
        return Path(snapshot_download(str(model), allow_patterns=patterns, ignore_patterns="consolidated*"))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as wrong:
        reason = str(wrong).splitlines()[0][:200]
        raise InputError(
            f"{model}: no such folder, and the hub does not give it ({reason}); check the name, or the network"
        ) from None


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies, and what the header of its file says of it.

    Attributes:
        dtype: as safetensors spells it.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]

    def read(self, name: str) -> np.ndarray:
        with _open(self.file) as tensors:
            return tensors.get_tensor(name)


@dataclass(frozen=True)
class Folder:
    """A Hugging Face folder: its raw config, and its tensors by their names."""

    path: Path
    raw: dict[str, Any]
    tensors: dict[str, Stored]

    @property
    def config(self) -> ModelConfig:
        return ModelConfig.from_hf(self.raw, str(self.path / "config.json"))

    @property
    def is_classifier(self) -> bool:
        return HEAD in self.tensors

    @property
    def pad_token_id(self) -> int | None:
        """The id at which transformers looks for the end of a text; a negative one, as old folders have it, is none.

        Raises:
            InputError: it is no token of the vocabulary.
        """
        pad, vocab = self.raw.get("pad_token_id"), self.config.vocab_size
        if pad is not None and (type(pad) is not int or pad >= vocab):
            shown = reprlib.repr(pad)
            raise InputError(f"{self.path / 'config.json'}: pad_token_id is {shown}; the vocabulary has {vocab} tokens")
        return None if pad is None or pad < 0 else pad

    @property
    def other_heads(self) -> list[str]:
        """Tensors of heads that are neither ``score`` without a bias nor a vocabulary."""
        known = (HEAD, "lm_head.weight")
        return sorted(name for name in self.tensors if not name.startswith("model.") and name not in known)


def open_folder(model: str | os.PathLike) -> Folder:
    """Read the config of MODEL and the headers of its weights.

    Raises:
        InputError: no safetensors, a broken file, or an index that does not describe the files of this folder.
    """
    path = resolve_model(model)
    raw = read_json((path / "config.json").read_bytes(), str(path / "config.json"))
    index, single = path / "model.safetensors.index.json", path / "model.safetensors"
    weight_map = _weight_map(index) if index.is_file() and not single.is_file() else None
    shards = [single.name] if weight_map is None else sorted(set(weight_map.values()))
    stored: dict[str, Stored] = {}
    for shard in shards:
        file = path / shard
        if not file.is_file():
            raise InputError(f"{file}: missing; {_other_weights(path) if weight_map is None else 'download it again'}")
        with _open(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                if name in stored:
                    raise InputError(f"{file}: tensor {listed([name])} is in {stored[name].file.name} too")
                view = tensors.get_slice(name)
                stored[name] = Stored(file, view.get_dtype(), tuple(view.get_shape()))
    for name, shard in (weight_map or {}).items():
        if name not in stored or stored[name].file.name != shard:
            raise InputError(
                f"{index}: says that {listed([name])} is in {shard}, which lacks it; download the model again"
            )
    return Folder(path, raw, stored)


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor -> file name of a sharded model, each a name in the index's own folder."""
    weight_map = read_json(index.read_bytes(), str(index)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: has no weight_map; download the model again")
    for shard in weight_map.values():
        plain = isinstance(shard, str) and shard.isprintable() and len(shard) < 256
        if not plain or Path(shard).name != shard or not shard.endswith(".safetensors"):
            shown = reprlib.repr(shard)
            raise InputError(f"{index}: {shown} is not the name of a safetensors file in this folder")
    return weight_map


def _other_weights(path: Path) -> str:
    """What to do about a folder without safetensors."""
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        return f"{pickles[0]} is a pickle, which may run code and is never read; convert it to safetensors first"
    return "only safetensors are read; convert other formats first"


def _open(file: Path):
    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as wrong:
        reason = str(wrong).splitlines()[0][:200]
        raise InputError(f"{file}: not a whole safetensors file ({reason}); download it again") from None


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
        InputError: tensors are missing or left over, or a shape or dtype is not what the config says.
    """
    config = folder.config
    if vocab_size is not None and vocab_size != config.vocab_size:
        config = ModelConfig(**{**vars(config), "vocab_size": vocab_size})
    definition, abstract = abstract_model(model_type, config, num_labels)
    table = key_table(abstract)
    fresh = {HEAD} if new_head_seed is not None and not folder.is_classifier else set()
    _check_tensors(folder, table, fresh, model_type, config.vocab_size - folder.config.vocab_size)
    axes = logical_axes(definition, abstract)
    flat = {}
    for key in table:
        if key.names[0] in fresh:
            noise = np.random.default_rng(new_head_seed).standard_normal(key.shape)
            value = (noise * config.hidden_size**-0.5).astype(dtype or "float32")
        else:
            value = _read(folder, key, dtype)
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
            if module.bias is not None:
                axes[(*path, "bias")] = tuple(module.axes[: module.bias.ndim])
    unnamed = [path for path, _ in nnx.to_flat_state(abstract) if path not in axes]
    if unnamed:
        raise ValueError(f"parameters without logical axes: {unnamed}")
    return axes


def _check_tensors(folder: Folder, table: list[Key], fresh: set[str], model_type, more_rows: int) -> None:
    """Raise ``InputError`` where the stored tensors are not those of the table, before any of them is read.

    Args:
        fresh: tensors that need not be stored.
        more_rows: of the vocabulary, that are not stored.
    """
    shapes = {name: key.tensor_shape for key in table for name in key.names if name not in fresh}
    tied = folder.config.tie_word_embeddings
    unused = {"lm_head.weight"} if model_type is SequenceClassifier or tied else set()
    stored = {name for name in folder.tensors if not name.endswith("rotary_emb.inv_freq")}
    missing, left_over = sorted(shapes.keys() - stored), sorted(stored - shapes.keys() - unused)
    if missing or left_over:
        raise InputError(
            f"{folder.path}: the tensors are not those of {folder.config.family.name} {model_type.__name__}; "
            f"missing: {listed(missing)}; left over: {listed(left_over)}"
        )
    if HEAD in shapes:
        _check_labels(folder, shapes[HEAD][0])
    for name, expected in shapes.items():
        found = folder.tensors[name]
        if name in VOCABULARY:
            expected = (expected[0] - more_rows, *expected[1:])
        if found.shape != expected:
            raise InputError(f"{found.file}: {name} has shape {found.shape}, config.json says {expected}")
        if found.dtype not in DTYPES:
            raise InputError(
                f"{found.file}: {name} is {found.dtype}; weights must be one of {', '.join(DTYPES)}, not quantised"
            )
    if model_type is CausalLM and tied and "lm_head.weight" in stored:
        # Where they differ, versions of transformers do, too, in which of the two they take.
        embedding, head = (folder.tensors[name] for name in VOCABULARY)
        alike = (head.dtype, head.shape) == (embedding.dtype, embedding.shape)
        if not alike or not np.array_equal(*(folder.tensors[name].read(name) for name in VOCABULARY)):
            raise InputError(
                f"{folder.path}: tie_word_embeddings is true in config.json, but lm_head.weight is stored and differs "
                "from model.embed_tokens.weight; set it to false, or remove lm_head.weight"
            )


def _check_labels(folder: Folder, wanted: int) -> None:
    found = folder.tensors[HEAD]
    rows, told = found.shape[0] if found.shape else 0, label_count(folder.raw)
    if told is not None and told != rows:
        raise InputError(f"{folder.path}: config.json names {told} labels (id2label, num_labels), {HEAD} has {rows}")
    if rows != wanted:
        raise InputError(f"{folder.path}: {HEAD} gives {rows} labels, {wanted} needed; a reward model has one")


def listed(names: Sequence[str], most: int = 6) -> str:
    """The first names and how many more there are, on one line."""
    shown = [name if name.isprintable() and len(name) < 200 else reprlib.repr(name) for name in names[:most]]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(shown) + more or "none"


def _read(folder: Folder, key: Key, dtype: str | None) -> np.ndarray:
    """One parameter, layer by layer into one array; rows of the vocabulary that are not stored are the others' mean."""
    out: np.ndarray | None = None
    for i, name in enumerate(key.names):
        tensor = folder.tensors[name].read(name)
        if name in VOCABULARY and (missing := key.tensor_shape[0] - len(tensor)):
            mean = tensor.astype(np.float32).mean(axis=0, keepdims=True).astype(tensor.dtype)
            tensor = np.concatenate([tensor, np.repeat(mean, missing, axis=0)])
        if out is None:
            out = np.empty((len(key.names), *key.tensor_shape), dtype or tensor.dtype)
        elif dtype is None and tensor.dtype != out.dtype:
            file = folder.tensors[name].file
            raise InputError(f"{file}: {name} is {tensor.dtype}, other layers {out.dtype}; give a dtype")
        out[i] = tensor
    return out.reshape(key.shape)
