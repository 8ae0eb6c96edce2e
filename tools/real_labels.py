"""Labels of real text: a small judge as it is and taught, by every strategy, beside people and trivial scorers.

Teaches SmolLM2-135M with ``adaptrm train judge`` what people said of replies by 23 propositions (OpenAI's rule-based
rewards, split by prompt), lets it and the model as it is score pairs of XSTest, Do-Not-Answer, HH-RLHF harmless and RMB
harmless by the 24 signed propositions of rbr_24.yaml, and measures: whether either reads the rule (area under the ROC
curve on the held-out replies, and what ``adaptrm rules check`` says), and how far the labels of each strategy agree
with people. Beside it stand the longer response, words of refusal, and logistic regression on TF-IDF, fitted on the
replies that taught the judge and on pairs of other prompts. XSTest is shown in two halves: a scorer that refuses
everything is right on one of them.

Errors are standard errors over prompts, differences are paired. Nothing is chosen by what is measured. Started again
with the same --out it goes on; the minutes of each stage go to stderr, JSON and a table to OUT/result.json and .md.

    pip install scikit-learn
    python tools/real_labels.py --smollm2 DIR --data DIR --out DIR
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from learn_real import hash_of
from real_text import SOURCES, agreement, preferences, prepare, rows_of, trivial_answers, trivial_labels

POOL = Path(__file__).parent / "rbr_24.yaml"
K = 5
STRATEGIES = {
    "all rules": {"strategy": "all"},
    "max-discrepancy, top 5": {"strategy": "max-discrepancy", "k": K},
    "random 5": {"strategy": "random", "k": K},
    "relevance, top 5": {"strategy": "relevance", "k": K},
    "evidence, top 5": {"strategy": "evidence", "k": K},
}
DRAWS = 50  # of the random rules; their mean counts
DIFFERENCES = (
    ("max-discrepancy, top 5", "random 5"),
    ("max-discrepancy, top 5", "all rules"),
    ("evidence, top 5", "max-discrepancy, top 5"),
    ("max-discrepancy, top 5", "longer"),
    ("max-discrepancy, top 5", "refusal words"),
    ("max-discrepancy, top 5", "TF-IDF"),
)
JUDGES = ("as it is", "taught")
TEACHING = {
    "model": {"remat": "none"},
    "data": {"row_length": 2048, "rows_per_step": 1},
    "optimizer": {"learning_rate": 1e-4, "schedule": "linear", "warmup_steps": 10},
    "checkpoint": {"every_steps": 20, "keep": 1},
    "epochs": 2,
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", required=True, help="SmolLM2-135M-Instruct: a Hugging Face folder")
    parser.add_argument("--data", required=True, type=Path, help="folder of labels/ and pairs/")
    parser.add_argument("--out", required=True, type=Path, help="folder for everything it makes")
    parser.add_argument(
        "--pairs", type=int, default=50, help="pairs of each source; of each half of XSTest half of them"
    )
    parser.add_argument("--replies", type=int, default=222, help="replies to teach with, at most")
    parser.add_argument("--held-out", type=int, default=111, help="replies to measure on, at most")
    parser.add_argument("--longest", type=int, default=1700, help="tokens of a pair's questions; longer are left out")
    parser.add_argument("--longest-reply", type=int, default=1024, help="of a reply's; the conversation is cut to it")
    parser.add_argument("--fewest", type=int, default=5, help="true and false held-out verdicts that a rule needs")
    parser.add_argument("--steps", type=int, help="of teaching, to try it out")
    return parser.parse_args()


def stage(out: Path, name: str, work: Callable[[], Any]) -> None:
    """Do what an earlier run has not finished, and note the seconds it took over all runs."""
    file = out / "stages.json"
    stages = json.loads(file.read_text()) if file.exists() else {}
    told = stages.get(name, {"seconds": 0.0, "cpu_seconds": 0.0, "done": False})
    if not told["done"]:
        clock, cpu = time.perf_counter(), time.process_time()
        try:
            work()
            told["done"] = True
        finally:
            told["seconds"] += time.perf_counter() - clock
            told["cpu_seconds"] += time.process_time() - cpu
            file.write_text(json.dumps(stages | {name: told}, indent=2) + "\n")
    print(f"{name}: {told['seconds'] / 60:.1f} minutes", file=sys.stderr, flush=True)


def score_by(options: argparse.Namespace, judge: str, name: str) -> None:
    """The held-out replies and the pairs through a judge."""
    from adaptrm.judge.score import ScoreJob, score

    for what, control in (("replies", 0), ("pairs", 8)):
        file = str(options.out / f"{what}.jsonl")
        score(ScoreJob(file, judge, str(POOL), str(folder_of(options, what, name)), part_size=32, control=control))


def folder_of(options: argparse.Namespace, what: str, judge: str) -> Path:
    return options.out / f"{what}-{judge.replace(' ', '-')}"


def teach(options: argparse.Namespace) -> None:
    from adaptrm.config import parse_options
    from adaptrm.train.run import train

    data = TEACHING["data"] | {"labels": str(options.out / "questions.jsonl"), "rules": str(POOL)}
    model = TEACHING["model"] | {"pretrained": options.smollm2}
    section = TEACHING | {"model": model, "data": data, "max_steps": options.steps}
    train("judge", parse_options(section, "real_labels"), options.out / "judge")


def clustered(values: np.ndarray, clusters: np.ndarray) -> tuple[float, float]:
    """Mean and its standard error where values of one cluster go together (Liang & Zeger 1986); nan for one cluster."""
    _, of = np.unique(clusters, return_inverse=True)
    count = of.max() + 1
    sums = np.bincount(of, weights=values - values.mean())
    correction = count / (count - 1) if count > 1 else np.nan
    return float(values.mean()), float(np.sqrt(correction * (sums**2).sum()) / len(values))


def agreements(scores, preferred: np.ndarray) -> dict[str, np.ndarray | str]:
    """Of each strategy how far it agrees with people on each pair, a tie counting half; or why it says nothing."""
    from adaptrm import fit_evidence, select

    found: dict[str, np.ndarray | str] = {}
    for name, how in STRATEGIES.items():
        seeds = range(DRAWS) if how["strategy"] == "random" else (0,)
        try:
            weights = fit_evidence(scores) if how["strategy"] == "evidence" else None
            given = scores.a, scores.b, scores.relevance
            signs = [select(*given, **how, weights=weights, seed=seed).preferred for seed in seeds]
        except ValueError as wrong:  # evidence that these scores cannot support
            found[name] = str(wrong)
        else:
            found[name] = agreement(np.mean(signs, axis=0), preferred)
    return found


def mean_area(answers: np.ndarray, verdicts: np.ndarray, clusters: np.ndarray) -> dict[str, float]:
    """Mean over rules of the area under the ROC curve, with its jackknife error over clusters of replies."""
    from adaptrm.health.people import areas

    def mean(keep) -> float:
        return areas(answers[keep], verdicts[keep])[0].mean()

    without = np.array([mean(clusters != cluster) for cluster in np.unique(clusters)])
    spread = (len(without) - 1) * without.var()
    return {"mean_auc": float(mean(slice(None))), "error": float(np.sqrt(spread))}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    from adaptrm.data.preferences import load_pairs
    from adaptrm.data.scores import Scores, read_parts
    from adaptrm.health.check import check_scores
    from adaptrm.rules import RulePool

    def scores_of(what: str, judge: str) -> Scores:
        parts = list(read_parts(folder_of(options, what, judge)))
        arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in ("a", "b", "relevance")}
        return replace(parts[0], ids=[id for part in parts for id in part.ids], **arrays)

    pool, held_out = RulePool.load(POOL), rows_of(options.out / "held-out.jsonl")
    rules = list(held_out[0]["labels"])
    columns = pool.index(rules, "held-out.jsonl")
    verdicts = np.array([[1 if row["labels"][rule] else -1 for rule in rules] for row in held_out], np.int8)
    prompts = np.array([json.dumps(row["prompt"]) for row in held_out])
    answers = trivial_answers(rows_of(options.out / "teaching.jsonl"), held_out, rules)
    reads = {name: mean_area(said, verdicts, prompts) for name, said in answers.items()}

    pairs, others = (load_pairs(options.out / f"{name}.jsonl") for name in ("pairs", "others"))
    preferred, of_prompt = preferences(pairs), np.array([hash_of(pair) for pair in pairs], np.uint64)
    sources = np.array([pair.subset for pair in pairs])
    groups = {"all": np.ones(len(pairs), bool)} | {source: sources == source for source in SOURCES}
    trivial = trivial_labels(pairs, others)
    right: dict[str, dict[str, Any]] = {"none": trivial}
    health = {}
    for judge in JUDGES:
        said = scores_of("replies", judge)
        signs = np.array([rule.sign for rule in pool])
        yes = said.a * signs
        centred = yes - yes.mean(axis=1, keepdims=True)
        reads[judge] = mean_area(yes[:, columns], verdicts, prompts)
        reads[judge] |= {f"{k}_centred": v for k, v in mean_area(centred[:, columns], verdicts, prompts).items()}
        labels = str(options.out / "held-out.jsonl")
        of_pairs = check_scores(str(folder_of(options, "pairs", judge)), pool)
        of_replies = check_scores(str(folder_of(options, "replies", judge)), pool, labels=labels)
        names = ("first_direction", "length_correlation", "said_of_nothing", "same_answer", "no_opinion", "repeats")
        health[judge] = {name: of_pairs[name] for name in names} | {"rule_labels": of_replies["labels"]}
        # A reply beside itself differs in nothing; the other warnings about that are of no use.
        read = [line for line in of_replies["warnings"] if "against people's labels" in line]
        health[judge]["warnings"] = of_pairs["warnings"] + read
        right[judge] = agreements(scores_of("pairs", judge), preferred)

    def by_group(values: np.ndarray) -> dict[str, dict[str, float]]:
        found = {name: clustered(values[mask], of_prompt[mask]) for name, mask in groups.items() if mask.any()}
        return {name: {"mean": mean, "error": error} for name, (mean, error) in found.items()}

    differences = {}
    for judge in JUDGES:
        every = trivial | right[judge]
        for one, other in DIFFERENCES:
            if not isinstance(every[one], str):
                differences[f"{judge}: {one} - {other}"] = by_group(every[one] - every[other])
    return {
        "held_out": {
            "replies": len(held_out),
            "rules": rules,
            "teaching": len(rows_of(options.out / "teaching.jsonl")),
        },
        "reads": reads,
        "health": health,
        "pairs": {
            name: {"pairs": int(m.sum()), "prompts": len(set(of_prompt[m].tolist()))} for name, m in groups.items()
        },
        "agreement": {
            judge: {name: v if isinstance(v, str) else by_group(v) for name, v in of.items()}
            for judge, of in right.items()
        },
        "differences": differences,
    }


def table(result: dict[str, Any]) -> str:
    """The result in Markdown; standard errors in brackets."""

    def cell(of: dict[str, float], name: str = "mean", error: str = "error", plus: str = "") -> str:
        return f"{of[name]:{plus}.3f} ({of[error]:.3f})" if name in of else ""

    def lines(head: list[str], rows: list[list[str]]) -> str:
        return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *rows))

    held_out, health, groups = result["held_out"], result["health"], list(result["pairs"])
    reads = [
        [name, cell(of), cell(of, "mean_auc_centred", "error_centred")]
        + (
            [f"{health[name][key]:.2f}" for key in ("first_direction", "said_of_nothing")]
            if name in health
            else ["", ""]
        )
        for name, of in ((name, of | {"mean": of["mean_auc"]}) for name, of in result["reads"].items())
    ]
    counts = [f"{group} ({of['pairs']} pairs, {of['prompts']} prompts)" for group, of in result["pairs"].items()]
    labels = [
        [
            judge,
            name,
            *([of, *[""] * (len(groups) - 1)] if isinstance(of, str) else [cell(of.get(g, {})) for g in groups]),
        ]
        for judge, strategies in result["agreement"].items()
        for name, of in strategies.items()
    ]
    differences = [
        [name, *(cell(of.get(group, {}), plus="+") for group in groups)] for name, of in result["differences"].items()
    ]
    warned = [f"- {judge}: {line}\n" for judge, of in health.items() for line in of["warnings"]]
    stages = "".join(f"- {name}: {minutes:.1f}\n" for name, minutes in result["minutes"].items())
    return "\n".join(
        [
            f"Mean area under the ROC curve of {len(held_out['rules'])} propositions on {held_out['replies']} held-out "
            f"replies ({held_out['teaching']} taught), as answered and less each reply's mean answer; share of the "
            "first direction of A - B, and of the scores that an empty response has:\n",
            lines(["judge", "AUC", "centred", "first direction", "of an empty response"], reads),
            "What `adaptrm rules check` warns of:\n",
            "".join(warned) or "- nothing\n",
            "Labels that agree with people:\n",
            lines(["judge", "strategy", *counts], labels),
            "Paired differences:\n",
            lines(["difference", *groups], differences),
            f"Minutes:\n\n{stages}",
        ]
    )


def main() -> None:
    options = parse_arguments()
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    given = {k: v if isinstance(v, int | None) else str(v) for k, v in vars(options).items() if k != "out"}
    file = out / "options.json"
    if file.exists() and json.loads(file.read_text()) != given:
        sys.exit(f"{file}: an earlier run had other options; give them again, or another --out")
    file.write_text(json.dumps(given, indent=2) + "\n")
    stage(out, "prepare", lambda: prepare(options, POOL))
    stage(out, "score, as it is", lambda: score_by(options, options.smollm2, "as it is"))
    stage(out, "teach", lambda: teach(options))
    stage(out, "score, taught", lambda: score_by(options, str(out / "judge"), "taught"))
    result = measure(options) | {"options": given}
    stages = json.loads((out / "stages.json").read_text())
    result["minutes"] = {name: round(of["seconds"] / 60, 1) for name, of in stages.items()}
    text = json.dumps(result, indent=2)
    (out / "result.json").write_text(text + "\n")
    (out / "result.md").write_text(table(result))
    print(text)


if __name__ == "__main__":
    main()
