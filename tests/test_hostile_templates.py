"""Chat templates that loop, pry or break are one line each; the time limit that holds them."""

import json
import shutil
import threading
import time

import numpy as np
import pytest
from commands import in_process, pair_rows, write_rows
from hostile_texts import decoded
from tiny import CHATML, tiny_causal_lm, tiny_pairs, tiny_pool, tiny_tokenizer

from adaptrm.data import chat as chat_module
from adaptrm.data import time_limit
from adaptrm.data.chat import DATE, ChatTokenizer
from adaptrm.data.time_limit import run_within
from adaptrm.errors import InputError

# --- hostile templates --------------------------------------------------------------------------------------------


NESTED = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
FAN_OUT = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
TEMPLATES = {
    NESTED: "takes longer than 0.3 s",
    FAN_OUT: "takes longer than 0.3 s",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "maximum recursion depth",
    "{% for i in range(1000000000) %}{% endfor %}": "Range too big",
    "{{ ''.__class__.__mro__ }}": "access to attribute '__class__' of 'str' object is unsafe",
    "{{ messages.__init__.__globals__ }}": "'__init__' of 'list' object is unsafe",
    "{{ cycler.__init__.__globals__ }}": "unsafe",
    "{{ '{0.__class__.__mro__}'.format('') }}": "unsafe",
    "{{ messages.append(1) }}": "unsafe",
    "{{ lipsum.__globals__['os'].popen('id').read() }}": "unsafe",
    "{{ ''.__class__ }}": "makes no tokens",  # the sandbox gives nothing here
    "{{ ''|attr('__class__') }}": "makes no tokens",
    "{% include '/etc/passwd' %}": "no loader",
    "{{ raise_exception('no\nsecond line') }}": "refuses a conversation: no$",
    "{{ raise_exception('') }}": "refuses a conversation: TemplateError$",
    "{{ 1 / 0 }}": "division by zero",
    "{{ nothing.here }}": "'nothing' is undefined",
    "{{ messages[0].content * 1000000 }}": "writes 2000000 characters for one conversation",
    "{{ 'x' * 1000000000000000 }}": "MemoryError",
    "{{ (messages|length + 6) ** (messages|length * 1000000000) > 1 }}": r"computes a power \(\*\*\)",
    "{% for m in messages %}": "line 1: Unexpected end of template",
    "x\n\n{{ messages[ }}": "line 3: unexpected '}'",
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}": "maximum recursion depth",
    " \n": "",  # blanks are tokens: no harm done
}
HI = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_hostile_template_is_one_line(tmp_path, monkeypatch, template):
    monkeypatch.setattr(chat_module, "RENDER_SECONDS", 0.3)
    tiny_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template)
    if not TEMPLATES[template]:
        assert len(ChatTokenizer.from_folder(tmp_path).encode_chat(HI))
        return
    with pytest.raises(InputError, match=TEMPLATES[template]) as told:
        ChatTokenizer.from_folder(tmp_path).encode_chat(HI)
    assert str(told.value).startswith(f"{tmp_path}: the chat template ") and "\n" not in str(told.value)


def test_a_command_says_it_in_one_line_and_leaves_with_2(tmp_path, monkeypatch, capsys):
    tiny_causal_lm(tmp_path / "lm")
    (tmp_path / "lm" / "chat_template.jinja").write_text(NESTED)
    (tmp_path / "pool.yaml").write_text(tiny_pool(2).to_yaml())
    write_rows(tmp_path / "pairs.jsonl", pair_rows(tiny_pairs(1)))
    monkeypatch.setattr(chat_module, "RENDER_SECONDS", 0.3)
    arguments = ("--pairs", tmp_path / "pairs.jsonl", "--judge", tmp_path / "lm", "--rules", tmp_path / "pool.yaml")
    code, out, err = in_process(monkeypatch, capsys, "score", *arguments, "--out", tmp_path / "out")
    line = f"adaptrm: {tmp_path / 'lm'}: the chat template refuses a conversation: takes longer than 0.3 s"
    assert code == 2 and out == "" and err.splitlines()[-1] == line
    assert "Traceback" not in err


def test_folders_with_several_templates_or_none(tmp_path):
    tiny_tokenizer(tmp_path)
    file, more = tmp_path / "chat_template.jinja", tmp_path / "additional_chat_templates"
    expected = ChatTokenizer.from_folder(tmp_path).encode_chat(HI)
    # Named ones beside the default, in files and in tokenizer_config.json: the default it is, and all are kept.
    more.mkdir()
    (more / "tool_use.jinja").write_text("{{ date_string }}")
    chat = ChatTokenizer.from_folder(tmp_path)
    assert np.array_equal(chat.encode_chat(HI), expected)
    chat.save(tmp_path / "saved", None)
    saved = ChatTokenizer.from_folder(tmp_path / "saved")
    assert np.array_equal(saved.encode_chat(HI), expected)
    assert saved.tokenizer.apply_chat_template(HI, chat_template="tool_use", tokenize=False) == DATE
    file.unlink()
    with pytest.raises(InputError, match="has chat templates tool_use; name one of them 'default'"):
        ChatTokenizer.from_folder(tmp_path)
    shutil.rmtree(more)
    # A processor's file is not the tokenizer's, and a folder is no template.
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": CHATML}))
    file.mkdir()
    with pytest.raises(InputError, match=r"has no chat template; add chat_template\.jinja"):
        ChatTokenizer.from_folder(tmp_path)
    file.rmdir()
    file.write_bytes(b"\xff{{")
    with pytest.raises(InputError, match=r"the tokenizer cannot be read: 'utf-8' codec can't decode byte 0xff"):
        ChatTokenizer.from_folder(tmp_path)
    file.unlink()
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for wrong, said in {
        "has chat templates a, b": [{"name": "a", "template": "x"}, {"name": "b", "template": "y"}],
        "must be a text, not int": 7,
        "cannot be read": ["x"],
    }.items():
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": said}))
        with pytest.raises(InputError, match=wrong):
            ChatTokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("start", ["", "\n", "  ", "\n  {% if true %}\nx{% endif %}"])
def test_a_saved_template_writes_the_frozen_date_and_nothing_else(tmp_path, start):
    dated = "{{ strftime_now('%d %b %Y') }} {{ date_string }}" + CHATML
    tiny_tokenizer(tmp_path, template=start + dated)
    chat = ChatTokenizer.from_folder(tmp_path)
    chat.save(tmp_path / "saved", None)
    saved = ChatTokenizer.from_folder(tmp_path / "saved").tokenizer
    ids = chat.encode_chat(HI)
    assert ids.tolist() == saved.apply_chat_template(HI, tokenize=True, return_dict=False)
    assert f"{DATE} {DATE}<" in decoded(chat, ids)


# --- the time limit -----------------------------------------------------------------------------------------------


def _spin():
    while True:
        pass


def test_what_is_in_time_goes_on_as_ever():
    assert run_within(60, lambda: 7) == 7
    with pytest.raises(KeyError, match="x"):
        run_within(60, lambda: {}["x"])
    assert not time_limit._deadlines


def test_the_limit_holds_in_every_thread(monkeypatch):
    monkeypatch.setattr(time_limit, "TICK", 0.01)
    ends: dict[str, object] = {}

    def late():
        try:
            run_within(0.2, _spin)
        except TimeoutError as wrong:
            ends[threading.current_thread().name] = str(wrong)

    threads = [threading.Thread(target=late, name=f"t{i}", daemon=True) for i in range(3)]
    for thread in threads:
        thread.start()
    with pytest.raises(TimeoutError, match=r"takes longer than 0.2 s"):
        run_within(0.2, _spin)
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert ends == {f"t{i}": "takes longer than 0.2 s" for i in range(3)} and not time_limit._deadlines


def test_an_end_at_the_limit_is_one_or_the_other(monkeypatch):
    # The exception may come while the call returns: it must not come later, in code that is not limited.
    monkeypatch.setattr(time_limit, "TICK", 0.0005)
    ends = {True: 0, False: 0}
    for i in range(300):
        end = time.monotonic() + 0.002 + 0.00001 * (i % 100)

        def call(end=end):
            while time.monotonic() < end:
                pass

        try:
            run_within(0.002, call)
            ends[True] += 1
        except TimeoutError:
            ends[False] += 1
        for _ in range(100):
            pass
    assert min(ends.values()) > 0 and not time_limit._deadlines
