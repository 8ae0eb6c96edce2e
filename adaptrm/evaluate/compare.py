"""``adaptrm compare``: results of several models on the same rows, with paired intervals and tests."""

import json
import math
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np

from adaptrm import paths
from adaptrm.errors import InputError, printable
from adaptrm.evaluate.cells import Cells, interval
from adaptrm.evaluate.row_file import read_scored, rows_file
from adaptrm.evaluate.suite import ALL, Row, Suite, overall_of
from adaptrm.evaluate.suites import SUITES

SHOWN = ("model", "dtype", "n", "ties", "accuracy", "overall", "sections", "margins", "calibration", "length_bias")
NEEDED = ("suite", *(name for name in SHOWN if name != "overall"), "baselines")
ROWS_AT_ONCE = 1024
EXACT = 2000  # discordant prompts up to which the exact test is made; beyond, its limit is the same
ROUNDING = 1e-9  # of sums of credits such as 1/3
EVERYTHING, OVERALL = "All rows", "Overall"


def compare(results: Sequence[str | os.PathLike]) -> dict[str, Any]:
    """Compare models with the first of them.

    Args:
        results: ``FILE.json`` of ``adaptrm evaluate`` of each model, of one suite and the same rows in the same order.

    Returns:
        ``models``: what each file says of its model. ``differences``: for each model after the first, by section,
        overall and subset: both values, their difference, its 95 % interval (paired bootstrap over prompts) and
        McNemar's test by prompt (``Discordant.test``), which counts rows alike however a section weighs its subsets.
        ``baselines``: the trivial scorers on these rows, those of all files.

    Raises:
        InputError: a file is not a result, the suites differ, or the rows do.
    """
    if len(results) < 2:
        raise InputError("compare needs two results or more: A.json B.json")
    found = [_read(file) for file in results]
    names = {one["suite"] for one in found}
    if len(names) > 1:
        raise InputError(f"{', '.join(map(str, results))}: are of different suites: {', '.join(sorted(names))}")
    suite = SUITES[found[0]["suite"]]
    # Each model cuts by tokens of its own: what is left of a prompt does not tell whether it is the same.
    cut = any(one.get("truncated") for one in found)
    cells, discordant, subsets = _measured(results, suite, cut)
    means = cells.means()
    sections = suite.sections(means)
    overall = overall_of(suite, sections)
    # Of each name its means, and the cells whose rows it is about.
    groups = {
        "sections": {name: (value, suite.members.get(name, [name])) for name, value in sections.items()},
        "overall": {EVERYTHING: (means[ALL], [ALL])} | ({} if overall is None else {OVERALL: (overall, [])}),
        "subsets": {name: (means[name], [name]) for name in sorted(subsets)},
    }
    differences = []
    for at in range(1, len(found)):
        by_group = {
            group: {name: _difference(value, at) | discordant[at - 1].test(of) for name, (value, of) in values.items()}
            for group, values in groups.items()
        }
        differences.append({"model": found[at]["model"], "less": found[0]["model"]} | by_group)
    return {
        "suite": found[0]["suite"],
        "n": found[0]["n"],
        "models": [{key: one[key] for key in SHOWN if key in one} for one in found],
        "differences": differences,
        "baselines": _baselines(found),
    }


def _read(file: str | os.PathLike) -> dict[str, Any]:
    try:
        result = json.loads(paths.read_bytes(file))
    except ValueError as wrong:
        raise InputError(f"{file}: not valid JSON: {wrong}") from None
    missing = [name for name in NEEDED if not isinstance(result, dict) or name not in result]
    if missing or result["suite"] not in list(SUITES):  # of a list, since what is in the file may have no hash
        what = f"no {missing[0]}" if missing else f"suite {result['suite']!r}"
        raise InputError(f"{file}: is no result of adaptrm evaluate (it has {what}); evaluate again")
    return result


def _baselines(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Trivial scorers of all results; one that says another thing of the same rows (other words) with its model."""
    baselines: dict[str, Any] = {}
    for one in found:
        for name, measured in one["baselines"].items():
            scores = {key: measured[key] for key in ("accuracy", "overall", "sections", "subsets") if key in measured}
            if baselines.setdefault(name, scores) != scores:
                baselines[f"{name} (of {one['model']})"] = scores
    return baselines


class Discordant:
    """Rows that one of two models alone has right, by cell: 16 bytes each."""

    def __init__(self):
        self._cells: dict[str, tuple[array, array]] = {}  # prompts, what this model earns more than the first

    def add(self, cell: str, prompt: int, more: float) -> None:
        prompts, values = self._cells.setdefault(cell, (array("Q"), array("d")))
        prompts.append(prompt)
        values.append(more)

    def test(self, cells: Sequence[str]) -> dict[str, Any]:
        """McNemar's test of the rows of some cells, which come in clusters (prompts).

        Of the prompts' sums d of differences. Where all are equal but for their sign, as with one row a prompt, it is
        the exact test: binomial with one half. Otherwise ``(sum d)^2 / sum d^2`` is chi-squared with one degree of
        freedom: Durkalski et al. 2003, but with each prompt weighing as much as it has rows, as in the accuracies.

        Returns:
            What this model and what the first one alone has right, in rows, and the p-value; nothing without cells.
        """
        if not cells:
            return {}
        present = [self._cells[cell] for cell in cells if cell in self._cells]
        prompts = np.concatenate([np.zeros(0, np.uint64), *(np.array(p, np.uint64) for p, _ in present)])
        values = np.concatenate([np.zeros(0), *(np.array(v) for _, v in present)])
        found = {"this_alone": float(values[values > 0].sum()), "first_alone": float(-values[values < 0].sum())}
        which, of = np.unique(prompts, return_inverse=True)
        d = np.bincount(of, weights=values, minlength=len(which))
        d = d[np.abs(d) > ROUNDING]
        n, few = len(d), int(min((d > 0).sum(), (d < 0).sum()))
        if n <= EXACT and (np.abs(np.abs(d) - np.abs(d[:1])) < ROUNDING).all():
            return found | {"p": min(1.0, 2 * sum(math.comb(n, i) for i in range(few + 1)) / 2**n)}
        return found | {"p": math.erfc(math.sqrt(d.sum() ** 2 / (d**2).sum() / 2))}


def _measured(
    results: Sequence[str | os.PathLike], suite: Suite, cut: bool
) -> tuple[Cells, list[Discordant], set[str]]:
    """Sums by cell over the rows of all models in step, what is discordant of each and the first, and the subsets."""
    cells, earn = Cells(len(results)), suite.earn()
    discordant = [Discordant() for _ in results[1:]]
    subsets: set[str] = set()
    rows = _in_step([rows_file(file) for file in results], cut)
    while some := list(islice(rows, ROWS_AT_ONCE)):
        subsets |= {row.subset for row in some}
        earned = [(cell, row.prompt, values) for row in some for cell, values in earn(row)]
        names, prompts, values = zip(*earned, strict=True)
        cells.add(names, np.array(prompts, np.uint64), np.array(values, np.float64))
        for cell, prompt, value in earned:
            for at in np.flatnonzero(value[1:] != value[0]).tolist():
                discordant[at].add(cell, prompt, float(value[at + 1] - value[0]))
    return cells, discordant, subsets


def _in_step(files: Sequence[str], cut: bool) -> Iterator[Row]:
    """Each row with the scores of all models.

    Args:
        cut: prompts may have been cut, and do not have to be the same.
    """
    streams = [read_scored(file) for file in files]
    for number, first in enumerate(streams[0], start=1):
        rows = [first, *(next(stream, None) for stream in streams[1:])]
        for file, row in zip(files, rows, strict=True):
            if row is None or _place(row, cut) != _place(first, cut):
                what = f"ends before row {number}" if row is None else f"row {number} ({row.id!r}) is not row {number}"
                raise InputError(f"{file}: {what} of {files[0]} ({first.id!r}); evaluate all models on the same data")
        yield replace(first, scores=np.concatenate([row.scores for row in rows]), tie=np.zeros(len(rows)))
    for file, stream in zip(files[1:], streams[1:], strict=True):
        if (more := next(stream, None)) is not None:
            raise InputError(f"{file}: has further rows, from {more.id!r} on; evaluate all models on the same data")


def _place(row: Row, cut: bool) -> tuple:
    return row.id, row.subset, None if cut else row.prompt, row.chosen, row.scores.shape


def _difference(value: np.ndarray, at: int) -> dict[str, Any]:
    """Of means ``[models, 1 + resamples]``."""
    return {
        "first": float(value[0, 0]),
        "this": float(value[at, 0]),
        "difference": float(value[at, 0] - value[0, 0]),
        "ci95": interval(value[at, 1:] - value[0, 1:]),
    }


def as_text(result: dict[str, Any]) -> bytes:
    """The comparison as the JSON of a file."""
    return (json.dumps(result, indent=2) + "\n").encode()


def _names(models: Sequence[dict[str, Any]]) -> list[str]:
    """What the models are called; those of one name (in two dtypes, say) also by their place."""
    names = [printable(one["model"]) for one in models]
    return [name if names.count(name) == 1 else f"{name} ({at})" for at, name in enumerate(names, start=1)]


def for_people(result: dict[str, Any]) -> dict[str, Any]:
    """The models one by one, then the differences in per cent with their intervals and p-values."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    models = Table(title="Each model", title_justify="left")
    headings = ("model", "dtype", "accuracy %", "ties", "margin", "calibration error", "chosen longer %", "shorter %")
    for heading in headings:
        models.add_column(heading, justify="left" if heading == "model" else "right")
    names = _names(result["models"])
    for name, one in zip(names, result["models"], strict=True):
        by_length = [one["length_bias"][name]["accuracy"] for name in ("chosen_longer", "chosen_shorter")]
        models.add_row(
            *(Text(name), Text(printable(one["dtype"])), f"{100 * one['accuracy']:.1f}", str(one["ties"])),
            *(f"{one['margins']['mean']:.3g}", f"{one['calibration']['error']:.3f}"),
            *("" if value is None else f"{100 * value:.1f}" for value in by_length),
        )
    for name, one in result["baselines"].items():
        models.add_row(Text(f"scorer: {printable(name)}"), "", f"{100 * one['accuracy']:.1f}", "", "", "", "", "")
    tables = [models]
    for name, one in zip(names[1:], result["differences"], strict=True):
        table = Table(title=Text(f"{name} less {names[0]}"), title_justify="left")
        for heading in ("", "first %", "this %", "difference", "95 % interval", "McNemar p"):
            table.add_column(heading, justify="right" if heading else "left")
        for group in ("sections", "overall", "subsets"):
            for name, found in one[group].items():
                ends = [f"{100 * end:+.1f}" for end in found["ci95"]]
                table.add_row(
                    *(Text(printable(name)), f"{100 * found['first']:.1f}", f"{100 * found['this']:.1f}"),
                    *(f"{100 * found['difference']:+.1f}", " to ".join(ends)),
                    f"{found['p']:.2g}" if "p" in found else "",
                )
            table.add_section()
        tables.append(table)
    return {"suite": result["suite"], "rows": result["n"], "table": Group(*tables)}
