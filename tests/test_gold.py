"""Verdicts of people: gold files, pairs with a preference, reviews that were filled in."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from refusals import refused

from adaptrm.data.gold import Verdict, read_gold, read_verdicts

ROWS = [
    {"id": "p0", "preferred": "a"},
    {"id": "p1", "preferred": "b"},
    {"id": "p2", "preferred": "tie"},
    {"id": "p3", "preferred": None},
    {"id": 4, "preferred": "b", "prompt": "?", "response_a": "yes", "response_b": "no", "reason": "abstained"},
]
GOLD = {"p0": 1, "p1": -1, "p2": 0, "4": -1}


def write_lines(file, rows) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_verdicts_are_read_by_the_id_of_their_pair(tmp_path):
    file = write_lines(tmp_path / "gold.jsonl", ROWS)
    assert read_gold(file) == GOLD
    assert read_verdicts(file)["4"] == Verdict(-1, "abstained") and read_verdicts(file)["p0"] == Verdict(1)


def test_jsonl_and_parquet_hold_the_same_verdicts(tmp_path):
    pq.write_table(pa.Table.from_pylist([row | {"id": str(row["id"])} for row in ROWS]), tmp_path / "gold.parquet")
    assert read_gold(tmp_path / "gold.parquet") == GOLD


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "x"}, "has no preferred; a verdict is a, b or tie, and null where nobody said"),
        ({"id": "x", "preferred": "A"}, "preferred is 'A'; it must be a, b, tie or null"),
        ({"id": "x", "preferred": True}, "preferred is True"),
        ({"id": "x", "preferred": ["a"]}, "preferred is ['a']"),
        ({"preferred": "a"}, "has no id"),
        ({"id": "", "preferred": "a"}, "id is empty"),
        ({"id": "p0", "preferred": "a"}, "the id 'p0' is repeated; a pair has one verdict"),
    ],
)
def test_wrong_verdicts_are_named_with_their_line(tmp_path, row, message):
    file = write_lines(tmp_path / "gold.jsonl", [ROWS[0], row])
    found = refused(read_gold, file)
    assert found.startswith(f"{file}: line 2: ") and message in found


def test_a_file_that_nobody_filled_in_is_an_error(tmp_path):
    file = write_lines(tmp_path / "review.jsonl", [ROWS[3]])
    assert refused(read_gold, file) == f"{file}: holds no verdict; fill in preferred: a, b or tie"
