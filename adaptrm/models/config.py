"""What the decoder needs to know of a model, read from a Hugging Face ``config.json`` and checked."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adaptrm.errors import InputError


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of the rotary frequencies (``rope_type: llama3``)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    @classmethod
    def from_hf(cls, rope: Mapping[str, Any]) -> "RopeScaling":
        low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
        if not high > low:
            raise ValueError(f"high_freq_factor {high} must be above low_freq_factor {low}")
        return cls(float(rope["factor"]), low, high, int(rope["original_max_position_embeddings"]))


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer of the Llama family; hashable, so that it can be a static argument."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], where: str = "config.json") -> "ModelConfig":
        """Read the dictionary of a ``config.json``, as transformers 4 or 5 writes it.

        Raises:
            InputError: a field is missing, or one is in force that this decoder does not implement.
        """
        family = raw.get("model_type")
        if family not in FAMILIES:
            raise InputError(f"{where}: model_type {family!r} is not supported; supported: {', '.join(FAMILIES)}")
        for name, accepted in IN_FORCE.items():
            if name in raw and raw[name] not in accepted:
                raise InputError(f"{where}: {name} = {raw[name]!r} is in force and not implemented; it must be absent")
        try:
            rope = dict(raw.get("rope_scaling") or {}) | dict(raw.get("rope_parameters") or {})
            kind = rope.pop("rope_type", rope.pop("type", "default"))
            theta = rope.pop("rope_theta", raw.get("rope_theta", 10000.0))
            if kind not in ("default", "llama3"):
                raise InputError(f"{where}: rope_type {kind!r} is in force and not implemented; use default or llama3")
            if (partial := rope.get("partial_rotary_factor")) not in IN_FORCE["partial_rotary_factor"]:
                raise InputError(f"{where}: partial_rotary_factor = {partial!r} is in force and not implemented")
            heads, hidden = int(raw["num_attention_heads"]), int(raw["hidden_size"])
            config = cls(
                vocab_size=int(raw["vocab_size"]),
                hidden_size=hidden,
                intermediate_size=int(raw["intermediate_size"]),
                num_hidden_layers=int(raw["num_hidden_layers"]),
                num_attention_heads=heads,
                num_key_value_heads=int(raw.get("num_key_value_heads") or heads),
                head_dim=int(raw.get("head_dim") or hidden // heads),
                rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
                rope_theta=float(theta),
                rope_scaling=RopeScaling.from_hf(rope) if kind == "llama3" else None,
                tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
                max_position_embeddings=int(raw.get("max_position_embeddings", 2048)),
            )
        except KeyError as missing:
            raise InputError(f"{where}: field {missing} is missing") from None
        except InputError:
            raise
        except (TypeError, ValueError, ArithmeticError) as wrong:
            raise InputError(f"{where}: a field has a value that cannot be: {wrong}") from None
        config.check(where)
        return config

    def check(self, where: str) -> None:
        """Raise ``InputError`` where sizes do not fit together."""
        sizes = {name: value for name, value in vars(self).items() if isinstance(value, int)}
        if bad := [name for name, value in sizes.items() if not isinstance(value, bool) and not 0 < value < 2**31]:
            raise InputError(f"{where}: {bad[0]} is {sizes[bad[0]]}; it must be a positive number of usual size")
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"{where}: num_attention_heads {self.num_attention_heads} is no multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise InputError(f"{where}: head_dim {self.head_dim} is odd, rotary embeddings need an even one")

    def to_hf(self) -> dict[str, Any]:
        """The fields as a ``config.json`` that transformers 4 and 5 both read."""
        fields = {name: getattr(self, name) for name in self.__annotations__ if name != "rope_scaling"}
        scaling = self.rope_scaling and {"rope_type": "llama3", **vars(self.rope_scaling)}
        return {
            "model_type": "llama",
            **fields,
            "rope_scaling": scaling,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
        }


FAMILIES = ("llama",)

# Fields of a config.json that change the computation, with the values under which they do not.
IN_FORCE: dict[str, tuple] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
    "quantization_config": (None,),
    "partial_rotary_factor": (1.0, None),
    "logit_scale": (1.0, None),
    "attention_multiplier": (None,),
    "final_logit_softcapping": (None,),
    "attn_logit_softcapping": (None,),
}


def read_config_json(text: str | bytes, where: str) -> dict[str, Any]:
    """Parse the text of a ``config.json``."""
    try:
        raw = json.loads(text)
    except ValueError as wrong:
        raise InputError(f"{where}: not valid JSON: {wrong}") from None
    if not isinstance(raw, dict):
        raise InputError(f"{where}: must hold a JSON object")
    return raw
