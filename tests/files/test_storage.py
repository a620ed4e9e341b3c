"""Tensors and texts on disk: what is damaged is refused by one reader, before anything is allocated."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from tests.killing import killed
from tfqc.errors import CalibrationError, TfqcError
from tfqc.files.storage import parse_json, read_tensors, read_text, replacing, save_tensors, write_tensors, write_text
from tfqc.runtime.tensors import read_header

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64,
    torch.uint32, torch.uint16, torch.uint8, torch.complex64, torch.bool,
)  # fmt: skip
WHOLE = save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.int8)}, {"of": "interest"})


def file_of(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(begin: int = 0, end: int = 8, shape: Any = (2,), dtype: Any = "F32", **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end],
            **more}  # fmt: skip


def test_every_dtype_comes_back(tmp_path: Path) -> None:
    shapes = [(3, 5), (1,), (), (0, 4)]
    tensors = {f"{d}-{s}": torch.randint(0, 2, s).to(d) for d in DTYPES for s in shapes}
    write_tensors(tmp_path / "f", tensors, {"a": "b"})
    again, metadata = read_tensors(tmp_path / "f", CalibrationError)
    assert again.keys() == tensors.keys() and metadata == {"a": "b"}
    for name, tensor in tensors.items():
        assert again[name].dtype == tensor.dtype and again[name].shape == tensor.shape
        assert again[name].view(-1).tolist() == tensor.view(-1).tolist()
    at = {name: (e.dtype, e.shape, e.end - e.begin) for name, e in read_header(tmp_path / "f").entries.items()}
    assert at == {name: (t.dtype, tuple(t.shape), t.nbytes) for name, t in tensors.items()}


def test_written_as_safetensors_writes_them(tmp_path: Path) -> None:
    """Views of one storage, too, without what they do not show."""
    base = torch.arange(24.0)
    tensors = {"a": base[:6].reshape(2, 3).T, "b": base[::5], "codes": torch.ones(3, dtype=torch.int8), "c": base[2],
               "d": base[3].expand(1)}  # fmt: skip
    save_tensors(tmp_path / "ours", tensors, {"some": "facts"})
    theirs = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    assert (tmp_path / "ours").read_bytes() == save(theirs, {"some": "facts"})
    with pytest.raises(TfqcError, match=r"z is a tensor of torch.complex128, which no file of tensors holds"):
        save_tensors(tmp_path / "none", {"z": torch.ones(1, dtype=torch.complex128)})
    assert not (tmp_path / "none").exists()


DAMAGED = {
    "nothing": b"",
    "seven bytes": b"1234567",
    "a header that is longer than the file": struct.pack("<Q", 1 << 62) + WHOLE[8:],
    "a header of all memory": struct.pack("<Q", (1 << 64) - 1) + WHOLE[8:],
    "no JSON": file_of(b"{"),
    "no text": file_of(b"\xff\xfe{}"),
    "a list": file_of([]),
    "deep": file_of(b"[" * 100_000),
    "a number": file_of(3),
    "an entry that is none": file_of({"a": 3}, bytes(8)),
    "no dtype": file_of({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
    "more than an entry has": file_of({"a": entry(more=1)}, bytes(8)),
    "an unknown dtype": file_of({"a": entry(dtype="F31")}, bytes(8)),
    "a dtype that is a list": file_of({"a": entry(dtype=["F32"])}, bytes(8)),
    "a negative size": file_of({"a": entry(shape=(-2,))}, bytes(8)),
    "two negative sizes": file_of({"a": entry(shape=(-2, -1))}, bytes(8)),
    "half a size": file_of({"a": entry(shape=(0.5, 4))}, bytes(8)),
    "a size that is true": file_of({"a": entry(shape=(True, 2))}, bytes(8)),
    "a shape that is a number": file_of({"a": entry(shape=2)}, bytes(8)),
    "sizes that overflow": file_of({"a": entry(shape=(1 << 62, 8, 1 << 62))}, bytes(8)),
    "sizes that overflow to nothing": file_of({"a": entry(0, 0, (1 << 32, 1 << 32))}),
    "nothing times too much": file_of({"a": entry(0, 0, (0, 1 << 62, 1 << 62))}),
    "a rank that torch has not": file_of({"a": entry(0, 4, (1,) * 65)}, bytes(4)),
    "fewer bytes than the shape": file_of({"a": entry(shape=(3,))}, bytes(8)),
    "offsets that go back": file_of({"a": entry(8, 0, (2,))}, bytes(8)),
    "offsets before the data": file_of({"a": entry(-8, 0)}, bytes(8)),
    "three offsets": file_of({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 2]}}, bytes(1)),
    "offsets of which one is no number": file_of({"a": entry(0, "8")}, bytes(8)),  # type: ignore[arg-type]
    "a hole": file_of({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20)),
    "bytes of two": file_of({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
    "bytes of none": file_of({"a": entry()}, bytes(9)),
    "too few bytes": file_of({"a": entry()}, bytes(7)),
    "a name twice": file_of(b'{"a": %s, "a": %s}' % ((json.dumps(entry()).encode(),) * 2), bytes(8)),
    "half a letter": file_of(b'{"\\ud800": %s}' % json.dumps(entry()).encode(), bytes(8)),
    "metadata of numbers": file_of({"__metadata__": {"a": 1}}),
    "metadata that are text": file_of({"__metadata__": "a"}),
    "a number too long to read": file_of(b'{"a": ' + b"9" * 5000 + b"}"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_file_is_refused(what: str, tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    path.write_bytes(DAMAGED[what])
    with pytest.raises(CalibrationError, match=r"some\.safetensors is no whole safetensors file: ") as caught:
        read_tensors(path, CalibrationError)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@given(st.integers(0, len(WHOLE) - 1), st.integers(0, 7))
def test_a_flipped_bit_is_refused_or_of_a_value(tmp_path_factory: pytest.TempPathFactory, at: int, bit: int) -> None:
    path = tmp_path_factory.getbasetemp() / "flipped.safetensors"
    data = bytearray(WHOLE)
    data[at] ^= 1 << bit
    path.write_bytes(data)
    try:
        tensors, _ = read_tensors(path, CalibrationError)
    except CalibrationError:
        return
    assert sum(t.nbytes for t in tensors.values()) == 27


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place in (".", "pipe", "none", "x" * 300):
        for read in (read_tensors, read_text):
            with pytest.raises(CalibrationError, match=r"is no file|cannot be read: \w"):
                read(tmp_path / place, CalibrationError)


def test_texts_have_an_end(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("four")
    assert read_text(tmp_path / "text", CalibrationError, 4) == "four"
    with pytest.raises(CalibrationError, match=r"more than 3 bytes"):
        read_text(tmp_path / "text", CalibrationError, 3)


@pytest.mark.parametrize("depth", [0, 63, 64, 500, 100_000])
@pytest.mark.parametrize("parts", [("[", "1", "]"), ('{"a": ', "1", "}")])
def test_json_of_limited_depth(depth: int, parts: tuple[str, str, str]) -> None:
    text = parts[0] * depth + parts[1] + parts[2] * depth
    if depth < 64:
        assert json.dumps(parse_json(text, "It", CalibrationError)).count(parts[0][0]) == depth
    else:
        with pytest.raises(CalibrationError, match=r"^It is (nested|no JSON)"):
            parse_json(text, "It", CalibrationError)


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "text"
    write_text(path, "one")
    mode = path.stat().st_mode

    def fail() -> None:
        with replacing(path) as part:
            part.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "one"
    write_tensors(path, {"a": torch.ones(1)})
    assert path.stat().st_mode == mode
    (tmp_path / ".text.part4194305-0123abcd").write_text("of a killed process")
    (tmp_path / ".text.part-mine").write_text("mine")
    write_text(path, "two")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".text.part-mine", "text"]


def test_killed_while_it_writes(tmp_path: Path) -> None:
    texts = ["a" * 100_000, "b" * 50_000]
    write_text(tmp_path / "text", texts[0])

    def write_for_ever() -> None:
        while True:
            for text in texts:
                write_text(tmp_path / "text", text)

    for number in range(10):
        killed(write_for_ever, number, 0.03)
        assert (tmp_path / "text").read_text() in texts
    write_text(tmp_path / "text", "")
    assert [p.name for p in tmp_path.iterdir()] == ["text"]
