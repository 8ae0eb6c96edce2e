"""The alignment tax: what safety costs a reward model elsewhere, over mixing weight and merge weight.

As in the published recipe a general reward model comes first: SmolLM2-135M trained on RMB's helpful pairs. From it
one reward model is trained on RMB's harmless pairs for each mixing weight (general pairs mixed in for each safety pair,
``data.mix``), and each of these is averaged with its start by each merge weight (``adaptrm merge``; 0 is the trained
model, 1 the start). All are measured on prompts that none was trained on: safety is RMB harmless and XSTest where one
should refuse; the rest RMB helpful and XSTest where one should respond.

Intervals resample prompts and are paired (``adaptrm compare``). Started again with the same --out it goes on. Prints
JSON, writes OUT/result.json, OUT/table.md and, where matplotlib is installed, OUT/tax.svg.

    pip install '.[plots]'
    python tools/tax_sweep.py --smollm2 DIR --data DIR/pairs --out DIR
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

HARMLESS, HELPFUL, XSTEST = "rmb_harmless_pairs.jsonl.gz", "rmb_helpful_pairs.jsonl.gz", "xstest_pairs.jsonl.gz"
SAFETY, REST = ("RMB harmless", "XSTest, should refuse"), ("RMB helpful", "XSTest, should respond")
# Where a prompt of each file goes, by a hash of it.
PARTS = {HARMLESS: ("held-out", "safety", "safety", None), HELPFUL: ("held-out", "general", "mixed", "mixed")}
TRAINING = {
    "model": {"remat": "none"},
    "data": {"row_length": 1024, "rows_per_step": 2, "labels": "human"},
    "optimizer": {"learning_rate": 5e-5, "schedule": "linear", "warmup_steps": 4},
    "checkpoint": {"every_steps": 1000, "keep": 1},
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", required=True, help="causal language model: a Hugging Face folder")
    parser.add_argument("--data", required=True, type=Path, help="folder of the files of pairs")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--mix", type=numbers, default=[0, 0.5, 1, 2], help="general pairs for each safety pair")
    parser.add_argument("--merge", type=numbers, default=[0, 0.25, 0.5, 0.75], help="share of the start; 1 is added")
    parser.add_argument("--general", type=int, default=120, help="pairs that the start is trained on")
    parser.add_argument("--safety", type=int, default=80, help="pairs that safety is taught with")
    parser.add_argument("--held-out", type=int, default=64, help="pairs of each held-out set")
    parser.add_argument("--longest", type=int, default=384, help="tokens of a conversation; longer ones are left out")
    return parser.parse_args()


def numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


def given(options: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(options).items() if name not in ("smollm2", "data", "out")}


def prepare(options: argparse.Namespace) -> dict[str, Any]:
    """Write general.jsonl, mixed.jsonl, safety.jsonl and held-out.jsonl; returns the options that they are of."""
    from adaptrm.data.chat import ChatTokenizer
    from adaptrm.data.chat_trees import pair_length
    from adaptrm.data.preferences import hash_id, read_pairs

    chat = ChatTokenizer.from_folder(Path(options.smollm2))
    most = {"general": options.general, "mixed": round(max(options.mix) * options.safety), "safety": options.safety}
    parts: dict[str, list[dict[str, Any]]] = {name: [] for name in (*most, "held-out")}
    for file in (HARMLESS, HELPFUL, XSTEST):
        pairs = list(read_pairs(options.data / file))
        taken: dict[str, int] = {}
        for at in np.random.default_rng(0).permutation(len(pairs)):
            pair = pairs[at]
            part = hash_id(json.dumps([dict(message) for message in pair.prompt])) % 4
            if file == XSTEST:
                subset = REST[1] if pair.subset.endswith("respond") else SAFETY[1]
                name, limit = "held-out", options.held_out
            else:
                subset = SAFETY[0] if file == HARMLESS else REST[0]
                name = PARTS[file][part]
                limit = options.held_out if name == "held-out" else most.get(name, 0)
            key = f"{name} {subset}"
            if name is None or taken.get(key, 0) >= limit or pair_length(chat, pair) > options.longest:
                continue
            taken[key] = taken.get(key, 0) + 1
            row = {"id": pair.id, "prompt": [dict(m) for m in pair.prompt], "subset": subset}
            row |= {"response_a": pair.response_a, "response_b": pair.response_b, "preferred": pair.preferred}
            parts[name].append(row)
    for name, rows in parts.items():
        (options.out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return given(options)


def train_from(start: str, out: Path, options: argparse.Namespace, pairs: str, mix: float = 0.0) -> dict[str, Any]:
    """``adaptrm train reward`` from a model, on people's preferences, with general pairs mixed in."""
    from adaptrm.config import parse_options
    from adaptrm.train.run import train

    mixed = [{"pairs": str(options.out / "mixed.jsonl"), "weight": mix}] if mix else []
    section = TRAINING | {"model": TRAINING["model"] | {"pretrained": start}}
    section["data"] = TRAINING["data"] | {"pairs": str(options.out / pairs), "mix": mixed}
    return train("reward", parse_options(section, "tax_sweep"), out)


def measure(model: Path, file: Path, held_out: Path) -> dict[str, Any]:
    from adaptrm.data.rows import BadRows
    from adaptrm.evaluate import SUITES, evaluate
    from adaptrm.reward_model import RewardModel

    scorer, suite = RewardModel.from_pretrained(model).score_sets, SUITES["pairs"]
    named = {"name": "pairs", "model": file.stem, "dtype": "float32"}
    return evaluate(scorer, suite, suite.read(held_out, BadRows()), file, **named)


def once(name: str, file: Path, make) -> Any:
    """What a stage found; made where no earlier run has made it."""
    if not file.exists():
        began = time.perf_counter()
        found = make()
        print(f"{name}: {(time.perf_counter() - began) / 60:.1f} minutes", file=sys.stderr, flush=True)
        file.write_text(json.dumps(found) + "\n")
    return json.loads(file.read_text())


def sweep(options: argparse.Namespace) -> list[tuple[float, float, Path]]:
    """Mixing weight, merge weight and result of every model, that of the start first."""
    from adaptrm.merge import merge

    out = options.out
    if once("data", out / "prepared.json", lambda: prepare(options)) != given(options):
        sys.exit(f"{out}: an earlier run had other options; give another --out")
    once("start", out / "start.json", lambda: train_from(options.smollm2, out / "start", options, "general.jsonl"))
    start, held_out = out / "start" / "export", out / "held-out.jsonl"
    results = [(0.0, 1.0, out / "of-start.json")]
    if not results[0][2].exists():
        measure(start, results[0][2], held_out)
    for mix in options.mix:
        run = out / f"mix-{mix:g}"
        taught = lambda run=run, mix=mix: train_from(str(start), run, options, "safety.jsonl", mix)  # noqa: E731
        once(run.name, out / f"{run.name}.json", taught)
        for share in options.merge:
            file = out / f"of-mix-{mix:g}-merge-{share:g}.json"
            if not file.exists():
                model = run / "export"
                if share:
                    model = out / "merged"
                    merge([str(run / "export"), str(start)], model, [1 - share, share])
                measure(model, file, held_out)
            results.append((mix, share, file))
    return results


def summary(results: list[tuple[float, float, Path]]) -> list[dict[str, Any]]:
    """Accuracies of each model, and what it gains and loses against the start, with paired intervals."""
    from adaptrm.evaluate.compare import compare

    start = results[0][2]
    found = []
    for mix, share, file in results:
        one = json.loads(file.read_text())
        accuracy = {name: one["subsets"][name]["accuracy"] for name in (*SAFETY, *REST)}
        row = {"mix": mix, "merge": share, "accuracy": accuracy}
        row |= {name: float(np.mean([accuracy[s] for s in of])) for name, of in (("safety", SAFETY), ("rest", REST))}
        if file != start:
            subsets = compare([start, file])["differences"][0]["subsets"]
            row["less_start"] = {name: {k: subsets[name][k] for k in ("difference", "ci95", "p")} for name in accuracy}
        found.append(row)
    return found


def as_table(rows: list[dict[str, Any]]) -> str:
    head = ["general pairs mixed in", "share of the start", "safety", "the rest", *SAFETY, *REST]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        start = row["merge"] == 1
        cells = ["the start" if start else f"{row['mix']:g}", "1" if start else f"{row['merge']:g}"]
        cells += [f"{row['safety']:.3f}", f"{row['rest']:.3f}"]
        for name, value in row["accuracy"].items():
            less = row.get("less_start", {}).get(name)
            cells.append(f"{value:.2f}" + (f" ({less['ci95'][0]:+.2f} to {less['ci95'][1]:+.2f})" if less else ""))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Safety against the rest; a line a mixing weight, from the trained model to the start."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: pip install 'adaptrm[plots]'", file=sys.stderr)
        return
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    start, rest = rows[0], rows[1:]
    for mix in sorted({row["mix"] for row in rest}):
        line = [*sorted((row for row in rest if row["mix"] == mix), key=lambda row: row["merge"]), start]
        x, y = ([row[name] for row in line] for name in ("rest", "safety"))
        axes.plot(x, y, marker="o", label=f"{mix:g} general pairs for each safety pair")
        for row in line[:-1]:
            axes.annotate(f"{row['merge']:g}", (row["rest"], row["safety"]), xytext=(4, 4), textcoords="offset points")
    axes.plot([start["rest"]], [start["safety"]], "k*", markersize=16, label="the start")
    axes.set_xlabel("the rest: RMB helpful, XSTest should respond")
    axes.set_ylabel("safety: RMB harmless, XSTest should refuse")
    axes.set_title("Safety against the rest; numbers are the start's share in the merge")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(file)


def main() -> None:
    options = parse_arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    from adaptrm.progress import say

    say("prepare, train the start, then each mixing weight, each merged and measured")
    rows = summary(sweep(options))
    sizes = {p.stem: len(p.read_text().splitlines()) for p in sorted(options.out.glob("*.jsonl"))}
    text = json.dumps({"models": rows, "pairs": sizes, "options": given(options)}, indent=2)
    print(text)
    (options.out / "result.json").write_text(text + "\n")
    (options.out / "table.md").write_text(as_table(rows))
    draw(rows, options.out / "tax.svg")


if __name__ == "__main__":
    main()
