"""The decoder and the two models built on it, for rows of packed prefix trees."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import checkpoint_policies as policies
from jaxtyping import Array, Float, Int32

from adaptrm.attention import ATTENTION
from adaptrm.models.config import ModelConfig
from adaptrm.models.layers import Layer, RMSNorm, Weight, rotations
from adaptrm.parallel.sharding import constrain

Remat = Literal["layer", "attention", "dots", "none"]
# What the backward pass finds of each layer besides its input, from least memory to most; it computes the rest again.
SAVED: dict[Remat, Callable | None] = {
    "layer": None,  # nothing
    "attention": policies.save_only_these_names(ATTENTION),
    "dots": policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(ATTENTION)
    ),
}


class Decoder(nnx.Module):
    """Token ids to hidden states, over stacked layers; one decoder for all families."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        self.embed_tokens = Weight((config.vocab_size, config.hidden_size), ("vocab", "embed"), rngs)
        self.layers = Layer(config, rngs)
        self.norm = RMSNorm((config.hidden_size,), ("embed",), config.rms_norm_eps)

    def __call__(
        self,
        tokens: Int32[Array, "rows tokens"],
        positions: Int32[Array, "rows tokens"],
        subtree_end: Int32[Array, "rows tokens"],
        dtype=jnp.float32,
        remat: Remat = "none",
    ) -> Float[Array, "rows tokens hidden"]:
        """Hidden states after the last norm, computed in ``dtype``.

        Args:
            remat: what is kept for the backward pass: the input of each layer, its attention, its matrix products, all.
        """
        x, turned = self._start(tokens, positions, dtype)
        definition, weights = nnx.split(self.layers)

        def layer(x, layer_weights):
            return nnx.merge(definition, layer_weights)(x, turned, subtree_end), None

        body = layer if remat == "none" else jax.checkpoint(layer, policy=SAVED[remat])
        x, _ = jax.lax.scan(body, x, weights)
        return self.norm(x)

    def at_leaves(
        self,
        tokens: Int32[Array, "rows tokens"],
        positions: Int32[Array, "rows tokens"],
        subtree_end: Int32[Array, "rows tokens"],
        leaves: Int32[Array, "rows leaves"],
        dtype=jnp.float32,
    ) -> Float[Array, "rows leaves hidden"]:
        """Hidden states at the leaves, for a forward pass: of other tokens the last layer takes only keys and values.

        Not for training: a layer's weights are taken by its number, so their gradient would be that of all layers in
        each.
        """
        x, turned = self._start(tokens, positions, dtype)
        definition, weights = nnx.split(self.layers)

        def layer(number):  # what jax.lax.scan does with an argument, but without a copy of all layers but the last
            return nnx.merge(
                definition, jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, number, 0, False), weights)
            )

        last = self.config.num_hidden_layers - 1
        x, _ = jax.lax.scan(lambda x, number: (layer(number)(x, turned, subtree_end), None), x, jnp.arange(last))
        return self.norm(layer(last)(x, turned, subtree_end, leaves))

    def _start(self, tokens, positions, dtype):
        """The embedded tokens, and the rotations of their positions."""
        x = constrain(self.embed_tokens.weight[...][tokens].astype(dtype), "rows", "tokens", "hidden")
        return x, rotations(self.config, positions)


class CausalLM(nnx.Module):
    """A decoder with a vocabulary head (``...ForCausalLM``)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.model = Decoder(config, rngs)
        if not config.tie_word_embeddings:
            self.lm_head = Weight((config.vocab_size, config.hidden_size), ("vocab", "embed"), rngs)

    @property
    def unembedding(self) -> Float[Array, "vocab hidden"]:
        tied = self.model.config.tie_word_embeddings
        return (self.model.embed_tokens if tied else self.lm_head).weight[...]


class SequenceClassifier(nnx.Module):
    """A decoder with a linear head, without bias (``...ForSequenceClassification``).

    One label is a reward model, R labels a rule adapter.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, num_labels: int = 1):
        self.model = Decoder(config, rngs)
        self.score = Weight((num_labels, config.hidden_size), ("labels", "embed"), rngs)
