"""Rule pools as files: what is in one, and every error with its line and rule."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from adaptrm.errors import InputError
from adaptrm.rules.rule import Rule, normalised, problems, wrong_label
from adaptrm.yaml_text import read_yaml


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a pool, or deserves a second look.

    Attributes:
        kind: ``error`` where the pool cannot be loaded.
        line: of the file; None where it is about the whole pool.
        rule: id of the rule it is about, where that has one.
    """

    kind: str
    message: str
    line: int | None = None
    rule: str | None = None

    @property
    def place(self) -> str:
        """What an error message says before its text."""
        rule = "" if self.rule is None else f" (rule {self.rule!r:.80})"
        return "" if self.line is None else f"line {self.line}{rule}: "


@dataclass
class PoolFile:
    """What was read of a pool's file.

    Attributes:
        rules: those without an error, in their order; ``lines`` is where each begins.
        errors: all of them, in the order of the file.
    """

    name: str = ""
    version: str = ""
    rules: list[Rule] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    errors: list[Finding] = field(default_factory=list)


def read_rules(text: str | bytes, where: str) -> PoolFile:
    """Read ``{name, version, rules: [{id, category, text, sign}]}`` and collect all that is wrong with it.

    What a rule has to be is in ``adaptrm.rules.rule``. No two rules share an id or, but for capitals and spaces, a
    text.

    Raises:
        InputError: the text is not YAML of this form at all, so that there is nothing to go through.
    """
    raw = read_yaml(text, where)
    if not isinstance(raw, dict) or not isinstance(raw.get("rules"), list) or not raw["rules"]:
        raise InputError(f"{where}: a rule pool has name, version and a list of rules; write these three fields")
    found = PoolFile()
    if unknown := sorted(str(key) for key in raw if key not in ("name", "version", "rules")):
        found.errors.append(Finding("error", f"unknown field {unknown[0]!r}; known: name, version, rules"))
    for name in ("name", "version"):
        value = raw.get(name)
        value = str(value) if type(value) is int else value  # version: 1; a float would lose a zero (1.10)
        if wrong := wrong_label(value):
            found.errors.append(Finding("error", f"{name} {wrong}"))
        else:
            setattr(found, name, value.strip())
    seen: dict[tuple[str, str], str] = {}
    for entry, line in zip(raw["rules"], raw["rules"].lines, strict=True):
        id = entry["id"] if isinstance(entry, dict) and isinstance(entry.get("id"), str) else None
        wrong = list(problems(entry))
        if isinstance(entry, dict):
            wrong += _repeats(entry, line, seen)
        found.errors += [Finding("error", problem, line, id) for problem in wrong]
        if not wrong:
            found.rules.append(Rule(id, entry["category"].strip(), entry["text"].strip(), entry.get("sign", 1)))
            found.lines.append(line)
    return found


def _repeats(entry: dict[str, Any], line: int, seen: dict[tuple[str, str], str]) -> Iterator[str]:
    """Whether an earlier rule has this one's id or text; notes both in ``seen``."""
    for name in ("id", "text"):
        value = entry.get(name)
        if not isinstance(value, str) or not value.strip():
            continue
        key = name, normalised(value)
        if key in seen:
            yield f"{name} is that of {seen[key]}; {'ids' if name == 'id' else 'texts'} must be unique"
        else:
            seen[key] = f"line {line} (rule {str(entry.get('id'))!r:.80})"
