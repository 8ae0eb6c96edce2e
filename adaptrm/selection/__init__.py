"""Rule selection and labels from scores."""

from adaptrm.selection.evidence import EvidenceWeights, fit_weights
from adaptrm.selection.kernel import STRATEGIES
from adaptrm.selection.sharded import select_sharded
from adaptrm.selection.strategies import Selection, select

__all__ = ["STRATEGIES", "EvidenceWeights", "Selection", "fit_weights", "select", "select_sharded"]
