"""What each rule's word is worth: fitted to any number of pairs, with or without gold, kept in files."""

from adaptrm.evidence.fit import fit_evidence
from adaptrm.evidence.weights import EvidenceWeights

__all__ = ["EvidenceWeights", "fit_evidence"]
