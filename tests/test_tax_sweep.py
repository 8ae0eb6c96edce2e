"""The sweep over mixing and merge weights, at a size that says nothing: whole, and of the shape that is reported.

pytest -m slow tests/test_tax_sweep.py --smollm2 DIR --data DIR
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ENV

TOOL = Path(__file__).parent.parent / "tools" / "tax_sweep.py"


@pytest.mark.slow
def test_every_mix_is_merged_and_measured_against_the_start(smollm2, data, tmp_path):
    sizes = (
        "--mix",
        "0,1",
        "--merge",
        "0,.5",
        "--general",
        "4",
        "--safety",
        "4",
        "--held-out",
        "4",
        "--longest",
        "160",
    )
    command = [sys.executable, str(TOOL), "--smollm2", smollm2, "--data", data / "pairs", "--out", tmp_path, *sizes]
    done = subprocess.run([str(x) for x in command], env=ENV, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == json.loads((tmp_path / "result.json").read_text())
    assert [(row["mix"], row["merge"]) for row in found["models"]] == [(0, 1), (0, 0), (0, 0.5), (1, 0), (1, 0.5)]
    assert found["pairs"] == {"general": 4, "held-out": 16, "mixed": 4, "safety": 4}
    subsets = {"RMB harmless", "XSTest, should refuse", "RMB helpful", "XSTest, should respond"}
    for row in found["models"]:
        assert set(row["accuracy"]) == subsets and all(0 <= value <= 1 for value in row["accuracy"].values())
        assert ("less_start" in row) == (row["merge"] != 1)
    rows = [json.loads(line) for line in (tmp_path / "held-out.jsonl").read_text().splitlines()]
    asked = {json.dumps(row["prompt"]) for row in rows}
    for part in ("general", "mixed", "safety"):
        lines = (tmp_path / f"{part}.jsonl").read_text().splitlines()
        assert not asked & {json.dumps(json.loads(line)["prompt"]) for line in lines}
    again = subprocess.run([str(x) for x in (*command, "--safety", "5")], env=ENV, capture_output=True, text=True)
    assert again.returncode == 1 and "an earlier run had other options" in again.stderr
    assert (tmp_path / "table.md").read_text().count("\n") == 7
