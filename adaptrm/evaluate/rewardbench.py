"""RewardBench v1 (arXiv 2403.13787): 23 subsets in four sections; a section weighs its subsets by published size."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain

import numpy as np

from adaptrm.data.preferences import ResponseSet, read_sets
from adaptrm.data.rows import BadRows, Source
from adaptrm.errors import InputError
from adaptrm.evaluate.suite import ALL, Earned, Means, Suite
from adaptrm.evaluate.suite import Row as ScoredRow

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
# The fifth section, of sets that were there before the benchmark, and their sizes; it is optional, and counts half.
PRIOR = "Prior Sets"
PRIOR_SETS = {"anthropic_helpful": 6192, "anthropic_hhh": 221, "shp": 1741, "summarize": 9000}
ALL_SECTIONS = SECTIONS | {PRIOR: dict.fromkeys(PRIOR_SETS, 1)}
WEIGHTS = {subset: weight for subsets in SECTIONS.values() for subset, weight in subsets.items()}
# The published number of pairs is the weight, but for math-prm: its 447 count as much as the 984 of code.
PUBLISHED = WEIGHTS | {"math-prm": 447}
HUB_NAME, SPLIT = "allenai/reward-bench", "filtered"  # the other split, raw, is not the benchmark
PRIOR_HUB_NAME = "allenai/pref-test-sets"


def read_rewardbench(source: Source, bad: BadRows | None = None) -> Iterator[ResponseSet]:
    """Stream the pairs of RewardBench, or of a part of it.

    Args:
        source: ``allenai/reward-bench``, or rows of its columns or of ours (a file, or anything that yields rows).
        bad: what becomes of bad rows; None raises.

    Raises:
        InputError: a row is not a pair, or its subset is none of RewardBench; names the line.
    """
    if source == HUB_NAME:
        source = f"{HUB_NAME}:{SPLIT}"
    return read_sets(source, bad, lambda one, row, where: _known(one, where, (*WEIGHTS, *PRIOR_SETS)))


def read_prior_sets(source: Source, bad: BadRows | None = None) -> Iterator[ResponseSet]:
    """Stream the prior sets: ``allenai/pref-test-sets``, where each is a split, or rows that name their subset.

    Raises:
        InputError: a row is not a pair, or its subset is none of ``PRIOR_SETS``; names the line.
    """
    if source != PRIOR_HUB_NAME:
        return read_sets(source, bad, lambda one, row, where: _known(one, where, PRIOR_SETS))

    def of_split(split: str) -> Iterator[ResponseSet]:
        named = lambda one, row, where: replace(one, subset=split, id=f"{split}/{one.id}")  # noqa: E731
        return read_sets(f"{PRIOR_HUB_NAME}:{split}", bad, named)

    return chain.from_iterable(map(of_split, PRIOR_SETS))


def _known(one: ResponseSet, where: str, known: Iterable[str]) -> ResponseSet:
    """A pair of a known subset; its bare number (the benchmark's own ids) may come again in another subset."""
    if one.subset not in known:
        raise InputError(f"{where}: subset is {one.subset!r}; it must be one of {', '.join(known)}")
    return replace(one, id=f"{one.subset}/{one.id}") if one.id.isdecimal() else one


def earn_pairs(row: ScoredRow) -> Iterable[Earned]:
    """The chosen response has to score strictly higher: a tie is wrong."""
    (right,) = row.wins()[:, :1, 0].T
    return (ALL, right), (row.subset, right)


def section_scores(means: Means) -> dict[str, np.ndarray]:
    """The mean of the accuracies of a section's subsets that are present, weighted by published size.

    Of the prior sets the plain mean, as on the leaderboard.
    """
    found = {}
    for section, weights in ALL_SECTIONS.items():
        if present := [subset for subset in weights if subset in means]:
            share = [weights[subset] for subset in present]
            found[section] = np.average([means[subset] for subset in present], axis=0, weights=share)
    return found


REWARDBENCH = Suite(
    read=read_rewardbench,
    earn=lambda: earn_pairs,
    sections=section_scores,
    members={section: list(weights) for section, weights in ALL_SECTIONS.items()},
    overall=dict.fromkeys(SECTIONS, 1.0) | {PRIOR: 0.5},
    optional=(PRIOR,),
    published=PUBLISHED | PRIOR_SETS,
    pairwise=True,
    # eval-set/ and pref-sets/ of allenai/reward-bench-results.
    leaderboard={
        ".leaderboard.json": ("subsets", tuple(WEIGHTS)),
        ".prior-sets.leaderboard.json": ("subsets", tuple(PRIOR_SETS)),
    },
)
