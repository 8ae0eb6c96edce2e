"""Chat templates and tokenizers, token-exact, with the text of users and models kept from acting as markup.

A string such as ``<|eot_id|>`` inside a message must stay text. So the tokenizer used here is a copy in which every
added token is spelled with a nonce of this process: the template's own markers are respelled after rendering and are
recognised, the same strings in a message are not, and everything else about the tokenizer stays as it is.
"""

import json
import os
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from adaptrm.errors import InputError

Message = Mapping[str, str]
# Llama 3.1's template writes today's date into the system turn unless it is given one: a score must not depend on it.
DATE = "26 Jul 2024"


class ChatTokenizer:
    """A tokenizer with a chat template.

    Attributes:
        tokenizer: the transformers tokenizer, as ``AutoTokenizer`` gives it.
    """

    def __init__(self, tokenizer, where: str = "tokenizer"):
        from tokenizers import Tokenizer

        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise InputError(f"{where}: needs a fast tokenizer (tokenizer.json); convert it with transformers first")
        if not tokenizer.chat_template:
            raise InputError(f"{where}: has no chat template; add chat_template.jinja to the folder")
        self.tokenizer = tokenizer
        self.where = where
        nonce = secrets.token_hex(8)
        spec = json.loads(backend.to_str())
        added = {token["content"]: token["id"] for token in spec["added_tokens"]}
        self.special_ids = frozenset(added.values())
        self._surfaces = {text: f"\ue000{nonce}s{number}\ue001" for text, number in added.items()}
        # Stands for the string in a message while the template renders, so that it is not taken for the template's.
        self._masks = {text: f"\ue000{nonce}m{number}\ue001" for text, number in added.items()}
        longest_first = sorted(added, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if added else re.compile(r"(?!)")
        self._guarded = Tokenizer.from_str(json.dumps(_respell(spec, self._surfaces)))
        self._guarded.no_truncation()
        self._guarded.no_padding()

    @classmethod
    def from_folder(cls, folder: str | os.PathLike) -> "ChatTokenizer":
        """What ``AutoTokenizer.from_pretrained(folder)`` gives.

        Raises:
            InputError: there is no tokenizer, or no chat template.
        """
        from transformers import AutoTokenizer

        if not any((Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
            raise InputError(f"{folder}: has no tokenizer.json; copy the tokenizer's files into the folder")
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as wrong:  # transformers raises many kinds for a broken tokenizer
            raise InputError(f"{folder}: the tokenizer cannot be read: {str(wrong).splitlines()[0]}") from None
        return cls(tokenizer, str(folder))

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return max(self.tokenizer.get_vocab().values()) + 1

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The conversation by the chat template, special tokens respelled, ready for ``encode``.

        Raises:
            InputError: the template refuses the conversation.
        """
        masked = [{"role": self._masked(m["role"]), "content": self._masked(m["content"])} for m in messages]
        try:
            text = self.tokenizer.apply_chat_template(
                masked, tokenize=False, add_generation_prompt=add_generation_prompt, date_string=DATE
            )
        except Exception as wrong:  # jinja2 raises whatever the template's code raises
            reason = (str(wrong) or type(wrong).__name__).splitlines()[0]
            raise InputError(f"{self.where}: the chat template refuses a conversation: {reason}") from None
        text = self._pattern.sub(lambda found: self._surfaces[found.group()], text)
        for special, mask in self._masks.items():
            text = text.replace(mask, special)
        return text

    def special_strings(self, text: str) -> int:
        """How many strings of a text look like special tokens; spliced into something rendered they stay text."""
        return len(self._pattern.findall(text))

    def _masked(self, text: str) -> str:
        return self._pattern.sub(lambda found: self._masks[found.group()], text)

    def encode(self, rendered: str) -> Int32[np.ndarray, " tokens"]:
        """Token ids of rendered text; special tokens are those that the template wrote."""
        return np.asarray(self._guarded.encode(rendered, add_special_tokens=False).ids, np.int32)

    def encode_many(self, rendered: Iterable[str]) -> list[Int32[np.ndarray, " tokens"]]:
        batch = self._guarded.encode_batch(list(rendered), add_special_tokens=False)
        return [np.asarray(one.ids, np.int32) for one in batch]

    def encode_chat(
        self, messages: Sequence[Message], add_generation_prompt: bool = False
    ) -> Int32[np.ndarray, " tokens"]:
        """Token ids of a conversation: those of ``apply_chat_template`` where no message holds special tokens."""
        return self.encode(self.render(messages, add_generation_prompt))

    def save(self, folder: str | os.PathLike, pad_token: str | None) -> None:
        """Write the tokenizer so that transformers 4 and 5 read it, with the pad token and the date frozen."""
        if pad_token is not None:
            self.tokenizer.pad_token = pad_token
        template = self.tokenizer.chat_template
        frozen = f'{{%- set date_string = "{DATE}" %}}'
        if "date_string" in template and not template.startswith(frozen):
            self.tokenizer.chat_template = frozen + template
        self.tokenizer.save_pretrained(folder)
        self.tokenizer.chat_template = template
        # transformers 5 names a class that transformers 4 does not have.
        file = Path(folder) / "tokenizer_config.json"
        settings = json.loads(file.read_bytes()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
        for name in ("backend", "is_local", "local_files_only", "auto_map"):
            settings.pop(name, None)
        file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _respell(spec: dict, surfaces: Mapping[str, str]) -> dict:
    """A tokenizer.json whose added tokens have other spellings and the same ids."""
    model = dict(spec["model"])
    vocab = model.get("vocab")
    if isinstance(vocab, dict):
        model["vocab"] = {surfaces.get(piece, piece): number for piece, number in vocab.items()}
    elif isinstance(vocab, list):  # Unigram: [piece, score]
        model["vocab"] = [[surfaces.get(piece, piece), score] for piece, score in vocab]
    if model.get("unk_token"):
        model["unk_token"] = surfaces.get(model["unk_token"], model["unk_token"])
    if "merges" in model:  # a merge that builds a special token from text would be a way around
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        model["merges"] = [pair for pair in pairs if not {"".join(pair), *pair} & surfaces.keys()]
    added = [token | {"content": surfaces[token["content"]]} for token in spec["added_tokens"]]
    return spec | {"model": model, "added_tokens": added, "post_processor": None}


def pad_can_end(chat: ChatTokenizer, pad_id: int | None) -> bool:
    """Whether a rendered conversation ends in the pad token: then a reward is read before its end."""
    return chat.encode_chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])[-1] == pad_id


def choose_pad_token(chat: ChatTokenizer) -> tuple[str, int]:
    """A pad token that can never end a sequence, and its id.

    transformers pools a reward at the last token that is not pad, so pad must differ from every token that ends a
    rendered conversation: the tokenizer's own pad where it is safe, else an unused special token
    (``<|finetune_right_pad_id|>``, ``<|endoftext|>`` ...), else one that is added.
    """
    tokenizer = chat.tokenizer
    used = set(chat.encode_chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]).tolist())
    used |= {tokenizer.eos_token_id, tokenizer.bos_token_id}
    if tokenizer.pad_token is not None and tokenizer.pad_token_id not in used:
        return tokenizer.pad_token, tokenizer.pad_token_id
    special = {
        token.content: number
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special and number not in used
    }
    for wanted in ("pad", "endoftext", "end_of_text"):
        for text, number in special.items():
            if wanted in text.lower():
                return text, number
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    return "<|pad|>", tokenizer.pad_token_id
