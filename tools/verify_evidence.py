"""Evidence on the worlds of the theory, over several draws; a table in Markdown.

    python tools/verify_evidence.py [--pairs 20000] [--seeds 5] [--gold 0]

Weights are fitted on nothing but the discrepancies (relevance is 1 everywhere), and so many verdicts of people. Five
rules by evidence stand beside the five largest differences on the same pairs, and where the rules' noise is
independent and their strength constant, the vote of all rules beside that which knows both. Differences are given as
their range over the draws.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from adaptrm.evidence import fit_evidence
from adaptrm.selection import select
from adaptrm.selection.theory import WORLDS, World, top_vote


def measure(world: World, pairs: int, seed: int, gold: int) -> dict[str, float | str]:
    preference, d = world.sample(np.random.default_rng(seed), pairs)
    half = (d / np.abs(d).max()).astype(np.float32)
    scores = half, -half, np.ones_like(half)
    accuracy = lambda label: float((label == preference).mean())  # noqa: E731
    published = accuracy(top_vote(d))
    found: dict[str, float | str] = {"largest 5": published}
    asked = np.random.default_rng(seed).choice(pairs, gold, replace=False)
    try:
        weights = fit_evidence(scores_of(*scores), {f"p{i}": int(preference[i]) for i in asked} or None)
    except ValueError as refused:
        return found | {"refused": str(refused)}
    found["evidence 5"] = accuracy(select(*scores, "evidence", weights=weights).preferred)
    if world.independent and world.weights is not None and world.base is None:
        every = select(*scores, "evidence", d.shape[1], weights=weights).preferred
        found["all by evidence - all weighted"] = accuracy(every) - accuracy(np.sign(d @ world.weights))
    return found


def scores_of(a: np.ndarray, b: np.ndarray, relevance: np.ndarray):
    from adaptrm.data.scores import Scores

    ids, rules = [f"p{i}" for i in range(len(a))], [f"r{i}" for i in range(a.shape[1])]
    return Scores(ids, rules, a, b, relevance, a, b, relevance, relevance)


def row_of(name: str, draws: list[dict[str, Any]]) -> str:
    gaps = [one["evidence 5"] - one["largest 5"] for one in draws if "evidence 5" in one]
    whole = [one["all by evidence - all weighted"] for one in draws if "all by evidence - all weighted" in one]
    mean = lambda of: f"{np.mean([one[of] for one in draws if of in one]):.3f}"  # noqa: E731
    spread = lambda values: f"{min(values):+.3f} to {max(values):+.3f}" if values else ""  # noqa: E731
    five = mean("evidence 5") if gaps else "refused"
    return f"| {name} | {mean('largest 5')} | {five} | {spread(gaps)} | {spread(whole)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20_000)
    parser.add_argument("--seeds", type=int, default=5, help="draws of each world")
    parser.add_argument("--gold", type=int, default=0, help="pairs whose preference is known")
    parser.add_argument("--out", type=Path, help="every figure, as JSON")
    options = parser.parse_args()
    worlds = {name: world for name, world in WORLDS.items() if not name.startswith("nuisance")}
    found = {
        name: [measure(world, options.pairs, seed, options.gold) for seed in range(1, options.seeds + 1)]
        for name, world in worlds.items()
    }
    print("| world | largest 5 | evidence, 5 rules | difference | all rules: by evidence - weighted |")
    print("| --- " * 5 + "|")
    print("\n".join(row_of(name, draws) for name, draws in found.items()))
    if options.out is not None:
        options.out.write_text(json.dumps({"pairs": options.pairs, "worlds": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
