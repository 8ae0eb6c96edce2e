"""Chat templates and tokenizers, token-exact, with the text of users and models kept from acting as markup.

A string such as ``<|eot_id|>`` inside a message must stay text. So the tokenizer used here is a copy in which every
added token is spelled with a nonce of this process: the template's own markers are respelled after rendering and are
recognised, the same strings in a message are not, and everything else about the tokenizer stays as it is.

Added tokens are markup whether or not the tokenizer calls them special (``<think>``, ``<tool_call>`` are not, and steer
a model all the same). Those of blanks alone (GPT-NeoX has runs of spaces) are ordinary text.
"""

import importlib.util
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from jaxtyping import Int32
from jinja2 import Environment, TemplateSyntaxError

from adaptrm.data.time_limit import run_within
from adaptrm.errors import InputError

Message = Mapping[str, str]
# Templates write today's date into the system turn unless they are given one: a score must not depend on it.
DATE = "26 Jul 2024"
DATED = ("date_string", "strftime_now")
# Goes before a template that asks for it. Its line end is the last tag's, so that the template begins where it began.
FROZEN_DATE = (
    f'{{%- set date_string = "{DATE}" %}}'  # read by Llama 3.1
    f"{{%- macro strftime_now(format) %}}{DATE}{{%- endmacro %}}\n"
)
# What a template that comes with a model folder may cost: a real one takes well under a millisecond.
RENDER_SECONDS = 10.0
MAX_ADDED_CHARACTERS = 1_000_000
ROLE = re.compile(r"[\w-]+")


class ChatTokenizer:
    """A tokenizer with a chat template.

    Attributes:
        tokenizer: the transformers tokenizer, as ``AutoTokenizer`` gives it.
        template: its chat template, the date frozen.
        special_ids: ids of the added tokens that text never becomes.
    """

    def __init__(self, tokenizer, where: str = "tokenizer"):
        from tokenizers import Tokenizer

        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise InputError(f"{where}: needs a fast tokenizer (tokenizer.json); convert it with transformers first")
        self.tokenizer = tokenizer
        self.where = where
        self.template = self._chosen_template()
        spec = json.loads(backend.to_str())
        added = {token["content"]: token["id"] for token in spec["added_tokens"]}
        added = {text: number for text, number in added.items() if text.replace("▁", " ").strip()}
        self.special_ids = frozenset(added.values())
        nonce = _unseen(secrets.randbits(64), 16)
        self._surfaces = {text: nonce + _unseen(number, 8) for number, text in enumerate(added)}
        longest_first = sorted(added, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        # A message without any of these characters can be no part of an added token.
        self._edges = sorted({text[i] for text in added for i in (0, -1)})
        with _told(where, "cannot be read"):
            self._guarded = Tokenizer.from_str(json.dumps(_respell(spec, self._surfaces)))
        self._guarded.no_truncation()
        self._guarded.no_padding()
        between_letters = self.encode_many(f"a{surface}a" for surface in self._surfaces.values())
        self._passed_over = {t for t, ids in zip(added, between_letters, strict=True) if added[t] not in ids}

    def _chosen_template(self) -> str:
        try:
            template = self.tokenizer.get_chat_template() if self.tokenizer.chat_template else None
        except ValueError:  # several, and none is the default
            names = ", ".join(sorted(self.tokenizer.chat_template))
            raise InputError(f"{self.where}: has chat templates {names}; name one of them 'default'") from None
        if not template:
            raise InputError(f"{self.where}: has no chat template; add chat_template.jinja to the folder")
        if not isinstance(template, str):
            raise InputError(f"{self.where}: chat_template must be a text, not {type(template).__name__}")
        # One power can take hours in a single step of Python, where no time limit reaches it.
        with suppress(TemplateSyntaxError):  # which rendering tells
            if any(token[1:] == ("operator", "**") for token in Environment().lex(template)):
                raise InputError(f"{self.where}: the chat template computes a power (**); take that out of it")
        return _freeze_date(template)

    @classmethod
    def from_folder(cls, folder: str | os.PathLike) -> "ChatTokenizer":
        """What ``AutoTokenizer.from_pretrained(folder)`` gives.

        Raises:
            InputError: there is no tokenizer, or no chat template.
        """
        from transformers import AutoTokenizer

        names = [
            name for name in ("tokenizer.json", "vocab.json", "tokenizer.model") if (Path(folder) / name).is_file()
        ]
        if not names:
            raise InputError(f"{folder}: has no tokenizer.json; copy the tokenizer's files into the folder")
        if names == ["tokenizer.model"] and importlib.util.find_spec("sentencepiece") is None:
            raise InputError(
                f"{folder}: tokenizer.model alone needs sentencepiece; pip install 'adaptrm[sentencepiece]'"
            )
        with _told(str(folder), "cannot be read"):
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        return cls(tokenizer, str(folder))

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return max(self.tokenizer.get_vocab().values()) + 1

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The conversation by the chat template, special tokens respelled, ready for ``encode``.

        Strings in a message that look like special tokens have their first and last characters hidden while the
        template renders. Some templates change what they are given (lower-case it, cut pieces out), so a second
        rendering hides every such character: where it has other markers, some were made of the messages, and it is
        the one that counts.

        Raises:
            InputError: the template refuses the conversation, takes too long or writes too much; a role is no word.
        """
        for message in messages:
            if not (isinstance(message["content"], str) and ROLE.fullmatch(str(message["role"]))):
                raise InputError(f"a message needs a role of one word and a text, not {str(dict(message))[:80]}")
        said = "".join(message["content"] for message in messages)
        edges = [edge for edge in self._edges if edge in said]
        if not edges:
            return self._mark(self._apply(messages, add_generation_prompt))
        taken = {*said, *self.template}
        stand_ins = (char for char in map(chr, range(0xF0000, 0xFFFFE)) if char not in taken)  # private use
        hidden = dict(zip(edges, stand_ins, strict=False))

        def hide(text: str) -> str:
            return _replace_all(text, hidden)

        def hide_special(text: str) -> str:
            return self._pattern.sub(lambda found: hide(found.group()), text)

        text, careful = (
            self._apply([{**m, "content": change(m["content"])} for m in messages], add_generation_prompt)
            for change in (hide_special, hide)
        )
        if self._pattern.findall(text) != self._pattern.findall(careful):
            text = careful
        return _replace_all(self._mark(text), {stand_in: edge for edge, stand_in in hidden.items()})

    def _apply(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        def apply() -> str:
            return self.tokenizer.apply_chat_template(
                list(messages), chat_template=self.template, tokenize=False, add_generation_prompt=add_generation_prompt
            )

        try:
            text = run_within(RENDER_SECONDS, apply)
        except Exception as wrong:  # jinja2 raises whatever the template's code raises
            number = getattr(wrong, "lineno", None)
            line = f"line {number - self.template.startswith(FROZEN_DATE)}: " if number else ""
            raise InputError(
                f"{self.where}: the chat template refuses a conversation: {line}{_first_line(wrong)}"
            ) from None
        if len(text) > MAX_ADDED_CHARACTERS + 10 * sum(len(message["content"]) for message in messages):
            raise InputError(f"{self.where}: the chat template writes {len(text)} characters for one conversation")
        return text

    def _mark(self, text: str) -> str:
        """Rendered text with the template's markers respelled."""

        def respelled(found: re.Match[str]) -> str:
            if found.group() in self._passed_over:
                raise InputError(
                    f"{self.where}: {found.group()!r} of the chat template is a token in some places only; "
                    "set its single_word and normalized to false in tokenizer.json"
                )
            return self._surfaces[found.group()]

        return self._pattern.sub(respelled, text)

    def special_strings(self, text: str) -> int:
        """How many strings of a text look like special tokens; spliced into something rendered they stay text."""
        return len(self._pattern.findall(text))

    def encode(self, rendered: str) -> Int32[np.ndarray, " tokens"]:
        """Token ids of rendered text; special tokens are those that the template wrote."""
        return self.encode_many([rendered])[0]

    def encode_many(self, rendered: Iterable[str]) -> list[Int32[np.ndarray, " tokens"]]:
        with _told(self.where, "fails"):
            batch = self._guarded.encode_batch(list(rendered), add_special_tokens=False)
        return [np.asarray(one.ids, np.int32) for one in batch]

    def encode_chat(
        self, messages: Sequence[Message], add_generation_prompt: bool = False
    ) -> Int32[np.ndarray, " tokens"]:
        """Token ids of a conversation: those of ``apply_chat_template`` where no message holds special tokens.

        Raises:
            InputError: as ``render``; nothing is left of the conversation.
        """
        ids = self.encode(self.render(messages, add_generation_prompt))
        if not len(ids):
            raise InputError(f"{self.where}: the chat template makes no tokens of a conversation")
        return ids

    def save(self, folder: str | os.PathLike, pad_token: str | None, as_rendered: bool = False) -> None:
        """Write the tokenizer so that transformers 4 and 5 read it, with the pad token and the date frozen.

        Args:
            as_rendered: the written tokenizer adds nothing to a text. Tools that tokenize what the template rendered
                (RewardBench, vLLM's classify) would otherwise give it a second beginning-of-sequence token.
        """
        if pad_token is not None:
            self.tokenizer.pad_token = pad_token
        template = self.tokenizer.chat_template
        several = isinstance(template, dict)
        frozen = {name: _freeze_date(text) for name, text in (template if several else {"": template}).items()}
        self.tokenizer.chat_template = frozen if several else frozen[""]
        self.tokenizer.save_pretrained(folder)
        self.tokenizer.chat_template = template
        # transformers 5 names a class that transformers 4 does not have. Of the one that both have, 4 gives out token
        # types beside the ids, which decoders refuse.
        file = Path(folder) / "tokenizer_config.json"
        settings = json.loads(file.read_bytes()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
        settings["model_input_names"] = ["input_ids", "attention_mask"]
        for name in ("backend", "is_local", "local_files_only", "auto_map"):
            settings.pop(name, None)
        # Nor does transformers 4 read a list under the name that transformers 5 gives it.
        if isinstance(settings.get("extra_special_tokens"), list):
            settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
        file.write_text(json.dumps(settings, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
        if as_rendered and self.tokenizer.num_special_tokens_to_add():
            whole = Path(folder) / "tokenizer.json"
            spec = json.loads(whole.read_bytes()) | {"post_processor": None}
            whole.write_text(json.dumps(spec, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _freeze_date(template: str) -> str:
    dated = any(name in template for name in DATED) and not template.startswith(FROZEN_DATE)
    return FROZEN_DATE + template if dated else template


def _unseen(number: int, digits: int) -> str:
    """A number in private-use characters, which no normaliser folds and no text holds by chance."""
    return "".join(chr(0xE000 + int(digit, 16)) for digit in f"{number:0{digits}x}")


def _replace_all(text: str, pairs: Mapping[str, str]) -> str:
    for old, new in pairs.items():
        text = text.replace(old, new)
    return text


def _first_line(wrong: Exception) -> str:
    return next((line.strip() for line in str(wrong).splitlines() if line.strip()), type(wrong).__name__)


@contextmanager
def _told(where: str, failed: str) -> Iterator[None]:
    """One line for whatever a broken tokenizer raises: transformers many kinds, the Rust code below it panics."""
    try:
        yield
    except InputError:
        raise
    except BaseException as wrong:
        if not isinstance(wrong, Exception) and type(wrong).__name__ != "PanicException":
            raise
        raise InputError(f"{where}: the tokenizer {failed}: {_first_line(wrong)}") from None


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
    added = [token | {"content": surfaces.get(token["content"], token["content"])} for token in spec["added_tokens"]]
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
