"""Shapes of the models that our configs start from, so that a plan needs no download."""

from dataclasses import replace

from adaptrm.models.config import ModelConfig, RopeScaling

# Grattafiori et al. 2024, "The Llama 3 Herd of Models", table 3; RoPE as in the models' config.json.
LLAMA3_70B = ModelConfig(
    vocab_size=128256,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=128,
    rope_theta=500000.0,
    max_position_embeddings=8192,
)
LLAMA31_8B = replace(
    LLAMA3_70B,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
    max_position_embeddings=131072,
)
LLAMA32_3B = replace(
    LLAMA31_8B,
    hidden_size=3072,
    intermediate_size=8192,
    num_hidden_layers=28,
    num_attention_heads=24,
    rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192),
    tie_word_embeddings=True,
)

KNOWN = {
    "meta-llama/Llama-3.1-8B-Instruct": LLAMA31_8B,
    "meta-llama/Llama-3.2-3B": LLAMA32_3B,
    "meta-llama/Llama-3.2-3B-Instruct": LLAMA32_3B,
    "meta-llama/Meta-Llama-3-70B-Instruct": LLAMA3_70B,
    # One row of the vocabulary more, for a pad token of its own.
    "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2": replace(LLAMA31_8B, vocab_size=128257),
    "Skywork/Skywork-Reward-V2-Llama-3.1-8B": replace(LLAMA31_8B, vocab_size=128257),
}
