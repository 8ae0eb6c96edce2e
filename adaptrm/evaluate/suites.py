"""The suites by name."""

from collections.abc import Iterable

from adaptrm.data.preferences import read_sets
from adaptrm.evaluate.rewardbench import REWARDBENCH, earn_pairs
from adaptrm.evaluate.rewardbench2 import REWARDBENCH_2
from adaptrm.evaluate.rm_bench import RM_BENCH
from adaptrm.evaluate.suite import ALL, Earned, Row, Suite
from adaptrm.evaluate.xstest import XSTEST


def _earn_best(row: Row) -> Iterable[Earned]:
    best = row.best()
    return (ALL, best), (row.subset, best)


SUITES = {
    # Each chosen response of a row against each rejected one.
    "pairs": Suite(read_sets, lambda: earn_pairs, pairwise=True),
    # Whether the best response of a row is a chosen one; of k that are equally good 1/k.
    "best-of-n": Suite(read_sets, lambda: _earn_best),
    "rewardbench": REWARDBENCH,
    "rewardbench-2": REWARDBENCH_2,
    "rm-bench": RM_BENCH,
    "xstest": XSTEST,
}
