"""Headers of safetensors files: checked against the file before anything is allocated or read.

The format: 8 bytes, the length N of the header (little-endian); N bytes of JSON, `{name: {dtype, shape, data_offsets:
[begin, end]}}`, where `__metadata__` holds strings; then the data, each byte of which belongs to one tensor.
"""

from __future__ import annotations

import json
import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

LONGEST = 100_000_000  # bytes of a header, as the format has it
_MOST, _RANK = 2**63 - 1, 64  # of which torch makes a shape
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2, "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "C64": torch.complex64, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def bytes_of(tensor: torch.Tensor) -> Any:
    """A tensor's bytes in row-major order: a numpy array of uint8; not copied where they lie so on the CPU."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8).numpy()  # one element may have any stride


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: its bytes are `begin` to `end`, counted from the file's first one."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a file holds: tensors by name in the order of their bytes, and metadata."""

    entries: dict[str, Entry]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """The header of a safetensors file.

    Raises:
        ValueError: the file is damaged, or none of this format: one sentence that begins with its path.
        OSError: it cannot be read.
    """
    if not stat.S_ISREG(path.stat().st_mode):  # to open a pipe would wait for its writer
        raise ValueError(f"{path} is no file.")
    try:
        with path.open("rb") as file:
            return _parse(file)
    except _DamageError as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}.") from None


class _DamageError(Exception):
    """What is wrong, as the end of a sentence."""


def _parse(file: BinaryIO) -> Header:
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(LONGEST, size - 8):
        raise _DamageError("it ends within its header")
    values = _json(file.read(length))
    metadata = values.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _DamageError("its metadata are no strings")
    entries = {name: _entry(name, value, 8 + length) for name, value in values.items()}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
    at = 8 + length
    for name, entry in entries.items():
        if entry.begin != at:
            raise _DamageError(f"{_short(name)} does not begin where the tensor before it ends")
        at = entry.end
    if at != size:
        raise _DamageError(f"its tensors end at byte {at} of {size}")
    return Header(entries, metadata)


def _json(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise _DamageError(f"its header is no JSON ({str(error)[:100]})") from None
    if not isinstance(value, dict):
        raise _DamageError("its header is no JSON object")
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a name stands there twice")
    for name in value:
        name.encode()  # half a surrogate pair is no text
    return value


def _entry(name: str, value: Any, start: int) -> Entry:
    """A tensor's entry, if type, shape and bytes agree. Python's integers do not overflow, those of torch would."""
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise _DamageError(f"{_short(name)} has not just dtype, shape and data_offsets")
    dtype = _DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        raise _DamageError(f"{_short(name)} is of an unknown dtype")
    shape, offsets = value["shape"], value["data_offsets"]
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2 or len(shape) > _RANK:
        raise _DamageError(f"shape or offsets of {_short(name)} are no sizes")
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize or math.prod(n or 1 for n in shape) * dtype.itemsize > _MOST:
        raise _DamageError(f"{_short(name)} has not the bytes of its shape")
    return Entry(dtype, tuple(shape), start + begin, start + end)


def _sizes(value: Any) -> bool:
    """True for a list of numbers of which torch can make a shape."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= _MOST for n in value)


def _short(name: str) -> str:
    """A tensor's name in a sentence; in a damaged file it may be anything."""
    return ascii(name if len(name) < 100 else name[:100] + "...")
