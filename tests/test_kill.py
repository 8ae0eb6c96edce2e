"""Real processes that are killed, stopped and started again, here or on other devices: the run is the same one."""

import os
import random
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import commands
import numpy as np
import pytest
import yaml
from commands import ADAPTRM, ENV, QUICK, adaptrm, kill_when, losses, pair_rows, start_together, write_rows
from tiny import tiny_causal_lm, tiny_pairs, tiny_pool

from adaptrm.train.checkpoint import latest_step

pytestmark = pytest.mark.slow  # about ten minutes on two cores
LAUNCHER = Path(__file__).parent.parent / "launch" / "local.sh"
WEIGHTS = Path("export") / "model.safetensors"


def config(folder: Path, epochs: int) -> Path:
    """A config of three steps an epoch on a tiny language model."""
    tiny_causal_lm(folder / "lm")
    pairs = [replace(p, preferred="a" if len(p.response_a) > len(p.response_b) else "b") for p in tiny_pairs(24)]
    write_rows(folder / "pairs.jsonl", pair_rows(pairs))
    section = {
        "model": {"pretrained": str(folder / "lm"), "remat": "none"},
        "data": {"pairs": str(folder / "pairs.jsonl"), "labels": "human", "row_length": 512, "rows_per_step": 4},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2},
        "checkpoint": {"every_steps": 3, "keep": 2},
        "epochs": epochs,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump({"reward": section}))
    return folder / "config.yaml"


def lines(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def assert_same(run: Path, straight: Path) -> None:
    """The same metrics, and the same weights bit for bit."""
    assert losses(run) == losses(straight)
    assert (run / WEIGHTS).read_bytes() == (straight / WEIGHTS).read_bytes()


def test_ten_kills_at_random_moments_change_nothing(tmp_path):
    file = config(tmp_path, epochs=40)
    straight, run = tmp_path / "straight", tmp_path / "run"
    adaptrm("train", "reward", file, "--out", straight)
    steps = lines(straight)
    assert steps == 120
    chance = random.Random(0)
    command, metrics = ("train", "reward", file, "--out", run), run / "metrics.jsonl"
    for target in sorted(chance.sample(range(1, steps - 10), 10)):
        started, moment = time.time_ns(), chance.uniform(0, 0.1)

        def ready(target: int = target, started: int = started) -> bool:
            return metrics.exists() and metrics.stat().st_mtime_ns > started and lines(run) >= target

        def at_a_moment(ready=ready, moment: float = moment) -> bool:
            return ready() and time.sleep(moment) is None

        kill_when(at_a_moment, *command)
        assert not (run / "export").exists()
    adaptrm(*command)
    assert_same(run, straight)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["117", "120"]  # nothing torn is left


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A config of 24 steps and a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("made")
    adaptrm("train", "reward", config(folder, epochs=8), "--out", folder / "straight")
    return folder


def stopped_by_sigterm(made: Path, run: Path, processes: int = 1) -> None:
    """Start a run, and send SIGTERM to its last process after some steps; all of them end with 75, saved."""
    started = start_together(ADAPTRM, "train", "reward", made / "config.yaml", "--out", run, count=processes)
    deadline = time.monotonic() + 300
    while lines(run) < 5 and time.monotonic() < deadline and started[0].poll() is None:
        time.sleep(0.001)
    started[-1].send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [75] * processes, said
    step = lines(run)
    assert 5 <= step < 24
    for text in said:
        assert f"adaptrm: stopped by SIGTERM after step {step} of 24, saved;" in text
        assert "Traceback" not in text
    assert str(step) in {path.name for path in (run / "checkpoints").iterdir()}


@pytest.fixture(scope="module")
def stopped(made) -> Path:
    stopped_by_sigterm(made, made / "stopped")
    return made / "stopped"


def test_stopped_and_started_again_it_goes_on_bit_for_bit(made, stopped, tmp_path):
    run = shutil.copytree(stopped, tmp_path / "run")
    adaptrm("train", "reward", made / "config.yaml", "--out", run)
    assert_same(run, made / "straight")


def assert_close(run: Path, straight: Path) -> None:
    for a, b in zip(losses(straight), losses(run), strict=True):
        assert a["pairs"] == b["pairs"]
        np.testing.assert_allclose(b["loss"], a["loss"], rtol=1e-5, atol=1e-5)


def test_it_goes_on_on_another_mesh(made, stopped, tmp_path, monkeypatch):
    run = shutil.copytree(stopped, tmp_path / "run")
    monkeypatch.setattr(commands, "ENV", ENV | {"JAX_NUM_CPU_DEVICES": "4"})
    adaptrm("train", "reward", made / "config.yaml", "--out", run, "--mesh.fsdp", 2, "--mesh.tensor", 2)
    assert_close(run, made / "straight")


def test_it_goes_on_in_two_processes(made, stopped, tmp_path):
    run = shutil.copytree(stopped, tmp_path / "run")
    adaptrm("train", "reward", made / "config.yaml", "--out", run, prefix=("bash", str(LAUNCHER)))
    assert_close(run, made / "straight")


def test_two_processes_stop_together_and_one_goes_on(made, tmp_path):
    run = tmp_path / "run"
    stopped_by_sigterm(made, run, processes=2)
    adaptrm("train", "reward", made / "config.yaml", "--out", run)
    assert_close(run, made / "straight")


def test_two_processes_that_score_are_stopped_and_killed_and_go_on(tmp_path):
    tiny_causal_lm(tmp_path / "lm")
    (tmp_path / "pool.yaml").write_text(tiny_pool().to_yaml())
    write_rows(tmp_path / "pairs.jsonl", pair_rows(tiny_pairs(40)))
    given = ("--pairs", tmp_path / "pairs.jsonl", "--judge", tmp_path / "lm", "--rules", tmp_path / "pool.yaml")
    command = ("score", *given, "--part-size", 2)
    one, two = tmp_path / "one", tmp_path / "two"
    adaptrm(*command, "--out", one)
    for told in (0, 1, None):
        before = len(list(two.glob("part-*.parquet")))
        started = start_together(ADAPTRM, *command, "--out", two)
        deadline = time.monotonic() + 300
        while len(list(two.glob("part-*.parquet"))) < before + 4 and time.monotonic() < deadline:
            time.sleep(0.005)
        if told is None:
            for process in started:
                process.kill()
            assert [process.wait() for process in started] == [-signal.SIGKILL] * 2
            continue
        started[told].send_signal(signal.SIGTERM)
        said = [process.communicate(timeout=30)[1] for process in started]
        assert [process.returncode for process in started] == [75] * 2, said
        assert all("adaptrm: stopped by SIGTERM; what was saved is kept; start" in text for text in said)
    assert len(list(two.glob("part-*.parquet"))) < 20
    adaptrm(*command, "--out", two, prefix=("bash", str(LAUNCHER)))
    files = [{file.name: file.read_bytes() for file in out.iterdir() if file.name != ".lock"} for out in (one, two)]
    assert files[0] == files[1]


def test_a_process_that_waits_for_one_that_hangs_ends_by_its_watchdog(made, tmp_path):
    """The second process is suspended in the middle; the first waits in a collective, and names the step."""
    several = {"JAX_NUM_PROCESSES": "2", "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{12001 + os.getpid() % 9000}"}
    run = tmp_path / "run"
    command = [ADAPTRM, "train", "reward", str(made / "config.yaml"), "--out", str(run), "--watchdog_seconds", "20"]
    first, second = (
        subprocess.Popen(command, env=ENV | QUICK | several | {"JAX_PROCESS_ID": n}, stderr=subprocess.PIPE, text=True)
        for n in "01"
    )
    try:
        deadline = time.monotonic() + 300
        while lines(run) < 4 and time.monotonic() < deadline and first.poll() is None:
            time.sleep(0.001)
        second.send_signal(signal.SIGSTOP)
        said = first.communicate(timeout=300)[1]
    finally:
        second.kill()
        second.communicate()
    assert first.returncode == 75, said
    assert "nothing has moved for " in said.splitlines()[-1] and "Thread 0x" in said
    assert any(f"adaptrm: {what}" in said for what in ("step ", "saving "))
    adaptrm("train", "reward", made / "config.yaml", "--out", run)
    assert_close(run, made / "straight")


@pytest.fixture
def small_disk(made, tmp_path):
    """A disk with room for two checkpoints and a half; and how to mount it otherwise."""
    size = sum(file.stat().st_size for file in (made / "straight" / "checkpoints" / "24").rglob("*"))
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(*options: str) -> bool:
        return subprocess.run(["mount", "-t", "tmpfs", *options, "adaptrm", str(disk)]).returncode == 0

    if not mount("-o", f"size={size * 5 // 2}"):
        pytest.skip("disks are mounted by root alone")
    try:
        yield disk, lambda change: mount("-o", f"remount,{change}")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_full_and_a_read_only_disk_leave_the_last_good_checkpoint(made, small_disk):
    disk, remount = small_disk
    run = disk / "run"
    command = ("train", "reward", made / "config.yaml", "--out", run)
    full = adaptrm(*command, check=False)
    assert full.returncode == 2 and "Traceback" not in full.stderr
    message = f"adaptrm: {run}/checkpoints: a checkpoint cannot be written: No space left on device; free space or"
    assert full.stderr.splitlines()[-1].startswith(message)
    assert latest_step(run / "checkpoints") in (3, 6)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert remount("ro")
    refused = adaptrm(*command, check=False)
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    said = refused.stderr.splitlines()[-1]
    assert said.startswith(f"adaptrm: {run}") and "Read-only file system" in said
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert remount("rw,size=100m")
    adaptrm(*command)
    assert_same(run, made / "straight")
