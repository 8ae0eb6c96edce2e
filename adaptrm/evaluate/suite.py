"""What a benchmark is made of: how its sets are read, what a scored set earns, and what its sections are."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Float64

from adaptrm.data.preferences import ResponseSet
from adaptrm.data.rows import BadRows, Source

ALL = ""  # the cell that every row earns in


@dataclass(frozen=True, eq=False)
class Row:
    """A set of responses with what scorers say of them, the chosen ones first.

    Attributes:
        prompt: a hash; rows of one prompt are drawn together when intervals are made.
        chosen: how many of the responses are right.
        scores: of every scorer; the model comes first, then the trivial ones.
        tie: what a scorer earns where the chosen and a rejected response are equal: nothing for a model, half for a
            scorer that counts words, which says the same of many.
    """

    id: str
    subset: str
    prompt: int
    chosen: int
    scores: Float64[np.ndarray, "scorers responses"]
    tie: Float64[np.ndarray, " scorers"]

    def wins(self) -> Float64[np.ndarray, "scorers chosen rejected"]:
        """Whether each chosen response scores strictly higher than each rejected one."""
        chosen, rejected = self.scores[:, : self.chosen, None], self.scores[:, None, self.chosen :]
        return (chosen > rejected) + self.tie[:, None, None] * (chosen == rejected)

    def best(self) -> Float64[np.ndarray, " scorers"]:
        """1/k where a chosen response is among the k best of the set, else 0 (RewardBench 2)."""
        top = self.scores == self.scores.max(axis=1, keepdims=True)
        return top[:, : self.chosen].sum(axis=1) / top.sum(axis=1)

    def tied(self) -> bool:
        """Whether to the first scorer the best chosen response is as good as the best rejected one."""
        return bool(self.scores[0, : self.chosen].max() == self.scores[0, self.chosen :].max())


# What is earned in a cell: the cell and a value of each scorer. A cell's mean is over what was earned there.
Earned = tuple[str, Float64[np.ndarray, " scorers"]]
# Means of cells, or resamples of them, to sections: whatever shape the means have.
Means = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Suite:
    """A benchmark.

    Attributes:
        read: sets of a source; each has a subset.
        earn: makes what tells a row's earnings, afresh for each pass over the rows.
        sections: from means by cell; those of which nothing was read are absent.
        members: of a section that is no cell itself, the cells whose rows it is about.
        overall: the weight of each section in the overall figure, which is None where one is absent.
        optional: sections that the overall figure does without where they are absent.
        published: rows of each subset in the whole benchmark, those of optional sections too.
        tied: whether a tie costs the model something in a row.
        pairwise: every chosen response against every rejected one is a row of its own.
        cluster: by what rows are drawn together, where it is not the prompt.
        remark: what people should know who read its figures.
        leaderboard: endings of the files that the benchmark's own leaderboard takes, each with what they hold:
            ``subsets`` or ``sections``, and which.
    """

    read: Callable[[Source, BadRows], Iterator[ResponseSet]]
    earn: Callable[[], Callable[[Row], Iterable[Earned]]]
    sections: Callable[[Means], dict[str, np.ndarray]] = lambda means: {}
    members: Mapping[str, Sequence[str]] = field(default_factory=dict)
    overall: Mapping[str, float] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    published: Mapping[str, int] = field(default_factory=dict)
    tied: Callable[[Row], bool] = Row.tied
    pairwise: bool = False
    cluster: Callable[[ResponseSet], str | None] = lambda one: None
    remark: str = ""
    leaderboard: Mapping[str, tuple[Literal["subsets", "sections"], Sequence[str]]] = field(default_factory=dict)


def overall_of(suite: Suite, sections: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """The weighted mean of the sections; None where one is missing, since a mean of the others is another number."""
    if not suite.overall or set(suite.overall) - set(sections) - set(suite.optional):
        return None
    present = [section for section in suite.overall if section in sections]
    weights = [suite.overall[section] for section in present]
    return np.average([sections[section] for section in present], axis=0, weights=weights)
