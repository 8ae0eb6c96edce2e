"""Decoder-only transformers in Flax NNX."""

from adaptrm.models.config import ModelConfig, RopeScaling
from adaptrm.models.decoder import CausalLM, Decoder, SequenceClassifier

__all__ = ["CausalLM", "Decoder", "ModelConfig", "RopeScaling", "SequenceClassifier"]
