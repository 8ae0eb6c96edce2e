"""``adaptrm plan``: compile a config's steps for machines that are not here, and say what memory and FLOPs they take.

Shapes, shardings and programs are those of ``adaptrm train`` and ``adaptrm score``; only the devices are a description.
Nothing is allocated and nothing is downloaded.
"""

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh

from adaptrm import paths
from adaptrm.config import ModelOptions, TrainOptions, load_options, sections_of
from adaptrm.data.pipeline import RowSource, TreeStore
from adaptrm.data.plan import Plan
from adaptrm.errors import InputError
from adaptrm.hf.int8 import int8_shapes
from adaptrm.hf.load import abstract_model
from adaptrm.judge.program import answer_leaves
from adaptrm.models import CausalLM, ModelConfig, SequenceClassifier
from adaptrm.models.config import read_json
from adaptrm.models.known import KNOWN
from adaptrm.parallel import make_mesh, sharding
from adaptrm.prefix_tree import Node, PrefixTree
from adaptrm.rules import RulePool
from adaptrm.train.lora import model_shapes
from adaptrm.train.optimizer import make_optimizer
from adaptrm.train.run import plan_options
from adaptrm.train.start import start_of
from adaptrm.train.state import init_state, param_shardings
from adaptrm.train.step import make_step
from adaptrm.train.throughput import multiplied_parameters, training_flops

GIB = 2**30
GPUS_A_NODE = 8
MOST_DEVICES = 10_000  # the largest slices have 8,960 chips
STEPS = 1000  # of the schedule; their number changes nothing in the program but a constant
QUESTION = 24  # tokens of a rule in the trees that stand for a judge's
ANSWERS = ((0,), (1,), (2,))
PARTS = ("parameters", "optimizer", "batch", "temporaries", "peak")
MEND = "no; more devices, fewer data.rows_per_step, a shorter data.row_length or model.remat: layer take less each"

# libtpu asks neither the cloud which machine this is, nor for the chips that another process may hold.
ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

# What XLA has to know of a GPU that is not there, from NVIDIA's data sheet and the device's own attributes.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  threads_per_block_limit: 1024  threads_per_warp: 32  shared_memory_per_block: 49152  shared_memory_per_core: 233472
  threads_per_core_limit: 2048  core_count: 132  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000  l2_cache_size: 52428800  clock_rate_ghz: 1.98  device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}
platform_name: "CUDA"  dnn_version_info { major: 9 minor: 8 }  runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclass(frozen=True)
class Chip:
    """A kind of device to compile for.

    Attributes:
        platform: as jax names it; also the extra of ours that can compile for it.
        memory: bytes that programs can use: on a TPU what its compiler allows, on a GPU the three quarters that jax
            takes unless ``XLA_PYTHON_CLIENT_MEM_FRACTION`` says otherwise.
        description: of a GPU, for XLA.
    """

    platform: str
    memory: int
    description: str | None = None


CHIPS = {
    "v5e": Chip("tpu", int(15.75 * GIB)),
    "v5p": Chip("tpu", int(95.74 * GIB)),
    "v6e": Chip("tpu", int(31.25 * GIB)),
    "tpu7x": Chip("tpu", int(94.75 * GIB)),  # of each of the two devices of a chip
    "h100": Chip("cuda", 84942979072 * 3 // 4, H100),
}


def plan(
    config: str,
    target: str,
    overrides: dict[str, Any] | None = None,
    only: str = "",
    tensor: int = 1,
    quantize: str | None = None,
) -> dict[str, Any]:
    """Compile every step of a config for a target.

    Args:
        target: ``v5p:2x2x2`` (a TPU slice by its shape) or ``h100:8`` (GPUs by their number, nodes of eight).
        overrides: dotted options, for every section.
        only: how the names of the steps to compile begin: train or score.
        tensor, quantize: of the step that scores, as of ``adaptrm score``; that which trains has the config's mesh.

    Returns:
        The target's devices and memory, and for each step what ``measure`` gives.

    Raises:
        InputError: config, target or model are not known, or this jax cannot compile for the target.
    """
    chip, devices = devices_of(target)
    found = {"config": config, "target": target, "devices": len(devices), "memory": chip.memory}
    found |= {"quantize": quantize, "steps": {}}
    for verb in sections_of(config):
        options = load_options(config, verb, overrides)
        for name, step in steps_of(f"{config}: {verb}", verb, options, devices, tensor, quantize):
            if name.startswith(only):
                found["steps"][name] = measure(step, chip)
    return found


def devices_of(target: str) -> tuple[Chip, list]:
    """Devices of a machine that is not here."""
    name, _, shape = target.partition(":")
    if name not in CHIPS or not re.fullmatch(r"[1-9]\d{0,4}(x[1-9]\d{0,4})*", shape):
        raise InputError(f"--target {target}: give v5p:2x2x2, v5e:4x4, h100:8 or the like; known: {', '.join(CHIPS)}")
    chip, sizes = CHIPS[name], [int(size) for size in shape.split("x")]
    count = math.prod(sizes)
    if count > MOST_DEVICES:
        raise InputError(f"--target {target}: has {count} devices; no more than {MOST_DEVICES}")
    if chip.platform == "tpu":
        os.environ |= ALONE
        options = {"topology_name": target} | ({"chips_per_host_bounds": [1, 1, 1]} if count == 1 else {})
    else:
        nodes, left = divmod(count, GPUS_A_NODE)
        if len(sizes) > 1 or (nodes and left):
            raise InputError(f"--target {target}: give the number of GPUs: up to {GPUS_A_NODE}, or a multiple of it")
        topology = f"1x{nodes or 1}x{GPUS_A_NODE if nodes else left}"
        options = {"topology_name": name, "target_config": chip.description, "topology": topology}
    try:
        return chip, topologies.get_topology_desc(platform=chip.platform, **options).devices
    except RuntimeError as wrong:
        kind, _, reason = str(wrong).splitlines()[0].partition(": ")
        if kind == "INVALID_ARGUMENT":
            raise InputError(f"--target {target}: {reason}; give the shape of a whole slice") from None
        if isinstance(wrong, jax.errors.JaxRuntimeError):
            raise
        extra = f"pip install 'adaptrm[{chip.platform}]'"
        raise InputError(f"--target {target}: this jax cannot compile for {chip.platform}; {extra}") from None


@dataclass(frozen=True)
class Step:
    """A program and what it is given.

    Attributes:
        arguments: shapes with shardings, and what is static; ``parts`` are those of them that lie in memory, by name.
        row: what one row of a batch may hold, by name: as many tokens as fit, all of them 0.
        shape: rows and tokens a row, on all devices.
        flops: that the mathematics needs, on all devices; nothing counts twice that is computed twice.
    """

    jitted: Any
    arguments: tuple
    parts: dict[str, Any]
    row: Mapping[str, np.ndarray]
    mesh: Mesh
    shape: tuple[int, int]
    flops: int


def steps_of(
    where: str, verb: str, options: TrainOptions, devices: list, tensor: int = 1, quantize: str | None = None
) -> Iterator[tuple[str, Step]]:
    """The step that trains, and for a judge the one that scores."""
    config = shapes_of(where, options.model)
    try:
        mesh = make_mesh(**asdict(options.mesh), devices=devices)
    except ValueError as wrong:
        raise InputError(f"{where}: {wrong}; change the mesh section of the config") from None
    yield f"train {verb}", train_step(verb, options, config, mesh)
    if verb == "judge":
        try:
            mesh = make_mesh(tensor=tensor, devices=devices)
        except ValueError as wrong:
            raise InputError(f"--tensor {tensor}: {wrong}") from None
        yield "score", score_step(options.data.row_length, config, mesh, quantize)


def shapes_of(where: str, model: ModelOptions) -> ModelConfig:
    """The config of the model that a run would start from, where it is known without a download.

    Raises:
        InputError: it is not.
    """
    if model.scratch is not None:
        return start_of("judge", TrainOptions(model=model)).config
    if model.pretrained is None:
        raise InputError(f"{where}.model.pretrained is missing; give --model.pretrained MODEL")
    file = paths.join(model.pretrained, "config.json")
    if paths.exists(file):
        return ModelConfig.from_hf(read_json(paths.read_bytes(file), file), file)
    if model.pretrained in KNOWN:
        return KNOWN[model.pretrained]
    raise InputError(
        f"{where}.model.pretrained: the shapes of {model.pretrained} are not known here, and a plan downloads nothing; "
        f"give a folder with its config.json, or one of: {', '.join(KNOWN)}"
    )


def train_step(verb: str, options: TrainOptions, config: ModelConfig, mesh: Mesh) -> Step:
    """The step of ``adaptrm train``; of a batch that is so many examples, each fills a row, so none takes more."""
    labels = len(RulePool.load(options.data.rules)) if verb == "adapter" else 1
    model_type = CausalLM if verb == "judge" else SequenceClassifier
    definition, abstract = model_shapes(model_type, config, options.model, labels)
    params = _placed(definition, abstract, mesh)
    state = init_state(params, make_optimizer(options.optimizer), mesh)
    layout = plan_options(options, mesh)
    examples = layout.examples_per_step or layout.rows_per_step
    store = _rows(verb, layout.row_length, examples, labels if verb == "adapter" else None)
    packing = Plan(store.lengths, store.leaves, layout, epochs=1)
    row = RowSource(store, packing, [0], 0, 1)[0]
    count = packing.rows_per_step
    batch = {name: _spread(mesh, (count, *x.shape), x.dtype) for name, x in row.items()}
    step = make_step(
        *(verb, definition, options.optimizer, STEPS, ANSWERS if verb == "judge" else None),
        *(options.model.dtype, options.model.remat, options.loss),
    )
    parts = {"parameters": params, "optimizer": state.opt_state, "batch": batch}
    counts = multiplied_parameters(params), multiplied_parameters(state.frozen)
    flops = training_flops(config, counts[0], *_work(store, count), counts[1])
    return Step(step, (state, batch), parts, row, mesh, (count, layout.row_length), flops)


def score_step(row_length: int, config: ModelConfig, mesh: Mesh, quantize: str | None = None) -> Step:
    """The step of ``adaptrm score --dtype bfloat16``: one row for the devices that split a layer."""
    definition, abstract = abstract_model(CausalLM, config)
    count = multiplied_parameters(abstract)
    narrow = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), abstract)
    if quantize is not None:
        definition, narrow = int8_shapes(definition, narrow)
    params = _placed(definition, narrow, mesh)
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    store = _rows("judge", row_length, 1)
    tree = store[0][0]
    row = {name: getattr(tree, name) for name in ("tokens", "positions", "subtree_end", "leaves")}
    batch = tuple(_spread(mesh, (rows, *x.shape), x.dtype) for x in row.values())
    flops = training_flops(config, count, *_work(store, rows)) // 3  # no backward pass
    arguments = (definition, ANSWERS, "bfloat16", params, *batch)
    parts = {"parameters": params, "batch": batch}
    return Step(answer_leaves, arguments, parts, row, mesh, (rows, row_length), flops)


def _placed(definition: nnx.GraphDef, abstract: nnx.State, mesh: Mesh) -> nnx.State:
    """Shapes of parameters with the shardings that they will have."""
    places = param_shardings(definition, abstract, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, places)


def _rows(verb: str, row_length: int, count: int, labels: int | None = None) -> TreeStore:
    """Trees that fill a row each.

    Of a reward half of it is a prompt with two responses, of a judge a quarter is a reply with rules, of an adapter a
    third is a prompt, below which both responses stand one after the other, in either order.
    """
    shared, branches = {
        "reward": (row_length // 2, 2),
        "judge": (row_length // 4, max(row_length * 3 // 4 // QUESTION, 1)),
        "adapter": (row_length // 3, 2),
    }[verb]
    # The first branch takes what a division leaves.
    each = max((row_length - shared) // branches, 1)
    first = row_length - shared - each * (branches - 1)
    tree = PrefixTree.build(Node([0] * shared, [Node([0] * size) for size in (first, *[each] * (branches - 1))]))
    store = TreeStore(labels)
    for _ in range(count):
        store.append(tree, 0.0, 1.0)
    return store.freeze()


def _work(store: TreeStore, rows: int) -> tuple[int, int]:
    """Tokens and visible pairs of so many rows."""
    return rows * int(store.lengths[0]), rows * store.visible_pairs(0)


def _spread(mesh: Mesh, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    """One array of a batch, its rows over the mesh as in training."""
    logical = ("rows", *["tokens"] * (len(shape) - 1))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(mesh, shape, logical))


def measure(step: Step, chip: Chip) -> dict[str, Any]:
    """Compile a step.

    Returns:
        Bytes a device of parameters, optimizer and batch (the arguments), of temporaries (activations, gradients,
        gathered parameters) and of all at the peak; whether that fits; FLOPs on all devices by the mathematics, and
        those of one device by a TPU's compiler, which counts the body of a loop once.
    """
    found: dict[str, Any] = {"mesh": dict(step.mesh.shape), "rows": step.shape[0], "row_length": step.shape[1]}
    found |= {name: _bytes_a_device(part) for name, part in step.parts.items()} | {"flops": step.flops}
    with jax.set_mesh(step.mesh):
        lowered = step.jitted.lower(*step.arguments)
    try:
        # Autotuning would run kernels on a GPU that is not there.
        compiled = lowered.compile({"xla_gpu_autotune_level": 0} if chip.platform == "cuda" else None)
    except jax.errors.JaxRuntimeError as wrong:
        if not (used := re.search(r"Used ([\d.]+)([KMGT])", str(wrong))):
            raise
        peak = int(float(used[1]) * 1024 ** ("KMGT".index(used[2]) + 1))
        return found | {"arguments": None, "temporaries": None, "peak": peak, "fits": False, "compiler_flops": None}
    memory = compiled.memory_analysis()
    found |= {"arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes}
    found |= {"peak": memory.peak_memory_in_bytes}
    cost = compiled.cost_analysis()  # None for a GPU
    return found | {"fits": found["peak"] <= chip.memory, "compiler_flops": cost and int(cost["flops"])}


def _bytes_a_device(tree: Any) -> int:
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def for_people(found: dict[str, Any]) -> dict[str, Any]:
    """A plan in words: GiB a device, TFLOPs."""
    shown = {"target": f"{found['target']}: {found['devices']} devices of {found['memory'] / GIB:.2f} GiB"}
    for name, step in found["steps"].items():
        gib = {part: f"{step[part] / GIB:.2f} GiB a device" for part in PARTS if step.get(part) is not None}
        mesh = " x ".join(f"{axis} {size}" for axis, size in step["mesh"].items())
        shown[name] = {
            "mesh": mesh,
            "step": f"{step['rows']} rows of {step['row_length']} tokens",
            **gib,
            "fits": "yes" if step["fits"] else MEND,
            "TFLOPs": f"{step['flops'] / 1e12:.4g}",
        }
    return shown
