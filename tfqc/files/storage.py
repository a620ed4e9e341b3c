"""Files as everything here reads and writes them: checked when read; whole or not there when written."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Generator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tfqc.errors import TfqcError
from tfqc.runtime.tensors import DTYPE_NAMES, bytes_of, read_header

_LONGEST, _DEEPEST = 1 << 26, 64  # bytes and levels of JSON


def read_tensors(path: Path, raises: type[TfqcError]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        TfqcError: (of the type `raises`) the file cannot be read, or is damaged.
    """
    try:
        header = read_header(path)
        return load_file(path, backend="pread"), header.metadata  # what is mapped ends the process if it is truncated
    except OSError as error:
        raise raises(f"{path} cannot be read: {said(error)}.") from error
    except ValueError as error:
        raise raises(str(error)) from error
    except SafetensorError as error:  # it has been changed since
        raise raises(f"{path} is no whole safetensors file: {error}") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file; what stood there is replaced when it is whole.

    Raises:
        OSError: it cannot be written.
    """
    with replacing(path) as part:
        save_tensors(part, tensors, metadata)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file in place, a tensor at a time. (safetensors' own writer wants tensors without common
    storage, and leaves a file of another name where it is killed.)

    Raises:
        OSError: it cannot be written.
        TfqcError: a tensor is of a dtype that the format does not have.
    """
    header, ordered = _header(tensors, metadata)
    with path.open("wb") as file:
        file.write(header)
        for name in ordered:
            if tensors[name].numel():
                file.write(bytes_of(tensors[name]))


def places_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Where each tensor begins in the file that `save_tensors` writes of them without metadata, and its bytes."""
    header, ordered = _header(tensors, None)
    at, found = len(header), dict[str, tuple[int, int]]()
    for name in ordered:
        size = tensors[name].numel() * tensors[name].dtype.itemsize
        found[name] = (at, size)
        at += size
    return found


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> tuple[bytes, list[str]]:
    """The beginning of a file, and the names of tensors in the order in which they follow."""
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))  # so that all are aligned
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, tensor in ordered:
        if tensor.dtype not in DTYPE_NAMES:
            raise TfqcError(
                f"{name} is a tensor of {tensor.dtype}, which no file of tensors holds: give another dtype."
            )
        size = tensor.numel() * tensor.dtype.itemsize
        offsets = [at, at := at + size]
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, [name for name, _ in ordered]


@contextmanager
def replacing(path: Path) -> Generator[Path]:
    """A file beside `path` to write to, which takes its place when the block ends; links are followed.

    An exception leaves what stood there, and nothing else; what a killed process left is removed by the next one.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name[:100]}.part"
    ours = re.compile(re.escape(prefix) + r"(\d+)-[0-9a-f]{8}")
    for left in path.parent.iterdir():
        if (found := ours.fullmatch(left.name)) and not _lives(int(found[1])):
            left.unlink(missing_ok=True)
    part = path.with_name(f"{prefix}{os.getpid()}-{os.urandom(4).hex()}")
    os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        yield part
        sync(part)
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file; what stood there is replaced when it is whole."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a directory's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensors_hash(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of every byte of tensors, with names, dtypes and shapes, in the order of names; several at once."""
    items = sorted(tensors, key=lambda item: item[0])
    digest = hashlib.sha256()
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        for (name, tensor), each in zip(items, pool.map(lambda item: _values_hash(item[1]), items), strict=True):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {each}\n".encode())
    return digest.hexdigest()


def _values_hash(tensor: Tensor) -> str:
    return hashlib.sha256(bytes_of(tensor) if tensor.numel() else b"").hexdigest()


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def said(error: OSError) -> str:
    """What the system says of a file, as the end of a sentence."""
    return (error.strerror or str(error)).rstrip(".")


def read_text(path: Path, raises: type[TfqcError], longest: int = _LONGEST) -> str:
    """A text file.

    Raises:
        TfqcError: (of the type `raises`) it cannot be read, is longer than `longest` bytes, or no text.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # to open a pipe would wait for its writer
            raise raises(f"{path} is no file.")
        with path.open("rb") as file:
            data = file.read(longest + 1)
    except OSError as error:
        raise raises(f"{path} cannot be read: {said(error)}.") from error
    except ValueError as error:  # a name that no file can have
        raise raises(f"{str(path)!r} cannot be read: {error}.") from error
    if len(data) > longest:
        raise raises(f"{path} has more than {longest} bytes: it is not what it should be.")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise raises(f"{path} is no text: {error}.") from error


def parse_json(text: str, what: str, raises: type[TfqcError]) -> Any:
    """The value of JSON text from outside: no name twice, not nested deeply, and strings that can be printed.

    Raises:
        TfqcError: (of the type `raises`) it is none; the sentence begins with `what`.
    """
    try:
        value = json.loads(text, object_pairs_hook=_without_repeats)
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair cannot be printed
    except (ValueError, RecursionError) as error:
        raise raises(f"{what} is no JSON: {str(error)[:200]}.") from error
    level = [value]
    for _ in range(_DEEPEST):
        if not (level := [inner for outer in level for inner in _inside(outer)]):
            return value
    raise raises(f"{what} is nested more than {_DEEPEST} levels deep.")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a name stands there twice")
    return value


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()
