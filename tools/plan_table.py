"""The README's table of what the large configs take on each target: memory a device by part, and FLOPs.

    python tools/plan_table.py [CONFIG ...]

Each step is compiled in a process of its own by ``adaptrm plan``, for the targets that the config's header names. It
needs the extras tpu and cuda, minutes and a few gigabytes a step. A line comes as soon as it is known.
"""

import json
import re
import subprocess
import sys

from adaptrm.config import config_folder

GIB = 2**30
COLUMNS = ("parameters", "optimizer", "batch", "temporaries", "peak")
HEAD = ("config", "step", "target", "rows x tokens", *COLUMNS, "of", "PFLOPs a step")


def targets(config: str) -> dict[str, list[str]]:
    """The verb (train or score) and its options -> targets that a config's header names."""
    header = (config_folder() / f"{config}.yaml").read_text()
    found = re.findall(r"^# Targets(?: to (\w+(?: --\w+ \w+)*))?(?: \(.*\))?: (.+)$", header, re.MULTILINE)
    return {command or "train": named.split() for command, named in found}


def planned() -> list[str]:
    """Configs whose header names targets."""
    return sorted(file.stem for file in config_folder().glob("*.yaml") if targets(file.stem))


def row(config: str, name: str, found: dict, step: dict) -> str:
    """One line of the table."""
    sizes = [f"{step[part] / GIB:.1f}" if step.get(part) is not None else "" for part in COLUMNS]
    over = "" if step["fits"] else " (does not fit)"
    cells = (config, name, found["target"], f"{step['rows']} x {step['row_length']:,}", *sizes)
    return f"| {' | '.join(cells)} | {found['memory'] / GIB:.1f}{over} | {step['flops'] / 1e15:.2f} |"


def main(configs: list[str]) -> None:
    print("GiB a device:\n")
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}", flush=True)
    for config in configs or planned():
        for step_command, named in targets(config).items():
            verb, *given = step_command.split()
            for target in named:
                command = ["adaptrm", "plan", config, "--target", target, "--only", verb, *given, "--json"]
                found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
                for name, step in found["steps"].items():
                    print(row(config, " ".join([name, *given]), found, step), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
