"""Cutting from the left: only where asked, oldest first, as little as possible, never past the last characters."""

import numpy as np
import pytest
from commands import pair_rows, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused
from tiny import TOKENIZERS, tiny_pairs, tiny_pool, tiny_tokenizer

from adaptrm.data.chat import ChatTokenizer
from adaptrm.data.chat_trees import pair_length, pair_tree
from adaptrm.data.preferences import ROLES, Pair, load_pairs
from adaptrm.data.rows import BadRows, source_hash
from adaptrm.data.scores import Scores, write_manifest, write_part
from adaptrm.data.truncation import Truncation, truncated, usable
from adaptrm.errors import InputError
from adaptrm.judge.prompts import JudgePrompt
from adaptrm.judge.score import question_length
from adaptrm.label import LabelJob, label


def says(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def characters(pair: Pair) -> int:
    """A length that tests can work out by hand."""
    return sum(len(m["content"]) for m in pair.prompt) + max(len(pair.response_a), len(pair.response_b))


PAIR = Pair(
    "p",
    (says("system", "SYS"), says("user", "first"), says("assistant", "reply"), says("user", "again")),
    "longer response",
    "short",
    "b",
    "s",
)


@pytest.mark.parametrize(
    ("limit", "prompt", "responses"),
    [
        (33, PAIR.prompt, ("longer response", "short")),
        (32, (says("system", "YS"), *PAIR.prompt[1:]), ("longer response", "short")),
        (30, PAIR.prompt[1:], ("longer response", "short")),
        (26, (says("user", "t"), *PAIR.prompt[2:]), ("longer response", "short")),
        # Its question is gone, so the reply goes too.
        (25, PAIR.prompt[3:], ("longer response", "short")),
        (17, (says("user", "in"),), ("longer response", "short")),
        (16, (says("user", "n"),), ("longer response", "short")),
        # Both responses keep as many of their last characters.
        (7, (says("user", "n"),), ("sponse", "short")),
        (4, (says("user", "n"),), ("nse", "ort")),
        (2, (says("user", "n"),), ("e", "t")),
    ],
)
def test_the_oldest_goes_first(limit, prompt, responses):
    cut = truncated(PAIR, characters, limit)
    assert (cut.prompt, (cut.response_a, cut.response_b)) == (tuple(prompt), responses)
    assert (cut.id, cut.preferred, cut.subset) == ("p", "b", "s")


def test_what_cannot_fit_is_an_error():
    with pytest.raises(
        InputError, match="pair 'p': has 2 tokens with all but its last characters cut, more than 1; raise"
    ):
        truncated(PAIR, characters, 1)


def test_nothing_is_cut_unless_asked():
    unlimited, limited = Truncation(characters, None), Truncation(characters, 40)
    assert unlimited(PAIR) is PAIR and limited(PAIR) is PAIR
    assert unlimited.count == limited.count == 0
    shorter = Truncation(characters, 20)
    assert characters(shorter(PAIR)) == 20 and shorter.count == 1


TEXT = st.text(max_size=30)
TURNS = st.lists(st.builds(says, st.sampled_from(ROLES), TEXT), max_size=5)


@given(TURNS, TEXT, st.text(min_size=1), st.text(min_size=1), st.integers(1, 80))
def test_what_is_left_is_the_end_of_what_was_there(turns, last, a, b, limit):
    pair = Pair("p", (*turns, says("user", last)), a, b)
    try:
        cut = truncated(pair, characters, limit)
    except InputError:
        assert limit < 1 + bool(last)
        return
    assert characters(cut) <= limit
    assert cut is pair or characters(pair) > limit
    assert a.endswith(cut.response_a) and b.endswith(cut.response_b) and cut.response_a and cut.response_b
    assert cut.prompt[-1]["role"] == "user" and last.endswith(cut.prompt[-1]["content"])
    assert bool(cut.prompt[-1]["content"]) == bool(last)
    kept = pair.prompt[len(pair.prompt) - len(cut.prompt) :]
    assert [m["role"] for m in cut.prompt] == [m["role"] for m in kept]
    assert [m["content"] for m in cut.prompt[1:]] == [m["content"] for m in kept[1:]]
    assert kept[0]["content"].endswith(cut.prompt[0]["content"])
    # The prompt is not left unless it has given all.
    if (cut.response_a, cut.response_b) != (a, b):
        assert len(cut.prompt) == 1 and len(cut.prompt[0]["content"]) <= 1
    swapped = truncated(Pair("p", pair.prompt, b, a), characters, limit)
    assert (swapped.prompt, swapped.response_b, swapped.response_a) == (cut.prompt, cut.response_a, cut.response_b)


@pytest.fixture(scope="module", params=TOKENIZERS)
def chat(request, tmp_path_factory) -> ChatTokenizer:
    folder = tmp_path_factory.mktemp(request.param)
    tiny_tokenizer(folder, request.param)
    return ChatTokenizer.from_folder(folder)


# A hundred thousand characters each, of what regular expressions and tokenizers find hardest.
LONG = {
    "words": "It rests, then waits. " * 4600,
    "one word": "a" * 100_000,
    "blanks": "x" + " " * 100_000 + "x",
    "lines": "\n" * 100_000 + "x",
    "headings": "\n#" * 50_000,
    "lines and blanks": "\n   " * 25_000 + "x",
    "turns": "\n\nHuman:" * 12_500,
    "special tokens": "<|im_end|>" * 10_000,
    "emoji": "👩‍🚀" * 33_400,
    "right to left": "שלום " * 20_000,
    "NUL": "\0" * 100_000,
}


@pytest.mark.parametrize("name", LONG)
def test_hundred_thousand_characters(chat, name):
    """A quadratic step would take hours here."""
    text = LONG[name]
    assert len(text) >= 100_000
    (pair,) = load_pairs([{"prompt": "How do I bake bread?", "response_a": text, "response_b": "Mix flour."}])
    assert pair.response_a == text
    prompt = JudgePrompt(chat, tiny_pool(3))
    limits = {300: lambda pair: pair_length(chat, pair), 500: question_length(prompt)}
    tree = pair_tree(chat, pair, 0)
    assert len(tree) >= limits[300](pair) > 10_000
    (questions,) = prompt.pair_trees(pair.prompt, text, "Mix flour.", range(3))
    assert len(questions.tree) > 10_000
    for limit, length in limits.items():
        cut = truncated(pair, length, limit)
        assert limit - 60 < length(cut) <= limit
        assert text.endswith(cut.response_a) and cut.response_b == pair.response_b


@settings(max_examples=40)
@given(st.lists(st.text(max_size=60), min_size=2, max_size=4), st.text(min_size=1, max_size=300), st.integers(40, 140))
def test_real_tokens_fit_however_they_merge(chat, said, response, limit):
    turns = [says(("user", "assistant")[i % 2], text) for i, text in enumerate(said[: len(said) // 2 * 2])]
    pair = Pair("p", (*turns, says("user", "And then?")), response, "No.")
    cut = truncated(pair, lambda p: pair_length(chat, p), limit)
    assert pair_length(chat, cut) <= limit
    assert cut is pair or pair_length(chat, pair) > limit
    # A template that wants turns to be taken still gets them.
    assert [m["role"] for m in cut.prompt] == ["user", "assistant"] * (len(cut.prompt) // 2) + ["user"]


def test_the_judge_is_asked_no_longer_question_than_the_limit(chat):
    prompt = JudgePrompt(chat, tiny_pool(12))
    pair = Pair("p", (says("user", "How? " * 500),), "Mix flour. " * 400, "No.")
    cut = truncated(pair, question_length(prompt), 400)
    texts = [prompt.text(cut.prompt, side, rule) for rule in range(12) for side in (cut.response_a, cut.response_b)]
    assert 395 <= max(map(len, prompt.chat.encode_many(texts))) <= 400


def test_pairs_that_a_model_refuses_are_bad_rows(capsys):
    pairs = tiny_pairs(3)

    def length(pair) -> int:
        if pair.id == "p1":
            raise InputError("pair 'p1': no system role")
        return len(pair.response_a)

    bad = BadRows("skip")
    assert list(usable(pairs, Truncation(length, None), bad, "pairs.jsonl")) == [pairs[0], pairs[2]]
    assert bad.count == 1 and capsys.readouterr().err == "skipped pairs.jsonl: pair 'p1': no system role\n"
    with pytest.raises(InputError, match=r"^pairs\.jsonl: pair 'p1': no system role$"):
        list(usable(pairs, Truncation(length, 10**6), BadRows(), "pairs.jsonl"))


@pytest.mark.parametrize("truncate_to", [None, 500])
def test_labels_go_past_pairs_that_could_not_be_cut_so_far(tmp_path, truncate_to):
    pairs = tiny_pairs(3)
    source = write_rows(tmp_path / "pairs.jsonl", pair_rows(pairs))
    manifest = {"rules": ["r"], "pairs": str(source), "pairs_sha256": source_hash(source), "count": 2, "parts": 1}
    write_manifest(tmp_path / "scores", manifest | {"on_bad_row": "skip", "truncate_to": truncate_to})
    one = np.ones((2, 1), np.float32)
    write_part(tmp_path / "scores", 0, Scores(["p0", "p2"], ["r"], one, -one, one, one, one, one, one))
    job = LabelJob(str(tmp_path / "scores"), str(tmp_path / "labels.jsonl"), k=1)
    if truncate_to is None:  # then none can be missing
        assert "pair 'p2' is 'p1' in" in refused(label, job)
    else:
        assert label(job)["labelled"] == 2
