"""Small random models, tokenizers, rule pools and pairs, made in a second and without torch."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from adaptrm.data.chat import ChatTokenizer
from adaptrm.data.preferences import Pair
from adaptrm.hf import save_weights
from adaptrm.hf.load import abstract_model
from adaptrm.models import CausalLM, ModelConfig, RopeScaling, SequenceClassifier
from adaptrm.rules import RulePool
from adaptrm.rules.pool import Rule
from adaptrm.train.save import save_model

VOCAB = 448
# Ids 0, 1, 2; the first is in no template, so it can serve as pad.
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# What the merges are learnt from. The answers come often, so that each is one token; NEITHER is not among them.
CORPUS = [
    "Yes No Neither yes no neither YES NO. Yes\nNo\nNeither\nyes\nno\nneither\nYES\nNO\n" * 40,
    "user\nassistant\nsystem\nUser: Assistant: System: ### Conversation ### Response ### Statement\n" * 20,
    "Read the conversation and the response of the assistant, then say whether the statement is true.\n" * 10,
    "The response is kind and honest. The response refuses to help with harm. The response gives advice.\n" * 10,
    "It is kind.\n\nIt is honest.\n\n\nIt refuses \n\n### and\t then\n  waits.\n\n" * 10,
    "How do I bake bread? Mix flour, water, salt and yeast; let the dough rest, then bake it.\n" * 5,
]


# The pre-tokeniser of Llama 3: a run of punctuation takes the line ends behind it, line ends stay together.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TOKENIZERS = ("byte-level", "llama-3", "sentencepiece")


def tiny_tokenizer(folder: str | Path, kind: str = "byte-level", template: str = CHATML, answers: bool = True):
    """Write a tokenizer with a ChatML template; returns the transformers tokenizer.

    Args:
        kind: ``byte-level`` (GPT-2, SmolLM2), ``llama-3`` (byte-level, another split) or ``sentencepiece`` (Llama 2:
            no split at all, spaces as U+2581, bytes for what is not in the vocabulary).
        answers: without them in its corpus, no answer is one token.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    corpus = CORPUS if answers else CORPUS[-1:]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if kind == "llama-3":
        split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    if kind == "sentencepiece":
        # A line is a sentence, and line ends are bytes.
        corpus, alphabet = [line for text in corpus for line in text.split("\n")], []
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    # Every kind fills the same vocabulary; sentencepiece gets its 256 bytes after training.
    size = VOCAB - (256 if kind == "sentencepiece" else 0)
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(corpus, trainer)
    if kind == "sentencepiece":
        spec = json.loads(backend.to_str())
        vocab = spec["model"]["vocab"]
        for byte in range(256):
            vocab[f"<0x{byte:02X}>"] = len(vocab)
        spec["model"] |= {"byte_fallback": True, "fuse_unk": True, "unk_token": SPECIAL[0]}
        backend = Tokenizer.from_str(json.dumps(spec | {"pre_tokenizer": None}))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=SPECIAL[1], eos_token=SPECIAL[2], unk_token=SPECIAL[0]
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return tokenizer


def tiny_config(**overrides: Any) -> ModelConfig:
    """A two-layer decoder with two query heads a key head; any field of ``ModelConfig`` can be given."""
    fields: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 4096,
    }
    return ModelConfig(**(fields | overrides))


LLAMA3 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)


def random_state(model_type, config: ModelConfig, seed: int = 0, dtype="float32", **extra) -> tuple:
    """Definition and random state, with weights large enough that attention and logits are far from uniform.

    Norms differ from one and biases from zero, so that one that is left out is seen.
    """
    definition, state = abstract_model(model_type, config, **extra)
    rng = np.random.default_rng(seed)
    for path, variable in nnx.to_flat_state(state):
        noise = rng.standard_normal(variable.shape)
        is_norm = "norm" in path[-2]
        value = 1 + 0.1 * noise if is_norm else noise * config.hidden_size**-0.5
        variable.set_value(jax.numpy.asarray(value, dtype))
    return definition, state


def tiny_causal_lm(folder: str | Path, seed: int = 0, dtype: str = "float32", **overrides: Any) -> Path:
    """Write a whole Hugging Face folder: a random ``...ForCausalLM`` with the tokenizer of ``tiny_tokenizer``."""
    folder = Path(folder)
    tokenizer = tiny_tokenizer(folder)
    config = tiny_config(**overrides)
    assert config.vocab_size >= len(tokenizer)
    _, state = random_state(CausalLM, config, seed, dtype)
    save_weights(state, folder)
    raw = config.to_hf() | {
        "architectures": [f"{config.family.name}ForCausalLM"],
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "torch_dtype": dtype,
    }
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    return folder


def tiny_reward_model(folder: str | Path, seed: int = 0) -> Path:
    """Write a whole Hugging Face folder: a random ``LlamaForSequenceClassification`` with one label."""
    tiny_tokenizer(folder)
    _, state = random_state(SequenceClassifier, tiny_config(), seed, num_labels=1)
    raw = tiny_config().to_hf() | {"architectures": ["LlamaForSequenceClassification"]}
    save_model(folder, state, raw, ChatTokenizer.from_folder(folder), (SPECIAL[0], 0))
    return Path(folder)


def tiny_pool(rules: int = 6) -> RulePool:
    """A pool of distinct rules; every third has sign -1."""
    qualities = ("kind", "honest", "helpful advice", "true", "a refusal", "harm", "about bread", "calm")
    texts = [
        f"The response is {qualities[i % len(qualities)]}{' and kind' * (i // len(qualities))}." for i in range(rules)
    ]
    return RulePool(
        "tiny", "1", tuple(Rule(f"r{i}", "c", text, -1 if i % 3 == 2 else 1) for i, text in enumerate(texts))
    )


def tiny_pairs(count: int = 4) -> list[Pair]:
    """Short pairs of different lengths, some with several turns."""
    pairs = []
    for i in range(count):
        prompt = [{"role": "user", "content": f"How do I bake bread number {i}?"}]
        if i % 2:
            prompt += [{"role": "assistant", "content": "Mix flour." * i}, {"role": "user", "content": "And then?"}]
        pairs.append(
            Pair(f"p{i}", tuple(prompt), f"Let the dough rest {i} hours." * (i + 1), f"I refuse to help, {i}.")
        )
    return pairs
