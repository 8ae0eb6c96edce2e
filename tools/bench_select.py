"""Selection beside one pass over its input, lax.top_k, NumPy and a pandas loop; and label over many pairs.

All sides give the five rules of each pair by relevance + 0.5 |a - b| and are compared; they take turns, and times are
medians in seconds, of the clock and of the processor (the second says more where other work shares the cores). The pass
that reads the same three arrays and no more is the fastest of several reductions; the kernel is measured with and
without the check that all scores are in range. A first run of each side, with compilation, is left out. Prints JSON.

    python tools/bench_select.py --out bench.json
    python tools/bench_select.py --label 100000 1000000 10000000

--label makes pairs and a score folder of so many pairs in a temporary folder (its scores are multiples of .01, so that
a pair takes some 700 bytes of disk), runs ``adaptrm label`` on it in a process of its own, and deletes it. The bytes
that one more pair takes are those by which the peaks of the smallest and the largest set differ.
"""

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

K, WEIGHT = 5, 0.5
LABEL = """
import json, resource, sys, time
from adaptrm.label import LabelJob, label
wall, cpu = time.perf_counter(), time.process_time()
found = label(LabelJob(scores=f"{sys.argv[1]}/scores", out=f"{sys.argv[1]}/labels.jsonl"))
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps(found | {"seconds": wall, "cpu_seconds": cpu, "peak_mib": peak / 1024}))
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"pairs": 1_000_000, "rules": 100, "repeats": 5, "pandas-pairs": 200, "part": 4096}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--label", type=int, nargs="+", metavar="PAIRS", help="measure label on so many pairs instead")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    import jax

    found = bench_label(options) if options.label else bench_kernels(options)
    found["options"] = {name: value for name, value in vars(options).items() if name != "out"}
    found["versions"] = {"jax": jax.__version__, "numpy": np.__version__}
    found["machine"] = {"cores": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()}
    text = json.dumps(found, indent=2)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")
    if not found["equal"]:
        sys.exit("the sides do not agree")


def bench_kernels(options: argparse.Namespace) -> dict:
    import jax
    import jax.numpy as jnp

    from adaptrm.selection.kernel import checked_rows, select_rows, sum_in_order

    rng = np.random.default_rng(0)
    shape = (options.pairs, options.rules)
    host = [rng.random(shape, np.float32) for _ in range(3)]
    for x in host[:2]:
        x *= 2
        x -= 1
    arrays = [jax.device_put(x) for x in host]
    weight = jnp.float32(WEIGHT)
    passes = {
        "sum of each row": jax.jit(lambda a, b, r: jnp.sum(a + b + r, axis=1)),
        "sum of each column": jax.jit(lambda a, b, r: jnp.sum(a + b + r, axis=0)),
        "sum of each array": jax.jit(lambda a, b, r: (jnp.sum(a), jnp.sum(b), jnp.sum(r))),
    }

    @jax.jit
    def top_k(a, b, relevance):
        difference = a - b
        weighted = weight * jnp.abs(difference)
        score = relevance + jnp.where(jnp.isnan(weighted), 0.0, weighted)  # two roundings, as the kernel has them
        chosen = jax.lax.top_k(score, K)[1]
        return chosen, sum_in_order(jnp.take_along_axis(difference, chosen, axis=1))

    def numpy() -> tuple:
        a, b, relevance = host
        difference = a - b
        score = relevance + np.float32(WEIGHT) * np.abs(difference)
        some = np.sort(np.argpartition(-score, K - 1, axis=1)[:, :K], axis=1)
        order = np.argsort(-np.take_along_axis(score, some, axis=1), axis=1, kind="stable")
        chosen = np.take_along_axis(some, order, axis=1)
        margin = np.zeros(len(a), np.float32)
        for picked in np.take_along_axis(difference, chosen, axis=1).T:
            margin = margin + picked
        return chosen, margin

    rest = (weight, None, jnp.uint32(0), jnp.arange(options.pairs))
    sides: dict[str, Callable] = {
        "kernel": lambda: select_rows(*arrays, *rest, strategy="max-discrepancy", k=K),
        "kernel with checks": lambda: checked_rows(*arrays, *rest, strategy="max-discrepancy", k=K),
        "top_k": lambda: top_k(*arrays),
        "argpartition": numpy,
    }
    sides |= {f"pass: {name}": lambda run=run: run(*arrays) for name, run in passes.items()}
    results, times = in_turns(sides, options.repeats)
    bound = min((name for name in times if name.startswith("pass")), key=lambda name: times[name]["seconds"])
    pandas = loop_of_pandas(host, options.pandas_pairs)
    chosen, margin = (np.asarray(x) for x in results["kernel"])
    equal = {
        "kernel with checks": all(
            np.array_equal(x, y) for x, y in zip(results["kernel with checks"][:2], (chosen, margin), strict=True)
        ),
        "top_k": all(np.array_equal(x, y) for x, y in zip(results["top_k"], (chosen, margin), strict=True)),
        # argpartition breaks ties at the k-th place as it likes; elsewhere it must agree.
        "argpartition": bool((results["argpartition"][0] == chosen).all(axis=1).mean() > 1 - 1e-4),
    }
    if pandas["installed"]:
        rows = len(pandas["chosen"])
        equal["pandas"] = bool((pandas.pop("chosen") == np.sort(chosen[:rows], axis=1)).all(axis=1).mean() > 0.99)
        pandas["scaled_to_all_seconds"] = pandas["seconds"] * options.pairs / rows
    kernel = times["kernel"]
    to_bound = {"kernel": f"kernel to {bound}", "kernel with checks": "with checks to it", "top_k": "top_k to it"}
    ratio = {named: (times[name], times[bound]) for name, named in to_bound.items()}
    ratio["argpartition to kernel"] = (times["argpartition"], kernel)
    return {
        "sides": times,
        "pandas_loop": pandas,
        "ratios": {
            name: {kind: round(one[kind] / other[kind], 2) for kind in kernel} for name, (one, other) in ratio.items()
        },
        "gigabytes_read": 3 * host[0].nbytes / 1e9,
        "equal_by_side": equal,
        "equal": all(equal.values()),
    }


def in_turns(sides: dict[str, Callable], repeats: int) -> tuple[dict, dict]:
    """What each side gives in a run that is not timed, and its median wall and CPU seconds in the others."""
    import jax

    results = {name: jax.block_until_ready(run()) for name, run in sides.items()}
    times: dict[str, list] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            wall, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(run())
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    kinds = ("seconds", "cpu_seconds")
    return results, {
        name: {kind: round(statistics.median(x), 4) for kind, x in zip(kinds, zip(*found, strict=True), strict=True)}
        for name, found in times.items()
    }


def loop_of_pandas(host: list[np.ndarray], rows: int) -> dict:
    """The published way: a data frame a pair, its rules sorted by their score."""
    try:
        import pandas as pd
    except ImportError:
        return {"installed": False}
    begin, chosen = time.perf_counter(), []
    for a, b, relevance in zip(*(x[:rows] for x in host), strict=True):
        frame = pd.DataFrame({"a": a, "b": b, "relevance": relevance})
        frame["score"] = frame["relevance"] + np.float32(WEIGHT) * (frame["a"] - frame["b"]).abs()
        top = frame.sort_values("score", ascending=False).head(K)
        chosen.append(sorted(top.index))
        (top["a"] - top["b"]).sum()
    seconds = time.perf_counter() - begin
    return {"installed": True, "pairs": len(chosen), "seconds": seconds, "chosen": np.asarray(chosen)}


def bench_label(options: argparse.Namespace) -> dict:
    runs = []
    for pairs in options.label:
        with tempfile.TemporaryDirectory(prefix="adaptrm-bench-") as folder:
            size = make_folder(Path(folder), pairs, options.rules, options.part)
            command = [sys.executable, "-c", LABEL, folder]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout)
            with open(f"{folder}/labels.jsonl", "rb") as stream:
                lines = sum(1 for _ in stream)
        figures = {name: round(found[name], 2) for name in ("seconds", "cpu_seconds", "peak_mib")}
        counts = {"pairs": found["pairs"], "labelled": found["labelled"], "lines": lines}
        rates = {"pairs_per_second": round(pairs / found["seconds"]), "bytes_of_scores": size}
        runs.append(counts | figures | rates)
        print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
    least, most = (pick(runs, key=lambda run: run["pairs"]) for pick in (min, max))
    more = max(most["pairs"] - least["pairs"], 1)
    return {
        "runs": runs,
        "peak_bytes_per_further_pair": round((most["peak_mib"] - least["peak_mib"]) * 2**20 / more, 1),
        "equal": all(run["labelled"] == run["lines"] for run in runs)
        and [run["pairs"] for run in runs] == options.label,
    }


def make_folder(folder: Path, pairs: int, rules: int, part: int) -> int:
    """Pairs and their scores, written as they are made. Returns the bytes of the scores."""
    from adaptrm.data.scores import Scores, write_manifest, write_part

    digest = hashlib.sha256()
    starts = range(0, pairs, part)
    with open(folder / "pairs.jsonl", "wb") as stream:
        for start in starts:
            lines = "".join(
                f'{{"id": "pair-{i}", "prompt": "What of pair {i}?", "response_a": "This is what one says of it.", '
                f'"response_b": "That is what another says.", "preferred": "{"ab"[i % 2]}"}}\n'
                for i in range(start, min(start + part, pairs))
            ).encode()
            stream.write(lines)
            digest.update(lines)
    names = [f"rule-{i}" for i in range(rules)]
    manifest = {"rules": names, "pairs": str(folder / "pairs.jsonl"), "pairs_sha256": digest.hexdigest()}
    write_manifest(folder / "scores", manifest | {"parts": len(starts)})
    rng = np.random.default_rng(0)
    for number, start in enumerate(starts):
        ids = [f"pair-{i}" for i in range(start, min(start + part, pairs))]
        shape = (len(ids), rules)
        a, b, share = (rng.integers(low, 101, shape, np.int8) / np.float32(100) for low in (-100, -100, 0))
        columns = {"a": a, "b": b, "relevance": share, "log_odds_a": a, "log_odds_b": b}
        columns |= {"label_mass_a": share, "label_mass_b": share}
        write_part(folder / "scores", number, Scores(ids, names, **columns))
    return sum(file.stat().st_size for file in (folder / "scores").iterdir())


if __name__ == "__main__":
    main()
