"""Preference pairs in every form that people have them, and one clear line for every way to get them wrong."""

import gzip
import hashlib
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from adaptrm.data.preferences import Pair, hash_id, load_pairs, read_pairs
from adaptrm.errors import InputError

USER = {"role": "user", "content": "How do I bake bread?"}
SYSTEM = {"role": "system", "content": "Be kind."}
ASKED = ({"role": "user", "content": "How do I bake bread?"},)
ROWS = [
    {"id": "p0", "prompt": [USER], "response_a": "Mix.", "response_b": "No.", "preferred": "a", "subset": "s"},
    {"id": "p1", "prompt": [SYSTEM, USER], "response_a": "Ünï ✓\n", "response_b": "B", "preferred": "b"},
    {"id": "p2", "prompt": "plain text", "response_a": "A", "response_b": "B", "preferred": None},
]
PAIRS = [
    Pair("p0", (USER,), "Mix.", "No.", "a", "s"),
    Pair("p1", (SYSTEM, USER), "Ünï ✓\n", "B", "b", None),
    Pair("p2", ({"role": "user", "content": "plain text"},), "A", "B", None, None),
]


def says(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def lines(rows) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def refused(source) -> str:
    """The message of the refusal: one line."""
    with pytest.raises(InputError) as wrong:
        load_pairs(source)
    message = str(wrong.value)
    assert len(message.splitlines()) == 1, message
    return message


def test_canonical_rows_in_every_kind_of_file(tmp_path):
    plain, packed = tmp_path / "pairs.jsonl", tmp_path / "pairs.jsonl.gz"
    plain.write_bytes(lines(ROWS))
    packed.write_bytes(gzip.compress(lines(ROWS)))
    assert load_pairs(plain) == load_pairs(packed) == load_pairs(str(plain)) == load_pairs(ROWS) == PAIRS
    # Blank lines, Windows line ends and a byte-order mark are no rows and no errors.
    plain.write_bytes(b"\xef\xbb\xbf" + lines(ROWS).replace(b"\n", b"\r\n\r\n"))
    assert load_pairs(plain) == PAIRS
    table = tmp_path / "pairs.parquet"
    pq.write_table(
        pa.Table.from_pylist([row | {"prompt": list(p.prompt)} for row, p in zip(ROWS, PAIRS, strict=True)]), table
    )
    assert load_pairs(table) == PAIRS


def test_parquet_is_read_across_batches(tmp_path):
    rows = [{"id": str(i), "prompt": "p", "response_a": f"a{i}", "response_b": "b"} for i in range(2500)]
    file = tmp_path / "pairs.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file)
    assert [pair.response_a for pair in read_pairs(file)] == [f"a{i}" for i in range(2500)]
    rows[2100]["response_b"] = " "
    pq.write_table(pa.Table.from_pylist(rows), file)
    assert refused(file).startswith(f"{file}: row 2101: response_b is empty")


def test_a_datasets_set_is_read_as_it_is():
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list([{"prompt": "p", "chosen": "good", "rejected": "bad"}])
    (pair,) = load_pairs(made)
    assert (pair.prompt, pair.response_a, pair.response_b) == ((says("user", "p"),), "good", "bad")


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "How do I bake bread?", "chosen": "good", "rejected": "bad"}, ASKED),
        ({"prompt": [SYSTEM, USER], "chosen": "good", "rejected": "bad"}, (SYSTEM, USER)),
        (
            {"prompt": [USER], "chosen": [says("assistant", "good")], "rejected": [says("assistant", "bad")]},
            ASKED,
        ),
        (
            {"chosen": [USER, says("assistant", "good")], "rejected": [USER, says("assistant", "bad")]},
            ASKED,
        ),
        # The prompt beside whole conversations, as UltraFeedback has it.
        (
            {
                "prompt": USER["content"],
                "chosen": [USER, says("assistant", "good")],
                "rejected": [USER, says("assistant", "bad")],
            },
            ASKED,
        ),
        (
            {
                "chosen": [SYSTEM, USER, says("assistant", "Do."), says("user", "x"), says("assistant", "good")],
                "rejected": [SYSTEM, USER, says("assistant", "Do."), says("user", "x"), says("assistant", "bad")],
            },
            (SYSTEM, USER, says("assistant", "Do."), says("user", "x")),
        ),
        (
            {
                "chosen": "\n\nHuman: How do I bake bread?\n\nAssistant: good",
                "rejected": "\n\nHuman: How do I bake bread?\n\nAssistant: bad",
            },
            ASKED,
        ),
        (
            {
                "chosen": "\n\nHuman: a\nHuman: b\n\nAssistant: c\n\nHuman: d\n\nAssistant: good",
                "rejected": "\n\nHuman: a\nHuman: b\n\nAssistant: c\n\nHuman: d\n\nAssistant: bad",
            },
            # Only a blank line starts a turn: the second "Human:" is what the first one said.
            (says("user", "a\nHuman: b"), says("assistant", "c"), says("user", "d")),
        ),
    ],
)
def test_chosen_and_rejected(row, prompt):
    (pair,) = load_pairs([row | {"subset": 7}])
    assert pair.prompt == prompt
    assert (pair.response_a, pair.response_b, pair.preferred, pair.subset) == ("good", "bad", "a", "7")
    assert pair.conversation("b") == [*prompt, says("assistant", "bad")]


def test_best_of_n_gives_every_pair_of_chosen_and_rejected():
    row = {"id": "q", "prompt": "p", "chosen_list": ["c0", "c1"], "rejected_list": ["r0", "r1", "r2"]}
    found = [(pair.id, pair.response_a, pair.response_b, pair.preferred) for pair in load_pairs([row])]
    assert found == [(f"q#{i}-{j}", f"c{i}", f"r{j}", "a") for i in range(2) for j in range(3)]


def test_a_missing_id_is_a_hash_of_the_row():
    row = {"prompt": "p", "response_a": "a", "response_b": "é"}
    (first,) = load_pairs([row])
    # By hand: ids of files that people have labelled must not change with a version.
    content = '{"prompt": "p", "response_a": "a", "response_b": "\\u00e9"}'
    assert first.id == hashlib.sha256(content.encode()).hexdigest()[:16]
    assert load_pairs([dict(reversed(row.items()))])[0].id == first.id
    assert load_pairs([row | {"id": None}])[0].id != "None"
    assert load_pairs([row | {"response_b": "e"}])[0].id != first.id
    assert load_pairs([row | {"id": 5}])[0].id == "5"


def test_the_hash_of_an_id_is_the_same_in_every_process():
    assert hash_id("p0") == 17613450280036892301


def test_reading_streams():
    def rows():
        yield ROWS[0]
        yield {}

    stream = read_pairs(rows())
    assert next(stream) == PAIRS[0]
    with pytest.raises(InputError, match="row 1: needs response_a"):
        next(stream)


GOOD = {"id": "x", "prompt": "p", "response_a": "a", "response_b": "b"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": "p0"}, "the id 'p0' is repeated"),
        ({"response_a": ""}, "response_a is empty or no text"),
        ({"response_b": " \n"}, "response_b is empty or no text"),
        ({"response_b": None}, "response_b is empty or no text"),
        ({"response_a": ["a"]}, "response_a is empty or no text"),
        ({"preferred": "A"}, "preferred is 'A'; it must be a, b or null"),
        ({"prompt": None}, "prompt is missing or empty"),
        ({"prompt": ""}, "prompt is missing or empty"),
        ({"prompt": []}, "prompt is missing or empty"),
        ({"prompt": {"role": "user"}}, "prompt is missing or empty"),
        ({"prompt": [says("human", "x")]}, "prompt must hold messages with a role (system, user, assistant)"),
        ({"prompt": ["x"]}, "prompt must hold messages"),
        ({"prompt": [{"role": "user"}]}, "prompt must hold messages"),
        ({"prompt": [says("user", "x"), says("assistant", "y")]}, "the last message of prompt is of the assistant"),
        ({"prompt": [says("system", "x")]}, "the last message of prompt is of the system"),
        ({"id": "\ud800"}, "holds half of a character"),
        ({"response_a": "a\udc00"}, "holds half of a character"),
        ({"prompt": [says("user", "\ud800")]}, "holds half of a character"),
    ],
)
def test_wrong_canonical_rows_name_the_line(tmp_path, change, message):
    file = tmp_path / "pairs.jsonl"
    file.write_bytes(lines([ROWS[0], GOOD | change]))
    found = refused(file)
    assert found.startswith(f"{file}: line 2: ") and message in found


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "needs response_a and response_b, or chosen and rejected, or chosen_list and rejected_list; has nothing"),
        ({"prompt": "p", "response_a": "a"}, "has prompt, response_a"),
        (5, "must be an object"),
        ({"chosen": "no dialogue", "rejected": "none"}, "prompt is missing"),
        ({"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: a"}, "prompt is missing"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: ", "rejected": "\n\nHuman: a\n\nAssistant: b"}, "chosen is empty"),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: other\n\nAssistant: c"},
            "differ in their last message alone",
        ),
        ({"chosen": [USER, says("assistant", "a")], "rejected": [says("assistant", "b")]}, "last message alone"),
        ({"prompt": "p", "chosen": "a", "rejected": [says("assistant", "b")]}, "rejected is empty or no text"),
        ({"prompt": "p", "chosen": [], "rejected": []}, "last message alone"),
        ({"prompt": "p", "chosen": [{"content": "a"}], "rejected": [{"content": "b"}]}, "chosen must hold messages"),
        (
            {"prompt": "other", "chosen": [USER, says("assistant", "a")], "rejected": [USER, says("assistant", "b")]},
            "prompt is not what chosen and rejected begin with",
        ),
        ({"prompt": "p", "chosen_list": "abc", "rejected_list": ["b"]}, "chosen_list and rejected_list must be lists"),
        ({"prompt": "p", "chosen_list": None, "rejected_list": ["b"]}, "chosen_list and rejected_list must be lists"),
        ({"prompt": "p", "chosen_list": ["a", ""], "rejected_list": ["b"]}, "chosen_list is empty"),
    ],
)
def test_wrong_rows_of_other_forms_name_the_row(row, message):
    found = refused([GOOD, row])
    assert found.startswith("pairs: row 1: ") and message in found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"id": "x", \n', "not valid JSON"),
        (b"[1, 2]\n", "must be a JSON object, is list"),
        (b'"text"\n', "must be a JSON object, is str"),
        (b"[" * 100_000, "not valid JSON"),
        ('{"id": "é"}'.encode("latin-1"), "not valid JSON"),
    ],
)
def test_malformed_lines_are_named(tmp_path, text, message):
    file = tmp_path / "pairs.jsonl"
    file.write_bytes(lines(ROWS) + b"\n" + text)
    found = refused(file)
    assert found.startswith(f"{file}: line 5: ") and message in found


@pytest.mark.parametrize("kind", ["cut short", "broken", "wrong checksum", "not packed"])
def test_a_gzip_file_that_is_not_whole(tmp_path, kind):
    whole = gzip.compress(lines(ROWS))
    data = {
        "cut short": whole[: len(whole) // 2],
        "broken": whole[:10] + b"\x07" + whole[11:],  # a block of a type that there is not
        "wrong checksum": whole[:-8] + b"\0\0\0\0" + whole[-4:],
        "not packed": lines(ROWS),
    }[kind]
    file = tmp_path / "pairs.jsonl.gz"
    file.write_bytes(data)
    assert refused(file).startswith(f"{file}: not a whole gzip file: ")


@pytest.mark.parametrize("place", [-50, 100, 10, 0])
def test_a_parquet_file_that_is_not_whole(tmp_path, place):
    file = tmp_path / "pairs.parquet"
    pq.write_table(pa.Table.from_pylist([GOOD | {"id": str(i)} for i in range(2000)]), file)
    data = bytearray(file.read_bytes())
    if place < 0:
        del data[place:]
    elif place == 0:
        data.clear()
    else:
        data[place : place + 8] = bytes(byte ^ 255 for byte in data[place : place + 8])
    file.write_bytes(data)
    assert refused(file).startswith(f"{file}: not a whole Parquet file: ")


def test_an_absent_file_and_a_folder(tmp_path):
    assert refused(tmp_path / "none.jsonl") == f"{tmp_path}/none.jsonl: does not exist; check the path"
    assert "is a folder, not a file" in refused(tmp_path)
