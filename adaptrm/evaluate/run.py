"""``adaptrm evaluate``: a scorer on the rows of a suite, beside scorers that read nothing."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import jax
import numpy as np

from adaptrm import paths
from adaptrm.data.preferences import ResponseSet, hash_id
from adaptrm.errors import InputError
from adaptrm.evaluate.cells import Cells, interval
from adaptrm.evaluate.diagnostics import Diagnostics
from adaptrm.evaluate.row_file import check_out, rows_file, writing_rows
from adaptrm.evaluate.suite import ALL, Row, Suite, overall_of
from adaptrm.evaluate.trivial import TRIVIAL
from adaptrm.parallel.distributed import gathered

Scorer = Callable[[list[ResponseSet]], Sequence[np.ndarray]]  # the rewards of each set's responses
Trivial = Callable[[ResponseSet], Sequence[float]]
SETS_AT_ONCE = 256
MOST_SUBSETS = 1000  # each takes some 100 KiB, for its resamples


def evaluate(
    scorer: Scorer,
    suite: Suite,
    sets: Iterable[ResponseSet],
    out: str | os.PathLike,
    *,
    name: str,
    model: str,
    dtype: str,
    data: str = "pairs",
    trivial: Mapping[str, Trivial] = TRIVIAL,
    counts: Mapping[str, Callable[[], int]] | None = None,
) -> dict[str, Any]:
    """Score what people labelled and write ``FILE.json`` and ``FILE.rows.parquet``.

    A chosen response must score strictly higher: a tie counts as wrong. Sets without a preference are skipped. Sets are
    streamed; what stays in memory is a few sums a subset. Intervals resample prompts (``cells.draws``), so pairs of one
    prompt are not taken for independent. Several processes share the sets out among them, all get the result, process
    0 writes it.

    Args:
        sets: as ``suite.read`` gives them, cut where they had to be.
        out: ``FILE.json``.
        name: of the suite.
        data: what the sets are called in errors.
        trivial: further scorers by name; each is measured on the same rows, and the model against it. What such a
            scorer says of both responses earns half.
        counts: what else the result counts (rows that were skipped), asked when all sets have been read.

    Raises:
        InputError: no set has a preference, a reward is not finite, there are more than ``MOST_SUBSETS`` subsets, or
            ``out`` is what is read; nothing is written.
    """
    check_out(out, data)
    first, tie = jax.process_index() == 0, np.array([0.0] + [0.5] * len(trivial))
    cells, diagnostics, earn = Cells(len(tie)), Diagnostics(), suite.earn()
    of_subsets: dict[str, int] = {}
    skipped = ties = 0

    def labelled() -> Iterator[ResponseSet]:
        nonlocal skipped
        for one in sets:
            if min(one.grades) == max(one.grades):
                skipped += 1
            else:
                yield _chosen_first(one)

    with writing_rows(rows_file(out), first) as write:
        for known, rewards in _scored(scorer, labelled(), f"{model} in {dtype}"):
            rows = []
            for one, of_model in zip(known, rewards, strict=True):
                scores = np.array([of_model, *(of(one) for of in trivial.values())], np.float64)
                rows += _rows(one, scores, tie, suite)
                diagnostics.add(scores[0], np.array([len(text) for text in one.responses]), _chosen(one))
            earned = [(cell, row.prompt, values) for row in rows for cell, values in earn(row)]
            names, prompts, values = zip(*earned, strict=True)
            cells.add(names, np.array(prompts, np.uint64), np.array(values, np.float64))
            for row in rows:
                of_subsets[row.subset] = of_subsets.get(row.subset, 0) + 1
                ties += suite.tied(row)
            if len(of_subsets) > MOST_SUBSETS:
                raise InputError(
                    f"{data}: has more than {MOST_SUBSETS} subsets; each is a figure: drop or merge the column subset"
                )
            write(rows)
        # In here, so that what is wrong with all rows together leaves no file of rows behind.
        if not of_subsets:
            what = "no pair says which response is preferred" if skipped else f"has no rows of suite {name}"
            raise InputError(f"{data}: {what}; there is nothing to measure")
    named = {"suite": name, "model": model, "dtype": dtype, "n": sum(of_subsets.values()), "skipped": skipped}
    left = {name: count() for name, count in (counts or {}).items()}
    figures = _figures(suite, cells, of_subsets, tuple(trivial))
    result = named | {"ties": ties} | left | figures | diagnostics.found()
    if first:
        _write(out, result)
        for ending, (kind, names) in suite.leaderboard.items():
            if any(name in result[kind] for name in names):
                _write(str(out).removesuffix(".json") + ending, leaderboard(result, kind, names))
    return result


def leaderboard(result: Mapping[str, Any], kind: str, names: Sequence[str]) -> dict[str, Any]:
    """A result in the form that the leaderboards of RewardBench take (``eval-set/OWNER/MODEL.json``).

    Args:
        kind: ``subsets`` or ``sections``.
        names: those that the file holds, where they were measured.
    """
    found = {name: result[kind][name] for name in names if name in result[kind]}
    scores = {name: one["accuracy"] if kind == "subsets" else one for name, one in found.items()}
    return {"model": result["model"], "model_type": "Seq. Classifier", "chat_template": "tokenizer"} | scores


def _write(file: str | os.PathLike, value: Mapping[str, Any]) -> None:
    paths.write_bytes(file, (json.dumps(value, indent=2) + "\n").encode())


def _scored(scorer: Scorer, sets: Iterator[ResponseSet], who: str) -> Iterator[tuple[list, list[np.ndarray]]]:
    """Sets and the rewards of their responses, float32; each process scores its share, and all get all."""
    number, processes = jax.process_index(), jax.process_count()
    while known := list(islice(sets, SETS_AT_ONCE * processes)):
        # Each process takes as many together as one alone would, so that how they are packed is the same.
        mine = known[number * SETS_AT_ONCE : (number + 1) * SETS_AT_ONCE]
        table = np.zeros((SETS_AT_ONCE, max(len(one.responses) for one in known)), np.float32)
        if mine:
            for row, one, rewards in zip(table[: len(mine)], mine, scorer(mine), strict=True):
                row[: len(one.responses)] = rewards
        table = gathered(table).reshape(-1, table.shape[1])
        found = [row[: len(one.responses)] for one, row in zip(known, table, strict=False)]
        for one, rewards in zip(known, found, strict=True):
            if not np.isfinite(rewards).all():
                raise InputError(f"{who}: the reward of {one.id!r} is not finite; check its weights")
        for first in range(0, len(known), SETS_AT_ONCE):  # sums and files do not tell how many processes there were
            part = slice(first, first + SETS_AT_ONCE)
            yield known[part], found[part]


def _chosen_first(one: ResponseSet) -> ResponseSet:
    best = max(one.grades)
    order = sorted(range(len(one.grades)), key=lambda i: one.grades[i] != best)  # stable
    responses, grades = (tuple(column[i] for i in order) for column in (one.responses, one.grades))
    return ResponseSet(one.id, one.prompt, responses, grades, one.subset or "all")


def _chosen(one: ResponseSet) -> int:
    return one.grades.count(one.grades[0])


def _rows(one: ResponseSet, scores: np.ndarray, tie: np.ndarray, suite: Suite) -> list[Row]:
    """The row of a set; where a suite is of pairs, one of each chosen response with each rejected one."""
    cluster = suite.cluster(one) or json.dumps([dict(message) for message in one.prompt])
    prompt, chosen, count = hash_id(cluster), _chosen(one), len(one.responses)
    if not suite.pairwise or count == 2:
        return [Row(one.id, one.subset, prompt, chosen, scores, tie)]
    return [
        Row(f"{one.id}#{i}-{j - chosen}", one.subset, prompt, 1, scores[:, [i, j]], tie)
        for i in range(chosen)
        for j in range(chosen, count)
    ]


def _figures(suite: Suite, cells: Cells, of_subsets: Mapping[str, int], trivial: Sequence[str]) -> dict[str, Any]:
    """Accuracies with their intervals, and those of the trivial scorers."""
    means = cells.means()
    sections = suite.sections(means)
    overall = overall_of(suite, sections)
    found: dict[str, Any] = {"accuracy": float(means[ALL][0, 0]), "ci95": interval(means[ALL][0, 1:])}
    if suite.overall:
        found["overall"] = None if overall is None else float(overall[0, 0])
        found["overall_ci95"] = None if overall is None else interval(overall[0, 1:])
    found["sections"] = {section: float(value[0, 0]) for section, value in sections.items()}
    found["sections_ci95"] = {section: interval(value[0, 1:]) for section, value in sections.items()}
    if suite.overall:
        found["missing_sections"] = [s for s in suite.overall if s not in sections and s not in suite.optional]
        without = {s for section in suite.optional if section not in sections for s in suite.members[section]}
        incomplete = {
            subset: {"n": of_subsets.get(subset, 0), "published": n}
            for subset, n in suite.published.items()
            if of_subsets.get(subset, 0) != n and subset not in without
        }
        found |= {"complete": not incomplete, "incomplete": incomplete}
    found["subsets"] = {
        subset: {"n": n, "accuracy": float(means[subset][0, 0]), "ci95": interval(means[subset][0, 1:])}
        for subset, n in sorted(of_subsets.items())
    }
    parts = [cell for cell in cells.names() if cell != ALL and cell not in of_subsets]
    if parts:
        found["parts"] = {cell: {"n": cells.count(cell), "mean": float(means[cell][0, 0])} for cell in parts}
    found["baselines"] = {
        scorer: {
            "accuracy": float(means[ALL][at, 0]),
            "model_less_this": float(means[ALL][0, 0] - means[ALL][at, 0]),
            "ci95": interval(means[ALL][0, 1:] - means[ALL][at, 1:]),
            "overall": None if overall is None else float(overall[at, 0]),
            "sections": {section: float(value[at, 0]) for section, value in sections.items()},
            "subsets": {subset: float(means[subset][at, 0]) for subset in sorted(of_subsets)},
        }
        for at, scorer in enumerate(trivial, start=1)
    }
    return found
