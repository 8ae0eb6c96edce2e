"""A result as people read it."""

from collections.abc import Mapping
from typing import Any

from adaptrm.errors import printable
from adaptrm.evaluate.rewardbench import ALL_SECTIONS as OF_REWARDBENCH
from adaptrm.evaluate.suites import SUITES


def for_people(result: Mapping[str, Any]) -> dict[str, Any]:
    """What was measured and, under ``table``, accuracies in per cent, beside each the best of the trivial scorers."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(caption_justify="left")
    for name in ("", "rows", "accuracy %", "95 % interval", "trivial %"):
        table.add_column(name, justify="right" if name else "left")
    suite, sections, subsets = SUITES[result["suite"]], result["sections"], result["subsets"]

    def trivial(group: str, name: str | None = None) -> str:
        """The best of the trivial scorers."""
        values = [one[group] if name is None else one[group].get(name) for one in result["baselines"].values()]
        known = [value for value in values if value is not None]
        return f"{100 * max(known):.1f}" if known else ""

    of_sections = OF_REWARDBENCH if result["suite"] == "rewardbench" else {}
    known = [section for section in suite.overall if section in sections or section not in suite.optional]
    for section in dict.fromkeys([*known, *sections]):
        n = sum(subsets[subset]["n"] for subset in of_sections.get(section, {}) if subset in subsets)
        figures = _per_cent(sections.get(section), result["sections_ci95"].get(section))
        table.add_row(section, str(n) if of_sections else "", *figures, trivial("sections", section))
    if suite.overall:
        of = ", ".join(f"{s} half" for s in suite.optional if s in sections)
        figures = _per_cent(result["overall"], result["overall_ci95"])
        table.add_row(f"Overall{' (' + of + ')' if of else ''}", "", *figures, trivial("overall"))
    figures = _per_cent(result["accuracy"], result["ci95"])
    table.add_row("All rows", str(result["n"]), *figures, trivial("accuracy"), end_section=True)
    order = [subset for subset in suite.published if subset in subsets]
    for subset in [*order, *(subset for subset in subsets if subset not in order)]:
        short = result.get("incomplete", {}).get(subset)
        n = f"{subsets[subset]['n']} of {short['published']}" if short else str(subsets[subset]["n"])
        name = Text(printable(subset))  # a name from the user's file is no markup
        figures = _per_cent(subsets[subset]["accuracy"], subsets[subset]["ci95"])
        table.add_row(name, n, *figures, trivial("subsets", subset))
    scorers = Table()
    for name in ("trivial scorer", "accuracy %", "model less it", "95 % interval"):
        scorers.add_column(name, justify="left" if name == "trivial scorer" else "right")
    for name, one in result["baselines"].items():
        low, high = (f"{100 * end:+.1f}" for end in one["ci95"])  # all rows are one cell, which has an interval
        less = f"{100 * one['model_less_this']:+.1f}"
        scorers.add_row(Text(printable(name)), f"{100 * one['accuracy']:.1f}", less, f"{low} to {high}")
    remarks = ["trivial: the best of the scorers below, on the same rows."] if result["baselines"] else []
    remarks += [suite.remark] if suite.remark else []
    if short := result.get("incomplete"):
        absent = [subset for subset, count in short.items() if not count["n"]]
        whole = [subset for subset in suite.published if subset in subsets or subset in short]
        remarks.append(
            f"Not the benchmark's own figures: {len(short)} of {len(whole)} subsets differ from the "
            "published set" + (f"; absent: {', '.join(absent)}." if absent else ".")
        )
    table.caption = "\n".join(remarks) or None
    plain = {name: value for name, value in result.items() if isinstance(value, str | int)}
    plain["rows_without_preference"] = plain.pop("skipped")  # beside skipped_rows, which are no pairs
    margins, by_length = result["margins"], result["length_bias"]
    plain["margin"] = f"{margins['mean']:.3g} on average, standard deviation {margins['standard_deviation']:.3g}"
    plain["calibration_error"] = f"{result['calibration']['error']:.3f}"
    for name in ("chosen_longer", "chosen_shorter"):
        of = by_length[name]
        plain[name] = "none" if of["accuracy"] is None else f"{100 * of['accuracy']:.1f} % of {of['n']:.4g}"
    return plain | {"table": Group(table, scorers) if result["baselines"] else table}


def _per_cent(value: float | None, ends: list[float] | None) -> tuple[str, str]:
    shown = "none" if value is None else f"{100 * value:.1f}"
    return shown, "" if ends is None else f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f}"
