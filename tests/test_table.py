"""Scores that people already have: joined to pairs by id and side, mapped, and labelled like a judge's."""

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import adaptrm, pair_rows, write_rows
from tiny import tiny_pairs, tiny_pool

from adaptrm.data.labels import read_labels
from adaptrm.data.preferences import load_pairs
from adaptrm.data.scores import read_parts
from adaptrm.errors import InputError
from adaptrm.judge.score import ScoreJob, dry_run, score
from adaptrm.judge.table import Table
from adaptrm.label import LabelJob, label
from adaptrm.rules import RulePool
from adaptrm.rules.pool import Rule

POOL = tiny_pool(3)  # the third has sign -1
COLUMNS = ("r0=kind", "r1=scores.gpt4.1")


def table_rows(count: int = 5) -> list[dict]:
    """From 1 to 5, in an order of their own."""
    rows = []
    for i in reversed(range(count)):
        for side, shift in (("a", 0), ("b", 2)):
            value = (i + shift) % 5 + 1
            rows.append({"id": f"p{i}", "side": side, "kind": value, "scores": {"gpt4": [0, 6 - value]}, "r2": 1.5})
    return rows


def written(folder, rows, name="table.jsonl"):
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), folder / name)
    elif name.endswith(".gz"):
        (folder / name).write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    else:
        write_rows(folder / name, rows)
    return folder / name


def job(folder, table, **changes) -> ScoreJob:
    pool = folder / "pool.yaml"
    pool.write_text(POOL.to_yaml())
    pairs = write_rows(folder / "pairs.jsonl", pair_rows(tiny_pairs(5)))
    fields = {"columns": COLUMNS, "value_range": "1,5", "part_size": 2} | changes
    return ScoreJob(str(pairs), f"table:{table}", str(pool), str(folder / "scores"), **fields)


@pytest.mark.parametrize("name", ["table.jsonl", "table.jsonl.gz", "table.parquet"])
def test_values_are_mapped_to_scores_and_joined_by_id_and_side(tmp_path, name):
    found = score(job(tmp_path, written(tmp_path, table_rows(), name)))
    assert (found["pairs"], found["rules"], found["parts"], found["label_mass"]) == (5, 3, 3, 1.0)
    parts = list(read_parts(tmp_path / "scores"))
    assert [i for part in parts for i in part.ids] == [pair.id for pair in tiny_pairs(5)]
    a, b = (np.concatenate([getattr(part, side) for part in parts]) for side in "ab")
    # 1 to 5 become -1, -.5, 0, .5, 1; 1.5 is -.75, and speaks for the response by its rule's sign.
    kind_a, kind_b = np.array([-1, -0.5, 0, 0.5, 1]), np.array([0, 0.5, 1, -1, -0.5])
    np.testing.assert_allclose(a, np.stack([kind_a, -kind_a, np.full(5, 0.75)], 1), atol=1e-7)
    np.testing.assert_allclose(b, np.stack([kind_b, -kind_b, np.full(5, 0.75)], 1), atol=1e-7)
    for part in parts:
        for ones in (part.relevance, part.label_mass_a, part.label_mass_b):
            assert (ones == 1).all()
        assert np.isnan(part.log_odds_a).all() and np.isnan(part.log_odds_b).all()
    stored = pq.read_table(tmp_path / "scores" / "part-00000.parquet")["log_odds_a"].to_pylist()
    assert stored == [[None] * 3] * 2


def test_scores_of_a_table_are_labelled_by_hand_worked_rules(tmp_path):
    score(job(tmp_path, written(tmp_path, table_rows())))
    label(LabelJob(str(tmp_path / "scores"), str(tmp_path / "labels.jsonl"), strategy="fixed", rules=("r0",)))
    pairs = {pair.id: pair for pair in tiny_pairs(5)}
    chosen = {one.id: "ab"[one.chosen == pairs[one.id].response_b] for one in read_labels(tmp_path / "labels.jsonl")}
    assert chosen == {"p0": "b", "p1": "b", "p2": "b", "p3": "a", "p4": "a"}


def test_the_command_takes_a_table(tmp_path):
    table = written(tmp_path, table_rows())
    one = job(tmp_path, table)
    command = ["score", "--pairs", one.pairs, "--judge", one.judge, "--rules", one.rules, "--out", one.out]
    command += ["--columns", ",".join(COLUMNS), "--range", "1,5"]
    checked = json.loads(adaptrm(*command, "--dry-run", "--json").stdout)
    assert checked == {"pairs": 5, "skipped_rows": 0, "rules": 3, "rows": 10} == dry_run(one)
    assert not (tmp_path / "scores").exists()
    assert json.loads(adaptrm(*command, "--json").stdout)["pairs"] == 5
    manifest = json.loads((tmp_path / "scores" / "manifest.json").read_text())
    assert manifest["range"] == [1, 5]
    assert manifest["columns"] == {"r0": "kind", "r1": "scores.gpt4.1", "r2": "r2"}
    # Another table in the same folder is refused.
    written(tmp_path, [row | {"r2": 1} for row in table_rows()])
    again = adaptrm(*command, check=False)
    assert again.returncode == 2 and "holds scores with another model_sha256" in again.stderr


GOOD = {"id": "p9", "side": "a", "kind": 1, "scores": {"gpt4": [0, 1]}, "r2": 1}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (GOOD | {"kind": float("nan")}, r"line 11: kind is nan; it must be a number from 1 to 5 \(--range LO,HI\)"),
        (GOOD | {"kind": 5.01}, r"line 11: kind is 5\.01; it must be a number from 1 to 5"),
        (GOOD | {"kind": -(10**400)}, r"line 11: kind is -1000"),
        (GOOD | {"kind": "4"}, "line 11: kind is '4'; it must be a number"),
        (GOOD | {"kind": None}, "line 11: has no value in column 'kind'; name the column with --columns r0=COLUMN"),
        (GOOD | {"scores": {"gpt4": [3]}}, r"line 11: has no value in column 'scores\.gpt4\.1'"),
        (GOOD | {"scores": 3}, r"line 11: has no value in column 'scores\.gpt4\.1'"),
        (GOOD | {"id": "p1"}, "line 11: pair 'p1', side a is repeated"),
        (GOOD | {"side": "chosen"}, r"line 11: needs id \(of the pair\) and side \(a or b\)"),
        (GOOD | {"id": None}, "line 11: needs id"),
        (GOOD | {"id": "\ud800"}, "line 11: id holds half of a character"),
    ],
)
def test_a_wrong_row_is_named(tmp_path, row, message):
    file = written(tmp_path, [*table_rows(), row])
    with pytest.raises(InputError, match=rf"^{file}: {message}"):
        Table(file, POOL, COLUMNS, "1,5")


def test_a_pair_without_a_row_stops_before_anything_is_written(tmp_path):
    rows = [row for row in table_rows() if (row["id"], row["side"]) != ("p3", "b")]
    file = written(tmp_path, rows)
    with pytest.raises(InputError, match=rf"^{file}: has no row with id 'p3' and side b; add it, or drop the pair$"):
        score(job(tmp_path, file))
    assert [path.name for path in (tmp_path / "scores").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": ("kind",)}, "--columns kind: must be RULE=COLUMN"),
        ({"columns": ("r7=kind",)}, "--columns r7=kind: rule 'r7' is not in pool tiny"),
        ({"value_range": "5,1"}, "--range 5,1: must be two numbers LO,HI with LO below HI"),
        ({"value_range": "1"}, "--range 1: must be two numbers"),
        ({"value_range": "0,inf"}, "--range 0,inf: must be two numbers"),
        ({"value_range": "a,b"}, "--range a,b: must be two numbers"),
    ],
)
def test_wrong_options_are_named(tmp_path, options, message):
    with pytest.raises(InputError, match=f"^{message}"):
        score(job(tmp_path, written(tmp_path, table_rows()), **options))


def test_an_empty_table_and_options_without_a_table(tmp_path):
    file = written(tmp_path, [])
    with pytest.raises(InputError, match="holds no rows"):
        Table(file, POOL)
    with pytest.raises(InputError, match="--columns and --range are for a table"):
        score(ScoreJob(**vars(job(tmp_path, file)) | {"judge": "some/model"}))


@pytest.mark.slow
def test_real_scores_of_real_replies(data, tmp_path):
    """Three GPT-4 verdicts a reply as three rules, pairs of two replies to one question, a table of their scores."""
    raw = gzip.decompress((data / "scores" / "prometheus_rubric_scores.jsonl.gz").read_bytes()).splitlines()
    by_prompt: dict[str, list[dict]] = {}
    for row in map(json.loads, raw):
        by_prompt.setdefault(json.dumps([row["prompt"], row["rubric"]]), []).append(row)
    pairs, table = [], []
    for replies in by_prompt.values():
        for n, (one, two) in enumerate(zip(replies[::2], replies[1::2], strict=False)):
            if one["response"] == two["response"]:
                continue
            name = f"{one['id']}+{n}"
            pairs.append(
                {"id": name, "prompt": one["prompt"], "response_a": one["response"], "response_b": two["response"]}
            )
            table += [{"id": name, "side": side, "scores": reply["scores"]} for side, reply in (("a", one), ("b", two))]
    rules = RulePool("gpt4", "1", tuple(Rule(f"v{i}", "quality", f"The response is good {i}.") for i in range(3)))
    (tmp_path / "pool.yaml").write_text(rules.to_yaml())
    write_rows(tmp_path / "pairs.jsonl", pairs)
    out, labels = str(tmp_path / "scores"), str(tmp_path / "labels.jsonl")
    columns = tuple(f"v{i}=scores.gpt4.{i}" for i in range(3))
    source = f"table:{written(tmp_path, table)}"
    score(
        ScoreJob(
            str(tmp_path / "pairs.jsonl"),
            source,
            str(tmp_path / "pool.yaml"),
            out,
            columns=columns,
            value_range="1,5",
        )
    )
    done = label(LabelJob(out, labels, strategy="all"))
    sums = {(row["id"], row["side"]): sum(row["scores"]["gpt4"]) for row in table}
    gaps = {row["id"]: sums[row["id"], "a"] - sums[row["id"], "b"] for row in pairs}
    assert done["pairs"] == len(pairs) > 80 and done["ties"] == sum(gap == 0 for gap in gaps.values())
    responses = {pair.id: pair for pair in load_pairs(tmp_path / "pairs.jsonl")}
    for one in read_labels(labels):
        assert (one.chosen == responses[one.id].response_a) == (gaps[one.id] > 0)
        assert one.rule_margin == pytest.approx(abs(gaps[one.id]) / 2, abs=1e-5)
    print(f"\n{done}")


@pytest.mark.slow
def test_rubric_pairs_with_a_made_table(data, tmp_path):
    """Real pairs, whose rubric is a rule a subset; a table that gives the preferred reply one point more."""
    source = data / "pairs" / "hhh_rubric_pairs.jsonl"
    pairs = load_pairs(source)
    subsets = sorted({pair.subset for pair in pairs})
    rules = RulePool("rubric", "1", tuple(Rule(name, name, f"The response is {name}.") for name in subsets))
    (tmp_path / "pool.yaml").write_text(rules.to_yaml())
    table = [
        {"id": pair.id, "side": side} | {name: 3 + (name == pair.subset) * (side == "a") for name in subsets}
        for pair in pairs
        for side in "ab"
    ]
    out = str(tmp_path / "scores")
    score(
        ScoreJob(str(source), f"table:{written(tmp_path, table)}", str(tmp_path / "pool.yaml"), out, value_range="1,5")
    )
    done = label(LabelJob(out, str(tmp_path / "labels.jsonl"), k=1))
    assert (done["pairs"], done["ties"], done["agreement"]) == (len(pairs), 0, 1.0)
    subset_of = {pair.id: pair.subset for pair in pairs}
    assert all(one.rules == (subset_of[one.id],) for one in read_labels(tmp_path / "labels.jsonl"))
    print(f"\n{done}")
