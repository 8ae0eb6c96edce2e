"""``adaptrm demo``: the whole chain on the synthetic world, with the code that real runs use."""

import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from adaptrm import paths
from adaptrm.config import load_options
from adaptrm.data.preferences import Pair, read_pairs
from adaptrm.data.scores import read_parts
from adaptrm.demo.tokenizer import make_tokenizer
from adaptrm.demo.world import World, demo_pool, make_pairs, rule_labels
from adaptrm.evaluate import evaluate_pairs
from adaptrm.export import export_run
from adaptrm.judge.score import ScoreJob, score
from adaptrm.label import LabelJob, label
from adaptrm.progress import say
from adaptrm.reward_model import RewardModel
from adaptrm.train.run import train

STRATEGIES = ("max-discrepancy", "random", "all")
NEITHER, SEED = 5, 0


def run_demo(out: str | os.PathLike, pairs_to_label: int = 1200) -> dict[str, Any]:
    """Make a world, train a judge, score, select, label, train reward models, evaluate, export, verify.

    Started again with the same folder it goes on where it stopped.

    Args:
        pairs_to_label: the size of the world; held-out pairs and the replies that the judge learns from are in
            proportion. From less than the default the models learn little.

    Returns:
        The figures, and ``table`` for people.
    """
    out = Path(out)
    began = time.perf_counter()
    few, many = (round(pairs_to_label * share) for share in (5 / 12, 5 / 3))
    say(f"1/7 A synthetic world with planted truth: {pairs_to_label} pairs, {few} held out, {len(demo_pool())} rules.")
    world, held_out, judged = make_pairs(pairs_to_label, SEED), make_pairs(few, SEED + 1), make_pairs(many, SEED + 2)
    pool, pairs = out / "rules.yaml", out / "pairs.jsonl"
    make_tokenizer(judged.texts(), out / "tokenizer")
    paths.write_bytes(pool, demo_pool().to_yaml().encode())
    _write_lines(pairs, map(_row, world.pairs))
    _write_lines(out / "held-out.jsonl", map(_row, held_out.pairs))
    _write_lines(out / "rule-labels.jsonl", rule_labels(judged, many, NEITHER, SEED))

    say(f"2/7 Train a judge on rule labels of {many} other replies.")
    tokenizer = {"model.scratch.tokenizer": str(out / "tokenizer")}
    labelled = {"data.labels": str(out / "rule-labels.jsonl"), "data.rules": str(pool)}
    train("judge", load_options("demo", "judge", tokenizer | labelled), out / "judge")

    say("3/7 Score every response against every rule.")
    scored = score(ScoreJob(str(pairs), str(out / "judge"), str(pool), str(out / "scores")))
    figures: dict[str, Any] = {"judge_accuracy": judge_accuracy(out / "scores", world), "strategies": {}}

    say("4/7 Select rules and label the pairs, three ways.")
    options = load_options("demo", "reward", tokenizer | {"data.pairs": str(pairs)})
    for strategy in STRATEGIES:
        file = str(out / f"labels-{strategy}.jsonl")
        summary = label(LabelJob(str(out / "scores"), file, strategy=strategy, seed=SEED))
        figures["strategies"][strategy] = {"label_agreement": summary["agreement"], "ties": summary["ties"]}

    for strategy in STRATEGIES:
        say(f"5/7 Train a reward model on the labels of {strategy}.")
        run = out / f"reward-{strategy}"
        data = replace(options.data, labels=str(out / f"labels-{strategy}.jsonl"))
        train("reward", replace(options, data=data), run)

    say("6/7 Measure the reward models on held-out pairs with the hidden truth.")
    for strategy in STRATEGIES:
        run = out / f"reward-{strategy}"
        scorer = RewardModel.from_pretrained(run).score_pairs
        held = read_pairs(out / "held-out.jsonl")
        result = evaluate_pairs(scorer, held, run / "held-out.json", model=str(run), dtype="float32")
        figures["strategies"][strategy] |= {"accuracy": result["accuracy"], "ci95": result["ci95"]}

    say("7/7 Export the reward model of max-discrepancy and read it back.")
    verified = export_run(out / "reward-max-discrepancy", out / "export", check=True)
    figures |= {"export": str(out / "export"), "verified_by": verified}
    figures |= {"label_mass": scored["label_mass"], "seconds": round(time.perf_counter() - began, 1)}
    return figures | {"table": _table(figures)}


def judge_accuracy(scores: str | os.PathLike, world: World) -> float:
    """Share of the rules that a response keeps or breaks where the judge's score has the right sign."""
    right = total = row = 0
    for part in read_parts(scores):
        truth = world.truth[row : row + len(part)]
        said = np.stack([part.a, part.b], axis=1)
        applies = truth != 0
        right += int((np.sign(said) == truth)[applies].sum())
        total += int(applies.sum())
        row += len(part)
    return right / total


def _row(pair: Pair) -> dict[str, Any]:
    return vars(pair) | {"prompt": [dict(message) for message in pair.prompt]}


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with paths.writing(path) as stream:
        for row in rows:
            stream.write((json.dumps(row) + "\n").encode())


def _table(figures: Mapping[str, Any]):
    from rich.table import Table

    table = Table(title="Agreement with the hidden preference")
    for column in ("strategy", "labels", "reward model, held out (95 % interval)"):
        table.add_column(column)
    for strategy, found in figures["strategies"].items():
        low, high = found["ci95"]
        reward = f"{found['accuracy']:.3f} ({low:.3f} to {high:.3f})"
        table.add_row(strategy, f"{found['label_agreement']:.3f}", reward)
    table.caption = f"Judge: {figures['judge_accuracy']:.3f} of the rules that apply judged as planted"
    return table
