"""Measuring a reward model; the scorer is an argument."""

from adaptrm.evaluate.preference import evaluate_pairs

__all__ = ["evaluate_pairs"]
