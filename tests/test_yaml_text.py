"""YAML: plain values are read as ever, what can do harm or hides what holds is refused with its line."""

import pytest
import yaml

from adaptrm.errors import InputError
from adaptrm.train.start import open_run
from adaptrm.yaml_text import MAX_DEPTH, read_yaml


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("a: &x [1]\nb: *x", 1, "&x and *x are not allowed; write the value out"),
        ("a: 1\nb: *x", 2, "&x and *x are not allowed; write the value out"),
        (
            "a: !!python/object/apply:os.getcwd []",
            1,
            "the tag '!!python/object/apply:os.getcwd' is not allowed; delete",
        ),
        ("a:\n- !!binary aGk=", 2, "the tag '!!binary' is not allowed; delete it, or put the text in quotes"),
        ("a: !!str 5", 1, "the tag '!!str' is not allowed"),
        ("a: !own x", 1, "the tag '!own' is not allowed"),
        ("a: !b%0ac d", 1, "the tag '!b\\nc' is not allowed"),
        ("! a", 1, "the tag '!' is not allowed"),
        ("a: 1\nb: 2\na: 3", 3, "the key 'a' comes twice; delete one"),
        ("a: {b: 1,\n b: 1}", 2, "the key 'b' comes twice; delete one"),
        ("? [a]\n: b", 1, "a key must be one value; put text in quotes"),
        ("[" * 100_000, 1, f"nested deeper than {MAX_DEPTH} levels"),
        ("\n" + "{a: " * 100_000, 2, f"nested deeper than {MAX_DEPTH} levels"),
        ("- " * 10_000 + "a", 1, f"nested deeper than {MAX_DEPTH} levels"),
        ("a: 1\n--- b", 2, "but found another document"),
        ("a: 2024-13-45", 1, "'2024-13-45': month must be in 1..12; put text in quotes"),
        ("a: 0x_", 1, "'0x_': invalid literal"),
        ("a:\n  0x" + "f" * 9999, 2, "too large a number; put text in quotes"),
        ("a: " + "9" * 9999, 1, "; put text in quotes"),
        ('\n"\\UFFFFFFFF"', 2, "an escape names no character"),
        ("a: \ud800", 1, "character U+D800 is not allowed; delete it"),
    ],
)
def test_yaml_that_can_do_harm_is_refused_with_its_line(text, line, problem):
    with pytest.raises(InputError) as wrong:
        read_yaml(text, "here")
    message = str(wrong.value)
    assert message.isprintable()
    assert message.startswith(f"here: line {line}: not valid YAML: ") and problem in message and len(message) < 300


def test_yaml_is_read_as_ever_where_it_is_plain():
    text = "a: [1, -2.5, yes, null, x]\nb: {c: '&d', 4: '!e', <<: =}\nf: |\n  g\n  h\n"
    assert read_yaml(text, "here") == {
        "a": [1, -2.5, True, None, "x"],
        "b": {"c": "&d", 4: "!e", "<<": "="},
        "f": "g\nh\n",
    }
    assert read_yaml("- 1\n\n- [2,\n   3]", "here").lines == (1, 3)
    assert read_yaml("\ufeffa: é".encode(), "here") == {"a": "é"}
    assert read_yaml("", "here") is None
    deep = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert yaml.safe_load(deep) == read_yaml(deep, "here")


@pytest.mark.parametrize(
    "config",
    [b"reward: &a {}", b"reward: !!python/name:os.system ''", b"\xff", b"reward: [", b"reward: 1", b"a: {}", b""],
)
def test_the_config_of_a_run_folder_is_read_as_safely(tmp_path, config):
    (tmp_path / "config.yaml").write_bytes(config)
    with pytest.raises(InputError) as wrong:
        open_run(tmp_path)
    assert (
        str(wrong.value) == f"{tmp_path}/config.yaml: not the config of a run; delete the folder, or give another one"
    )
