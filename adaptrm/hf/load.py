"""Weights from Hugging Face safetensors, block by block, onto the mesh."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from adaptrm.errors import InputError
from adaptrm.hf.blocks import BLOCK_BYTES, Blocks, zeros
from adaptrm.hf.folder import HEAD, Folder, listed
from adaptrm.hf.int8 import check_quantizer, int8_shapes, quantizer
from adaptrm.hf.keys import Key, key_table
from adaptrm.hf.weight_file import DTYPES, Stored
from adaptrm.models.config import ModelConfig, label_count
from adaptrm.models.decoder import CausalLM, SequenceClassifier
from adaptrm.parallel import place, sharding

SMALL = 1 << 20  # bytes: a parameter that all its layers are read of at once
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


def load_weights(
    folder: Folder,
    model_type: type[CausalLM] | type[SequenceClassifier],
    mesh: Mesh,
    *,
    num_labels: int = 1,
    dtype: str | None = None,
    new_head_seed: int | None = None,
    vocab_size: int | None = None,
    quantize: str | None = None,
) -> tuple[nnx.GraphDef, nnx.State, ModelConfig]:
    """Build a model and fill it, each parameter placed on the mesh by the table of logical axes.

    Args:
        dtype: of the parameters; None keeps what is stored.
        new_head_seed: make a fresh ``score`` head where the folder has none (a causal language model).
        vocab_size: at least the folder's; rows that the folder does not have are the mean of the others.
        quantize: ``int8`` rounds the projections of the layers as they are read (``hf.int8``).

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
    if quantize is not None:
        check_quantizer(quantize)
        definition, abstract = int8_shapes(definition, abstract)
    axes = logical_axes(definition, abstract)
    flat = {}
    for key in table:
        layout = sharding(mesh, key.shape, axes[key.path])
        if key.names[0] in fresh:
            noise = np.random.default_rng(new_head_seed).standard_normal(key.shape)
            flat[key.path] = place((noise * config.hidden_size**-0.5).astype(dtype or "float32"), layout)
        elif (scale := (*key.path[:-1], "scale")) in axes and key.path[-1] == "weight":
            outputs = axes[scale]
            scales = sharding(mesh, key.shape[: len(outputs)], outputs)
            flat[key.path], flat[scale] = _read_int8(folder, key, layout, scales)
        else:
            flat[key.path] = _read(folder, key, dtype, layout)
    state = jax.tree.map(lambda leaf: leaf, abstract)
    for path, variable in nnx.to_flat_state(state):
        variable.set_value(flat[path])
    return definition, state, config


def abstract_model(model_type, config: ModelConfig, num_labels: int = 1) -> tuple[nnx.GraphDef, nnx.State]:
    """Definition and shapes of a model, with nothing allocated."""
    return nnx.split(nnx.eval_shape(lambda: random_model(model_type, config, 0, num_labels)))


def random_model(model_type, config: ModelConfig, seed: int, num_labels: int = 1) -> CausalLM | SequenceClassifier:
    """A model of random parameters; ``num_labels`` is of a classifier."""
    extra = {"num_labels": num_labels} if model_type is SequenceClassifier else {}
    return model_type(config, nnx.Rngs(seed), **extra)


def logical_axes(definition: nnx.GraphDef, abstract: nnx.State) -> dict[tuple, tuple[str, ...]]:
    """The logical axes of every parameter by its path; each parameter's module names them."""
    model = nnx.merge(definition, abstract)
    axes = {}
    for path, module in nnx.iter_modules(model):
        if hasattr(module, "axes"):
            axes |= {(*path, name): own for name, own in module.parameter_axes.items()}
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
        if (head.dtype, head.shape) != (embedding.dtype, embedding.shape) or not _equal(
            head, embedding, _block_bytes(folder)
        ):
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
        raise InputError(
            f"{folder.path}: {HEAD} gives {rows} labels, {wanted} needed; a reward model has one, an adapter one a rule"
        )


def _read(folder: Folder, key: Key, dtype: str | None, layout: NamedSharding) -> jax.Array:
    """One parameter, each block read where the devices of this process need it and written into the stacked array."""
    layers, kind = _layers(folder, key, dtype)
    target = np.dtype(dtype or kind)
    if math.prod(key.shape) * max(target.itemsize, 4) <= SMALL:
        shape = key.shape[1:] if key.stacked else key.shape
        whole = [read([0] * len(shape), shape).astype(target) for read in layers]
        return place(np.stack(whole).reshape(key.shape), layout)
    blocks = _blocks(folder, key, layout)
    stack = zeros(layout, key.shape, target)
    for layer, read in enumerate(layers):
        for row in blocks.first_rows():
            stack = blocks.write(stack, blocks.read(read, row), layer, row)
    return stack


def _read_int8(folder: Folder, key: Key, layout: NamedSharding, scales: NamedSharding) -> tuple[jax.Array, jax.Array]:
    """The weight of a projection in int8 and the scale of each output, from what is stored, block by block."""
    layers, _ = _layers(folder, key, "float32")
    blocks, narrow = _blocks(folder, key, layout), quantizer(layout, scales)
    weight = zeros(layout, key.shape, np.dtype("int8"))
    scale = zeros(scales, key.shape[: len(scales.spec)], np.dtype("float32"))
    for layer, read in enumerate(layers):
        for row in blocks.first_rows():
            whole, sizes = narrow(blocks.read(read, row))
            weight, scale = blocks.write(weight, whole, layer, row), blocks.write(scale, sizes, layer, row)
    return weight, scale


def _blocks(folder: Folder, key: Key, layout: NamedSharding) -> Blocks:
    itemsize = max(DTYPES[folder.tensors[name].dtype].itemsize for name in key.names)
    return Blocks(key.shape, layout, key.stacked, itemsize, _block_bytes(folder))


def _layers(folder: Folder, key: Key, dtype: str | None) -> tuple[list[Callable], np.dtype]:
    """How a part of each layer of a parameter is read, ``read(first, sizes)``, and the dtype that is stored.

    Rows of the vocabulary that are not stored are the mean of the others.
    """
    stored = [folder.tensors[name] for name in key.names]
    kind = DTYPES[stored[0].dtype]
    for name, tensor in zip(key.names, stored, strict=True):
        if dtype is None and DTYPES[tensor.dtype] != kind:
            raise InputError(f"{tensor.file}: {name} is {DTYPES[tensor.dtype]}, other layers {kind}; give a dtype")
    shape = key.shape[1:] if key.stacked else key.shape
    mean, rows = None, shape[0]
    if key.names[0] in VOCABULARY and stored[0].shape[0] < rows:
        mean, rows = _mean_row(stored[0], _block_bytes(folder)), stored[0].shape[0]

    def read(tensor: Stored, first: Sequence[int], sizes: Sequence[int]) -> np.ndarray:
        out = np.empty(sizes, DTYPES[tensor.dtype])
        count = min(max(rows - first[0], 0), sizes[0])
        if count:
            tensor.read(out[:count], first, (rows, *shape[1:]))
        if count < sizes[0]:
            out[count:] = mean[first[1] : first[1] + sizes[1]]
        return out

    return [partial(read, tensor) for tensor in stored], kind


def _block_bytes(folder: Folder) -> int:
    """Of one block, so that two of them (one more is made on its way to the devices) are less than a whole tensor."""
    known = (tensor for tensor in folder.tensors.values() if tensor.dtype in DTYPES)
    largest = max(math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize for tensor in known)
    return max(min(BLOCK_BYTES, largest // 2), SMALL)


def _mean_row(tensor: Stored, most: int) -> np.ndarray:
    """Of a matrix, summed up in float64 in an order that no mesh changes."""
    total = np.zeros(tensor.shape[1])
    for block in _row_blocks(tensor, most):
        total += block.sum(axis=0, dtype=np.float64)
    return (total / tensor.shape[0]).astype(np.float32)


def _equal(a: Stored, b: Stored, most: int) -> bool:
    return all(np.array_equal(*pair) for pair in zip(_row_blocks(a, most // 2), _row_blocks(b, most // 2), strict=True))


def _row_blocks(tensor: Stored, most: int) -> Iterator[np.ndarray]:
    """A matrix, some rows at a time."""
    dtype = DTYPES[tensor.dtype]
    at_once = max(most // (tensor.shape[1] * dtype.itemsize), 1)
    for first in range(0, tensor.shape[0], at_once):
        out = np.empty((min(at_once, tensor.shape[0] - first), tensor.shape[1]), dtype)
        tensor.read(out, (first, 0), tensor.shape)
        yield out
