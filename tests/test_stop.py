"""A run that is told to stop, by SIGTERM or by its own losses: what it says, leaves, and goes on from."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import pytest
import yaml
from commands import in_process, losses, pair_rows, write_rows
from tiny import tiny_causal_lm, tiny_pairs

from adaptrm import cli
from adaptrm.config import OptimizerOptions, TrainOptions, load_options
from adaptrm.errors import RESTART, Stopped
from adaptrm.preemption import stops_at_once
from adaptrm.train import loop
from adaptrm.train.reports import TrainingFailed
from adaptrm.train.run import train

WEIGHTS = "export/model.safetensors"


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """A config of 18 steps on a tiny language model."""
    out = tmp_path_factory.mktemp("stop")
    tiny_causal_lm(out / "lm")
    write_rows(out / "pairs.jsonl", pair_rows([replace(pair, preferred="a") for pair in tiny_pairs(24)]))
    section = {
        "model": {"pretrained": str(out / "lm"), "remat": "none"},
        "data": {"pairs": str(out / "pairs.jsonl"), "labels": "human", "row_length": 512, "rows_per_step": 4},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2},
        "mesh": {"fsdp": 4, "tensor": 2},
        "checkpoint": {"every_steps": 100, "keep": 2},
        "epochs": 6,
    }
    (out / "config.yaml").write_text(yaml.safe_dump({"reward": section}))
    return out / "config.yaml"


@pytest.fixture(scope="module")
def straight(config) -> Path:
    """A run that nothing interrupts."""
    run = config.parent / "straight"
    train("reward", load_options(config, "reward"), run)
    return run


@contextmanager
def terminated_when(ready: Callable[[], bool]) -> Iterator[None]:
    """SIGTERM to this process as soon as ``ready`` says so."""
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            if ready():
                os.kill(os.getpid(), signal.SIGTERM)
                return
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def lines(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def test_sigterm_saves_the_step_and_the_run_goes_on_exactly(config, straight, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    command = ("train", "reward", config, "--out", run, "--json")
    before = signal.getsignal(signal.SIGTERM)
    with terminated_when(lambda: lines(run) >= 3):
        code, out, err = in_process(monkeypatch, capsys, *command)
    assert code == RESTART == 75 and out == ""
    step = lines(run)
    steps = lines(straight)
    assert 3 <= step < steps
    said = f"adaptrm: stopped by SIGTERM after step {step} of {steps}, saved; start the same command again to go on"
    assert err.splitlines()[-1] == said
    assert [p.name for p in (run / "checkpoints").iterdir()] == [str(step)]
    assert not (run / "export").exists()
    assert signal.getsignal(signal.SIGTERM) == before
    assert in_process(monkeypatch, capsys, *command)[0] == 0
    assert losses(run) == losses(straight)
    assert (run / WEIGHTS).read_bytes() == (straight / WEIGHTS).read_bytes()


def test_sigterm_with_nothing_to_save_stops_at_once():
    message = "stopped by SIGTERM; what was saved is kept; start the same command again to go on"
    with pytest.raises(Stopped, match=message), stops_at_once(), terminated_when(lambda: True):
        time.sleep(60)


def test_every_verb_ends_with_75(monkeypatch, capsys):
    def waits() -> None:
        with terminated_when(lambda: True):
            time.sleep(60)

    monkeypatch.setattr(cli, "app", waits)
    code, out, err = in_process(monkeypatch, capsys)
    assert (code, out) == (RESTART, "")
    assert err == "adaptrm: stopped by SIGTERM; what was saved is kept; start the same command again to go on\n"


SWALLOWS = """
import os, signal, time
from adaptrm import cli
def verb():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    except BaseException:
        print("swallowed", flush=True)
    time.sleep(60)
cli.app = verb
cli.main()
"""


def test_a_library_that_swallows_the_stop_does_not_hold_it_up():
    done = subprocess.run([sys.executable, "-c", SWALLOWS], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout) == (RESTART, "swallowed\n")
    assert done.stderr == "adaptrm: stopped by SIGTERM; what was saved is kept; start the same command again to go on\n"


@pytest.fixture
def sometimes_infinite(monkeypatch) -> set[int]:
    """Steps whose batches weigh infinitely much, so that the loss is not finite."""
    bad: set[int] = set()
    real = loop.device_batches

    def spoiled(store, plan, mesh, start, stop):
        for number, batch in enumerate(real(store, plan, mesh, start, stop), start + 1):
            weights = batch["weights"]
            yield batch | {"weights": weights * jnp.inf if number in bad else weights}

    monkeypatch.setattr(loop, "device_batches", spoiled)
    return bad


def with_few(config: Path, most: int) -> TrainOptions:
    optimizer = OptimizerOptions(learning_rate=1e-3, schedule="constant", warmup_steps=0)
    options = load_options(config, "reward", {"max_steps": 8, "max_nonfinite_steps": most})
    return replace(options, optimizer=optimizer, checkpoint=replace(options.checkpoint, every_steps=2))


def test_steps_that_are_not_finite_are_skipped_and_counted(config, tmp_path, sometimes_infinite, capsys):
    sometimes_infinite |= {3, 6}
    run = tmp_path / "run"
    train("reward", with_few(config, 2), run)
    found = losses(run)
    assert [line["skipped"] for line in found] == [0, 0, 1, 1, 1, 2, 2, 2]
    assert [line["step"] for line in found if line["loss"] is None] == [3, 6]
    said = "step 6: the loss or its gradient is not finite (loss nan, gradient norm nan); skipped, the 2. of at most 2"
    assert said in capsys.readouterr().err


def test_one_skipped_step_too_many_ends_the_run_also_after_a_restart(config, tmp_path, sometimes_infinite):
    sometimes_infinite |= {3, 6}
    run, options = tmp_path / "run", with_few(config, 1)
    with pytest.raises(TrainingFailed, match=r"step 6: .*, 2 such steps so far, max_nonfinite_steps is 1; the last"):
        train("reward", options, run)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["2", "4"]
    with pytest.raises(TrainingFailed, match=r"step 6: .*, 2 such steps so far"):  # the first of them was before step 4
        train("reward", options, run)
    train("reward", replace(options, max_nonfinite_steps=2), run)  # it may be raised, and the run goes on
    assert [line["skipped"] for line in losses(run)] == [0, 0, 1, 1, 1, 2, 2, 2]
