"""Memory of the cpu-int8 run time: where tensors of a file lie, and what is freed when it is not needed any more."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.lowered import finished
from tests.subjects import Subject
from tfqc.backends.cpu_int8.emit import emit
from tfqc.backends.cpu_int8.runtime.memory import LINE, load_aligned, room

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
)  # fmt: skip


def test_tensors_of_a_file_begin_on_cache_lines_and_are_what_was_saved(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (1,), (), (0, 4), (7,)]
    tensors = {
        f"{dtype}-{shape}": torch.randint(0, 2, shape, generator=generator).to(dtype)
        for dtype in DTYPES
        for shape in shapes
    }
    save_file(tensors, tmp_path / "some.safetensors", metadata={"of": "no interest"})
    loaded = load_aligned(tmp_path / "some.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)
        assert loaded[name].numel() == 0 or loaded[name].data_ptr() % LINE == 0


def test_a_file_that_ends_early_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    save_file({"a": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"some.safetensors is no whole safetensors file: its tensors end at byte"):
        load_aligned(path)


@pytest.mark.parametrize("size", [0, 1, 3 << 21])
def test_room_is_zero_and_begins_on_a_line(size: int) -> None:
    block = room(size)
    assert block.numel() == size and not block.any()
    assert size == 0 or block.data_ptr() % LINE == 0


def test_what_is_computed_once_an_image_keeps_no_weights(subject: Callable[[str], Subject]) -> None:
    """SDXL's text keys and values have 1.4 GB of weights, which all lived until the last of them was used."""
    model = emit(finished(subject("unet-sdxl")), "auto").texts["model.py"]
    begin = model[model.index("def begin") :]
    begin = begin[: begin.index("\n\n\n")]
    made = set(re.findall(r"^    (\w+) = ", begin, re.MULTILINE))
    freed = set(re.findall(r"\w+", " ".join(re.findall(r"; del (.*)", begin))))
    weights = {name for name in made if name.endswith("weight")}
    assert weights and weights <= freed
