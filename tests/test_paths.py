"""Paths of every kind, on a disk, in memory and on an S3 server: files, models, and what is said when it fails."""

import gzip
import hashlib
import json
import resource
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import jax.numpy as jnp
import moto.settings
import numpy as np
import pytest
from commands import in_process, pair_rows, write_rows
from stores import BUCKET, forget_settings, new_folder, upload
from tiny import random_state, tiny_causal_lm, tiny_config, tiny_pairs, tiny_pool

from adaptrm import paths
from adaptrm.config import CheckpointOptions, parse_options
from adaptrm.data.chat import ChatTokenizer
from adaptrm.errors import InputError
from adaptrm.hf import resolve_model
from adaptrm.hf.cache import local_copy
from adaptrm.models import CausalLM
from adaptrm.train.checkpoint import Checkpoints
from adaptrm.train.metrics import MetricsLog
from adaptrm.train.save import save_model
from adaptrm.train.start import start_of
from adaptrm.train.state import TrainState


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A tiny model, a pool, and pairs."""
    out = tmp_path_factory.mktemp("made")
    tiny_causal_lm(out / "lm")
    (out / "pool.yaml").write_text(tiny_pool(4).to_yaml())
    write_rows(out / "pairs.jsonl", pair_rows(tiny_pairs(2)))
    return out


def refused(monkeypatch, capsys, *arguments: str) -> str:
    """The one line that a command in this process ends with, and exit code 2."""
    code, _, err = in_process(monkeypatch, capsys, *arguments)
    line = err.splitlines()[-1]
    assert code == 2, line
    return line


def test_bytes_come_back_under_their_names(store):
    file = paths.join(store, "a.txt")
    assert not paths.exists(file) and not paths.is_dir(store) and paths.names(store) == []
    paths.write_bytes(file, b"one\n")
    paths.write_bytes(file, b"one\ntwo\n")
    paths.write_bytes(paths.join(store, "deep", "b.txt.gz"), gzip.compress(b"packed"))
    assert paths.read_bytes(file) == b"one\ntwo\n"
    assert paths.read_bytes(paths.join(store, "deep", "b.txt.gz")) == b"packed"
    assert paths.names(store) == ["a.txt", "deep"] and paths.is_dir(paths.join(store, "deep"))
    assert paths.sha256(file) == hashlib.sha256(b"one\ntwo\n").hexdigest()
    # Two readers of one file, each at its own place.
    with paths.reading(file) as first, paths.reading(file) as second:
        assert (first.readline(), second.read(), first.read()) == (b"one\n", b"one\ntwo\n", b"two\n")


@pytest.mark.parametrize("kind", ["local", "memory", "s3"])
def test_a_file_appears_whole_or_not_at_all(request, tmp_path, kind):
    if kind == "s3":
        request.getfixturevalue("s3")
    folder = str(tmp_path) if kind == "local" else new_folder(kind)
    new, old = paths.join(folder, "new"), paths.join(folder, "old")
    paths.write_bytes(old, b"old")
    for file in (new, old):
        with pytest.raises(RuntimeError, match="stop"), paths.writing(file) as stream:
            stream.write(bytes(12 << 20))  # more than a store takes in one part
            raise RuntimeError("stop")
        with pytest.raises(KeyboardInterrupt), paths.writing(file) as stream:
            stream.write(b"x")
            raise KeyboardInterrupt
    assert paths.names(folder) == ["old"]
    assert paths.read_bytes(old) == b"old"
    big = np.random.default_rng(0).bytes(12 << 20)
    paths.write_bytes(new, big)
    assert paths.read_bytes(new) == big


@contextmanager
def full_disk():
    """No file here may have more than 1,000 bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_a_full_disk_is_one_line(made, tmp_path, kind):
    folder = str(tmp_path) if kind == "local" else new_folder(kind)
    where = {"local": "free space or change --out", "memory": r"free space in /\S+, or set TMPDIR"}[kind]
    _, params = random_state(CausalLM, tiny_config())
    chat = ChatTokenizer.from_folder(made / "lm")
    with full_disk():
        with pytest.raises(InputError, match=rf"^{folder}/x: cannot be written: File too large; free space"):
            paths.write_bytes(f"{folder}/x", bytes(5000))
        weights = "/model.safetensors: cannot be written: File too large; free space"
        begins = "" if kind == "local" else r": /\S+"
        with pytest.raises(InputError, match=rf"^{folder}/export{begins}{weights}"):
            save_model(f"{folder}/export", params, tiny_config().to_hf(), chat, (None, None))
        message = rf"^{folder}/checkpoints: a checkpoint cannot be written: File too large; {where}$"
        options = CheckpointOptions()
        with pytest.raises(InputError, match=message), Checkpoints(f"{folder}/checkpoints", options) as checkpoints:
            checkpoints.save(1, TrainState(jnp.int32(1), params, (jnp.zeros(1),), jnp.int32(0)), {})
        if kind == "local":
            message = rf"^{folder}/metrics.jsonl: cannot be written: File too large"
            with pytest.raises(InputError, match=message), MetricsLog(f"{folder}/metrics.jsonl", 0) as log:
                log.write({"step": 1, "loss": "0" * 2000})
                log.write({"step": 2})
    assert not paths.exists(f"{folder}/x") and not paths.exists(f"{folder}/export/config.json")


def test_a_model_is_copied_once_and_again_when_it_changes(made, store, cache):
    upload(made / "lm", store)
    paths.write_bytes(paths.join(store, "notes.txt"), b"not read")
    paths.write_bytes(paths.join(store, "..", "up.json"), b"{}")  # a name that leads out of the cache
    paths.write_bytes(paths.join(store, ".hidden.json"), b"{}")
    copy = resolve_model(store)
    assert {file.name: file.read_bytes() for file in copy.iterdir()} == {
        file.name: file.read_bytes() for file in (made / "lm").iterdir()
    }
    assert resolve_model(store) == copy
    copies = f"*{store.rsplit('/', 1)[1]}*"
    assert list(cache.glob(copies)) == [copy]
    config = json.loads(paths.read_bytes(paths.join(store, "config.json"))) | {"changed": True}
    time.sleep(1)  # stores count in seconds
    paths.write_bytes(paths.join(store, "config.json"), json.dumps(config).encode())
    changed = resolve_model(store)
    assert changed != copy and json.loads((changed / "config.json").read_bytes())["changed"]
    assert sorted(cache.glob(copies)) == sorted([copy, changed])
    assert list(cache.glob("partial-*")) == []
    with pytest.raises(InputError, match=r"none: no config.json here or in export/"):
        resolve_model(paths.join(store, "none"))
    with pytest.raises(InputError, match="none: holds no files of a model or tokenizer"):
        local_copy(paths.join(store, "none"))


def test_a_tokenizer_may_lie_in_a_store(made, store, cache):
    upload(made / "lm", store)
    section = {"model": {"scratch": {"tokenizer": store, "num_hidden_layers": 1}}}
    chat = start_of("reward", parse_options(section, "test")).chat
    assert len(chat.encode_chat([{"role": "user", "content": "Hi"}])) > 0


SCORE = ("score", "--judge", "{made}/lm", "--rules", "{made}/pool.yaml")
EVALUATE = ("evaluate", "{made}/lm", "--data")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (*SCORE, "--pairs", "s3://absent-bucket/p.jsonl", "--out", "{store}/o"),
            "s3://absent-bucket/p.jsonl: does not",
        ),
        ((*SCORE, "--pairs", "{store}/none.jsonl", "--out", "{store}/o"), "{store}/none.jsonl: does not exist; check"),
        (
            (*SCORE, "--pairs", "{made}/pairs.jsonl", "--out", "s3://absent-bucket/o"),
            "s3://absent-bucket/o/.lock: cannot be written: The specified bucket does not exist; ",
        ),
        (("label", "--scores", "s3://absent-bucket/s", "--out", "x.jsonl"), "s3://absent-bucket/s: no manifest.json"),
        (("export", "s3://absent-bucket/r", "x"), "s3://absent-bucket/r: no config.yaml; this is not a run folder"),
        (
            ("evaluate", "s3://absent-bucket/m", "--data", "x", "--out", "y.json"),
            "s3://absent-bucket/m: no config.json",
        ),
        (("export", "gopher://x/r", "x"), "gopher://x/r/config.yaml: cannot be reached: Protocol not known: gopher; "),
        (
            ("export", "gs://x/r", "x"),
            "gs://x/r/config.yaml: cannot be reached: Please install gcsfs to access Google Storage; "
            "pip install 'adaptrm[gcs]'",
        ),
        ((*SCORE, "--pairs", "{made}", "--out", "{store}/o"), "{made}: is a folder, not a file"),
        (
            (*SCORE, "--pairs", "{made}/pairs.jsonl", "--out", "{made}/pool.yaml/o"),
            "{made}/pool.yaml/o: cannot make this folder: Not a directory; give another --out",
        ),
        (
            (*SCORE, "--pairs", "{made}/pairs.jsonl", "--out", "/proc/adaptrm"),
            "/proc/adaptrm: cannot make this folder: No such file or directory; give another --out",
        ),
    ],
)
def test_paths_that_cannot_be_used_are_one_line(monkeypatch, capsys, made, s3, arguments, message):
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as where it is not installed
    store = new_folder("s3")
    line = refused(monkeypatch, capsys, *(a.format(made=made, store=store) for a in arguments))
    assert line.startswith(f"adaptrm: {message.format(made=made, store=store)}")


def fails(made: Path, monkeypatch, capsys) -> list[str]:
    """The lines for reading and for writing."""
    address = f"s3://{BUCKET}/x.jsonl"
    reads = refused(monkeypatch, capsys, *(a.format(made=made) for a in SCORE), "--pairs", address, "--out", "x")
    with pytest.raises(InputError) as wrong:
        paths.write_bytes(address, b"x")
    return [reads, f"adaptrm: {wrong.value}"]


def test_stores_that_refuse_are_one_line(made, s3, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    reading, writing = (f"adaptrm: s3://{BUCKET}/x.jsonl: cannot be {what}: " for what in ("read", "written"))

    # Credentials that the store does not know.
    with monkeypatch.context() as patch:
        patch.setattr(moto.settings, "INITIAL_NO_AUTH_ACTION_COUNT", 0)
        read, written = fails(made, monkeypatch, capsys)
    assert read == f"{reading}Forbidden; check the address, permissions and network"
    assert written.startswith(f"{writing}The AWS Access Key Id you provided does not exist in our records; ")

    # A server that does not answer.
    forget_settings()
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        for line, start in zip(fails(made, monkeypatch, capsys), (reading, writing), strict=True):
            assert line.startswith(f'{start}Could not connect to the endpoint URL: "http://127.0.0.1:9/')

    # No credentials.
    forget_settings()
    with monkeypatch.context() as patch:
        patch.delenv("AWS_ACCESS_KEY_ID")
        patch.delenv("AWS_SECRET_ACCESS_KEY")
        for line, start in zip(fails(made, monkeypatch, capsys), (reading, writing), strict=True):
            assert line.startswith(f"{start}Unable to locate credentials; ")
    forget_settings()


def test_a_network_that_breaks_while_reading_is_one_line(s3):
    file = new_folder("s3")
    paths.write_bytes(file, bytes(1000))
    message = rf"{file}: cannot be read: .*; check the address, permissions and network"
    with pytest.raises(InputError, match=message), paths.reading(file) as stream:
        paths.remove(f"s3://{BUCKET}", [file.rsplit("/", 1)[1]])
        stream.read()
