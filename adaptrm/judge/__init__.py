"""Judges: sources of rule scores."""

from adaptrm.judge.language_model import Judge

__all__ = ["Judge"]
