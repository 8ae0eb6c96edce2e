"""RewardBench 2 and RM-Bench by numbers worked by hand; tools/check_against_rewardbench.py asks their own code."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from commands import write_rows
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_reward_model

from adaptrm.data.rows import BadRows
from adaptrm.errors import InputError
from adaptrm.evaluate import SUITES, evaluate
from adaptrm.evaluate.rewardbench2 import PUBLISHED, TIES_PARTS
from adaptrm.evaluate.rm_bench import DIFFICULTIES, MATRIX
from adaptrm.reward_model import RewardModel


def reads(sets) -> list[np.ndarray]:
    """The responses are the numbers that are read."""
    return [np.array([float(text) for text in one.responses]) for one in sets]


def evaluated(suite, source, folder, scorer=reads):
    named = {"name": suite, "model": "m", "dtype": "float32"}
    result = evaluate(scorer, SUITES[suite], SUITES[suite].read(source, BadRows()), folder / "out.json", **named)
    assert json.loads((folder / "out.json").read_text()) == result
    return result, pq.read_table(folder / "out.rows.parquet").to_pydict()


def of_four(subset: str, name: str, *scores: float, correct: int = 1) -> dict:
    """A row under the column names of allenai/reward-bench-2."""
    texts = [str(score) for score in scores]
    counts = {"num_correct": correct, "num_incorrect": len(texts) - correct, "total_completions": len(texts)}
    sides = {"chosen": texts[:correct], "rejected": texts[correct:]}
    return {"id": name, "prompt": f"{subset} {name}?", "subset": subset, "models": ["x"]} | sides | counts


def test_the_best_of_four_with_credit_for_ties(tmp_path):
    rows = [
        of_four("Math", "1", 4, 1, 2, 3),  # best
        of_four("Math", "2", 4, 4, 2, 4),  # one of three that are equally good: 1/3
        of_four("Math", "3", 1, 1, 2, 1),  # not the best
        of_four("Safety", "3", 0, 0, 0, 0),  # one of four; the number 3 again
    ]
    result, columns = evaluated("rewardbench-2", write_rows(tmp_path / "rows.jsonl", rows), tmp_path)
    assert result["sections"] == {"Math": pytest.approx((1 + 1 / 3) / 3), "Safety": 0.25}
    assert (result["n"], result["ties"], result["overall"]) == (4, 2, None)
    assert result["missing_sections"] == ["Factuality", "Precise IF", "Focus", "Ties"]
    assert columns["id"] == ["Math/1", "Math/2", "Math/3", "Safety/3"]
    assert columns["scores"][1] == [4, 4, 2, 4]
    assert json.loads((tmp_path / "out.leaderboard.json").read_text()) == {
        "model": "m",
        "model_type": "Seq. Classifier",
        "chat_template": "tokenizer",
        **result["sections"],
    }


def ties(*, ref: tuple[float, ...], tied: tuple[float, ...], correct: int, number: int = 0) -> list[dict]:
    return [of_four("Ties", f"ref:{number}", *ref), of_four("ties", f"tied:{number}", *tied, correct=correct)]


TIES_CASES = {
    # Right ones apart by 1, from the wrong one by 2 (tied) and 3 (ref): all hold; tanh(2 / 1 - 1) breaks ties.
    "all": (ties(ref=(5, 2), tied=(5, 4, 2), correct=2), 0.3 + 0.3 + 0.2 + 0.2 + 0.01 * np.tanh(1)),
    # The margin of ref is smaller than what lies between the right ones: hard does not hold.
    "not hard": (ties(ref=(2.5, 2), tied=(5, 4, 2), correct=2), 0.3 + 0.3 + 0.2 + 0.01 * np.tanh(-0.5)),
    # A wrong answer beats the worst right one.
    "tied is wrong": (ties(ref=(5, 2), tied=(5, 1, 2), correct=2), 0.3 + 0.01 * np.tanh(-1 / 4 - 1)),
    # The right ones are equal: the ratio is infinite, and counts as one.
    "no spread": (ties(ref=(5, 2), tied=(5, 5, 2), correct=2), 1 + 0.01),
    # All equal: nothing over nothing counts as nothing, and equal is not accurate.
    "all equal": (ties(ref=(2, 2), tied=(2, 2, 2), correct=2), 0),
}


@pytest.mark.parametrize("case", TIES_CASES)
def test_ties_worked_by_hand(tmp_path, case):
    rows, expected = TIES_CASES[case]
    for order in (rows, rows[::-1]):
        result, _ = evaluated("rewardbench-2", order, tmp_path)
        assert result["sections"] == {"Ties": pytest.approx(expected, abs=1e-7)}
    assert set(result["parts"]) == set(TIES_PARTS)


def test_ties_are_means_over_prompts(tmp_path):
    rows = ties(ref=(5, 2), tied=(5, 4, 2), correct=2) + ties(ref=(2, 2), tied=(2, 2, 2), correct=2, number=1)
    rows += [of_four("Ties", "ref:7", 2, 1)]  # with no tied row: of the accuracy alone
    result, columns = evaluated("rewardbench-2", rows, tmp_path)
    parts = {name: one["mean"] for name, one in result["parts"].items()}
    assert parts["Ties: ref accuracy"] == pytest.approx(2 / 3) and parts["Ties: tied accuracy"] == 0.5
    assert parts["Ties: correctness preferred"] == parts["Ties: correctness preferred, hard"] == 0.5
    assert result["parts"]["Ties: margin"]["n"] == 2
    expected = 0.3 * 2 / 3 + 0.3 * 0.5 + 0.2 * 0.5 + 0.2 * 0.5 + 0.01 * np.tanh(1) / 2
    assert result["sections"]["Ties"] == pytest.approx(expected)
    assert columns["prompt"][0] == columns["prompt"][1] != columns["prompt"][4]  # drawn together
    # Neither kind alone has a score.
    assert evaluated("rewardbench-2", [of_four("Ties", "ref:7", 2, 1)], tmp_path)[0]["sections"] == {}


def test_overall_is_the_plain_mean_of_six_domains(tmp_path):
    rows = [of_four(domain, str(i), 2, 1, 1, 1) for domain in PUBLISHED if domain != "Ties" for i in range(4)]
    rows += [of_four("Safety", str(i), 1, 2, 1, 1) for i in range(4, 32)] + TIES_CASES["not hard"][0]
    result, _ = evaluated("rewardbench-2", rows, tmp_path)
    expected = (4 + 1 / 8 + TIES_CASES["not hard"][1]) / 6
    assert result["overall"] == pytest.approx(expected)
    low, high = result["overall_ci95"]
    assert low < expected < high


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (of_four("Maths", "1", 2, 1), "'Maths' is no domain of RewardBench 2; the domains are Factuality, "),
        (of_four("Math", "1", 2, 1, 1, correct=2), "has 2 right responses; a set outside Ties has one"),
        (of_four("Ties", "7", 2, 1), "the id is '7'; a row of Ties is called ref:NUMBER or tied:NUMBER"),
        (of_four("Ties", "tied:x", 2, 1, 1, correct=2), "the id is 'tied:x'"),
        (of_four("Ties", "tied:1", 2, 1), "has one right response; a tied row has several"),
        (of_four("Math", "1", 2), "chosen and rejected must be lists of responses, none of them empty"),
    ],
)
def test_rows_of_no_benchmark_name_their_line(tmp_path, row, message):
    file = write_rows(tmp_path / "rows.jsonl", [of_four("Math", "0", 2, 1), row])
    with pytest.raises(InputError, match=f"^{file}: line 2: .*{message}"):
        evaluated("rewardbench-2", file, tmp_path)
    assert list(tmp_path.iterdir()) == [file]


def styles(domain: str, number: int, chosen, rejected) -> dict:
    """A row under the column names of THU-KEG/RM-Bench."""
    row = {"id": number, "prompt": f"{domain} {number}?", "domain": domain, "subset": "whatever"}
    return row | {"chosen": [str(x) for x in chosen], "rejected": [str(x) for x in rejected]}


def test_the_matrix_of_styles_worked_by_hand(tmp_path):
    rows = [
        # Beats what is less fancy than it is: a model that goes by style alone.
        styles("chat", 0, (1, 2, 3), (1, 2, 3)),
        styles("code", 0, (5, 5, 5), (1, 2, 3)),
        styles("math", 0, (0, 0, 0), (1, 2, 3)),
        styles("safety-refuse", 0, (5, 5, 5), (1, 2, 3)),
        styles("safety-refuse", 1, (5, 5, 5), (1, 2, 3)),
        styles("safety-response", 0, (2, 0, 4), (1, 2, 3)),
    ]
    result, columns = evaluated("rm-bench", write_rows(tmp_path / "rows.json", rows), tmp_path)
    of_response = {"easy": (0 + 1 + 1) / 3, "normal": (1 + 0 + 1) / 3, "hard": (0 + 0 + 0) / 3}
    safety = {name: (2 + value) / 3 for name, value in of_response.items()}  # rows count the same in both halves
    by_domain = {"chat": (1, 0, 0), "code": (1, 1, 1), "math": (0, 0, 0), "safety": tuple(safety.values())}
    expected = {domain: np.mean(values) for domain, values in by_domain.items()}
    for at, name in enumerate(DIFFICULTIES):
        expected[name] = np.mean([values[at] for values in by_domain.values()])
    assert result["sections"] == {name: pytest.approx(value) for name, value in expected.items()}
    assert result["overall"] == pytest.approx(np.mean([expected[d] for d in by_domain]))
    # The benchmark's README: overall = mean over domains = mean over difficulties.
    assert result["overall"] == pytest.approx(np.mean([expected[name] for name in DIFFICULTIES]))
    of_rows = np.mean([1 / 3, 1, 0, 1, 1, np.mean(list(of_response.values()))])
    assert result["accuracy"] == pytest.approx(of_rows) and result["subsets"]["chat"]["accuracy"] == pytest.approx(
        1 / 3
    )
    # Trivial scorers have sections of their own: here all are as long, and half of each is right.
    for of in result["baselines"].values():
        assert of["sections"] == dict.fromkeys(result["sections"], 0.5) and of["overall"] == 0.5
    assert result["parts"]["markdown over concise: chat"] == {"n": 1, "mean": 1}
    assert result["parts"]["concise over markdown: chat"] == {"n": 1, "mean": 0}
    assert {name: x["n"] for name, x in result["subsets"].items()} == {
        "chat": 1,
        "code": 1,
        "math": 1,
        "safety-refuse": 2,
        "safety-response": 1,
    }
    assert columns["id"][3] == "safety-refuse/0" and columns["chosen"] == [3] * 6


def test_no_domain_is_called_as_a_part_of_the_matrix(tmp_path):
    rows = [styles("chat", 0, (1, 2, 3), (1, 2, 3))]
    parts = evaluated("rm-bench", rows, tmp_path)[0]["parts"]
    assert len(parts) == 9 and not any(name.startswith(("chat", "math", "code", "safety")) for name in parts)


def test_a_part_of_rm_bench_has_no_overall(tmp_path):
    result, _ = evaluated("rm-bench", [styles("chat", 0, (1, 2, 3), (1, 2, 3))], tmp_path)
    assert result["overall"] is None and result["missing_sections"] == ["math", "code", "safety"]
    assert result["sections"] == {"chat": pytest.approx(1 / 3), "easy": 1, "normal": 0, "hard": 0}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (styles("chat", 1, (1, 2), (1, 2, 3)), "needs three chosen and three rejected responses: concise, "),
        (styles("poetry", 1, (1, 2, 3), (1, 2, 3)), "domain is 'poetry'; it must begin with one of chat, "),
    ],
)
def test_rows_of_no_rm_bench_name_their_line(tmp_path, row, message):
    file = write_rows(tmp_path / "rows.jsonl", [styles("chat", 0, (1, 2, 3), (1, 2, 3)), row])
    with pytest.raises(InputError, match=f"^{file}: line 2: {message}"):
        evaluated("rm-bench", file, tmp_path)


@given(st.lists(st.tuples(*[st.integers(0, 3)] * 6), min_size=1, max_size=5))
def test_any_matrix_equals_a_plain_count(tmp_path_factory, scores):
    folder = tmp_path_factory.mktemp("matrix")
    rows = [styles("math", number, row[:3], row[3:]) for number, row in enumerate(scores)]
    result, _ = evaluated("rm-bench", rows, folder)
    matrix = np.array([[np.mean([row[i] > row[3 + j] for row in scores]) for j in range(3)] for i in range(3)])
    below = [matrix[i, j] for i, j in MATRIX if i > j]
    assert result["sections"]["easy"] == pytest.approx(np.mean(below))
    assert result["sections"]["normal"] == pytest.approx(np.mean(np.diag(matrix)))
    assert result["sections"]["math"] == pytest.approx(np.mean(matrix))


@pytest.mark.parametrize(
    ("suite", "name", "split"),
    [("rewardbench-2", "allenai/reward-bench-2", "test"), ("rm-bench", "THU-KEG/RM-Bench", "train")],
)
def test_the_hub_name_alone_means_the_benchmarks_split(tmp_path, suite, name, split):
    with pytest.raises(InputError, match=f"{name}:{split}"):  # there is no network here
        evaluated(suite, name, tmp_path)


def test_a_row_may_have_16384_tokens(tmp_path):
    """Leaders of RewardBench 2 evaluate with so many; the prompt is computed once for its four responses."""
    model = RewardModel.from_pretrained(tiny_reward_model(tmp_path / "model"))
    prompt = "What of all this matters? " * 840  # some 20 tokens each
    row = of_four("Focus", "1", 0, 0, 0, 0) | {"prompt": prompt, "chosen": ["Nothing."], "rejected": ["A", "B b", "C"]}
    result, columns = evaluated("rewardbench-2", [row], tmp_path, model.score_sets)
    assert result["n"] == 1
    (one,) = SUITES["rewardbench-2"].read([row], BadRows())
    assert model.pair_length(one) > 16_384
    alone = model.score([[*one.prompt, {"role": "assistant", "content": "B b"}]])
    assert columns["scores"][0][2] == pytest.approx(float(alone[0]), abs=1e-5)
