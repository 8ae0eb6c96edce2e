"""Score folders, the label verb on a case worked by hand, and label files read back."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from refusals import refused

from adaptrm import paths
from adaptrm.data.labels import LabelIndex, read_labels, read_rule_labels
from adaptrm.data.preferences import Pair, read_pairs
from adaptrm.data.scores import COLUMNS, Scores, part_name, read_batches, read_parts, write_manifest, write_part
from adaptrm.data.seen import Seen
from adaptrm.label import LabelJob, label

RULES = ["kind", "safe", "calm"]
PREFERRED = ["a", "a", "b", None]
# Selection scores (weight 1/2, two rules): 1.5 .5 .45, .35 1 1.4, .75 .75 0, .375 1.375 1.125.
A = [[1, 0, 0.5], [0, 0.2, 0], [0.5, 0, 0], [-0.5, -0.5, 0]]
B = [[0, 0, 0], [0.5, 0.2, 1], [0, 0.5, 0], [0.25, 0.25, 0.25]]
RELEVANCE = [[1, 0.5, 0.2], [0.1, 1, 0.9], [0.5, 0.5, 0], [0, 1, 1]]
# id, chosen, rejected, rules, margin; p2 is a tie.
LABELLED = [
    ("p0", "A0", "B0", ["kind", "safe"], 1.0),
    ("p1", "B1", "A1", ["calm", "safe"], 1.0),
    ("p3", "B3", "A3", ["safe", "calm"], 1.0),
]


def write_lines(file, rows) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_where_ids_were_checked_none_stays_in_memory(tmp_path):
    row = {"prompt": "Hi", "response_a": "A", "response_b": "B", "id": "p"}
    file = write_lines(tmp_path / "pairs.jsonl", [row, row])
    assert "repeated" in refused(lambda: list(read_pairs(file)))
    assert [pair.id for pair in read_pairs(file, ids_checked=True)] == ["p", "p"]


def made_scores(ids=("p0", "p1", "p2", "p3")) -> Scores:
    a, b, relevance = (np.asarray(x, np.float32) for x in (A, B, RELEVANCE))
    return Scores(list(ids), RULES, a, b, relevance, 3 * a, 3 * b, np.full_like(a, 0.9), np.full_like(a, 0.8))


def some(scores: Scores, rows: slice) -> Scores:
    return Scores(scores.ids[rows], RULES, **{name: getattr(scores, name)[rows] for name in COLUMNS.values()})


@pytest.fixture
def folder(tmp_path):
    """Write pairs and a score folder of two parts; give the job that labels it."""

    def write(scores: Scores | None = None, swap: bool = False, **options) -> LabelJob:
        scores = scores or made_scores()
        rows = []
        for i, preferred in enumerate(PREFERRED):
            responses = {"response_a": f"A{i}", "response_b": f"B{i}"}
            if swap:
                responses = dict(zip(responses, reversed(responses.values()), strict=True))
                preferred = {"a": "b", "b": "a", None: None}[preferred]
            rows.append({"id": f"p{i}", "prompt": f"Question {i}", "preferred": preferred, **responses})
        pairs = write_lines(tmp_path / "pairs.jsonl", rows)
        digest = hashlib.sha256((tmp_path / "pairs.jsonl").read_bytes()).hexdigest()
        where = tmp_path / f"scores{len(list(tmp_path.iterdir()))}"
        write_manifest(where, {"rules": RULES, "pairs": pairs, "pairs_sha256": digest, "count": 4, "parts": 2})
        for number in range(2):
            write_part(where, number, some(scores, slice(2 * number, 2 * number + 2)))
        return LabelJob(**({"scores": str(where), "out": str(tmp_path / "labels.jsonl"), "k": 2} | options))

    return write


def test_score_folders_give_back_what_was_written(folder):
    job, expected = folder(), made_scores()
    parts = list(read_parts(job.scores))
    assert [part.ids for part in parts] == [["p0", "p1"], ["p2", "p3"]]
    assert all(part.rule_ids == RULES for part in parts) and sum(map(len, parts)) == 4
    for name in COLUMNS.values():
        got = np.concatenate([getattr(part, name) for part in parts])
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, getattr(expected, name), err_msg=name)
    schema = pq.read_schema(f"{job.scores}/part-00000.parquet")
    assert schema.names == ["id", *COLUMNS]
    assert all(schema.field(name).type == pa.list_(pa.float32(), 3) for name in COLUMNS)


def test_a_manifest_of_something_else_names_the_field(folder):
    job = folder()
    manifest = json.loads(paths.read_bytes(f"{job.scores}/manifest.json"))
    write_manifest(job.scores, manifest)  # the same one goes on
    assert "holds scores with another parts;" in refused(write_manifest, job.scores, manifest | {"parts": 3})
    assert "another pool_hash;" in refused(write_manifest, job.scores, manifest | {"pool_hash": "x"})
    assert json.loads(paths.read_bytes(f"{job.scores}/manifest.json")) == manifest
    Path(job.scores, "manifest.json").unlink()
    assert "holds parts without a manifest.json" in refused(write_manifest, job.scores, manifest)


def test_folders_that_are_not_whole_say_how_to_go_on(folder, tmp_path):
    job = folder()
    Path(job.scores, part_name(1)).unlink()
    assert "has 1 of 2 parts; run the same adaptrm score again" in refused(label, job)
    paths.write_bytes(f"{job.scores}/{part_name(1)}", b"broken")
    assert f"{part_name(1)}: not a part of a score folder with 3 rules" in refused(label, job)
    data = bytearray(paths.read_bytes(f"{job.scores}/{part_name(0)}"))
    data[10:18] = b"\xff" * 8  # inside of the first page
    paths.write_bytes(f"{job.scores}/{part_name(0)}", bytes(data))
    assert f"{part_name(0)}: not a part of a score folder" in refused(label, job)
    paths.write_bytes(f"{job.scores}/manifest.json", b'{"rules": 5}')
    assert "manifest.json: not a manifest" in refused(label, job)
    assert "this is not a score folder" in refused(label, replace(job, scores=str(tmp_path)))


def test_labels_of_a_case_worked_by_hand(folder):
    result = label(folder())
    assert {name: result[name] for name in ("pairs", "labelled", "ties", "compared", "agreement")} == {
        "pairs": 4,
        "labelled": 3,
        "ties": 1,
        "compared": 2,  # p2 is a tie and p3 has no preference
        "agreement": 0.5,
    }
    assert result["deciding_rules"] == {"safe": 3, "calm": 2, "kind": 1}
    assert result["strategy"] == "max-discrepancy"
    rows = [json.loads(line) for line in Path(result["labels"]).read_text().splitlines()]
    assert [(r["id"], r["chosen"], r["rejected"], r["rules"], r["rule_margin"]) for r in rows] == [
        (i, [{"role": "assistant", "content": c}], [{"role": "assistant", "content": r}], rules, margin)
        for i, c, r, rules, margin in LABELLED
    ]
    assert rows[0]["prompt"] == [{"role": "user", "content": "Question 0"}]
    # TRL would subtract a column called margin inside of its loss.
    assert all(r.keys() == {"id", "prompt", "chosen", "rejected", "rules", "rule_margin", "probability"} for r in rows)
    assert all(r["probability"] >= 0.5 for r in rows)


def test_jsonl_and_parquet_hold_the_same_labels(folder, tmp_path):
    job = folder()
    label(job)
    table = replace(job, out=str(tmp_path / "labels.parquet"))
    assert label(table) | {"labels": job.out} == label(job)
    assert list(read_labels(table.out)) == list(read_labels(job.out))
    assert [(x.id, x.chosen, x.rejected, list(x.rules), x.rule_margin) for x in read_labels(job.out)] == LABELLED


def test_the_order_of_the_responses_changes_no_label(folder):
    scores = made_scores()
    swapped = replace(scores, a=scores.b, b=scores.a)
    job = folder()
    one = label(job) | {"labels": list(read_labels(job.out))}
    job = folder(swapped, swap=True)
    assert label(job) | {"labels": list(read_labels(job.out))} == one


def test_fixed_rules_by_their_ids(folder):
    result = label(folder(strategy="fixed", rules=("calm", "kind")))
    assert result["deciding_rules"] == {"calm": 4, "kind": 4}
    margins = [(x.id, x.chosen, x.rules, x.rule_margin) for x in read_labels(result["labels"])]
    assert margins[:2] == [("p0", "A0", ("calm", "kind"), 1.5), ("p1", "B1", ("calm", "kind"), 1.5)]
    assert "has no rule 'klam'" in refused(label, folder(strategy="fixed", rules=("klam",)))


def test_random_rules_do_not_depend_on_the_size_of_parts(folder):
    job = folder(strategy="random")
    whole = folder(strategy="random")
    manifest = json.loads(paths.read_bytes(f"{whole.scores}/manifest.json")) | {"parts": 1}
    shutil.rmtree(whole.scores)
    write_manifest(whole.scores, manifest)
    write_part(whole.scores, 0, made_scores())
    for seed in range(3):
        label(replace(job, seed=seed))
        expected = list(read_labels(job.out))
        label(replace(whole, seed=seed))
        assert list(read_labels(whole.out)) == expected


def test_wrong_arguments_and_scores_are_one_line(folder, tmp_path):
    assert "k is 4; with 3 rules" in refused(label, folder(k=4))
    scores = made_scores()
    scores.a[3, 1] = np.nan
    job = folder(scores, out=str(tmp_path / "new.jsonl"))
    assert refused(label, job) == f"{job.scores}: a of pair 'p3', rule 1, is nan; it must be in [-1, 1]"
    # Neither the file nor the begun part of it.
    assert not [file.name for file in tmp_path.iterdir() if file.name.startswith("new")]


def test_pairs_that_were_not_scored_are_refused(folder, tmp_path):
    job = folder()
    moved = tmp_path / "moved.jsonl"
    (tmp_path / "pairs.jsonl").rename(moved)
    assert "does not exist" in refused(label, job)
    assert label(replace(job, pairs=str(moved)))["labelled"] == 3
    moved.write_bytes(moved.read_bytes() + b"\n")
    assert f"{moved}: not the pairs that" in refused(label, replace(job, pairs=str(moved)))
    assert "pair 'q1' is 'p1'" in refused(label, folder(made_scores(("p0", "q1", "p2", "p3"))))


@pytest.mark.parametrize("rows", [slice(2, 3), slice(1, 4)], ids=["fewer", "more"])
def test_a_folder_with_fewer_or_more_rows_than_pairs_is_refused(folder, rows):
    job = folder()
    scores = made_scores(("p0", "p1", "p2", "p3") if rows.start == 2 else ("p0", "p2", "p3", "p4"))
    write_part(job.scores, 1, some(scores, rows))
    assert "score again" in refused(label, job)


def pair(name: str, a: str, b: str) -> Pair:
    return Pair(name, ({"role": "user", "content": "?"},), a, b)


LABEL = {"id": "x", "prompt": "?", "chosen": "good", "rejected": "bad"}


def test_label_index_joins_by_id(tmp_path):
    said = [{"role": "assistant", "content": "yes"}]
    soft = {"probability": 0.75, "margin": 2}
    rows = [LABEL, LABEL | {"id": "y", "chosen": said, **soft}, LABEL | {"id": "z", "margin": "none"}]
    index = LabelIndex(write_lines(tmp_path / "labels.jsonl", rows))
    assert index.unused == 3
    assert index.preference(pair("x", "good", "bad")) == (1, 1.0, None)
    assert index.preference(pair("y", "no", "yes")) == (-1, 0.75, 2.0)
    assert index.preference(pair("w", "good", "bad")).sign == 0
    assert index.unused == 1
    assert "the chosen response of 'z' is neither response" in refused(index.preference, pair("z", "other", "bad"))
    assert index.preference(pair("x", "bad", "good")).sign == -1


def test_a_label_index_of_repeated_ids_is_an_error(tmp_path):
    assert "line 2: the id 'x' is repeated" in refused(
        LabelIndex, write_lines(tmp_path / "labels.jsonl", [LABEL, LABEL])
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": None}, "needs id, prompt, chosen, rejected"),
        ({"chosen": None}, "chosen is empty"),
        ({"chosen": ""}, "chosen is empty"),
        ({"rejected": []}, "rejected is empty"),
        ({"rejected": [{"role": "robot", "content": "x"}]}, "rejected must hold messages"),
        ({"prompt": []}, "prompt is missing or empty"),
        ({"probability": 0.4}, "probability is 0.4; it must be .5 to 1"),
        ({"probability": "high"}, "probability is 'high'"),
        ({"probability": float("nan")}, "probability is nan"),
        ({"rule_margin": "wide"}, "rules must be a list of ids, rule_margin a number"),
        ({"rules": "kind"}, "rules must be a list of ids, rule_margin a number"),
    ],
)
def test_wrong_label_lines_are_named(tmp_path, change, message):
    file = write_lines(tmp_path / "labels.jsonl", [LABEL, LABEL | {"id": "y"} | change])
    found = refused(lambda: list(read_labels(file)))
    assert found.startswith(f"{file}: line 2: ") and message in found


VERDICT = {"id": "x", "prompt": "?", "response": "r", "labels": {"kind": True, "safe": False, "calm": None}}


def test_rule_labels_are_read_as_written(tmp_path):
    (found,) = read_rule_labels(write_lines(tmp_path / "rules.jsonl", [VERDICT]))
    assert (found.id, found.response, found.labels) == ("x", "r", VERDICT["labels"])
    assert found.prompt == ({"role": "user", "content": "?"},)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, "labels must map rule ids to true, false or null"),
        ({"labels": ["kind"]}, "labels must map"),
        ({"labels": {"kind": "yes"}}, "labels must map"),
        ({"labels": {"kind": 2}}, "labels must map"),
        ({"labels": {"kind": []}}, "labels must map"),
        ({"response": ""}, "response is empty"),
        ({"prompt": None}, "prompt is missing"),
    ],
)
def test_wrong_rule_label_lines_are_named(tmp_path, change, message):
    file = write_lines(tmp_path / "rules.jsonl", [VERDICT, VERDICT | change])
    found = refused(lambda: list(read_rule_labels(file)))
    assert found.startswith(f"{file}: line 2: ") and message in found


def test_numbers_seen_are_those_that_came_and_take_little_memory():
    rng = np.random.default_rng(0)
    numbers = [0, 1, 2**64 - 1, *(3 << 32 for _ in range(2)), *rng.integers(0, 2**63, 5000).tolist()]
    numbers += [5 + (i << 40) for i in range(300)]  # of one slot
    seen, expected = Seen(), set()
    for number in numbers:
        if number > 1:  # which are one
            assert (number in seen) == (number in expected)
        seen.add(number)
        expected.add(number)
    assert len(seen) == len(expected) - 1
    assert all(number in seen for number in expected)
    assert not any(number in seen for number in rng.integers(2**63, 2**64 - 1, 5000, np.uint64).tolist())
    assert 8 * len(seen._table) <= 24 * len(seen)


def test_large_parts_are_read_in_batches(folder, monkeypatch):
    job = folder()
    label(job)
    expected = Path(job.out).read_bytes()
    monkeypatch.setattr("adaptrm.data.scores.BATCH_ROWS", 1)
    batches = list(read_batches(job.scores))
    assert [batch.ids for batch in batches] == [["p0"], ["p1"], ["p2"], ["p3"]]
    for name in ("a", "b", "relevance"):
        got = np.concatenate([getattr(batch, name) for batch in batches])
        np.testing.assert_array_equal(got, getattr(made_scores(), name), err_msg=name)
    label(job)
    assert Path(job.out).read_bytes() == expected
