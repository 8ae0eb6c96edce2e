"""``fit_evidence`` over many pairs: time, memory, and what its passes cost beside a plain reading of the scores.

Of each size it makes a score folder of ``noisy`` rules in a temporary folder (d = a Z + sigma * noise, a fifth of the
rules with five times the noise, as METHOD.md's world "noisy 20"), and in processes of their own reads the scores and
nothing else, and fits them; the two take turns. Times are the medians in seconds, of the clock and of the processor
(the second says more where other work shares the cores). Checks that the fit finds the noisy rules: their mean weight
against that of the others, which should be .04 by the world's truth. Memory grows with the pairs up to the 200,000 that
are sampled, and then no more. Prints JSON.

    python tools/bench_evidence.py --out bench.json
    python tools/bench_evidence.py --pairs 100000 200000 1000000 --rules 100 --repeats 3
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

STRENGTH, NOISE, NOISY = 0.15, 0.3, 1.5
FIGURES = ("seconds", "cpu_seconds", "peak_mib", "above_start_mib")
SIDES = {
    "read": "from adaptrm.data.scores import read_batches; run = lambda: sum(len(x.ids) for x in read_batches(folder))",
    "fit": "from adaptrm import fit_evidence; run = lambda: fit_evidence(folder)",
}
PROGRAM = """
import json, resource, sys, time
import jax, pyarrow.parquet
folder = sys.argv[1]
{imports}
jax.numpy.zeros(1).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
wall, cpu = time.perf_counter(), time.process_time()
found = run()
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
figures = {{"seconds": wall, "cpu_seconds": cpu, "peak_mib": peak / 1024, "above_start_mib": (peak - before) / 1024}}
if not isinstance(found, int):
    figures |= {{"weights": found.weights.tolist(), "report": {{**found.report, "by_rule": None}}}}
print(json.dumps(figures))
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = [100_000, 200_000, 1_000_000]
    parser.add_argument("--pairs", type=int, nargs="+", default=sizes, help=f"default {sizes}")
    parser.add_argument("--rules", type=int, default=100, help="default 100")
    parser.add_argument("--part", type=int, default=4096, help="pairs a part, default 4096")
    parser.add_argument("--repeats", type=int, default=1, help="default 1")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    import jax

    runs = []
    for pairs in options.pairs:
        with tempfile.TemporaryDirectory(prefix="adaptrm-bench-") as folder:
            size = make_folder(Path(folder), pairs, options.rules, options.part)
            runs.append({"pairs": pairs, "bytes_of_scores": size} | measured(folder, options))
        print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
    least, most = (pick(runs, key=lambda run: run["pairs"]) for pick in (min, max))
    found = {
        "runs": runs,
        "peak_mib_of_most_to_least_pairs": round(most["fit"]["peak_mib"] / least["fit"]["peak_mib"], 2),
        "good": all(run["noisy_to_other_weight"] < 0.1 for run in runs),
        "options": {name: value for name, value in vars(options).items() if name != "out"},
        "versions": {"jax": jax.__version__, "numpy": np.__version__},
        "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()},
    }
    text = json.dumps(found, indent=2)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")
    if not found["good"]:
        sys.exit("the noisy rules were not found")


def measured(folder: str, options: argparse.Namespace) -> dict:
    """Both sides in turns."""
    found: dict[str, list[dict]] = {side: [] for side in SIDES}
    for _ in range(options.repeats):
        for side, imports in SIDES.items():
            command = [sys.executable, "-c", PROGRAM.format(imports=imports), folder]
            found[side].append(json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout))
    figures = {
        side: {name: round(statistics.median(run[name] for run in runs), 2) for name in FIGURES}
        for side, runs in found.items()
    }
    weights, report = np.array(found["fit"][0]["weights"]), found["fit"][0]["report"]
    noisy = options.rules // 5
    ratio = float(np.abs(weights[:noisy]).mean() / weights[noisy:].mean())
    named = {name: report[name] for name in ("pairs_fitted", "trust", "warnings")}
    cost = {"cpu_of_fit_to_read": round(figures["fit"]["cpu_seconds"] / figures["read"]["cpu_seconds"], 2)}
    return figures | cost | {"noisy_to_other_weight": round(ratio, 4)} | named


def make_folder(folder: Path, pairs: int, rules: int, part: int) -> int:
    """Scores, written as they are made. Returns their bytes."""
    from adaptrm.data.scores import Scores, write_manifest, write_part

    names = [f"rule-{i}" for i in range(rules)]
    starts = range(0, pairs, part)
    write_manifest(folder, {"rules": names, "pairs": "none", "pairs_sha256": "none", "parts": len(starts)})
    rng = np.random.default_rng(0)
    scale = np.where(np.arange(rules) < rules // 5, NOISY, NOISE).astype(np.float32)
    for number, start in enumerate(starts):
        ids = [f"pair-{i}" for i in range(start, min(start + part, pairs))]
        preference = rng.choice(np.float32([-1, 1]), (len(ids), 1))
        d = STRENGTH * preference + scale * rng.standard_normal((len(ids), rules), np.float32)
        # Halves of d, in steps of .01 so that a pair takes less disk, and few beyond 1.
        a = np.rint(100 * np.clip(d / 8, -1, 1)) / np.float32(100)
        one = np.ones_like(a)
        write_part(folder, number, Scores(ids, names, a, -a, one, a, -a, one, one))
    return sum(file.stat().st_size for file in folder.iterdir())


if __name__ == "__main__":
    main()
