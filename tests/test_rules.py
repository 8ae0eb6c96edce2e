"""Rule pools: every error names its line, whatever is written is a pool or one line, and a hash stays what it is."""

import json
from dataclasses import replace

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from refusals import refused
from tiny import tiny_pool

from adaptrm.demo.world import demo_pool
from adaptrm.errors import InputError
from adaptrm.rules import Rule, RulePool

POOL = "name: n\nversion: 1\nrules:\n- {id: a, category: c, text: The response is kind.}\n"
HASH = "4009b2d8e649c23baf96a643115504fea5653e72c688fbe5b168e791ca743b91"


def rule(text: str = "The response is calm.", **fields) -> str:
    """One more rule for ``POOL``, on line 5."""
    return POOL + "- " + json.dumps({"id": "b", "category": "c", "text": text} | fields)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rules: [", ": line 1: not valid YAML: "),
        (POOL + "  - bad", ": line 5: not valid YAML: "),
        (POOL + "- {id: b, text: The response says: no.}", ": line 5: not valid YAML: "),
        ("name: n\nrules: \x00", ": line 2: not valid YAML: character U+0000 is not allowed; delete it"),
        (b"name: n\nrules: \xff", ": line 2: not valid YAML: not UTF-8; save the file as UTF-8"),
        ("name: n".encode("utf-16"), ": line 1: not valid YAML: not UTF-8; save the file as UTF-8"),
        ("[]", ": a rule pool has name, version and a list of rules; write these three fields"),
        ("name: n\nrules: []", ": a rule pool has name, version and a list of rules"),
        ("rules: {a: b}", ": a rule pool has name, version and a list of rules"),
        (POOL + "author: me", ": unknown field 'author'; known: name, version, rules"),
        (POOL.replace("name: n\n", ""), ": name is missing; give one"),
        (POOL.replace("name: n", "name: ' '"), ": name is empty; give one"),
        (POOL.replace("name: n", "name: on"), ": name must be text, not True; put it in quotes"),
        (POOL.replace("version: 1\n", ""), ": version is missing; give one"),
        (POOL.replace("version: 1", "version: 1.10"), ": version must be text, not 1.1; put it in quotes"),
        (POOL.replace("version: 1", f"version: {'9' * 65}"), ": line 2: not valid YAML: "),
        (POOL + "- text", ": line 5: a rule has the fields id, category and text; write {id: ..., category: "),
        (rule(sing=-1), ": line 5 (rule 'b'): unknown field 'sing'; known: id, category, text, sign"),
        (POOL + "- {category: c, text: The response is calm.}", ": line 5: id is missing or no text; give one"),
        (rule(id=5), ": line 5: id is missing or no text; give one, in quotes if it is a number"),
        (rule(id=" "), ": line 5 (rule ' '): id is missing or no text; give one"),
        (rule(id="é"), ": line 5 (rule 'é'): id must be at most 64 of letters, digits, _, - and ., none of the"),
        (rule(id="-b"), ": line 5 (rule '-b'): id must be at most 64 of letters"),
        (rule(id="a b"), ": line 5 (rule 'a b'): id must be at most 64 of letters"),
        (rule(id="b\n"), ": line 5 (rule 'b\\n'): id must be at most 64 of letters"),
        (rule(id="b" * 65), f": line 5 (rule '{'b' * 65}'): id must be at most 64 of letters"),
        (POOL + "- {id: b, text: The response is calm.}", ": line 5 (rule 'b'): category is missing; give one"),
        (rule(category=""), ": line 5 (rule 'b'): category is empty; give one"),
        (rule(category=3), ": line 5 (rule 'b'): category must be text, not 3; put it in quotes"),
        (rule(category="c" * 65), ": line 5 (rule 'b'): category must be one line of at most 64 printable characters"),
        (POOL + "- {id: b, category: c}", ": line 5 (rule 'b'): text is missing or no text; write a statement"),
        (rule(" "), ": line 5 (rule 'b'): text is missing or no text; write a statement"),
        (rule("Is kind."), ": line 5 (rule 'b'): text must begin with 'The response' and go on; it begins with 'Is k"),
        (rule("The response"), ": line 5 (rule 'b'): text must begin with 'The response' and go on"),
        (rule("The response is\nkind."), ": line 5 (rule 'b'): text must be one line of printable characters; delete"),
        (rule("The response \u202eis kind."), "delete character U+202E"),
        (rule("The response \ud800is kind."), "delete character U+D800"),
        (
            rule("The response " + "x" * 388),
            ": line 5 (rule 'b'): text has 401 characters, at most 400 are allowed; sh",
        ),
        (rule("The response is kinder than the other."), "speaks of another response ('than the other'), but a judge"),
        (rule("The response repeats the other response."), "speaks of another response ('the other response')"),
        (rule("The response is one of two responses."), "speaks of another response ('two responses')"),
        (rule("The response agrees with response B."), "speaks of another response ('response B')"),
        (rule(sign=0), ": line 5 (rule 'b'): sign must be 1 (Yes speaks for the response) or -1 (against it), not 0"),
        (
            rule(sign=True),
            ": line 5 (rule 'b'): sign must be 1 (Yes speaks for the response) or -1 (against it), not T",
        ),
        (rule(sign=1.0), ": line 5 (rule 'b'): sign must be 1 (Yes speaks for the response) or -1 (against it), not 1"),
        (rule(sign="1"), ": line 5 (rule 'b'): sign must be 1 (Yes speaks for the response) or -1 (against it), not '"),
        (rule(id="a"), ": line 5 (rule 'a'): id is that of line 4 (rule 'a'); ids must be unique"),
        (rule("The response is  KIND"), ": line 5 (rule 'b'): text is that of line 4 (rule 'a'); texts must be unique"),
    ],
)
def test_wrong_rule_pools_name_file_line_and_rule(tmp_path, text, message):
    file = tmp_path / "pool.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    found = refused(RulePool.load, file)
    assert found.startswith(f"{file}: ") and message in found


def test_an_absent_pool_is_an_error(tmp_path):
    known = "no such rule pool; give a YAML file or one of: safety-100, safety-24"
    assert refused(RulePool.load, "safty-100") == f"safty-100: {known}"
    assert known in refused(RulePool.load, tmp_path / "none.yaml")
    assert "is a folder" in refused(RulePool.load, tmp_path)


def test_a_pool_is_read_as_written_and_hashed_by_what_is_asked():
    pool = RulePool.parse(POOL + "- {id: b_2, category: d, text: ' The response harms. ', sign: -1}", "here")
    assert (pool.name, pool.version, len(pool), pool.ids) == ("n", "1", 2, ("a", "b_2"))
    assert (pool[1].category, pool[1].text, pool[1].sign, pool[0].sign) == ("d", "The response harms.", -1, 1)
    assert pool.index(["b_2", "a"], "here") == [1, 0]
    assert "rule 'c' is not in pool n" in refused(pool.index, ["a", "c"], "here")
    # Score folders and runs hold this hash: it may never change for the same ids, texts and signs.
    assert pool.hash == HASH
    changed = [replace(pool[0], **{name: "other"}) for name in ("id", "text")] + [replace(pool[0], sign=-1)]
    hashes = {replace(pool, rules=(rule, pool[1])).hash for rule in changed} | {pool.hash}
    assert len(hashes | {replace(pool, rules=pool.rules[::-1]).hash}) == 5
    same = replace(pool, name="m", version="2", rules=(replace(pool[0], category="x"), pool[1]))
    assert same.hash == pool.hash  # the judge is asked the same


@pytest.mark.parametrize(
    "pool", [demo_pool(), tiny_pool(), tiny_pool(100), *map(RulePool.load, ("safety-100", "safety-24"))], ids=len
)
def test_the_pools_of_this_project_are_read_back(pool):
    assert RulePool.parse(pool.to_yaml(), "there") == pool
    assert RulePool.parse(pool.to_yaml().encode(), "there").hash == pool.hash


PRINTABLE = st.text(max_size=40).map(lambda text: "".join(c for c in text if c.isprintable()).strip())
IDS = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,8}", fullmatch=True) | st.sampled_from(
    ["on", "null", "1e3", "0x1", "2024-01-01"]
)
RULES = st.lists(
    st.builds(
        Rule,
        IDS,
        PRINTABLE.filter(bool) | st.sampled_from(["no", "~", "5", "- x", "a: b"]),
        PRINTABLE.filter(bool).map(lambda text: f"The response {text}"),
        st.sampled_from([1, -1]),
    ),
    min_size=1,
    max_size=5,
    unique_by=lambda rule: rule.id,
)


@settings(max_examples=40)
@given(RULES, st.sampled_from(["n", "1", "on", "1.10", "é ✓"]))
def test_to_yaml_keeps_a_pool_and_its_hash(rules, name):
    pool = RulePool(name, name, tuple(rules))
    try:
        again = RulePool.parse(pool.to_yaml(), "here")
    except InputError as wrong:  # two texts that differ in capitals alone, or the like
        assume("texts must be unique" not in str(wrong))
        raise
    assert (again, again.hash) == (pool, pool.hash)


PIECES = st.sampled_from(
    [
        *("name: n\n", "version: 1\n", "rules:\n", "- {id: a, category: c, text: The response is kind.}\n", "- ", "  "),
        *("&a ", "*a", "!!str ", "!x ", "<<: ", "? ", ": ", ": ", "{", "}", "[", "]", ", ", "|\n", ">-\n", "'", '"'),
        *(
            "#",
            "%YAML 1.1\n",
            "%TAG ! x\n",
            "---\n",
            "...\n",
            "\t",
            "\n",
            "\\U",
            "\\x",
            "0x",
            "0b_",
            "1_0",
            "2024-01-99",
        ),
        *(
            "1:99",
            ".inf",
            ".nan",
            "~",
            "=",
            "true",
            "\x00",
            "\ud800",
            "\u2028",
            "é",
            "\ufeff",
            "id: ",
            "text: ",
            "sign: ",
        ),
    ]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.dates() | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.dictionaries(st.sampled_from(["id", "category", "text", "sign", "x"]) | st.integers(), VALUES, max_size=5)
ENTRIES = st.fixed_dictionaries({"rules": st.lists(FIELDS | VALUES, max_size=4) | VALUES}, optional={"name": VALUES})


@settings(max_examples=300)
@given(
    st.lists(PIECES | st.text(max_size=3), max_size=14).map("".join) | st.one_of(VALUES, ENTRIES).map(yaml.safe_dump)
)
def test_whatever_is_written_is_a_pool_or_one_line(text):
    for given_text in (text, text.encode("utf-8", "surrogatepass")):
        try:
            pool = RulePool.parse(given_text, "here")
        except InputError as wrong:
            assert str(wrong).startswith("here: ") and len(str(wrong).splitlines()) == 1
        else:
            assert len(pool) and RulePool.parse(pool.to_yaml(), "there").hash == pool.hash


@given(st.binary(max_size=30))
def test_whatever_bytes_are_no_fault_of_ours(data):
    with pytest.raises(InputError):  # thirty bytes hold no pool
        RulePool.parse(data, "here")
