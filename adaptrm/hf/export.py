"""A model of ours as a Hugging Face folder."""

import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from safetensors.numpy import save_file

from adaptrm import paths
from adaptrm.hf.keys import key_table
from adaptrm.models.config import FAMILIES, rope_parameters

MAX_SHARD_BYTES = 4 << 30


def save_weights(state: nnx.State, out: str | os.PathLike, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write all parameters under their Hugging Face names, in shards of bounded size; process 0 writes.

    The folder's file names follow Hugging Face: ``model.safetensors``, or numbered shards with an index.
    """
    params = dict(nnx.to_flat_state(state))
    table = sorted(
        ((name, key, i) for key in key_table(state) for i, name in enumerate(key.names)), key=lambda row: row[0]
    )
    sizes = {name: int(np.prod(key.tensor_shape)) * params[key.path].dtype.itemsize for name, key, _ in table}
    shards: list[list] = [[]]
    held = 0
    for row in table:
        if shards[-1] and held + sizes[row[0]] > max_shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(row)
        held += sizes[row[0]]
    weight_map = {}
    for number, shard in enumerate(shards):
        single = len(shards) == 1
        name = "model.safetensors" if single else f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for tensor, key, i in shard:
            value = params[key.path][...]
            host = _to_host(value[i] if key.stacked else value)
            if jax.process_index() == 0:
                tensors[tensor] = np.ascontiguousarray(host).reshape(key.tensor_shape)
            weight_map[tensor] = name
        if jax.process_index() == 0:
            Path(out).mkdir(parents=True, exist_ok=True)
            partial = Path(out) / f"{name}.partial"
            try:
                save_file(tensors, partial, metadata={"format": "pt"})
                os.chmod(partial, 0o644)  # safetensors writes for its owner alone
                os.replace(partial, Path(out) / name)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
    if jax.process_index() == 0 and len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_json(Path(out) / "model.safetensors.index.json", index)


def _to_host(value: jax.Array) -> np.ndarray:
    if value.is_fully_addressable:
        return np.asarray(value)
    return multihost_utils.process_allgather(value, tiled=True)


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
    kept = {k: v for k, v in raw.items() if k not in (*dropped, *labelled)}
    family = FAMILIES[raw["model_type"]].name
    labels = {} if num_labels is None else {f"LABEL_{i}": i for i in range(num_labels)}
    if num_labels is not None:
        kept |= {"id2label": {str(i): label for label, i in labels.items()}, "label2id": labels}
    task = "ForCausalLM" if num_labels is None else "ForSequenceClassification"
    return kept | {"architectures": [family + task], "rope_theta": theta, "rope_scaling": scaling, **fields}


def write_json(path: str | os.PathLike, value: Any) -> None:
    paths.write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
