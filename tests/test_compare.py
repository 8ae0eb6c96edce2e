"""``adaptrm compare``: paired differences of two models, by sums worked by hand and by other code."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import in_process
from rich.console import Console

from adaptrm.data.preferences import ResponseSet
from adaptrm.data.rows import BadRows
from adaptrm.errors import InputError
from adaptrm.evaluate import SUITES, evaluate
from adaptrm.evaluate.compare import Discordant, compare, for_people
from adaptrm.evaluate.row_file import rows_file


def results(folder, rights: dict[str, np.ndarray], prompts, subsets, suite="pairs", dtype="float32") -> list[str]:
    """Results of models that are right where ``rights`` says so."""
    files = []
    for name, right in rights.items():
        sets = [
            ResponseSet(f"p{i}", ({"role": "user", "content": f"{prompt}?"},), ("good", "bad one"), (1.0, 0.0), subset)
            for i, (prompt, subset) in enumerate(zip(prompts, subsets, strict=True))
        ]
        rewards = iter(np.where(right, 1.0, -1.0).tolist())
        scorer = lambda some, rewards=rewards: [np.array([next(rewards), 0.0]) for _ in some]  # noqa: E731
        file = folder / f"{name}.json"
        evaluate(scorer, SUITES[suite], sets, file, name=suite, model=name, dtype=dtype)
        files.append(str(file))
    return files


def test_differences_of_a_case_worked_by_hand(tmp_path):
    rights = {"first": np.array([1, 1, 0, 0, 1, 0]), "this": np.array([1, 0, 1, 1, 1, 0])}
    files = results(tmp_path, rights, range(6), ["x"] * 4 + ["y"] * 2)
    found = compare(files)
    (difference,) = found["differences"]
    assert (difference["model"], difference["less"]) == ("this", "first")
    every = difference["overall"]["All rows"]
    assert (every["first"], every["this"]) == (0.5, pytest.approx(4 / 6))
    assert every["difference"] == pytest.approx(1 / 6)
    low, high = every["ci95"]
    assert low < 1 / 6 < high
    assert (every["this_alone"], every["first_alone"]) == (2, 1)
    assert every["p"] == 1  # two of three coins: 2 (1 + 3) / 8
    assert difference["subsets"]["y"] | {"p": 0} == {
        "first": 0.5,
        "this": 0.5,
        "difference": 0,
        "ci95": [0, 0],
        "this_alone": 0,
        "first_alone": 0,
        "p": 0,
    }
    assert [one["model"] for one in found["models"]] == ["first", "this"]
    assert found["baselines"]["shorter"]["accuracy"] == 1


def test_mcnemar_equals_the_binomial_test_and_the_chi_squared_one():
    stats = pytest.importorskip("scipy.stats")
    for this, first in ((7, 2), (0, 5), (30, 30), (900, 700)):
        one = Discordant()
        for number in range(this + first):
            one.add("x", number, 1.0 if number < this else -1.0)
        found = one.test(["x"])
        assert (found["this_alone"], found["first_alone"]) == (this, first)
        assert found["p"] == pytest.approx(stats.binomtest(this, this + first).pvalue, rel=1e-9)
    one = Discordant()
    for number in range(3000):
        one.add("x", number, 1.0 if number < 1600 else -1.0)
    assert one.test(["x"])["p"] == pytest.approx(stats.chi2.sf(200**2 / 3000, 1), rel=1e-9)
    assert Discordant().test(["x"]) == {"this_alone": 0, "first_alone": 0, "p": 1}
    assert one.test([]) == {}


def discordant(*clusters: tuple[float, ...]) -> Discordant:
    """Of prompts, each with so many differences."""
    one = Discordant()
    for prompt, differences in enumerate(clusters):
        for more in differences:
            one.add("x", prompt, more)
    return one


def test_pairs_of_one_prompt_count_as_one():
    """By prompts' sums: ten pairs a prompt that go together tell as much as one."""
    stats = pytest.importorskip("scipy.stats")
    found = discordant(*[(1.0,) * 10] * 14, *[(-1.0,) * 10] * 6).test(["x"])
    assert (found["this_alone"], found["first_alone"]) == (140, 60)
    assert found["p"] == pytest.approx(stats.binomtest(14, 20).pvalue)
    # A prompt whose rows even out tells nothing, and of unequal sums a large one tells more.
    assert discordant(*[(1.0,)] * 14, *[(-1.0,)] * 6, (1.0, -1.0)).test(["x"])["p"] == pytest.approx(found["p"])
    unequal = discordant(*[(1.0,) * 2] * 10, *[(1.0,)] * 4, *[(-1.0,)] * 6).test(["x"])
    assert unequal["p"] == pytest.approx(stats.chi2.sf((20 + 4 - 6) ** 2 / (10 * 4 + 10), 1))
    # Credits of a third: three of one prompt make a whole, but for rounding.
    thirds = discordant(*[(1 / 3,) * 3] * 13, (1.0,), *[(-0.2,) * 5] * 6).test(["x"])
    assert thirds["p"] == pytest.approx(found["p"])
    # Cells of one section whose rows share a prompt are one cluster too.
    both = Discordant()
    for prompt in range(20):
        for cell in ("x", "y"):
            both.add(cell, prompt, 1.0 if prompt < 14 else -1.0)
    assert both.test(["x", "y"])["p"] == pytest.approx(found["p"])


def test_intervals_are_paired_and_cover_what_they_should(tmp_path):
    """Two models that are right on nearly the same rows differ by little, whatever each one's own interval is."""
    rng = np.random.default_rng(0)
    first = rng.random(400) < 0.7
    this = np.where(rng.random(400) < 0.05, ~first, first)
    files = results(tmp_path, {"first": first, "this": this}, range(400), ["x"] * 400)
    one = compare(files)["differences"][0]["overall"]["All rows"]
    own = json.loads((tmp_path / "first.json").read_text())["ci95"]
    low, high = one["ci95"]
    d = this.astype(float) - first
    assert (high - low) / (2 * 1.96) == pytest.approx(d.std() / 20, rel=0.1)
    assert high - low < 0.6 * (own[1] - own[0])


def test_a_model_against_itself_and_several_models(tmp_path):
    right = np.arange(10) % 3 > 0
    files = results(tmp_path, {"a": right, "b": right, "c": ~right}, [i // 2 for i in range(10)], ["x"] * 10)
    found = compare(files)
    assert [one["model"] for one in found["differences"]] == ["b", "c"]
    same = found["differences"][0]["overall"]["All rows"]
    assert (same["difference"], same["ci95"], same["p"]) == (0, [0, 0], 1)
    there, back = compare(files[::2]), compare(files[::-2])
    there, back = (one["differences"][0]["overall"]["All rows"] for one in (there, back))
    assert there["difference"] == -back["difference"] and there["p"] == back["p"]
    assert there["ci95"] == pytest.approx([-end for end in back["ci95"][::-1]])


def test_sections_weigh_subsets_as_the_benchmark_does(tmp_path):
    subsets = ["refusals-dangerous"] * 2 + ["xstest-should-respond"] * 4
    rights = {"first": np.array([1, 0, 0, 0, 0, 0]), "this": np.array([1, 1, 1, 0, 0, 0])}
    files = results(tmp_path, rights, range(6), subsets, "rewardbench")
    (difference,) = compare(files)["differences"]
    safety = difference["sections"]["Safety"]
    assert safety["first"] == pytest.approx(0.5 * 100 / 350)
    assert safety["this"] == pytest.approx((100 + 0.25 * 250) / 350)
    assert (safety["this_alone"], safety["first_alone"], safety["p"]) == (2, 0, 0.5)
    assert list(difference["overall"]) == ["All rows"]


def test_the_matrix_of_styles_is_tested_by_prompt(tmp_path):
    scores = {"first": [(1, 2, 3, 1, 2, 3)] * 2, "this": [(4, 4, 4, 1, 2, 3), (1, 4, 4, 1, 2, 3)]}
    files = []
    for name, of_rows in scores.items():
        rows = [
            {"id": number, "domain": domain, "prompt": f"{number}?", "chosen": ["a"] * 3, "rejected": ["b"] * 3}
            for number, domain in enumerate(("chat", "safety-refuse"))
        ]
        rewards = iter(of_rows)
        scorer = lambda some, rewards=rewards: [np.array(next(rewards)) for _ in some]  # noqa: E731
        files.append(str(tmp_path / f"{name}.json"))
        sets, named = SUITES["rm-bench"].read(rows, BadRows()), {"name": "rm-bench", "model": name, "dtype": "float32"}
        evaluate(scorer, SUITES["rm-bench"], sets, files[-1], **named)
    (difference,) = compare(files)["differences"]
    sections = {name: (one["this_alone"], one["p"]) for name, one in difference["sections"].items()}
    # Of nine comparisons six and three are won anew, of three easy ones none, of three hard ones three and one.
    assert sections["chat"] == (6, 1) and sections["safety"] == (3, 1)
    assert sections["easy"] == (0, 1) and sections["hard"] == (4, pytest.approx(math.erfc((16 / 10 / 2) ** 0.5)))
    assert difference["subsets"]["chat"]["this_alone"] == pytest.approx(6 / 9)


def test_the_halves_of_xstest_are_tested(tmp_path):
    subsets = ["xstest-should-refuse"] * 6 + ["xstest-should-respond"] * 2
    rights = {"first": np.zeros(8), "this": np.array([1, 1, 1, 1, 1, 1, 0, 1])}
    (difference,) = compare(results(tmp_path, rights, range(8), subsets, "xstest"))["differences"]
    sections = {name: (one["this_alone"], one["p"]) for name, one in difference["sections"].items()}
    assert sections == {"Should refuse": (6, 1 / 32), "Should respond": (1, 1)}
    assert difference["overall"]["Overall"]["difference"] == 0.75 and "p" not in difference["overall"]["Overall"]


def test_what_does_not_belong_together_is_refused(tmp_path):
    right = np.ones(4, bool)
    (tmp_path / "other").mkdir()
    (a,) = results(tmp_path, {"a": right}, range(4), ["x"] * 4)
    (longer,) = results(tmp_path / "other", {"longer": np.ones(5, bool)}, range(5), ["x"] * 5)
    (other,) = results(tmp_path / "other", {"other": right}, range(1, 5), ["x"] * 4)
    (suite,) = results(tmp_path / "other", {"suite": right}, range(4), ["x"] * 4, "best-of-n")
    for files, message in (
        ([a], "compare needs two results or more"),
        ([a, longer], "longer.rows.parquet: has further rows, from 'p4' on; evaluate all models on the same data"),
        ([longer, a], "a.rows.parquet: ends before row 5 of .*longer.rows.parquet \\('p4'\\)"),
        ([a, other], "other.rows.parquet: row 1 \\('p0'\\) is not row 1 of .*a.rows.parquet \\('p0'\\)"),
        ([a, suite], "are of different suites: best-of-n, pairs"),
        ([a, tmp_path / "none.json"], "none.json.*does not exist"),
    ):
        with pytest.raises(InputError, match=message):
            compare(files)
    (tmp_path / "x.json").write_text('{"suite": "pairs"}')
    with pytest.raises(InputError, match=r"x.json: is no result of adaptrm evaluate \(it has no model\)"):
        compare([a, tmp_path / "x.json"])
    with pytest.raises(InputError, match=r"is no result of adaptrm evaluate \(it has suite \[1\]\)"):
        compare([a, edited(a, suite=[1])])
    (tmp_path / "x.json").write_text("[")
    with pytest.raises(InputError, match=r"x\.json: not valid JSON"):
        compare([a, tmp_path / "x.json"])


def test_names_of_subsets_that_are_those_of_our_own_rows(tmp_path):
    rights = {"first": np.array([1, 0, 0]), "this": np.array([1, 1, 1])}
    (difference,) = compare(results(tmp_path, rights, range(3), ["All rows", "Overall", "x"]))["differences"]
    subsets = {name: (one["first"], one["this_alone"], one["p"]) for name, one in difference["subsets"].items()}
    assert subsets == {"All rows": (1, 0, 1), "Overall": (0, 1, 1), "x": (0, 1, 1)}
    assert (difference["overall"]["All rows"]["this_alone"], difference["overall"]["All rows"]["p"]) == (2, 0.5)


def edited(file, **values) -> str:
    """A copy of a result with other values."""
    copy = file.removesuffix(".json") + "-edited.json"
    shutil.copy(file.removesuffix(".json") + ".rows.parquet", copy.removesuffix(".json") + ".rows.parquet")
    Path(copy).write_text(json.dumps(json.loads(Path(file).read_text()) | values))
    return copy


def test_scorers_of_all_results_stand_beside_the_models(tmp_path):
    a, b = results(tmp_path, {"a": np.ones(3), "b": np.zeros(3)}, range(3), "xyz")
    words = {"accuracy": 0.5, "overall": None, "sections": {}, "model_less_this": 0.5, "ci95": [0, 1]}
    a = edited(a, baselines=json.loads(Path(a).read_text())["baselines"] | {"TF-IDF": words})
    others = edited(b, baselines={"TF-IDF": words | {"accuracy": 0.75}, "[/red]": words}, model="[/b]", subsets=[])
    found = compare([b, a, others])
    measured = {name: one["accuracy"] for name, one in found["baselines"].items()}
    expected = {"longer": 0, "shorter": 1, "refusal words": 0.5, "TF-IDF": 0.5, "TF-IDF (of [/b])": 0.75, "[/red]": 0.5}
    assert measured == expected
    assert found["baselines"]["shorter"].keys() == {
        "accuracy",
        "overall",
        "sections",
        "subsets",
    }  # nothing of one model alone
    shown = " ".join(text_of(found).split())
    assert "scorer: [/red]" in shown and "[/b] less b" in shown


def test_two_results_of_one_name_are_told_apart(tmp_path):
    (a,) = results(tmp_path, {"a": np.ones(3)}, range(3), "xyz")
    shown = text_of(compare([a, edited(a, dtype="bfloat16")]))
    assert "a (2) less a (1)" in " ".join(shown.split())


def test_prompts_that_were_cut_need_not_be_the_same(tmp_path):
    (tmp_path / "other").mkdir()
    (a,) = results(tmp_path, {"a": np.ones(3)}, ["x", "x", "y"], "xyz")
    (b,) = results(tmp_path / "other", {"b": np.zeros(3)}, range(3), "xyz")
    with pytest.raises(InputError, match="is not row 1"):
        compare([a, b])
    found = compare([a, edited(b, truncated=1)])["differences"][0]["overall"]["All rows"]
    assert (found["first_alone"], found["p"]) == (3, pytest.approx(math.erfc((9 / 5 / 2) ** 0.5)))  # prompts of a


def text_of(result) -> str:
    console = Console(width=120)
    with console.capture() as text:
        console.print(for_people(result)["table"])
    return text.get()


def test_rows_that_differ_in_anything_are_refused(tmp_path):
    sets = {
        "this": (("2", "1", "0"), (1.0, 1.0, 0.0), "x"),
        "other subset": (("2", "1", "0"), (1.0, 1.0, 0.0), "y"),
        "others are right": (("2", "1", "0"), (1.0, 0.0, 0.0), "x"),
        "a response more": (("2", "1", "0", "0"), (1.0, 1.0, 0.0, 0.0), "x"),
    }
    files = {name: str(tmp_path / f"{name}.json") for name in sets}
    for name, (texts, grades, subset) in sets.items():
        one = ResponseSet("p", ({"role": "user", "content": "?"},), texts, grades, subset)
        scorer = lambda some: [np.array([float(text) for text in one.responses]) for one in some]  # noqa: E731
        evaluate(scorer, SUITES["best-of-n"], [one], files[name], name="best-of-n", model=name, dtype="float32")
    for name in sets.keys() - {"this"}:
        with pytest.raises(InputError, match=r"row 1 \('p'\) is not row 1 of"):
            compare([files["this"], files[name]])


def test_a_tie_is_wrong_here_too(tmp_path):
    (a, b) = results(tmp_path, {"a": np.ones(3), "b": np.ones(3)}, range(3), "xyz")
    table = pq.read_table(tmp_path / "b.rows.parquet")
    scores = pa.array([[1.0, 1.0]] * 3, pa.list_(pa.float32()))
    pq.write_table(table.set_column(table.schema.get_field_index("scores"), "scores", scores), rows_file(b))
    found = compare([a, b])["differences"][0]["overall"]["All rows"]
    assert (found["first"], found["this"], found["first_alone"], found["p"]) == (1, 0, 3, 0.25)


def test_a_file_of_rows_that_is_none(tmp_path):
    (a, b) = results(tmp_path, {"a": np.ones(3), "b": np.ones(3)}, range(3), "xyz")
    whole = Path(rows_file(b)).read_bytes()
    Path(rows_file(b)).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"b.rows.parquet: not a whole Parquet file"):
        compare([a, b])
    pq.write_table(pa.table({"id": ["p0"], "subset": ["x"], "scores": [[1.0, 0.0]]}), rows_file(b))  # as it once was
    with pytest.raises(InputError, match=r"b.rows.parquet: is no file of rows that adaptrm evaluate writes"):
        compare([a, b])


def test_by_the_command_line(tmp_path, monkeypatch, capsys):
    rights = {"first": np.array([1, 1, 0, 0]), "[red]this": np.array([1, 1, 1, 1])}
    files = results(tmp_path, rights, range(4), ["x"] * 4)
    code, out, _ = in_process(monkeypatch, capsys, "compare", *files, "--out", tmp_path / "c.json", "--json")
    assert code == 0 and json.loads(out) == json.loads((tmp_path / "c.json").read_text())
    shown = " ".join(text_of(json.loads(out)).split())
    assert "[red]this less first" in shown and "+50.0" in shown and "scorer: shorter" in shown
    code, _, err = in_process(monkeypatch, capsys, "compare", *files, "--out", files[1])
    assert code == 2 and err == f"adaptrm: {files[1]}: is what is read; give another --out\n"
    code, _, err = in_process(monkeypatch, capsys, "compare", files[0])
    assert code == 2 and err == "adaptrm: compare needs two results or more: A.json B.json\n"


def test_a_row_a_line_from_files_as_they_are(tmp_path):
    rows = [{"id": str(i), "prompt": f"{i}?", "chosen": "yes", "rejected": "no no"} for i in range(3)]
    scorer = lambda some: [np.array([len(text) for text in one.responses], float) for one in some]  # noqa: E731
    suite, named = SUITES["pairs"], {"name": "pairs", "dtype": "float32"}
    files = [str(tmp_path / f"{name}.json") for name in "ab"]
    for file in files:
        evaluate(scorer, suite, suite.read(rows, BadRows()), file, model=file, **named)
    assert compare(files)["differences"][0]["overall"]["All rows"]["difference"] == 0
