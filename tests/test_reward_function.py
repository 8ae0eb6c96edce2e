"""A reward model used from Python: the best of n, and as a reward function of GRPO trainers."""

import inspect

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused
from tiny import VOCAB, tiny_causal_lm, tiny_pairs, tiny_reward_model

from adaptrm.data.preferences import continued
from adaptrm.prefix_tree import PrefixTree
from adaptrm.reward_model import RewardModel

PROMPTS = [[dict(m) for m in pair.prompt] for pair in tiny_pairs(4)]
REPLIES = ["Let the dough rest.", "", "I refuse.", "Mix flour, water, salt and yeast.", "<|im_end|>", " "]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_reward_model(tmp_path_factory.mktemp("grpo") / "rewards")


@pytest.fixture(scope="module")
def model(folder, one_device) -> RewardModel:
    return RewardModel.from_pretrained(folder, mesh=one_device)


def said(reply: str) -> list[dict]:
    return [{"role": "assistant", "content": reply}]


def test_the_best_of_n_is_the_one_with_the_largest_reward(model):
    alone = model.score([continued(PROMPTS[1], reply) for reply in REPLIES])
    best, rewards = model.best_of_n(PROMPTS[1], REPLIES)
    np.testing.assert_allclose(rewards, alone, atol=1e-5)
    assert rewards.dtype == np.float32 and best == alone.argmax() and np.ptp(alone) > 1e-2
    assert model.best_of_n(PROMPTS[1], REPLIES[::-1]).index == len(REPLIES) - 1 - best
    assert model.best_of_n("Bread?", ["a"]) == (
        0,
        model.score([continued(({"role": "user", "content": "Bread?"},), "a")]),
    )


def test_of_equal_rewards_the_first_is_the_best(model, monkeypatch):
    monkeypatch.setattr(model, "score_sets", lambda sets: [np.array([0.5, 2.0, 2.0, -1.0], np.float32)])
    assert model.best_of_n("Bread?", list("abcd")).index == 1


def test_a_reward_that_is_no_number_is_told(model, monkeypatch):
    monkeypatch.setattr(model, "score_sets", lambda sets: [np.array([0.5, np.nan, np.inf], np.float32)])
    for call in (model.best_of_n, lambda prompt, replies: model.reward_function()([prompt] * 3, replies)):
        assert refused(call, "Bread?", list("abc")).startswith("the reward of completions[1] is not finite; check")


@settings(max_examples=20)
@given(st.lists(st.tuples(st.sampled_from(PROMPTS), st.sampled_from(REPLIES)), min_size=1, max_size=9))
def test_rewards_are_those_of_the_conversations_however_prompts_repeat(model, asked):
    prompts, replies = zip(*asked, strict=True)
    alone = model.score([continued(prompt, reply) for prompt, reply in asked])
    reward = model.reward_function()
    for completions in (list(replies), [said(reply) for reply in replies]):
        rewards = reward(prompts=list(prompts), completions=completions, completion_ids=None, trainer_state=None)
        assert type(rewards) is list and all(type(one) is float for one in rewards)
        np.testing.assert_allclose(rewards, alone, atol=1e-5)


def test_equal_prompts_are_computed_once(model, monkeypatch):
    given = []
    logits = model.logits

    def counted(trees):
        trees = list(trees)
        given.extend(trees)
        return logits(trees)

    monkeypatch.setattr(model, "logits", counted)
    # Not in a row either: a batch may be shuffled.
    prompts, replies = PROMPTS[:2] * 4, [REPLIES[row % 3] + str(row) for row in range(8)]
    model.reward_function()(prompts, replies)
    assert [len(tree.leaves) for tree in given] == [4, 4]
    assert all(isinstance(tree, PrefixTree) for tree in given)
    separate = sum(len(model.chat.encode_chat(continued(p, r))) for p, r in zip(prompts, replies, strict=True))
    assert sum(map(len, given)) < separate / 2


def test_a_text_is_one_message_of_the_user(model):
    asked = [{"role": "user", "content": "Bread?"}]
    expected = model.score([continued(asked, "Mix.")])
    np.testing.assert_allclose(model.reward_function()(["Bread?"], ["Mix."]), expected, atol=1e-6)


def test_a_prompt_that_a_chat_template_has_written_comes_from_a_column(model):
    """Tunix gives what the policy reads, as text, and columns as arrays."""
    rendered = [
        model.chat.tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in PROMPTS
    ]
    expected = model.score([continued(prompt, "Mix.") for prompt in PROMPTS])
    replies = ["Mix."] * len(PROMPTS)
    gemma = "<start_of_turn>user\nBread?<end_of_turn>\n<start_of_turn>model\n"
    for text in (rendered[0], gemma, "[INST] Bread? [/INST]"):
        message = refused(model.reward_function(), ["Bread?", text], replies[:2])
        assert message.startswith("prompts[1]: a chat template has written this text; keep the messages")
    messages = np.empty(len(PROMPTS), object)
    messages[:] = PROMPTS
    reward = model.reward_function(column="messages")
    np.testing.assert_allclose(reward(rendered, replies, messages=messages, mode="train"), expected, atol=1e-5)
    np.testing.assert_allclose(reward(rendered, replies, messages=PROMPTS), expected, atol=1e-5)
    # Texts in a column are what the user asked, whatever they look like.
    asked = np.array(["Bread?", "<|im_end|>"])
    single = model.score([continued([{"role": "user", "content": str(text)}], "Mix.") for text in asked])
    of_texts = model.reward_function(column="question")(np.array(rendered[:2]), replies[:2], question=asked)
    np.testing.assert_allclose(of_texts, single, atol=1e-5)


def test_what_a_policy_ends_its_turn_with_is_taken_off(model):
    expected = model.score([continued(PROMPTS[0], reply) for reply in ("Mix.", "", "Mix<|im_end|>.")])
    completions = ["Mix.<|im_end|>", "<|im_end|>", "Mix<|im_end|>."]
    rewards = model.reward_function(end="<|im_end|>")(PROMPTS[:1] * 3, completions)
    np.testing.assert_allclose(rewards, expected, atol=1e-5)
    assert abs(model.reward_function()(PROMPTS[:1], completions[:1])[0] - expected[0]) > 1e-3


@pytest.mark.parametrize(
    ("prompts", "completions", "columns", "message"),
    [
        (["a"], ["b", "c"], {}, "prompts: there are 1 for 2 completions; give one each"),
        ([""], ["b"], {}, "prompts[0]: prompt is missing or empty"),
        ([None], ["b"], {}, "prompts[0]: prompt is missing or empty"),
        ([said("a")], ["b"], {}, "prompts[0]: the last message of prompt is of the assistant"),
        (["a"], [None], {}, "completions[0]: is no text and no list of messages"),
        (["a"], [[*said("b"), {"role": "user", "content": "c"}]], {}, "completions[0]: must be a text or one message"),
        (["a"], [[]], {}, "completions[0]: must be a text or one message of the assistant"),
        (["a"], [[{"role": "assistant", "content": None}]], {}, "completions[0]: it must hold messages with a role"),
        (["a"], ["\ud800"], {}, "completions[0]: it holds half of a character"),
        (["a"], ["b"], {"column": "question"}, "column 'question': the trainer gives none; it gives answer"),
    ],
)
def test_what_is_no_prompt_or_completion_is_refused(model, prompts, completions, columns, message):
    assert message in refused(model.reward_function(**columns), prompts, completions, answer=["x"])


def test_no_responses_and_a_response_that_is_none(model):
    assert refused(model.best_of_n, "Bread?", []).startswith("responses: there are none to choose from")
    assert refused(model.best_of_n, "Bread?", ["a", None]).startswith("completions[1]: is no text")


def test_trainers_find_a_name_and_take_it_for_no_coroutine(model):
    assert model.reward_function().__name__ == "reward_model"
    reward = model.reward_function(name="safety")
    assert reward.__name__ == "safety" and not inspect.iscoroutinefunction(reward)
    # Tunix fills parameters by their names from its own options.
    assert list(inspect.signature(reward).parameters) == ["prompts", "completions", "columns"]


def test_in_trl_function_and_exported_folder_give_the_same_rewards(folder, model, tmp_path):
    """Two real steps of GRPO; TRL loads the folder as a sequence classifier and runs it in torch."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    policy = tiny_causal_lm(tmp_path / "policy", seed=3)
    seen = []
    reward = model.reward_function(name="ours")

    def recorded(prompts, completions, **columns):
        rewards = reward(prompts=prompts, completions=completions, **columns)
        seen.append((prompts, completions, rewards))
        return rewards

    recorded.__name__ = reward.__name__
    arguments = trl.GRPOConfig(
        output_dir=str(tmp_path / "trl"),
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=12,
        max_steps=2,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = trl.GRPOTrainer(
        model=str(policy),
        reward_funcs=[recorded, str(folder)],
        args=arguments,
        train_dataset=datasets.Dataset.from_list([{"prompt": prompt, "source": "tiny"} for prompt in PROMPTS]),
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "rewards/ours/mean" in entry]
    assert len(logged) == len(seen) == 2
    for entry, (prompts, completions, rewards) in zip(logged, list(seen), strict=True):
        assert len({str(prompt) for prompt in prompts}) == 2 and len(prompts) == 8
        assert entry["rewards/ours/mean"] == pytest.approx(np.mean(rewards), abs=1e-5)
        for measure in ("mean", "std"):
            theirs = entry[f"rewards/{folder.name}/{measure}"]
            assert theirs == pytest.approx(entry[f"rewards/ours/{measure}"], abs=1e-4)
        assert entry["rewards/ours/std"] > 1e-2
        # One by one, as the trainer calls the model itself.
        one_by_one = trainer._calculate_rewards([{} for _ in prompts], prompts, completions, None)
        np.testing.assert_allclose(one_by_one[:, 0], one_by_one[:, 1], atol=1e-4)


def test_in_tunix_the_prompts_come_from_a_column(folder, model):
    """Two real steps of GRPO; the policy reads rendered text, the reward model the messages beside it."""
    pytest.importorskip("tunix")
    import jax
    import optax
    from flax import nnx
    from transformers import AutoTokenizer
    from tunix.models.llama3.model import Llama3, ModelConfig
    from tunix.rl import rl_cluster
    from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
    from tunix.rl.rollout.base_rollout import RolloutConfig

    tokenizer = AutoTokenizer.from_pretrained(folder)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    config = ModelConfig(
        num_layers=1,
        vocab_size=VOCAB,
        embed_dim=16,
        hidden_dim=32,
        num_heads=2,
        head_dim=8,
        num_kv_heads=2,
        rope_theta=10_000,
        norm_eps=1e-5,
    )
    with mesh:
        actor = Llama3(config, rngs=nnx.Rngs(0))
    roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT)
    cluster = rl_cluster.RLCluster(
        actor=actor,
        reference=actor,
        tokenizer=tokenizer,
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(roles, mesh),
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optax.sgd(1e-2), max_steps=2, eval_every_n_steps=100, mini_batch_size=2
            ),
            rollout_config=RolloutConfig(max_tokens_to_generate=8, max_prompt_length=256, kv_cache_size=512),
        ),
    )
    reward, seen = model.reward_function(column="messages", name="ours"), []

    def recorded(prompts, completions, **columns):
        rewards = reward(prompts=prompts, completions=completions, **columns)
        seen.append((prompts, completions, columns["messages"], rewards))
        return rewards

    recorded.__name__ = reward.__name__
    learner = GRPOLearner(
        rl_cluster=cluster, algo_config=GRPOConfig(num_generations=4, beta=0.04), reward_fns=[recorded]
    )
    rendered = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in PROMPTS]
    batches = []
    for start in (0, 2):
        messages = np.empty(2, object)
        messages[:] = PROMPTS[start : start + 2]
        batches.append({"prompts": np.array(rendered[start : start + 2]), "messages": messages})
    learner.train(batches)
    assert len(seen) == 2
    for prompts, completions, messages, rewards in seen:
        assert len(prompts) == len(completions) == len(messages) == 8
        assert all(str(prompt).endswith("<|im_start|>assistant\n") for prompt in prompts)
        alone = model.score([continued(p, reply) for p, reply in zip(messages, completions, strict=True)])
        np.testing.assert_allclose(rewards, alone, atol=1e-5)
        assert np.ptp(rewards) > 1e-2
