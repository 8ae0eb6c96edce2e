"""Loading and saving need host memory for a part of one tensor, whatever the number of layers, mesh and processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import ENV, QUICK
from flax import nnx
from folders import hf_tensors, raw_tensors, write_folder
from ml_dtypes import bfloat16
from tiny import tiny_config

from adaptrm.errors import InputError
from adaptrm.hf import load_weights, open_folder, save_weights
from adaptrm.hf.weight_file import read_header
from adaptrm.models import CausalLM
from adaptrm.parallel import make_mesh

PROGRAM = Path(__file__).parent / "weights_program.py"
TOOL = Path(__file__).parent.parent / "tools" / "host_memory.py"
LAUNCHER = Path(__file__).parent.parent / "launch" / "local.sh"
# 48 layers: one parameter of all of them is three times the largest tensor, the vocabulary of 8 MiB.
MANY_LAYERS = tiny_config(
    vocab_size=8192, hidden_size=256, intermediate_size=512, num_hidden_layers=48, num_attention_heads=4, head_dim=64
)


@pytest.fixture(scope="module")
def many_layers(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    return write_folder(folder / "in", MANY_LAYERS, hf_tensors(MANY_LAYERS), shards=3)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_host_memory_beyond_the_device_arrays_is_less_than_one_tensor(many_layers, tmp_path, processes):
    command = [sys.executable, str(PROGRAM), str(many_layers), str(tmp_path / "out"), str(tmp_path / "result")]
    # As many devices a process that no slice is contiguous: else arrays on the CPU may be those on the host.
    env = ENV | QUICK | {"PROCESSES": str(processes), "DEVICES_PER_PROCESS": str(4 // processes)}
    env["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed goes back to the system at once
    done = subprocess.run(["bash", str(LAUNCHER), *command], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    tool = [sys.executable, str(TOOL), "--model", str(many_layers), "--json", "--hosts", str(processes)]
    said = subprocess.run([*tool, "--devices", str(4 // processes)], env=ENV, capture_output=True, text=True)
    said = json.loads(said.stdout)[str(many_layers)]
    sizes = [len(data) for _, _, data in raw_tensors(many_layers).values()]
    largest, total = max(sizes), sum(sizes)
    for number in range(processes):
        found = json.loads((tmp_path / f"result.{number}").read_text())
        print(f"process {number} of {processes}: {found}, largest tensor {largest}, all {total}")
        file = tmp_path / "out" / "model.safetensors"
        says = "cannot be written: File too large; free space" if number == 0 else "the first process cannot write this"
        assert found.pop("refused").startswith(f"{file}: {says}")
        for name, figures in found.items():
            assert figures["allocated"] <= 1.3 * largest, (name, figures)
            assert figures["resident"] <= 1.3 * largest, (name, figures)
        # Every process reads the slices of its devices and nothing else.
        assert total / processes <= found["load"]["read"] <= 1.05 * total / processes
        assert found["load"]["read"] == said["load_read"]
        assert found["load"]["allocated"] <= said["load_most"] + (1 << 20)
        assert found["save"]["allocated"] <= said["save_most"] + (1 << 20)
    assert (said["largest"], said["total"]) == (largest, total)
    assert raw_tensors(tmp_path / "out") == raw_tensors(many_layers)


CONFIGS = {
    # No axis divides the heads, nor an odd vocabulary.
    "9 heads": tiny_config(
        vocab_size=449, hidden_size=72, num_attention_heads=9, num_key_value_heads=3, attention_bias=True, mlp_bias=True
    ),
    "8 heads": tiny_config(model_type="qwen3", num_attention_heads=8, num_key_value_heads=8, num_hidden_layers=3),
}


@pytest.fixture
def blocks_of(monkeypatch):
    """Blocks of so many bytes, for loading and saving, for small parameters too."""

    def cut(size: int) -> None:
        monkeypatch.setattr("adaptrm.hf.load.SMALL", 0)
        for module in ("load", "export"):
            monkeypatch.setattr(f"adaptrm.hf.{module}.BLOCK_BYTES", size)

    return cut


@pytest.mark.parametrize(
    ("name", "shape", "size"),
    [
        ("9 heads", (1, 1, 1), 2500),
        ("9 heads", (2, 2, 2), 2500),
        ("9 heads", (1, 4, 2), 1),
        ("8 heads", (2, 2, 2), 1000),
        ("8 heads", (1, 2, 4), 1 << 20),
    ],
)
def test_the_size_of_the_blocks_changes_nothing(tmp_path, blocks_of, name, shape, size):
    config = CONFIGS[name]
    tensors = hf_tensors(config, bfloat16)
    # Values that arithmetic may lose: not a number, infinity, -0, the smallest.
    odd = np.array([0x7FC0, 0xFF80, 0x7F80, 0x8000, 0x0001, 0x807F], np.uint16).view(bfloat16)
    for tensor in tensors.values():
        tensor.reshape(-1)[: len(odd)] = odd
    source = open_folder(write_folder(tmp_path / "in", config, tensors, 2))
    devices = jax.devices()[: int(np.prod(shape))]
    blocks_of(size)
    _, state, _ = load_weights(source, CausalLM, make_mesh(*shape, devices=devices))
    save_weights(state, tmp_path / "out")
    assert raw_tensors(tmp_path / "out") == raw_tensors(tmp_path / "in")


@pytest.mark.parametrize("shape", [(1, 4, 2), (1, 1, 8)])
def test_rows_that_are_not_stored_lie_in_the_last_shards(tmp_path, blocks_of, one_device, shape):
    config = CONFIGS["8 heads"]
    tensors = hf_tensors(config)
    source = open_folder(write_folder(tmp_path, config, tensors))
    load = lambda mesh: load_weights(source, CausalLM, mesh, dtype="bfloat16", vocab_size=560)[1]  # noqa: E731
    expected = load(one_device)
    blocks_of(1000)
    got = load(make_mesh(*shape))
    for (path, x), (_, y) in zip(nnx.to_flat_state(got), nnx.to_flat_state(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(x[...]), np.asarray(y[...]), err_msg=str(path))
    rows = np.asarray(got["lm_head"]["weight"][...])
    mean = tensors["lm_head.weight"].mean(axis=0)
    np.testing.assert_allclose(rows[448:].astype(np.float32), np.broadcast_to(mean, (112, 32)), atol=1e-3)


def test_a_read_that_gives_less_than_was_asked_for_goes_on(tmp_path, monkeypatch):
    """As those of network file systems may."""
    tensors = hf_tensors(tiny_config())
    write_folder(tmp_path, tiny_config(), tensors)
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, runs, start: real(file, [runs[0][:99]], start))
    for name, stored in read_header(tmp_path / "model.safetensors").items():
        got = np.empty_like(tensors[name])
        stored.read(got, [0] * got.ndim, got.shape)
        np.testing.assert_array_equal(got, tensors[name])


def test_a_file_that_has_become_shorter_is_one_line(tmp_path, one_device):
    folder = open_folder(write_folder(tmp_path, tiny_config(), hf_tensors(tiny_config())))
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors: has become shorter while it was read"):
        load_weights(folder, CausalLM, one_device)
    file.unlink()
    with pytest.raises(InputError, match=r"model\.safetensors: cannot be read: No such file"):
        load_weights(folder, CausalLM, one_device)
