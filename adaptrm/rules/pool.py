"""Rule pools: the statements that a judge is asked about, versioned and hashed."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources

import yaml

from adaptrm import paths
from adaptrm.errors import InputError


@dataclass(frozen=True)
class Rule:
    """One statement about a response.

    Attributes:
        text: reads "The response ...", and can be judged on one response alone.
        sign: 1 where Yes speaks for the response, -1 where Yes speaks against it.
    """

    id: str
    category: str
    text: str
    sign: int = 1


@dataclass(frozen=True)
class RulePool:
    """An ordered set of rules.

    Attributes:
        hash: SHA-256 over the ids, texts and signs in their order.
    """

    name: str
    version: str
    rules: tuple[Rule, ...]

    def __len__(self) -> int:
        return len(self.rules)

    def __getitem__(self, index: int) -> Rule:
        return self.rules[index]

    def __iter__(self) -> Iterator[Rule]:
        return iter(self.rules)

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(rule.id for rule in self.rules)

    @property
    def hash(self) -> str:
        content = [[rule.id, rule.text, rule.sign] for rule in self.rules]
        return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode()).hexdigest()

    def index(self, ids: list[str], where: str) -> list[int]:
        """Positions of the given rule ids.

        Raises:
            InputError: an id is not in the pool.
        """
        position = {rule: i for i, rule in enumerate(self.ids)}
        if unknown := [rule for rule in ids if rule not in position]:
            raise InputError(f"{where}: rule {unknown[0]!r} is not in pool {self.name}; its ids are in the pool's file")
        return [position[rule] for rule in ids]

    @classmethod
    def load(cls, pool: str | os.PathLike) -> "RulePool":
        """A pool that ships with the package, by name, or a YAML file.

        Raises:
            InputError: no such pool, or the file is not one; names the file and the rule.
        """
        shipped = resources.files("adaptrm.rules") / f"{str(pool).replace('-', '_')}.yaml"
        if "/" not in str(pool) and shipped.is_file():
            return cls.parse(shipped.read_text(encoding="utf-8"), str(pool))
        if not paths.exists(pool):
            known = sorted(
                entry.name.removesuffix(".yaml").replace("_", "-")
                for entry in resources.files("adaptrm.rules").iterdir()
                if entry.name.endswith(".yaml")
            )
            raise InputError(f"{pool}: no such rule pool; give a YAML file or one of: {', '.join(known)}")
        return cls.parse(paths.read_bytes(pool).decode("utf-8", "replace"), str(pool))

    @classmethod
    def parse(cls, text: str, where: str) -> "RulePool":
        """Read the YAML form ``{name, version, rules: [{id, category, text, sign}]}``."""
        try:
            raw = yaml.safe_load(text)
        except yaml.YAMLError as wrong:
            mark = getattr(wrong, "problem_mark", None)
            line = f", line {mark.line + 1}" if mark else ""
            reason = getattr(wrong, "problem", None) or str(wrong).splitlines()[0]
            raise InputError(f"{where}{line}: not valid YAML: {reason}") from None
        if not isinstance(raw, dict) or not isinstance(raw.get("rules"), list) or not raw["rules"]:
            raise InputError(f"{where}: a rule pool has name, version and a list of rules")
        rules = tuple(_rule(entry, f"{where}: rule {number}") for number, entry in enumerate(raw["rules"], 1))
        for field in ("id", "text"):
            seen: set[str] = set()
            for rule in rules:
                if (value := getattr(rule, field)) in seen:
                    raise InputError(f"{where}: two rules have the {field} {value!r}; ids and texts must be unique")
                seen.add(value)
        return cls(str(raw.get("name", where)), str(raw.get("version", "")), rules)

    def to_yaml(self) -> str:
        rules = [{k: v for k, v in vars(rule).items() if (k, v) != ("sign", 1)} for rule in self.rules]
        whole = {"name": self.name, "version": self.version, "rules": rules}
        return yaml.safe_dump(whole, sort_keys=False, allow_unicode=True, width=120)


def _rule(entry, where: str) -> Rule:
    if not isinstance(entry, dict):
        raise InputError(f"{where}: must have id, category and text")
    if unknown := set(entry) - {"id", "category", "text", "sign"}:
        raise InputError(f"{where}: unknown field {sorted(map(str, unknown))[0]!r}; known: id, category, text, sign")
    for field in ("id", "text"):
        if not isinstance(entry.get(field), str) or not entry[field].strip():
            raise InputError(f"{where}: {field} is missing or no text")
    if entry.get("sign", 1) not in (1, -1):
        raise InputError(f"{where} ({entry['id']}): sign must be 1 or -1")
    return Rule(entry["id"], str(entry.get("category", "")), entry["text"].strip(), int(entry.get("sign", 1)))
