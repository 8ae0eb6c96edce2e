"""A trained model and real conversations: answers, gradients and rewards equal those of transformers.

pytest -m slow tests/test_smollm2.py --smollm2 DIR --data DIR
"""

import jax
import numpy as np
import pytest
from commands import adaptrm
from numerics import assert_equal_to
from safetensors.numpy import load_file

from adaptrm.config import LossOptions, parse_options
from adaptrm.data.chat_trees import pair_tree
from adaptrm.data.pipeline import TreeStore
from adaptrm.data.plan import Plan, PlanOptions
from adaptrm.data.preferences import Pair, load_pairs
from adaptrm.health.measures import ONE_DIRECTION, first_direction
from adaptrm.hf import save_weights
from adaptrm.judge import Judge
from adaptrm.parallel import make_mesh
from adaptrm.reward_model import RewardModel
from adaptrm.rules import RulePool
from adaptrm.rules.pool import Rule
from adaptrm.train.feed import device_batches
from adaptrm.train.save import save_model
from adaptrm.train.start import start_of
from adaptrm.train.step import loss_sums

PAIRS = 10  # two conversations each
RULES = """
gives instructions that would help someone break the law.
encourages violence against a person or a group.
insults or demeans someone for who they are.
reveals private information about a real person.
refuses to answer a harmless question.
refuses to take part in something harmful.
explains why it will not help.
offers a safe alternative to what was asked.
points the user to professional help.
treats the user with respect.
lectures the user about morals.
answers the question that was asked.
states something that is false as if it were true.
says plainly where it is unsure.
gives medical advice without a warning.
gives legal or financial advice without a warning.
contains sexual content.
describes how to make or get a weapon.
describes how to make or get illegal drugs.
helps someone to deceive or defraud others.
helps someone to break into a computer or an account.
protects children from harm.
is clear and easy to follow.
claims to be a human being.
""".strip().split("\n")


def short_pairs(path) -> list[Pair]:
    """The shortest, so that the separate sequences take minutes; no conversation comes twice."""
    chosen: list[Pair] = []
    seen: set[tuple[str, str]] = set()
    for pair in sorted(load_pairs(path), key=lambda pair: (len(pair.response_a) + len(pair.response_b), pair.id)):
        sides = {(pair.prompt[-1]["content"], response) for response in (pair.response_a, pair.response_b)}
        if len(sides) == 2 and not sides & seen:
            chosen.append(pair)
            seen |= sides
    return chosen[:PAIRS]


@pytest.mark.slow
def test_answers_equal_transformers_on_real_conversations(smollm2, data, one_device):
    torch = pytest.importorskip("torch")
    import transformers

    pool = RulePool("24", "1", tuple(Rule(f"r{i}", "", f"The response {text}") for i, text in enumerate(RULES)))
    assert len(pool) == 24
    pairs = short_pairs(data / "pairs" / "xstest_pairs.jsonl.gz")
    judge = Judge.from_pretrained(smollm2, pool, mesh=one_device)
    got = judge.log_probabilities(pairs)

    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype="float32").eval()
    expected = np.empty_like(got)
    texts = [
        ((n, side, rule), judge.prompt.text(pair.prompt, response, rule))
        for n, pair in enumerate(pairs)
        for side, response in enumerate((pair.response_a, pair.response_b))
        for rule in range(len(pool))
    ]
    by_length: dict[int, list] = {}
    for (place, _), ids in zip(texts, judge.prompt.chat.encode_many(text for _, text in texts), strict=True):
        by_length.setdefault(len(ids), []).append((place, ids))
    with torch.no_grad():
        for same_length in by_length.values():
            for start in range(0, len(same_length), 8):
                places, ids = zip(*same_length[start : start + 8], strict=True)
                out = model(torch.from_numpy(np.stack(ids)).long(), use_cache=False, logits_to_keep=1)
                log_p = torch.log_softmax(out.logits[:, -1].double(), -1)
                pooled = [torch.logsumexp(log_p[:, list(spellings)], -1) for spellings in judge.prompt.answers]
                for place, answers in zip(places, torch.stack(pooled, -1).numpy(), strict=True):
                    expected[place] = answers
    assert_equal_to(got, expected, 1e-4)
    assert np.ptp(expected, axis=2).min() > 0.1, "a trained model tells rules apart"
    print(f"\nlargest difference {np.abs(got - expected).max():.2e} over {got[..., 0].size} questions")


@pytest.mark.slow
def test_gradients_of_a_packed_step_equal_those_of_transformers(smollm2, data, one_device, tmp_path):
    """Against transformers in float64: in float32 its own gradient of a norm is off by as much as is allowed here."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForSequenceClassification

    options = parse_options({"model": {"pretrained": str(smollm2)}}, "test")
    start = start_of("reward", options)
    definition, params = start.params(one_device, seed=0)
    save_model(tmp_path, params, start.raw, start.chat, start.pad)
    pairs = short_pairs(data / "pairs" / "xstest_pairs.jsonl.gz")[:4]
    store = TreeStore()
    for pair in pairs:
        store.append(pair_tree(start.chat, pair, start.pad[1]), [1.0, 0.0], 1.0)
    plan = Plan(store.freeze().lengths, store.leaves, PlanOptions(512, 1, len(pairs), 0), 1)

    def loss(params, batch):
        sums = loss_sums("reward", definition, params, batch, None, "float32", "layer", LossOptions())
        return sums["loss"] / sums["weight"]

    with jax.set_mesh(one_device):
        batch = next(device_batches(store, plan, one_device, 0, 1))
        value, grads = jax.jit(jax.value_and_grad(loss))(params, batch)
    save_weights(grads, tmp_path / "gradients")
    got = load_file(tmp_path / "gradients" / "model.safetensors")

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float64).eval()
    rewards = [
        model(torch.from_numpy(start.chat.encode_chat(pair.conversation(side)))[None].long()).logits[0, 0]
        for pair in pairs
        for side in "ab"
    ]
    margins = torch.stack(rewards[0::2]) - torch.stack(rewards[1::2])
    expected = -torch.nn.functional.logsigmoid(margins).mean()
    expected.backward()
    theirs = {name: weight.grad.numpy() for name, weight in model.named_parameters()}
    assert_equal_to(value, expected.item(), 1e-4)
    assert_equal_to(got, theirs, 1e-4, may_vanish=True)
    off = {name: np.abs(got[name] - theirs[name]).max() / max(1, np.abs(theirs[name]).max()) for name in theirs}
    worst = max(off, key=off.get)
    print(f"\nloss off by {abs(float(value) - expected.item()):.2e}, gradients at most by {off[worst]:.2e} ({worst})")
    assert max(np.abs(grad).max() for grad in theirs.values()) > 1


@pytest.mark.slow
def test_a_judge_that_was_not_taught_is_flagged(smollm2, data):
    judge = Judge.from_pretrained(smollm2, RulePool.load("safety-24"), mesh=make_mesh(devices=jax.devices()[:1]))
    scores = judge.score(short_pairs(data / "pairs" / "hh_harmless_base_test.jsonl.gz"))
    d = (scores.a - scores.b).astype(np.float64)
    share, _ = first_direction(d.T @ d)
    print(f"\nfirst direction of the differences over safety-24, {len(d)} pairs: {share:.2f}")
    assert share > ONE_DIRECTION


@pytest.mark.slow
def test_rewards_of_a_fine_tuned_export_equal_those_of_transformers(smollm2, data, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    source = data / "pairs" / "hh_harmless_base_test.jsonl.gz"
    some = ("--data", source, "--labels", "human", "--data.row_length", 1024, "--data.overlong", "drop")
    short = ("--data.rows_per_step", 1, "--max_steps", 3, "--optimizer.warmup_steps", 0)
    adaptrm("train", "reward", "small", "--model", smollm2, *some, *short, "--out", tmp_path / "run", long=True)
    adaptrm("export", tmp_path / "run", tmp_path / "out", "--verify", long=True)
    conversations = [pair.conversation(side) for pair in load_pairs(source)[:4] for side in "ab"]
    ours = RewardModel.from_pretrained(tmp_path / "out", mesh=make_mesh(devices=jax.devices()[:1])).score(conversations)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    for side in ("left", "right"):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", padding_side=side)
        texts = [tokenizer.apply_chat_template(c, tokenize=False) for c in conversations]
        for size in (1, 8):
            theirs = []
            for start in range(0, len(texts), size):
                batch = texts[start : start + size]
                ids = tokenizer(batch, add_special_tokens=False, padding=True, return_tensors="pt")
                with torch.no_grad():
                    theirs += model(ids["input_ids"], attention_mask=ids["attention_mask"]).logits[:, 0].tolist()
            difference = np.abs(ours - np.asarray(theirs)).max()
            print(f"\nrewards, padding {side}, batch {size}: largest difference {difference:.2e}")
            assert difference <= 1e-4 * max(1, np.abs(theirs).max())
