"""``adaptrm merge``: the weighted average of models of one shape, block by block.

Fine-tunings of one start can be averaged (Wortsman et al. 2022, model soups, arXiv 2203.05482), with the start too
(WiSE-FT, arXiv 2109.01903). An average of reward models is harder to exploit, and follows wrong labels less, than each
of them (Rame et al. 2024, WARM, arXiv 2401.12187).
"""

import math
import os
import reprlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from adaptrm import paths
from adaptrm.card.license import license_of
from adaptrm.card.page import About, model_card
from adaptrm.data.chat import ChatTokenizer
from adaptrm.errors import InputError
from adaptrm.export import export_run
from adaptrm.hf.export import MAX_SHARD_BYTES, cut_into_shards, model_config, write_index
from adaptrm.hf.folder import HEAD, Folder, listed, open_folder
from adaptrm.hf.weight_file import DTYPES, Stored, write_header
from adaptrm.progress import progress, say
from adaptrm.train.save import save_folder
from adaptrm.train.start import is_run

BLOCK = 1 << 18  # numbers of a tensor that are averaged at once: 2 MiB in float64
SUM = 1e-6  # by how much the sum of the weights may differ from one
ONE_START = "only models that were trained from one start can be averaged"
MENDS = {"vocab_size": "rows that only pad count too: resize_token_embeddings of transformers makes them as many"}
UNLIKE = ("max_position_embeddings",)  # fields of a config that change nothing in the computation
LABELLED = ("id2label", "label2id", "problem_type")


def merge(
    models: Sequence[str],
    out: str | os.PathLike,
    weights: Sequence[float] | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict[str, Any]:
    """Write the average of models as a Hugging Face folder; all but the weights is that of the first.

    Sums are float64, one block of a tensor at a time. A model whose weight is 0 is checked and not read, so weights
    1 and 0 give the bytes of the first model. A run without an export is exported to a temporary folder first.

    Args:
        models: folders, hub names, runs, or checkpoints ``RUN/checkpoints/STEP``.
        out: a new folder, or an earlier one of ours, which is written over; whole only with its ``config.json``.
        weights: one a model, to sum to one; None are equal ones. Negative ones extrapolate.
        dtype: ``float32`` or ``bfloat16``; None keeps that of each tensor of the first model.

    Returns:
        The folder, models with weights, tensors, parameters and dtype.

    Raises:
        InputError: weights are no such numbers; models differ in more than their weights; the result is not finite.
    """
    models, weights = list(map(str, models)), _checked(weights, len(models))
    with ExitStack() as stack:
        folders = [open_folder(_exported(model, stack)) for model in models]
        first, chat = folders[0], ChatTokenizer.from_folder(folders[0].path)
        for model, folder in zip(models, folders, strict=True):
            for source in (model, paths.join(model, "export"), folder.path):
                paths.check_apart(out, source)
            _check_alike(first, folder, models[0], model)
            _check_texts(chat, ChatTokenizer.from_folder(folder.path), models[0], model)
        kinds = {name: (np.dtype(dtype or DTYPES[t.dtype]), t.shape) for name, t in first.tensors.items()}
        sizes = {name: math.prod(shape) * kind.itemsize for name, (kind, shape) in kinds.items()}
        written = str(kinds[max(sizes, key=sizes.__getitem__)][0])
        kind, labels, pad, fields = "judge", None, (None, None), {}
        if first.is_classifier:
            kind = "adapter" if first.raw.get("problem_type") == "multi_label_classification" else "reward"
            labels, pad_id = first.tensors[HEAD].shape[0], first.pad_token_id
            pad = (None if pad_id is None else chat.tokenizer.convert_ids_to_tokens(pad_id), pad_id)
            fields = {name: first.raw[name] for name in LABELLED if name in first.raw}
        config = model_config(first.raw, labels, **fields, torch_dtype=written)
        used = [(folder, weight) for folder, weight in zip(folders, weights, strict=True) if weight]
        write = partial(_write_weights, used, kinds, cut_into_shards(sizes, max_shard_bytes), sizes)
        licenses = {license_of(folder.path) for folder in folders}
        about = About(models=models, weights=weights, license=licenses.pop() if len(licenses) == 1 else None)
        save_folder(out, write, config, chat, pad[0], model_card(kind, written, pad, about))
    return {
        "merged": str(out),
        "models": [{"model": model, "weight": weight} for model, weight in zip(models, weights, strict=True)],
        "tensors": len(kinds),
        "parameters": sum(math.prod(shape) for _, shape in kinds.values()),
        "dtype": written,
    }


def read_weights(text: str) -> list[float]:
    """Numbers with commas between them."""
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise InputError(f"--weights: {reprlib.repr(text)} is no list of numbers; give one a model: .7,.3") from None


def _checked(weights: Sequence[float] | None, count: int) -> list[float]:
    """The weights over their sum, so that the average of a model with itself is that model."""
    if count < 2:
        raise InputError("merge: needs two models or more; export writes one alone")
    weights = [1 / count] * count if weights is None else list(weights)
    if len(weights) != count:
        raise InputError(f"--weights: {len(weights)} weights for {count} models; give one a model")
    total = sum(weights)
    if not abs(total - 1) <= SUM:  # nor where it is no number
        raise InputError(f"--weights: they sum to {total:.8g}; finite weights that sum to 1 are needed")
    if min(weights) < 0:
        say(f"weights {', '.join(f'{weight:g}' for weight in weights)}: below 0 is no average, it extrapolates")
    return [weight / math.fsum(weights) for weight in weights]


def _exported(model: str, stack: ExitStack) -> str:
    """What ``open_folder`` reads; of one checkpoint, or a run that has no export yet, a temporary export."""
    if not is_run(model) or paths.exists(paths.join(model, "export", "config.json")):
        return model
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="adaptrm-"))
    export_run(model, folder)
    return folder


def _check_alike(first: Folder, other: Folder, a: str, b: str) -> None:
    """Raise where two models, called ``a`` and ``b``, differ in more than the numbers of their tensors."""
    if first.is_classifier != other.is_classifier:
        has, lacks = (a, b) if first.is_classifier else (b, a)
        raise InputError(
            f"{lacks}: has no {HEAD}, {has} has one; merge models of one kind. To average a reward model with the "
            "language model that it starts from, train it with model.average_with_start"
        )
    ours, theirs = vars(first.config), vars(other.config)
    for name in ("model_type", *ours):
        if ours[name] != theirs[name] and name not in UNLIKE:
            raise InputError(f"{b}: {name} is {theirs[name]}, of {a} {ours[name]}; {MENDS.get(name, ONE_START)}")
    for name in sorted(first.tensors.keys() | other.tensors.keys()):
        if name not in first.tensors or name not in other.tensors:
            has, lacks = (a, b) if name in first.tensors else (b, a)
            raise InputError(f"{lacks}: has no tensor {listed([name])}, {has} has it; {ONE_START}")
        mine, found = first.tensors[name], other.tensors[name]
        if mine.shape != found.shape:
            raise InputError(f"{b}: {listed([name])} has shape {found.shape}, in {a} {mine.shape}; {ONE_START}")
        if found.dtype not in DTYPES:
            raise InputError(f"{b}: {listed([name])} is {found.dtype}; weights must be one of {', '.join(DTYPES)}")
    if first.is_classifier and first.tensors[HEAD].shape[0] > 1 and first.label_names != other.label_names:
        raise InputError(f"{b}: its labels (id2label) are not those of {a}; {ONE_START}")


def _check_texts(first: ChatTokenizer, other: ChatTokenizer, a: str, b: str) -> None:
    """Raise where two models would read a conversation otherwise."""
    ours, theirs = first.tokenizer.get_vocab(), other.tokenizer.get_vocab()
    if differ := ours.items() ^ theirs.items():
        token = min(token for token, _ in differ)
        ids = " and ".join(str(vocabulary.get(token, "absent")) for vocabulary in (theirs, ours))
        token = reprlib.repr(token)
        raise InputError(f"{b}: its tokenizer has another vocabulary than {a}: {token} is {ids}; {ONE_START}")
    if first.template != other.template:
        raise InputError(
            f"{b}: its chat template is not that of {a}; where both were trained with one, copy it to both"
        )


def _write_weights(used: Sequence[tuple[Folder, float]], kinds: Mapping, shards: Mapping, sizes: Mapping, out: Path):
    """Write the average of the tensors, a block of one at a time; ``kinds`` are dtype and shape of each."""
    with progress("merging", "tensors", len(kinds)) as shown:
        for file, names in shards.items():
            with paths.writing(out / file) as stream:
                begins = write_header(stream, {name: kinds[name] for name in names})
                for name in names:
                    stream.seek(begins[name])
                    for block in _averaged([(f.tensors[name], weight) for f, weight in used], kinds[name][0], name):
                        stream.write(block.view(np.uint8))
                    shown.advance(1)
    write_index(out, shards, sizes)


def _averaged(tensors: Sequence[tuple[Stored, float]], dtype: np.dtype, name: str) -> Iterator[np.ndarray]:
    """``sum_i w_i x_i`` in float64, rounded to ``dtype`` (16 bits by way of float32), some numbers at a time."""
    size = math.prod(tensors[0][0].shape)
    for first in range(0, size, BLOCK):
        total = np.zeros(0)
        for tensor, weight in tensors:
            stored = np.empty(min(BLOCK, size - first), DTYPES[tensor.dtype])
            tensor.read(stored, (first,), (size,))
            part = stored.astype(np.float64)
            part *= weight
            total = np.add(total, part, out=total) if total.size else part  # a sum with 0 would lose the sign of -0
        with np.errstate(over="ignore"):
            block = total.astype(dtype)
        if not np.isfinite(block).all():
            raise InputError(f"{listed([name])}: the average is not finite in {dtype}; a model is broken, or too large")
        yield block
