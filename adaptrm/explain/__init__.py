"""Why a pair got its label, and what the reward model makes of it."""

from adaptrm.explain.job import ExplainJob, explain
from adaptrm.explain.table import for_people

__all__ = ["ExplainJob", "explain", "for_people"]
