"""How good probabilities are, for people: a table, and a reliability diagram as a picture."""

import os
from collections.abc import Mapping
from typing import Any

from adaptrm import paths
from adaptrm.errors import InputError

KINDS = (".svg", ".png")


def with_reliability(found: Mapping[str, Any]) -> dict[str, Any]:
    """What ``label`` found, its reliability under ``table``, below what is there."""
    if "probabilities" not in found:
        return dict(found)
    from rich.console import Group
    from rich.table import Table

    probabilities = dict(found["probabilities"])
    rows = probabilities.pop("reliability")
    table = Table(caption="on gold pairs that the probabilities were not fitted to", caption_justify="left", box=None)
    for heading in ("probability", "pairs", "mean", "right"):
        table.add_column(heading, justify="right")
    for row in rows:
        span = f"{row['from']:.2f} to {row['to']:.2f}"
        table.add_row(span, str(row["pairs"]), f"{row['probability']:.3f}", f"{row['right']:.3f}")
    tables = [found["table"], table] if "table" in found else [table]
    return {**found, "probabilities": probabilities, "table": Group(*tables)}


def check_drawable(path: str | os.PathLike) -> None:
    """Raise where a picture could not be drawn, before there is work to lose.

    Raises:
        InputError: matplotlib is missing, or the file is of another kind.
    """
    if not str(path).endswith(KINDS):
        raise InputError(f"{path}: a reliability diagram is a picture; give a name that ends in {' or '.join(KINDS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError("--reliability draws with matplotlib: pip install 'adaptrm[plots]'") from None


def draw(probabilities: Mapping[str, Any], path: str | os.PathLike) -> None:
    """A reliability diagram: how often labels of some probability are right, and how many there are.

    Args:
        probabilities: as in the summary of ``label``.
    """
    from matplotlib.figure import Figure

    rows = probabilities["reliability"]
    figure = Figure(figsize=(5, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.plot([0.5, 1], [0.5, 1], color="grey", linestyle=":", label="calibrated")
    mean, right = ([row[name] for row in rows] for name in ("probability", "right"))
    # Two standard errors of a share.
    errors = [2 * (row["right"] * (1 - row["right"]) / row["pairs"]) ** 0.5 for row in rows]
    above.errorbar(mean, right, yerr=errors, marker="o", label=f"{probabilities['method']}, held-out gold pairs")
    above.set(ylabel="labels right", xlim=(0.5, 1), ylim=(0, 1.02), title=_title(probabilities))
    above.legend(loc="lower right")
    below.bar(
        [row["from"] for row in rows], [row["pairs"] for row in rows], rows[0]["to"] - rows[0]["from"], align="edge"
    )
    below.set(xlabel="probability of the label", ylabel="gold pairs")
    with paths.writing(path) as stream:
        figure.savefig(stream, format=str(path).rpartition(".")[2], dpi=120)


def _title(probabilities: Mapping[str, Any]) -> str:
    names = {"brier": "Brier", "nll": "NLL", "calibration_error": "ECE"}
    return ", ".join(f"{name} {probabilities[key]:.3f}" for key, name in names.items() if key in probabilities)
