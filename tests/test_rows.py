"""Where rows come from: files, ``datasets`` sets and the hub, and what becomes of the bad ones in every verb."""

import gzip
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import refusals
from commands import in_process, pair_rows, write_rows
from tiny import tiny_causal_lm, tiny_pairs, tiny_pool

from adaptrm.config import DataOptions, LossOptions
from adaptrm.data.chat import ChatTokenizer
from adaptrm.data.labels import read_labels
from adaptrm.data.preferences import load_pairs, read_pairs
from adaptrm.data.rows import BadRows, rows_of, source_hash
from adaptrm.data.scores import read_manifest, read_parts
from adaptrm.errors import InputError
from adaptrm.hf import load_weights, open_folder
from adaptrm.judge.prompts import JudgePrompt
from adaptrm.models import SequenceClassifier
from adaptrm.paths import sha256
from adaptrm.reward_model import RewardModel
from adaptrm.train.examples import judge_examples, reward_examples

ROWS = [{"prompt": f"p{i}", "chosen": f"good {i}", "rejected": "bad"} for i in range(3)]


def lines(rows) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def refused(source, **options) -> str:
    return refusals.refused(load_pairs, source, **options)


@pytest.fixture
def datasets():
    return pytest.importorskip("datasets")


def test_sets_of_datasets_are_read_as_they_are(datasets, tmp_path):
    made = datasets.Dataset.from_list(ROWS)
    expected = load_pairs(ROWS)
    assert (
        load_pairs(made) == load_pairs(made.with_format("numpy")) == load_pairs(made.to_iterable_dataset()) == expected
    )
    made.save_to_disk(tmp_path / "saved")
    assert load_pairs(tmp_path / "saved") == load_pairs(str(tmp_path / "saved")) == expected
    assert source_hash(made) == source_hash(str(tmp_path / "saved")) == source_hash(ROWS)
    assert len({source_hash(ROWS), source_hash(ROWS[::-1]), source_hash(ROWS[:2])}) == 3
    (tmp_path / "saved" / "state.json").write_text("{}")
    assert refused(tmp_path / "saved").startswith(f"{tmp_path}/saved: not a whole folder of save_to_disk: ")


def test_several_sets_in_one_are_named(datasets, tmp_path):
    made = datasets.DatasetDict({"test": datasets.Dataset.from_list(ROWS), "train": datasets.Dataset.from_list(ROWS)})
    message = "is a set of splits (test, train); give one of them, such as"
    assert refused(made) == f"pairs: {message} pairs['test']"
    made.save_to_disk(tmp_path / "saved")
    assert refused(tmp_path / "saved") == f"{tmp_path}/saved: {message} {tmp_path}/saved/test"
    assert load_pairs(tmp_path / "saved" / "test") == load_pairs(ROWS)


def test_a_file_is_hashed_by_its_bytes(tmp_path):
    file = write_rows(tmp_path / "pairs.jsonl", ROWS)
    assert source_hash(str(file)) == source_hash(file) == sha256(file) != source_hash(ROWS)


@pytest.fixture
def hub(datasets, monkeypatch, tmp_path):
    """A hub of two data sets, behind the call that asks the real one; remembers what it was asked."""
    asked = []
    load = datasets.load_dataset
    write_rows(tmp_path / "hub.jsonl", ROWS)

    def load_dataset(name, config, **options):
        asked.append((name, config, options))
        splits = {"owner/one": ["train"], "owner/two": ["train", "test"]}[name]
        assert options.pop("trust_remote_code") is False  # a data set runs no code here
        return load("json", data_files=dict.fromkeys(splits, str(tmp_path / "hub.jsonl")), **options)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    return asked


def test_hub_names(hub):
    for source in ("owner/one", "owner/one:train", "owner/two:train", "owner/two:big:test"):
        assert load_pairs(source) == load_pairs(ROWS)
    assert [(name, config) for name, config, _ in hub] == [
        ("owner/one", None),
        ("owner/one", None),
        ("owner/two", None),
        ("owner/two", "big"),
    ]
    assert all(options["streaming"] for _, _, options in hub)
    assert source_hash("owner/one") == source_hash(ROWS)
    assert refused("owner/two") == (
        "owner/two: has several splits; it has train, test: give one of them, such as owner/two:train"
    )
    assert refused("owner/two:big:dev") == (
        "owner/two:big:dev: has no split 'dev'; it has train, test: give one of them, such as owner/two:big:train"
    )


def test_what_is_no_hub_name_is_a_path(hub, tmp_path):
    for source in ("none.jsonl", "data/none.jsonl", "data/none.parquet", "data/none.jsonl.gz", "./owner/one", "one"):
        assert refused(source) == f"{source}: does not exist; check the path"
    assert refused(Path("owner/one")) == "owner/one: does not exist; check the path"
    (tmp_path / "owner").mkdir()
    write_rows(tmp_path / "owner" / "one", ROWS[:1])
    assert load_pairs("owner/one") == load_pairs(ROWS[:1])  # a path wins
    assert not hub


def test_no_network_is_one_line(monkeypatch, tmp_path):
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    found = refused("owner/name:train")
    assert found.startswith("owner/name:train: no such file, and the hub does not give it (")
    assert found.endswith("; check the name, or the network")


def test_without_the_package_files_are_read_and_names_are_refused(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "pairs.jsonl", ROWS)
    assert len(load_pairs("pairs.jsonl")) == 3
    assert "reading it needs the package datasets" in refused("owner/name")


GOOD = {"id": "g", "prompt": "p", "response_a": "a", "response_b": "b"}
CANONICAL = [GOOD | {"id": f"c{i}"} for i in range(3)]
BAD_LINES = [
    b'{"id": \n',
    b"[1]\n",
    b'{"id": "\xff"}\n',
    lines([GOOD]),  # repeats the id
    lines([GOOD | {"id": "x", "response_a": " "}]),
    lines([{"id": "y", "prompt": "p", "chosen": "a", "rejected": "b"}]),  # another form
    lines([{"id": "z"}]),
]


def test_bad_rows_are_skipped_listed_and_counted(tmp_path, capsys):
    file = tmp_path / "pairs.jsonl.gz"
    file.write_bytes(gzip.compress(b"".join([BAD_LINES[0], lines([GOOD]), *BAD_LINES, lines([GOOD | {"id": "last"}])])))
    bad = BadRows("skip")
    assert [pair.id for pair in read_pairs(file, bad)] == ["g", "last"]
    listed = capsys.readouterr().err.splitlines()
    assert bad.count == len(listed) == 8
    places = [1, *range(3, 10)]
    assert all(line.startswith(f"skipped {file}: line {n}: ") for line, n in zip(listed, places, strict=True))
    silent = BadRows("skip", listed=False)
    assert len(list(read_pairs(file, silent))) == 2 and silent.count == 8
    assert not capsys.readouterr().err
    assert refused(file).startswith(f"{file}: line 1: not valid JSON")
    with pytest.raises(InputError, match="on_bad_row is 'skp'; it must be fail or skip"):
        load_pairs(file, "skp")


def test_a_row_of_best_of_n_is_skipped_whole():
    rows = [
        {"id": "q", "prompt": "p", "chosen_list": ["c"], "rejected_list": ["r0", ""]},
        {"id": "q", "prompt": "p", "chosen_list": ["c"], "rejected_list": ["r0", "r1"]},
    ]
    assert [pair.id for pair in load_pairs(rows, "skip")] == ["q#0-0", "q#0-1"]


def test_rows_of_two_forms_name_both():
    message = refused([GOOD, {"prompt": "p", "chosen": "a", "rejected": "b"}])
    assert message.startswith(
        "pairs: row 1: gives chosen and rejected as texts; the rows before give response_a and response_b"
    )


def test_a_file_that_is_not_whole_is_no_bad_row(tmp_path):
    file = tmp_path / "pairs.jsonl.gz"
    whole = gzip.compress(lines(GOOD | {"id": str(i)} for i in range(999)))
    file.write_bytes(whole[:-30])
    assert refused(file, on_bad_row="skip").startswith(f"{file}: not a whole gzip file")
    assert "does not exist" in refused(tmp_path / "none.jsonl", on_bad_row="skip")


def test_a_json_file_may_be_one_list(tmp_path):
    for text in (json.dumps(ROWS), json.dumps(ROWS, indent=1)):
        (tmp_path / "pairs.json").write_text(text)
        assert load_pairs(tmp_path / "pairs.json") == load_pairs(ROWS)
        (tmp_path / "pairs.jsonl").write_text(text)  # which is to hold a row a line
        assert "jq -c '.[]' makes lines of a list" in refused(tmp_path / "pairs.jsonl")
    (tmp_path / "pairs.json").write_text(json.dumps([*ROWS, 7]))
    assert refused(tmp_path / "pairs.json").endswith(f"item {len(ROWS) + 1}: must be a JSON object, is int")
    (tmp_path / "pairs.json").write_text(json.dumps(ROWS)[:-5])
    assert "pairs.json: begins as a list, but is not valid JSON" in refused(tmp_path / "pairs.json")


def test_a_stream_is_read_row_by_row():
    def rows():
        yield from ROWS
        raise AssertionError("read ahead")

    stream = rows_of(rows(), BadRows())
    assert [where for where, _ in (next(stream) for _ in ROWS)] == ["row 0", "row 1", "row 2"]


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
    file.write_bytes(lines(CANONICAL) + b"\n" + text)
    found = refused(file)
    assert found.startswith(f"{file}: line 5: ") and message in found


@pytest.mark.parametrize("kind", ["cut short", "broken", "wrong checksum", "not packed"])
def test_a_gzip_file_that_is_not_whole(tmp_path, kind):
    whole = gzip.compress(lines(CANONICAL))
    data = {
        "cut short": whole[: len(whole) // 2],
        "broken": whole[:10] + b"\x07" + whole[11:],  # a block of a type that there is not
        "wrong checksum": whole[:-8] + b"\0\0\0\0" + whole[-4:],
        "not packed": lines(CANONICAL),
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory, one_device) -> Path:
    """A judge, a reward model, a pool, and six pairs of which two are bad and one is long; a broken line more."""
    out = tmp_path_factory.mktemp("rows")
    lm = tiny_causal_lm(out / "lm")
    source = open_folder(lm)
    definition, params, _ = load_weights(source, SequenceClassifier, one_device, dtype="float32", new_head_seed=0)
    chat = ChatTokenizer.from_folder(lm)
    pad = ("<|endoftext|>", 0)
    RewardModel(definition, params, source.raw, chat, pad, "float32", one_device).save_pretrained(out / "rm")
    (out / "pool.yaml").write_text(tiny_pool(2).to_yaml())
    rows = [row | {"preferred": "a"} for row in pair_rows(tiny_pairs(6))]
    rows[1]["response_b"] = ""
    rows[3] = rows[0]
    rows[4]["response_a"] = "It rests. " * 200
    file = write_rows(out / "pairs.jsonl", rows)
    file.write_text(file.read_text() + '{"id": \n')
    return out


def run(monkeypatch, capsys, *arguments) -> tuple[dict, str]:
    """The result of ``adaptrm ARGUMENTS --json``, in this process, and what it said on stderr."""
    code, out, err = in_process(monkeypatch, capsys, *arguments, "--json")
    assert code == 0, err
    return json.loads(out), err


def test_score_and_label_skip_and_truncate(folder, monkeypatch, capsys, tmp_path):
    given = ("--pairs", folder / "pairs.jsonl", "--judge", folder / "lm", "--rules", folder / "pool.yaml")
    asked = ("score", *given, "--on-bad-row", "skip", "--truncate-to", "400", "--part-size", "2")
    expected = {"pairs": 4, "skipped_rows": 3, "truncated": 1}
    found, said = run(monkeypatch, capsys, *asked, "--out", tmp_path / "scores")
    assert expected.items() <= found.items()
    assert [line.split(": ")[1] for line in said.splitlines() if line.startswith("skipped")] == [
        "line 2",
        "line 4",
        "line 7",
    ]
    predicted, _ = run(monkeypatch, capsys, *asked, "--out", tmp_path / "none", "--dry-run")
    assert expected.items() <= predicted.items()
    assert [part.ids for part in read_parts(tmp_path / "scores")] == [["p0", "p2"], ["p4", "p5"]]
    manifest = read_manifest(tmp_path / "scores")
    assert (manifest["on_bad_row"], manifest["truncate_to"], manifest["count"]) == ("skip", 400, 4)
    labelled, said = run(
        monkeypatch, capsys, "label", "--scores", tmp_path / "scores", "--k", "1", "--out", tmp_path / "labels.jsonl"
    )
    assert labelled["pairs"] == 4 and "skipped" not in said
    texts = {pair.id: {pair.response_a, pair.response_b} for pair in load_pairs(folder / "pairs.jsonl", "skip")}
    # What people get is the pairs as they were: truncation is for the judge alone.
    assert all({label.chosen, label.rejected} == texts[label.id] for label in read_labels(tmp_path / "labels.jsonl"))


def test_evaluate_skips_and_truncates(folder, monkeypatch, capsys, tmp_path):
    found, said = run(
        *(monkeypatch, capsys, "evaluate", folder / "rm", "--data", folder / "pairs.jsonl"),
        *("--out", tmp_path / "out.json", "--on-bad-row", "skip", "--truncate-to", "200"),
    )
    assert {"n": 4, "skipped": 0, "skipped_rows": 3, "truncated": 1}.items() <= found.items()
    assert json.loads((tmp_path / "out.json").read_text()) == found
    assert sum(line.startswith("skipped") for line in said.splitlines()) == 3


def test_training_skips_and_truncates(folder, capsys):
    chat = ChatTokenizer.from_folder(folder / "lm")
    data = {"pairs": str(folder / "pairs.jsonl"), "labels": "human", "row_length": 300}
    for overlong, count in (("drop", 3), ("truncate", 4)):
        store, left = reward_examples(DataOptions(**data, on_bad_row="skip", overlong=overlong), chat, 0, LossOptions())
        done = {"drop": "dropped", "truncate": "truncated"}
        assert len(store) == count and left == {"skipped_rows": 3, "dropped": 0, "truncated": 0} | {done[overlong]: 1}
        assert f"{done[overlong]} 1 of 4 examples: longer than a row of 300 tokens" in capsys.readouterr().err
        assert max(store.lengths) <= 300
    with pytest.raises(InputError, match=r"'p4' has \d+ tokens, a row 300; .* or set data.overlong: drop or truncate"):
        reward_examples(DataOptions(**data, on_bad_row="skip"), chat, 0, LossOptions())
    with pytest.raises(InputError, match="line 2: response_b is empty"):
        reward_examples(DataOptions(**data), chat, 0, LossOptions())


def test_training_a_judge_skips_and_truncates(folder, tmp_path):
    good = {"prompt": "p", "response": "r", "labels": {"r0": True}}
    rows = [good, good | {"response": ""}, good | {"response": "It rests. " * 200}, good | {"labels": {"r0": 2}}]
    data = {"labels": str(write_rows(tmp_path / "labels.jsonl", rows)), "row_length": 300}
    prompt = JudgePrompt(ChatTokenizer.from_folder(folder / "lm"), tiny_pool(2))
    store, left = judge_examples(DataOptions(**data, on_bad_row="skip", overlong="truncate"), prompt)
    assert left == {"skipped_rows": 2, "dropped": 0, "truncated": 1}
    assert len(store) == 2 and 290 < max(store.lengths) <= 300
    with pytest.raises(InputError, match="line 2: response is empty"):
        judge_examples(DataOptions(**data), prompt)
