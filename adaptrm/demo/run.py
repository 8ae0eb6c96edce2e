"""``adaptrm demo``: the whole chain on two synthetic worlds, with the code that real runs use."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from adaptrm import paths
from adaptrm.config import TrainOptions, load_options
from adaptrm.data.chat import ChatTokenizer
from adaptrm.data.labels import read_labels
from adaptrm.data.rows import BadRows
from adaptrm.data.scores import read_parts
from adaptrm.demo.adapter import ask_few
from adaptrm.demo.figures import FULL_SEEDS, TRAINED, summary, table_of
from adaptrm.demo.pictures import draw
from adaptrm.demo.rows import write_pairs, write_rows
from adaptrm.demo.tokenizer import make_tokenizer
from adaptrm.demo.world import WORLDS, World, demo_pool, make_pairs, rule_labels
from adaptrm.errors import InputError
from adaptrm.evaluate import SUITES, evaluate
from adaptrm.evidence.job import EvidenceOptions
from adaptrm.export import export_run
from adaptrm.judge.prompts import JudgePrompt
from adaptrm.judge.score import ScoreJob, score
from adaptrm.label import LabelJob, label
from adaptrm.progress import say
from adaptrm.reward_model import RewardModel
from adaptrm.train.run import train

NEITHER = 5
K = 4  # rules a pair
# What somebody might pick who picks once for all pairs.
FIXED = ("declines-harm", "respects-law", "explains-reason", "offers-alternative")
PAIRS_COUNTED = 200  # whose tokens say what a pair costs


def run_demo(out: str | os.PathLike, pairs_to_label: int = 800, full: bool = False) -> dict[str, Any]:
    """Make two worlds, train a judge, score, select, label, train reward models, evaluate, export, verify.

    Started again with the same folder it goes on where it stopped; with ``full`` the first seed's work is used.

    Args:
        pairs_to_label: the size of each world; held-out pairs and the replies that the judge learns from are in
            proportion. From less than the default the models learn little.
        full: five seeds of everything, and intervals of the differences between strategies.

    Returns:
        The figures, and ``table`` for people.

    Raises:
        InputError: the folder holds a demo of another size.
    """
    out = Path(out)
    began = time.perf_counter()
    size = _once(out / "demo.json", lambda: {"pairs": pairs_to_label})["pairs"]
    if size != pairs_to_label:
        raise InputError(f"{out}: holds a demo of {size} pairs; give --pairs {size}, or another --out")
    found = [_one_seed(out / f"seed-{seed}", pairs_to_label, seed) for seed in range(FULL_SEEDS if full else 1)]
    say("Export the reward model of evidence in the noisy world and read it back.")
    run = out / "seed-0" / "noisy" / "reward-evidence"
    verified = _once(out / "verified.json", lambda: export_run(run, out / "export", check=True))
    figures = summary(found) | {"export": str(out / "export"), "verified_by": verified}
    figures |= {"pictures": draw(figures, out / "pictures")}
    paths.write_bytes(out / "figures.json", (json.dumps(figures, indent=2) + "\n").encode())
    return figures | {"seconds": round(time.perf_counter() - began, 1), "table": table_of(figures)}


def _once(file: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a stage found, made where no earlier run has made it."""
    if not paths.exists(file):
        paths.write_bytes(file, (json.dumps(make()) + "\n").encode())
    return json.loads(paths.read_bytes(file))


def _one_seed(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """Both worlds of a seed, with one judge."""
    held, replies = round(count * 5 / 8), 3 * count  # of each world
    say(f"Seed {seed}: two worlds with planted truth, {count} pairs to label in each, {held} held out.")
    tokenizer, pool, labels = folder / "tokenizer", folder / "rules.yaml", folder / "rule-labels.jsonl"
    first = 3 * seed
    _once(folder / "learnt.json", lambda: _write_learnt(tokenizer, pool, labels, replies, first + 2))

    scratch = {"model.scratch.tokenizer": str(tokenizer), "seed": seed}
    options = load_options("demo", "judge", scratch | {"data.labels": str(labels), "data.rules": str(pool)})
    say(f"Seed {seed}: train a judge on rule labels of {2 * replies} other replies.")
    _once(folder / "judge.json", lambda: train("judge", options, folder / "judge"))
    found: dict[str, Any] = {}
    for name in WORLDS:
        world, held_out = make_pairs(name, count, first), make_pairs(name, held, first + 1)
        adapter, reward = (load_options("demo", verb, scratch) for verb in ("adapter", "reward"))
        found[name] = _one_world(folder / name, folder, world, held_out, adapter, reward)
    return found


def _write_learnt(tokenizer: Path, pool: Path, labels: Path, replies: int, seed: int) -> dict[str, Any]:
    """What a judge learns from: of each world so many replies, with labels of what they do with some rules."""
    worlds = [make_pairs(world, -(-replies // 2), seed) for world in WORLDS]
    make_tokenizer((text for world in worlds for text in world.texts()), tokenizer)
    paths.write_bytes(pool, demo_pool().to_yaml().encode())
    write_rows(labels, (row for world in worlds for row in rule_labels(world, replies, NEITHER, seed)))
    return {"replies": len(worlds) * replies}


def _one_world(
    folder: Path, of_seed: Path, world: World, held_out: World, adapter: TrainOptions, reward: TrainOptions
) -> dict[str, Any]:
    """Score, label by every strategy, train reward models and measure them."""
    what = f"{of_seed.name}, {folder.name} world"
    pairs, held, pool = folder / "pairs.jsonl", folder / "held-out.jsonl", folder / "rules.yaml"
    paths.write_bytes(pool, world.pool.to_yaml().encode())
    write_pairs(pairs, world.pairs)
    write_pairs(held, held_out.pairs)

    say(f"{what}: score every response against every rule.")
    scores = folder / "scores"
    job = ScoreJob(str(pairs), str(of_seed / "judge"), str(pool), str(scores))
    found = dict(_once(folder / "scores.json", lambda: score(job) | {"accuracy": judge_accuracy(scores, world)}))

    say(f"{what}: select rules and label the pairs, by every strategy.")
    tokens = _once(folder / "tokens.json", lambda: _tokens(of_seed / "tokenizer", world))
    strategies = {}
    for name, job in label_jobs(str(scores), len(world.pool)).items():
        file = folder / f"labels-{name}.jsonl"
        job = replace(job, out=str(file))
        labelled = _once(folder / f"labels-{name}.json", lambda job=job: label(job))
        strategies[name] = {"label_agreement": labelled["agreement"], "ties": labelled["ties"]}
        strategies[name] |= {"judge_tokens": tokens["some" if name in ("fixed", "random") else "all"]}

    say(f"{what}: learn which rules to ask from half of the labels, and ask about few of the other half.")
    strategies["adapter"] = _once(
        folder / "adapter.json",
        lambda: ask_few(folder, of_seed / "judge", world.pairs, folder / "labels-max-discrepancy.jsonl", adapter),
    )

    for name in TRAINED:
        say(f"{what}: train a reward model on the labels of {name}, measure it on held-out pairs.")
        run = folder / f"reward-{name}"
        data = replace(reward.data, pairs=str(pairs), labels=str(folder / f"labels-{name}.jsonl"))
        strategies[name] |= _once(
            folder / f"reward-{name}.json",
            lambda run=run, data=data: _reward_model(run, replace(reward, data=data), held),
        )
    return {
        "judge_accuracy": found["accuracy"],
        "label_mass": found["label_mass"],
        "strategies": strategies,
        "decides": {name: _shares(folder / f"labels-{name}.jsonl", world) for name in ("max-discrepancy", "evidence")},
    }


def label_jobs(scores: str, rules: int) -> dict[str, LabelJob]:
    """What every strategy asks of ``label``; with all rules the weights of evidence are those of the whole vote."""
    # From very few pairs nobody can say what a rule is worth; then the published rule stands in, and a line says so.
    one = LabelJob(scores, "", k=K)
    evidence = replace(one, strategy="evidence", evidence=EvidenceOptions(fall_back=True))
    return {
        "fixed": replace(one, strategy="fixed", rules=FIXED),
        **{name: replace(one, strategy=name) for name in ("random", "relevance", "max-discrepancy")},
        "evidence": evidence,
        "all": replace(one, strategy="all"),
        "all-weighted": replace(evidence, k=rules),
    }


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


def _reward_model(run: Path, options: TrainOptions, held_out: Path) -> dict[str, Any]:
    train("reward", options, run)
    scorer, suite = RewardModel.from_pretrained(run).score_sets, SUITES["pairs"]
    named = {"name": "pairs", "model": str(run), "dtype": "float32"}
    result = evaluate(scorer, suite, suite.read(held_out, BadRows()), run / "held-out.json", **named)
    return {"accuracy": result["accuracy"], "ci95": result["ci95"], "right": _right(run / "held-out.rows.parquet")}


def _right(rows: Path) -> list[int]:
    """Of each pair, whether the chosen response scored higher."""
    import pyarrow.parquet as pq

    return [int(chosen > rejected) for chosen, rejected in pq.read_table(rows)["scores"].to_pylist()]


def _tokens(tokenizer: Path, world: World) -> dict[str, float]:
    """What a judge reads of a pair that is asked about all rules, and about some."""
    prompt = JudgePrompt(ChatTokenizer.from_folder(tokenizer), world.pool)
    asked = {"all": range(len(world.pool)), "some": range(K)}
    some = world.pairs[:PAIRS_COUNTED]

    def count(rules: range) -> float:
        trees = (prompt.pair_trees(pair.prompt, pair.response_a, pair.response_b, rules) for pair in some)
        return sum(len(one.tree) for of_pair in trees for one in of_pair) / len(some)

    return {name: count(rules) for name, rules in asked.items()}


def _shares(labels: Path, world: World) -> dict[str, float]:
    """Of how many pairs each rule decides."""
    counts = dict.fromkeys(world.pool.ids, 0)
    total = 0
    for one in read_labels(labels):
        total += 1
        for rule in one.rules:
            counts[rule] += 1
    return {rule: count / max(total, 1) for rule, count in counts.items()}
