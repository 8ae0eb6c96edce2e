"""What pairs, sets and their labels become: trees, targets, margins, and sources mixed by weight."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from commands import ENV, free_port, pair_rows, write_rows
from refusals import refused
from tiny import tiny_pairs, tiny_tokenizer

from adaptrm.config import DataOptions, LossOptions, MixOptions
from adaptrm.data.chat import ChatTokenizer
from adaptrm.data.preferences import read_pairs, read_sets
from adaptrm.train.examples import reward_examples

PROMPT = [{"role": "user", "content": "How do I bake bread?"}]
SETS = [
    {"id": "s0", "prompt": PROMPT, "chosen_list": ["Mix flour."], "rejected_list": ["I refuse.", "No.", "Never mix."]},
    {
        "id": "s1",
        "prompt": PROMPT,
        "chosen_list": ["Let it rest.", "Rest."],
        "rejected_list": ["Zebras vex jumpy foxes. " * 10],
    },
]
SET_LOSS = LossOptions("plackett-luce")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def chat(tokenizer) -> ChatTokenizer:
    return ChatTokenizer.from_folder(tokenizer)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """Ten pairs that people judged (every third not), twelve others, labels of the first six, sets."""
    out = tmp_path_factory.mktemp("files")
    pairs = [replace(p, preferred=("a", "b", None)[i % 3]) for i, p in enumerate(tiny_pairs(10))]
    others = [replace(p, id=f"o{p.id}", preferred="a", margin=0.5) for p in tiny_pairs(12)]
    label = lambda p, **more: {"id": p.id, "prompt": list(p.prompt), "chosen": p.response_b} | more  # noqa: E731
    labels = [label(p, rejected=p.response_a, probability=0.75, margin=1.5) for p in pairs[:6]]
    return {
        "pairs": str(write_rows(out / "pairs.jsonl", pair_rows(pairs))),
        "others": str(write_rows(out / "others.jsonl", pair_rows(others))),
        "labels": str(write_rows(out / "labels.jsonl", labels)),
        "sets": str(write_rows(out / "sets.jsonl", SETS)),
    }


def values(store, name: str) -> list[list[float]]:
    return [store[i][1][name].tolist() for i in range(len(store))]


def test_a_best_of_n_row_is_one_tree_with_a_leaf_a_response(files, chat):
    store, _ = reward_examples(DataOptions(files["sets"], "human"), chat, 0, SET_LOSS)
    assert store.leaves.tolist() == [4, 3]
    for i, row in enumerate(SETS):
        tree, at_leaves = store[i]
        responses = [*row["chosen_list"], *row["rejected_list"]]
        for leaf, response in enumerate(responses):
            alone = chat.encode_chat([*PROMPT, {"role": "assistant", "content": response}])
            np.testing.assert_array_equal(tree.sequence(leaf), alone)
        assert len(tree) < sum(len(tree.sequence(leaf)) for leaf in range(len(responses))), "the prompt stands once"
        assert at_leaves["targets"].tolist() == [1] * len(row["chosen_list"]) + [0] * len(row["rejected_list"])
        assert (at_leaves["weights"] == 1).all()
    # For Bradley-Terry, and for scoring, the same rows are pairs.
    store, _ = reward_examples(DataOptions(files["sets"], "human"), chat, 0, LossOptions())
    assert store.leaves.tolist() == [2] * 5
    assert [pair.id for pair in read_pairs(files["sets"])] == ["s0#0-0", "s0#0-1", "s0#0-2", "s1#0-0", "s1#1-0"]


def test_pairs_are_sets_of_two(files, chat):
    store, _ = reward_examples(DataOptions(files["pairs"], "human"), chat, 0, SET_LOSS)
    assert values(store, "targets")[:3] == [[1, 0], [0, 1], [0, 0]]
    assert values(store, "weights")[:3] == [[1, 1], [1, 1], [0, 0]]
    store, _ = reward_examples(DataOptions(files["pairs"], files["labels"]), chat, 0, SET_LOSS)
    assert values(store, "targets") == [[0, 1]] * 6 + [[0, 0]] * 4


def test_a_set_longer_than_a_row_is_cut_as_pairs_are(files, chat):
    data = DataOptions(files["sets"], "human", row_length=100, overlong="truncate")
    store, left = reward_examples(data, chat, 0, SET_LOSS)
    assert left["truncated"] == 1 and store.leaves.tolist() == [4, 3] and store.lengths[1] <= 100
    assert refused(reward_examples, replace(data, overlong="fail"), chat, 0, SET_LOSS).startswith(
        f"{files['sets']}: 's1' has "
    )
    store, left = reward_examples(replace(data, overlong="drop"), chat, 0, SET_LOSS)
    assert (left["dropped"], len(store)) == (1, 1)


def test_faulty_sets_are_refused_as_pairs_are(tmp_path):
    file = write_rows(tmp_path / "sets.jsonl", [SETS[0] | {"rejected_list": []}])
    assert "line 1: chosen_list and rejected_list must be lists" in refused(list, read_sets(file))
    file = write_rows(tmp_path / "sets.jsonl", [SETS[0], SETS[0]])
    assert "line 2: the id 's0' is repeated" in refused(list, read_sets(file))


def test_soft_labels_and_margins_reach_the_leaves(files, chat):
    data = DataOptions(files["pairs"], files["labels"])
    store, _ = reward_examples(data, chat, 0, LossOptions(soft_labels=True, margin=True))
    assert values(store, "targets")[:6] == [[0.25, 0.75]] * 6
    assert values(store, "margins") == [[1.5, 1.5]] * 6 + [[0, 0]] * 4
    # Labels alone put the chosen response first.
    alone, _ = reward_examples(DataOptions(labels=files["labels"]), chat, 0, LossOptions(soft_labels=True))
    assert values(alone, "targets") == [[0.75, 0.25]] * 6 and values(alone, "margins") == [[0, 0]] * 6
    hard, _ = reward_examples(data, chat, 0, LossOptions())
    assert values(hard, "targets")[:6] == [[0, 1]] * 6 and values(hard, "margins") == [[0, 0]] * 10
    people, _ = reward_examples(DataOptions(files["others"], "human"), chat, 0, LossOptions(margin=True))
    assert values(people, "margins") == [[0.5, 0.5]] * 12


def test_options_of_the_loss_that_the_data_cannot_serve_are_errors(files, chat):
    human = DataOptions(files["pairs"], "human")
    assert "loss.soft_labels needs" in refused(reward_examples, human, chat, 0, LossOptions(soft_labels=True))
    assert "no pair has a number in margin" in refused(reward_examples, human, chat, 0, LossOptions(margin=True))


def test_sources_are_mixed_by_weight_and_seed(files, chat, capsys):
    plain = DataOptions(files["pairs"], files["labels"])
    mix = (MixOptions(files["others"], weight=2 / 3), MixOptions(files["pairs"], weight=1 / 3))
    mixed = replace(plain, mix=mix)
    alone, _ = reward_examples(plain, chat, 0, LossOptions())
    store, left = reward_examples(mixed, chat, 0, LossOptions(), seed=1)  # six of the ten have a label
    assert left["mixed"] == 6 and len(store) == 10 + 4 + 2
    said = capsys.readouterr().err
    assert f"mixed in 4 of 12 examples of {files['others']}" in said
    assert f"mixed in 2 of 7 examples of {files['pairs']}" in said, "those that nobody judged are not drawn"
    for i in range(10):
        np.testing.assert_array_equal(store[i][0].tokens, alone[i][0].tokens)
    assert values(store, "weights") == values(alone, "weights") + [[1, 1]] * 6
    assert values(store, "targets")[10:14] == [[1, 0]] * 4
    assert len({store[i][0].tokens.tobytes() for i in range(10, 14)}) == 4, "an example is drawn once"
    digests = [reward_examples(mixed, chat, 0, LossOptions(), seed=seed)[0].digest for seed in (1, 1, 2, 3)]
    assert digests[0] == digests[1] == store.digest and len(set(digests)) == 3


def test_a_mix_that_its_source_cannot_serve_is_an_error(files, chat):
    wants = DataOptions(files["pairs"], "human", mix=(MixOptions(files["others"], weight=2),))
    message = refused(reward_examples, wants, chat, 0, LossOptions())
    assert "others.jsonl: has 12 examples with a label, data.mix wants 14 (2 x 7); lower its weight" in message
    assert "data.pairs is missing" in refused(reward_examples, replace(wants, mix=(MixOptions(),)), chat, 0, SET_LOSS)


SHARED = """
import json, sys
from adaptrm.parallel.distributed import start_processes
start_processes()
from adaptrm.config import DataOptions, LossOptions
from adaptrm.data.chat import ChatTokenizer
from adaptrm.errors import InputError
from adaptrm.train import examples
examples.SHARE = 3
chat, read = ChatTokenizer.from_folder(sys.argv[1]), 0
class Counted:
    def encode_chat(self, conversation):
        global read
        read += 1
        return chat.encode_chat(conversation)
def digest(length, overlong):
    data = DataOptions(sys.argv[2], "human", row_length=length, overlong=overlong)
    try:
        store, left = examples.reward_examples(data, Counted(), 0, LossOptions())
    except InputError as wrong:
        return str(wrong)
    return store.digest, left
print(json.dumps([digest(1024, "fail"), read, digest(150, "drop"), digest(150, "fail")]), flush=True)
"""


@pytest.mark.slow
def test_processes_share_the_tokenising_and_have_all_examples(files, tokenizer):
    command = [sys.executable, "-c", SHARED, str(tokenizer), files["pairs"]]
    both = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    envs = [ENV, *(ENV | both | {"JAX_PROCESS_ID": str(i)} for i in range(2))]
    started = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE) for env in envs]
    one, *two = (json.loads(p.communicate(timeout=300)[0].decode().splitlines()[-1]) for p in started)
    for said in two:
        assert said[0] == one[0] and said[2:] == one[2:]
    assert [said[1] for said in (one, *two)] == [20, 10, 10], "two conversations a pair, each tokenised once"
    assert one[2][1]["dropped"] > 1 and "tokens, a row 150" in one[3]
