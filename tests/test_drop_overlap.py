"""Training leaves out what overlaps with a suite: whatever is trained, wherever it comes from, in every process."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from commands import ENV, free_port, pair_rows, write_rows
from refusals import refused
from tiny import tiny_causal_lm, tiny_pairs, tiny_pool

from adaptrm.config import DataOptions, LossOptions, MixOptions, parse_options
from adaptrm.data.chat import ChatTokenizer
from adaptrm.data.overlap_report import overlap_report
from adaptrm.judge.prompts import JudgePrompt
from adaptrm.train.adapter_examples import adapter_examples
from adaptrm.train.examples import judge_examples, reward_examples
from adaptrm.train.run import train

RUN = "one two three four five six seven eight nine ten eleven twelve thirteen"
PLAIN = LossOptions()


def label(pair, **more) -> dict:
    return {"id": pair.id, "prompt": list(pair.prompt), "chosen": pair.response_b, "rejected": pair.response_a} | more


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, eight pairs (the first by its prompt in the suite, the fourth by 13 words), and the other six alone."""
    out = tmp_path_factory.mktemp("overlap")
    tiny_causal_lm(out / "lm")
    prompts = [({"role": "user", "content": f"Question {i}?"},) for i in range(8)]
    pairs = [replace(p, prompt=prompts[i], preferred="ab"[i % 2], margin=0.5) for i, p in enumerate(tiny_pairs(8))]
    pairs[3] = replace(pairs[3], response_b=f"So: {RUN.upper()}!")
    clean = [p for i, p in enumerate(pairs) if i not in (0, 3)]
    suite = [replace(pairs[i], id=f"s{i}", response_a=f"x{i}", response_b=f"y{i}") for i in (0, 1)]
    suite[1] = replace(suite[1], prompt=({"role": "user", "content": "Another"},), response_a=RUN)
    for name, rows in (("pairs", pairs), ("clean", clean), ("suite", suite)):
        write_rows(out / f"{name}.jsonl", pair_rows(rows))
        write_rows(out / f"{name}-labels.jsonl", [label(p, rules=["r0"], probability=0.75) for p in rows])
        verdicts = {"labels": {"r0": True, "r2": None}}
        judged = [{"id": p.id, "prompt": list(p.prompt), "response": p.response_b} | verdicts for p in rows]
        write_rows(out / f"{name}-rule-labels.jsonl", judged)
    return out


@pytest.fixture(scope="module")
def chat(folder) -> ChatTokenizer:
    return ChatTokenizer.from_folder(folder / "lm")


def data(folder: Path, name: str, labels: str | None = "human", **more) -> DataOptions:
    """Pairs, or labels alone; with the overlap of ``pairs`` dropped, and the same rows without it as they are."""
    if labels == "human":
        return DataOptions(str(folder / f"{name}.jsonl"), "human", **more)
    return DataOptions(
        None if labels == "alone" else str(folder / f"{name}.jsonl"), str(folder / f"{name}-labels.jsonl"), **more
    )


@pytest.mark.parametrize("labels", ["human", "joined", "alone"])
@pytest.mark.parametrize("loss", [PLAIN, LossOptions("plackett-luce")], ids=["pairs", "sets"])
def test_what_overlaps_is_left_out_as_if_it_had_not_been_there(folder, chat, labels, loss, capsys):
    suite = str(folder / "suite.jsonl")
    left_out, counts = reward_examples(data(folder, "pairs", labels, drop_overlap=(suite,)), chat, 0, loss)
    assert f"left out 2 of 8 examples: they share texts with {suite}" in capsys.readouterr().err
    assert counts == {"skipped_rows": 0, "dropped": 0, "truncated": 0, "overlapping": 2}
    clean, without = reward_examples(data(folder, "clean", labels), chat, 0, loss)
    assert left_out.digest == clean.digest and len(clean) == 6
    assert "overlapping" not in without and "left out" not in capsys.readouterr().err
    # The report says of the same rows that they overlap.
    source = str(folder / ("pairs-labels.jsonl" if labels == "alone" else "pairs.jsonl"))
    assert overlap_report(source, suite)["train_rows_overlapping"] == counts["overlapping"]


def test_labels_of_some_pairs_join_those_that_are_left(folder, chat, tmp_path):
    lines = (folder / "pairs-labels.jsonl").read_text().splitlines(keepends=True)
    some = tmp_path / "labels.jsonl"
    some.write_text("".join(lines[:5]))
    options = replace(data(folder, "pairs", drop_overlap=(str(folder / "suite.jsonl"),)), labels=str(some))
    store, counts = reward_examples(options, chat, 0, PLAIN)
    weights = [float(store[i][1]["weights"][0]) for i in range(len(store))]
    assert counts["overlapping"] == 2 and weights == [1, 1, 1, 0, 0, 0], "of the labelled five two are gone"


def test_of_a_mix_it_is_left_out_too(folder, chat):
    mix = (MixOptions(str(folder / "pairs.jsonl"), weight=8 / 6),)
    dropped = {"drop_overlap": (str(folder / "suite.jsonl"),)}
    store, counts = reward_examples(data(folder, "clean", mix=mix, **dropped), chat, 0, PLAIN, seed=1)
    assert (counts["mixed"], counts["overlapping"], len(store)) == (8, 2, 6 + 6)


def test_of_sets_of_responses_every_one_counts(folder, chat, tmp_path):
    rows = [
        {"id": f"n{i}", "prompt": f"Ask {i}", "chosen_list": ["ja"], "rejected_list": ["nein", said, "no"]}
        for i, said in enumerate(("non", RUN, "njet"))
    ]
    options = DataOptions(str(write_rows(tmp_path / "sets.jsonl", rows)), "human")
    options = replace(options, drop_overlap=(str(folder / "suite.jsonl"),))
    for loss, left, dropped in ((LossOptions("plackett-luce"), 2, 1), (PLAIN, 2 * 3 + 2, 1)):
        store, counts = reward_examples(options, chat, 0, loss)
        assert (len(store), counts["overlapping"]) == (left, dropped), "as pairs, the one that holds it"


def test_judges_and_adapters_leave_it_out_as_well(folder, chat):
    suite = (str(folder / "suite.jsonl"),)
    prompt, ids = JudgePrompt(chat, tiny_pool(3)), tiny_pool(3).ids

    def judge(name: str, **more):
        return judge_examples(DataOptions(labels=str(folder / f"{name}-rule-labels.jsonl"), **more), prompt)

    def adapter(name: str, labels: str, **more):
        return adapter_examples(data(folder, name, labels, **more), chat, 0, ids, 1, both_orders=False)

    made = {
        "judge": (judge("pairs", drop_overlap=suite), judge("clean")),
        "joined": (adapter("pairs", "joined", drop_overlap=suite), adapter("clean", "joined")),
        "alone": (adapter("pairs", "alone", drop_overlap=suite), adapter("clean", "alone")),
    }
    for (left_out, counts), (clean, _) in made.values():
        assert counts["overlapping"] == 2 and left_out.digest == clean.digest


def test_what_many_conversations_say_is_kept(folder, chat, tmp_path):
    rows = [{"id": f"c{i}", "prompt": f"Ask {i}", "chosen": RUN, "rejected": "no"} for i in range(40)]
    file = str(write_rows(tmp_path / "many.jsonl", rows))
    store, counts = reward_examples(
        DataOptions(file, "human", drop_overlap=(str(folder / "suite.jsonl"),)), chat, 0, PLAIN
    )
    assert (len(store), counts["overlapping"]) == (40, 0)
    # Common is what is so in all sources together.
    mixed = data(folder, "pairs", mix=(MixOptions(file, weight=1),), drop_overlap=(str(folder / "suite.jsonl"),))
    assert reward_examples(mixed, chat, 0, PLAIN)[1]["overlapping"] == 1, "the one with the same prompt"


def test_wrong_input_is_one_line(folder, chat, tmp_path):
    suite = str(folder / "suite.jsonl")
    every = replace(data(folder, "suite"), drop_overlap=(suite,))
    message = refused(reward_examples, every, chat, 0, PLAIN)
    assert (
        message
        == f"{suite}: nothing to train on; no example has a label but those 2 that overlap with data.drop_overlap"
    )
    gone = replace(every, drop_overlap=(suite, str(tmp_path / "gone.jsonl")))
    assert "gone.jsonl: does not exist" in refused(reward_examples, gone, chat, 0, PLAIN)
    bad = tmp_path / "bad.jsonl"
    bad.write_text((folder / "suite.jsonl").read_text() + '{"prompt": "p"}\n')
    # A suite is not read in part, whatever becomes of bad rows of the pairs.
    options = data(folder, "pairs", on_bad_row="skip", drop_overlap=(str(bad),))
    assert "bad.jsonl: line 3: needs response_a" in refused(reward_examples, options, chat, 0, PLAIN)
    for missing in (DataOptions(labels="human"), DataOptions(), data(folder, "pairs", mix=(MixOptions(),))):
        message = refused(reward_examples, replace(missing, drop_overlap=(suite,)), chat, 0, PLAIN)
        assert "is missing: " in message
    skipped = tmp_path / "pairs.jsonl"
    skipped.write_text((folder / "pairs.jsonl").read_text() + '{"prompt": "p"}\n')
    options = DataOptions(str(skipped), "human", on_bad_row="skip", drop_overlap=(suite,))
    counts = reward_examples(options, chat, 0, PLAIN)[1]
    assert counts == {"skipped_rows": 1, "dropped": 0, "truncated": 0, "overlapping": 2}


def test_a_run_counts_it_and_is_measured_on_the_suite(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    section = {
        "model": {"pretrained": str(folder / "lm"), "remat": "none"},
        "data": {"pairs": "pairs.jsonl", "labels": "human", "row_length": 512, "rows_per_step": 8},
        "evaluation": {"pairs": "suite.jsonl"},
        "optimizer": {"warmup_steps": 0},
        "max_steps": 1,
    }
    section["data"]["drop_overlap"] = ["suite.jsonl"]
    result = train("reward", parse_options(section, "test"), tmp_path / "run")
    assert (result["pairs"], result["overlapping"]) == (6, 2)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("evaluation/accuracy" in line for line in lines), "what it is measured on is not left out"
    # Local paths are whole ones, so that the run goes on from anywhere.
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert f"drop_overlap:\n    - {os.path.realpath(folder)}/suite.jsonl" in config


SHARED = """
import json, sys
from adaptrm.parallel.distributed import start_processes
start_processes()
from adaptrm.config import DataOptions, LossOptions
from adaptrm.data.chat import ChatTokenizer
from adaptrm.train import examples
examples.SHARE = 3
chat = ChatTokenizer.from_folder(sys.argv[1])
found = []
for pairs in sys.argv[3:]:
    data = DataOptions(pairs, "human", drop_overlap=(sys.argv[2],))
    store, left = examples.reward_examples(data, chat, 0, LossOptions())
    found.append([store.digest, left])
print(json.dumps(found), flush=True)
"""


@pytest.mark.slow
def test_processes_leave_out_the_same(folder, tmp_path):
    rows = [{"id": f"c{i}", "prompt": f"Ask {i}", "chosen": RUN, "rejected": "no"} for i in range(15)]
    # What each of two processes alone would find in 8 and 7 conversations, and not common, both find in 15.
    many = write_rows(tmp_path / "many.jsonl", rows)
    command = [sys.executable, "-c", SHARED, folder / "lm", folder / "suite.jsonl", folder / "pairs.jsonl", many]
    both = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    envs = [ENV, *(ENV | both | {"JAX_PROCESS_ID": str(i)} for i in range(2))]
    started = [subprocess.Popen([*map(str, command)], env=env, stdout=subprocess.PIPE) for env in envs]
    one, *two = (json.loads(p.communicate(timeout=300)[0].decode().splitlines()[-1]) for p in started)
    assert two == [one, one]
    assert [left["overlapping"] for _, left in one] == [2, 0]
