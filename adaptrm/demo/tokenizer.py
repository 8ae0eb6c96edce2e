"""A small byte-level BPE for the demo, trained on its own texts, with a chat template and a pad token of its own."""

import os
import re
from collections.abc import Iterable

from adaptrm.data.chat import ChatTokenizer
from adaptrm.judge.prompts import ANSWERS, TEMPLATES

VOCAB_SIZE = 1536
BOS, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
ROLE_MARKS = ("<|system|>", "<|user|>", "<|assistant|>")
# As ChatML, with the role inside the marker: one token rather than three.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TEMPLATE = TEMPLATES["conversation-first"]
# GPT-2's split into words.
WORDS = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"


def make_tokenizer(texts: Iterable[str], folder: str | os.PathLike) -> ChatTokenizer:
    """Train a tokenizer and write it as a folder that transformers 4 and 5 read; the same texts give the same files.

    Args:
        texts: prompts, responses and rule texts; the judge's own words are added here.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_pieces()), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, BOS, END, *ROLE_MARKS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_with_judge_words(texts), trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    chat = ChatTokenizer(wrapped, str(folder))
    chat.save(folder, PAD)
    return ChatTokenizer.from_folder(folder)


def _pieces() -> str:
    """What BPE never merges across: words, but each fixed text of the judge's prompt is one piece, hence one token.

    They are most of a short prompt, and a judge this small has nothing to learn from them.
    """
    fixed = [part for text in vars(TEMPLATE).values() for part in re.split(r"\{\w+\}", text) if part.strip()]
    return "|".join([*(rf"\n*{re.escape(part.lstrip())}" for part in fixed), WORDS])


def _with_judge_words(texts: Iterable[str]) -> Iterable[str]:
    """The texts, each followed by the judge's prompt about it, so that its words become tokens too."""
    for text in texts:
        yield text
        quoted = f"{TEMPLATE.opening}User: {text}\n\n{TEMPLATE.response}{text}\n\n"
        yield quoted + TEMPLATE.question.replace("{rule}", text)
        yield from ANSWERS
