"""Measuring a reward model; the scorer is an argument."""

from adaptrm.evaluate.run import evaluate
from adaptrm.evaluate.suite import Suite
from adaptrm.evaluate.suites import SUITES

__all__ = ["SUITES", "Suite", "evaluate"]
