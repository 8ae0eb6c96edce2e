"""Host memory that loading and saving take, and what every host reads: from shapes, shardings and sizes of files alone.

For each model the parameters are laid out as `adaptrm train` lays them out, on HOSTS x DEVICES devices, all on the fsdp
axis unless --tensor says otherwise; the devices are only a description. MODEL is a name that adaptrm knows the shapes
of, stored in bfloat16, or a Hugging Face folder, whose headers are read. Bytes a host, beyond the device arrays and the
process itself:

    bound      1.3 x the largest tensor
    load_most  the largest block, twice: as it was read, and once more on its way to the devices
    save_most  the largest block of float32 parameters, on the host that writes
    load_read  what the host that reads most reads of all files

tests/test_host_memory.py measures the same of a model of 48 layers. Prints a table, or JSON.

    python tools/host_memory.py --hosts 2 --devices 4
    python tools/host_memory.py --model FOLDER --hosts 4 --devices 8 --tensor 8 --json
"""

import argparse
import json
import math
import os

DEFAULT = ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Meta-Llama-3-70B-Instruct")
COLUMNS = ("total", "largest", "bound", "load_most", "save_most", "load_read")
GB = 1e9


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help=f"repeatable; default {' and '.join(DEFAULT)}")
    for name, value in {"hosts": 2, "devices": 4, "tensor": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def held(bounds: list[list[tuple[int, int]]], axis: int) -> int:
    """Elements that a host reads for its devices: each run of rows once, of the columns from the first to the last."""
    rows = {one[axis] for one in bounds}
    columns = zip(*(one[axis + 1 :] for one in bounds), strict=True)
    width = math.prod(max(high for _, high in some) - min(low for low, _ in some) for some in columns)
    layers = bounds[0][0][1] - bounds[0][0][0] if axis else 1
    return layers * sum(high - low for low, high in rows) * width


def host_memory(name: str, options: argparse.Namespace) -> dict[str, int]:

    from adaptrm.hf import open_folder
    from adaptrm.hf.blocks import BLOCK_BYTES, Blocks, bounds_of
    from adaptrm.hf.keys import key_table
    from adaptrm.hf.load import SMALL, abstract_model, logical_axes
    from adaptrm.hf.weight_file import DTYPES
    from adaptrm.models import CausalLM
    from adaptrm.models.known import KNOWN
    from adaptrm.parallel import make_mesh, sharding

    folder = None if name in KNOWN else open_folder(name)
    config = KNOWN[name] if folder is None else folder.config
    definition, abstract = abstract_model(CausalLM, config)
    axes, table = logical_axes(definition, abstract), key_table(abstract)
    mesh = make_mesh(1, -1, options.tensor)
    hosts = [mesh.devices.flat[i : i + options.devices] for i in range(0, mesh.size, options.devices)]
    sizes = {
        tensor: 2 if folder is None else DTYPES[folder.tensors[tensor].dtype].itemsize
        for key in table
        for tensor in key.names
    }
    tensors = [math.prod(key.tensor_shape) * sizes[tensor] for key in table for tensor in key.names]
    largest, load_most, save_most = max(tensors), 0, 0
    read = [0] * len(hosts)
    for key in table:
        layout = sharding(mesh, key.shape, axes[key.path])
        size = sizes[key.names[0]]
        if math.prod(key.shape) * 4 <= SMALL:
            read = [count + math.prod(key.shape) * size for count in read]
            continue
        load = Blocks(key.shape, layout, key.stacked, size, max(min(BLOCK_BYTES, largest // 2), SMALL))
        save = Blocks(key.shape, layout, key.stacked, 4, BLOCK_BYTES)
        save_most = max(save_most, math.prod(save.shape_of_one) * 4)
        for number, devices in enumerate(hosts):
            where = layout.devices_indices_map(key.shape)
            block = layout.devices_indices_map(load.shape_of_one)
            read[number] += held([bounds_of(where[d], key.shape) for d in devices], load.axis) * size
            most = held([bounds_of(block[d], load.shape_of_one) for d in devices], load.axis) * size
            load_most = max(load_most, 2 * most)
    return {
        "parameters": sum(math.prod(key.shape) for key in table),
        "total": sum(tensors),
        "largest": largest,
        "bound": int(1.3 * largest),
        "load_most": load_most,
        "save_most": save_most,
        "load_read": max(read),
    }


def main() -> None:
    options = parse_arguments()
    count = options.hosts * options.devices
    os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={count}"}
    found = {name: host_memory(name, options) for name in options.model or DEFAULT}
    if options.json:
        print(json.dumps(found, indent=2))
        return
    print("| GB a host, " + f"{options.hosts} hosts x {options.devices} devices | " + " | ".join(COLUMNS) + " |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for name, figures in found.items():
        print(f"| {name} | " + " | ".join(f"{figures[column] / GB:.3f}" for column in COLUMNS) + " |")


if __name__ == "__main__":
    main()
