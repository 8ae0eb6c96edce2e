"""Paths of every kind, on a disk, in memory and on an S3 server that runs here."""

import gzip
import hashlib
import json
import logging
import os
import resource
import sys
import threading
import time
import uuid
from dataclasses import replace
from pathlib import Path

import commands
import fsspec
import jax
import moto.settings
import numpy as np
import pytest
import yaml
from commands import kill_when, pair_rows, write_rows
from moto.server import ThreadedMotoServer
from tiny import tiny_causal_lm, tiny_pairs, tiny_pool

from adaptrm import cli, lock, paths
from adaptrm.config import load_options, parse_options
from adaptrm.errors import InputError
from adaptrm.export import export_run
from adaptrm.hf.cache import local_copy
from adaptrm.hf.load import resolve_model
from adaptrm.lock import hold
from adaptrm.reward_model import RewardModel
from adaptrm.train import remote
from adaptrm.train.run import start_of, train

BUCKET = "adaptrm-tests"
MESH = {"fsdp": 4, "tensor": 2}


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    """An S3 server for this process and for the commands it starts; gives the endpoint."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    settings = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",  # where credentials are missing, none are asked for
        "AWS_MAX_ATTEMPTS": "1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        fsspec.filesystem("s3").mkdir(BUCKET)
        yield endpoint
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    server.stop()


@pytest.fixture(params=["memory", "s3"])
def store(request) -> str:
    """The address of an empty folder in a store."""
    if request.param == "s3":
        request.getfixturevalue("s3")
    return f"{request.param}://{BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("ADAPTRM_CACHE", str(folder))
        yield folder / "models"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A tiny model, a pool, pairs with preferences, and a config whose steps are few."""
    out = tmp_path_factory.mktemp("made")
    tiny_causal_lm(out / "lm")
    (out / "pool.yaml").write_text(tiny_pool(4).to_yaml())
    write_rows(out / "pairs.jsonl", pair_rows([replace(pair, preferred="a") for pair in tiny_pairs(12)]))
    section = {
        "model": {"remat": "none"},
        "data": {"row_length": 512, "rows_per_step": 4},
        "mesh": MESH,
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0},
        "checkpoint": {"every_steps": 2, "keep": 2},
        "max_steps": 8,
        "epochs": 9,
    }
    (out / "config.yaml").write_text(yaml.safe_dump({"reward": section}))
    return out


def upload(made: Path, store: str) -> str:
    for file in (file for file in made.rglob("*") if file.is_file()):
        paths.write_bytes(paths.join(store, str(file.relative_to(made))), file.read_bytes())
    return store


def adaptrm(*arguments: str) -> None:
    """A command in this process."""
    cli.app(list(arguments), standalone_mode=False)


def refused(monkeypatch, capsys, *arguments: str) -> str:
    """The one line that a command in this process ends with, and exit code 2."""
    monkeypatch.setattr(sys, "argv", ["adaptrm", *arguments])
    with pytest.raises(SystemExit) as left:
        cli.main()
    line = capsys.readouterr().err.splitlines()[-1]
    assert left.value.code == 2, line
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
    folder = str(tmp_path) if kind == "local" else f"{kind}://{BUCKET}/{uuid.uuid4().hex}"
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


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_a_full_disk_is_told(tmp_path, kind):
    folder = str(tmp_path) if kind == "local" else f"memory://{BUCKET}/{uuid.uuid4().hex}"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(InputError, match=rf"{folder}/x: cannot be written: File too large; free space"):
            paths.write_bytes(f"{folder}/x", bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert paths.names(folder) == []


def test_one_holder_a_folder(store, monkeypatch):
    monkeypatch.setattr(lock, "LEASE", 3.0)
    with hold(store):
        assert paths.names(store) == [".lock"]
        with pytest.raises(InputError, match="another run holds this folder; wait for it or give another --out"):
            hold(store).__enter__()
        assert paths.names(store) == [".lock"]
    assert paths.names(store) == []
    with hold(store):
        pass


def test_a_dead_holder_is_followed_and_one_that_wakes_up_stops(monkeypatch, capsys):
    store = f"memory://{BUCKET}/{uuid.uuid4().hex}"
    monkeypatch.setattr(lock, "LEASE", 1.2)
    paths.write_bytes(paths.join(store, ".lock"), lock._sign("somebody", 7))
    start = time.monotonic()
    with pytest.raises(InputError, match="another run took this folder over"), hold(store):
        assert time.monotonic() - start > lock.LEASE
        assert "waiting up to 1 s for a sign of its life" in capsys.readouterr().err
        taken = lock._sign("a third", 0)
        paths.write_bytes(paths.join(store, ".lock"), taken)
        while True:
            time.sleep(0.01)
    assert paths.read_bytes(paths.join(store, ".lock")) == taken  # the lock of the third stays


def test_of_many_that_wait_for_a_dead_holder_one_follows(monkeypatch):
    store = f"memory://{BUCKET}/{uuid.uuid4().hex}"
    monkeypatch.setattr(lock, "LEASE", 3.0)
    paths.write_bytes(paths.join(store, ".lock"), b"not what a holder writes")
    held, ended = [], threading.Event()

    def wait(number: int) -> None:
        try:
            with hold(store):
                held.append(number)
                ended.wait(10)
        except InputError as wrong:
            assert "another run holds this folder" in str(wrong)
            ended.set()

    both = [threading.Thread(target=wait, args=(number,)) for number in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join(20)
    assert len(held) == 1


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


def test_a_tokenizer_may_lie_in_a_store(made, store):
    upload(made / "lm", store)
    section = {"model": {"scratch": {"tokenizer": store, "num_hidden_layers": 1}}}
    chat = start_of("reward", parse_options(section, "test")).chat
    assert len(chat.encode_chat([{"role": "user", "content": "Hi"}])) > 0


def test_only_whole_checkpoints_count(store, tmp_path):
    def checkpoint(step: int) -> None:
        (tmp_path / str(step) / "params").mkdir(parents=True)
        (tmp_path / str(step) / "params" / "w").write_bytes(bytes([step]))
        (tmp_path / str(step) / "optimizer").mkdir()
        (tmp_path / str(step) / "optimizer" / "m").write_bytes(b"m")

    assert remote.latest(store) is None
    for step in (2, 4, 6):
        checkpoint(step)
        # What a killed process left of this checkpoint, of a later one, and things that are no checkpoint.
        for name in (f"{step}/params/old", "8/params/w", "notes.txt"):
            paths.write_bytes(paths.join(store, name), b"half")
        assert remote.latest(store) == (step - 2 or None)
        remote.send(tmp_path, store, step, keep=2)
        assert remote.latest(store) == step
    names = sorted(paths.files(store, deep=True))
    each = ("commit_success.txt", "optimizer/m", "params/w")
    assert names == [f"{step}/{name}" for step in (4, 6) for name in each] + ["notes.txt"]
    remote.bring(store, 6, tmp_path / "parameters", training=False)
    remote.bring(store, 6, tmp_path / "all", training=True)
    assert (tmp_path / "parameters" / "6" / "params" / "w").read_bytes() == b"\6"
    assert [p.name for p in (tmp_path / "parameters" / "6").glob("opt*")] == []
    assert (tmp_path / "all" / "6" / "optimizer" / "m").read_bytes() == b"m"
    paths.write_bytes(paths.join(store, "6/params/../../../evil"), b"x")
    with pytest.raises(InputError, match=r"holds a file with the unsafe name '6/params/../../../evil'; delete it"):
        remote.latest(store)


def labelled(store: str) -> tuple[str, ...]:
    """Score and label the pairs of a store; gives the command that trains on them."""
    pairs, scores, labels = (paths.join(store, name) for name in ("pairs.jsonl", "scores", "labels.parquet"))
    adaptrm("score", "--pairs", pairs, "--judge", f"{store}/lm", "--rules", f"{store}/pool.yaml", "--out", scores)
    adaptrm("label", "--scores", scores, "--out", labels, "--k", "2")
    run = f"{store}/run"
    return ("train", "reward", f"{store}/config.yaml", "--data", pairs, "--labels", labels, "--out", run, "--model")


def used(store: str, capsys) -> None:
    """Evaluate and export a finished run."""
    adaptrm("evaluate", f"{store}/run", "--data", f"{store}/pairs.jsonl", "--out", f"{store}/results.json")
    assert json.loads(paths.read_bytes(f"{store}/results.json"))["n"] == 12
    capsys.readouterr()
    adaptrm("export", f"{store}/run", f"{store}/out", "--verify", "--json")
    assert json.loads(capsys.readouterr().out)["verified_by"]["adaptrm"] <= 1e-5


def losses(run: str) -> list[dict]:
    lines = map(json.loads, paths.read_bytes(f"{run}/metrics.jsonl").splitlines())
    return [{k: v for k, v in line.items() if not k.endswith("per_second")} for line in lines]


@pytest.fixture(scope="module")
def uninterrupted(made) -> str:
    """A store in memory with a run that nothing interrupted; its model was given as a path of another folder."""
    store = upload(made, f"memory://{BUCKET}/{uuid.uuid4().hex}")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        adaptrm(*labelled(store), "lm")
    return store


def test_the_whole_chain_in_memory(uninterrupted, made, monkeypatch, capsys):
    store, run = uninterrupted, f"{uninterrupted}/run"
    before = losses(run)
    assert [line["step"] for line in before] == list(range(1, 9))
    assert paths.names(run) == ["checkpoints", "config.yaml", "examples.sha256", "export", "metrics.jsonl"]
    assert sorted(remote._steps(f"{run}/checkpoints")) == [6, 8]
    used(store, capsys)
    # A finished run started again changes nothing; its model is the same one, seen from elsewhere.
    monkeypatch.chdir(made / "lm")
    options = {"data.pairs": f"{store}/pairs.jsonl", "data.labels": f"{store}/labels.parquet"}
    train("reward", load_options(f"{store}/config.yaml", "reward", options | {"model.pretrained": "../lm"}), run)
    assert losses(run) == before
    # An export goes over an earlier model of ours, and not over something else.
    assert export_run(run, f"{store}/out") == {}
    with pytest.raises(InputError, match="holds something that adaptrm did not write"):
        export_run(run, f"{store}/lm")
    with pytest.raises(InputError, match="is not empty and not a model folder"):
        export_run(run, f"{store}/scores")


def test_the_whole_chain_on_s3_with_a_kill_in_the_middle(uninterrupted, made, s3, monkeypatch, capsys):
    """Killed and started again, the run has the losses and weights of the one in memory, bit for bit."""
    store = upload(made, f"s3://{BUCKET}/{uuid.uuid4().hex}")
    run = f"{store}/run"
    command = (*labelled(store), f"{store}/lm")
    monkeypatch.setattr(commands, "ENV", dict(os.environ))  # it computes as this process does
    monkeypatch.setattr(commands, "QUICK", {})
    kill_when(lambda: remote.latest(f"{run}/checkpoints") is not None, *command)
    assert 0 < remote.latest(f"{run}/checkpoints") < 8
    assert ".lock" in paths.names(run) and "export" not in paths.names(run)
    # What has not ended gives its latest checkpoint.
    assert np.isfinite(RewardModel.from_pretrained(run).score_pairs(tiny_pairs(2))).all()
    monkeypatch.setattr(lock, "LEASE", 2.0)
    adaptrm(*command)
    assert ".lock" not in paths.names(run)
    assert sorted(remote._steps(f"{run}/checkpoints")) == [6, 8]
    assert losses(run) == losses(f"{uninterrupted}/run")
    weights = "run/export/model.safetensors"
    assert paths.read_bytes(f"{store}/{weights}") == paths.read_bytes(f"{uninterrupted}/{weights}")
    used(store, capsys)


def test_several_processes_need_a_folder_that_they_share(made, monkeypatch):
    options = load_options(made / "config.yaml", "reward", {"model.pretrained": str(made / "lm")})
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(InputError, match="memory://run: several processes write one run together; give a folder"):
        train("reward", options, "memory://run")


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
    store = f"s3://{BUCKET}/{uuid.uuid4().hex}"
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
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        for line, start in zip(fails(made, monkeypatch, capsys), (reading, writing), strict=True):
            assert line.startswith(f'{start}Could not connect to the endpoint URL: "http://127.0.0.1:9/')

    # No credentials.
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with monkeypatch.context() as patch:
        patch.delenv("AWS_ACCESS_KEY_ID")
        patch.delenv("AWS_SECRET_ACCESS_KEY")
        for line, start in zip(fails(made, monkeypatch, capsys), (reading, writing), strict=True):
            assert line.startswith(f"{start}Unable to locate credentials; ")
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_a_network_that_breaks_while_reading_is_one_line(s3):
    file = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    paths.write_bytes(file, bytes(1000))
    message = rf"{file}: cannot be read: .*; check the address, permissions and network"
    with pytest.raises(InputError, match=message), paths.reading(file) as stream:
        paths.remove(f"s3://{BUCKET}", [file.rsplit("/", 1)[1]])
        stream.read()
