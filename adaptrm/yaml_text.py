"""YAML as users write it: plain values alone, and every mistake is one line that names the line."""

from collections.abc import Hashable
from typing import Any

import yaml

from adaptrm.errors import InputError

MAX_DEPTH = 32  # levels; a config has 4, a rule pool 3


class LinedList(list):
    """A list that knows where its items stand.

    Attributes:
        lines: the line that each item begins on, from 1.
    """

    lines: tuple[int, ...] = ()


def read_yaml(text: str | bytes, where: str) -> Any:
    """The one document of a text; sequences come as ``LinedList``.

    Anchors, aliases, tags, keys that come twice and deep nesting are refused: they let a small text grow without
    bound, say what to build, or hide what holds, and no file of ours needs them.

    Args:
        where: names the text in errors.

    Raises:
        InputError: not UTF-8, not YAML, or YAML that is refused; names the line.
    """
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError as wrong:
            line = text.count(b"\n", 0, wrong.start) + 1
            raise InputError(f"{where}: line {line}: not valid YAML: not UTF-8; save the file as UTF-8") from None
    try:
        loader = _PlainLoader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.reader.ReaderError as wrong:
        line = text.count("\n", 0, wrong.position) + 1
        reason = f"character U+{wrong.character:04X} is not allowed; delete it"
    except yaml.MarkedYAMLError as wrong:
        mark = wrong.problem_mark or wrong.context_mark
        line, reason = mark.line + 1, " ".join((wrong.problem or wrong.context).split())
        if type(wrong) is not yaml.MarkedYAMLError:  # not one of ours, which say how to mend it
            reason += "; check indentation and brackets, put text with : or # in quotes"
    except (ValueError, OverflowError):  # of the scanner: "\UFFFFFFFF" is beyond Unicode
        line, reason = loader.get_mark().line + 1, "an escape names no character"
    raise InputError(f"{where}: line {line}: not valid YAML: {reason}")


def _refused(node_or_event: Any, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node_or_event.start_mark)


class _PlainLoader(yaml.SafeLoader):
    """Scalars, sequences and mappings, and nothing that YAML has beside them."""

    depth = 0

    def compose_node(self, parent, index):
        event = self.peek_event()
        if getattr(event, "anchor", None) is not None:  # of an alias, and of a node with an anchor
            raise _refused(event, f"&{event.anchor} and *{event.anchor} are not allowed; write the value out")
        if getattr(event, "tag", None) is not None:
            shown = event.tag.replace("tag:yaml.org,2002:", "!!")
            raise _refused(event, f"the tag {shown!r:.60} is not allowed; delete it, or put the text in quotes")
        if self.depth == MAX_DEPTH:
            raise _refused(event, f"nested deeper than {MAX_DEPTH} levels")
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_object(self, node, deep=False):
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, int) and value.bit_length() > 64:  # 0xfff... has no limit, and its repr does
                raise ValueError("too large a number")
            return value
        except (ValueError, OverflowError) as wrong:  # looks like a number or a date and is none
            raise _refused(node, f"{node.value[:40]!r}: {wrong}; put text in quotes") from None

    def mapping(self, node):
        found: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise _refused(key_node, "a key must be one value; put text in quotes")
            if key in found:
                raise _refused(key_node, f"the key {key!r} comes twice; delete one")
            found[key] = self.construct_object(value_node, deep=True)
        return found

    def sequence(self, node):
        found = LinedList(self.construct_object(item, deep=True) for item in node.value)
        found.lines = tuple(item.start_mark.line + 1 for item in node.value)
        return found


_PlainLoader.add_constructor("tag:yaml.org,2002:map", _PlainLoader.mapping)
_PlainLoader.add_constructor("tag:yaml.org,2002:seq", _PlainLoader.sequence)
# A plain << or = is text: what they mean in YAML needs aliases and tags.
for _tag in ("merge", "value"):
    _PlainLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", _PlainLoader.construct_yaml_str)
