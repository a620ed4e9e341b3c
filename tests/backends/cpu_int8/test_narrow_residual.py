"""narrow-residual: bf16 between kernels, f32 for torch and for the caller."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import args_of, find, first, name_of
from tests.lowered import PER_TOKEN, STEPS, apply, before, parts, round_trip
from tests.subjects import Subjects
from tfqc.errors import PipelineError
from tfqc.ir.program import Program
from tfqc.ir.render import render
from tfqc.ir.types import TensorType


def dtypes(program: Program) -> dict[str, torch.dtype]:
    return {n: t.dtype for n, t in program.types.items() if isinstance(t, TensorType)}


def test_between_kernels() -> None:
    its = parts()
    old = before("narrow-residual", its)
    program = apply("narrow-residual", old)
    found = dtypes(program)
    narrow = ["silu", "add_2", "linear_1", "unflatten", "transpose_1", "flatten", "transpose", "add_3", "add_4", "cat"]
    assert {found[name] for name in (*narrow, "conv2d_3", "conv2d_4")} == {torch.bfloat16}
    assert found["silu_1"] is torch.float32  # torch adds a number to it
    assert found["plain"] is found["x_nhwc"] is found["unsqueeze_3"] is torch.float32
    assert found["layer_norm"] is torch.uint8
    assert args_of(program.node("add_2"))[-4:] == (None, None, None, "bf16")
    for timesteps in ([STEPS[0]], [STEPS[2], STEPS[0], STEPS[1]]):
        call = its.call(timesteps)
        want, got = first(old(**call)), first(program(**call))
        assert got.dtype is torch.float32
        assert 0 < float((want - got).norm() / want.norm()) < 0.1
    round_trip(its, program)


def test_torch_reads_floats(subject: Subjects) -> None:
    """No operation of torch, other than those that move or join values, reads or gives bf16."""
    for its in (subject("unet-sd"), subject("dit"), parts()):
        program = apply("narrow-residual", before("narrow-residual", its))
        found = dtypes(program)
        moves = ("view", "reshape", "transpose", "permute", "flatten", "cat", "upsample", "unflatten", "unsqueeze")
        for node in program.nodes():
            name = name_of(node)
            if name.startswith("aten.") and not any(move in name for move in moves):
                values = [node, *node.all_input_nodes]
                assert all(found.get(n.name) is not torch.bfloat16 for n in values), node.name


def test_tokens_are_quantized_in_floats() -> None:
    """Scales of tokens are f32 whatever the tokens are stored in."""
    its = parts()
    program = apply("narrow-residual", before("narrow-residual", its, activations=PER_TOKEN))
    found = dtypes(program)
    nodes = find(program, "quantize_tokens")
    assert torch.bfloat16 in {found[args_of(n)[0].name] for n in nodes}  # type: ignore[union-attr]
    for node in find(program, "tfqc.qlinear"):
        assert [found[n.name] for n in args_of(node)[:3]] == [torch.uint8, torch.float32, torch.int32]  # type: ignore[union-attr]
    round_trip(its, program)


def test_unchanged() -> None:
    done = apply("narrow-residual", before("narrow-residual", parts()))
    assert render(apply("narrow-residual", done)) == render(done)
    plain = before("lower-int8", parts())
    assert render(apply("narrow-residual", plain)) == render(plain)


def test_outputs_stay_without_channels_last() -> None:
    """The caller gets f32, also where nothing converts the output."""
    program = apply("narrow-residual", before("channels-last", parts()))
    assert dtypes(program)["conv2d_4"] is torch.float32


def test_refused() -> None:
    with pytest.raises(PipelineError, match="needs stage lowered"):
        parts().run("narrow-residual")
