"""``adaptrm evaluate`` against the pipeline of the ``rewardbench`` package: one CPU, one model, the same rows, float32.

Each side scores the same pairs twice, the better time counts. Of rewardbench the time within its pipeline (it tokenizes
and computes a batch of chosen, then of rejected responses, padded to their longest) is taken, from its own command
line; loading and the rendering of the template, which it does before, are left out. Of adaptrm all that ``evaluate``
does from the rows on is counted, rendering and packing too; what is compiled in the first pass is not in the second.
Tokens are those that are computed, padding included. Prints JSON; ``share_of_the_tokens`` is the ratio of the times
over that of the tokens.

    python -m venv venv-rewardbench && venv-rewardbench/bin/pip install rewardbench
    python tools/bench_evaluate.py --model REWARD_MODEL --rewardbench venv-rewardbench/bin/python \\
        --pairs rewardbench=FILTERED.jsonl --pairs hh=PAIRS.jsonl
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

REPEATS = 2
# rewardbench's command line with a clock around its pipeline. It names the device "cuda": where there is none, batches
# stay on the CPU.
THEIRS = f"""
import json, sys, time
from pathlib import Path
import torch
from rewardbench.models.pipeline import RewardBenchPipeline
from rewardbench.rewardbench import main
from transformers import BatchEncoding

out = Path(sys.argv.pop(1))
if not torch.cuda.is_available():
    BatchEncoding.to = lambda batch, device: batch
asked, runs = RewardBenchPipeline.__call__, []

def timed(pipeline, samples, **options):
    began = time.perf_counter()
    logits = asked(pipeline, samples, **options)
    runs[-1]["seconds"] += time.perf_counter() - began
    encoded = pipeline.tokenizer(samples, padding=True)["input_ids"]
    runs[-1]["tokens"] += sum(map(len, encoded))
    return logits

RewardBenchPipeline.__call__ = timed
for _ in range({REPEATS}):
    runs.append({{"seconds": 0.0, "tokens": 0}})
    main()
out.write_text(json.dumps({{"runs": runs, "threads": torch.get_num_threads()}}))
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path, help="exported reward model: a folder")
    parser.add_argument("--rewardbench", required=True, help="python of an environment that has it")
    parser.add_argument("--pairs", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--limit", type=int, default=96, help="pairs of each file")
    parser.add_argument("--longest", type=int, default=512, help="tokens of a conversation; longer ones are left out")
    parser.add_argument("--batch", type=int, default=8, help="pairs a batch of rewardbench")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    return parser.parse_args()


def rows_of(source: str, model, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The first pairs that both sides read alike, as message lists."""
    from adaptrm.data.preferences import read_pairs
    from adaptrm.data.rows import BadRows

    rows = []
    for pair in read_pairs(source, BadRows("skip"), ids_checked=True):
        sides = "ba" if pair.preferred == "b" else "ab"
        chosen, rejected = ([dict(message) for message in pair.conversation(side)] for side in sides)
        alternate = all(m["role"] == ("user", "assistant")[i % 2] for i, m in enumerate(chosen))
        special = model.chat.special_strings("".join(m["content"] for m in [*chosen, *rejected]))
        if alternate and not special and model.pair_length(pair) <= options.longest:
            rows.append({"chosen": chosen, "rejected": rejected})
        if len(rows) == options.limit:
            break
    return rows


def ours(model, file: Path, folder: Path) -> dict[str, Any]:
    """The better time of ``evaluate``, the tokens of its rows, and the scores."""
    import pyarrow.parquet as pq

    from adaptrm.data.chat_trees import pair_tree
    from adaptrm.data.rows import BadRows
    from adaptrm.evaluate import SUITES, evaluate
    from adaptrm.parallel.rows import pack_trees

    suite, named, seconds = SUITES["pairs"], {"name": "pairs", "model": "m", "dtype": "float32"}, []
    for _ in range(REPEATS):
        began = time.perf_counter()
        evaluate(model.score_sets, suite, suite.read(file, BadRows()), folder / "ours.json", **named)
        seconds.append(time.perf_counter() - began)
    sets = list(suite.read(file, BadRows()))
    packed = pack_trees([pair_tree(model.chat, one, model.pad[1]) for one in sets], model.mesh)
    scores = pq.read_table(folder / "ours.rows.parquet")["scores"].to_pylist()
    return {"seconds": seconds, "tokens": int(packed.tokens.size), "scores": scores}


def theirs(options: argparse.Namespace, file: Path, folder: Path) -> dict[str, Any]:
    """The better time of the pipeline of rewardbench, what it computed, and the scores."""
    (folder / "model").symlink_to(options.model.resolve())  # results lie under the model's name
    flags = ("--load_json", "--not_quantized", "--torch_dtype", "float32", "--batch_size", str(options.batch))
    command = [options.rewardbench, "-c", THEIRS, "timed.json", "--model", "model", "--dataset", str(file), *flags]
    environment = os.environ | {"HF_DATASETS_CACHE": str(folder / "cache"), "TOKENIZERS_PARALLELISM": "false"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    told = json.loads((folder / "timed.json").read_text())
    rows = [json.loads(line) for line in (folder / "results/model_outputs.jsonl").read_text().splitlines()]
    return {
        "seconds": [run["seconds"] for run in told["runs"]],
        "tokens": told["runs"][0]["tokens"],
        "threads": told["threads"],
        "scores": [[row["scores_chosen"], row["scores_rejected"]] for row in rows],
    }


def side_by_side(name: str, source: str, model, options: argparse.Namespace) -> dict[str, Any]:
    rows = rows_of(source, model, options)
    print(f"{name}: {len(rows)} pairs", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        file = folder / "pairs.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        mine, other = ours(model, file, folder), theirs(options, file, folder)
    apart = float(np.abs(np.array(mine.pop("scores")) - np.array(other.pop("scores"))).max())
    times, tokens = min(other["seconds"]) / min(mine["seconds"]), other["tokens"] / mine["tokens"]
    return {
        "pairs": len(rows),
        "adaptrm": mine | {"pairs_a_second": len(rows) / min(mine["seconds"])},
        "rewardbench": other | {"pairs_a_second": len(rows) / min(other["seconds"])},
        "scores_apart": apart,
        "ratio_of_times": times,
        "ratio_of_tokens": tokens,
        "share_of_the_tokens": times / tokens,
    }


def main() -> None:
    options = parse_arguments()
    from adaptrm import RewardModel

    model = RewardModel.from_pretrained(options.model)
    named = [pair.partition("=")[::2] for pair in options.pairs]
    result = {name: side_by_side(name, source, model, options) for name, source in named}
    text = json.dumps({"sources": result, "batch": options.batch, "longest": options.longest}, indent=2)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
