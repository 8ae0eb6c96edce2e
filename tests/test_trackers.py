"""Trackers beside metrics.jsonl, the profiler's trace, and progress in plain lines."""

import json
import re
import sqlite3
import struct
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from commands import ENV

from adaptrm import progress as shown
from adaptrm.config import parse_options
from adaptrm.errors import InputError
from adaptrm.train import trackers
from adaptrm.train.profiler import TRACED, WARM_UP
from adaptrm.train.trackers import check_trackers, open_metrics, shown_options

SECRET = "a-name-that-nobody-may-see"
OPTIONS = parse_options(
    {
        "model": {"pretrained": SECRET},
        "data": {"pairs": SECRET, "labels": SECRET, "mix": [{"pairs": SECRET, "labels": "human", "weight": 1}]},
        "evaluation": {"pairs": SECRET},
        "seed": 7,
    },
    "test",
)


def write(out: Path, name: str, steps: range, start: int = 0) -> None:
    """Metrics of some steps, with numbers that are not there and that JSON does not know."""
    with open_metrics(out, replace(OPTIONS, trackers=(name,)), start) as log:
        for step in steps:
            log.write({"step": step, "loss": 1 / step, "mfu": None, "margin": float("nan"), "finite": float("inf")})


def test_options_are_shown_without_what_holds_paths_and_names():
    told = shown_options(OPTIONS)
    assert told["seed"] == 7 and told["optimizer.schedule"] == "linear" and told["data.overlong"] == "fail"
    assert SECRET not in str(told)


def test_what_is_not_installed_or_cannot_be_written_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(trackers.MODULES, "wandb", "a_module_that_is_not_there")
    with pytest.raises(InputError, match=r"^trackers: wandb is not installed; pip install 'adaptrm\[wandb\]'"):
        check_trackers(["wandb"], tmp_path)
    monkeypatch.setitem(trackers.MODULES, "tensorboard", "json")
    with pytest.raises(InputError, match=r"^trackers: tensorboard writes to a local run folder, not to memory://x"):
        check_trackers(["tensorboard"], "memory://x")
    check_trackers([], "memory://x")


def test_a_tracker_that_fails_is_left_out_and_ends_nothing(tmp_path, monkeypatch, capsys):
    told = []

    @contextmanager
    def tracker(*_):
        def log(step, numbers):
            told.append(step)
            raise ConnectionError("gone" * 999)

        yield log

    @contextmanager
    def broken(*_):
        raise OSError("database is locked")
        yield

    monkeypatch.setitem(trackers.OPEN, "trackio", tracker)
    write(tmp_path, "trackio", range(1, 4))
    assert told == [1] and len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    assert "a tracker failed and is told no more: ConnectionError: 'gone" in capsys.readouterr().err
    monkeypatch.setitem(trackers.OPEN, "trackio", broken)
    with pytest.raises(InputError, match=r"^trackers: trackio cannot start: OSError: 'database is locked'; mend"):
        write(tmp_path, "trackio", range(4, 5))


def test_without_a_tracker_there_is_the_file_alone(tmp_path):
    with open_metrics(tmp_path, OPTIONS, 0) as log:
        log.write({"step": 1, "loss": float("nan")})
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": None}


def records(file: Path) -> list[bytes]:
    """A record is its length, a checksum, the event, a checksum."""
    data, found = file.read_bytes(), []
    assert SECRET.encode() not in data
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        found.append(data[12 : 12 + size])
        data = data[16 + size :]
    return found


def losses(events) -> list[tuple[int, float]]:
    values = [(event.step, value) for event in events for value in event.summary.value]
    return [(step, value.simple_value) for step, value in values if value.tag == "loss"]


def test_tensorboard_reads_back_what_was_written_and_drops_what_a_restart_repeats(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    write(tmp_path, "tensorboard", range(1, 4))
    write(tmp_path, "tensorboard", range(3, 6), start=2)
    files = sorted((tmp_path / "tensorboard").iterdir(), key=lambda file: file.suffix)
    first, second = ([Event.FromString(record) for record in records(file)] for file in files)
    assert losses(first) == [(n, pytest.approx(1 / n)) for n in (1, 2, 3)]
    assert losses(second) == [(n, pytest.approx(1 / n)) for n in (3, 4, 5)]
    assert [e.step for e in second if e.session_log.status] == [3]  # TensorBoard passes over what came from there on


def test_wandb_goes_on_with_the_same_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    write(tmp_path, "wandb", range(1, 4))
    write(tmp_path, "wandb", range(3, 6), start=2)
    known_as = (tmp_path / "tracker-id").read_text()
    files = list((tmp_path / "wandb").rglob("*.wandb"))
    assert {file.stem for file in files} == {f"run-{known_as}"} and files
    assert not any(SECRET.encode() in file.read_bytes() for file in files)
    assert any(b"loss" in file.read_bytes() for file in files)


def test_trackio_goes_on_with_the_same_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip("trackio")
    write(tmp_path, "trackio", range(1, 4))
    write(tmp_path, "trackio", range(3, 6), start=2)
    assert not capsys.readouterr().out
    with sqlite3.connect(tmp_path / "trackio" / "adaptrm.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
    name = f"{tmp_path.name}-{(tmp_path / 'tracker-id').read_text()}"
    assert {row[0] for row in rows} == {name}
    told = [(step, json.loads(text)["loss"]) for _, step, text in rows]
    assert told == [(n, pytest.approx(1 / n)) for n in (1, 2, 3, 3, 4, 5)]


PROFILED = """
import sys
from pathlib import Path

import jax

from adaptrm.train.profiler import profiled

add, state = jax.jit(lambda state, batch: (state + batch, state)), jax.numpy.zeros(8)
with profiled(add, Path(sys.argv[1])) as step:
    for _ in range(int(sys.argv[2])):
        state, _ = step(state, 1.0)
assert state.tolist() == [int(sys.argv[2])] * 8
"""


@pytest.mark.parametrize("calls", [WARM_UP, WARM_UP + 1, WARM_UP + TRACED + 2])
def test_a_profile_holds_a_trace_of_the_steps_after_the_first_ones(tmp_path, calls):
    # In a process of its own, as users have it: the profiler traces all threads that a process ever had.
    command = [sys.executable, "-c", PROFILED, str(tmp_path), str(calls)]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.rglob("*.xplane.pb"))) == (calls > WARM_UP)
    count = min(calls - WARM_UP, TRACED)
    assert f"profile of {count} steps: {tmp_path}" in done.stderr if count else "no profile: it begins" in done.stderr


def test_plain_lines_say_rate_and_end_as_soon_as_they_are_known(monkeypatch, capsys):
    monkeypatch.setattr(shown, "SECONDS_BETWEEN_LINES", 0.0)
    with shown.progress("train", "steps", 5, done=2) as steps:
        for _ in range(3):
            steps.advance(1, "loss 1")
    first, second, last = capsys.readouterr().err.splitlines()
    assert first == "train: 3/5 steps, loss 1"  # the first says nothing of the rest
    assert re.fullmatch(r"train: 4/5 steps, [\d.]+/s, ends \d\d:\d\d:\d\d, loss 1", second)
    assert re.fullmatch(r"train: 5/5 steps, [\d.]+/s, loss 1", last)
