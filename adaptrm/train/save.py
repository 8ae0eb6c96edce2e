"""A trained model as a Hugging Face folder that other tools read."""

import os
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from adaptrm import paths
from adaptrm.card.page import MARKS, About, Pad, model_card
from adaptrm.data.chat import ChatTokenizer
from adaptrm.errors import InputError
from adaptrm.hf.export import model_config, save_weights, write_json
from adaptrm.parallel.distributed import told_to_all


def save_model(
    out: str | os.PathLike,
    params: nnx.State,
    raw: dict[str, Any],
    chat: ChatTokenizer,
    pad: Pad,
    about: About | None = None,
    rule_ids: Sequence[str] = (),
) -> None:
    """Write weights, config, tokenizer with its chat template, and model card; process 0 writes.

    Args:
        raw: the ``config.json`` of the model it started from.
        pad: pad token and its id; transformers pools a reward at the last token that is not pad.
        about: what the card says of it.
        rule_ids: the labels of an adapter; none of another model.
    """
    flat = dict(nnx.to_flat_state(params))
    embedding, head = flat[("model", "embed_tokens", "weight")], flat.get(("score", "weight"))
    dtype = str(embedding.dtype)
    fields = {"vocab_size": embedding.shape[0], "torch_dtype": dtype}
    if pad[1] is not None:
        fields["pad_token_id"] = pad[1]
    if rule_ids:
        fields |= {
            "id2label": {str(number): rule for number, rule in enumerate(rule_ids)},
            "label2id": {rule: number for number, rule in enumerate(rule_ids)},
            "problem_type": "multi_label_classification",
        }
    config = model_config(raw, None if head is None else head.shape[0], **fields)
    kind = "judge" if head is None else "adapter" if rule_ids else "reward"
    save_folder(
        out, partial(save_weights, params), config, chat, pad[0], model_card(kind, dtype, pad, about or About())
    )


def save_folder(
    out: str | os.PathLike,
    write_weights: Callable[[Path], None],
    config: dict[str, Any],
    chat: ChatTokenizer,
    pad_token: str | None,
    card: str,
) -> None:
    """Write a model folder in place of an earlier one of ours; process 0 writes, all take part in the weights.

    Args:
        write_weights: writes them into a local folder.

    Raises:
        InputError: the folder holds something else, or cannot be written to.
    """
    with told_to_all(out) as first:
        if first:
            _clear(out)
    with paths.filling(out, last="config.json") as folder:
        write_weights(folder)
        if jax.process_index() > 0:
            return
        chat.save(folder, pad_token, as_rendered="id2label" in config)
        paths.write_bytes(folder / "README.md", card.encode())
        write_json(folder / "config.json", config)  # last: a folder with a config.json is a whole one


def _clear(out: str | os.PathLike) -> None:
    """Remove an earlier model of ours, its config first: without one a folder does not pass for whole.

    Raises:
        InputError: the folder holds something else.
    """
    found = paths.names(out)
    if not found and not paths.exists(out):
        return
    whole = "config.json" in found
    card = paths.read_bytes(paths.join(out, "README.md")) if "README.md" in found else b""
    if not paths.is_dir(out) or (whole and not any(mark in card for mark in MARKS)):
        raise InputError(f"{out}: holds something that adaptrm did not write; give another folder")
    if not whole and not all(map(_ours, found)):
        raise InputError(f"{out}: is not empty and not a model folder; give another one")
    weights = [name for name in found if fnmatch(name, "model*.safetensors*")]
    paths.remove(out, ["config.json", "model.safetensors.index.json", *weights])


def _ours(name: str) -> bool:
    """Whether a file may be left by an export that was interrupted."""
    tokenizer = ("tokenizer", "special_tokens", "added_tokens", "chat_template", "vocab", "merges")
    return name.startswith(("model", "config.json", "README.md", *tokenizer))
