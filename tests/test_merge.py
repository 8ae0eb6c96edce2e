"""``adaptrm merge``: the average of models, and what cannot be averaged."""

import json
import math
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from commands import pair_rows, write_rows
from folders import raw_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_dtypes import bfloat16
from refusals import refused
from safetensors.numpy import load_file, save_file
from stores import new_folder
from tiny import CHATML, random_state, tiny_causal_lm, tiny_config, tiny_pairs, tiny_tokenizer

from adaptrm import paths
from adaptrm.config import parse_options
from adaptrm.data.chat import ChatTokenizer
from adaptrm.export import export_run
from adaptrm.hf.folder import open_folder
from adaptrm.merge import merge, read_weights
from adaptrm.models import SequenceClassifier
from adaptrm.reward_model import RewardModel
from adaptrm.train.run import train
from adaptrm.train.save import save_model

DTYPES = {"F32": np.dtype("float32"), "BF16": np.dtype(bfloat16)}


def reward_model(folder: Path, seed: int, dtype: str = "float32", rules: tuple[str, ...] = (), **overrides) -> str:
    """A folder of ours with random weights."""
    tiny_tokenizer(folder / "tokenizer")
    chat = ChatTokenizer.from_folder(folder / "tokenizer")
    config = tiny_config(**overrides)
    _, params = random_state(SequenceClassifier, config, seed, dtype, num_labels=len(rules) or 1)
    save_model(folder / "model", params, config.to_hf(), chat, ("<|endoftext|>", 0), rule_ids=rules)
    return str(folder / "model")


@pytest.fixture(scope="module")
def abc(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("models")
    return [reward_model(folder / name, seed) for seed, name in enumerate("abc")]


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """A folder that is written over and over again."""
    return tmp_path_factory.mktemp("out") / "merged"


def values(folder) -> dict[str, np.ndarray]:
    return {
        name: np.frombuffer(data, DTYPES[dtype]).reshape(shape)
        for name, (dtype, shape, data) in raw_tensors(Path(folder)).items()
    }


def by_hand(models: list[str], weights: list[float]) -> dict[str, np.ndarray]:
    """The average in float64, not rounded."""
    every = [values(model) for model in models]
    return {
        name: sum(weight * model[name].astype(np.float64) for model, weight in zip(every, weights, strict=True))
        for name in every[0]
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("weights", [None, [0.7, 0.2, 0.1], [1.5, -0.75, 0.25]])
def test_the_average_is_the_one_by_hand(tmp_path, dtype, weights):
    models = [reward_model(tmp_path / name, seed, dtype) for seed, name in enumerate("abc")]
    result = merge(models, tmp_path / "out", weights)
    expected = by_hand(models, weights or [1 / 3] * 3)
    found = values(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == np.dtype(dtype)
        if weights:
            np.testing.assert_array_equal(value, expected[name].astype(np.float32).astype(dtype), err_msg=name)
        within = np.spacing(np.abs(value)).astype(np.float64) * (0.5 + 1e-6)  # correctly rounded, by any order of sums
        assert (np.abs(value.astype(np.float64) - expected[name]) <= within).all(), name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == dtype == result["dtype"]
    assert result["tensors"] == len(found) and result["parameters"] == sum(x.size for x in found.values())
    assert [one["model"] for one in result["models"]] == models


def test_another_dtype_is_rounded_once_from_the_average(abc, tmp_path):
    merge(abc, tmp_path / "out", [0.5, 0.3, 0.2], dtype="bfloat16")
    expected = by_hand(abc, [0.5, 0.3, 0.2])
    for name, value in values(tmp_path / "out").items():
        np.testing.assert_array_equal(value, expected[name].astype(np.float32).astype(bfloat16))


@given(size=st.integers(1, 80_000), block=st.integers(50, 3000))
@settings(max_examples=25)
def test_however_it_is_cut_it_is_the_same(abc, out, size, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("adaptrm.merge.BLOCK", block)
        merge(abc, out, [0.5, 0.3, 0.2], max_shard_bytes=size)
    expected = by_hand(abc, [0.5, 0.3, 0.2])
    files = list(out.glob("*.safetensors"))
    for file in files:
        held = load_file(file)
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= size
    assert (out / "model.safetensors.index.json").exists() == (len(files) > 1)
    found = open_folder(out)  # which compares the index with the files
    assert found.tensors.keys() == expected.keys()
    for name, value in values(out).items():
        np.testing.assert_array_equal(value, expected[name].astype(np.float32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_one_and_nought_give_the_bytes_of_the_first(tmp_path, dtype):
    models = [reward_model(tmp_path / name, seed, dtype) for seed, name in enumerate("ab")]
    file = Path(models[0]) / "model.safetensors"
    tensors = load_file(file)
    odd = np.array([-0.0, 1e-38, -1e-40], tensors["score.weight"].dtype)
    tensors["score.weight"].reshape(-1)[: len(odd)] = odd
    save_file(tensors, file, metadata={"format": "pt"})
    export = json.loads((file.parent / "config.json").read_text())
    merge(models, tmp_path / "out", [1, 0])
    assert raw_tensors(tmp_path / "out") == raw_tensors(file.parent)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == export
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (file.parent / name).read_bytes()


@given(weights=st.lists(st.floats(-50, 50), min_size=1, max_size=4))
@settings(max_examples=20)
def test_the_average_of_a_model_with_itself_is_that_model(abc, out, weights):
    weights = [*weights, 1 - math.fsum(weights)]
    merge([abc[0]] * len(weights), out, weights)
    assert raw_tensors(out) == raw_tensors(Path(abc[0]))


@given(weights=st.lists(st.floats(-2, 2), min_size=2, max_size=2))
@settings(max_examples=10)
def test_the_order_of_all_but_the_first_changes_nothing(abc, out, weights):
    a, b, c = abc
    weights = [1 - math.fsum(weights), *weights]
    merge([a, b, c], out, weights)
    one = values(out)
    merge([a, c, b], out, [weights[0], weights[2], weights[1]])
    for name, value in values(out).items():
        np.testing.assert_array_max_ulp(value, one[name], maxulp=1)


def test_the_merged_folder_is_read_as_others_read_it(abc, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    merge(abc, tmp_path / "out", [0.5, 0.3, 0.2])
    conversations = [pair.conversation(side) for pair in tiny_pairs(4) for side in "ab"]
    ours = RewardModel.from_pretrained(tmp_path / "out").score(conversations)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert model.config.pad_token_id == 0 and model.config.num_labels == 1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = [tokenizer.apply_chat_template(c, tokenize=False) for c in conversations]
    batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    with torch.no_grad():
        theirs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0].numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    apart = [RewardModel.from_pretrained(model).score(conversations) for model in abc]
    assert all(np.abs(ours - scores).max() > 1e-2 for scores in apart)


def test_runs_with_and_without_an_export_and_single_checkpoints(tmp_path):
    tiny_causal_lm(tmp_path / "lm")
    write_rows(tmp_path / "pairs.jsonl", pair_rows([replace(p, preferred="a") for p in tiny_pairs(8)]))
    section = {
        "model": {"pretrained": str(tmp_path / "lm"), "remat": "none"},
        "data": {"pairs": str(tmp_path / "pairs.jsonl"), "labels": "human", "row_length": 512, "rows_per_step": 8},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0},
        "checkpoint": {"every_steps": 1, "keep": 9},
        "epochs": 2,
    }
    run, out = tmp_path / "run", tmp_path / "out"
    train("reward", parse_options(section, "test"), run)
    steps = sorted(int(step.name) for step in (run / "checkpoints").iterdir() if step.name.isdecimal())
    export_run(run / "checkpoints" / str(steps[0]), tmp_path / "first")
    merge([str(run), str(run / "checkpoints" / str(steps[0]))], out, [0.75, 0.25])
    expected = by_hand([str(run / "export"), str(tmp_path / "first")], [0.75, 0.25])
    assert any(not np.array_equal(expected[name], value) for name, value in values(run / "export").items())
    for name, value in values(out).items():
        np.testing.assert_array_equal(value, expected[name].astype(np.float32))
    card = (out / "README.md").read_text()
    assert "0.75 x run\n" in card and f"0.25 x run/checkpoints/{steps[0]}\n" in card and str(tmp_path) not in card
    # Over the very export that is read nothing is written; a run that has none yet gives its latest checkpoint.
    assert "is what is read" in refused(merge, [str(run), str(tmp_path / "first")], run / "export")
    shutil.rmtree(run / "export")
    merge([str(run), str(run / "checkpoints" / str(steps[-1]))], out)
    assert open_folder(out).tensors.keys() == expected.keys()


def test_to_and_from_a_store(abc, cache, tmp_path):
    out = new_folder("memory")
    merge(abc, out, [0.5, 0.3, 0.2], max_shard_bytes=40_000)
    merge(abc, tmp_path / "here", [0.5, 0.3, 0.2], max_shard_bytes=40_000)
    assert {"config.json", "README.md", "model.safetensors.index.json"} <= set(paths.names(out))
    for name in paths.names(out):
        assert paths.read_bytes(paths.join(out, name)) == (tmp_path / "here" / name).read_bytes()
    merge([out, abc[0]], tmp_path / "again", [1, 0])
    assert raw_tensors(tmp_path / "again") == raw_tensors(tmp_path / "here")
    assert "is what is read" in refused(merge, [out, abc[0]], out)


def test_memory_is_that_of_blocks_not_of_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr("adaptrm.merge.BLOCK", 1 << 15)
    peaks, sizes = [], []
    for layers in (8, 24):
        fields = {"num_hidden_layers": layers, "hidden_size": 128, "intermediate_size": 512}
        models = [reward_model(tmp_path / f"{layers}{seed}", seed, **fields) for seed in range(3)]
        merge(models, tmp_path / "out")  # imports what it needs
        tracemalloc.start()
        merge(models, tmp_path / "out")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        sizes.append((tmp_path / "out" / "model.safetensors").stat().st_size)
    print(f"peaks {peaks}, models {sizes}")
    assert sizes[1] > 2 * sizes[0] > 4 * peaks[0]
    # A sum and a part in float64, the part as stored, the block as written; beside them headers and the tokenizer.
    assert peaks[1] < 4 * 8 * (1 << 15) + (2 << 20) and peaks[1] - peaks[0] < 1 << 18


def test_nothing_is_left_for_whole_where_it_fails(abc, tmp_path):
    broken, out = Path(shutil.copytree(abc[1], tmp_path / "broken")), tmp_path / "out"
    for value, weights in ((np.nan, None), (3e38, [-1, 2])):
        tensors = load_file(broken / "model.safetensors")
        tensors["score.weight"][0, 3] = value
        save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
        merge(abc, out)
        assert (out / "config.json").exists()
        said = refused(merge, [abc[0], str(broken)], out, weights)
        assert "score.weight: the average is not finite in float32" in said
        assert not (out / "config.json").exists() and not list(out.glob("*.safetensors*"))
    merge(abc, out)
    assert (out / "config.json").exists()


def test_folders_of_others_are_not_written_over(abc, tmp_path):
    theirs = tiny_causal_lm(tmp_path / "theirs")
    assert "holds something that adaptrm did not write" in refused(merge, abc, theirs)
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "a.txt").write_text("keep")
    assert "is not empty and not a model folder" in refused(merge, abc, notes)
    assert "is what is read" in refused(merge, abc, abc[1])


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([0.5, 0.5], "2 weights for 3 models; give one a model"),
        ([0.5, 0.3, 0.1], "they sum to 0.9; finite weights that sum to 1 are needed"),
        ([1, math.nan, 0], "they sum to nan"),
        ([math.inf, -math.inf, 1], "they sum to nan"),
        ([0.5, 0.3, 0.2 + 2e-6], "they sum to 1.000002; finite"),
    ],
)
def test_weights_that_are_none(abc, tmp_path, weights, said):
    assert said in refused(merge, abc, tmp_path / "out", weights)
    assert not (tmp_path / "out").exists()


def test_weights_as_text(capsys, abc, tmp_path):
    assert read_weights(".7,.3") == [0.7, 0.3] and read_weights("1.5, -0.5") == [1.5, -0.5]
    for wrong in ("", "a", ".7,,.3", "0.7;0.3"):
        assert "is no list of numbers" in refused(read_weights, wrong)
    assert "two models or more" in refused(merge, abc[:1], tmp_path / "out")
    merge(abc[:2], tmp_path / "out", read_weights("1.5,-.5"))
    assert "weights 1.5, -0.5: below 0 is no average, it extrapolates" in capsys.readouterr().err


def changed_template(folder: Path) -> str:
    (folder / "chat_template.jinja").write_text(CHATML.replace("'\n'", "'\n\n'"))
    return str(folder)


def changed_vocabulary(folder: Path) -> str:
    chat = ChatTokenizer.from_folder(folder)
    chat.tokenizer.add_special_tokens({"additional_special_tokens": ["<|other|>"]})
    chat.save(folder, "<|endoftext|>")
    return str(folder)


def without_a_norm(folder: Path) -> str:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def quantised(folder: Path) -> str:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def narrow_norm(folder: Path) -> str:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (changed_template, "{b}: its chat template is not that of {a}"),
        (changed_vocabulary, "{b}: its tokenizer has another vocabulary than {a}: '<|other|>' is 432 and absent"),
        (without_a_norm, "{b}: has no tensor model.norm.weight, {a} has it; only models that were trained from one"),
        (quantised, "{b}: model.norm.weight is I8; weights must be one of F32, F16, BF16"),
        (narrow_norm, "{b}: model.norm.weight has shape (31,), in {a} (32,)"),
        ({"num_hidden_layers": 3}, "{b}: num_hidden_layers is 3, of {a} 2; only models that were trained from one"),
        ({"model_type": "qwen2"}, "{b}: model_type is qwen2, of {a} llama"),
        ({"rope_theta": 5e5}, "{b}: rope_theta is 500000.0, of {a} 10000.0"),
        ({"vocab_size": 512}, "{b}: vocab_size is 512, of {a} 448; rows that only pad count too"),
        ({"rules": ("r0", "r1")}, "{b}: score.weight has shape (2, 32), in {a} (1, 32)"),
    ],
)
def test_models_that_differ_in_more_than_their_weights(abc, tmp_path, change, said):
    if callable(change):
        other = change(Path(shutil.copytree(abc[1], tmp_path / "b")))
    else:
        other = reward_model(tmp_path / "b", 1, **change)
    for models in ([abc[0], other], [abc[0], abc[2], other]):
        assert said.format(a=abc[0], b=other) in refused(merge, models, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_language_model_has_no_head(abc, tmp_path):
    lm = str(tiny_causal_lm(tmp_path / "lm"))
    for models in ([abc[0], lm], [lm, abc[0]]):
        said = refused(merge, models, tmp_path / "out")
        assert f"{lm}: has no score.weight, {abc[0]} has one" in said and "model.average_with_start" in said
    merge([lm, lm], tmp_path / "out", [0.25, 0.75])  # two of them are merged
    assert raw_tensors(tmp_path / "out") == raw_tensors(Path(lm))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_adapters_of_other_rules(tmp_path):
    rules = [("r0", "r1"), ("r0", "r1"), ("r1", "r0")]
    models = [reward_model(tmp_path / str(seed), seed, rules=names) for seed, names in enumerate(rules)]
    merge(models[:2], tmp_path / "out")
    assert open_folder(tmp_path / "out").label_names == ("r0", "r1")
    assert "rule-adapter" in (tmp_path / "out" / "README.md").read_text()
    assert f"{models[2]}: its labels (id2label) are not those of {models[0]}" in refused(merge, models, tmp_path / "x")
