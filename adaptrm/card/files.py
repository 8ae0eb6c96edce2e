"""Files that a model card tells of: results of ``adaptrm evaluate``, overlap with benchmarks, a run's examples."""

import os
from dataclasses import field
from typing import Annotated, TypeVar

from pydantic import Field, FiniteFloat, NonNegativeInt, StringConstraints, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from adaptrm import paths
from adaptrm.errors import InputError

Share = Annotated[FiniteFloat, Field(ge=0, le=1)]
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Ends = tuple[FiniteFloat, FiniteFloat]


@dataclass(frozen=True)
class Subset:
    n: NonNegativeInt
    accuracy: Share
    ci95: Ends | None = None


@dataclass(frozen=True)
class Baseline:
    """A scorer that was measured beside the model."""

    accuracy: Share | None = None
    overall: Share | None = None
    sections: dict[str, Share | None] = field(default_factory=dict)
    subsets: dict[str, Share | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """What a card takes of a file that ``adaptrm evaluate`` wrote."""

    suite: Text
    n: NonNegativeInt
    accuracy: Share
    dtype: Text = "float32"
    ci95: Ends | None = None
    overall: Share | None = None
    overall_ci95: Ends | None = None
    sections: dict[str, Share | None] = field(default_factory=dict)
    sections_ci95: dict[str, Ends | None] = field(default_factory=dict)
    subsets: dict[str, Subset] = field(default_factory=dict)
    baselines: dict[str, Baseline] = field(default_factory=dict)


@dataclass(frozen=True)
class Overlap:
    """Rows that a training set and a suite share, counted."""

    train: Text
    suite: Text
    train_rows: NonNegativeInt
    train_rows_overlapping: NonNegativeInt
    suite_rows: NonNegativeInt
    suite_rows_overlapping: NonNegativeInt


@dataclass(frozen=True)
class Pool:
    """A rule pool, by name."""

    name: str
    version: str
    count: NonNegativeInt
    sha256: str


@dataclass(frozen=True)
class Examples:
    """What a run wrote down of its examples.

    Attributes:
        unit: what they are.
        left: how many rows were skipped, and examples dropped, truncated and mixed in.
    """

    count: NonNegativeInt
    unit: str
    left: dict[str, NonNegativeInt] = field(default_factory=dict)
    rules: Pool | None = None


WRITTEN_BY = {Result: "adaptrm evaluate", Overlap: "adaptrm overlap", Examples: "adaptrm train"}
File = TypeVar("File", Result, Overlap, Examples)


def read_file(path: str | os.PathLike, kind: type[File]) -> File:
    """A file of one of the kinds above.

    Raises:
        InputError: it is none; names the field.
    """
    try:
        return TypeAdapter(kind).validate_json(paths.read_bytes(path))
    except ValidationError as wrong:
        error = wrong.errors()[0]
        said = ": ".join(filter(None, [".".join(map(str, error["loc"])), error["msg"]]))
        raise InputError(f"{path}: {said}; give a file that {WRITTEN_BY[kind]} wrote") from None
