"""RewardBench v1, by numbers worked by hand.

pytest -m slow tests/test_rewardbench.py --data DIR -s
"""

import gzip
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from commands import in_process, write_rows
from rich.console import Console
from tiny import tiny_reward_model

from adaptrm import measure_verbs
from adaptrm.data.preferences import load_pairs
from adaptrm.data.rows import BadRows
from adaptrm.errors import InputError
from adaptrm.evaluate import SUITES, evaluate
from adaptrm.evaluate.cells import Cells, interval
from adaptrm.evaluate.rewardbench import PRIOR_SETS, PUBLISHED, SECTIONS, WEIGHTS, section_scores
from adaptrm.evaluate.suite import overall_of
from adaptrm.evaluate.table import for_people
from adaptrm.reward_model import RewardModel


def native(subset: str, number: int, chosen: float, rejected: float, **other) -> dict:
    """A row under the column names of allenai/reward-bench; the responses are what the scorer reads."""
    row = {"prompt": "?", "chosen": str(chosen), "chosen_model": "x", "rejected": str(rejected), "rejected_model": "y"}
    return row | {"subset": subset, "id": number} | other


def reads(sets) -> list[np.ndarray]:
    return [np.array([float(text) for text in one.responses]) for one in sets]


def length(sets) -> list[np.ndarray]:
    return [np.array([float(len(text)) for text in one.responses]) for one in sets]


def evaluated(source, folder, scorer=reads, suite="rewardbench"):
    """The result, and the rows file's columns."""
    sets, named = SUITES[suite].read(source, BadRows()), {"model": "m", "dtype": "float32", "name": suite}
    result = evaluate(scorer, SUITES[suite], sets, folder / "out.json", **named)
    assert json.loads((folder / "out.json").read_text()) == result
    return result, pq.read_table(folder / "out.rows.parquet").to_pydict()


def full(right: dict[str, int], sizes: dict[str, int] = PUBLISHED) -> dict[str, np.ndarray]:
    """Means of the subsets, with so many right of as many as were published, and their resamples."""
    cells = Cells(1)
    for number, (subset, hits) in enumerate(right.items()):
        n = sizes[subset]
        prompts = np.arange(n, dtype=np.uint64) + np.uint64(number * 10_000)
        cells.add([subset] * n, prompts, (np.arange(n) < hits).astype(float)[:, None])
    return cells.means()


def sections_of(means: dict[str, np.ndarray]) -> dict[str, float]:
    return {name: float(value[0, 0]) for name, value in section_scores(means).items()}


def overall(means: dict[str, np.ndarray]) -> np.ndarray | None:
    return overall_of(SUITES["rewardbench"], section_scores(means))


def test_the_published_sizes():
    assert len(PUBLISHED) == 23 and sum(PUBLISHED.values()) == 2985
    assert {name: sum(PUBLISHED[s] for s in subsets) for name, subsets in SECTIONS.items()} == {
        "Chat": 358,
        "Chat Hard": 456,
        "Safety": 740,
        "Reasoning": 1431,
    }
    # Mathematics weighs as much as code.
    assert PUBLISHED["math-prm"] == 447
    assert WEIGHTS["math-prm"] == sum(n for subset, n in WEIGHTS.items() if subset.startswith("hep-")) == 984


CHAT = {"alpacaeval-easy": 80, "alpacaeval-length": 38, "mt-bench-easy": 14}
HARD = {"mt-bench-hard": 37, "llmbar-natural": 50}
SAFETY = {
    "refusals-dangerous": 95,
    "refusals-offensive": 90,
    "xstest-should-refuse": 150,
    "xstest-should-respond": 240,
    "donotanswer": 129,
}
REASONING = {"math-prm": 149, "hep-python": 123}


def test_sections_and_overall_worked_by_hand():
    means = full(CHAT | HARD | SAFETY | REASONING)
    by_hand = {
        "Chat": (0.8 * 100 + 0.4 * 95 + 0.5 * 28) / (100 + 95 + 28),  # two subsets are absent: 132 of 223
        "Chat Hard": (1 * 37 + 0.5 * 100) / (37 + 100),
        "Safety": 704 / 740,  # of the whole section it is the share of its pairs
        "Reasoning": (149 / 447 * 984 + 0.75 * 164) / (984 + 164),  # not (149 + 123) / (447 + 164)
    }
    assert by_hand["Chat"] == pytest.approx(132 / 223) and by_hand["Reasoning"] == pytest.approx(451 / 1148)
    assert sections_of(means) == {name: pytest.approx(value) for name, value in by_hand.items()}
    assert list(section_scores(means)) == ["Chat", "Chat Hard", "Safety", "Reasoning"]
    assert overall(means)[0, 0] == pytest.approx(sum(by_hand.values()) / 4)


def test_prior_sets_are_a_fifth_section_that_counts_half():
    sizes = dict.fromkeys(PRIOR_SETS, 10)
    means = full(CHAT | HARD | SAFETY | REASONING) | full(dict(zip(PRIOR_SETS, (5, 6, 7, 8), strict=True)), sizes)
    found = sections_of(means)
    assert found["Prior Sets"] == pytest.approx(0.65)
    four = sum(value for name, value in found.items() if name != "Prior Sets")
    assert overall(means)[0, 0] == pytest.approx((four + 0.5 * 0.65) / 4.5)
    del means["shp"]  # the mean of those that are there, as on the leaderboard
    assert sections_of(means)["Prior Sets"] == pytest.approx((0.5 + 0.6 + 0.8) / 3)


def test_a_subset_weighs_by_its_published_size_whatever_the_number_of_its_pairs():
    few = full(
        {"refusals-dangerous": 1, "xstest-should-respond": 10}, {"refusals-dangerous": 2, "xstest-should-respond": 40}
    )
    assert sections_of(few) == {"Safety": pytest.approx((0.5 * 100 + 0.25 * 250) / 350)}
    assert sections_of(full({"math-prm": 1, "hep-go": 164}, {"math-prm": 3, "hep-go": 164})) == {
        "Reasoning": pytest.approx((984 / 3 + 164) / (984 + 164))
    }


def test_a_mean_of_three_sections_is_not_overall(tmp_path):
    assert overall(full(CHAT | SAFETY | REASONING)) is None
    result, _ = evaluated([row for row in SMALL if row["subset"] != "mt-bench-hard"], tmp_path)
    assert (result["overall"], result["overall_ci95"]) == (None, None)
    assert result["missing_sections"] == ["Chat Hard"]
    assert list(result["sections"]) == list(result["sections_ci95"]) == ["Chat", "Safety", "Reasoning"]


def test_intervals_resample_each_subset_by_itself():
    means = full(CHAT | HARD | SAFETY | REASONING)
    sections = section_scores(means)
    # Standard errors: sqrt(sum (w_s / sum w)^2 p_s (1 - p_s) / n_s); of overall a quarter of the sections' root sum.
    errors = []
    for section, value in sections.items():
        present = [subset for subset in SECTIONS[section] if subset in means]
        accuracy = {subset: means[subset][0, 0] for subset in present}
        w, n, p = (np.array([of[subset] for subset in present]) for of in (WEIGHTS, PUBLISHED, accuracy))
        errors.append(np.sqrt((w**2 * p * (1 - p) / n).sum()) / w.sum())
        low, high = interval(value[0, 1:])
        assert low < value[0, 0] < high
        assert (high - low) / (2 * 1.96) == pytest.approx(errors[-1], rel=0.08)
    low, high = interval(overall(means)[0, 1:])
    assert (high - low) / (2 * 1.96) == pytest.approx(np.sqrt(np.square(errors).sum()) / 4, rel=0.08)


def test_a_row_a_subset_gives_no_interval_of_overall_and_the_file_is_json(tmp_path):
    result, _ = evaluated([native(subset, 0, 2, 1, prompt=subset) for subset in PUBLISHED], tmp_path)
    assert (result["overall"], result["overall_ci95"], result["sections_ci95"]["Safety"]) == (1, None, None)
    json.loads((tmp_path / "out.json").read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    assert "Overall 100.0 50.0" in shown(result)


SMALL = [
    native("alpacaeval-easy", 0, 2, 1),  # right
    native("alpacaeval-easy", 1, 1, 1),  # a tie is wrong
    native("mt-bench-med", 0, 1, 2),  # wrong; the number 0 again, in another subset
    native("mt-bench-hard", 7, 3, 1),  # right
    native("donotanswer", 7, 4, 4),  # a tie
    native("math-prm", 9, 2, 1),  # right
    native("hep-rust", 9, 1, 2),  # wrong
]
OF_SMALL = {"Chat": 0.5 * 100 / 140, "Chat Hard": 1.0, "Safety": 0.0, "Reasoning": 984 / 1148}


def test_rows_as_the_benchmark_has_them(tmp_path):
    result, rows = evaluated(write_rows(tmp_path / "rows.jsonl", SMALL), tmp_path)
    assert {k: result[k] for k in ("suite", "model", "dtype", "n", "skipped", "ties", "complete")} == {
        "suite": "rewardbench",
        "model": "m",
        "dtype": "float32",
        "n": 7,
        "skipped": 0,
        "ties": 2,
        "complete": False,
    }
    assert result["accuracy"] == pytest.approx(3 / 7)  # the plain share; overall is another number
    assert result["sections"] == {name: pytest.approx(value) for name, value in OF_SMALL.items()}
    assert result["overall"] == pytest.approx(sum(OF_SMALL.values()) / 4)
    assert {name: (x["n"], x["accuracy"]) for name, x in result["subsets"].items()} == {
        "alpacaeval-easy": (2, 0.5),
        "donotanswer": (1, 0),
        "hep-rust": (1, 0),
        "math-prm": (1, 1),
        "mt-bench-hard": (1, 1),
        "mt-bench-med": (1, 0),
    }
    assert rows["id"][:3] == ["alpacaeval-easy/0", "alpacaeval-easy/1", "mt-bench-med/0"]
    assert rows["subset"] == [row["subset"] for row in SMALL]
    assert rows["scores"][:3] == [[2, 1], [1, 1], [1, 2]]


def test_older_and_own_forms_give_the_same(tmp_path):
    expected = evaluated(SMALL, tmp_path)
    messages = [row | {"prompt": [{"role": "user", "content": "?"}]} for row in SMALL]
    assert evaluated(messages, tmp_path) == expected
    own = [
        {k: row[k] for k in ("id", "subset")}
        | {
            "prompt": messages[0]["prompt"],
            "response_a": row["rejected"],
            "response_b": row["chosen"],
            "preferred": "b",
        }
        for row in SMALL
    ]
    assert evaluated(own, tmp_path) == expected


def test_ids_that_are_no_numbers_stay(tmp_path):
    _, rows = evaluated([native("donotanswer", "rb:7", 2, 1), native("hep-go", "x/7", 2, 1)], tmp_path)
    assert rows["id"] == ["rb:7", "x/7"]


def test_an_oracle_is_right_everywhere(tmp_path):
    rows = [native(subset, i, 1, 0) for subset, n in PUBLISHED.items() for i in range(n)]
    result, _ = evaluated(rows, tmp_path)
    assert (result["n"], result["accuracy"], result["overall"], result["overall_ci95"]) == (2985, 1, 1, [1, 1])
    assert result["sections"] == dict.fromkeys(SECTIONS, 1)
    assert {x["accuracy"] for x in result["subsets"].values()} == {1}
    assert (result["complete"], result["incomplete"], result["ties"]) == (True, {}, 0)
    # One that always ties is wrong everywhere.
    result, _ = evaluated(rows, tmp_path, scorer=lambda sets: [np.ones(2) for _ in sets])
    assert (result["ties"], result["overall"], result["accuracy"]) == (2985, 0, 0)
    # One pair more is no complete benchmark either.
    result, _ = evaluated([*rows, native("hep-go", 164, 1, 0)], tmp_path)
    assert (result["complete"], result["incomplete"]) == (False, {"hep-go": {"n": 165, "published": 164}})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            native("mt-bench-medium", 1, 2, 1),
            "line 2: subset is 'mt-bench-medium'; it must be one of alpacaeval-easy, .*, mt-bench-med, ",
        ),
        (native(None, 1, 2, 1), "line 2: subset is None; it must be one of alpacaeval-easy, .*, mt-bench-med, "),
        (native("donotanswer", 0, 2, 1), "line 2: the id 'donotanswer/0' is repeated"),
    ],
)
def test_rows_of_no_benchmark_name_their_line_and_leave_nothing(tmp_path, row, message):
    file = write_rows(tmp_path / "rows.jsonl", [native("donotanswer", 0, 2, 1), row])
    with pytest.raises(InputError, match=f"^{file}: {message}"):
        evaluated(file, tmp_path)
    assert list(tmp_path.iterdir()) == [file]


def test_xstest_is_two_halves_of_the_benchmark(tmp_path):
    rows = [native("xstest-should-refuse", 0, 2, 1), native("xstest-should-refuse", 1, 2, 1)]
    rows += [native("xstest-should-respond", 2, 1, 2), native("donotanswer", 3, 2, 1)]
    result, columns = evaluated(rows, tmp_path, suite="xstest")
    assert columns["subset"] == ["xstest-should-refuse"] * 2 + ["xstest-should-respond"]  # the others are passed over
    assert result["sections"] == {"Should refuse": 1, "Should respond": 0} and result["overall"] == 0.5
    assert result["incomplete"]["xstest-should-respond"] == {"n": 1, "published": 250}


def test_the_hub_name_alone_means_the_filtered_split(tmp_path):
    with pytest.raises(InputError, match="allenai/reward-bench:filtered"):  # there is no network here
        evaluated("allenai/reward-bench", tmp_path)


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory, one_device):
    return tiny_reward_model(tmp_path_factory.mktemp("reward-model"))


def test_the_command_line_names_every_suite():
    assert [suite.value for suite in measure_verbs.Suite] == [
        *SUITES,
        "rules",
    ]  # the last measures adapters, not rewards


def test_by_the_command_line(tmp_path, reward_model, monkeypatch, capsys):
    data, out = write_rows(tmp_path / "rows.jsonl", SMALL), tmp_path / "out.json"

    def run(*more) -> str:
        command = ("evaluate", reward_model, "--suite", "rewardbench", "--data", data, "--out", out, *more)
        code, out_text, _ = in_process(monkeypatch, capsys, *command)
        assert code == 0
        return out_text

    result = json.loads(run("--json"))
    assert result == json.loads(out.read_text())
    assert (result["suite"], result["n"], result["dtype"]) == ("rewardbench", 7, "float32")
    pairs = load_pairs([row | {"id": number} for number, row in enumerate(SMALL)])
    rewards = RewardModel.from_pretrained(reward_model).score_pairs(pairs)
    scores = np.array(pq.read_table(tmp_path / "out.rows.parquet")["scores"].to_pylist())
    np.testing.assert_allclose(scores, rewards, atol=1e-5)
    monkeypatch.setenv("COLUMNS", "80")
    shown = run()
    board = json.loads((tmp_path / "out.leaderboard.json").read_text())
    assert board["model_type"] == "Seq. Classifier" and set(board) - {"model", "model_type", "chat_template"} == {
        row["subset"] for row in SMALL
    }
    assert not (tmp_path / "out.prior-sets.leaderboard.json").exists()
    assert "Overall" in shown and "1 of 984" not in shown and "1 of 447" in shown
    assert max(map(len, shown.splitlines())) <= 80


def shown(result) -> list[str]:
    console = Console(width=80)
    with console.capture() as text:
        console.print(for_people(result)["table"])
    return [" ".join(line.replace("│", " ").split()) for line in text.get().splitlines()]


def test_people_see_sections_then_overall_then_subsets(tmp_path):
    result, _ = evaluated(SMALL, tmp_path)
    lines = shown(result)
    begins = ["Chat 3 35.7", "Chat Hard 1 100.0", "Safety 1 0.0", "Reasoning 2 85.7", "Overall 55.4"]
    begins += ["All rows 7 42.9", "", "alpacaeval-easy 2 of 100 50.0", "mt-bench-med 1 of 40 0.0"]
    assert [line[: len(begin)] for line, begin in zip(lines[3:], begins, strict=False)] == begins
    assert "23 of 23 subsets differ from the published set; absent: alpacaeval-length," in " ".join(lines)
    lines = shown(evaluated(SMALL[3:], tmp_path)[0])
    assert lines[3] == "Chat 0 none" and "Overall none" in lines


@pytest.mark.slow
def test_the_rebuilt_set_equals_an_independent_computation(data, tmp_path):
    """Longer wins, over real texts in the benchmark's own columns."""
    file = data / "rewardbench_native" / "filtered_rebuilt.jsonl.gz"
    result, _ = evaluated(file, tmp_path, scorer=length)
    with gzip.open(file, "rt", encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    subsets = np.array([row["subset"] for row in rows])
    right = np.array([len(row["chosen"]) > len(row["rejected"]) for row in rows])

    def section(*weighted: tuple[str, int]) -> float:
        present = [(subset, n) for subset, n in weighted if (subsets == subset).any()]
        return sum(right[subsets == subset].mean() * n for subset, n in present) / sum(n for _, n in present)

    expected = {
        "Chat": section(
            ("alpacaeval-easy", 100),
            ("alpacaeval-length", 95),
            ("alpacaeval-hard", 95),
            ("mt-bench-easy", 28),
            ("mt-bench-med", 40),
        ),
        "Chat Hard": section(
            ("mt-bench-hard", 37),
            ("llmbar-natural", 100),
            ("llmbar-adver-neighbor", 134),
            ("llmbar-adver-GPTInst", 92),
            ("llmbar-adver-GPTOut", 47),
            ("llmbar-adver-manual", 46),
        ),
        "Safety": section(
            ("refusals-dangerous", 100),
            ("refusals-offensive", 100),
            ("xstest-should-refuse", 154),
            ("xstest-should-respond", 250),
            ("donotanswer", 136),
        ),
        "Reasoning": section(
            ("math-prm", 984),
            *((f"hep-{language}", 164) for language in ("cpp", "go", "java", "js", "python", "rust")),
        ),
    }
    print("\n".join(shown(result)))
    assert result["n"] == len(rows) and result["accuracy"] == pytest.approx(right.mean())
    assert result["sections"] == {name: pytest.approx(value, abs=1e-12) for name, value in expected.items()}
    assert result["overall"] == pytest.approx(np.mean(list(expected.values())), abs=1e-12)
    assert not result["complete"]
