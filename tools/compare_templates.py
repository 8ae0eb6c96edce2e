"""How far the two orders of the judge's question agree for a model: the statement first, or the conversation first.

Scores the same pairs by the same rules under both templates and prints JSON: rank correlation of the scores by rule
(over all responses) and of the score differences by rule (over pairs), how often the labels agree, how many of the
selected rules are the same, the mass on the answers, agreement with people where they were asked, and the time.

    python tools/compare_templates.py --judge MODEL --pairs PAIRS.jsonl --rules safety-24 --limit 50
"""

import argparse
import json
import time
from itertools import islice
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr  # jax brings scipy

from adaptrm import Judge, RulePool, select
from adaptrm.data.preferences import Pair, read_pairs
from adaptrm.data.scores import Scores
from adaptrm.judge.prompts import TEMPLATES


def rank_correlation(one: np.ndarray, two: np.ndarray, rules: list[str]) -> dict:
    """Spearman's rho of two ``[n, rules]`` arrays by rule; None for a rule that never varies."""
    by_rule = {}
    for name, x, y in zip(rules, one.T, two.T, strict=True):
        varies = np.ptp(x) > 0 and np.ptp(y) > 0
        by_rule[name] = float(spearmanr(x, y).statistic) if varies else None
    known = [rho for rho in by_rule.values() if rho is not None]
    return {"median": float(np.median(known)), "least": min(known), "by_rule": by_rule} if known else {}


def score(args: argparse.Namespace, pool: RulePool, pairs: list[Pair], template: str) -> tuple[Scores, float]:
    judge = Judge.from_pretrained(args.judge, pool, template, args.dtype)
    start = time.perf_counter()
    return judge.score(pairs), time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judge", required=True)
    parser.add_argument("--pairs", required=True)
    parser.add_argument("--rules", default="safety-24")
    parser.add_argument("--limit", type=int, default=50, help="pairs; the first ones")
    parser.add_argument("--k", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()

    pool = RulePool.load(args.rules)
    pairs = list(islice(read_pairs(args.pairs), args.limit))
    one, two = (score(args, pool, pairs, template) for template in TEMPLATES)
    names = list(TEMPLATES)
    scores = {names[0]: one[0], names[1]: two[0]}
    both = [np.concatenate([s.a, s.b]) for s in scores.values()]
    differences = [s.a - s.b for s in scores.values()]
    chosen = [select(s.a, s.b, s.relevance, k=args.k) for s in scores.values()]
    clear = (chosen[0].preferred != 0) & (chosen[1].preferred != 0)
    human = np.array([{"a": 1, "b": -1, None: 0}[pair.preferred] for pair in pairs])
    same = [len(set(x) & set(y)) / args.k for x, y in zip(chosen[0].rules, chosen[1].rules, strict=True)]

    def agreement(preferred: np.ndarray) -> float | None:
        asked = (human != 0) & (preferred != 0)
        return float((human == preferred)[asked].mean()) if asked.any() else None

    result = {
        "judge": args.judge,
        "pairs": len(pairs),
        "rules": len(pool),
        "rank_correlation_of_scores": rank_correlation(*both, list(pool.ids)),
        "rank_correlation_of_differences": rank_correlation(*differences, list(pool.ids)),
        "labels_agree": float((chosen[0].preferred == chosen[1].preferred)[clear].mean()),
        "selected_rules_in_common": float(np.mean(same)),
        "label_mass": {n: float(np.mean([s.label_mass_a, s.label_mass_b])) for n, s in scores.items()},
        "agreement_with_people": {n: agreement(c.preferred) for n, c in zip(names, chosen, strict=True)},
        "seconds": dict(zip(names, (one[1], two[1]), strict=True)),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
