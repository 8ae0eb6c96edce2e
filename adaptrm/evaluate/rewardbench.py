"""RewardBench v1 (arXiv 2403.13787): 23 subsets in four sections; a section weighs its subsets by published size."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from adaptrm.data.preferences import Pair, read_pairs
from adaptrm.data.rows import BadRows, Source
from adaptrm.errors import InputError
from adaptrm.evaluate.preference import Count, interval, resampled

# The weight of each subset in its section.
SECTIONS: dict[str, dict[str, int]] = {
    "Chat": {
        "alpacaeval-easy": 100,
        "alpacaeval-length": 95,
        "alpacaeval-hard": 95,
        "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37,
        "llmbar-natural": 100,
        "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 154,
        "xstest-should-respond": 250,
        "donotanswer": 136,
    },
    "Reasoning": {
        "math-prm": 984,
        "hep-cpp": 164,
        "hep-go": 164,
        "hep-java": 164,
        "hep-js": 164,
        "hep-python": 164,
        "hep-rust": 164,
    },
}
WEIGHTS = {subset: weight for subsets in SECTIONS.values() for subset, weight in subsets.items()}
# The published number of pairs is the weight, but for math-prm: its 447 count as much as the 984 of code.
PUBLISHED = WEIGHTS | {"math-prm": 447}
HUB_NAME, SPLIT = "allenai/reward-bench", "filtered"  # the other split, raw, is not the benchmark


def read_rewardbench(source: Source, bad: BadRows | None = None) -> Iterator[Pair]:
    """Stream the pairs of RewardBench, or of a part of it.

    Args:
        source: ``allenai/reward-bench``, or rows of its columns or of ours (a file, or anything that yields rows).
        bad: what becomes of bad rows; None raises.

    Raises:
        InputError: a row is not a pair, or its subset is none of RewardBench; names the line.
    """
    if source == HUB_NAME:
        source = f"{HUB_NAME}:{SPLIT}"
    return read_pairs(source, bad, _of_benchmark)


def _of_benchmark(pair: Pair, where: str) -> Pair:
    """A pair of a known subset; its bare number (the benchmark's own ids) may come again in another subset."""
    _check_subset(pair.subset, where)
    return replace(pair, id=f"{pair.subset}/{pair.id}") if pair.id.isdecimal() else pair


def _check_subset(subset: str | None, where: str) -> None:
    if subset not in WEIGHTS:
        what = "has no subset" if subset is None else f"{subset!r} is no subset of RewardBench"
        raise InputError(f"{where}: {what}; the subsets are {', '.join(WEIGHTS)}")


def section_scores(of_subsets: Mapping[str, Count]) -> dict[str, Any]:
    """What RewardBench adds to a result, from the counts of its subsets.

    A section is the mean of the accuracies of its subsets that are present, weighted by published size; overall is
    the plain mean of the four sections, and None where one has no subset: a mean of three is another number. The
    intervals resample each subset by itself, pairs as independent of each other.

    Raises:
        InputError: a subset is none of RewardBench, so it would count in no section.
    """
    for subset in of_subsets:
        _check_subset(subset, "pairs")
    draws, sections = {}, {}
    for section, weights in SECTIONS.items():
        if present := [subset for subset in weights if subset in of_subsets]:
            share = [weights[subset] for subset in present]
            sections[section] = float(np.average([of_subsets[subset].accuracy for subset in present], weights=share))
            # A stream of its own for every subset, whatever others there are.
            resamples = [resampled(of_subsets[subset], seed=1 + list(WEIGHTS).index(subset)) for subset in present]
            draws[section] = np.average(resamples, axis=0, weights=share)
    missing = [section for section in SECTIONS if section not in sections]
    found = {subset: of_subsets[subset].n if subset in of_subsets else 0 for subset in PUBLISHED}
    incomplete = {subset: {"n": found[subset], "published": n} for subset, n in PUBLISHED.items() if found[subset] != n}
    return {
        "overall": None if missing else float(np.mean(list(sections.values()))),
        "overall_ci95": None if missing else interval(np.mean(list(draws.values()), axis=0)),
        "sections": sections,
        "sections_ci95": {section: interval(draw) for section, draw in draws.items()},
        "missing_sections": missing,
        "complete": not incomplete,
        "incomplete": incomplete,
    }
