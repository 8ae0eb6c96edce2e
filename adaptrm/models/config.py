"""What the decoder needs to know of a model, read from a Hugging Face ``config.json`` and checked."""

import json
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adaptrm.errors import InputError


@dataclass(frozen=True)
class Family:
    """What sets the models of one ``model_type`` apart: what is built in, and what holds where config.json is silent.

    Attributes:
        name: in the names of transformers' classes.
        biases: the fields of config.json, among ``attention_bias`` and ``mlp_bias``, that the family reads.
        qkv_bias: query, key and value always have a bias, the output projection never.
        qk_norm: queries and keys are normed within each head.
        num_key_value_heads: None is that of the queries.
        head_dim: None is the hidden size over the heads.
        sliding_window: of every layer, or for ``window_switch`` of those that its fields name.
        window_switch: the window acts only under ``use_sliding_window``, from layer ``max_window_layers`` on.
    """

    name: str
    max_position_embeddings: int
    biases: tuple[str, ...] = ()
    qkv_bias: bool = False
    qk_norm: bool = False
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    sliding_window: int | None = None
    window_switch: bool = False


# By transformers' configuration_*.py and modeling_*.py.
FAMILIES = {
    "llama": Family("Llama", 2048, biases=("attention_bias", "mlp_bias")),
    "mistral": Family("Mistral", 131072, num_key_value_heads=8, sliding_window=4096),
    "qwen2": Family(
        "Qwen2", 32768, qkv_bias=True, num_key_value_heads=32, sliding_window=4096, window_switch=True
    ),
    "qwen3": Family(
        "Qwen3",
        32768,
        biases=("attention_bias",),
        qk_norm=True,
        num_key_value_heads=32,
        head_dim=128,
        sliding_window=4096,
        window_switch=True,
    ),
}  # fmt: skip

# Fields of a config.json that change the computation, with the values under which they do not.
IN_FORCE: dict[str, tuple] = {
    "hidden_act": ("silu", "swish"),
    "is_causal": (True,),
    "quantization_config": (None,),
    "compression_config": (None,),
    "partial_rotary_factor": (1.0, None),
    "use_mrope": (False, None),
    "logit_scale": (1.0, None),
    "attention_multiplier": (None,),
    "final_logit_softcapping": (None,),
    "attn_logit_softcapping": (None,),
}

LARGEST = 2**24  # of any size; the largest vocabularies have 2**18 tokens
LARGEST_OF = {"num_hidden_layers": 2**12, "max_position_embeddings": 2**31}
LARGEST_STACK = 2**40  # numbers in one parameter of all layers


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of the rotary frequencies (``rope_type: llama3``)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    @classmethod
    def from_hf(cls, rope: Mapping[str, Any], where: str) -> "RopeScaling":
        factors = ("factor", "low_freq_factor", "high_freq_factor")
        scaling = cls(
            *(_field(rope, name, float, where) for name in factors),
            _field(rope, "original_max_position_embeddings", int, where),
        )
        if bad := [name for name, value in vars(scaling).items() if not 0 < value < math.inf]:
            raise InputError(f"{where}: {bad[0]} is {getattr(scaling, bad[0])}; it must be positive and finite")
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        if not high > low:
            raise InputError(f"{where}: high_freq_factor {high} must be above low_freq_factor {low}")
        return scaling


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer of one of ``FAMILIES``; hashable, so that it can be a static argument."""

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
    model_type: str = "llama"
    attention_bias: bool = False
    mlp_bias: bool = False

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    @property
    def qkv_bias(self) -> bool:
        return self.family.qkv_bias or self.attention_bias

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], where: str = "config.json") -> "ModelConfig":
        """Read the dictionary of a ``config.json``, as transformers 4 or 5 writes it.

        Raises:
            InputError: a field is missing or makes no sense, or is in force and this decoder does not implement it.
        """
        model_type = raw.get("model_type")
        if not isinstance(model_type, str) or model_type not in FAMILIES:
            raise InputError(
                f"{where}: model_type {reprlib.repr(model_type)} is not supported; supported: {', '.join(FAMILIES)}"
            )
        family = FAMILIES[model_type]
        for name, accepted in IN_FORCE.items():
            if name in raw and raw[name] not in accepted:
                raise _in_force(where, name, raw[name])
        # Code of the folder's own is never run, and the names of its tensors do not tell what it computes.
        code = raw.get("auto_map") or {}
        if not isinstance(code, dict) or any(name.startswith("AutoModel") for name in code):
            raise InputError(
                f"{where}: auto_map names code for the model; such code is never run: "
                f"where the model is a plain {family.name}, delete auto_map"
            )
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        fields: dict[str, Any] = {name: _field(raw, name, int, where) for name in sizes}
        _check_window(raw, family, fields["num_hidden_layers"], where)
        heads = fields["num_attention_heads"]
        # An explicit null is "as many as query heads", also where a family has another number by default.
        kv_heads = None if "num_key_value_heads" in raw else family.num_key_value_heads
        theta, rope = rope_parameters(raw, where)
        config = cls(
            **fields,
            num_key_value_heads=_field(raw, "num_key_value_heads", int, where, kv_heads or heads),
            head_dim=_field(raw, "head_dim", int, where, family.head_dim or fields["hidden_size"] // max(heads, 1)),
            rms_norm_eps=_field(raw, "rms_norm_eps", float, where, 1e-6),
            rope_theta=theta,
            rope_scaling=RopeScaling.from_hf(rope, where) if rope["rope_type"] == "llama3" else None,
            tie_word_embeddings=_field(raw, "tie_word_embeddings", bool, where, False),
            max_position_embeddings=_field(raw, "max_position_embeddings", int, where, family.max_position_embeddings),
            model_type=model_type,
            **{name: _field(raw, name, bool, where, False) for name in family.biases},
        )
        config.check(where)
        return config

    def check(self, where: str) -> None:
        """Raise ``InputError`` where a number cannot be, or sizes do not fit together."""
        for name, value in vars(self).items():
            if type(value) is int and not 0 < value <= LARGEST_OF.get(name, LARGEST):
                raise InputError(
                    f"{where}: {name} is {reprlib.repr(value)}; it must be a positive number of usual size"
                )
            if type(value) is float and not 0 < value < math.inf:
                raise InputError(f"{where}: {name} is {value}; it must be positive and finite")
        stack = self.num_hidden_layers * max(self.intermediate_size, self.num_attention_heads * self.head_dim)
        if max(self.vocab_size, stack) * self.hidden_size > LARGEST_STACK:
            raise InputError(f"{where}: its sizes make a model of more than {LARGEST_STACK:.0e} parameters")
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"{where}: num_attention_heads {self.num_attention_heads} is no multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise InputError(f"{where}: head_dim {self.head_dim} is odd, rotary embeddings need an even one")

    def to_hf(self) -> dict[str, Any]:
        """The fields as a ``config.json`` that transformers 4 and 5 both read."""
        unread = {"attention_bias", "mlp_bias"} - set(self.family.biases)
        fields = {name: value for name, value in vars(self).items() if name not in unread}
        scaling = self.rope_scaling and {"rope_type": "llama3", **vars(self.rope_scaling)}
        window = {} if self.family.sliding_window is None else {"sliding_window": None}
        return fields | {"rope_scaling": scaling, "hidden_act": "silu"} | window


def rope_parameters(raw: Mapping[str, Any], where: str) -> tuple[float, dict[str, Any]]:
    """Theta and the other RoPE fields of a ``config.json``, ``rope_type`` among them, by transformers' precedence.

    Raises:
        InputError: a RoPE that is in force and not implemented.
    """
    given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(given, dict):
        raise InputError(f"{where}: rope_scaling is {reprlib.repr(given)}; it must be an object or null")
    rope = dict(given)
    kind = rope.pop("type", "default")
    kind = rope.setdefault("rope_type", kind)
    if kind not in ("default", "llama3"):
        raise InputError(
            f"{where}: rope_type {reprlib.repr(kind)} is in force and not implemented; use default or llama3"
        )
    if (partial := rope.get("partial_rotary_factor")) not in IN_FORCE["partial_rotary_factor"]:
        raise _in_force(where, "partial_rotary_factor", partial)
    if nested := [name for name, value in rope.items() if isinstance(value, dict)]:
        raise _in_force(where, f"rope_parameters.{nested[0]}", rope[nested[0]])
    theta = _field(raw, "rope_theta", float, where, 10000.0)
    theta = _field(rope, "rope_theta", float, where, theta)
    rope.pop("rope_theta", None)
    return theta, rope


def label_count(raw: Mapping[str, Any]) -> int | None:
    """How many labels a ``config.json`` gives a classifier; None where it does not say."""
    names = raw.get("id2label")
    return len(names) if isinstance(names, dict) else raw.get("num_labels")


def read_json(content: str | bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object."""
    try:
        raw = json.loads(content)
    except (ValueError, RecursionError) as wrong:
        raise InputError(f"{where}: not valid JSON: {wrong}") from None
    if not isinstance(raw, dict):
        raise InputError(f"{where}: must hold a JSON object")
    return raw


def _field(raw: Mapping[str, Any], name: str, kind: type, where: str, default: Any = None) -> Any:
    """One field, ``default`` where it is absent or null; of exactly its kind, for ``bool("false")`` would be True."""
    value = raw.get(name)
    value = default if value is None else value
    if value is None:
        raise InputError(f"{where}: field {name!r} is missing")
    if kind is float and type(value) is int and abs(value) < 2**63:
        value = float(value)
    if type(value) is not kind:
        names = {int: "a whole number", float: "a number", bool: "true or false"}
        raise InputError(f"{where}: {name} is {reprlib.repr(value)}; it must be {names[kind]}")
    return value


def _check_window(raw: Mapping[str, Any], family: Family, layers: int, where: str) -> None:
    """Raise where a layer sees only the last tokens."""
    kinds = raw.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        raise _in_force(where, "layer_types", kinds)
    first = 0
    if family.window_switch:
        if kinds is not None or not _field(raw, "use_sliding_window", bool, where, False):
            return
        first = _field(raw, "max_window_layers", int, where, 28)
    window = raw.get("sliding_window", family.sliding_window)
    if window is not None and first < layers:
        absent = "" if "sliding_window" in raw else ", the family's default where it is absent,"
        raise InputError(
            f"{where}: sliding_window = {reprlib.repr(window)}{absent} is in force and not implemented; "
            "where no text is longer than that, set it to null"
        )


def _in_force(where: str, name: str, value: Any) -> InputError:
    return InputError(f"{where}: {name} = {reprlib.repr(value)} is in force and not implemented; it must be absent")
