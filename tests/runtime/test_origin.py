"""What a loaded model reads in its directory later is the model's own."""

from __future__ import annotations

import copy
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import tfqc
from tests.helpers import first

STORED = Path(__file__).parents[1] / "artifacts" / "v2"
CALL = {k: v for k, v in load_file(STORED / "fake-quant.call.safetensors").items() if k != "want"}
UNKNOWN = {**CALL, "timestep": torch.tensor([333, 333])}
KNOWN = {**CALL, "timestep": torch.tensor([500, 500])}


def put(name: str, directory: Path) -> Path:
    """In the place of what is there, as saving does."""
    shutil.rmtree(directory, ignore_errors=True)
    return Path(shutil.copytree(STORED / name, directory))


@pytest.mark.parametrize("name", ["fake-quant", "cpu-int8", "cuda-int4"])
@pytest.mark.parametrize(
    "later",
    [lambda m: m(**UNKNOWN), copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["a time without a row", "deepcopy", "pickle"],
)
def test_another_model_was_saved_there(name: str, later: Callable[[nn.Module], object], tmp_path: Path) -> None:
    model = tfqc.load(put(name, tmp_path / "out"))
    want = first(model(**KNOWN))
    put("cpu-int8" if name == "fake-quant" else "fake-quant", tmp_path / "out")
    with pytest.raises(ValueError, match=r"out holds another model than the one that was loaded"):
        later(model)
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(ValueError, match=r"out is gone, and this model has to read in it"):
        later(model)
    assert torch.equal(first(model(**KNOWN)), want)
    put(name, tmp_path / "out")  # the same again
    later(model)


def test_what_was_read_is_kept(tmp_path: Path) -> None:
    model = tfqc.load(put("fake-quant", tmp_path / "out"))
    want = first(model(**UNKNOWN))
    shutil.rmtree(tmp_path / "out")
    assert torch.equal(first(model(**UNKNOWN)), want)
    model(**{**CALL, "timestep": torch.tensor([334, 335])})
