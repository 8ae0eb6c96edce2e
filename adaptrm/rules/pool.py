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
from adaptrm.rules.pool_file import read_rules
from adaptrm.rules.rule import Rule


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
            InputError: no such pool, or the file is not one; names the file, the line and the rule.
        """
        return cls.parse(read_text(pool), str(pool))

    @classmethod
    def parse(cls, text: str | bytes, where: str) -> "RulePool":
        """Read the YAML form ``{name, version, rules: [{id, category, text, sign}]}``; see ``pool_file.py``."""
        found = read_rules(text, where)
        if found.errors:
            raise InputError(f"{where}: {found.errors[0].place}{found.errors[0].message}")
        return cls(found.name, found.version, tuple(found.rules))

    def to_yaml(self) -> str:
        rules = [{k: v for k, v in vars(rule).items() if (k, v) != ("sign", 1)} for rule in self.rules]
        whole = {"name": self.name, "version": self.version, "rules": rules}
        return yaml.safe_dump(whole, sort_keys=False, allow_unicode=True, width=120)


def read_text(pool: str | os.PathLike) -> bytes:
    """The YAML of a pool that ships with the package, by name, or of a file.

    Raises:
        InputError: there is no such pool.
    """
    shipped = resources.files("adaptrm.rules") / f"{str(pool).replace('-', '_')}.yaml"
    if "/" not in str(pool) and shipped.is_file():
        return shipped.read_bytes()
    if not paths.exists(pool):
        known = sorted(
            entry.name.removesuffix(".yaml").replace("_", "-")
            for entry in resources.files("adaptrm.rules").iterdir()
            if entry.name.endswith(".yaml")
        )
        raise InputError(f"{pool}: no such rule pool; give a YAML file or one of: {', '.join(known)}")
    return paths.read_bytes(pool)
