"""What the demo found, over its seeds: means, intervals, differences between strategies, and the table for people."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

FULL_SEEDS = 5
# Student's t, 4 degrees of freedom: 95 % of its mass lies within it.
T95 = 2.776
TRAINED = ("max-discrepancy", "evidence", "all")
# Of the adapter: labels of max-discrepancy over all scores on the same pairs, and tokens beside those of all rules.
OF_ADAPTER = ("label_agreement_of_all_scores", "adapter_tokens", "token_ratio", "token_ratio_with_adapter")
DIFFERENCES = (("evidence", "max-discrepancy"), ("max-discrepancy", "all"), ("evidence", "all"))


def summary(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of one seed, or their means over five.

    Intervals (95 %) are, of one seed, over its held-out pairs; of five, over the seeds (Student's t), which takes in
    that worlds, judges and reward models differ. Differences are paired: over the same pairs, in the same worlds.

    Args:
        found: of each seed, by world: ``strategies``, with ``right`` for those with a reward model: of each held-out
            pair, whether the chosen response scored higher.
    """
    return {"seeds": len(found), "worlds": {name: _world([one[name] for one in found]) for name in found[0]}}


def _world(seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    strategies = {name: _strategy([one["strategies"][name] for one in seeds]) for name in seeds[0]["strategies"]}
    differences = {
        f"{better} - {other}": _difference([one["strategies"] for one in seeds], better, other)
        for better, other in DIFFERENCES
    }
    return {
        **{name: _mean([one[name] for one in seeds]) for name in ("judge_accuracy", "label_mass")},
        "strategies": strategies,
        "accuracy_differences": differences,
        "decides": {
            name: {rule: _mean([one["decides"][name][rule] for one in seeds]) for rule in shares}
            for name, shares in seeds[0]["decides"].items()
        },
    }


def _strategy(seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    names = [name for name in ("label_agreement", "ties", "judge_tokens", *OF_ADAPTER) if name in seeds[0]]
    one = {name: _mean([seed[name] for seed in seeds]) for name in names}
    if len(seeds) > 1:
        one["label_agreement_ci95"] = _over_seeds([seed["label_agreement"] for seed in seeds])
    if "accuracy" not in seeds[0]:
        return one
    accuracies = [seed["accuracy"] for seed in seeds]
    one |= {"accuracy": _mean(accuracies), "ci95": _over_seeds(accuracies) if len(seeds) > 1 else seeds[0]["ci95"]}
    return one | ({"accuracy_by_seed": accuracies} if len(seeds) > 1 else {})


def _difference(seeds: Sequence[Mapping[str, Any]], better: str, other: str) -> dict[str, Any]:
    if len(seeds) > 1:
        gaps = [one[better]["accuracy"] - one[other]["accuracy"] for one in seeds]
        return {"mean": _mean(gaps), "ci95": _over_seeds(gaps), "by_seed": gaps}
    gaps = np.subtract(seeds[0][better]["right"], seeds[0][other]["right"])
    half = 1.96 * gaps.std(ddof=1) / len(gaps) ** 0.5
    return {"mean": float(gaps.mean()), "ci95": [float(gaps.mean() - half), float(gaps.mean() + half)]}


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _over_seeds(values: Sequence[float]) -> list[float]:
    assert len(values) == FULL_SEEDS, "T95 is for so many"
    half = T95 * np.std(values, ddof=1) / len(values) ** 0.5
    return [float(np.mean(values) - half), float(np.mean(values) + half)]


def table_of(figures: Mapping[str, Any]):
    """The figures for people."""
    from rich.table import Table

    worlds = figures["worlds"]
    table = Table(title="Agreement with the hidden preference", caption=caption_of(figures), caption_justify="left")
    table.add_column("strategy")
    table.add_column("judge tokens a pair", justify="right")
    for world in worlds:
        table.add_column(f"{world}: labels")
        table.add_column(f"{world}: reward model (95 %)")
    for name in next(iter(worlds.values()))["strategies"]:
        of_worlds = [world["strategies"][name] for world in worlds.values()]
        tokens = " / ".join(f"{one['judge_tokens']:.0f}" for one in of_worlds)
        table.add_row(name, tokens, *(cell for one in of_worlds for cell in _cells(one)))
    return table


def _cells(strategy: Mapping[str, Any]) -> tuple[str, str]:
    labels = f"{strategy['label_agreement']:.3f}"
    if "accuracy" not in strategy:
        return labels, ""
    low, high = strategy["ci95"]
    return labels, f"{strategy['accuracy']:.3f} ({low:.3f} to {high:.3f})"


def caption_of(figures: Mapping[str, Any]) -> str:
    lines = []
    for name, world in figures["worlds"].items():
        said = f"{world['judge_accuracy']:.3f} of the rules that apply judged as planted"
        lines.append(f"{name} world: {said}; reward models, paired differences:")
        for what, gap in world["accuracy_differences"].items():
            low, high = gap["ci95"]
            lines.append(f"  {what}: {gap['mean']:+.3f} ({low:+.3f} to {high:+.3f})")
        asked = world["strategies"]["adapter"]
        lines.append(
            f"  adapter, on pairs it has not learnt from: labels {asked['label_agreement']:.3f}, of max-discrepancy "
            f"over all scores {asked['label_agreement_of_all_scores']:.3f}, for {asked['token_ratio']:.2f} of the "
            f"judge's tokens ({asked['token_ratio_with_adapter']:.2f} with the adapter's own)"
        )
    over = "held-out pairs" if figures["seeds"] == 1 else f"{figures['seeds']} seeds"
    return "\n".join([*lines, f"Intervals are over {over}."])
