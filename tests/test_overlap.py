"""Contamination: which training rows hold the prompts or 13-grams of a suite, how that is counted, and left out."""

import gzip
import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from commands import pair_rows, write_rows
from hostile_texts import TEXTS
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused

from adaptrm.data import overlap
from adaptrm.data.overlap import KINDS, SuiteTexts, words_of
from adaptrm.data.overlap_report import for_people, overlap_report
from adaptrm.data.preferences import Pair, ResponseSet, read_pairs
from adaptrm.results import show


def said(text: str, *earlier: str) -> tuple[dict[str, str], ...]:
    """A prompt: what is said in turn, the last of it ``text``."""
    turns = [*earlier, text]
    return tuple({"role": ("user", "assistant")[(len(turns) - 1 - i) % 2], "content": t} for i, t in enumerate(turns))


def pair(id: str, prompt, a: str = "yes", b: str = "no", subset: str | None = None) -> Pair:
    return Pair(id, said(prompt) if isinstance(prompt, str) else prompt, a, b, "a", subset)


def numbered(start: int, count: int) -> str:
    """So many words that no other start has."""
    return " ".join(f"w{start}x{i}" for i in range(count))


def kinds(train: Pair | ResponseSet, suite: Pair | ResponseSet) -> set[str]:
    """How a training row overlaps with a suite of one row."""
    texts = SuiteTexts([suite])
    texts.count([train])
    number, at = texts.find([train])
    assert set(number.tolist()) <= {0} and texts.overlaps(train) == (len(at) > 0)
    return {KINDS[kind] for kind in texts.owners(at)[1]}


def report(train, suite, **options) -> dict:
    return overlap_report(pair_rows(train), pair_rows(suite), **options)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don't  STOP,\n\tnow!", ["dont", "stop", "now"]),
        ("a - b -- c *** d", ["a", "b", "c", "d"]),
        ("(x+y)^2 = $4", ["xy2", "4"]),
        ("“Größe”—ÉTÉ… e\u0301", ["größeété", "e\u0301"]),
        ("a\u00a0b\u2003c\u200bd", ["a", "b", "cd"]),
        ("नमस्ते 你好，世界。", ["नमस्ते", "你好世界"]),
        (" .,;!? 👩‍👩‍👧‍👦 ", []),
    ],
)
def test_words_are_lower_case_without_punctuation(text, words):
    assert words_of(text) == words


def test_the_same_prompt_is_found_whatever_its_case_and_white_space():
    suite = pair("s", "How  do I\nbake bread?")
    assert kinds(pair("t", " how do i BAKE bread?\t"), suite) == {"prompt"}
    assert kinds(pair("t", "How do I bake bread"), suite) == set(), "a prompt is compared with its punctuation"
    assert kinds(pair("t", "How do I bake bread? Please."), suite) == set()


def test_the_last_message_alone_is_found_where_one_of_both_is_alone():
    alone, other = pair("1", "Why?"), pair("2", "why?", "because", "so")
    dialogue, longer = (pair("3", said("Why?", "Snow is cold.", "Oh.")), pair("4", said("Why?", "It rains.", "Oh.")))
    system = pair("5", ({"role": "system", "content": "Be kind."}, *alone.prompt))
    assert kinds(alone, other) == kinds(alone, dialogue) == kinds(dialogue, alone) == {"prompt"}
    assert kinds(dialogue, longer) == set(), "two dialogues that end alike are two prompts"
    assert kinds(dialogue, replace(dialogue, id="6")) == {"prompt"}
    assert kinds(system, alone) == kinds(alone, system) == kinds(dialogue, system) == {"prompt"}
    swapped = tuple({"role": "system", "content": message["content"]} for message in dialogue.prompt[:1])
    assert kinds(pair("7", (*swapped, *dialogue.prompt[1:])), dialogue) == set(), "who says it counts"


def test_thirteen_words_are_found_in_every_part_and_twelve_in_none():
    words = numbered(1, 13)
    hidden = f"Well: {words}, indeed"
    places = [
        lambda text, n: pair(f"p{n}", f"{text} {numbered(90 + n, 3)}"),
        lambda text, n: pair(f"d{n}", said(f"end {n}", "middle", text)),
        lambda text, n: pair(f"m{n}", said(f"end {n}", text, "begin")),
        lambda text, n: pair(f"y{n}", ({"role": "system", "content": text}, *said(f"end {n}"))),
        lambda text, n: pair(f"a{n}", f"ask {n}", a=text),
        lambda text, n: pair(f"b{n}", f"ask {n}", b=text),
        lambda text, n: ResponseSet(f"s{n}", said(f"ask {n}"), ("yes", "no", "maybe", text), (1.0, 0.0, 0.0, 0.0)),
    ]
    for i, suite in enumerate(places):
        kind = "ngram_in_prompt" if i < 4 else "ngram_in_response"
        for train in places:
            assert kinds(train(hidden, 1), suite(hidden.upper(), 2)) == {kind}
            assert kinds(train(numbered(1, 12), 1), suite(hidden, 2)) == set()
            assert kinds(train(hidden, 1), suite(f"{numbered(1, 12)} other {numbered(1, 13)[-4:]}", 2)) == set()


def test_words_of_two_texts_are_no_run():
    halves = [numbered(1, 13)[: numbered(1, 13).index(" w1x7")], "w1x7 w1x8 w1x9 w1x10 w1x11 w1x12"]
    suite = pair("s", "q", a=" ".join(halves))
    assert kinds(pair("t", "r", a=suite.response_a), suite) == {"ngram_in_response"}
    assert kinds(pair("t", "r", *halves), suite) == set()
    assert kinds(pair("t", said(halves[1], halves[0], "begin")), suite) == set()


WORD = st.text("abcdefgh", min_size=1, max_size=3)


def dressed(draw, words: list[str]) -> str:
    """The words in any case, with any white space between them and any punctuation at and in them."""
    shown = []
    for word in words:
        cut = draw(st.integers(0, len(word)))
        word = word[:cut] + draw(st.sampled_from(["", "'", "-", ".", "*"])) + word[cut:]
        shown.append(draw(st.sampled_from(["", "(", '"'])) + draw(st.sampled_from([word, word.upper(), word.title()])))
        shown.append(draw(st.sampled_from([" ", "\n", "\t ", ", ", " - ", ". "])))
    return "".join(shown)


@settings(max_examples=40)
@given(st.data())
def test_a_planted_run_is_found_however_it_is_written(data):
    draw = data.draw
    ngram = [f"n{i}{draw(WORD)}" for i in range(13)]
    around = [draw(st.lists(WORD, max_size=20)) for _ in range(4)]
    suite_text, train_text = (
        dressed(draw, before + ngram + after) for before, after in zip(around[::2], around[1::2], strict=True)
    )
    rows = [
        lambda text: pair("x", said(f"{draw(WORD)} {draw(WORD)}?", text, "hm")),
        lambda text: pair("x", said(f"{draw(WORD)}!"), b=text),
    ]
    suite, train = (draw(st.sampled_from(rows))(text) for text in (suite_text, train_text))
    assert kinds(train, suite) - {"prompt"}
    # Without one of its words, which words around may not bring back, it is not.
    gone = draw(st.integers(0, 12))
    short = dressed(draw, around[2] + ngram[:gone] + ["zz"] + ngram[gone + 1 :] + around[3])
    alone = pair("s", "other", a=dressed(draw, ngram))
    assert kinds(pair("t", "this", a=train_text), alone) == {"ngram_in_response"}
    assert kinds(pair("t", "this", a=short), alone) == set()


def reference(train: Pair, suite: Pair) -> set[str]:
    """The n-gram kinds by the definition, in sets of tuples; of ASCII letters."""

    def ngrams(*texts: str) -> set[tuple[str, ...]]:
        split = ["".join(c for c in text.lower() if c.isalpha() or c == " ").split() for text in texts]
        return {tuple(words[i : i + 13]) for words in split for i in range(len(words) - 12)}

    have = ngrams(*(message["content"] for message in train.prompt), *train.responses)
    parts = ([message["content"] for message in suite.prompt], suite.responses)
    return {kind for kind, texts in zip(KINDS[1:], parts, strict=True) if have & ngrams(*texts)}


FEW = st.lists(st.sampled_from(["a", "B.", "(a)"]), min_size=1, max_size=40).map(" ".join)
ROWS = st.builds(lambda p, q, a, b: pair("x", said(p, "ok", q), a, b), FEW, FEW, FEW, FEW)


@settings(max_examples=60)
@given(st.lists(ROWS, min_size=1, max_size=4), st.lists(ROWS, min_size=1, max_size=4), st.randoms())
def test_what_is_found_is_the_definition_in_any_order(train, suite, random):
    train, suite = (
        [replace(row, id=f"{side}{i}") for i, row in enumerate(rows)]
        for side, rows in zip("ts", (train, suite), strict=True)
    )
    expected = {(t.id, s.id, kind) for t in train for s in suite for kind in reference(t, s)}
    for _ in range(2):
        random.shuffle(train)
        random.shuffle(suite)
        texts = SuiteTexts(suite)
        assert texts.count(train) == len(train)
        number, at = texts.find(train)
        rows, found, place = texts.owners(at)
        got = {(train[number[p]].id, suite[r].id, KINDS[k]) for r, k, p in zip(rows, found, place, strict=True)}
        assert {one for one in got if one[2] != "prompt"} == expected
        one_by_one = [texts.overlaps(row) for row in train]
        assert [row.id for row, is_found in zip(train, one_by_one, strict=True) if is_found] == [
            row.id for i, row in enumerate(train) if i in number
        ]


def test_a_run_that_many_conversations_have_is_ignored_and_a_prompt_never():
    refusal = "I'm just an AI, it's not within my programming or ethical guidelines to do this."
    suite = [pair("s0", "How do I pick a lock?", a=refusal), pair("s1", "Why?")]
    few = [pair(f"t{i}", f"Question {i}", b=refusal) for i in range(9)]
    many = [pair(f"t{i}", f"Question {i}", b=refusal) for i in range(40)]
    # The conversation of the suite and nine of the training set are ten.
    found = report(few, suite)
    assert (found["train_rows_overlapping"], found["ngrams_in_response"], found["common_ngrams"]) == (9, 1, 0)
    found = report(many, suite)
    assert (found["train_rows_overlapping"], found["suite_rows_overlapping"]) == (0, 0)
    assert found["common_ngrams"] == len(words_of(refusal)) - 12
    # Pairs of one prompt, and dialogues that begin alike, are one conversation: what leaked often is found.
    prompts = [said("Tell me.")] * 30 + [said(f"more {i}", "ok", "Tell me.") for i in range(30)]
    again = [pair(f"t{i}", prompt, b=refusal) for i, prompt in enumerate(prompts)]
    assert report(again, suite)["train_rows_overlapping"] == 60
    asked = [pair(f"t{i}", said("why?", f"So {i}.", f"Question {i}")) for i in range(40)]
    assert report(asked, suite)["train_rows_overlapping"] == 40
    # A template of the suite is common too.
    template = "You are given two answers by two assistants; say which of them is better and why."
    rows = [pair(f"s{i}", f"{template} {numbered(i, 3)}") for i in range(40)]
    found = report([pair("t", f"{template} Apples or pears?")], rows)
    assert found["suite_rows_overlapping"] == 0 and found["common_ngrams"] > 0
    assert report([pair("t", f"{template} Apples or pears?")], rows[:9])["suite_rows_overlapping"] == 9


@given(st.integers(0, 9), st.integers(1, 10_000))
def test_ten_conversations_are_never_too_many(count, seed):
    run = numbered(1, 13)
    texts = SuiteTexts([pair("s", f"suite {seed}", a=run)])
    train = [pair(f"t{i}", f"train {seed} {i}", a=run) for i in range(count)]
    texts.count(train)
    assert all(map(texts.overlaps, train))
    # Thirty hardly ever are not.
    texts.count(pair(f"u{i}", f"more {seed} {i}", a=run) for i in range(30))
    assert not texts.overlaps(pair("t", f"train {seed} 0", a=run))


def test_what_was_counted_apart_is_joined():
    run = numbered(1, 13)
    suite, train = [pair("s", "suite", a=run)], [pair(f"t{i}", f"train {i}", a=run) for i in range(40)]
    whole, halves = SuiteTexts(suite), [SuiteTexts(suite) for _ in range(2)]
    whole.count(train)
    for half, part in zip(halves, (train[::2], train[1::2]), strict=True):
        half.count(part)
    np.testing.assert_array_equal(whole.conversations, halves[0].conversations | halves[1].conversations)
    assert not whole.overlaps(train[0])


def test_memory_does_not_grow_with_the_training_set():
    texts = SuiteTexts(pair(f"s{i}", f"suite {i}", a=numbered(i, 40)) for i in range(50))

    def peak(blocks: int) -> int:
        rows = (pair(f"t{i}", f"train {i}", numbered(i % 100, 40)) for i in range(blocks * overlap.ROWS_AT_ONCE))
        tracemalloc.start()
        texts.count(rows)
        return tracemalloc.get_traced_memory()[1]

    peak(1)  # words that are hashed for the first time
    few, many = peak(2), peak(12)
    tracemalloc.stop()
    assert many < 1.2 * few and texts.seen.any()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """A suite of two subsets, and a training set of which three of five rows overlap with it."""
    out = tmp_path_factory.mktemp("files")
    suite = [
        pair("s0", "How do I bake bread?", subset="easy"),
        pair("s1", numbered(1, 20), numbered(2, 13), numbered(3, 13), subset="hard"),
        pair("s2", "Quite another thing", numbered(2, 14), subset="hard"),
        pair("s3", "Alone", subset="hard"),
    ]
    train = [
        pair("t0", "how do I bake  BREAD?"),
        pair("t1", f"{numbered(9, 2)}, {numbered(1, 13)}", numbered(2, 13)),
        pair("t2", "Of nothing", numbered(4, 40)),
        pair("t3", said("How do I bake bread?", "Hello.", "Hi!")),
        pair("t4", "Nor of this", numbered(1, 12), numbered(3, 12)),
    ]
    labels = [
        {"id": p.id, "prompt": list(p.prompt), "chosen": [{"role": "assistant", "content": p.response_a}]}
        | {"rejected": [{"role": "assistant", "content": p.response_b}], "rules": [], "probability": 0.75}
        for p in train
    ]
    rows = {"suite": pair_rows(suite), "train": pair_rows(train), "labels": labels}
    return {name: write_rows(out / f"{name}.jsonl", some) for name, some in rows.items()}


COUNTS = {
    "suite_rows": 4,
    "suite_rows_overlapping": 3,
    "train_rows_overlapping": 3,
    "exact_prompts": 1,
    "ngrams": 2,
    "ngrams_in_prompt": 1,
    "ngrams_in_response": 2,
}


@pytest.mark.parametrize("train", ["train", "labels"])
def test_the_counts_by_hand(files, train, tmp_path, capsys):
    out = tmp_path / "overlap.json"
    found = overlap_report(str(files[train]), str(files["suite"]), out)
    assert json.loads(out.read_text()) == found
    assert {name: found[name] for name in COUNTS} == COUNTS
    assert (found["train"], found["suite"], found["train_rows"]) == (str(files[train]), str(files["suite"]), 5)
    assert (found["train_share"], found["suite_share"]) == (3 / 5, 3 / 4)
    assert found["subsets"] == {
        "easy": COUNTS
        | {"suite_rows": 1, "suite_rows_overlapping": 1, "train_rows_overlapping": 2}
        | {"ngrams": 0, "ngrams_in_prompt": 0, "ngrams_in_response": 0},
        "hard": COUNTS
        | {"suite_rows": 3, "suite_rows_overlapping": 2, "train_rows_overlapping": 1, "exact_prompts": 0},
    }
    examples = {(one["train"], one["suite"], one["kind"]): one["words"] for one in found["examples"]}
    assert examples[("t0", "s0", "prompt")] == "how do i bake bread"
    assert words_of(numbered(1, 13)) == examples[("t1", "s1", "ngram_in_prompt")].split()
    assert ("t1", "s1", "ngram_in_response") in examples and ("t1", "s2", "ngram_in_response") not in examples
    show(for_people(found), False)
    printed = " ".join(capsys.readouterr().out.split())
    assert "3 of 5 (60.0 %)" in printed and "3 of 4 (75.0 %)" in printed
    assert "All rows 4 3 1 1 2 3" in printed and "hard 3 2 0 1 2 1" in printed


def test_however_many_rows_are_hashed_at_once(files, monkeypatch):
    given = (str(files["train"]), str(files["suite"]))
    together = overlap_report(*given)
    monkeypatch.setattr(overlap, "ROWS_AT_ONCE", 2)
    apart = overlap_report(*given)
    assert apart == together and apart["examples"]


def test_a_few_examples_are_kept_each_of_another_row_of_the_suite():
    suite = [pair(f"s{i}", f"Question {i}", numbered(i, 13)) for i in range(8)]
    train = [pair(f"t{i}", f"Question {i // 3}", numbered(i // 3, 13)) for i in range(24)]
    found = report(train, suite)
    assert found["train_rows_overlapping"] == 24 and found["suite_rows_overlapping"] == 8
    for kind in ("prompt", "ngram_in_response"):
        examples = [one for one in found["examples"] if one["kind"] == kind]
        assert [(one["train"], one["suite"]) for one in examples] == [(f"t{3 * i}", f"s{i}") for i in range(5)]


def test_a_best_of_n_row_is_one_row(tmp_path):
    sets = [
        {
            "id": "n0",
            "prompt": "One",
            "chosen_list": ["yes"],
            "rejected_list": ["no", numbered(1, 13)],
            "subset": "bon",
        },
        {"id": "n1", "prompt": "Two", "chosen_list": ["ja", "da"], "rejected_list": ["nein"], "subset": "bon"},
    ]
    pairs = [pair("p", f"{numbered(1, 13)} so?")]
    for train, suite in ((sets, pair_rows(pairs)), (pair_rows(pairs), sets)):
        found = overlap_report(train, suite)
        assert (found["train_rows"], found["suite_rows"]) == (len(train), len(suite))
        assert (found["train_rows_overlapping"], found["suite_rows_overlapping"]) == (1, 1)
    assert found["subsets"]["bon"]["suite_rows"] == 2 and found["examples"][0]["suite"] == "n0"
    # A reader of pairs makes pairs of them.
    assert overlap_report(pair_rows(pairs), sets, read=read_pairs)["suite_rows"] == 4


def test_an_id_may_come_again_and_rows_are_read_packed(tmp_path):
    rows = [{"id": 1, "subset": subset, "prompt": f"Why {subset}?", "chosen": "a", "rejected": "b"} for subset in "xy"]
    file = tmp_path / "suite.jsonl.gz"
    file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    found = overlap_report([rows[1] | {"id": "t"}], str(file))
    assert {name: counts["exact_prompts"] for name, counts in found["subsets"].items()} == {"x": 0, "y": 1}


def test_wrong_input_is_one_line(files, tmp_path):
    train, suite = str(files["train"]), str(files["suite"])
    assert "results are JSON; give --out FILE.json" in refused(overlap_report, train, suite, tmp_path / "out.txt")
    same = tmp_path / "same.json"
    same.write_text(files["suite"].read_text())
    before = same.read_bytes()
    assert refused(overlap_report, train, str(same), same).startswith(f"{same}: is what is read")
    assert refused(overlap_report, str(same), suite, same).startswith(f"{same}: is what is read")
    assert same.read_bytes() == before
    assert "is read twice" in refused(overlap_report, (row for row in []), suite)
    empty = write_rows(tmp_path / "empty.jsonl", [])
    assert refused(overlap_report, str(empty), suite) == f"{empty}: has no rows; there is nothing to compare"
    assert refused(overlap_report, train, str(empty)) == f"{empty}: has no rows; there is nothing to compare"
    assert "does not exist" in refused(overlap_report, str(tmp_path / "gone.jsonl"), suite)
    bad = tmp_path / "bad.jsonl"
    bad.write_text(files["train"].read_text() + '{"prompt": "p", "chosen": "", "rejected": "r"}\n{"broken\n')
    out = tmp_path / "out.json"
    for both in ((str(bad), suite), (train, str(bad))):
        assert "bad.jsonl: line 6: " in refused(overlap_report, *both, out)
    assert not out.exists(), "nothing is written of half a comparison"
    found = overlap_report(str(bad), suite, out, on_bad_row="skip")
    assert found["skipped_rows"] == 2 and {name: found[name] for name in COUNTS} == COUNTS
    assert overlap_report(train, str(bad), on_bad_row="skip")["skipped_rows"] == 2


def test_hostile_texts_are_compared_as_texts_and_shown_as_such(capsys):
    texts = [*TEXTS, "[bold red]x[/] \x1b[31m", "\x1b]0;title\x07 y"]
    suite = [pair(f"s{i}\x1b[2J", text, text, subset=f"[red]{text[:40]}") for i, text in enumerate(texts)]
    train = [pair(f"t{i}", text, f"{text} {text}") for i, text in enumerate(texts)]
    found = report(train, suite)
    assert found["exact_prompts"] == found["suite_rows"] == found["train_rows_overlapping"] == len(texts)
    capsys.readouterr()
    show(for_people(found), False)
    printed = capsys.readouterr().out
    assert "[red]" in printed and all(c.isprintable() or c == "\n" for c in printed)
