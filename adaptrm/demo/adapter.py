"""The demo's rule adapter: from half of a world's labelled pairs it learns which rules to ask about the other half."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from adaptrm.config import TrainOptions
from adaptrm.data.labels import read_labels
from adaptrm.data.preferences import Pair
from adaptrm.demo.rows import write_pairs, write_rows
from adaptrm.judge.score import ScoreJob, score
from adaptrm.label import LabelJob, label
from adaptrm.rule_adapter import RuleAdapter
from adaptrm.train.run import train

ASKED = 3  # rules a pair; with these pools more would cost above a quarter of the tokens of all rules


def ask_few(folder: Path, judge: Path, pairs: Sequence[Pair], labels: Path, options: TrainOptions) -> dict[str, Any]:
    """Train an adapter on the first half of the labels, have the judge asked what it chooses of the second, and label.

    Args:
        folder: where the pool lies, and all is written.
        labels: what the adapter learns from: the rules that decided each pair.

    Returns:
        Of the second half: label agreement and ties; that of ``labels`` on the same pairs; tokens a pair that the judge
        reads, and with what the adapter reads on top, as shares of all rules' tokens too.
    """
    half = len(pairs) // 2
    known, rest = {pair.id for pair in pairs[:half]}, {pair.id: pair for pair in pairs[half:]}
    learnt, asked, pool = folder / "labels-learnt.jsonl", folder / "pairs-asked.jsonl", folder / "rules.yaml"
    write_rows(learnt, (one.to_row() for one in read_labels(labels) if one.id in known))
    write_pairs(asked, rest.values())
    run = folder / "adapter"
    train("adapter", replace(options, data=replace(options.data, labels=str(learnt), rules=str(pool))), run)
    job = ScoreJob(str(asked), str(judge), str(pool), str(folder / "scores-asked"), k=ASKED)
    told = score(job, RuleAdapter.from_pretrained(run))
    found = label(LabelJob(job.out, str(folder / "labels-adapter.jsonl")))
    better = {name: pair.responses["ab".index(pair.preferred)] for name, pair in rest.items()}
    right = [one.chosen == better[one.id] for one in read_labels(labels) if one.id in rest]
    costs = told["token_costs"]
    return {
        "label_agreement": found["agreement"],
        "ties": found["ties"],
        "label_agreement_of_all_scores": sum(right) / len(right),
        "judge_tokens": costs["judge"] / costs["pairs"],
        "adapter_tokens": costs["adapter"] / costs["pairs"],
        "token_ratio": told["token_ratio"],
        "token_ratio_with_adapter": told["token_ratio_with_adapter"],
    }
