"""The decoder: a packed tree equals separate sequences, and our numbers equal transformers'."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from folders import hf_model
from numerics import assert_equal_to
from tiny import LLAMA3, VOCAB, random_state, tiny_config
from trees import deep, fan, flatten, pack

from adaptrm.hf import load_weights, open_folder
from adaptrm.hf.load import abstract_model
from adaptrm.models import CausalLM, SequenceClassifier
from adaptrm.models.config import FAMILIES
from adaptrm.models.heads import answer_log_probabilities, label_logits
from adaptrm.models.layers import at_leaves, rotations
from adaptrm.prefix_tree import Node, PackedRows, PrefixTree, best_fit, pack_rows
from adaptrm.train.optimizer import decays

# One shape of rows and of flat sequences for all: compiling is what takes the time.
ROWS, TOKENS, LEAVES = 2, 448, 100
SEQUENCES, LENGTH = 128, 44
TREES = [fan(40, 100, 4), deep(seed=1), deep(seed=2), fan(20, 8, 3), fan(33, 1, 1), deep(seed=3), fan(1, 3, 30)]
ANSWERS = ((5, 9, 100), (17,), (200, 3))


def arrays(packed: PackedRows):
    return packed.tokens, packed.positions, packed.subtree_end, packed.leaves


@partial(jax.jit, static_argnums=(0,), static_argnames=("dtype", "remat"))
def read_leaves(definition, state, tokens, positions, subtree_end, leaves, weights, dtype=jnp.float32, remat="none"):
    """Hidden states, answers and rewards at the leaves, and the gradient of a loss over all three."""

    def loss(state):
        model = nnx.merge(definition, state)
        hidden = at_leaves(model.model(tokens, positions, subtree_end, dtype, remat), leaves)
        answers = answer_log_probabilities(hidden, model.unembedding, ANSWERS)
        rewards = label_logits(hidden, jnp.ones((1, hidden.shape[-1])))
        each = hidden.astype(jnp.float32).sum(-1) + answers.sum(-1) + jnp.sin(rewards[..., 0])
        return jnp.sum(each * weights), (hidden, answers, rewards)

    (_, out), grads = jax.value_and_grad(loss, has_aux=True)(state)
    return out, grads


def both_sides(definition, state, **options):
    """What ``read_leaves`` gives for the packed trees and for separate sequences, leaf by leaf."""
    packed = pack(TREES, ROWS, TOKENS, LEAVES)
    real = packed.owner[..., 0] >= 0
    assert real.sum() == sum(len(tree.leaves) for tree in TREES)
    weights = np.random.default_rng(3).standard_normal(real.shape).astype(np.float32) * real
    flat = flatten(packed, SEQUENCES, LENGTH)
    flat_weights = np.zeros((SEQUENCES, 1), np.float32)
    flat_weights[: real.sum(), 0] = weights[real]
    place = np.arange(LENGTH, dtype=np.int32)
    positions, causal = (np.broadcast_to(x, flat.index.shape) for x in (place, np.int32(LENGTH)))
    flat_rows = (flat.take(packed.tokens), positions, causal, flat.last[:, None])
    tree_out, tree_grads = read_leaves(definition, state, *arrays(packed), weights, **options)
    flat_out, flat_grads = read_leaves(definition, state, *flat_rows, flat_weights, **options)
    tree_out = [np.asarray(x.astype(jnp.float32))[real] for x in tree_out]
    flat_out = [np.asarray(x.astype(jnp.float32))[: real.sum(), 0] for x in flat_out]
    return (tree_out, tree_grads), (flat_out, flat_grads)


@pytest.mark.parametrize(
    "variant",
    [
        {"model_type": "qwen2", "num_key_value_heads": 4},
        {"model_type": "qwen3", "num_key_value_heads": 2, "attention_bias": True},
        {
            "num_key_value_heads": 1,
            "rope_scaling": LLAMA3,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ],
)
def test_tree_equals_separate_sequences(variant):
    tree, flat = both_sides(*random_state(CausalLM, tiny_config(**variant)))
    assert_equal_to(tree, flat, 1e-5)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_reading_the_leaves_alone_is_reading_all(family, layers):
    definition, state = random_state(CausalLM, tiny_config(model_type=family, num_hidden_layers=layers))
    packed = pack(TREES, ROWS, TOKENS, LEAVES)

    @jax.jit
    def both(state, tokens, positions, subtree_end, leaves):
        model = nnx.merge(definition, state).model
        row = tokens, positions, subtree_end
        return model.at_leaves(*row, leaves), at_leaves(model(*row), leaves)

    assert_equal_to(*both(state, *arrays(packed)), 1e-5)


@pytest.mark.slow  # attention alone is held to it by default
def test_bfloat16_tree_is_no_further_from_float64_than_separate_sequences_are():
    model = random_state(CausalLM, tiny_config())
    # float32 stands for float64: its own error is a thousandth of what is measured here.
    _, exact = both_sides(*model)
    tree, flat = both_sides(*model, dtype=jnp.bfloat16)

    def rms(x, y) -> float:
        return float(np.sqrt(np.mean((np.asarray(x, np.float64) - np.asarray(y, np.float64)) ** 2)))

    # Hidden states, answers, rewards, and the gradient of each of the 12 parameters.
    sides = [jax.tree.leaves(side) for side in (tree, flat, exact)]
    assert [len(side) for side in sides] == [3 + 12] * 3
    for number, (got, alone, right) in enumerate(zip(*sides, strict=True)):
        assert 0 < rms(got, right) <= 1.5 * rms(alone, right), number


def test_remat_changes_nothing_and_keeps_less():
    definition, state = random_state(CausalLM, tiny_config(num_hidden_layers=6, intermediate_size=512))
    packed = pack(TREES, ROWS, TOKENS, LEAVES)
    args = (state, *arrays(packed), np.ones(packed.leaves.shape, np.float32))
    plain, again = (read_leaves.lower(definition, *args, remat=remat).compile() for remat in ("none", "layer"))
    assert_equal_to(again(*args), plain(*args), 1e-5)
    kept, kept_again = (run.memory_analysis().temp_size_in_bytes for run in (plain, again))
    assert kept_again < 0.6 * kept


def test_answers_are_pooled_over_spellings_and_normalised_over_the_vocabulary():
    # More leaves than are read at a time, and no multiple of it.
    rng = np.random.default_rng(0)
    hidden, unembedding = rng.standard_normal((1, 300, 16)), rng.standard_normal((50, 16))
    got = answer_log_probabilities(*(jnp.asarray(x, jnp.float32) for x in (hidden, unembedding)), ((1, 4), (7,), (9,)))
    logits = hidden @ unembedding.T
    share = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = np.log(np.stack([share[..., 1] + share[..., 4], share[..., 7], share[..., 9]], -1))
    assert_equal_to(got, expected, 1e-5)


def test_norms_and_biases_do_not_decay():
    _, params = abstract_model(CausalLM, tiny_config(model_type="qwen3", attention_bias=True))
    kept = {path[-2:] for path, decay in nnx.to_flat_state(decays(params)) if not decay.get_value()}
    norms = ("input_layernorm", "post_attention_layernorm", "norm", "q_norm", "k_norm")
    projections = ("q_proj", "k_proj", "v_proj", "o_proj")
    assert kept == {(name, "weight") for name in norms} | {(name, "bias") for name in projections}


# --- parity with transformers -------------------------------------------------------------------------------------

GQA = {"gqa 1": 4, "gqa 2": 2, "gqa 4": 1}
# What each family may switch on. Qwen2 always has biases, Qwen3 always norms its queries and keys.
SWITCHES = {
    "llama": ({}, {"attention_bias": True, "mlp_bias": True}),
    "mistral": ({},),
    "qwen2": ({},),
    "qwen3": ({}, {"attention_bias": True}),
}
VARIANTS = {
    f"{family}, {gqa}{', tied' if tied else ''}{', biases' if switches else ''}": {
        "model_type": family,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": tied,
        **switches,
    }
    for family, choices in SWITCHES.items()
    for gqa, kv_heads in GQA.items()
    for tied in (False, True)
    for switches in choices
} | {
    "9 heads over 3": {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3},
    "wide heads": {"head_dim": 16},
    "qwen3, wide heads": {"model_type": "qwen3", "head_dim": 16, "rms_norm_eps": 1e-2},
    "llama, biases of attention alone": {"attention_bias": True},
    "llama 3.1 rope": {"rope_scaling": LLAMA3, "rope_theta": 500000.0, "rms_norm_eps": 1e-6},
    "llama 3.1 rope, long": {
        "rope_scaling": dataclasses.replace(LLAMA3, original_max_position_embeddings=8192),
        "rope_theta": 500000.0,
        "max_position_embeddings": 131072,
        "head_dim": 64,
    },
    "qwen2, llama 3.1 rope": {"model_type": "qwen2", "rope_scaling": LLAMA3},
}


@partial(jax.jit, static_argnums=(0,))
def one_layer(definition, weights, x, turned, subtree_end):
    return nnx.merge(definition, weights)(x, turned, subtree_end)


def layer_by_layer(definition, state, tokens, positions, subtree_end):
    """The input of every layer, the normed hidden states, and the logits; most variants share compiled layers."""
    model = nnx.merge(definition, state)
    decoder = model.model
    layer, stacked = nnx.split(decoder.layers)
    states = [decoder.embed_tokens.weight[...][tokens]]
    turned = rotations(decoder.config, positions)
    for i in range(decoder.config.num_hidden_layers):
        own = jax.tree.map(lambda w, i=i: w[i], stacked)
        states.append(one_layer(layer, own, states[-1], turned, subtree_end))
    hidden = decoder.norm(states.pop())
    return states, hidden, jnp.einsum("btd,vd->btv", hidden, model.unembedding)


def assert_equals_transformers(theirs, definition, state, tokens, positions):
    """Every layer and the logits, at the given positions; returns our logits."""
    import torch

    with torch.no_grad():
        out = theirs(
            input_ids=torch.from_numpy(tokens).long(),
            position_ids=torch.from_numpy(positions).long(),
            output_hidden_states=True,
            use_cache=False,
        )
    states, hidden, logits = layer_by_layer(
        definition, state, tokens, positions, np.full(tokens.shape, tokens.shape[1], np.int32)
    )
    expected = [h.numpy() for h in out.hidden_states]
    # transformers norms the last of its hidden states.
    assert len(expected) == len(states) + 1 == theirs.config.num_hidden_layers + 1
    for number, (ours, right) in enumerate(zip([*states, hidden], expected, strict=True)):
        assert_equal_to({f"hidden {number}": ours}, {f"hidden {number}": right}, 1e-4)
    assert_equal_to(logits, out.logits.numpy(), 1e-4)
    return logits


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_transformers_layer_by_layer(tmp_path, one_device, variant):
    config = tiny_config(**VARIANTS[variant])
    theirs = hf_model(tmp_path, "ForCausalLM", config)
    definition, state, read = load_weights(open_folder(tmp_path), CausalLM, one_device, dtype="float32")
    assert read == config
    rows, length = 2, 96
    tokens = np.random.default_rng(0).integers(0, VOCAB, (rows, length)).astype(np.int32)
    # The second row lies past the original length wherever there is one.
    positions = np.arange(length, dtype=np.int32) + np.array([[0], [config.max_position_embeddings - length]], np.int32)
    assert_equals_transformers(theirs, definition, state, tokens, positions)


@pytest.mark.parametrize("family", FAMILIES)
def test_rewards_equal_transformers_with_padding_on_either_side(tmp_path, one_device, family):
    torch = pytest.importorskip("torch")
    pad = 0
    config = tiny_config(model_type=family)
    theirs = hf_model(tmp_path, "ForSequenceClassification", config, num_labels=1, pad_token_id=pad)
    definition, state, _ = load_weights(open_folder(tmp_path), SequenceClassifier, one_device, dtype="float32")
    rng = np.random.default_rng(1)
    sequences = [rng.integers(1, VOCAB, n) for n in rng.integers(5, 60, 8)]
    trees = [PrefixTree.build(Node(sequence)) for sequence in sequences]
    packed = pack_rows(trees, best_fit([len(tree) for tree in trees], 128), 128, 16, pad_rows_to=4)
    by_tree = packed.to_owners(np.asarray(rewards(definition, state, *arrays(packed))))
    got = np.concatenate([by_tree[i][:, 0] for i in range(len(trees))])
    for side in ("left", "right"):
        padded = np.full((8, 64), pad)
        for row, sequence in zip(padded, sequences, strict=True):
            row[slice(-len(sequence), None) if side == "left" else slice(len(sequence))] = sequence
        ids = torch.from_numpy(padded)
        for batch in (1, 8):
            with torch.no_grad():
                parts = [theirs(input_ids=x, attention_mask=(x != pad).long()).logits[:, 0] for x in ids.split(batch)]
            assert_equal_to(got, torch.cat(parts).numpy(), 1e-4)
    assert np.ptp(got) > 0.1


@partial(jax.jit, static_argnums=(0,))
def rewards(definition, state, tokens, positions, subtree_end, leaves):
    model = nnx.merge(definition, state)
    return label_logits(at_leaves(model.model(tokens, positions, subtree_end), leaves), model.score.weight[...])


@pytest.mark.slow
def test_a_trained_model_equals_its_reference_logits_and_transformers(data, one_device):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    folder = data / "checkpoints" / "stories260k"
    reference = json.loads((folder / "reference_logits.json").read_text())
    definition, state, config = load_weights(open_folder(folder), CausalLM, one_device)
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    tokens = np.asarray([reference["ids"]], np.int32)
    positions = np.arange(tokens.shape[1], dtype=np.int32)[None]
    logits = assert_equals_transformers(theirs, definition, state, tokens, positions)
    for place, name in ((0, "logits_at_first"), (-1, "logits_at_last")):
        assert_equal_to(logits[0, place], np.asarray(reference[name]), 1e-4)
    # Past the length that it was trained on, too.
    assert_equals_transformers(theirs, definition, state, tokens, positions + 4 * config.max_position_embeddings)
    print(f"\n{config.num_hidden_layers} layers and {logits.size} logits equal to 1e-4")
