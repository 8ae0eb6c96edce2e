"""``adaptrm export``: a run as a Hugging Face folder, read back and compared."""

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from flax import nnx

from adaptrm.card.files import Overlap, Result, read_file
from adaptrm.card.markdown import model_name
from adaptrm.data.chat import ChatTokenizer
from adaptrm.data.chat_trees import conversation_tree
from adaptrm.hf import load_weights, open_folder
from adaptrm.models import CausalLM, SequenceClassifier
from adaptrm.models.heads import label_logits
from adaptrm.parallel import make_mesh, read_leaves
from adaptrm.parallel.distributed import wait_for_all
from adaptrm.products import product
from adaptrm.progress import say
from adaptrm.train.save import save_model
from adaptrm.train.start import about_run, read_options, start_of

# Texts of several lengths, scripts and turns; what is compared is arithmetic, not meaning.
PROBES = (
    [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello! How can I help?"}],
    [
        {"role": "user", "content": "Is this plant safe for my cat?"},
        {"role": "assistant", "content": "Which plant?"},
        {"role": "user", "content": "A lily — «lys», ユリ."},
        {"role": "assistant", "content": "No, lilies are dangerous to cats. Keep it out of reach and call a vet."},
    ],
    [{"role": "user", "content": "Count to thirty."}, {"role": "assistant", "content": " ".join(map(str, range(30)))}],
)
TOLERANCE = 1e-4


def export_run(
    run: str | os.PathLike,
    out: str | os.PathLike,
    check: bool = False,
    dtype: Literal["float32", "bfloat16"] = "float32",
    results: Sequence[str] = (),
    overlaps: Sequence[str] = (),
    name: str | None = None,
) -> dict[str, float]:
    """Write the latest checkpoint of a run as a Hugging Face folder; with ``check`` read it back and compare.

    Several processes share the model; they need to see one folder, and process 0 writes it.

    Args:
        dtype: of the weights that are written. What is compared is computed in float32 from these very weights, so
            that rounding them is no difference; how far it moves the checkpoint's own values is said.
        results: files of ``adaptrm evaluate`` for the model card.
        overlaps: files of ``adaptrm overlap`` for the model card.
        name: of the model on the hub, for its tables of results; None is that of the folder.

    Returns:
        Largest difference from what the weights compute for some conversations (rewards of a reward model, logits of
        an adapter, next-token log-probabilities of a judge), by reader: ``adaptrm``, and ``transformers`` where torch
        is installed.

    Raises:
        InputError: not a run, no checkpoint, or the folder holds something else; a file for the card is none.
        RuntimeError: a difference is above the tolerance.
    """
    shown = {
        "name": (name or model_name(str(out))).rpartition("/")[2],
        "results": [read_file(file, Result) for file in results],
        "overlaps": [read_file(file, Overlap) for file in overlaps],
    }
    kind, options = read_options(run)
    start = start_of(kind, options)
    about = replace(about_run(start, options, run), **shown)
    mesh = make_mesh()
    definition, params = start.checkpoint(run, mesh)
    pad_id = None if start.kind == "judge" else start.pad[1]
    exact = probe(definition, params, start.chat, pad_id, mesh) if check and dtype != "float32" else None
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    save_model(out, params, start.raw, start.chat, start.pad, about, start.model.rule_ids)
    if not check:
        return {}
    wait_for_all()  # process 0 writes
    expected = probe(definition, params, start.chat, pad_id, mesh)
    if exact is not None:
        say(f"{out}: rounding to {dtype} moves what the checkpoint computes by {_difference(expected, exact):.2e}")
    return verify(out, expected)


def verify(out: str | os.PathLike, expected: np.ndarray) -> dict[str, float]:
    """Read a model folder back and compare what it computes for the probes; see ``export_run``."""
    folder = open_folder(out)
    model_type = SequenceClassifier if folder.is_classifier else CausalLM
    mesh = make_mesh()
    labels = len(folder.label_names) or 1
    definition, params, _ = load_weights(folder, model_type, mesh, num_labels=labels, dtype="float32")
    pad_id = folder.pad_token_id if folder.is_classifier else None
    chat = ChatTokenizer.from_folder(folder.path)
    found = {"adaptrm": _difference(expected, probe(definition, params, chat, pad_id, mesh))}
    if importlib.util.find_spec("torch") is not None and jax.process_index() == 0:  # which holds all of it
        found["transformers"] = _difference(expected, _transformers(folder.path, folder.is_classifier))
    for reader, difference in found.items():
        if not difference <= TOLERANCE:
            raise RuntimeError(f"{out}: read by {reader} it computes something else, by {difference:.2e}")
    return found


def probe(definition, params, chat: ChatTokenizer, pad_id: int | None, mesh) -> np.ndarray:
    """What a model computes in float32 for the probes: rewards or logits of rules, or next-token log-probabilities."""

    @jax.jit
    def program(params, tokens, positions, subtree_end, leaves):
        model = nnx.merge(definition, params)
        hidden = model.model.at_leaves(tokens, positions, subtree_end, leaves)
        if isinstance(model, SequenceClassifier):
            return label_logits(hidden, model.score.weight[...])
        return jax.nn.log_softmax(product("bmd,vd->bmv", hidden, model.unembedding.astype(hidden.dtype)), axis=-1)

    trees = [conversation_tree(chat, [conversation], pad_id) for conversation in PROBES]
    by_tree = read_leaves(trees, mesh, partial(program, params))
    return np.concatenate([by_tree[i] for i in range(len(trees))])


def _difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / max(1.0, np.abs(theirs).max()))


def _transformers(folder: Path, is_classifier: bool) -> np.ndarray:
    """What transformers computes for the probes: logits of one padded batch, or log-probabilities one by one."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    kind = AutoModelForSequenceClassification if is_classifier else AutoModelForCausalLM
    model = kind.from_pretrained(folder).float().eval()
    texts = [tokenizer.apply_chat_template(probe, tokenize=False) for probe in PROBES]
    with torch.no_grad():
        if is_classifier:
            batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
            return model(**batch).logits.numpy()
        ids = [tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"] for text in texts]
        return np.concatenate([model(one).logits[:, -1].log_softmax(-1).numpy() for one in ids])
