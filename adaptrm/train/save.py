"""A trained model as a Hugging Face folder that other tools read."""

import os
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from adaptrm import paths
from adaptrm.data.chat import ChatTokenizer
from adaptrm.errors import InputError
from adaptrm.hf.export import model_config, save_weights, write_json
from adaptrm.judge.pair_prompt import TEXT
from adaptrm.parallel.distributed import told_to_all
from adaptrm.train.step import Kind

MARK = "tags: [adaptrm,"  # in the card of every folder that is written here
CARD = """---
library_name: transformers
pipeline_tag: {task}
tags: [adaptrm, {tag}]
{base}---

# {title}

{what} Trained with [adaptrm](https://pypi.org/project/adaptrm/), a JAX stack that labels preference pairs by the
safety rules that tell the two responses apart.

- Started from: {start}.
- Weights: {dtype}. Scores are meant in that precision; quantised or bfloat16 evaluation makes ties.
- Chat template: the one in this folder, with its date frozen. Score exactly what it renders.
{pad}
Limits: it reflects the judge, the rules and the pairs that it was trained with, and says nothing of texts unlike them.
"""

# Task, tag, title and what it is.
ABOUT: dict[Kind, tuple[str, str, str, str]] = {
    "reward": (
        *("text-classification", "reward-model", "Reward model"),
        "A reward model: one score a conversation, higher is better; only differences at one prompt mean anything.",
    ),
    "judge": (
        *("text-generation", "judge", "Rule judge"),
        "A judge: asked about a statement on a response, it answers Yes, No or Neither.",
    ),
    "adapter": (
        *("text-classification", "rule-adapter", "Rule adapter"),
        "A rule adapter: shown a conversation and two responses, it says which rules tell them apart: a logit a rule, "
        "the largest are chosen. It reads one turn of the user:\n\n```\n" + TEXT + "\n```\n\n"
        "Messages stand as `User: ...` or `Assistant: ...`, an empty line after each; the responses in the order of "
        "their texts.",
    ),
}


def save_model(
    out: str | os.PathLike,
    params: nnx.State,
    raw: dict[str, Any],
    chat: ChatTokenizer,
    pad: tuple[str | None, int | None],
    base_model: str | None = None,
    rule_ids: Sequence[str] = (),
) -> None:
    """Write weights, config, tokenizer with its chat template, and model card; process 0 writes.

    Args:
        raw: the ``config.json`` of the model it started from.
        pad: pad token and its id; transformers pools a reward at the last token that is not pad.
        base_model: the model it started from, for the card.
        rule_ids: the labels of an adapter; none of another model.
    """
    flat = dict(nnx.to_flat_state(params))
    embedding, head = flat[("model", "embed_tokens", "weight")], flat.get(("score", "weight"))
    with told_to_all(out) as first:
        if first:
            _clear(out)
    with paths.filling(out, last="config.json") as folder:
        save_weights(params, folder)
        if jax.process_index() > 0:
            return
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
        chat.save(folder, pad[0], as_rendered=head is not None)
        kind = "judge" if head is None else "adapter" if rule_ids else "reward"
        paths.write_bytes(folder / "README.md", _card(kind, base_model, dtype, pad).encode())
        # Last: a folder with a config.json is a whole one.
        write_json(folder / "config.json", model_config(raw, None if head is None else head.shape[0], **fields))


def _clear(out: str | os.PathLike) -> None:
    """Remove an earlier model of ours, its config first: without one a folder does not pass for whole.

    Raises:
        InputError: the folder holds something else.
    """
    found = paths.names(out)
    if not found and not paths.exists(out):
        return
    card, whole = paths.join(out, "README.md"), "config.json" in found
    if not paths.is_dir(out) or (whole and not ("README.md" in found and MARK.encode() in paths.read_bytes(card))):
        raise InputError(f"{out}: holds something that adaptrm did not write; give another folder")
    if not whole and not all(map(_ours, found)):
        raise InputError(f"{out}: is not empty and not a model folder; give another one")
    weights = [name for name in found if fnmatch(name, "model*.safetensors*")]
    paths.remove(out, ["config.json", "model.safetensors.index.json", *weights])


def _ours(name: str) -> bool:
    """Whether a file may be left by an export that was interrupted."""
    tokenizer = ("tokenizer", "special_tokens", "added_tokens", "chat_template", "vocab", "merges")
    return name.startswith(("model", "config.json", "README.md", *tokenizer))


def _card(kind: Kind, base_model: str | None, dtype: str, pad: tuple[str | None, int | None]) -> str:
    named = base_model is not None and base_model.count("/") == 1 and not Path(base_model).exists()
    task, tag, title, what = ABOUT[kind]
    return CARD.format(
        task=task,
        tag=tag,
        base=f"base_model: {base_model}\n" if named else "",
        title=title,
        what=what,
        start="random weights" if base_model is None else base_model if named else Path(base_model).name,
        dtype=dtype,
        pad=""
        if pad[0] is None or kind == "judge"
        else f"- Pad token: `{pad[0]}` (id {pad[1]}); scores are read at the last token that is not pad.\n",
    )
