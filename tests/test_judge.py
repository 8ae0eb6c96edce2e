"""The judge: scores that depend on nothing but the question, and equal those of separate sequences."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import assert_equal_to
from tiny import tiny_causal_lm, tiny_pairs, tiny_pool

from adaptrm.data.preferences import Pair
from adaptrm.data.scores import Scores
from adaptrm.judge import Judge
from adaptrm.judge.program import answer_leaves, decide_leaves, scores_of
from adaptrm.judge.prompts import TEMPLATES
from adaptrm.parallel import make_mesh, read_leaves
from adaptrm.prefix_tree import Node, PrefixTree
from adaptrm.rules import RulePool
from adaptrm.selection import select

POOL = tiny_pool(6)
ARRAYS = ("a", "b", "relevance", "log_odds_a", "log_odds_b", "label_mass_a", "label_mass_b")


def user(text: str) -> tuple[dict, ...]:
    return ({"role": "user", "content": text},)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_causal_lm(tmp_path_factory.mktemp("judge"))


@pytest.fixture(scope="module")
def judge(folder, one_device) -> Judge:
    return Judge.from_pretrained(folder, POOL, mesh=one_device)


@pytest.fixture(scope="module")
def rule_first(folder, one_device) -> Judge:
    return Judge.from_pretrained(folder, POOL, template="rule-first", mesh=one_device)


def separate(judge) -> list[np.ndarray]:
    """Every question as a whole sequence of its own, in the order [pairs, 2, rules]."""
    every = range(len(POOL))
    texts = [
        judge.prompt.text(p.prompt, r, i) for p in tiny_pairs() for r in (p.response_a, p.response_b) for i in every
    ]
    return judge.prompt.chat.encode_many(texts)


@pytest.mark.parametrize("template", TEMPLATES)
def test_tree_equals_separate_sequences(judge, rule_first, template):
    asked = {"conversation-first": judge, "rule-first": rule_first}[template]
    trees = [PrefixTree.build(Node(ids)) for ids in separate(asked)]
    alone = read_leaves(trees, asked.mesh, asked.program)
    expected = np.concatenate([alone[i] for i in range(len(trees))]).reshape(len(tiny_pairs()), 2, len(POOL), 3)
    got = asked.log_probabilities(tiny_pairs())
    assert_equal_to(got, expected, 1e-5)
    assert np.ptp(expected, axis=2).min() > 0.01, "rules must matter"


def test_equals_transformers_on_separate_sequences(judge, folder):
    torch = pytest.importorskip("torch")
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    with torch.no_grad():
        logits = [model(torch.from_numpy(ids).long()[None]).logits[0, -1] for ids in separate(judge)]
    log_p = torch.log_softmax(torch.stack(logits), -1).numpy()
    expected = np.stack([np.logaddexp.reduce(log_p[:, list(ids)], axis=1) for ids in judge.prompt.answers], -1)
    got = judge.log_probabilities(tiny_pairs())
    assert_equal_to(got, expected.reshape(got.shape), 1e-4)


def test_scores_are_what_they_are_called(judge):
    log_p = judge.log_probabilities(tiny_pairs()).astype(np.float64)
    yes, no, neither = np.exp(log_p).transpose(3, 1, 0, 2)
    mass = yes + no + neither
    sign = np.array([rule.sign for rule in POOL])
    assert sorted(set(sign)) == [-1, 1]
    scores = judge.score(tiny_pairs())
    assert scores.ids == [pair.id for pair in tiny_pairs()] and scores.rule_ids == list(POOL.ids)
    expected = {
        "a": sign * ((yes - no) / mass)[0],
        "b": sign * ((yes - no) / mass)[1],
        "relevance": (1 - neither / mass).mean(0),
        "log_odds_a": sign * (log_p[:, 0, :, 0] - log_p[:, 0, :, 1]),
        "log_odds_b": sign * (log_p[:, 1, :, 0] - log_p[:, 1, :, 1]),
        "label_mass_a": mass[0],
        "label_mass_b": mass[1],
    }
    assert_equal_to({name: getattr(scores, name) for name in ARRAYS}, expected, 1e-5)
    assert all(getattr(scores, name).dtype == np.float32 for name in ARRAYS)


def test_scores_stay_in_their_ranges_whatever_the_model_says():
    tiny, top = np.float32(-1e4), np.float32(1e-6)  # probabilities round to 0, and to a little more than 1
    corners = [[top, tiny, tiny], [tiny, top, tiny], [tiny, tiny, top], [tiny, tiny, tiny], [-1.0986123] * 3]
    corners += [[-np.inf, -0.5, -1.0], [-0.5, -np.inf, -1.0], [-0.5, -1.0, -np.inf]]
    log_p = np.broadcast_to(np.array(corners, np.float32), (1, 2, len(corners), 3))
    signs = np.ones(len(corners), np.float32)
    scores = Scores(["p"], [f"r{i}" for i in range(len(corners))], **scores_of(log_p, signs))
    assert all(np.isfinite(getattr(scores, name)).all() for name in ARRAYS)
    assert np.abs(scores.a).max() <= 1 and scores.relevance.min() >= 0 and scores.relevance.max() <= 1
    assert scores.label_mass_a.min() >= 0 and scores.label_mass_a.max() <= 1
    np.testing.assert_allclose(scores.a[0, :5], [1, -1, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(scores.relevance[0, :5], [1, 1, 0, 2 / 3, 2 / 3], atol=1e-6)


EDGES = [
    Pair("same", user("Hi"), "No.", "No."),
    Pair("beginning", user("Hi"), "Let the dough rest.", "Let the dough rest. Then bake it."),
    Pair("spaces", user("Hi"), "Yes ", "Yes"),
]


def swapped(pair: Pair) -> Pair:
    return dataclasses.replace(pair, response_a=pair.response_b, response_b=pair.response_a)


@pytest.mark.parametrize("template", TEMPLATES)
def test_swapping_the_responses_swaps_the_scores_exactly(judge, rule_first, template):
    pairs = tiny_pairs() + EDGES
    asked = {"conversation-first": judge, "rule-first": rule_first}[template]
    scores, other = asked.score(pairs), asked.score([swapped(pair) for pair in pairs])
    for one, two in (("a", "b"), ("log_odds_a", "log_odds_b"), ("label_mass_a", "label_mass_b")):
        assert np.array_equal(getattr(scores, one), getattr(other, two))
        assert np.array_equal(getattr(scores, two), getattr(other, one))
    assert np.array_equal(scores.relevance, other.relevance)
    assert np.abs(scores.a - scores.b).max() > 0.01
    # Equal responses tie in every rule, and a tie is a difference of exactly 0.
    assert np.array_equal(scores.a[len(tiny_pairs())], scores.b[len(tiny_pairs())])


def test_a_score_does_not_depend_on_what_else_is_scored(judge):
    pairs = tiny_pairs() + EDGES
    together, alone = judge.log_probabilities(pairs), judge.log_probabilities(pairs[3:4])
    assert_equal_to(alone, together[3:4], 1e-5)
    assert_equal_to(judge.log_probabilities(pairs[::-1])[::-1], together, 1e-5)


def test_a_score_does_not_depend_on_the_order_of_the_rules(judge, folder, one_device):
    order = [4, 1, 5, 0, 3, 2]
    shuffled = RulePool("other", "1", tuple(POOL[i] for i in order))
    other = Judge.from_pretrained(folder, shuffled, mesh=one_device)
    assert_equal_to(other.score(tiny_pairs()).a, judge.score(tiny_pairs()).a[:, order], 1e-5)
    # Nor on which other rules are asked: a rule alone shares its whole question with none.
    single = Judge.from_pretrained(folder, RulePool("single", "1", (POOL[2],)), mesh=one_device)
    assert_equal_to(
        single.log_probabilities(tiny_pairs())[:, :, 0], judge.log_probabilities(tiny_pairs())[:, :, 2], 1e-5
    )


@pytest.mark.parametrize("shape", [(1, 8, 1), (1, 1, 8), (2, 2, 2)])  # of eight parts of a layer some heads are copies
def test_a_score_does_not_depend_on_the_devices(judge, folder, shape):
    # More rows than devices, so that there are several batches and the last one is not full.
    pairs = tiny_pairs(10)
    several = Judge.from_pretrained(folder, POOL, mesh=make_mesh(*shape))
    assert_equal_to(several.log_probabilities(pairs), judge.log_probabilities(pairs), 1e-5)


def test_rules_that_are_not_asked_about_are_nan_and_change_nothing(judge):
    pairs = tiny_pairs()
    rules = np.array([[4, 1], [0, 5], [2, 3], [1, 2]])
    some, every = judge.score(pairs, rules), judge.score(pairs)
    asked = np.zeros((len(pairs), len(POOL)), bool)
    np.put_along_axis(asked, rules, True, axis=1)
    for name in ARRAYS:
        got, expected = getattr(some, name), getattr(every, name)
        assert np.isnan(got[~asked]).all()
        assert_equal_to(got[asked], expected[asked], 1e-5)


STRATEGIES = [
    {"strategy": "max-discrepancy", "k": 3},
    {"strategy": "relevance", "k": 2},
    {"strategy": "all"},
    {"strategy": "random", "k": 2, "seed": 7},
    {"strategy": "fixed", "rules": [4, 0, 1]},
]


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_selecting_in_the_judges_program_is_selecting_from_its_scores(judge, folder, shape):
    pairs = tiny_pairs(10) + EDGES
    several = judge if shape == (1, 1, 1) else Judge.from_pretrained(folder, POOL, mesh=make_mesh(*shape))
    scores = judge.score(pairs)
    # Two rules of a pair are further apart than rounding, so that their order is known.
    value = np.sort(scores.relevance + 0.5 * np.abs(scores.a - scores.b), axis=1)[: len(pairs) - len(EDGES)]
    assert np.diff(value, axis=1).min() > 1e-5
    for options in STRATEGIES if shape == (1, 1, 1) else STRATEGIES[:1]:
        got, expected = several.select(pairs, **options), select(scores.a, scores.b, scores.relevance, **options)
        assert np.array_equal(got.rules, expected.rules)
        assert_equal_to(got.margin, expected.margin, 1e-5)
        same = ~np.isin(np.arange(len(pairs)), [len(pairs) - 3])
        assert np.array_equal(got.preferred[same], expected.preferred[same])
        assert got.margin[len(pairs) - 3] == 0 and got.probability[len(pairs) - 3] == 0.5  # equal responses tie


def test_select_refuses_what_it_cannot_do(judge, rule_first):
    with pytest.raises(ValueError, match="needs the template 'conversation-first'"):
        rule_first.select(tiny_pairs())
    with pytest.raises(ValueError, match="k is 9; with 6 rules it must be 1 to 6"):
        judge.select(tiny_pairs(), k=9)
    with pytest.raises(ValueError, match="strategy 'best' is unknown"):
        judge.select(tiny_pairs(), strategy="best")


def test_select_refuses_answers_that_are_no_numbers(judge, monkeypatch):
    broken = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), judge._state)
    monkeypatch.setattr(judge, "_state", broken)
    with pytest.raises(ValueError, match="the answers about pair 'p0' are not numbers in float32; check the weights"):
        judge.select(tiny_pairs(), k=3)


def test_programs_are_compiled_for_shapes_alone(judge, folder, one_device):
    pairs = tiny_pairs()
    texts = ["is rude", "is false", "rests", "refuses", "bakes", "counts"]
    rules = [dataclasses.replace(r, id=f"x{r.id}", text=f"The response {t}.") for r, t in zip(POOL, texts, strict=True)]
    other = Judge.from_pretrained(folder, RulePool("other", "1", tuple(rules)), mesh=one_device)
    fewer = np.array([[0, 1, 2, 3, 4]] * len(pairs))
    asked = [judge.ask(pairs), other.ask(pairs), judge.ask(pairs, fewer), judge.ask(pairs[::-1])]
    shapes = {(one.packed.tokens.shape[1], one.packed.leaves.shape[1]) for one in asked}
    answer_leaves.clear_cache(), decide_leaves.clear_cache()
    for one in asked:
        (other if one is asked[1] else judge).answer(one)
    assert answer_leaves._cache_size() == len(shapes) < len(asked)
    judge.select(pairs, k=3), other.select(pairs, k=3, discrepancy_weight=0.1), judge.select(pairs[::-1], k=3)
    assert decide_leaves._cache_size() <= len({(one.packed.tokens.shape[1]) for one in asked[:2]})
