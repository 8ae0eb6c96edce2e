"""A result as people read it."""

from collections.abc import Mapping
from typing import Any

from adaptrm.errors import printable
from adaptrm.evaluate.rewardbench import SECTIONS


def for_people(result: Mapping[str, Any]) -> dict[str, Any]:
    """What was measured and, under ``table``, the accuracies in per cent: sections, overall, subsets."""
    from rich.table import Table
    from rich.text import Text

    table = Table(caption_justify="left")
    for name in ("", "pairs", "accuracy %", "95 % interval"):
        table.add_column(name, justify="right" if name else "left")
    sections = SECTIONS if result["suite"] == "rewardbench" else {}
    for section in sections:
        if section in result["sections"]:
            n = sum(result["subsets"][subset]["n"] for subset in sections[section] if subset in result["subsets"])
            table.add_row(section, str(n), *_per_cent(result["sections"][section], result["sections_ci95"][section]))
        else:
            table.add_row(section, "0", "none", "")
    if sections:
        table.add_row("Overall, mean of the four", "", *_per_cent(result["overall"], result["overall_ci95"]))
    table.add_row("All pairs", str(result["n"]), *_per_cent(result["accuracy"], result["ci95"]), end_section=True)
    order = [subset for section in sections.values() for subset in section] or result["subsets"]
    for subset in order:
        if found := result["subsets"].get(subset):
            short = result.get("incomplete", {}).get(subset)
            n = f"{found['n']} of {short['published']}" if short else str(found["n"])
            name = Text(printable(subset))  # a name from the user's file is no markup
            table.add_row(name, n, *_per_cent(found["accuracy"], found["ci95"]))
    if short := result.get("incomplete"):
        absent = [subset for subset, count in short.items() if not count["n"]]
        table.caption = (
            f"Not the benchmark's own figures: {len(short)} of {len(order)} subsets differ from the published set"
            + (f"; absent: {', '.join(absent)}." if absent else ".")
        )
    plain = {name: value for name, value in result.items() if isinstance(value, str | int)}
    plain["pairs_without_preference"] = plain.pop("skipped")  # beside skipped_rows, which are no pairs
    return plain | {"table": table}


def _per_cent(value: float | None, ends: list[float] | None) -> tuple[str, str]:
    if value is None or ends is None:
        return "none", ""
    low, high = ends
    return f"{100 * value:.1f}", f"{100 * low:.1f} to {100 * high:.1f}"
