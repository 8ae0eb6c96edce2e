"""Model cards: what they tell, what the hub reads of them, and that texts from outside stay text."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from commands import pair_rows, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from refusals import refused
from tiny import tiny_causal_lm, tiny_pairs, tiny_pool

from adaptrm.card.files import Baseline, Examples, Overlap, Pool, Result, Subset, read_file
from adaptrm.card.license import DUTIES, License, license_of
from adaptrm.card.markdown import data_name, model_name, one_line
from adaptrm.card.page import About, model_card
from adaptrm.config import parse_options
from adaptrm.data.labels import Label, write_labels
from adaptrm.errors import InputError
from adaptrm.export import export_run
from adaptrm.merge import merge
from adaptrm.reward_model import RewardModel
from adaptrm.train.run import train

PAD = ("<|endoftext|>", 0)
RESULT = {
    "suite": "rewardbench",
    "model": "runs/reward",
    "dtype": "float32",
    "n": 300,
    "accuracy": 0.81,
    "ci95": [0.76, 0.86],
    "overall": 0.8,
    "overall_ci95": [0.75, 0.85],
    "sections": {"Chat": 0.9, "Safety": 0.7},
    "sections_ci95": {"Chat": [0.85, 0.95], "Safety": [0.6, 0.8]},
    "subsets": {
        "mt-bench-easy": {"n": 100, "accuracy": 0.9, "ci95": [0.8, 1.0]},
        "donotanswer": {"n": 200, "accuracy": 0.7, "ci95": [0.6, 0.8]},
    },
    "baselines": {"longer": {"accuracy": 0.55, "overall": 0.5, "sections": {"Chat": 0.6, "Safety": 0.4}}},
    "margins": {"mean": 1.0},
}
OVERLAP = {
    "train": "/home/someone/pairs.jsonl",
    "suite": "allenai/reward-bench",
    "train_rows": 1000,
    "suite_rows": 200,
    "train_rows_overlapping": 12,
    "suite_rows_overlapping": 3,
    "examples": [{"words": "a secret text"}],
}


def card_data(card: str):
    from huggingface_hub import ModelCard

    return ModelCard(card).data


def blocks(card: str):
    """The body of a card as Markdown reads it."""
    body = card.split("\n---\n", 1)[1]
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(body)


def shape(card: str) -> list:
    """What it is made of, without the texts: blocks, and within them links, code, emphasis, HTML."""
    return [
        (token.type, token.level, *(child.type for child in token.children or () if child.type != "text"))
        for token in blocks(card)
    ]


def said(card: str) -> str:
    """Its texts as they are shown."""
    return "\n".join("".join(c.content for c in token.children or ()) for token in blocks(card))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run on labels with some general pairs mixed in, from a model whose card states a license."""
    folder = tmp_path_factory.mktemp("card")
    tiny_causal_lm(folder / "base")
    (folder / "base" / "README.md").write_text("---\nlanguage: en\nlicense: llama3.1\n---\n# Base\n")
    pairs = [replace(p, preferred="a") for p in tiny_pairs(8)]
    labels = (Label(p.id, p.prompt, p.response_a, p.response_b, ("r0",), 0.5, 0.9) for p in pairs)
    write_labels(folder / "labels.jsonl", labels)
    write_rows(folder / "pairs.jsonl", pair_rows(pairs))
    write_rows(folder / "general.jsonl", pair_rows([replace(p, id=f"g{p.id}") for p in pairs]))
    (folder / "pool.yaml").write_text(tiny_pool().to_yaml())
    section = {
        "model": {"pretrained": str(folder / "base"), "remat": "none", "average_with_start": 0.25},
        "data": {
            "pairs": str(folder / "pairs.jsonl"),
            "labels": str(folder / "labels.jsonl"),
            "mix": [{"pairs": str(folder / "general.jsonl"), "weight": 0.5}],
            "rules": str(folder / "pool.yaml"),
            "row_length": 512,
            "rows_per_step": 8,
        },
        "loss": {"soft_labels": True, "label_smoothing": 0.1},
        "optimizer": {"learning_rate": 3e-4, "warmup_steps": 0},
        "epochs": 2,
    }
    train("reward", parse_options(section, "test"), folder / "run")
    return folder / "run"


def test_the_card_of_a_run(run, tmp_path):
    (tmp_path / "result.json").write_text(json.dumps(RESULT))
    (tmp_path / "overlap.json").write_text(json.dumps(OVERLAP))
    more = {"results": [str(tmp_path / "result.json")], "overlaps": [str(tmp_path / "overlap.json")]}
    export_run(run, tmp_path / "Llama-mine", **more)
    card = (tmp_path / "Llama-mine" / "README.md").read_text()
    text = said(card)
    for expected in (
        "Built with Llama.",
        "Started from: base.",
        "labels.jsonl",
        "general.jsonl",
        "12 pairs, mixed 4.",
        f"Pool tiny, version 1: 6 rules; SHA-256 of their ids, texts and signs: {tiny_pool().hash}.",
        "Loss: Bradley-Terry, soft labels, label smoothing 0.1.",
        "adamw, learning rate 0.0003, linear schedule, 0 steps of warmup",
        "Epochs: 2; computed in float32; seed 0.",
        "whose share is 0.25 (WiSE-FT)",
        "Intended use",
        "Limits",
        'its name begins with "Llama"',
        DUTIES["llama3.1"].notice,
        "Where a model labelled the pairs",
    ):
        assert expected in text, expected
    for hidden in (str(run.parent), "/home/someone", "a secret text", "\\/"):
        assert hidden not in card
    for row in (
        ["RewardBench, float32", "rows", "accuracy %", "95 % interval", "longer"],
        ["all", "300", "81.0", "76.0 to 86.0", "55.0"],
        ["overall", "", "80.0", "75.0 to 85.0", "50.0"],
        ["section Safety", "", "70.0", "60.0 to 80.0", "40.0"],
        ["donotanswer", "200", "70.0", "60.0 to 80.0", ""],
        ["allenai/reward-bench", "200", "3 (1.5 %)", "pairs.jsonl", "1000", "12 (1.2 %)"],
    ):
        assert f"| {' | '.join(row)} |\n" in card, row
    data = card_data(card)
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "text-classification", "llama3.1")
    assert data.tags == ["adaptrm", "reward-model"] and data.base_model is None  # it is a folder here
    assert data.model_name == "Llama-mine"
    found = {result.metric_name: result for result in data.eval_results}
    assert found.keys() == {f"{name} (float32)" for name in ("accuracy", "overall", "Chat", "Safety")}
    assert found["accuracy (float32)"].metric_value == 0.81
    assert found["Chat (float32)"].dataset_type == "allenai/reward-bench"
    # The run's own export says the same, but for what was measured later.
    own = said((run / "export" / "README.md").read_text())
    assert "12 pairs, mixed 4." in own and "RewardBench" not in own


def test_a_run_of_before_and_what_is_read_and_saved_again(run, tmp_path):
    told = run / "examples.json"
    kept = told.read_bytes()
    told.unlink()
    try:
        export_run(run, tmp_path / "before")
    finally:
        told.write_bytes(kept)
    text = said((tmp_path / "before" / "README.md").read_text())
    assert "labels.jsonl" in text and "12 pairs" not in text and "Pool" not in text
    RewardModel.from_pretrained(tmp_path / "before").save_pretrained(tmp_path / "again")
    card = (tmp_path / "again" / "README.md").read_text()
    assert "Started from: before." in said(card) and card_data(card).license == "llama3.1"
    merge([str(run), str(tmp_path / "before")], tmp_path / "merged")
    card = (tmp_path / "merged" / "README.md").read_text()
    assert card_data(card).license == "llama3.1" and card_data(card).tags == ["adaptrm", "reward-model", "merge"]
    assert "Built with Llama." in said(card)
    (tmp_path / "before" / "README.md").write_text("---\nlicense: mit\n---\n")
    merge([str(run), str(tmp_path / "before")], tmp_path / "merged")
    card = (tmp_path / "merged" / "README.md").read_text()
    assert card_data(card).license is None and "Not known: no card of" in said(card)


@pytest.mark.parametrize(
    ("matter", "expected"),
    [
        ("license: apache-2.0", License("apache-2.0")),
        ("license: other\nlicense_name: llama3\nlicense_link: LICENSE", License("other", "llama3")),
        (
            "license: other\nlicense_name: own-1\nlicense_link: https://example.org/own",
            License("other", "own-1", "https://example.org/own"),
        ),
        ("language: en", None),
        ("license:\n- mit\n- apache-2.0", None),
        ("license: 'mit\n\n  tags: x'", None),
        ("license: '[mit](https://evil.example)'", None),
        ("license: !!python/object:os.system x", None),
        ("license: &a mit\nb: *a", None),
        ("- license", None),
        ("license: " + "m" * 65, None),
        ("license: other\nlicense_link: javascript:alert(1)", License("other")),
    ],
)
def test_a_license_is_what_the_base_models_card_states(tmp_path, matter, expected):
    (tmp_path / "README.md").write_text(f"---\n{matter}\n---\n# Base\n")
    assert license_of(tmp_path) == expected
    if expected is not None:
        data = card_data(model_card("reward", "float32", PAD, About(models=["base"], license=expected)))
        assert {name: data.get(name) for name in vars(expected)} == vars(expected)


@pytest.mark.parametrize("content", [b"", b"# Base", b"---\nlicense: mit\n", b"\xff\xfe", b"license: mit\n---\n"])
def test_no_license_is_made_up(tmp_path, content):
    (tmp_path / "README.md").write_bytes(content)
    assert license_of(tmp_path) is None and license_of(None) is None and license_of(tmp_path / "none") is None
    card = model_card("reward", "float32", PAD, About(models=["base"]))
    assert "license" not in card_data(card).to_dict() and "Not known" in said(card) and "Built with" not in said(card)


def test_duties_by_license():
    for name, duty in DUTIES.items():
        for license in (License(name), License("other", name)):
            text = said(model_card("judge", "float32", PAD, About(models=["a/b"], license=license)))
            assert f"{duty.shown}." in text and duty.notice in text and f'its name begins with "{duty.prefix}"' in text
    assert License("llama3").duty.shown == "Built with Meta Llama 3" and License("llama3").duty.prefix == "Llama 3"
    assert License("LLAMA3.2").duty.shown == "Built with Llama" and License("apache-2.0").duty is None


HOSTILE = st.one_of(
    st.text(max_size=60),
    st.sampled_from(
        [
            "a\n---\nlicense: mit\n---\n",
            "a | b | c",
            "```\ncode\n```",
            "`x`",
            "# heading",
            "\n# heading\n\ntext",
            "- item",
            "[link](https://evil.example)",
            "![x](https://evil.example/x.png)",
            "<script>alert(1)</script>",
            "<https://evil.example>",
            "https://evil.example",
            "www.evil.example",
            "@someone #1 :tada: $x$",
            "**bold** _it_ ~~gone~~",
            "\\| \\",
            "&lt;b&gt;",
            "[ref]: https://evil.example",
            "!!python/object:os.system",
            "{{ 7 * 7 }} {0} %s",
            "\x1b[2J\u202e\u2028\x85",
            "a" * 500,
        ]
    ),
)


def about(text: str) -> About:
    """A card that has a text everywhere."""
    section = {
        "model": {"pretrained": text, "checkpoint": text},
        "data": {"pairs": text, "labels": text, "mix": [{"pairs": text, "labels": text}], "drop_overlap": [text]},
    }
    subset, baseline = Subset(1, 0.5, (0.4, 0.6)), Baseline(0.5, None, {text: 0.5})
    result = Result(f"s{text}", 1, 0.5, f"d{text}", None, None, None, {text: 0.5}, {}, {text: subset}, {text: baseline})
    return About(
        name=text,
        models=[text],
        options=parse_options(section, "test"),
        examples=Examples(1, "pairs", {text: 1}, Pool(text, text, 1, text)),
        results=[result],
        overlaps=[Overlap(f"t{text}", f"s{text}", 2, 1, 2, 1)],
    )


@settings(max_examples=60)
@given(text=HOSTILE)
@pytest.mark.parametrize("kind", ["reward", "adapter"])
def test_texts_from_outside_stay_text(kind, text):
    card = model_card(kind, "float32", (text, 1), about(text))
    assert shape(card) == shape(model_card(kind, "float32", ("x", 1), about("x")))
    # All of it is one block of YAML and what comes after, with the values that went in.
    data = card_data(card)
    known = {"library_name", "pipeline_tag", "tags", "base_model", "datasets", "model-index"}
    assert data.to_dict().keys() <= known and data.tags[0] == "adaptrm"
    assert data.model_name == one_line(text)
    (result,) = about(text).results
    assert {found.metric_name for found in data.eval_results} == {
        one_line(f"{name} ({result.dtype})") for name in ("accuracy", text)
    }
    assert data.eval_results[0].dataset_name == one_line(result.suite)
    shown = one_line(model_name(text)).strip()
    assert " ".join(shown.split()) in " ".join(said(card).split())


def test_links_of_bare_addresses_are_none():
    """GitHub and the hub make links of addresses and mentions that CommonMark leaves alone."""
    card = model_card("reward", "float32", PAD, about("https://evil.example www.evil.example me@evil.example @x"))
    body = card.split("\n---\n", 1)[1]
    assert "https://evil" not in body and "www.evil" not in body and "\\@evil" in body and " @x" not in body


def test_a_model_from_random_weights():
    card = model_card("judge", "float32", (None, None), About(options=parse_options({}, "test")))
    assert "Started from: random weights." in said(card) and "cross-entropy of the answers Yes" in said(card)


def test_names_are_those_of_files_alone():
    assert (
        data_name("/home/me/secret/pairs.jsonl.gz")
        == data_name("s3://bucket/secret/pairs.jsonl.gz")
        == "pairs.jsonl.gz"
    )
    assert data_name("owner/name:train") == "owner/name:train"
    assert model_name("/home/me/runs/reward/export") == "reward/export" and model_name("runs/me/reward/") == "reward"
    assert model_name("gs://b/runs/reward/checkpoints/100") == "reward/checkpoints/100"
    assert model_name("owner/name") == "owner/name"
    data = card_data(model_card("reward", "float32", PAD, replace(about("owner/name"), weights=())))
    assert data.base_model == ["owner/name"] and data.datasets == ["owner/name"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"accuracy": 1.2}, "accuracy: Input should be less than or equal to 1"),
        ({"accuracy": float("nan")}, "accuracy: Input should be a finite number"),
        ({"accuracy": None}, "accuracy: Input should be a valid number"),
        ({"suite": " \n"}, "suite: String should have at least 1 character"),
        ({"suite": 3}, "suite: Input should be a valid string"),
        ({"n": -1}, "n: Input should be greater than or equal to 0"),
        ({"sections": [1]}, "sections: Input should be an object"),
        ({"subsets": {"a\nb": {"n": 1, "accuracy": "x"}}}, "subsets.a b.accuracy: Input should be a valid number"),
        ({"ci95": [0.1]}, "ci95.1: Field required"),
    ],
)
def test_files_that_are_no_results_are_one_line(tmp_path, change, message):
    (tmp_path / "r.json").write_text(json.dumps(RESULT | change))
    said = refused(read_file, tmp_path / "r.json", Result)
    assert said.startswith(f"{tmp_path}/r.json: {message}") and said.endswith("give a file that adaptrm evaluate wrote")


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"[" * 10_000, b'{"suite": "\\ud800", "n": 1}'])
def test_files_that_are_no_json_are_one_line(tmp_path, content):
    (tmp_path / "r.json").write_bytes(content)
    for kind in (Result, Overlap, Examples):
        assert "give a file that adaptrm" in refused(read_file, tmp_path / "r.json", kind)
    with pytest.raises(InputError, match="does not exist"):
        read_file(tmp_path / "none.json", Result)


def test_what_evaluate_writes_is_read(run, tmp_path):
    from adaptrm.evaluate import SUITES, evaluate

    sets = SUITES["pairs"].read(
        write_rows(tmp_path / "p.jsonl", pair_rows([replace(p, preferred="a") for p in tiny_pairs(6)])), None
    )
    scorer = lambda some: [np.arange(len(one.responses), dtype=np.float32) for one in some]  # noqa: E731
    names = {"name": "pairs", "model": "m", "dtype": "float32"}
    result = evaluate(scorer, SUITES["pairs"], sets, tmp_path / "r.json", **names)
    read = read_file(tmp_path / "r.json", Result)
    assert (read.n, read.accuracy, list(read.baselines)) == (6, result["accuracy"], list(result["baselines"]))
    card = model_card("reward", "float32", PAD, About(results=[read]))
    assert (
        "| all | 6 | 0.0 |" in card and "Started from: what is not known." in said(card) and "License" not in said(card)
    )


def test_what_overlap_writes_is_read(tmp_path):
    from adaptrm.data.overlap_report import overlap_report

    pairs = pair_rows([replace(p, preferred="a") for p in tiny_pairs(6)])
    overlap_report(
        write_rows(tmp_path / "t.jsonl", pairs), write_rows(tmp_path / "s.jsonl", pairs[:2]), tmp_path / "o.json"
    )
    read = read_file(tmp_path / "o.json", Overlap)
    assert (read.train_rows, read.suite_rows, read.suite_rows_overlapping) == (6, 2, 2)
