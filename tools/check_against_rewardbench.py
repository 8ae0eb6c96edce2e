"""The suites' figures against the benchmarks' own functions, on the same scores.

Scores of several made-up scorers (lengths, noise, noise so coarse that many are equal) are given to the rows of
RewardBench v1, RewardBench 2 and RM-Bench. ``adaptrm evaluate``'s functions and the benchmarks' own, which run in an
environment of their own, turn them into sections. Prints JSON: the largest difference by suite and scorer, and exits
with 1 where one is above 1e-9.

RewardBench 2 is made up here in the shape of its rows, Ties included; so are rows of domains of RM-Bench that the files
do not have. REWARD_BENCH is a checkout of allenai/reward-bench, or the package: the margin term of Ties leaves out
prompts whose right answers are all equal in release 0.1.4 and counts them as 1 since (``--made-spread`` makes none).

    python -m venv theirs && theirs/bin/pip install rewardbench fschat
    python tools/check_against_rewardbench.py --python theirs/bin/python --reward-bench REWARD_BENCH \\
        --rm-bench RM_BENCH/scripts/utils.py --v1-rows FILTERED.jsonl --rm-bench-rows PAIRS.jsonl
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from adaptrm.data.preferences import ResponseSet, hash_id
from adaptrm.data.rows import BadRows, read_rows
from adaptrm.evaluate import SUITES, evaluate
from adaptrm.evaluate.rewardbench2 import PUBLISHED
from adaptrm.evaluate.rm_bench import DOMAINS

TOLERANCE = 1e-9
# What runs in the benchmarks' environment: rows with their scores on stdin, sections on stdout.
THEIRS = """
import contextlib, importlib.util, json, logging, sys
given = json.load(sys.stdin)
with contextlib.redirect_stdout(sys.stderr):
    import numpy as np
    from datasets import Dataset
    from rewardbench.constants import EXAMPLE_COUNTS, SUBSET_MAPPING
    from rewardbench.utils import calculate_scores_per_section, process_single_model, reroll_and_score_dataset
    spec = importlib.util.spec_from_file_location("rm_bench_utils", given["rm_bench"])
    rm_bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rm_bench)

    def rewardbench(rows):  # as rewardbench.py does
        subsets = sorted({row["subset"] for row in rows})
        right = {s: [row["scores"][0] > row["scores"][1] for row in rows if row["subset"] == s] for s in subsets}
        means = {s: sum(values) / len(values) for s, values in right.items()}
        found = calculate_scores_per_section(EXAMPLE_COUNTS, SUBSET_MAPPING, means)
        return {k: v for k, v in found.items() if any(s in means for s in SUBSET_MAPPING[k])}

    def rewardbench_2(rows):  # as scripts/run_v2.py does
        unrolled = [{**row, "scores": score, "text": ""} for row in rows for score in row["scores"]]
        whole = reroll_and_score_dataset(Dataset.from_list(unrolled), [len(row["scores"]) for row in rows])
        found = {}
        for subset in sorted({row["subset"] for row in rows}):
            of_subset = whole.filter(lambda row: row["subset"] == subset)
            if subset.lower() == "ties":
                found[subset] = process_single_model(of_subset)[1]
            else:
                found[subset] = sum(of_subset["results"]) / len(of_subset)
        return found

    def of_rm_bench(rows):
        split = lambda row: {"score_chosen": row["scores"][:3], "score_rejected": row["scores"][3:]}
        found = rm_bench.compute_accuracy([{"domain": row["subset"], **split(row)} for row in rows])
        return {k.removesuffix("_acc"): float(v) for k, v in found.items() if k != "total_avg_acc"}

    functions = {"rewardbench": rewardbench, "rewardbench-2": rewardbench_2, "rm-bench": of_rm_bench}
    result = [functions[one["suite"]](one["rows"]) for one in given["cases"]]
print(json.dumps(result))
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="of the environment that has rewardbench and fschat")
    parser.add_argument("--reward-bench", type=Path, help="a checkout to import instead of the installed package")
    parser.add_argument("--rm-bench", type=Path, required=True, help="scripts/utils.py of THU-KEG/RM-Bench")
    parser.add_argument("--v1-rows", required=True, help="rows under RewardBench's column names")
    parser.add_argument("--rm-bench-rows", required=True, help="rows of RM-Bench, or pairs of it with meta.base")
    parser.add_argument("--made-spread", action="store_true", help="no right answers of Ties that are all equal")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    return parser.parse_args()


def made_rewardbench_2(rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Rows in the shape of allenai/reward-bench-2, a tenth as many."""
    for domain, count in PUBLISHED.items():
        for number in range(count // 10):
            if domain != "Ties":
                yield of_lists(str(number), domain, made(rng, 1), made(rng, 3))
                continue
            yield of_lists(f"ref:{number}", domain, made(rng, 1), made(rng, int(rng.integers(1, 9))))
            many = int(rng.integers(2, 20))
            yield of_lists(f"tied:{number}", domain, made(rng, many), made(rng, int(rng.integers(1, 20))))


def made(rng: np.random.Generator, count: int) -> list[str]:
    return ["x" * int(rng.integers(1, 60)) for _ in range(count)]


def of_lists(name: Any, subset: str, chosen: list[str], rejected: list[str]) -> dict[str, Any]:
    return {"id": name, "subset": subset, "prompt": f"{subset} {name}", "chosen": chosen, "rejected": rejected}


def of_rm_bench(file: str, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Rows of RM-Bench; pairs of it are put together by their prompt, and domains that are absent are made up."""
    rows: dict[Any, dict[str, Any]] = {}
    for number, (_, row) in enumerate(read_rows(file)):
        if "domain" in row:
            rows[number] = dict(row)
            continue
        meta = row["meta"]
        domain = row["subset"].partition("/")[0]
        one = rows.setdefault(
            meta["base"], {"id": meta["base"], "domain": domain, "prompt": row["prompt"], "chosen": {}, "rejected": {}}
        )
        for side in ("chosen", "rejected"):
            one[side][meta["style_index"]] = row[side]
    for one in rows.values():
        for side in ("chosen", "rejected"):
            if isinstance(one[side], dict):
                one[side] = [text for _, text in sorted(one[side].items())]
    found = list(rows.values())
    for domain in DOMAINS:
        if not any(row["domain"].startswith(domain) for row in found):
            found += [of_lists(i, "", made(rng, 3), made(rng, 3)) | {"domain": domain} for i in range(40)]
    return found


def scorers(spread: bool) -> dict[str, Any]:
    """Rewards by what a text and its place hash to; float32, as a model gives them."""

    def noise(one: ResponseSet, steps: int) -> np.ndarray:
        rng = np.random.default_rng([hash_id(one.id), steps])
        values = rng.standard_normal(len(one.responses)) + np.array(one.grades)
        coarse = np.round(values * steps) / steps
        return (coarse + 1e-3 * np.arange(len(coarse)) * spread).astype(np.float32)

    length = lambda one: np.array([len(text) for text in one.responses], np.float32)  # noqa: E731
    return {
        "length": lambda sets: [length(one) + 1e-3 * np.arange(len(one.responses)) * spread for one in sets],
        "noise": lambda sets: [noise(one, 1 << 20) for one in sets],
        "coarse noise": lambda sets: [noise(one, 1) for one in sets],
    }


def ours(suite: str, rows: Iterable[dict[str, Any]], scorer, folder: Path) -> tuple[dict[str, float], list[dict]]:
    """Sections, and what each row was scored."""
    import pyarrow.parquet as pq

    sets = SUITES[suite].read(rows, BadRows())
    result = evaluate(scorer, SUITES[suite], sets, folder / "out.json", name=suite, model="made", dtype="float32")
    table = pq.read_table(folder / "out.rows.parquet").to_pylist()
    named = {"Ties": lambda name: name.partition("/")[2]}
    scored = [
        {"id": named.get(row["subset"], str)(row["id"]), "subset": row["subset"], "scores": row["scores"]}
        | {"num_correct": row["chosen"]}
        for row in table
    ]
    return result["sections"], scored


def main() -> None:
    options = parse_arguments()
    rng = np.random.default_rng(0)
    rows = {
        "rewardbench": [row for _, row in read_rows(options.v1_rows)],
        "rewardbench-2": list(made_rewardbench_2(rng)),
        "rm-bench": of_rm_bench(options.rm_bench_rows, rng),
    }
    cases, mine = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for suite, of_suite in rows.items():
            for name, scorer in scorers(options.made_spread).items():
                sections, scored = ours(suite, of_suite, scorer, Path(scratch))
                cases.append({"suite": suite, "scorer": name, "rows": scored})
                mine.append(sections)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if options.reward_bench is not None:
        environment["PYTHONPATH"] = str(options.reward_bench.absolute())
    given = json.dumps({"rm_bench": str(options.rm_bench.absolute()), "cases": cases})
    done = subprocess.run([options.python, "-c", THEIRS], input=given, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    result = {"cases": [], "rows": {suite: len(of_suite) for suite, of_suite in rows.items()}}
    for case, sections, theirs in zip(cases, mine, json.loads(done.stdout.splitlines()[-1]), strict=True):
        assert sections.keys() == theirs.keys(), (sections, theirs)
        apart = max(abs(value - theirs[name]) for name, value in sections.items())
        result["cases"].append({"suite": case["suite"], "scorer": case["scorer"], "apart": apart, "sections": sections})
    result["largest"] = max(case["apart"] for case in result["cases"])
    text = json.dumps(result, indent=2)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")
    if result["largest"] > TOLERANCE:
        sys.exit(f"the largest difference is {result['largest']:.2e}")


if __name__ == "__main__":
    main()
