"""Loads a model, saves it, and writes down what either took of this process's host memory and of the files.

    python weights_program.py MODEL OUT RESULT

``allocated`` is the most that Python and NumPy held at once: all host memory but the arrays on the devices and the
runtime itself. ``resident`` is by how much more the resident memory has grown than the arrays on the devices, at some
of the reads and at the end. ``read`` is bytes of tensors. ``refused`` is what this process says of a save for which the
disk of process 0 is full. A load and a save before all these compile the programs.
"""

import gc
import json
import os
import resource
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import jax

from adaptrm.errors import InputError
from adaptrm.hf import load_weights, open_folder, save_weights
from adaptrm.models import CausalLM
from adaptrm.parallel import make_mesh
from adaptrm.parallel.distributed import start_processes

preadv = os.preadv


def resident() -> int:
    """Bytes, without those of files, which the kernel drops as it likes."""
    _, total, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return (total - shared) * os.sysconf("SC_PAGE_SIZE")


def beyond_devices() -> int:
    return resident() - sum(shard.data.nbytes for array in jax.live_arrays() for shard in array.addressable_shards)


def measured(run: Callable[[], None]) -> dict[str, int]:
    calls, read, most = 0, 0, 0

    def watched(file, buffers, offset):
        nonlocal calls, read, most
        if calls % 100 == 0:
            most = max(most, beyond_devices() - before)
        calls += 1
        read += sum(len(buffer) for buffer in buffers)
        return preadv(file, buffers, offset)

    gc.collect()
    os.preadv = watched
    before = beyond_devices()
    run()
    most = max(most, beyond_devices() - before)
    os.preadv = preadv
    return {"resident": most, "read": read}


def traced(run: Callable[[], None]) -> dict[str, int]:
    tracemalloc.start()
    run()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return {"allocated": most}


def refused(run: Callable[[], None]) -> str:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if jax.process_index() == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        run()
    except InputError as wrong:
        return str(wrong)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return "nothing"


def main(model: str, out: str, result: str) -> None:
    start_processes()
    mesh, states = make_mesh(), []

    def load() -> None:
        states[:] = [load_weights(open_folder(model), CausalLM, mesh, dtype="float32")[1]]

    def save() -> None:
        save_weights(states[0], out)

    load()
    save()
    found = {"save": measured(save) | traced(save)}
    found["refused"] = refused(save)
    states.clear()
    found["load"] = measured(load)
    states.clear()
    found["load"] |= traced(load)
    Path(f"{result}.{jax.process_index()}").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
