"""Weights as people read them."""

from collections.abc import Mapping
from typing import Any

from adaptrm.errors import printable

COLUMNS = (("reliability", False), ("weight", False), ("redundancy", True), ("decides", True))
CAPTION = (
    "reliability: correlation of A - B with the preference that the rules' own agreement, or gold, tells of. weight: "
    "what A - B counts in the vote of all rules. redundancy: share of the rule that the others tell already. decides: "
    "pairs that it is selected for."
)


def for_people(found: dict[str, Any]) -> dict[str, Any]:
    """What ``label`` found with the main numbers of its evidence and, under ``table``, a row a rule."""
    from rich.table import Table
    from rich.text import Text

    if "evidence" not in found:
        return found
    report = found["evidence"]
    table = Table(caption=CAPTION, caption_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("rule", overflow="fold")
    for name, _ in COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    for id, rule in report["by_rule"].items():
        cells = (f"{100 * rule[name]:.0f} %" if per_cent else f"{rule[name]:.2f}" for name, per_cent in COLUMNS)
        table.add_row(Text(printable(id)), *cells)
    return found | {"evidence": _main(report), "table": table}


def _main(report: Mapping[str, Any]) -> dict[str, Any]:
    if "pairs_fitted" not in report:
        return {}
    shown = {"fitted to": f"{report['pairs_fitted']} of {report['pairs']} pairs"}
    if "gold" in report:
        gold = report["gold"]
        shown["gold"] = (
            f"{gold['verdicts']} verdicts chose {gold['chosen']}, which agrees with {100 * gold['agreement']:.0f} % of "
            "those left out"
        )
    else:
        kept = {"what weights differ by": report["trust"], "correlations": report["kept"]}
        shown["kept"] = ", ".join(f"{100 * share:.0f} % of {of}" for of, share in kept.items())
        shown["kurtosis of the vote"] = f"{report['kurtosis']:.2f}; of a preference {report['two_point']:.2f}"
    along = [f"{r:+.2f} with {name}" for name, r in report["correlations"].items()]
    if along:
        taken = " (taken out)" if report["projected"] else ""
        shown["hidden preference"] = f"correlation {', '.join(along)}{taken}"
    return shown
