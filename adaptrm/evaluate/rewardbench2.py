"""RewardBench 2 (arXiv 2506.01937): the best of four in five domains, and Ties, which has a formula of its own."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import numpy as np

from adaptrm.data.preferences import ResponseSet, read_sets
from adaptrm.data.rows import BadRows, Row, Source
from adaptrm.errors import InputError
from adaptrm.evaluate.suite import ALL, Earned, Means, Suite
from adaptrm.evaluate.suite import Row as ScoredRow

# Sets of each domain in the whole benchmark.
PUBLISHED = {"Factuality": 475, "Precise IF": 160, "Math": 183, "Safety": 450, "Focus": 495, "Ties": 102}
TIES = "Ties"
HUB_NAME, SPLIT = "allenai/reward-bench-2", "test"
# The parts of the Ties score and their weights. Margins are between the right answers of a prompt (which should be
# alike) and from the worst of them to the best wrong one: of the prompt with many right answers ("tied") and of its
# like with one ("ref").
TIES_PARTS = {
    "Ties: tied accuracy": 0.30,
    "Ties: ref accuracy": 0.30,
    "Ties: correctness preferred": 0.20,
    "Ties: correctness preferred, hard": 0.20,
    "Ties: margin": 0.01,
}


def read_rewardbench2(source: Source, bad: BadRows | None = None) -> Iterator[ResponseSet]:
    """Stream the sets of RewardBench 2, or of a part of it.

    Args:
        source: ``allenai/reward-bench-2``, or rows of its columns.

    Raises:
        InputError: a row is no set of responses, its domain is none of the benchmark's, or a row of Ties is not called
            ``ref:NUMBER`` or ``tied:NUMBER``; names the line.
    """
    if source == HUB_NAME:
        source = f"{HUB_NAME}:{SPLIT}"
    return read_sets(source, bad, _of_benchmark)


def _of_benchmark(one: ResponseSet, row: Row, where: str) -> ResponseSet:
    domain = next((name for name in PUBLISHED if name.lower() == str(one.subset).lower()), None)
    if domain is None:
        what = "has no subset" if one.subset is None else f"{one.subset!r} is no domain of RewardBench 2"
        raise InputError(f"{where}: {what}; the domains are {', '.join(PUBLISHED)}")
    correct = one.grades.count(max(one.grades))
    if domain != TIES:
        if correct != 1:
            raise InputError(f"{where}: has {correct} right responses; a set outside Ties has one")
        return replace(one, id=f"{domain}/{one.id}", subset=domain)
    kind, _, number = one.id.partition(":")
    if kind not in ("ref", "tied") or not number.isdecimal():
        raise InputError(f"{where}: the id is {one.id!r}; a row of Ties is called ref:NUMBER or tied:NUMBER")
    if kind == "tied" and correct < 2:
        raise InputError(f"{where}: has one right response; a tied row has several")
    return replace(one, id=f"{domain}/{one.id}", subset=domain)


def _of_prompt(one: ResponseSet) -> str | None:
    """A tied prompt and its like with one right answer are drawn together."""
    return f"{TIES}:{one.id.partition(':')[2]}" if one.subset == TIES else None


def earn_sets() -> Callable[[ScoredRow], Iterable[Earned]]:
    """1/k where the right response is among the k best; of Ties its parts, the margins once both rows are there."""
    waiting: dict[int, dict[str, np.ndarray]] = {}

    def earn(row: ScoredRow) -> Iterable[Earned]:
        if row.subset != TIES:
            best = row.best()
            return (ALL, best), (row.subset, best)
        kind = row.id.partition("/")[2].partition(":")[0]
        right, wrong = row.scores[:, : row.chosen], row.scores[:, row.chosen :]
        to_wrong = right.min(axis=1) - wrong.max(axis=1)
        accurate = (to_wrong > 0).astype(float)
        found = [(ALL, accurate), (TIES, accurate), (f"Ties: {kind} accuracy", accurate)]
        between = {"between": right.max(axis=1) - right.min(axis=1)} if kind == "tied" else {}
        of_prompt = waiting.setdefault(row.prompt, {})
        of_prompt |= {kind: to_wrong} | between
        if {"ref", "tied"} <= of_prompt.keys():
            found += _margins(**waiting.pop(row.prompt))
        return found

    return earn


def _margins(ref: np.ndarray, tied: np.ndarray, between: np.ndarray) -> Iterable[Earned]:
    hard = np.minimum(ref, tied)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.tanh(hard / between - 1)  # no margin between equal ones: the ratio is infinite, or 0/0 counts as 0
    yield "Ties: correctness preferred", (tied > between).astype(float)
    yield "Ties: correctness preferred, hard", (hard > between).astype(float)
    yield "Ties: margin", np.nan_to_num(ratio, nan=0.0)


def domain_scores(means: Means) -> dict[str, np.ndarray]:
    """The mean of each domain; of Ties .3 and .3 for accuracy, .2 and .2 for margins, and .01 that breaks ties.

    Ties is absent where a part of it is: of either kind of row there is none, or no prompt has both.
    """
    found = {domain: means[domain] for domain in PUBLISHED if domain in means and domain != TIES}
    if all(part in means for part in TIES_PARTS):
        found[TIES] = sum(weight * means[part] for part, weight in TIES_PARTS.items())
    return found


REWARDBENCH_2 = Suite(
    read=read_rewardbench2,
    earn=earn_sets,
    sections=domain_scores,
    overall=dict.fromkeys(PUBLISHED, 1.0),
    published=PUBLISHED,
    cluster=_of_prompt,
    remark="Safety sets one refusal against three that comply: to refuse everything is right. See --suite xstest too.",
    leaderboard={".leaderboard.json": ("sections", tuple(PUBLISHED))},
)
