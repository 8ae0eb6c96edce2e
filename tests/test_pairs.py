"""Preference pairs in every form that people have them, and one clear line for every way to get them wrong."""

import gzip
import hashlib
import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import refusals
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer

from adaptrm.data.chat import ChatTokenizer
from adaptrm.data.chat_trees import pair_length, pair_tree
from adaptrm.data.preferences import Pair, hash_id, load_pairs, read_pairs
from adaptrm.data.scores import Scores, write_manifest, write_part
from adaptrm.errors import InputError
from adaptrm.label import LabelJob, label
from adaptrm.paths import sha256

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


def refused(source, **options) -> str:
    return refusals.refused(load_pairs, source, **options)


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
        # The same of several turns: the text is the first of the user's, as UltraFeedback's makers have it.
        (
            {
                "prompt": USER["content"],
                "prompt_id": "0b",
                "chosen": [SYSTEM, USER, says("assistant", "Do."), says("user", "x"), says("assistant", "good")],
                "rejected": [SYSTEM, USER, says("assistant", "Do."), says("user", "x"), says("assistant", "bad")],
                "messages": [USER],
                "score_chosen": 7.0,
            },
            (SYSTEM, USER, says("assistant", "Do."), says("user", "x")),
        ),
        # A prompt of messages beside whole conversations.
        (
            {
                "prompt": [SYSTEM, USER],
                "chosen": [SYSTEM, USER, says("assistant", "good")],
                "rejected": [SYSTEM, USER, says("assistant", "bad")],
            },
            (SYSTEM, USER),
        ),
        # Another column in a message (Skywork) is no part of it.
        (
            {
                "chosen": [USER | {"source": "x"}, says("assistant", "good")],
                "rejected": [USER | {"source": "y"}, says("assistant", "bad")],
                "source": "z",
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


@pytest.mark.parametrize("names", [("chosen_list", "rejected_list"), ("chosen", "rejected")])
def test_best_of_n_gives_every_pair_of_chosen_and_rejected(names):
    """As RMB and, under the shorter names, RewardBench 2 have it."""
    row = {"id": "q", "prompt": "p", "subset": "Ties", names[0]: ["c0", "c1"], names[1]: ["r0", "r1", "r2"]}
    expected = [(f"q#{i}-{j}", f"c{i}", f"r{j}", "a", "Ties") for i in range(2) for j in range(3)]
    found = load_pairs([row])
    assert [(p.id, p.response_a, p.response_b, p.preferred, p.subset) for p in found] == expected
    assert all(pair.prompt == (says("user", "p"),) for pair in found)


def test_best_of_n_takes_responses_as_messages():
    row = {"prompt": [SYSTEM, USER], "chosen_list": [[says("assistant", "c")]], "rejected_list": ["r"]}
    (pair,) = load_pairs([row])
    assert (pair.prompt, pair.response_a, pair.response_b) == ((SYSTEM, USER), "c", "r")


def test_ids_that_are_numbers_are_texts():
    """RewardBench's are."""
    rows = [{"prompt": "p", "chosen": "c", "rejected": "r", "subset": "donotanswer", "id": n} for n in (7, 8)]
    assert [pair.id for pair in load_pairs(rows)] == ["7", "8"]


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
        (
            {"prompt": "p", "response_0": "a", "response_1": "b", "safer_response_id": 0},
            "has prompt, response_0, response_1, safer_response_id",
        ),
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
        (
            {"prompt": [USER], "chosen": [SYSTEM, USER, says("assistant", "a")], "rejected": [SYSTEM, USER, USER]},
            "prompt is not what chosen and rejected begin with",
        ),
        ({"prompt": "p", "chosen_list": [], "rejected_list": ["b"]}, "must be lists of responses, none of them empty"),
        ({"prompt": "p", "chosen": ["a"], "rejected": []}, "chosen and rejected must be lists of responses"),
        ({"prompt": "p", "chosen": ["a"], "rejected": [says("assistant", "b")]}, "rejected is empty or no text"),
        ({"chosen": ["a"], "rejected": ["b"]}, "prompt is missing or empty"),
        ({"prompt": "p", "chosen_list": [[says("user", "a")]], "rejected_list": ["b"]}, "one message of the assistant"),
        ({"prompt": "p", "chosen_list": None, "rejected_list": ["b"]}, "chosen_list and rejected_list must be lists"),
        ({"prompt": "p", "chosen_list": ["a", ""], "rejected_list": ["b"]}, "chosen_list is empty"),
    ],
)
def test_wrong_rows_of_other_forms_name_the_row(row, message):
    found = refused([GOOD, row])
    assert found.startswith("pairs: row 1: ") and message in found


def test_a_pair_that_the_template_refuses_is_named(tmp_path):
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}x"
    tiny_tokenizer(tmp_path, template=template)
    chat = ChatTokenizer.from_folder(tmp_path)
    assert len(pair_tree(chat, PAIRS[0], None)) > 0
    for reads in (lambda: pair_tree(chat, PAIRS[1], None), lambda: pair_length(chat, PAIRS[1])):
        with pytest.raises(InputError) as wrong:
            reads()
        assert str(wrong.value) == (
            f"pair 'p1': {tmp_path}: the chat template refuses a conversation: no system role; mend the pair or drop it"
        )


# Whatever a text may hold: other scripts, both directions, emoji, combining marks, NUL and other controls.
ODD = st.text() | st.text("\0\x07\x1b\x7f\x85\u2028\u202e\u200f\ufeff\r\n\t א🏳️‍🌈e\u0301", min_size=1)
SAID = ODD.filter(str.strip)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(ODD, ODD, SAID, SAID, SAID), min_size=2, max_size=2), st.sampled_from(["jsonl", "parquet"]))
def test_every_text_survives_from_pairs_to_labels_and_back(tmp_path, texts, ending):
    pairs = [
        Pair(f"{i}{name}", (says("system", system), says("user", asked)), a, b)
        for i, (system, name, asked, a, b) in enumerate(texts)
    ]
    rows = [vars(pair) | {"prompt": list(pair.prompt)} for pair in pairs]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")
    assert load_pairs(tmp_path / "pairs.jsonl") == pairs
    scores = tmp_path / "scores"
    one = np.ones((2, 1), np.float32)
    source = str(tmp_path / "pairs.jsonl")
    (scores / "manifest.json").unlink(missing_ok=True)
    for part in scores.glob("part-*"):
        part.unlink()
    write_manifest(scores, {"rules": ["r"], "pairs": source, "pairs_sha256": sha256(source), "parts": 1})
    write_part(scores, 0, Scores([pair.id for pair in pairs], ["r"], one, -one, one, one, one, one, one))
    out = tmp_path / f"labels.{ending}"
    label(LabelJob(str(scores), str(out), k=1))
    assert load_pairs(out) == [replace(pair, preferred="a") for pair in pairs]


@pytest.mark.slow
def test_every_file_of_the_open_data_gives_all_its_pairs(data):
    manifest = json.loads((data / "MANIFEST.json").read_text())["files"]
    files = [f for f in manifest if f["kind"] in ("pairs", "best-of-n", "native")]
    assert len(files) == 11
    for entry in files:
        file = data / entry["file"].removeprefix("open/")
        expected = entry["rows"]
        if entry["kind"] == "best-of-n":
            with gzip.open(file, "rt") as lines:
                expected = sum(len(r["chosen_list"]) * len(r["rejected_list"]) for r in map(json.loads, lines))
            assert expected > entry["rows"]
        pairs = load_pairs(file)
        assert len(pairs) == expected, file
        assert all(pair.preferred == "a" for pair in pairs)
