"""The command line as a user runs it, in processes of its own that can be killed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adaptrm import cli

ADAPTRM = str(Path(sys.executable).parent / "adaptrm")
# One device a process: these tests are about processes, and eight devices would only be slower.
ENV = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
# As in conftest.py: commands that compute for moments start faster without optimised machine code.
QUICK = {"XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_multi_thread_eigen=false"}


def adaptrm(
    *args: Any, prefix: tuple[str, ...] = (), check: bool = True, long: bool = False
) -> subprocess.CompletedProcess:
    """Run a command to its end; ``long`` for one that computes for minutes."""
    command = [*prefix, ADAPTRM, *map(str, args)]
    env = ENV if long else ENV | QUICK
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=3600 if long else 600)
    if check:
        assert done.returncode == 0, done.stderr
    return done


def in_process(monkeypatch, capsys, *args: Any) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command in this process."""
    monkeypatch.setattr(sys, "argv", ["adaptrm", *map(str, args)])
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as left:
        cli.main()
    code = left.value.code
    return (0 if code is None else code, *capsys.readouterr())


def kill_when(ready: Callable[[], bool], *args: Any, by: int = signal.SIGKILL, code: int = -signal.SIGKILL) -> None:
    """Start a command and ``kill -9`` it as soon as ``ready`` says so; it must not have ended before.

    Args:
        by, code: another signal, and how it ends then.
    """
    process = subprocess.Popen(
        [ADAPTRM, *map(str, args)], env=ENV | QUICK, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    while not ready() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(by)
    assert process.wait(timeout=60) == code, "it ended before it was killed"


def start_together(*command: Any, count: int = 2) -> list[subprocess.Popen]:
    """A command as several processes of one program; of one it is alone."""
    several = {"JAX_NUM_PROCESSES": str(count), "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}"}
    return [
        subprocess.Popen(
            [*map(str, command)],
            env=ENV | QUICK | (several | {"JAX_PROCESS_ID": str(number)} if count > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pair_rows(pairs) -> list[dict]:
    return [vars(pair) | {"prompt": [dict(m) for m in pair.prompt]} for pair in pairs]


CLOCKED = ("mfu", "memory_gib")


def losses(run: Path) -> list[dict]:
    """Metrics of a run without what depends on the clock."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in CLOCKED and not k.endswith("per_second")} for line in lines]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
