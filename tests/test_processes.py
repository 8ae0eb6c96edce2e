"""Two processes, started by launch/local.sh, give what one gives: scores, evaluations and exports."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from commands import ENV, QUICK, pair_rows, write_rows
from tiny import tiny_causal_lm, tiny_pairs, tiny_pool

from adaptrm.config import parse_options
from adaptrm.data.scores import read_parts
from adaptrm.train.run import train

LAUNCHER = Path(__file__).parent.parent / "launch" / "local.sh"
PAIRS, PART = 11, 3  # three whole parts and a smaller one
# Several commands in one start of Python; batches of an evaluation are small, so that there are some for each process.
SEVERAL = f"""
import json, sys
from adaptrm.cli import app
from adaptrm.evaluate import run as evaluate_run
evaluate_run.SETS_AT_ONCE = {PART}
for command in json.loads(sys.argv[1]):
    app(command, standalone_mode=False)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A language model, pairs, rules, and a run that has not written its export yet."""
    out = tmp_path_factory.mktemp("processes")
    tiny_causal_lm(out / "lm", num_hidden_layers=1)
    (out / "pool.yaml").write_text(tiny_pool().to_yaml())
    pairs = [replace(p, preferred="ab"[i % 2] if i % 5 else None) for i, p in enumerate(tiny_pairs(PAIRS))]
    write_rows(out / "pairs.jsonl", [*pair_rows(pairs), {"id": "bad"}])
    data = {"pairs": str(out / "pairs.jsonl"), "labels": "human", "on_bad_row": "skip", "row_length": 512}
    section = {
        "model": {"pretrained": str(out / "lm"), "remat": "none"},
        "data": data | {"rows_per_step": 8},
        "max_steps": 1,
    }
    train("reward", parse_options(section, "test"), out / "run")
    shutil.rmtree(out / "run" / "export")
    return out


def run(folder: Path, out: Path, prefix: tuple[str, ...] = ()) -> tuple[list[dict], str]:
    """What score, score, evaluate and export print as JSON, and what all of them say on stderr."""
    pairs, skip = folder / "pairs.jsonl", ("--on-bad-row", "skip")
    given = ("--pairs", pairs, "--judge", folder / "lm", "--rules", folder / "pool.yaml", "--part-size", PART)
    commands = [
        ("score", *given, *skip, "--out", out / "scores"),
        ("score", *given, *skip, "--out", out / "continued"),
        ("evaluate", folder / "run", *skip, "--data", pairs, "--out", out / "result.json"),
        ("export", folder / "run", out / "export", *(("--verify",) if prefix else ())),
    ]
    as_json = json.dumps([[*map(str, command), "--json"] for command in commands])
    command = [*prefix, sys.executable, "-c", SEVERAL, as_json]
    done = subprocess.run(command, env=ENV | QUICK, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")], done.stderr


def contents(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != ".lock")
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.mark.slow
def test_two_processes_give_the_files_and_figures_of_one(folder, tmp_path):
    (tmp_path / "one").mkdir()
    of_one, _ = run(folder, tmp_path / "one")
    two = tmp_path / "two"
    (two / "continued").mkdir(parents=True)
    earlier = ("manifest.json", "part-00000.parquet", "part-00001.parquet")  # one of each process
    for name in earlier:
        shutil.copy2(tmp_path / "one" / "scores" / name, two / "continued" / name)
    written = [(two / "continued" / name).stat().st_mtime_ns for name in earlier]
    of_two, said = run(folder, two, prefix=("bash", str(LAUNCHER)))

    assert contents(two) == contents(tmp_path / "one")
    assert [(two / "continued" / name).stat().st_mtime_ns for name in earlier] == written
    scored, continued, evaluated, exported = of_two
    assert scored == of_one[0] | {"scores": str(two / "scores")}
    assert continued == scored | {"scores": str(two / "continued")}
    assert {"pairs": PAIRS, "skipped_rows": 1, "parts": 4}.items() <= scored.items()
    masses = [(part.label_mass_a + part.label_mass_b) / 2 for part in read_parts(two / "scores")]
    assert scored["label_mass"] == pytest.approx(sum(mass.mean() * len(mass) for mass in masses) / PAIRS, rel=1e-6)
    assert evaluated == of_one[2] and (evaluated["n"], evaluated["skipped"]) == (8, 3)
    assert "adaptrm" in exported["verified_by"] and max(exported["verified_by"].values()) < 1e-5
    assert said.count(f"score: {PAIRS}/{PAIRS} pairs") == 2  # the first process tells of all
    assert said.count(f"line {PAIRS + 1}") == 3  # and of the bad row once a command
