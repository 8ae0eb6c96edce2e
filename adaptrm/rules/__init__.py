"""Rule pools."""

from adaptrm.rules.pool import Rule, RulePool

__all__ = ["Rule", "RulePool"]
