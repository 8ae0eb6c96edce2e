"""Measuring a reward model; the scorer is an argument."""

from adaptrm.data.preferences import read_pairs
from adaptrm.evaluate.preference import evaluate_pairs
from adaptrm.evaluate.rewardbench import read_rewardbench, section_scores

# How the pairs of a suite are read, and what it adds to the result.
SUITES = {"pairs": (read_pairs, None), "rewardbench": (read_rewardbench, section_scores)}

__all__ = ["SUITES", "evaluate_pairs", "read_rewardbench", "section_scores"]
