"""Label preference pairs by the safety rules that tell the two responses apart, and train reward models on them."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Imported on first use: `import adaptrm` and `adaptrm --help` must not wait for jax.
_HOMES = {
    "EvidenceWeights": "adaptrm.evidence",
    "InputError": "adaptrm.errors",
    "Judge": "adaptrm.judge",
    "Pair": "adaptrm.data.preferences",
    "RewardModel": "adaptrm.reward_model",
    "RuleAdapter": "adaptrm.rule_adapter",
    "RulePool": "adaptrm.rules",
    "Scores": "adaptrm.data.scores",
    "Selection": "adaptrm.selection",
    "fit_evidence": "adaptrm.evidence",
    "load_pairs": "adaptrm.data.preferences",
    "select": "adaptrm.selection",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'adaptrm' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
