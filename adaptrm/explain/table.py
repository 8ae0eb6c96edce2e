"""An explanation as people read it."""

from collections.abc import Mapping
from typing import Any

from adaptrm.errors import printable
from adaptrm.explain.job import NUMBERS

SHOWN = 400  # characters of a text
CAPTION = (
    "A, B: the judge's scores; higher speaks for the response, whatever the rule's sign. selection: what rules are "
    "selected by, relevance and the weighted size of A - B."
)


def for_people(found: Mapping[str, Any]) -> dict[str, Any]:
    """The pair in short, what reward model and rules prefer and, under ``table``, the deciding rules."""
    from rich.table import Table
    from rich.text import Text

    table = Table(caption=CAPTION, caption_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("rule", overflow="fold")
    for heading in ("A", "B", "A - B", "relevance", "selection"):
        table.add_column(heading, justify="right", no_wrap=True)
    for rule in found["deciding_rules"]:
        name = f"{rule['id']}: {rule['text']}" if rule["text"] else rule["id"]
        table.add_row(Text(printable(name)), *("" if rule[n] is None else f"{rule[n]:.3f}" for n in NUMBERS))
    rewards, rules = found["rewards"], found["rules"]
    prefer = {of: f"response {side.upper()}" if side else "neither" for of, side in found["preferred"].items()}
    agree = {True: "reward model and rules agree", False: "reward model and rules disagree", None: "undecided"}
    return {
        "pair": found["id"],
        "prompt": {f"{number}. {m['role']}": _short(m["content"]) for number, m in enumerate(found["prompt"], 1)},
        "response_A": _short(found["response_a"]),
        "response_B": _short(found["response_b"]),
        "rewards": f"A {rewards['a']:.4g}, B {rewards['b']:.4g}, A - B {rewards['difference']:.4g}; A is better with "
        f"probability {rewards['probability_a']:.3f}",
        "rules": f"margin of A over B {rules['margin']:.4g}, probability {rules['probability_a']:.3f}; selected by "
        f"{rules['selected_by']}",
        "preferred": prefer,
        "verdict": agree[found["agree"]],
        "table": table,
    }


def _short(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 100]} ... {text[-95:]}"
