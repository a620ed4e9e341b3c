"""half-precision: f16 between kernels, f32 for what scales and biases are, and for the caller."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import args_of, find, first, name_of
from tests.lowered import PER_TOKEN, STEPS, W8, apply, before, example, parts, round_trip
from tests.subjects import Subject, Subjects, of_example
from tfqc.errors import PipelineError
from tfqc.ir.program import BEGIN, TIME, Program
from tfqc.ir.render import render
from tfqc.ir.types import TensorType

W4 = "calibrate-weights{bits=4 method=min-max}"
A4 = "calibrate-activations{bits=4 mode=per-step}"


def meets(its: Subject, weights: str = W4, activations: str = A4) -> Program:
    return before("half-precision", its, "cuda-int4", weights, activations)


def dtypes(program: Program) -> dict[str, torch.dtype]:
    return {n: t.dtype for n, t in program.types.items() if isinstance(t, TensorType)}


def casts(program: Program) -> dict[str, str]:
    """What each value that is cast is called afterwards."""
    return {str(args_of(n)[0]): n.name for n in find(program, "aten.to.dtype")}


def distance(its: Subject, old: Program, new: Program) -> float:
    """The greatest ‖new − old‖ / ‖old‖ of batches of one and of several timesteps."""
    found: list[float] = []
    for timesteps in ([STEPS[0]], [STEPS[2], STEPS[0], STEPS[1]]):
        call = its.call(timesteps)
        want, got = first(old(**call)), first(new(**call))
        assert got.dtype is want.dtype is torch.float32
        found.append(float((got - want).norm() / want.norm()))
    return max(found)


def test_between_kernels() -> None:
    its = parts()
    program = apply("half-precision", meets(its))
    found = dtypes(program)
    half = ["silu", "group_norm", "add", "add_2", "transpose", "linear_1", "scaled_dot_product_attention", "add_3"]
    assert {found[name] for name in (*half, "layer_norm", "add_4", "mul_4", "reshape", "cat")} == {torch.float16}
    assert {found[name] for name in ("x", "plain")} == {torch.float32}
    assert found["layer_norm_q_codes"] is found["mul_3"] is torch.uint8
    for node in (n for n in program.nodes() if name_of(n) in ("tfqc.qlinear.default", "tfqc.qconv.default")):
        codes, scale, _, _, _, weight_scale, bias = (str(a) for a in args_of(node)[:7])
        assert [found[n] for n in (codes, scale, weight_scale, bias)] == [torch.uint8, *[torch.float32] * 3]
        assert node.kwargs["out"] == ("u4" if node.name in ("mul_3", "gelu_1") else "f16")
    assert found["add_6"] is torch.float32  # the bias of a step
    round_trip(its, program)


def test_each_value_is_cast_once() -> None:
    """On its way in and out, around quantizers of torch, and of a table where torch reads it."""
    program = apply("half-precision", meets(parts()))
    grown, left = "upsample_nearest2d", "conv2d_3_weight"
    values = ["x", "unsqueeze_3", grown, f"{grown}_dq", left]
    names = [f"{value}_{'f32' if value == grown else 'f16'}" for value in values]
    assert casts(program) == dict(zip(values, names, strict=True))
    assert len(find(program, "aten.to.dtype")) == len(values)
    found = dtypes(program)
    quantizer, weight = program.node(f"{grown}_q"), program.node(left)
    assert [found[str(n)] for n in (args_of(quantizer)[0], f"{grown}_dq", weight)] == [torch.float32] * 3
    x, conv_weight, bias = args_of(program.node("conv2d_3"))[:3]
    assert [str(x), str(conv_weight), bias.target] == [f"{grown}_dq_f16", f"{left}_f16", "grow.bias.f16"]  # type: ignore[union-attr]


def test_what_is_done_is_left_as_it_is() -> None:
    done = apply("half-precision", meets(parts()))
    assert render(apply("half-precision", done)) == render(done)


class Every(nn.Module):
    """Constants that are read twice, sizes, types that the model itself asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.one, self.two = nn.Linear(1, 16), nn.Linear(16, 16), nn.Linear(128, 128)
        self.norm, self.shared = nn.LayerNorm(16), nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        when = self.time(time.float()[:, None] / 1000)[:, None] * self.shared
        h = self.norm(self.one(x + when) * self.shared) + self.shared
        h = h * (h > 0).to(torch.float32) + torch.softmax(h, -1, dtype=torch.float32)
        return self.two((h + torch.arange(16.0)).reshape(x.shape[0], 128)).reshape(x.shape)


EVERY = example(Every, 8, 16)


def test_constants_are_stored_once() -> None:
    its = of_example("every-half", EVERY)
    old = meets(its)
    program = apply("half-precision", old)
    assert {n: t.dtype for n, t in program.tensors.items() if n.endswith(".f16")} == dict.fromkeys(
        ("shared.f16", "norm.weight.f16", "norm.bias.f16"), torch.float16
    )
    assert torch.equal(program.tensors["shared.f16"], old.tensors["shared"].half())
    (shared,) = [n for n in program.step.nodes if n.target == "shared.f16"]
    assert [n.name for n in shared.users] == ["mul_1", "add_1"]
    assert "norm.weight" not in program.tensors
    round_trip(its, program)


def test_sizes_are_those_of_the_value_itself() -> None:
    program = apply("half-precision", meets(of_example("every-half", EVERY)))
    (size,) = find(program, "aten.sym_size")
    assert args_of(size)[0] is program.node("x") and "x" in casts(program)


def test_types_that_the_model_asks_for() -> None:
    """A cast to f32 becomes one to f16; what an operation is told to give it gives, and is cast after it."""
    program = apply("half-precision", meets(of_example("every-half", EVERY)))
    found = dtypes(program)
    (mask,) = find(program, "aten.gt")
    (asked,) = [n for n in find(program, "aten.to.dtype") if args_of(n)[0] is mask]
    assert args_of(asked)[1] is torch.float16 and found[asked.name] is torch.float16 and found[mask.name] is torch.bool
    (softmax,) = find(program, "aten.softmax")
    assert found[str(args_of(softmax)[0])] is torch.float16 and found[softmax.name] is torch.float32
    assert [n.name for n in softmax.users] == [casts(program)["softmax"]]
    assert found[casts(program)["arange"]] is torch.float16


@pytest.mark.parametrize("weights", [W4, W8])
def test_outputs_move_by_rounding(weights: str) -> None:
    """Where values are not quantized, as codes that flip move such small models by percents."""
    for its in (parts(), of_example("every-half", EVERY)):
        old = meets(its, weights, activations="")
        assert 0 < distance(its, old, apply("half-precision", old)) < 1e-3


def test_values_that_kernels_read_as_they_are() -> None:
    its = parts()
    program = apply("half-precision", meets(its, activations=""))
    found = dtypes(program)
    assert {found[str(args_of(n)[0])] for n in find(program, "tfqc.q")} == {torch.float16}
    round_trip(its, program)


def test_tokens_are_quantized_from_f16() -> None:
    its = parts()
    program = apply("half-precision", meets(its, activations=PER_TOKEN))
    found = dtypes(program)
    assert {found[str(args_of(n)[0])] for n in find(program, "quantize_tokens")} == {torch.float16}
    for node in find(program, "tfqc.qlinear"):
        assert [found[str(n)] for n in args_of(node)[:3]] == [torch.uint8, torch.float32, torch.int32]
    round_trip(its, program)


def test_the_other_functions_are_left(subject: Subjects) -> None:
    """Features, and what text gives once per image, are computed in f32 and cast in the step."""
    its = subject("unet-sd")
    old = meets(its)
    program = apply("half-precision", old)
    for function in (TIME, BEGIN):
        assert str(program.functions[function]) == str(old.functions[function])
    keys = [n.name for n in program.step.nodes if n.op == "placeholder" and n.name.startswith("transpose")]
    assert len(keys) == 8 and {dtypes(program)[name] for name in keys} == {torch.float32}
    assert {name: casts(program).get(name) for name in keys} == {name: f"{name}_f16" for name in keys}
    round_trip(its, program)


def test_refused() -> None:
    with pytest.raises(PipelineError, match="needs stage lowered"):
        parts().run("half-precision")
