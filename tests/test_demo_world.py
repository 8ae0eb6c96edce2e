"""The demo's worlds: what they plant is what their texts say, and neither order nor length gives it away."""

import re
from functools import cache

import numpy as np
import pytest

from adaptrm.data.chat import ChatTokenizer, choose_pad_token
from adaptrm.demo.tokenizer import PAD, make_tokenizer
from adaptrm.demo.world import (
    FORMS,
    GENERAL,
    PREFERENCE,
    PROMPTS,
    RULES,
    SAFE,
    WORLDS,
    demo_pool,
    make_pairs,
    rule_labels,
)
from adaptrm.judge.prompts import ANSWERS, JudgePrompt
from adaptrm.rules import RulePool
from adaptrm.selection import select

COUNT = 2000


@cache
def made(name):
    return make_pairs(name, COUNT, seed=3)


@pytest.fixture(params=WORLDS)
def name(request):
    return request.param


@pytest.fixture
def world(name):
    return made(name)


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    texts = (text for name in WORLDS for text in made(name).texts())
    return make_tokenizer(texts, tmp_path_factory.mktemp("tokenizer"))


def read(response: str) -> dict[str, int]:
    """What a response says about which rule, by its words alone: the last word names the rule, the verb the side."""
    found = {}
    for sentence in response.removesuffix(".").split(". "):
        words = set(re.findall(r"\w+", sentence.lower()))
        for rule, (_, keep, breach, thing) in RULES.items():
            sides = [stance for stance, verb in ((1, keep), (-1, breach)) if verb in words]
            if thing.split()[-1] in words and sides:
                assert len(sides) == 1 and rule not in found
                found[rule] = sides[0]
    return found


def test_the_pool_is_one_that_people_could_write(name):
    pool = demo_pool(name)
    assert 24 <= len(pool) <= 32 and set(pool.ids) <= set(RULES)
    assert RulePool.parse(pool.to_yaml(), "demo") == pool
    for rule in pool:
        assert rule.text.startswith("The response ") and rule.text.endswith(".") and rule.sign == 1
        assert re.fullmatch(r"[a-z]+(-[a-z]+)*", rule.id)
    assert {rule.category for rule in pool} == {*PREFERENCE[name], GENERAL, "form"}
    assert all(weights.keys() <= set(pool.ids) for weights in PREFERENCE[name].values())
    assert PREFERENCE[name].keys() <= PROMPTS.keys()


def test_few_rules_matter_for_a_sparse_prompt_and_all_of_substance_for_a_noisy_one():
    assert all(3 <= len(weights) <= 5 for weights in PREFERENCE["sparse"].values())
    pool = set(demo_pool("noisy").ids)
    assert all(weights.keys() == pool - set(FORMS) for weights in PREFERENCE["noisy"].values())


def test_a_verb_belongs_to_one_side_of_one_rule_and_the_rule_names_it():
    verbs = [verb for _, keep, breach, _ in RULES.values() for verb in (keep, breach)]
    assert len(set(verbs)) == 2 * len(RULES)
    for rule in demo_pool():
        assert set(RULES[rule.id][1:3]) <= set(re.findall(r"\w+", rule.text))


def test_the_same_seed_gives_the_same_world(name, world):
    again, other = make_pairs(name, COUNT, seed=3), make_pairs(name, COUNT, seed=4)
    assert again.pairs == world.pairs and np.array_equal(again.truth, world.truth)
    assert other.pairs != world.pairs
    assert list(rule_labels(world, 50, 4, seed=1)) == list(rule_labels(again, 50, 4, seed=1))


def test_ids_are_unique_and_categories_are_all_there(name, world):
    assert [pair.id for pair in world.pairs] == [f"{name}-{i:05d}" for i in range(COUNT)]
    counts = [sum(pair.subset == category for pair in world.pairs) for category in PREFERENCE[name]]
    assert sum(counts) == COUNT and min(counts) > COUNT / len(counts) / 2


def test_the_planted_truth_is_what_the_texts_say(world):
    assert world.truth.shape == (COUNT, 2, len(world.pool)) and world.truth.dtype == np.int8
    for pair, truth in zip(world.pairs, world.truth, strict=True):
        for response, row in zip((pair.response_a, pair.response_b), truth, strict=True):
            assert read(response) == {world.pool.ids[i]: int(row[i]) for i in np.flatnonzero(row)}


def test_the_preference_is_the_weighted_sum_of_the_rules_that_matter(name, world):
    ids = world.pool.ids
    for pair, truth in zip(world.pairs, world.truth.astype(int), strict=True):
        weights = PREFERENCE[name][pair.subset]
        margin = sum(w * (truth[0] - truth[1])[ids.index(rule)] for rule, w in weights.items())
        assert margin != 0 and pair.preferred == ("a" if margin > 0 else "b")


def test_rules_that_do_not_matter_apply_and_say_nothing_about_the_preference(name, world):
    z = np.array([1 if pair.preferred == "a" else -1 for pair in world.pairs])
    matters = np.array([[rule in PREFERENCE[name][pair.subset] for rule in world.pool.ids] for pair in world.pairs])
    discrepancy = world.truth[:, 0].astype(int) - world.truth[:, 1]
    aside, inside = (np.where(mask, discrepancy, 0).sum(axis=1) for mask in (~matters, matters))
    assert (np.abs(world.truth).sum(axis=1) * ~matters).sum(axis=1).min() >= 2
    assert abs(np.corrcoef(aside, z)[0, 1]) < 4 / COUNT**0.5
    assert np.corrcoef(inside, z)[0, 1] > 0.7


def test_every_noisy_response_has_a_form():
    form = [demo_pool("noisy").ids.index(rule) for rule in FORMS]
    kept = made("noisy").truth[:, :, form]
    assert np.abs(kept).min() == 1
    assert np.abs(kept.mean(axis=(0, 1))).max() < 4 / (2 * COUNT) ** 0.5


def test_each_side_of_the_theory_has_its_world():
    def agreement(name, strategy, k=4):
        """Of the labels of a judge that says what is planted."""
        pairs, truth = made(name).pairs, made(name).truth.astype(np.float32)
        chosen = select(truth[:, 0], truth[:, 1], np.abs(truth).mean(axis=1), strategy, k).preferred
        return np.mean(chosen == [1 if pair.preferred == "a" else -1 for pair in pairs])

    discrepancy, every, evidence = (agreement("noisy", name) for name in ("max-discrepancy", "all", "evidence"))
    assert discrepancy + 0.15 < every and every + 0.03 < evidence
    assert every + 0.08 < agreement("noisy", "evidence", len(demo_pool("noisy")))
    assert agreement("sparse", "max-discrepancy") > agreement("sparse", "all") + 0.02


def test_helping_is_judged_only_where_the_request_is_safe():
    assert "helps-safe-request" not in demo_pool("noisy").ids
    world = made("sparse")
    helps = world.pool.ids.index("helps-safe-request")
    for pair, truth in zip(world.pairs, world.truth, strict=True):
        assert pair.subset == SAFE or not truth[:, helps].any()


def test_neither_order_nor_length_gives_the_preference_away(world):
    z = np.array([1 if pair.preferred == "a" else -1 for pair in world.pairs])
    assert abs(z.mean()) < 4 / COUNT**0.5
    longer = np.array([len(pair.response_a) - len(pair.response_b) for pair in world.pairs])
    sentences = np.array([pair.response_a.count(".") - pair.response_b.count(".") for pair in world.pairs])
    for nuisance in (longer, sentences):
        assert not np.ptp(nuisance) or abs(np.corrcoef(nuisance, z)[0, 1]) < 4 / COUNT**0.5


def test_another_seed_brings_prompts_and_responses_never_seen(name, world):
    def texts(of):
        prompts = {pair.prompt[0]["content"] for pair in of.pairs}
        return prompts, {response for pair in of.pairs for response in (pair.response_a, pair.response_b)}

    prompts, responses = texts(world)
    new_prompts, new_responses = texts(make_pairs(name, 500, seed=4))
    assert len(new_prompts - prompts) > len(new_prompts) / 3
    assert len(new_responses - responses) > 0.95 * len(new_responses)


def test_rule_labels_follow_the_truth_and_leave_most_absent_rules_out(world):
    rows = list(rule_labels(world, 300, neither=4))
    assert len({row["id"] for row in rows}) == 300
    for row in rows:
        _, number, side = row["id"].split("-")
        number, side = int(number), "ab".index(side)
        pair = world.pairs[number]
        assert row["response"] == (pair.response_a, pair.response_b)[side] and row["prompt"] == list(pair.prompt)
        truth = dict(zip(world.pool.ids, world.truth[number, side].tolist(), strict=True))
        named = {None: 0, True: 1, False: -1}
        assert all(truth[rule] == named[label] for rule, label in row["labels"].items())
        assert sum(label is None for label in row["labels"].values()) == 4
        assert {rule for rule, stance in truth.items() if stance} <= row["labels"].keys()


def test_answers_are_single_tokens_and_the_prompt_is_few(chat, world):
    prompt = JudgePrompt(chat, world.pool)
    assert not set(ANSWERS) & set(prompt.skipped)
    pair = world.pairs[0]
    (questions,) = prompt.reply_trees(pair.prompt, pair.response_a, range(len(world.pool)))
    tree = questions.tree
    said = len(chat.encode(pair.prompt[0]["content"])) + len(chat.encode(pair.response_a))
    assert tree.leaves[0] + 1 < said + 20
    for rule in (0, 7, len(world.pool) - 1):
        whole = chat.encode(prompt.text(pair.prompt, pair.response_a, rule))
        assert np.array_equal(tree.sequence(rule), whole)


def test_responses_are_short(chat, world):
    lengths = [len(chat.encode(pair.response_a)) for pair in world.pairs[:200]]
    assert 30 <= np.mean(lengths) <= 80 and max(lengths) <= 110


def test_the_pad_token_never_ends_a_sequence(chat, world):
    name, number = choose_pad_token(chat)
    assert name == PAD and number == chat.tokenizer.pad_token_id != chat.tokenizer.eos_token_id
    for pair in world.pairs[:50]:
        ids = chat.encode_chat(pair.conversation("a"))
        assert number not in ids and ids[-1] == chat.tokenizer.eos_token_id


def test_the_tokenizer_keeps_any_text_and_renders_as_transformers_does(chat, world):
    odd = "Zażółć 🌱\n\n### Response\ntabs\t and <|end|>"
    assert chat.tokenizer.decode(chat.encode(odd)) == odd
    messages = world.pairs[0].conversation("b")
    rendered = chat.tokenizer.apply_chat_template(messages, tokenize=False)
    assert chat.tokenizer(rendered, add_special_tokens=False)["input_ids"] == chat.encode_chat(messages).tolist()


def test_the_same_texts_give_the_same_files(tmp_path):
    texts = list(made("noisy").texts())[:600]
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        make_tokenizer(texts, folder)
    for file in folders[0].iterdir():
        assert file.read_bytes() == (folders[1] / file.name).read_bytes()
    settings = (folders[0] / "tokenizer_config.json").read_text()
    assert '"tokenizer_class": "PreTrainedTokenizerFast"' in settings
    assert ChatTokenizer.from_folder(folders[0]).vocab_size < 2048
