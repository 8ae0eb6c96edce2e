"""Accuracy on what people labelled, with a plain function as the scorer, and its intervals."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from commands import in_process

from adaptrm.data.preferences import Pair, ResponseSet, hash_id, load_pairs
from adaptrm.errors import InputError
from adaptrm.evaluate import SUITES, evaluate
from adaptrm.evaluate import run as evaluate_run
from adaptrm.evaluate.cells import RESAMPLES, Cells, draws, interval
from adaptrm.evaluate.row_file import writing_rows
from adaptrm.evaluate.table import for_people
from adaptrm.evaluate.trivial import TRIVIAL, fit_tfidf


def prompt(text: str) -> tuple[dict[str, str]]:
    return ({"role": "user", "content": text},)


def pair(name: str, a: float, b: float, preferred, subset=None) -> Pair:
    """The responses are the numbers that the scorer reads; each pair has a prompt of its own."""
    return Pair(name, prompt(f"{name}?"), str(a), str(b), preferred, subset)


def reads(sets: list[ResponseSet]) -> list[np.ndarray]:
    return [np.array([float(text) for text in one.responses]) for one in sets]


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


def measured(pairs, file, scorer=reads, suite="pairs", **options):
    sets = [one.as_set() if isinstance(one, Pair) else one for one in pairs]
    return evaluate(scorer, SUITES[suite], sets, file, name=suite, model="m", dtype="float32", **options)


def evaluated(pairs, folder, scorer=reads, name="out.json", **options):
    """The result, and the rows file's columns."""
    file = folder / name
    result = measured(pairs, file, scorer, **options)
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


def test_what_of_a_result_is_of_the_rows_and_not_of_the_model(tmp_path):
    rows = evaluated(PAIRS, tmp_path)[1]
    assert rows["chosen"] == [1] * 7 and len(set(rows["prompt"])) == 7
    assert rows["prompt"][0] == hash_id(json.dumps([dict(m) for m in PAIRS[0].prompt]))


def test_pairs_are_streamed_in_batches_and_nothing_depends_on_them(tmp_path, monkeypatch):
    expected = evaluated(PAIRS, tmp_path)
    monkeypatch.setattr(evaluate_run, "SETS_AT_ONCE", 2)
    sizes = []

    def scorer(some):
        sizes.append(len(some))
        return reads(some)

    result, rows = evaluated(iter(PAIRS), tmp_path, scorer, "small.json")
    assert sizes == [2, 2, 2, 1]  # p4 is never scored
    assert rows == expected[1] and result.keys() == expected[0].keys()
    for key, value in result.items():  # sums in another order
        assert value == expected[0][key] or key in ("ci95", "subsets", "baselines", "margins", "calibration")
    np.testing.assert_allclose(result["ci95"], expected[0]["ci95"], rtol=1e-12)


def test_a_batch_of_nothing_but_unlabelled_pairs_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate_run, "SETS_AT_ONCE", 1)
    result, _ = evaluated(PAIRS, tmp_path)
    assert (result["n"], result["skipped"]) == (7, 1)


def cells_of(prompts, right) -> Cells:
    cells = Cells(1)
    cells.add(["x"] * len(right), np.asarray(prompts, np.uint64), np.asarray(right, float)[:, None])
    return cells


def test_draws_are_independent_exponential_variables():
    found = draws(np.arange(400, dtype=np.uint64))
    assert found.shape == (400, RESAMPLES)
    n = found.size
    assert found.mean() == pytest.approx(1, abs=4 / n**0.5) and found.var() == pytest.approx(1, abs=12 / n**0.5)
    assert found.min() > 0
    stats = pytest.importorskip("scipy.stats")
    assert stats.kstest(found.ravel(), "expon").statistic < 1.7 / n**0.5
    for axis in (0, 1):  # neighbours in prompts and in resamples have nothing to do with each other
        left, right = np.take(found, range(0, 399), axis), np.take(found, range(1, 400), axis)
        assert abs(np.corrcoef(left.ravel(), right.ravel())[0, 1]) < 5 / left.size**0.5
    np.testing.assert_array_equal(draws(np.array([7, 3], np.uint64)), found[[7, 3]])


def test_intervals_are_as_wide_as_the_binomial_ones():
    # METHOD.md section 4: on RewardBench's 740 Safety pairs the standard error is 0.8 points.
    for right, n in ((704, 740), (500, 1000)):
        low, high = interval(cells_of(range(n), np.arange(n) < right).means()["x"][0, 1:])
        assert low < right / n < high
        assert (high - low) / (2 * 1.96) == pytest.approx((right / n * (1 - right / n) / n) ** 0.5, rel=0.07)
    assert interval(cells_of(range(20), np.ones(20)).means()["x"][0, 1:]) == [1, 1]


def test_pairs_of_one_prompt_are_not_independent():
    """Ten pairs a prompt, all right or all wrong, tell as much as one."""
    right = np.arange(100) % 2
    alone = interval(cells_of(range(100), right).means()["x"][0, 1:])
    tenfold = cells_of(np.repeat(range(100), 10), np.repeat(right, 10))
    assert interval(tenfold.means()["x"][0, 1:]) == pytest.approx(alone) and tenfold.count("x") == 1000
    naive = interval(cells_of(range(1000), np.repeat(right, 10)).means()["x"][0, 1:])
    assert (naive[1] - naive[0]) < 0.4 * (alone[1] - alone[0])


def test_names_of_cells_that_numpy_would_not_tell_apart():
    cells = Cells(1)
    cells.add(["x", "x\0", "x" * 10**6], np.arange(3, dtype=np.uint64), np.array([[1.0], [0.0], [0.0]]))
    assert {name: (cells.count(name), value[0, 0]) for name, value in cells.means().items()} == {
        "x": (1, 1),
        "x\0": (1, 0),
        "x" * 10**6: (1, 0),
    }


TEXTS = [
    ResponseSet("r", prompt("a"), ("I'm sorry, I cannot.", "Sure, here it is, at length."), (1.0, 0.0), "refuse"),
    ResponseSet("s", prompt("b"), ("Sure thing.", "I am unable to do that: it is illegal."), (1.0, 0.0), "respond"),
    ResponseSet("t", prompt("c"), ("Yes, it is.", "No."), (1.0, 0.0), "respond"),
]


def test_trivial_scorers_stand_beside_the_model(tmp_path):
    scorer = lambda sets: [np.array([1.0, 0.0]) for _ in sets]  # noqa: E731
    result, _ = evaluated(TEXTS, tmp_path, scorer)
    assert list(result["baselines"]) == list(TRIVIAL) == ["longer", "shorter", "refusal words"]
    found = {name: one["accuracy"] for name, one in result["baselines"].items()}
    # Of the last pair neither response refuses: half.
    assert found == {name: pytest.approx(x) for name, x in zip(found, (1 / 3, 2 / 3, 0.5), strict=True)}
    longer = result["baselines"]["longer"]
    assert longer["model_less_this"] == pytest.approx(2 / 3)
    low, high = longer["ci95"]
    assert 0 <= low < 2 / 3 < high <= 1
    assert result["length_bias"] == {
        "chosen_longer": {"n": 1, "accuracy": 1},
        "chosen_shorter": {"n": 2, "accuracy": 1},
        "same_length": {"n": 0, "accuracy": None},
    }


def test_words_of_refusal_are_counted_in_any_case(tmp_path):
    texts = ("SORRY, I can’t. It's illegal.", "That is unremarkable.")
    assert TRIVIAL["refusal words"](ResponseSet("r", prompt("a"), texts, (1.0, 0.0))) == [3, 0]


def test_words_learn_what_training_pairs_say(tmp_path):
    pytest.importorskip("sklearn")
    rows = [
        {"id": str(i), "prompt": f"q{i}", "chosen": f"good answer {i}", "rejected": f"bad reply {i}"} for i in range(20)
    ]
    scorer = fit_tfidf(load_pairs(rows), "rows")
    good, bad = scorer(ResponseSet("x", prompt("?"), ("a good answer", "a bad reply"), (1.0, 0.0)))
    assert good > 0 > bad
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    assert fit_tfidf(load_pairs(swapped), "rows")(
        ResponseSet("x", prompt("?"), ("a good answer",), (1.0,))
    ) == pytest.approx([-good])
    with pytest.raises(InputError, match=r"^rows: no pair says which"):
        fit_tfidf([pair("p", 1, 2, None)], "rows")


def test_margins_and_calibration_worked_by_hand(tmp_path):
    log_odds = np.log(3.0)  # P(right) = 3/4
    pairs = [pair(f"p{i}", log_odds, 0, "a" if i < 6 else "b") for i in range(8)]
    result, _ = evaluated(pairs, tmp_path)
    assert result["margins"]["mean"] == pytest.approx(log_odds / 2, rel=1e-6)
    (row,) = result["calibration"]["reliability"]
    assert (row["rows"], row["right"]) == (8, 0.75) and row["probability"] == pytest.approx(0.75, rel=1e-6)
    assert result["calibration"]["error"] == pytest.approx(0, abs=1e-6)
    result, _ = evaluated([pair("p", 2, 2, "a")], tmp_path)  # says one half, and half is right
    assert result["calibration"]["error"] == 0


def test_a_best_of_n_row_in_both_suites(tmp_path):
    one = ResponseSet("s", prompt("?"), ("3", "5", "5", "1"), (0.0, 1.0, 0.0, 1.0), "x")
    result, rows = evaluated([one], tmp_path)  # chosen 5 and 1, rejected 3 and 5
    assert rows["id"] == ["s#0-0", "s#0-1", "s#1-0", "s#1-1"]
    assert rows["scores"] == [[5, 3], [5, 5], [1, 3], [1, 5]]
    assert (result["n"], result["accuracy"], result["ties"]) == (4, 0.25, 1)
    assert len(set(rows["prompt"])) == 1
    result, rows = evaluated([one], tmp_path, suite="best-of-n")
    assert (rows["id"], rows["scores"], rows["chosen"]) == (["s"], [[5, 1, 3, 5]], [2])
    assert (result["n"], result["accuracy"], result["ties"]) == (1, 0.5, 1)


def test_responses_of_one_grade_say_nothing(tmp_path):
    same = ResponseSet("t", prompt("t"), ("1", "2"), (1.0, 1.0))
    result, _ = evaluated([PAIRS[0], same], tmp_path)
    assert (result["n"], result["skipped"]) == (1, 1)


def test_nothing_to_measure_is_an_error(tmp_path):
    for pairs, what in (([], "has no rows of suite pairs"), ([pair("p0", 1, 2, None)], "no pair says which")):
        with pytest.raises(InputError, match=f"^pairs: {what}.*; there is nothing to measure"):
            measured(pairs, tmp_path / "out.json")
        assert not list(tmp_path.iterdir())  # the file of rows neither


def test_a_figure_a_row_is_no_result(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate_run, "MOST_SUBSETS", 2)
    pairs = [pair(f"p{i}", 2, 1, "a", f"subset {i}") for i in range(3)]
    assert list(measured(pairs[:2], tmp_path / "two.json")["subsets"]) == ["subset 0", "subset 1"]
    with pytest.raises(InputError, match=r"^pairs: has more than 2 subsets; .* drop or merge the column subset"):
        measured(pairs, tmp_path / "three.json")


def test_rewards_as_large_as_float32_has_them(tmp_path):
    largest = float(np.finfo(np.float32).max)
    result = measured([pair("p", largest, -largest, "a"), pair("q", 1, 0, "a")], tmp_path / "out.json")
    assert result["margins"]["mean"] == pytest.approx(largest) == result["margins"]["standard_deviation"]


def test_a_scorer_gives_a_reward_for_every_response(tmp_path):
    for scorer in (lambda some: reads(some)[1:], lambda some: [one[:0] for one in reads(some)]):
        with pytest.raises(ValueError, match=r"shorter|broadcast"):
            measured(PAIRS, tmp_path / "out.json", scorer)


def test_results_are_not_written_over_what_is_read(tmp_path):
    for source in ("out.json", "out.rows.parquet"):
        with pytest.raises(InputError, match=f"{source}: is what is read; give another --out"):
            measured(PAIRS, tmp_path / "out.json", data=str(tmp_path / source))


def test_other_processes_write_nothing(tmp_path):
    with writing_rows(str(tmp_path / "out.rows.parquet"), first=False) as write:
        write([])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--out", "rows.json"), "rows.json: is what is read; give another --out"),
        (("--out", "a.json", "--prior-sets", "a.json"), "a.json: is what is read; give another --out"),
        (("--out", "a.json", "--tfidf", "a.json"), "a.json: is what is read; give another --out"),
        (("--out", "a.json", "--prior-sets", "b.json"), "--prior-sets goes with --suite rewardbench"),
        (("--out", "a.json", "--scores", "s"), "--scores goes with --suite rules"),
        (
            ("--out", "a.json", "--tfidf", "rows.json"),
            "--tfidf rows.json: are the pairs that are measured; give those ",
        ),
        (("--out", "a.json", "--suite", "rules"), "--suite rules needs --scores, a score folder of all rules; it "),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_read(monkeypatch, capsys, options, message):
    code, _, err = in_process(monkeypatch, capsys, "evaluate", "absent", "--data", "rows.json", *options)
    assert code == 2 and err.startswith(f"adaptrm: {message}")


def test_few_pairs_of_each_subset_have_intervals(tmp_path):
    from adaptrm.evaluate.rewardbench import PUBLISHED

    pairs = [pair(f"p{i}", i % 2, 0.5, "a", subset) for i, subset in enumerate(PUBLISHED)]
    result = measured(pairs, tmp_path / "out.json", suite="rewardbench")
    ends = [result["ci95"], result["overall_ci95"], *result["sections_ci95"].values()]
    assert np.isfinite(ends).all() and result["ci95"][0] < result["accuracy"] < result["ci95"][1]


def test_results_are_json(tmp_path):
    with pytest.raises(InputError, match=r"out.parquet: results are JSON; give --out FILE.json"):
        measured(PAIRS, tmp_path / "out.parquet")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_rewards_that_are_not_finite_are_no_accuracy(tmp_path, value):
    scorer = lambda some: np.array([[1, 0], [value, 0]])[: len(some)]  # noqa: E731
    with pytest.raises(InputError, match=r"^m in float32: the reward of 'p1' is not finite"):
        measured(PAIRS[:2], tmp_path / "out.json", scorer)
    assert not list(tmp_path.iterdir())


def test_people_see_every_subset_and_no_markup(tmp_path):
    from rich.console import Console

    result, _ = evaluated([pair("p0", 2, 1, "a", "[red]x[/red]"), *PAIRS], tmp_path)
    shown = for_people(result)
    table = shown.pop("table")
    assert {k: shown[k] for k in ("suite", "n", "rows_without_preference", "ties", "chosen_longer")} == {
        "suite": "pairs",
        "n": 8,
        "rows_without_preference": 1,
        "ties": 3,
        "chosen_longer": "50.0 % of 2",
    }
    console = Console(width=80)
    with console.capture() as text:
        console.print(table)
    rows = [" ".join(line.strip("│").replace("│", " ").split()) for line in text.get().splitlines() if "│" in line]
    trivial = 100 * max(one["accuracy"] for one in result["baselines"].values())
    assert rows[0].startswith("All rows 8 50.0 ") and rows[0].endswith(f" {trivial:.1f}")
    assert [row.split(" ", 3)[:3] for row in rows[1:5]] == [
        ["[red]x[/red]", "1", "100.0"],
        ["all", "3", "33.3"],
        ["chat", "3", "33.3"],
        ["safety", "1", "100.0"],
    ]
    of_safety = max(one["subsets"]["safety"] for one in result["baselines"].values())
    assert rows[4] == f"safety 1 100.0 100.0 to 100.0 {100 * of_safety:.1f}"
    longer = result["baselines"]["longer"]
    less, *ends = (f"{100 * x:+.1f}" for x in (longer["model_less_this"], *longer["ci95"]))
    assert rows[5] == f"longer {100 * longer['accuracy']:.1f} {less} {' to '.join(ends)}"
