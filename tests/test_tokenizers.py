"""Tokenizers of every make: ids are those that AutoTokenizer gives, and hostile text stays text.

The checks on real tokenizers: pytest -m slow tests/test_tokenizers.py --data DIR --smollm2 DIR
"""

import gzip
import json
import re
import shutil

import pytest
from hostile_texts import (
    CLEAN,
    HARMLESS,
    TEXTS,
    assert_as_auto_tokenizer,
    assert_text_stays_text,
    chat_of,
    decoded,
    reply_tree,
    special,
)
from tiny import CHATML, SPECIAL, tiny_pool

from adaptrm.data.chat import DATE, ChatTokenizer, choose_pad_token
from adaptrm.errors import InputError
from adaptrm.judge.prompts import JudgePrompt
from adaptrm.rules import RulePool
from adaptrm.rules.pool import Rule

# --- tokenizers of other make -------------------------------------------------------------------------------------


def _flags(**flags):
    def edit(spec):
        for token in spec["added_tokens"]:
            token.update(flags)

    return edit


def _normalised(*names, normalized):
    def edit(spec):
        first = [spec["normalizer"]] if spec["normalizer"] else []
        spec["normalizer"] = {"type": "Sequence", "normalizers": first + [{"type": name} for name in names]}
        _flags(normalized=normalized)(spec)

    return edit


def _no_digits(spec):
    spec["normalizer"] = {"type": "Replace", "pattern": {"Regex": "[0-9a-f]"}, "content": "0"}
    _flags(normalized=True)(spec)


def _added(content, **flags):
    def edit(spec):
        free = max(spec["model"]["vocab"].values()) + 1
        spec["added_tokens"].append(spec["added_tokens"][0] | {"content": content, "id": free} | flags)

    return edit


MAKES = {
    "lstrip": _flags(lstrip=True),
    "rstrip": _flags(rstrip=True),
    "both": _flags(lstrip=True, rstrip=True),
    "not-special": _flags(special=False),
    "normalized": _flags(normalized=True),
    "nfkc": _normalised("NFKC", normalized=False),
    "nfkc-normalized": _normalised("NFKC", normalized=True),
    "lower": _normalised("Lowercase", normalized=False),
    "lower-normalized": _normalised("Lowercase", normalized=True),
    "no-accents": _normalised("NFKD", "StripAccents", normalized=True),
    "nmt": _normalised("Nmt", normalized=True),
    "no-digits": _no_digits,
    "blanks": _added("  ", special=False, normalized=True),
    "nested": _added("<|im_end|>\n"),
    "one-letter": _added("h"),
    "single-word": _flags(single_word=True),
}


@pytest.mark.parametrize("make", MAKES)
def test_text_stays_text_with_tokenizers_of_other_make(chat, kind, make):
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    spec = json.loads(chat.tokenizer.backend_tokenizer.to_str())
    MAKES[make](spec)
    names = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    backend = Tokenizer.from_str(json.dumps(spec))
    odd = ChatTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHATML, **names))
    uncertain = kind == "sentencepiece" and spec["added_tokens"][0]["normalized"] and make != "no-digits"
    if uncertain or make == "single-word":
        # Known in some places only ("▁<s>" after a blank): an error rather than another text.
        with pytest.raises(InputError, match=r"'<\|im_start\|>' of the chat template is a token in some places only"):
            odd.encode_chat(chat_of("user", HARMLESS))
        return
    for text in ("Hi there", "def f():\n    return  1\n", "漢字 🙂 É ①２３ \t"):
        messages = [
            m | {"content": m["content"].replace("h", "") if make == "one-letter" else m["content"]}
            for m in chat_of("user", text)
        ]
        plain = odd.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        assert odd.encode_chat(messages).tolist() == plain
    clean = odd.encode_chat(chat_of("user", HARMLESS))
    for text in TEXTS:
        assert special(odd, odd.encode_chat(chat_of("user", text))) == special(odd, clean), repr(text)


# --- what AutoTokenizer gives -------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", [None, "llama", "qwen2"])
@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "LlamaTokenizerFast", "Qwen2TokenizerFast", "Elsewhere"])
def test_ids_are_those_of_auto_tokenizer_whatever_the_folder_names(tokenizer_folder, tmp_path, name, model_type):
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    source = shutil.copytree(tokenizer_folder, tmp_path / "source")
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": name}))
    if model_type:
        (source / "config.json").write_text(json.dumps({"model_type": model_type}))
    chat = ChatTokenizer.from_folder(source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    assert_as_auto_tokenizer(chat, tokenizer)
    chat.save(tmp_path / "saved", None)
    if model_type:
        (tmp_path / "saved" / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert_as_auto_tokenizer(chat, AutoTokenizer.from_pretrained(tmp_path / "saved"))
    assert_as_auto_tokenizer(chat, PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved"))


def test_what_transformers_4_cannot_read_is_not_written(tokenizer_folder, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot_id|>"]})
    ChatTokenizer(tokenizer).save(tmp_path, None)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["additional_special_tokens"] == ["<|eot_id|>"] and "extra_special_tokens" not in settings
    saved = ChatTokenizer.from_folder(tmp_path)
    assert saved.tokenizer.convert_tokens_to_ids("<|eot_id|>") in saved.tokenizer.all_special_ids
    assert special(saved, saved.encode_chat(chat_of("user", "<|eot_id|>"))) == [1, 2] * 5


# --- real tokenizers ----------------------------------------------------------------------------------------------


REAL = ["deepseek_r1_128k", "olmo_dolma2_100k", "olmo_gpt_neox_50k", "mistral_v3_32k", "smollm2"]
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ '[INST] ' + m['content'] + '[/INST]' }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module", params=REAL)
def real(request, tmp_path_factory):
    """A folder that AutoTokenizer reads, and the chat templates to try on it."""
    name = request.param
    templates = {"own": None} if name in ("deepseek_r1_128k", "smollm2") else {"mistral": MISTRAL}
    data = request.getfixturevalue("data") / "tokenizers"
    templates |= {file.stem: file.read_text() for file in sorted((data / "chat_templates").glob("*.jinja"))}
    if name == "smollm2":
        return request.getfixturevalue("smollm2"), templates
    if name == "mistral_v3_32k":
        pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp(name)
    for file in (data / name).iterdir():
        content = file.read_bytes()
        (folder / file.name.removesuffix(".gz")).write_bytes(
            gzip.decompress(content) if file.suffix == ".gz" else content
        )
    return folder, templates


def real_tokenizer(folder, template: str | None):
    """The folder's tokenizer, with the markers of another template as special tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if template is not None:
        tokenizer.chat_template = template
        markers = re.findall(r"</?[|｜]?[\w▁]+[|｜]?>|\[/?INST\]", template)
        tokenizer.add_special_tokens({"additional_special_tokens": sorted(set(markers))})
        if tokenizer.bos_token is None:
            tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    return tokenizer


@pytest.mark.slow
def test_real_tokenizers(real):
    folder, templates = real
    for name, template in templates.items():
        chat = ChatTokenizer(real_tokenizer(folder, template), f"{folder.name} {name}")
        first = 1 if name == "gemma" else 0  # which refuses system messages
        roles = ("system", "user", "assistant")[first:]
        for messages in (chat_of(role, text)[first:] for role in roles for text in CLEAN):
            for generation in (False, True):
                plain = chat.tokenizer.apply_chat_template(
                    messages, add_generation_prompt=generation, tokenize=True, return_dict=False, date_string=DATE
                )
                assert chat.encode_chat(messages, generation).tolist() == plain, (chat.where, messages)
        texts = [*TEXTS, *(text for text in chat.tokenizer.get_added_vocab() if text.strip())]
        for role in roles:
            clean = chat.encode_chat(chat_of(role, HARMLESS)[first:], True)
            for text in texts:
                ids = chat.encode_chat(chat_of(role, text)[first:], True)
                # Templates strip, and not every tokenizer has a token for every character.
                whole = text == text.strip() and decoded(chat, chat.encode(f"x{text}")) == f"x{text}"
                thought = "</think>" in text and not chat.special_strings(text)
                assert_text_stays_text(chat, ids, clean, text, folder.name, whole and not thought)
        assert_branches(chat, texts)


def assert_branches(chat: ChatTokenizer, texts: list[str]) -> None:
    pool = RulePool(
        "real", "1", (*tiny_pool(2).rules, *(Rule(f"h{i}", "c", f"The response {t}.") for i, t in enumerate(texts)))
    )
    try:
        prompt = JudgePrompt(chat, pool)
    except InputError as wrong:
        assert "is one token" in str(wrong)  # Neither is two tokens
        print(f"\n{chat.where}: {wrong}")
        return
    messages = [{"role": "user", "content": "Hi"}]
    clean = special(chat, chat.encode(prompt.text(messages, "No.", 0)))
    for text in texts:
        tree = reply_tree(prompt, chat_of("user", text)[:-1], text, (0, 1))
        for leaf in (0, 1):
            ids = tree.sequence(leaf)
            assert ids.tolist() == chat.encode(prompt.text(chat_of("user", text)[:-1], text, leaf)).tolist()
            assert special(chat, ids) == clean, (chat.where, text)
    tree = reply_tree(prompt, messages, "No.", range(len(pool)))
    for leaf in range(len(pool)):
        ids = tree.sequence(leaf)
        assert ids.tolist() == chat.encode(prompt.text(messages, "No.", leaf)).tolist()
        assert special(chat, ids) == clean, (chat.where, pool[leaf].text)


@pytest.mark.slow
def test_saved_real_tokenizers(real, tmp_path):
    from transformers import AutoTokenizer

    folder, templates = real
    for name, template in templates.items():
        if name == "gemma":
            continue
        chat = ChatTokenizer(real_tokenizer(folder, template), f"{folder.name} {name}")
        chat.save(tmp_path / name, choose_pad_token(chat)[0])
        assert_as_auto_tokenizer(chat, AutoTokenizer.from_pretrained(tmp_path / name))
