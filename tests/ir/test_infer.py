"""Types of new operations."""

from __future__ import annotations

import torch

from tests.subjects import Subjects
from tfqc.ir.types import TensorType

aten = torch.ops.aten


def test_equal_numbers_of_other_types_give_other_types(subject: Subjects) -> None:
    program = subject("unet2d").program
    time = program.node("timestep")
    before = next(n for n in program.nodes() if n.op == "call_function")
    found = [program.types[program.insert(before, aten.add.Tensor, (time, one)).name] for one in (1, 1.0, 1)]
    assert [t.dtype for t in found if isinstance(t, TensorType)] == [torch.int64, torch.float32, torch.int64]
