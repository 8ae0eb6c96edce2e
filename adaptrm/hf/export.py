"""A model of ours as a Hugging Face folder."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from adaptrm import paths
from adaptrm.hf.blocks import BLOCK_BYTES, Blocks, layout_of
from adaptrm.hf.keys import Key, key_table
from adaptrm.hf.weight_file import write_header
from adaptrm.models.config import FAMILIES, rope_parameters
from adaptrm.parallel.distributed import told_to_all

MAX_SHARD_BYTES = 4 << 30


def save_weights(state: nnx.State, out: str | os.PathLike, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write all parameters under their Hugging Face names, in shards of bounded size; process 0 writes.

    The folder's file names follow Hugging Face: ``model.safetensors``, or numbered shards with an index. Every process
    takes part in gathering each block; none holds more than one.

    Raises:
        InputError: a file cannot be written; in every process.
    """
    params = dict(nnx.to_flat_state(state))
    rows = {name: (name, key, layer) for key in key_table(state) for layer, name in enumerate(key.names)}
    sizes = {name: int(np.prod(key.tensor_shape)) * params[key.path].dtype.itemsize for name, key, _ in rows.values()}
    shards = cut_into_shards(sizes, max_shard_bytes)
    for file, names in shards.items():
        _write_file(Path(out) / file, [rows[name] for name in names], params)
    if jax.process_index() == 0:
        write_index(out, shards, sizes)


def cut_into_shards(sizes: Mapping[str, int], max_shard_bytes: int = MAX_SHARD_BYTES) -> dict[str, list[str]]:
    """The files of a model as Hugging Face names them, and the tensors in each, sorted by name.

    Args:
        sizes: bytes of each tensor; one that is larger than a shard has a file to itself.
    """
    shards: list[list[str]] = [[]]
    held = 0
    for name in sorted(sizes):
        if shards[-1] and held + sizes[name] > max_shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += sizes[name]
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{number:05d}-of-{len(shards):05d}.safetensors": names for number, names in enumerate(shards, 1)}


def write_index(out: str | os.PathLike, shards: Mapping[str, Sequence[str]], sizes: Mapping[str, int]) -> None:
    """Say which tensor is in which file; of one file nothing need be said."""
    if len(shards) == 1:
        return
    weight_map = {name: file for file, names in shards.items() for name in names}
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    write_json(Path(out) / "model.safetensors.index.json", index)


def _write_file(file: Path, tensors: list[tuple[str, Key, int]], params: dict) -> None:
    """Write tensors to one file, which appears whole or not at all; no more than a block of them is ever held.

    Args:
        tensors: name, row of the table, and layer of each.
    """
    gathered = _gathered(tensors, params)
    with told_to_all(file) as first:
        if not first:
            for _ in gathered:
                pass
            return
        try:
            with paths.writing(file) as stream:
                kinds = {name: (params[key.path].dtype, key.tensor_shape) for name, key, _ in tensors}
                begins = write_header(stream, kinds)
                for name, blocks, row, block in gathered:
                    rows = np.asarray(block).reshape(-1, *blocks.shape[blocks.axis + 1 :])
                    for part, at in blocks.parts(row):
                        stream.seek(begins[name] + at * rows[0].nbytes)
                        stream.write(rows[part].reshape(-1).view(np.uint8))
                    del block, rows  # before the next one is gathered
        except Exception:
            for _ in gathered:  # where the other processes wait for this one
                pass
            raise


def _gathered(tensors: list[tuple[str, Key, int]], params: dict) -> Iterator[tuple[str, Blocks, int, jax.Array]]:
    """Name, cut, first row and content of every block, by all processes together."""
    for name, key, layer in tensors:
        value = params[key.path][...]
        blocks = Blocks(key.shape, layout_of(value), key.stacked, value.dtype.itemsize, BLOCK_BYTES)
        for row in blocks.first_rows():
            yield name, blocks, row, blocks.gather(value, layer, row)


def model_config(raw: dict[str, Any], num_labels: int | None, **fields: Any) -> dict[str, Any]:
    """The ``config.json`` of what we trained, from that of the model it started from, for transformers 4 and 5.

    Args:
        num_labels: of a sequence classifier; None for a causal language model.
        fields: to set, such as ``pad_token_id``, ``vocab_size`` and ``torch_dtype``.
    """
    theta, rope = rope_parameters(raw, "config.json")
    scaling = None if rope["rope_type"] == "default" else rope
    # transformers 5 writes rope_parameters and dtype; transformers 4 reads the older names, and 5 reads those too.
    dropped = ("rope_parameters", "dtype", "_name_or_path", "_model_name_or_path", "auto_map", "transformers_version")
    labelled = ("id2label", "label2id", "num_labels", "problem_type")
    # What OpenRLHF and vLLM note of a head, which would be of one that is gone.
    other_heads = ("value_head_prefix", "normalize_reward", "mean", "std", "classifier_from_token", "method")
    kept = {k: v for k, v in raw.items() if k not in (*dropped, *labelled, *other_heads)}
    family = FAMILIES[raw["model_type"]].name
    labels = {} if num_labels is None else {f"LABEL_{i}": i for i in range(num_labels)}
    if num_labels is not None:
        kept |= {"id2label": {str(i): label for label, i in labels.items()}, "label2id": labels}
    # One label is a score: without this vLLM and the text-classification pipeline give out its sigmoid.
    if num_labels == 1:
        kept["problem_type"] = "regression"
    task = "ForCausalLM" if num_labels is None else "ForSequenceClassification"
    return kept | {"architectures": [family + task], "rope_theta": theta, "rope_scaling": scaling, **fields}


def write_json(path: str | os.PathLike, value: Any) -> None:
    paths.write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
