"""A judge's health as people read it."""

from collections.abc import Mapping
from typing import Any

from adaptrm.errors import printable
from adaptrm.health.measures import NEARLY_ALL
from adaptrm.health.sums import LOW_RELEVANCE

# Of each rule: heading, what it shows, whether in per cent.
COLUMNS = (
    ("spread", "spread", False),
    ("decides", "decides", True),
    ("silent", "irrelevant", True),
    ("mass", "label_mass", False),
    ("empty", "said_of_nothing", True),
    ("length", "length_correlation", False),
    ("AUC", "auc", False),
    ("centred", "auc_centred", False),
    ("labels", "auc_of_labels", False),
)
CAPTION = (
    "spread: root mean square of A - B. decides: pairs that it is selected for. silent: pairs with relevance below "
    f"{LOW_RELEVANCE:g}. mass: on the answers. empty: how much of the score an empty response has. length: "
    "correlation with the difference in characters. AUC: against what people preferred. centred: the same of what it "
    "says beyond the mean of all rules, .5 where it knows no more than they. labels: AUC against rule "
    "labels, less the mean answer over the rules."
)


def for_people(found: Mapping[str, Any]) -> dict[str, Any]:
    """The main numbers and, under ``table``, a row a rule, those that spread most first."""
    from rich.table import Table
    from rich.text import Text

    labels = found.get("labels", {"by_rule": {}})
    rules = {
        id: rule | ({"auc_of_labels": labels["by_rule"][id]["auc_centred"]} if id in labels["by_rule"] else {})
        for id, rule in found["by_rule"].items()
    }
    columns = [column for column in COLUMNS if any(column[1] in rule for rule in rules.values())]
    table = Table(caption=CAPTION, caption_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("rule", overflow="fold")
    for heading, _, _ in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for id, rule in sorted(rules.items(), key=lambda of: -of[1]["spread"]):
        table.add_row(Text(printable(id)), *(_number(rule.get(name), per_cent) for _, name, per_cent in columns))
    shown = {
        "pairs": found["pairs"],
        "pairs_with_a_preference": found["people"],
        "first_direction": f"{100 * found['first_direction']:.0f} % of the variance of A - B",
        "correlation_with_length": found["length_correlation"],
        "said_of_an_empty_response": (
            f"{100 * found['said_of_nothing']:.0f} % of the scores"
            if "said_of_nothing" in found
            else "not asked; adaptrm score --control N asks"
        ),
        "mean_AUC": found["mean_auc"].get("as_they_are", {}),
        "AUC_by_rule_labels": _of_labels(labels),
        "agreement_with_people": {how.replace("_", " "): share for how, share in found["votes"].items()},
        f"no_opinion_on_{100 * NEARLY_ALL:.0f}_%": found["no_opinion"],
        "repeats": {rule: f"{other} ({r:+.2f})" for rule, (other, r) in found["repeats"].items()},
        "never_decide": found["never_decide"],
    }
    return {name: value for name, value in shown.items() if value not in ({}, [])} | {"table": table}


def _of_labels(said: Mapping[str, Any]) -> str | dict:
    if not said["by_rule"]:
        return {}
    plain, centred = said["mean_auc"].values()
    return f"{plain:.2f}, centred {centred:.2f}: {said['rules']} rules on {said['replies']} replies"


def _number(value: float | None, per_cent: bool) -> str:
    if value is None:  # nobody said anything of this rule
        return ""
    return f"{100 * value:.0f} %" if per_cent else f"{value:.2f}"
