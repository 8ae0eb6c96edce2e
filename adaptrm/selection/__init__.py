"""Rule selection and labels from scores."""

from adaptrm.selection.kernel import STRATEGIES
from adaptrm.selection.strategies import Selection, select

__all__ = ["STRATEGIES", "Selection", "select"]
