"""How far two settings of one judge agree: the order of its question, its dtype, its weights in int8.

Scores the same pairs by the same rules under both settings and prints JSON: differences of the scores, rank correlation
of the scores by rule (over all responses) and of the score differences by rule (over pairs), how often the labels
agree, how many of the selected rules are the same, and of each setting the mass on the answers, the bytes of its
parameters, agreement with people where they were asked, and the time.

    python tools/compare_judges.py conversation-first rule-first --judge MODEL --pairs PAIRS.jsonl --limit 50
    python tools/compare_judges.py float32 int8 --judge MODEL --pairs PAIRS.jsonl --rules safety-24
    python tools/compare_judges.py bfloat16 bfloat16,int8 --judge MODEL --pairs PAIRS.jsonl

A setting is what it says of template, dtype and weights, with commas between; the rest is as by default.
"""

import argparse
import json
import time
from itertools import islice
from pathlib import Path

import jax
import numpy as np
from scipy.stats import spearmanr  # jax brings scipy

from adaptrm import Judge, RulePool, select
from adaptrm.data.preferences import Pair, read_pairs
from adaptrm.data.scores import Scores
from adaptrm.hf.int8 import QUANTIZE
from adaptrm.judge.prompts import TEMPLATES

VALUES = {"template": tuple(TEMPLATES), "dtype": ("float32", "bfloat16"), "quantize": QUANTIZE}


def setting(text: str) -> dict[str, str]:
    """``rule-first,int8`` as arguments of a judge."""
    found = {}
    for word in text.split(","):
        names = [name for name, values in VALUES.items() if word in values]
        if not names or names[0] in found:
            known = ", ".join(value for values in VALUES.values() for value in values)
            raise argparse.ArgumentTypeError(f"{text!r}: at most one of each kind of: {known}")
        found[names[0]] = word
    return found


def checked(text: str) -> str:
    setting(text)
    return text


def rank_correlation(one: np.ndarray, two: np.ndarray, rules: list[str]) -> dict:
    """Spearman's rho of two ``[n, rules]`` arrays by rule; None for a rule that never varies."""
    by_rule = {}
    for name, x, y in zip(rules, one.T, two.T, strict=True):
        varies = np.ptp(x) > 0 and np.ptp(y) > 0
        by_rule[name] = float(spearmanr(x, y).statistic) if varies else None
    known = [rho for rho in by_rule.values() if rho is not None]
    return {"median": float(np.median(known)), "least": min(known), "by_rule": by_rule} if known else {}


def score(args: argparse.Namespace, pool: RulePool, pairs: list[Pair], given: str) -> tuple[Scores, dict]:
    """The scores under a setting, and what is told of it alone."""
    judge = Judge.from_pretrained(args.judge, pool, **setting(given))
    size = sum(x.nbytes for x in jax.tree.leaves(judge._state))
    start = time.perf_counter()
    scores = judge.score(pairs)
    seconds = time.perf_counter() - start
    mass = float(np.mean([scores.label_mass_a, scores.label_mass_b]))
    return scores, {"label_mass": mass, "parameter_bytes": size, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "settings", nargs=2, type=checked, help="such as conversation-first, bfloat16 or rule-first,int8"
    )
    parser.add_argument("--judge", required=True)
    parser.add_argument("--pairs", required=True)
    parser.add_argument("--rules", default="safety-24")
    parser.add_argument("--limit", type=int, default=50, help="pairs; the first ones")
    parser.add_argument("--k", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()

    pool = RulePool.load(args.rules)
    pairs = list(islice(read_pairs(args.pairs), args.limit))
    (one, of_one), (two, of_two) = (score(args, pool, pairs, given) for given in args.settings)
    both = [np.concatenate([s.a, s.b]) for s in (one, two)]
    differences = [s.a - s.b for s in (one, two)]
    chosen = [select(s.a, s.b, s.relevance, k=args.k) for s in (one, two)]
    clear = (chosen[0].preferred != 0) & (chosen[1].preferred != 0)
    human = np.array([{"a": 1, "b": -1, None: 0}[pair.preferred] for pair in pairs])
    same = [len(set(x) & set(y)) / args.k for x, y in zip(chosen[0].rules, chosen[1].rules, strict=True)]
    off = np.abs(both[0] - both[1])

    def agreement(preferred: np.ndarray) -> float | None:
        asked = (human != 0) & (preferred != 0)
        return float((human == preferred)[asked].mean()) if asked.any() else None

    of_settings = (of_one, of_two)
    for told, labels in zip(of_settings, chosen, strict=True):
        told["agreement_with_people"] = agreement(labels.preferred)
    result = {
        "judge": args.judge,
        "pairs": len(pairs),
        "rules": len(pool),
        "difference_of_scores": {"mean": float(off.mean()), "max": float(off.max())},
        "rank_correlation_of_scores": rank_correlation(*both, list(pool.ids)),
        "rank_correlation_of_differences": rank_correlation(*differences, list(pool.ids)),
        "labels_agree": float((chosen[0].preferred == chosen[1].preferred)[clear].mean()),
        "selected_rules_in_common": float(np.mean(same)),
        "settings": dict(zip(args.settings, of_settings, strict=True)),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
