"""What a step is measured by: FLOPs, visible pairs, padding, rates."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from tiny import tiny_config
from trees import deep, fan, nodes

from adaptrm.attention import reference
from adaptrm.data.pipeline import TreeStore
from adaptrm.data.plan import Plan, PlanOptions
from adaptrm.hf.load import abstract_model
from adaptrm.models import CausalLM, ModelConfig, SequenceClassifier
from adaptrm.prefix_tree import PrefixTree
from adaptrm.train.throughput import Throughput, multiplied_parameters, peak_flops, training_flops

LLAMA_8B = ModelConfig(128256, 4096, 14336, 32, 32, 8, 128)


def stored(*trees: PrefixTree) -> TreeStore:
    store = TreeStore()
    for tree in trees:
        store.append(tree, [1.0] * len(tree.leaves), [1.0] * len(tree.leaves))
    return store.freeze()


@given(nodes())
def test_visible_pairs_are_those_that_attention_sees(root):
    tree = PrefixTree.build(root)
    key, query = np.arange(len(tree)), np.arange(len(tree))[:, None]
    visible = (key <= query) & (query < tree.subtree_end[key])
    store = stored(fan(5, 2, 3), tree)
    assert store.visible_pairs(1) == visible.sum()


def test_parameters_that_tokens_are_multiplied_by():
    """All of Llama 3.1 8B but its two tables of 128,256 x 4,096, whether it is a judge or a reward model."""
    total = 8_030_261_248  # as its model card counts, with lm_head
    for model_type in (CausalLM, SequenceClassifier):
        _, params = abstract_model(model_type, LLAMA_8B)
        assert multiplied_parameters(params) == total - 2 * 128256 * 4096


def test_flops_are_what_xla_counts():
    """Once for the decoder, where attention over few tokens costs little, once for dense attention by itself."""
    config = tiny_config(num_hidden_layers=1, hidden_size=512, intermediate_size=1024, head_dim=128)
    definition, params = abstract_model(SequenceClassifier, config)
    tokens = jax.ShapeDtypeStruct((1, 32), jnp.int32)
    decoder = lambda params, *row: nnx.merge(definition, params).model(*row).sum()  # noqa: E731
    whole = jax.jit(jax.grad(decoder)).lower(params, tokens, tokens, tokens).compile().cost_analysis()["flops"]
    assert whole == pytest.approx(training_flops(config, multiplied_parameters(params), 32, 32 * 32), rel=0.03)

    q = jax.ShapeDtypeStruct((1, 64, 4, 128), jnp.float32)
    attend = lambda q, k, v, ends: (q * reference.tree_attention(q, k, v, ends)).sum()  # noqa: E731
    gradient = jax.jit(jax.grad(attend, argnums=(0, 1, 2)))
    dense = gradient.lower(q, q, q, jax.ShapeDtypeStruct((1, 64), jnp.int32)).compile().cost_analysis()["flops"]
    assert dense == pytest.approx(training_flops(config, 0, 64, 64 * 64), rel=0.03)


def test_peaks_are_those_of_the_kind():
    names = ("TPU v5 lite", "TPU v5p", "TPU v6 lite", "NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "cpu", "TPU v9")
    assert [peak_flops(name) for name in names] == [197e12, 459e12, 918e12, 989e12, 756e12, None, None]


def test_what_a_step_tells():
    """Two trees in two rows of 64 tokens, on devices of a known kind that hold no memory to speak of."""
    first, second = deep(), fan(10, 2, 20)
    store = stored(first, second)
    plan = Plan(store.lengths, store.leaves, PlanOptions(64, 2), 1)
    chips = [SimpleNamespace(device_kind="TPU v5p", process_index=0, memory_stats=lambda: None)] * 2
    told = Throughput(LLAMA_8B, 7 * 10**9, 0, store, plan, chips, "pairs").of_step(0, 0.5)
    tokens = len(first) + len(second)
    assert told["pairs"] == 2 and told["pairs_per_second"] == 4 and told["tokens_per_second"] == 2 * tokens
    assert told["padding"] == pytest.approx(1 - tokens / 128)
    visible = (first.positions + 1).sum() + (second.positions + 1).sum()
    flops = 6 * 7e9 * tokens + 12 * 32 * 32 * 128 * visible
    assert told["mfu"] == pytest.approx(flops / 0.5 / (2 * 459e12))
    assert told["memory_gib"] is None
    assert told.keys() == {"pairs", "padding", "tokens_per_second", "pairs_per_second", "mfu", "memory_gib"}


def test_a_step_that_was_compiled_has_no_rate():
    store = stored(deep())
    plan = Plan(store.lengths, store.leaves, PlanOptions(64, 1), 1)
    told = Throughput(LLAMA_8B, 1, 0, store, plan, jax.devices()[:1], "replies").of_step(0, None)
    unknown = {"tokens_per_second", "replies_per_second", "mfu", "memory_gib"}
    assert {name for name, value in told.items() if value is None} == unknown
