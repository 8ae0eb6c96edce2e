"""Measuring a reward model; the scorer is an argument."""

from adaptrm.evaluate.preference import evaluate_pairs
from adaptrm.evaluate.rewardbench import evaluate_rewardbench

__all__ = ["evaluate_pairs", "evaluate_rewardbench"]
