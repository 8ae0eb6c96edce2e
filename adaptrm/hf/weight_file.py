"""Safetensors files in parts: read where a slice lies, written block by block.

The format (https://github.com/huggingface/safetensors#format): eight bytes that say how long the header is, the header
as JSON, the bytes of the tensors.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from adaptrm import paths
from adaptrm.errors import InputError

DTYPES = {"F32": np.dtype("float32"), "F16": np.dtype("float16"), "BF16": np.dtype(ml_dtypes.bfloat16)}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies, and what the header of its file says of it.

    Attributes:
        dtype: as safetensors spells it.
        offset: of its first byte in the file.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def read(self, out: np.ndarray, first: Sequence[int], shape: Sequence[int]) -> None:
        """Fill ``out`` with the part of the tensor, seen in ``shape``, that begins at ``first``.

        Raises:
            InputError: the file cannot be read, or has become shorter.
        """
        strides = [math.prod(shape[d + 1 :]) * out.itemsize for d in range(out.ndim)]
        # Behind the last dimension of which only a part is wanted all bytes lie together.
        cut = max((d for d in range(out.ndim) if out.shape[d] != shape[d]), default=0)
        starts = np.asarray(self.offset + first[cut] * strides[cut])
        for d in range(cut):
            starts = np.add.outer(starts, (first[d] + np.arange(out.shape[d])) * strides[d])
        runs = out.reshape(-1).view(np.uint8).reshape(starts.size, -1)
        with paths.told(self.file, *paths.READ), self.file.open("rb", buffering=0) as file:
            for run, start in zip(runs, starts.ravel().tolist(), strict=True):
                got = 0
                while got < len(run):  # a network's file system may give less than was asked for
                    if not (more := os.preadv(file.fileno(), [run[got:]], start + got)):
                        raise InputError(f"{self.file}: has become shorter while it was read; download it again")
                    got += more


def read_header(file: Path) -> dict[str, Stored]:
    """The tensors of a file by their names.

    Raises:
        InputError: it is not a whole safetensors file.
    """
    try:
        with safe_open(file, framework="numpy"):  # which checks all of the header, and the size of the file
            pass
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size))
    except (SafetensorError, OSError) as wrong:
        reason = str(wrong).splitlines()[0][:200]
        raise InputError(f"{file}: not a whole safetensors file ({reason}); download it again") from None
    header.pop("__metadata__", None)
    return {
        name: Stored(file, entry["dtype"], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def write_header(stream: IO[bytes], tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> dict[str, int]:
    """Begin a file.

    Args:
        tensors: dtype and shape of each.

    Returns:
        Where the bytes of each tensor go.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    # The wider dtypes first, so that every tensor is aligned.
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: (-item[1][0].itemsize, item[0])):
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)
    return {name: 8 + len(text) + header[name]["data_offsets"][0] for name in tensors}
