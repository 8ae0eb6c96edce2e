"""A trained model and real conversations: the judge's answers equal transformers' on separate full sequences.

pytest -m slow tests/test_smollm2.py --smollm2 DIR --data DIR
"""

import jax
import numpy as np
import pytest
from commands import adaptrm
from numerics import assert_equal_to

from adaptrm.data.preferences import Pair, load_pairs
from adaptrm.judge import Judge
from adaptrm.parallel import make_mesh
from adaptrm.reward_model import RewardModel
from adaptrm.rules import RulePool
from adaptrm.rules.pool import Rule

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
