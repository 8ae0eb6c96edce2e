"""RM-Bench (arXiv 2410.16184): three styles of a right and a wrong response, each against each."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np

from adaptrm.data.preferences import ResponseSet, read_sets
from adaptrm.data.rows import BadRows, Row, Source
from adaptrm.errors import InputError
from adaptrm.evaluate.suite import ALL, Earned, Means, Suite
from adaptrm.evaluate.suite import Row as ScoredRow

DOMAINS = ("chat", "math", "code", "safety")
STYLES = ("concise", "detailed", "markdown")
MATRIX = [(i, j) for i in range(3) for j in range(3)]  # style of the chosen response, style of the rejected one
# Which cells a difficulty is the mean of: hard where the rejected response is the fancier one.
DIFFICULTIES = {
    "easy": [(i, j) for i, j in MATRIX if i > j],
    "normal": [(i, j) for i, j in MATRIX if i == j],
    "hard": [(i, j) for i, j in MATRIX if i < j],
}
PUBLISHED = {"chat": 129, "math": 529, "code": 228, "safety-refuse": 284, "safety-response": 157}
HUB_NAME, SPLIT = "THU-KEG/RM-Bench", "train"


def read_rm_bench(source: Source, bad: BadRows | None = None) -> Iterator[ResponseSet]:
    """Stream the sets of RM-Bench, or of a part of it.

    Args:
        source: ``THU-KEG/RM-Bench``, or rows of its columns.

    Raises:
        InputError: a row has no domain of the benchmark's, or not three chosen and three rejected responses.
    """
    if source == HUB_NAME:
        source = f"{HUB_NAME}:{SPLIT}"
    return read_sets(source, bad, _of_benchmark)


def _of_benchmark(one: ResponseSet, row: Row, where: str) -> ResponseSet:
    domain = row.get("domain")
    if not isinstance(domain, str) or not domain.startswith(DOMAINS):
        raise InputError(f"{where}: domain is {domain!r}; it must begin with one of {', '.join(DOMAINS)}")
    if one.grades != (1.0,) * 3 + (0.0,) * 3:
        raise InputError(f"{where}: needs three chosen and three rejected responses: {', '.join(STYLES)}")
    return replace(one, id=f"{domain}/{one.id}", subset=domain)


def earn_matrix(row: ScoredRow) -> Iterable[Earned]:
    """A win of each chosen response over each rejected one; a tie is wrong."""
    wins = row.wins()
    every = wins.mean(axis=(1, 2))
    yield ALL, every
    yield row.subset, every
    domain = next(domain for domain in DOMAINS if row.subset.startswith(domain))
    for i, j in MATRIX:
        yield _cell(domain, i, j), wins[:, i, j]


def tied(row: ScoredRow) -> bool:
    """Whether to the first scorer any chosen response is as good as any rejected one."""
    chosen, rejected = row.scores[0, : row.chosen, None], row.scores[0, None, row.chosen :]
    return bool((chosen == rejected).any())


def _cell(domain: str, i: int, j: int) -> str:
    return f"{STYLES[i]} over {STYLES[j]}: {domain}"  # which no subset is called: they begin with a domain


def domain_scores(means: Means) -> dict[str, np.ndarray]:
    """Of each domain the mean over the matrix, of each difficulty the mean over the domains that are present.

    The two halves of safety are one domain, in which each row counts the same.
    """
    by_domain: Mapping[str, dict[str, np.ndarray]] = {
        domain: {
            difficulty: np.mean([means[_cell(domain, i, j)] for i, j in cells], axis=0)
            for difficulty, cells in DIFFICULTIES.items()
        }
        for domain in DOMAINS
        if _cell(domain, 0, 0) in means
    }
    found = {domain: np.mean(list(of.values()), axis=0) for domain, of in by_domain.items()}
    return found | {
        difficulty: np.mean([of[difficulty] for of in by_domain.values()], axis=0) for difficulty in DIFFICULTIES
    }


RM_BENCH = Suite(
    read=read_rm_bench,
    earn=lambda: earn_matrix,
    sections=domain_scores,
    members={domain: [_cell(domain, i, j) for i, j in MATRIX] for domain in DOMAINS}
    | {name: [_cell(domain, i, j) for domain in DOMAINS for i, j in cells] for name, cells in DIFFICULTIES.items()},
    overall=dict.fromkeys(DOMAINS, 1.0),
    published=PUBLISHED,
    tied=tied,
)
