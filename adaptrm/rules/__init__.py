"""Rule pools."""

from adaptrm.rules.pool import RulePool
from adaptrm.rules.rule import Rule

__all__ = ["Rule", "RulePool"]
