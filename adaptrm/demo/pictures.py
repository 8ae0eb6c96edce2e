"""The demo's pictures: who labels right, which rules decide, and what it costs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adaptrm.demo.world import RULES
from adaptrm.progress import say


def draw(figures: Mapping[str, Any], folder: Path) -> list[str]:
    """Draw the figures into a folder; without matplotlib nothing is drawn, and a line says so.

    Returns:
        The files.
    """
    try:
        import matplotlib
    except ImportError:
        say("No pictures: they need matplotlib (pip install 'adaptrm[plots]'); figures.json has what they would show.")
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    worlds = figures["worlds"]
    drawn = []
    for name, panel, size in (
        ("agreement", _agreement, (6, 4.2)),
        ("rules", _rules, (6, 7.5)),
        ("cost", _cost, (6, 4)),
    ):
        count = len(worlds)
        figure, axes = pyplot.subplots(1, count, figsize=(size[0] * count, size[1]), layout="constrained")
        for axis, (world, found) in zip(axes, worlds.items(), strict=True):
            panel(axis, found)
            axis.set_title(f"{world} world")
        file = folder / f"{name}.png"
        figure.savefig(file, dpi=110)
        pyplot.close(figure)
        drawn.append(str(file))
    return drawn


def _agreement(axis, found: Mapping[str, Any]) -> None:
    """Labels as bars, reward models as points with their intervals."""
    strategies = dict(reversed(found["strategies"].items()))
    labels = [one["label_agreement"] for one in strategies.values()]
    axis.barh(list(strategies), labels, color="0.8", label="labels")
    for place, one in enumerate(strategies.values()):
        axis.text(0.502, place, f"{one['label_agreement']:.3f}", va="center", fontsize="small")
    trained = [(place, one) for place, one in enumerate(strategies.values()) if "accuracy" in one]
    accuracy = [one["accuracy"] for _, one in trained]
    sides = [[abs(one["accuracy"] - one["ci95"][side]) for _, one in trained] for side in (0, 1)]
    places = [place for place, _ in trained]
    axis.errorbar(accuracy, places, xerr=sides, fmt="o", capsize=3, label="reward model, held out (95 %)")
    axis.set(xlim=(0.5, 1), xlabel="agreement with the hidden preference (.5 is chance)")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, fontsize="small")


def _rules(axis, found: Mapping[str, Any]) -> None:
    """How often each rule decides, those of one category together."""
    decides = found["decides"]
    rules = sorted(next(iter(decides.values())), key=lambda rule: list(RULES).index(rule), reverse=True)
    height = 0.8 / len(decides)
    for number, (strategy, shares) in enumerate(decides.items()):
        places = [place + (0.5 - number) * height for place in range(len(rules))]
        axis.barh(places, [shares[rule] for rule in rules], height=height, label=strategy)
    axis.set_yticks(range(len(rules)), [f"{rule} ({RULES[rule][0]})" for rule in rules], fontsize="x-small")
    axis.set(xlabel="share of pairs that the rule helps to decide", ylim=(-0.6, len(rules) - 0.4))
    axis.legend(fontsize="small")


def _cost(axis, found: Mapping[str, Any]) -> None:
    """Right labels against what the judge reads for them."""
    for name, one in found["strategies"].items():
        axis.plot(one["judge_tokens"], one["label_agreement"], "o")
        axis.annotate(name, (one["judge_tokens"], one["label_agreement"]), (6, -3), textcoords="offset points")
    most = max(one["judge_tokens"] for one in found["strategies"].values())
    axis.set(xlim=(0, 1.35 * most), xlabel="judge tokens a pair", ylabel="labels right")
