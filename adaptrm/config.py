"""Every option of training: frozen dataclasses, loaded from ``configs/*.yaml``, overridden by flags."""

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import ConfigDict, Field, FiniteFloat, NonNegativeInt, PositiveInt, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from adaptrm import paths
from adaptrm.errors import InputError
from adaptrm.yaml_text import read_yaml

STRICT = ConfigDict(extra="forbid")
NotNegative = Annotated[FiniteFloat, Field(ge=0)]
Positive = Annotated[FiniteFloat, Field(gt=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]
RowLength = Annotated[int, Field(gt=0, le=2**20)]
Rows = Annotated[int, Field(gt=0, le=2**16)]
Kind = Literal["judge", "reward", "adapter"]  # what is trained
VERBS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, config=STRICT)
class ScratchOptions:
    """A model that starts from random weights, and the folder of its tokenizer."""

    tokenizer: str
    hidden_size: PositiveInt = 128
    intermediate_size: PositiveInt = 352
    num_hidden_layers: PositiveInt = 2
    num_attention_heads: PositiveInt = 4
    num_key_value_heads: PositiveInt = 2
    head_dim: PositiveInt = 32
    max_position_embeddings: PositiveInt = 2048


@dataclass(frozen=True, config=STRICT)
class LoraOptions:
    """Adapters over every projection of the layers; the rest is frozen in ``model.dtype``, but for a reward's head."""

    rank: PositiveInt = 16
    alpha: Positive = 32.0  # an adapter counts alpha / rank


@dataclass(frozen=True, config=STRICT)
class ModelOptions:
    """What is trained: ``pretrained`` (a Hugging Face folder, a hub name or a run) or ``scratch``."""

    pretrained: str | None = None
    scratch: ScratchOptions | None = None
    checkpoint: str | None = None  # a run, or RUN/checkpoints/STEP: its parameters, on what that run started from
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; what is trained is float32
    remat: Literal["layer", "attention", "dots", "none"] = "layer"  # from least memory to least work
    lora: LoraOptions | None = None
    average_with_start: Annotated[float, Field(ge=0, lt=1)] = 0.0  # share of the start in the exported weights
    rule_ids: tuple[str, ...] = ()  # what an adapter's labels are of; a run writes down those of data.rules


@dataclass(frozen=True, config=STRICT)
class MixOptions:
    """A further source of examples: so many labelled ones for each of ``data``, drawn by the seed."""

    pairs: str | None = None
    labels: str = "human"
    weight: Positive = 1.0


@dataclass(frozen=True, config=STRICT)
class DataOptions:
    """What it is trained on, and how examples come in rows."""

    pairs: str | None = None
    labels: str | None = None
    mix: tuple[MixOptions, ...] = ()  # as general pairs beside safety labels
    rules: str | None = None
    scores: str | None = None  # of an adapter: a score folder to learn from, instead of labels
    template: str = "conversation-first"
    row_length: RowLength = 1024
    rows_per_step: Rows = 8
    exact_batch: bool = False
    pairs_per_step: PositiveInt | None = None  # with exact_batch: pairs (or replies), however many rows they take
    overlong: Literal["fail", "drop", "truncate"] = "fail"  # than a row; truncated from the left
    on_bad_row: Literal["fail", "skip"] = "fail"  # of pairs, or of a judge's rule labels; skipped ones are listed
    drop_overlap: tuple[str, ...] = ()  # suites: examples that hold their texts are left out (data/overlap.py)


@dataclass(frozen=True, config=STRICT)
class LossOptions:
    """What a reward model learns from pairs, or from sets of responses (best-of-n) where the kind is another.

    Of an adapter ``k`` alone.
    """

    kind: Literal["bradley-terry", "plackett-luce", "all-pairs"] = "bradley-terry"
    soft_labels: bool = False  # the label's probability, not only its choice
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    margin: bool = False  # by how much the chosen response should win: the column of that name
    center_rewards: NotNegative = 0.0  # times (r_A + r_B)^2
    k: PositiveInt = 5  # of an adapter: rules a pair; overlap@k is its accuracy


@dataclass(frozen=True, config=STRICT)
class OptimizerOptions:
    """The optimizer, its schedule and clipping."""

    name: Literal["adamw", "adafactor", "sgd"] = "adamw"
    accumulate_steps: PositiveInt = 1  # parts of a step's rows, computed one after the other
    learning_rate: NotNegative = 2e-5
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup_steps: NonNegativeInt = 10
    weight_decay: NotNegative = 0.0
    b1: Decay = 0.9
    b2: Decay = 0.999
    eps: Positive = 1e-8
    mu_dtype: Literal["float32", "bfloat16"] = "float32"  # of AdamW's first moment
    clip_norm: Positive = 1.0


@dataclass(frozen=True, config=STRICT)
class MeshOptions:
    """Sizes of the mesh axes; -1 takes the devices that the others leave."""

    data: int | None = None  # one per slice: parameters are spread within a slice, copied across slices
    fsdp: int = -1
    tensor: int = 1


@dataclass(frozen=True, config=STRICT)
class CheckpointOptions:
    every_steps: PositiveInt = 100
    keep: PositiveInt = 2  # the newest
    keep_best: bool = False  # and the best on held-out examples


@dataclass(frozen=True, config=STRICT)
class EvaluationOptions:
    """Held-out examples, which the run is measured on before its first step, every few steps and after its last."""

    pairs: str | None = None
    labels: str | None = None  # as of the data; pairs without labels have their own preferences
    scores: str | None = None  # of an adapter, as of the data
    every_steps: PositiveInt = 100
    stop_after: PositiveInt | None = None  # so many evaluations in a row without a better accuracy


@dataclass(frozen=True, config=STRICT)
class TrainOptions:
    """One verb's section of a config."""

    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    mesh: MeshOptions = field(default_factory=MeshOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    epochs: PositiveInt = 1
    max_steps: PositiveInt | None = None
    seed: NonNegativeInt = 0
    log_every_steps: PositiveInt = 1
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()  # beside metrics.jsonl
    watchdog_seconds: Positive | None = 3600.0  # that a step, a save, an example may take; null waits for ever
    max_nonfinite_steps: NonNegativeInt = 0  # in all; such a step changes nothing, one more of them ends the run


def sections_of(config: str | os.PathLike) -> list[str]:
    """The verbs that a config has options for.

    Raises:
        InputError: no such config, or a section of it is unknown.
    """
    return list(_read(config)[1])


def load_options(config: str | os.PathLike, verb: str, overrides: Mapping[str, Any] | None = None) -> TrainOptions:
    """A verb's options: the config's section, with dotted overrides (``optimizer.learning_rate``) on top.

    Args:
        config: a name in ``configs/`` or a YAML file.
        overrides: dotted key -> value; a text value is read as YAML.

    Raises:
        InputError: no such config, an unknown key (with the nearest known one), or a wrong type.
    """
    where, raw = _read(config)
    if verb not in raw:
        raise InputError(f"{where}: has no section {verb!r}; it has {', '.join(raw) or 'none'}")
    section = raw[verb] or {}
    for key, value in (overrides or {}).items():
        *outer, last = key.split(".")
        target = section
        for name in outer:
            if target.get(name) is None:
                target[name] = {}
            target = target[name]
            if not isinstance(target, dict):
                raise InputError(f"--{key}: {name} is one value, it has no parts")
        if isinstance(value, str) and key not in TEXTS:
            one = key in LISTS_OF_TEXTS and not value.startswith("[")
            value = [value] if one else read_yaml(value, f"--{key}")
        target[last] = value
    return parse_options(section, f"{where}: {verb}")


# Options that hold paths and names: never read as YAML, so that a folder called "on" stays a folder.
TEXTS = (
    *("model.pretrained", "model.checkpoint", "model.scratch.tokenizer"),
    *("data.pairs", "data.labels", "data.rules", "data.scores", "data.template"),
    *("evaluation.pairs", "evaluation.labels", "evaluation.scores"),
)
LISTS_OF_TEXTS = ("data.drop_overlap",)  # [ONE, TWO] is read as YAML, anything else is one


def parse_options(section: Any, where: str) -> TrainOptions:
    """Validate a section; every message is one line that names the key."""
    try:
        return TypeAdapter(TrainOptions).validate_python(section)
    except ValidationError as wrong:
        error = wrong.errors()[0]
        key = ".".join(str(part) for part in error["loc"])
        if error["type"] == "unexpected_keyword_argument":
            near = difflib.get_close_matches(str(error["loc"][-1]), _known(error["loc"][:-1]), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(_known(error['loc'][:-1]))}"
            raise InputError(f"{where}.{key}: unknown key; {hint}") from None
        raise InputError(f"{where}.{key}: {error['msg']}, got {error['input']!r}") from None


def to_yaml(verb: str, options: TrainOptions) -> str:
    """The resolved section, as a config that gives these options again."""
    return yaml.safe_dump({verb: asdict(options)}, sort_keys=False)


def _known(outer: Sequence[Any]) -> list[str]:
    """Keys of the section that a path leads to."""
    kind: Any = TrainOptions
    for name in (name for name in outer if isinstance(name, str)):  # numbers count the parts of a list
        hint = next(f.type for f in fields(kind) if f.name == name)
        kind = next(t for t in (hint, *getattr(hint, "__args__", ())) if is_dataclass(t))
    return [f.name for f in fields(kind)]


def config_folder() -> Path:
    """``configs/``: in the wheel beside this file, in a source checkout beside the package."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "configs"


def _read(config: str | os.PathLike) -> tuple[str, dict[str, Any]]:
    named = config_folder() / f"{config}.yaml"
    if "/" not in str(config) and named.is_file():
        where, text = str(config), named.read_bytes()
    elif paths.exists(config) and not paths.is_dir(config):
        where, text = str(config), paths.read_bytes(config)
    else:
        known = ", ".join(sorted(p.stem for p in config_folder().glob("*.yaml")))
        raise InputError(f"{config}: no such config; give a YAML file or one of: {known}")
    raw = read_yaml(text, where)
    if not isinstance(raw, dict) or not all(isinstance(v, dict | None) for v in raw.values()):
        raise InputError(f"{where}: a config has one section a verb ({', '.join(VERBS)})")
    if unknown := sorted(map(str, raw.keys() - set(VERBS))):
        raise InputError(f"{where}: unknown section {unknown[0]!r}; known: {', '.join(VERBS)}")
    return where, raw
