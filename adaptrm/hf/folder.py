"""Hugging Face folders: where they are, their config, and what the headers of their weights say."""

import os
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptrm import paths
from adaptrm.errors import InputError
from adaptrm.hf.cache import local_copy
from adaptrm.hf.weight_file import Stored, read_header
from adaptrm.models.config import ModelConfig, read_json

HEAD = "score.weight"


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
        patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "README.md"]
        # Mistral's folders hold their weights a second time, in another layout.
        return Path(snapshot_download(str(model), allow_patterns=patterns, ignore_patterns="consolidated*"))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as wrong:
        reason = str(wrong).splitlines()[0][:200]
        raise InputError(
            f"{model}: no such folder, and the hub does not give it ({reason}); check the name, or the network"
        ) from None


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
    def label_names(self) -> tuple[str, ...]:
        """Names of a classifier's labels in their order, by ``id2label``; none where it does not say.

        Raises:
            InputError: it names other labels than 0, 1, 2, ...
        """
        named = self.raw.get("id2label")
        if named is None:
            return ()
        numbers = map(str, range(len(named))) if isinstance(named, dict) else ()
        names = tuple(named.get(number) for number in numbers)
        if not names or not all(isinstance(name, str) for name in names):
            raise InputError(f"{self.path / 'config.json'}: id2label must name the labels 0, 1, 2 and so on")
        return names

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
        found = read_header(file)
        if twice := sorted(found.keys() & stored.keys()):
            raise InputError(f"{file}: tensor {listed(twice)} is in {stored[twice[0]].file.name} too")
        stored |= found
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


def listed(names: Sequence[str], most: int = 6) -> str:
    """The first names and how many more there are, on one line."""
    shown = [name if name.isprintable() and len(name) < 200 else reprlib.repr(name) for name in names[:most]]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(shown) + more or "none"
