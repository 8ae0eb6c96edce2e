"""Wrong input, as people bring it: one line that says where, what and how to mend it; exit code 2; nothing lost."""

import json
import os
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from commands import adaptrm, in_process, pair_rows, write_rows
from tiny import tiny_causal_lm, tiny_pairs, tiny_pool

from adaptrm.judge.score import ScoreJob, score
from adaptrm.label import LabelJob, label
from adaptrm.lock import hold

POOL = tiny_pool(3)
PAIRS = pair_rows(tiny_pairs(4))
CONFIG = {"model": {"pretrained": "lm"}, "data": {"row_length": 512}, "max_steps": 1}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A judge, a pool, pairs, a table of scores, score and label folders, and a config, all good."""
    out = tmp_path_factory.mktemp("world")
    tiny_causal_lm(out / "lm")
    (out / "pool.yaml").write_text(POOL.to_yaml())
    (out / "config.yaml").write_text(yaml.safe_dump({"reward": CONFIG}))
    write_rows(out / "pairs.jsonl", PAIRS)
    rows = [{"id": row["id"], "side": side, "r0": 0.5, "r1": 0, "r2": -(side == "a")} for row in PAIRS for side in "ab"]
    write_rows(out / "table.jsonl", rows)
    pairs, table, pool = (str(out / name) for name in ("pairs.jsonl", "table.jsonl", "pool.yaml"))
    score(ScoreJob(pairs, f"table:{table}", pool, str(out / "scores")))
    label(LabelJob(str(out / "scores"), str(out / "labels.jsonl"), k=2))
    return out


@pytest.fixture
def here(world, tmp_path, monkeypatch) -> Path:
    """The same in a folder of its own, where the command is run."""
    shutil.copytree(world, tmp_path / "w")
    monkeypatch.chdir(tmp_path / "w")
    return tmp_path / "w"


def change(file: str, line: int, **fields):
    """Change fields of one line, counted from 1; None takes a field away."""
    rows = [json.loads(text) for text in Path(file).read_text().splitlines()]
    rows[line - 1] = {k: v for k, v in (rows[line - 1] | fields).items() if v is not None}
    write_rows(Path(file), rows)


def put(file: str, text: str):
    Path(file).write_text(text)


def replaced(file: str, old: str, new: str):
    assert old in Path(file).read_text()
    put(file, Path(file).read_text().replace(old, new))


def cut(file: str):
    os.truncate(file, Path(file).stat().st_size // 2)


SCORE = "score --pairs pairs.jsonl --judge lm --rules pool.yaml --out out"
TABLE = "score --pairs pairs.jsonl --judge table:table.jsonl --rules pool.yaml --out out"
LABEL = "label --scores scores --pairs pairs.jsonl --k 2 --out out.jsonl"
TRAIN = "train reward config.yaml --data pairs.jsonl --labels labels.jsonl --out out"
EVALUATE = "evaluate lm --data pairs.jsonl --out out.json"

# What is done to the good world, the command, and how its one line begins.
CASES = {
    "a missing column": (
        lambda: change("pairs.jsonl", 3, response_b=None),
        SCORE,
        r"pairs\.jsonl: line 3: needs response_a and response_b, or .*; has id, prompt, response_a",
    ),
    "an empty response": (
        lambda: change("pairs.jsonl", 2, response_b=" "),
        SCORE,
        r"pairs\.jsonl: line 2: response_b is empty or no text; drop the row or mend it",
    ),
    "malformed JSON": (
        lambda: put("pairs.jsonl", '{"id": "x", "prompt": "?", "response_a": "a", "response_b": "b"}\n{"id"\n'),
        SCORE,
        r"pairs\.jsonl: line 2: not valid JSON",
    ),
    "mixed schemas": (
        lambda: change("pairs.jsonl", 4, response_a=None, response_b=None, chosen="yes", rejected="no"),
        SCORE,
        r"pairs\.jsonl: line 4: ",
    ),
    "a repeated id": (
        lambda: change("pairs.jsonl", 4, id="p1"),
        SCORE,
        r"pairs\.jsonl: line 4: the id 'p1' is repeated; ids must be unique",
    ),
    "an unknown config key": (
        lambda: replaced("config.yaml", "row_length", "row_lenght"),
        TRAIN,
        r"config\.yaml: reward\.data\.row_lenght: unknown key; did you mean 'row_length'\?",
    ),
    "a wrong type in a config": (
        lambda: replaced("config.yaml", "512", "many"),
        TRAIN,
        r"config\.yaml: reward\.data\.row_length: Input should be a valid integer.*'many'",
    ),
    "a config that is no YAML": (
        lambda: put("config.yaml", "reward:\n  data: {row_length: 1\n"),
        TRAIN,
        r"config\.yaml: line 3: not valid YAML: expected ',' or '}'",
    ),
    "an absent model folder": (
        lambda: None,
        SCORE.replace("lm", "./models/lm"),
        r"\./models/lm: this folder does not exist; check the path",
    ),
    "a truncated safetensors file": (
        lambda: cut("lm/model.safetensors"),
        SCORE,
        r"lm/model\.safetensors: not a whole safetensors file",
    ),
    "a missing tokenizer": (
        lambda: Path("lm/tokenizer.json").unlink(),
        SCORE,
        r"lm: has no tokenizer\.json; copy the tokenizer's files into the folder",
    ),
    "a missing chat template": (
        lambda: Path("lm/chat_template.jinja").unlink(),
        SCORE,
        r"lm: has no chat template; add chat_template\.jinja to the folder",
    ),
    "a wrong rule id": (
        lambda: None,
        f"{LABEL} --strategy fixed --rule r0 --rule kind",
        r"scores: has no rule 'kind'; its rules are in manifest\.json",
    ),
    "a pool with duplicates": (
        lambda: replaced("pool.yaml", "id: r1", "id: r0"),
        SCORE,
        r"pool\.yaml: .*r0",
    ),
    "a pool that is not there": (
        lambda: None,
        SCORE.replace("pool.yaml", "safety-99"),
        r"safety-99: no such rule pool; give a YAML file or one of: safety-100, safety-24",
    ),
    "a score that is not a number": (
        lambda: change("table.jsonl", 3, r1=float("nan")),
        TABLE,
        r"table\.jsonl: line 3: r1 is nan; it must be a number from -1 to 1 \(--range LO,HI\)",
    ),
    "a score out of range": (
        lambda: change("table.jsonl", 3, r1=4),
        TABLE,
        r"table\.jsonl: line 3: r1 is 4; it must be a number from -1 to 1 \(--range LO,HI\)",
    ),
    "scores of another pool": (
        lambda: replaced("pool.yaml", "kind", "gentle"),
        TABLE.replace("--out out", "--out scores"),
        r"scores: holds scores with another pool_hash; give another --out or delete the folder",
    ),
    "pairs that changed since they were scored": (
        lambda: change("pairs.jsonl", 1, response_a="Other."),
        LABEL,
        r"pairs\.jsonl: not the pairs that scores was made of .*; give --pairs with the file that was scored",
    ),
    "labels whose pairs changed": (
        lambda: change("pairs.jsonl", 1, response_a="Other.", response_b="Another."),
        TRAIN,
        r".*/labels\.jsonl: the chosen response of 'p0' is neither response of the pair; label again",
    ),
    "labels whose pairs are gone": (
        lambda: change("pairs.jsonl", 1, id="p9"),
        TRAIN,
        r".*/labels\.jsonl: 1 labels have no pair in .*/pairs\.jsonl; label again",
    ),
    "an output folder that cannot be made": (
        lambda: put("out", "a file"),
        SCORE,
        r"out: cannot make this folder: File exists; give another --out",
    ),
    "an output file in a folder that cannot be made": (
        lambda: put("sub", "a file"),
        LABEL.replace("out.jsonl", "sub/out.jsonl"),
        r"sub/out\.jsonl: cannot be written: (Not a directory|File exists); free space or change --out",
    ),
    "no network for a hub name": (
        lambda: None,
        SCORE.replace("lm", "some-one/some-model"),
        r"some-one/some-model: no such folder, and the hub does not give it \(.*\); check the name, or the network",
    ),
    "no network for a set of pairs": (
        lambda: None,
        SCORE.replace("pairs.jsonl", "some-one/some-pairs"),
        r"some-one/some-pairs: .*; check the name, or the network",
    ),
    "a judge that is asked to be a reward model": (
        lambda: None,
        EVALUATE,
        r"lm: has no score\.weight; this is not a reward model, train one from it first",
    ),
}


BROKEN = r"lm: the tokenizer (fails|cannot be read): "
SPEC = {
    "that panics": {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "x"}},
    "that panics when it is read": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "without a token for what it does not know": {
        "model": {"type": "WordLevel", "vocab": {"a": 0, "<|im_start|>": 1, "<|im_end|>": 2}, "unk_token": "?"}
    },
}


def tokenizer(change: dict):
    spec = json.loads(Path("lm/tokenizer.json").read_text())
    put("lm/tokenizer.json", json.dumps(spec | change))


def odd_parquet():
    """A column of texts that holds bytes that are no UTF-8."""
    ends, data = (pa.py_buffer(content) for content in (b"\0\0\0\0\2\0\0\0\3\0\0\0", b"\xff\xfeb"))
    odd = pa.Array.from_buffers(pa.string(), 2, [None, ends, data])
    columns = {"id": ["1", "2"], "prompt": ["p", "q"], "response_a": odd, "response_b": ["x", "y"]}
    pq.write_table(pa.table(columns), "odd.parquet")


CASES |= {
    f"a tokenizer {name}": (
        lambda change=change: tokenizer(change),
        SCORE,
        r"lm: the tokenizer (fails|cannot be read): ",
    )
    for name, change in SPEC.items()
}
CASES |= {
    "a Parquet file of texts that are no UTF-8": (
        odd_parquet,
        SCORE.replace("pairs.jsonl", "odd.parquet") + " --on-bad-row skip",
        r"odd\.parquet: not a whole Parquet file: 'utf-8' codec can't decode",
    ),
    "an id of blanks": (
        lambda: change("pairs.jsonl", 2, id=" "),
        SCORE,
        r"pairs\.jsonl: line 2: id is empty or no text",
    ),
    "labels over the pairs that they are of": (
        lambda: None,
        LABEL.replace("out.jsonl", "./pairs.jsonl"),
        r"\./pairs\.jsonl: is what is read; give another --out",
    ),
    "labels over something that is no file": (
        lambda: os.mkfifo("out.jsonl"),
        LABEL,
        r"out\.jsonl: is no file; give another --out",
    ),
    "pairs that lie elsewhere now": (
        lambda: put("scores/manifest.json", json.dumps(manifest() | {"pairs": "old/pairs.jsonl"})),
        LABEL.replace("--pairs pairs.jsonl", ""),
        r"old/pairs\.jsonl: does not exist; check the path; it was scored under this name: give --pairs",
    ),
    "a manifest that cannot be": (
        lambda: put("scores/manifest.json", json.dumps(manifest() | {"rules": "abc"})),
        LABEL,
        r"scores/manifest\.json: not a manifest; make the scores again with adaptrm score",
    ),
    "a manifest of very many parts": (
        lambda: put("scores/manifest.json", json.dumps(manifest() | {"parts": 10**11})),
        LABEL,
        r"scores: has 1 of 100000000000 parts; run the same adaptrm score again, it continues",
    ),
    "a margin that no float holds": (
        lambda: change("labels.jsonl", 1, rule_margin=10**400),
        TRAIN,
        r".*/labels\.jsonl: line 1: rules must be a list of ids, rule_margin a number below 1e9",
    ),
    "a limit that nothing fits": (
        lambda: None,
        f"{SCORE} --truncate-to 20",
        r"pairs\.jsonl: pair 'p0': has \d+ tokens with all but .* cut, more than 20; raise --truncate-to",
    ),
    "pairs that nobody judged": (
        lambda: change("pairs.jsonl", 1, preferred=None),
        TRAIN.replace("labels.jsonl", "human"),
        r".*/pairs\.jsonl: nothing to train on; no example has a label",
    ),
}


def manifest() -> dict:
    return json.loads(Path("scores/manifest.json").read_text())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("case", CASES)
def test_one_line_exit_code_2_and_nothing_lost(here, monkeypatch, capsys, case):
    spoil, command, message = CASES[case]
    spoil()
    before = contents(here)
    code, out, err = in_process(monkeypatch, capsys, *command.split())
    assert (code, out) == (2, "")
    *progress, line = err.splitlines()
    assert not any("Traceback" in text for text in progress)
    assert re.match(f"adaptrm: {message}", line), line
    after = contents(here)
    assert {name: after.get(name) for name in before} == before
    # What is new is no result: a lock, or a folder to work in.
    assert {Path(name).name for name in after.keys() - before.keys()} <= {".lock"}


def test_a_second_run_in_a_held_folder(here, monkeypatch, capsys):
    for command in (SCORE, TRAIN):
        with hold("out"):
            code, _, err = in_process(monkeypatch, capsys, *command.split())
        assert code == 2
        held = "another run holds this folder; wait for it or give another --out; if none runs, delete out/.lock"
        assert err == f"adaptrm: out: {held}\n"


@pytest.mark.parametrize(
    ("command", "room"),
    [(TABLE, 1), (TABLE, 2), (LABEL, 1), *(pytest.param(TRAIN, room, marks=pytest.mark.slow) for room in (20, 135))],
)
def test_a_full_disk(here, command, room):
    """No file may grow past some KiB: what a full disk looks like to who writes."""
    before = contents(here)

    done = adaptrm(*command.split(), prefix=("bash", "-c", f'ulimit -f {room}; exec "$@"', "bash"), check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("adaptrm: out")
    after = contents(here)
    assert {name: after.get(name) for name in before} == before
    assert not [name for name in after if name.endswith(".partial")]
