"""Accuracy on pairs that people labelled, with a plain function as the scorer."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from adaptrm.data.preferences import Pair
from adaptrm.errors import InputError
from adaptrm.evaluate import evaluate_pairs, preference
from adaptrm.evaluate.preference import Count, interval, resampled
from adaptrm.evaluate.table import for_people

PROMPT = ({"role": "user", "content": "?"},)


def pair(name: str, a: float, b: float, preferred, subset=None) -> Pair:
    """The responses are the numbers that the scorer reads."""
    return Pair(name, PROMPT, str(a), str(b), preferred, subset)


def reads(pairs: list[Pair]) -> np.ndarray:
    return np.array([[float(p.response_a), float(p.response_b)] for p in pairs])


PAIRS = [
    pair("p0", 2, 1, "a", "chat"),  # right
    pair("p1", 2, 1, "b", "chat"),  # wrong
    pair("p2", -1, 3, "b", "safety"),  # right
    pair("p3", 1, 1, "a", "chat"),  # a tie is wrong
    pair("p4", 5, 1, None, "chat"),  # nobody was asked
    pair("p5", 0, 0.5, "b"),  # right
    pair("p6", 7, 7, "b"),  # a tie is wrong on the other side too
    # Different in float64 and the same in float32, which is what a model gives.
    pair("p7", 1 + 1e-9, 1, "a"),
]


def evaluated(pairs, folder, scorer=reads, name="out.json"):
    """The result, and the rows file's columns."""
    file = folder / name
    result = evaluate_pairs(scorer, pairs, file, model="m", dtype="float32")
    assert json.loads(file.read_text()) == result
    return result, pq.read_table(str(file).removesuffix(".json") + ".rows.parquet").to_pydict()


def test_accuracy_of_a_case_worked_by_hand(tmp_path):
    result, rows = evaluated(PAIRS, tmp_path)
    assert {k: result[k] for k in ("suite", "model", "dtype", "n", "skipped", "ties", "sections")} == {
        "suite": "pairs",
        "model": "m",
        "dtype": "float32",
        "n": 7,
        "skipped": 1,
        "ties": 3,
        "sections": {},
    }
    assert result["accuracy"] == pytest.approx(3 / 7)
    assert {name: (x["n"], x["accuracy"]) for name, x in result["subsets"].items()} == {
        "all": (3, pytest.approx(1 / 3)),
        "chat": (3, pytest.approx(1 / 3)),
        "safety": (1, 1.0),
    }
    assert result["subsets"]["safety"]["ci95"] == [1.0, 1.0]
    low, high = result["ci95"]
    assert 0 < low < 3 / 7 < high < 1
    assert rows["id"] == ["p0", "p1", "p2", "p3", "p5", "p6", "p7"]
    assert rows["subset"] == ["chat", "chat", "safety", "chat", "all", "all", "all"]
    # The chosen response first, whatever its side.
    assert rows["scores"] == [[2, 1], [1, 2], [3, -1], [1, 1], [0.5, 0], [7, 7], [1, 1]]


def test_swapping_the_responses_changes_nothing(tmp_path):
    other = {"a": "b", "b": "a", None: None}
    swapped = [Pair(p.id, p.prompt, p.response_b, p.response_a, other[p.preferred], p.subset) for p in PAIRS]
    assert evaluated(swapped, tmp_path, name="swapped.json") == evaluated(PAIRS, tmp_path)


def test_pairs_are_streamed_in_batches_and_nothing_depends_on_them(tmp_path, monkeypatch):
    expected = evaluated(PAIRS, tmp_path)
    monkeypatch.setattr(preference, "PAIRS_AT_ONCE", 2)
    sizes = []

    def scorer(some):
        sizes.append(len(some))
        return reads(some)

    assert evaluated(iter(PAIRS), tmp_path, scorer, "small.json") == expected
    assert sizes == [2, 2, 2, 1]  # p4 is never scored


def test_a_batch_of_nothing_but_unlabelled_pairs_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(preference, "PAIRS_AT_ONCE", 1)
    result, _ = evaluated(PAIRS, tmp_path)
    assert (result["n"], result["skipped"]) == (7, 1)


def test_interval_equals_the_binomial_one():
    stats = pytest.importorskip("scipy.stats")
    for right, n in ((704, 740), (50, 100), (3, 10), (0, 20), (20, 20)):
        got = interval(resampled(Count(n, right)))
        exact = stats.binom.ppf([0.025, 0.975], n, right / n) / n
        # Quantiles of 10,000 draws: one count beside the exact ones at most.
        assert np.abs(got - exact).max() <= 1 / n + 1e-12
        assert interval(resampled(Count(n, right))) == got
    # METHOD.md section 4: on RewardBench's 740 Safety pairs the standard error is 0.8 points.
    low, high = interval(resampled(Count(740, 704)))
    assert (high - low) / (2 * 1.96) == pytest.approx(0.008, abs=0.0005)


def test_nothing_to_measure_is_an_error(tmp_path):
    for pairs in ([], [pair("p0", 1, 2, None)]):
        with pytest.raises(InputError, match="no pair says which response is preferred"):
            evaluate_pairs(reads, pairs, tmp_path / "out.json", model="m", dtype="float32")
        assert not list(tmp_path.iterdir())  # the file of rows neither


def test_results_are_json(tmp_path):
    with pytest.raises(InputError, match=r"out.parquet: results are JSON; give --out FILE.json"):
        evaluate_pairs(reads, PAIRS, tmp_path / "out.parquet", model="m", dtype="float32")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_rewards_that_are_not_finite_are_no_accuracy(tmp_path, value):
    scorer = lambda some: np.array([[1, 0], [value, 0]])[: len(some)]  # noqa: E731
    with pytest.raises(InputError, match=r"^m: the reward of pair 'p1' is not finite"):
        evaluate_pairs(scorer, PAIRS[:2], tmp_path / "out.json", model="m", dtype="float32")
    assert not list(tmp_path.iterdir())


def test_people_see_every_subset_and_no_markup(tmp_path):
    from rich.console import Console

    result, _ = evaluated([pair("p0", 2, 1, "a", "[red]x[/red]"), *PAIRS], tmp_path)
    shown = for_people(result)
    table = shown.pop("table")
    assert shown == {
        "suite": "pairs",
        "model": "m",
        "dtype": "float32",
        "n": 8,
        "pairs_without_preference": 1,
        "ties": 3,
    }
    console = Console(width=80)
    with console.capture() as text:
        console.print(table)
    rows = [" ".join(line.strip("│").replace("│", " ").split()) for line in text.get().splitlines() if "│" in line]
    assert rows[0].startswith("All pairs 8 50.0 ")
    assert [row.split(" ", 3)[:3] for row in rows[1:]] == [
        ["[red]x[/red]", "1", "100.0"],
        ["all", "3", "33.3"],
        ["chat", "3", "33.3"],
        ["safety", "1", "100.0"],
    ]
