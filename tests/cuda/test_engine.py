"""The run time of cuda-int4 without a device: tensors and their forms, operations, rows of the schedule, graphs."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.cuda.test_emit import emitted, finished, loaded, small
from tests.helpers import first
from tests.subjects import Subject, Subjects
from tfqc.backends.cuda_int4.runtime import ops
from tfqc.backends.cuda_int4.runtime.engine import Engine
from tfqc.backends.cuda_int4.runtime.reference import Given
from tfqc.backends.cuda_int4.runtime.specialise import Epilogue, Gemm, Kernel, Quantize, Window
from tfqc.backends.cuda_int4.runtime.tensors import Tensors
from tfqc.ir.program import Program

cpu = pytest.mark.filterwarnings("ignore:Kernels for CUDA")
META = torch.device("meta")


# -- tensors ------------------------------------------------------------------------------------------------------


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Tensors of a model, and of its time function."""
    save_file({"table": torch.arange(6.0).reshape(3, 2), "scale": torch.tensor([2.0, 4.0])},
              tmp_path / "weights.safetensors")  # fmt: skip
    save_file({"late": torch.ones(2)}, tmp_path / "time.safetensors")
    return tmp_path


def tensors_of(directory: Path) -> tuple[Tensors, list[str]]:
    """Tensors, and a list that gets an entry whenever addresses have changed."""
    moves: list[str] = []
    return Tensors(directory, lambda: moves.append("moved")), moves


def test_forms_are_made_once_for_each_key(directory: Path) -> None:
    tensors, moves = tensors_of(directory)
    made: list[int] = []

    def inverse(x: Tensor) -> Tensor:
        made.append(1)
        return 1.0 / x

    form = tensors.form("scale", "inverse", inverse)
    assert torch.equal(form, torch.tensor([0.5, 0.25])) and tensors.form("scale", "inverse", inverse) is form
    assert len(made) == 1 and tensors.form("scale", "rows") is not form
    assert torch.equal(tensors.get("scale"), torch.tensor([2.0, 4.0])) and not moves


def test_forms_follow_and_stay_where_they_are(directory: Path) -> None:
    """Three rows have room for four; a fifth has not, and finds room for eight."""
    tensors, moves = tensors_of(directory)
    double, rows = tensors.form("table", "double", lambda x: 2 * x), tensors.form("table", "rows")
    other = tensors.form("scale", "rows")
    assert double.shape == rows.shape == (4, 2) and not rows[3].any()
    four = torch.randn(4, 2)
    tensors.put("table", four)
    assert tensors.get("table") is four
    assert tensors.form("table", "double") is double and tensors.form("table", "rows") is rows
    assert torch.equal(double, 2 * four) and torch.equal(rows, four) and not moves
    five = torch.randn(5, 2)
    tensors.put("table", five)
    assert len(moves) == 2  # for each of its forms
    assert tensors.form("table", "rows").shape == (8, 2) and torch.equal(tensors.form("table", "double")[:5], 2 * five)
    assert tensors.form("scale", "rows") is other
    tensors.put("table", four)  # fewer rows again: what lies behind them is of no use to anybody
    assert torch.equal(tensors.form("table", "rows")[:4], four) and len(moves) == 2


def test_what_is_added_has_forms_too(directory: Path) -> None:
    tensors, moves = tensors_of(directory)
    tensors.put("made", torch.ones(3))
    assert torch.equal(tensors.form("made", "rows"), torch.tensor([1.0, 1.0, 1.0, 0.0])) and not moves


def test_tensors_of_the_time_function_are_read_late(directory: Path) -> None:
    tensors, _ = tensors_of(directory)
    (directory / "time.safetensors").rename(directory / "aside")
    with pytest.raises(FileNotFoundError):
        tensors.get("late")
    (directory / "aside").rename(directory / "time.safetensors")
    assert torch.equal(tensors.get("late"), torch.ones(2))


def test_tensors_move(directory: Path) -> None:
    tensors, moves = tensors_of(directory)
    form = tensors.form("table", "rows")
    tensors.to(torch.device("cpu"))
    assert tensors.form("table", "rows") is form and not moves
    tensors.to(META)
    assert moves == ["moved"] and tensors.device == META
    assert tensors.get("table").is_meta and tensors.form("table", "rows").is_meta


# -- operations ---------------------------------------------------------------------------------------------------


class Recorder:
    """A runner that runs nothing."""

    def __init__(self) -> None:
        self.launched: list[tuple[str, int, Given]] = []

    def launch(self, kernel: Kernel, rows: int, given: Given) -> None:
        self.launched.append((kernel.name, rows, given))


U8, F16, F32, I32 = torch.uint8, torch.float16, torch.float32, torch.int32
QUANTIZERS: list[tuple[str, Quantize, tuple[int, ...], list[tuple[tuple[int, ...], torch.dtype]]]] = [
    ("quantize", Quantize("tfqc_rows", 70, 4), (2, 5, 70), [((2, 5, 48), U8)]),
    ("quantize", Quantize("tfqc_bytes", 70, 8), (7, 70), [((7, 96), U8)]),
    ("quantize", Quantize("tfqc_image", 40, 4, image=(6, 5)), (2, 6, 5, 40), [((2, 8, 7, 32), U8)]),
    ("quantize_tokens", Quantize("tfqc_tokens", 70, 4, "token"), (2, 5, 70),
     [((2, 5, 48), U8), ((2, 5), F32), ((2, 5), I32)]),
    ("copy", Quantize("tfqc_copy", 70, 16), (2, 5, 70), [((2, 5, 96), F16)]),
    ("copy", Quantize("tfqc_copied_image", 40, 16, image=(6, 5)), (2, 6, 5, 40), [((2, 8, 7, 64), F16)]),
    ("quantize_low_rank", Quantize("tfqc_low", 64, 4, rank=16), (2, 5, 64), [((2, 5, 32), U8), ((2, 5, 16), F16)]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kernel", "shape", "wanted"), QUANTIZERS, ids=[k.name for _, k, _, _ in QUANTIZERS])
def test_what_quantizers_give(
    name: str, kernel: Quantize, shape: tuple[int, ...], wanted: list[tuple[tuple[int, ...], torch.dtype]]
) -> None:
    """The same shapes on the meta device and where a runner fills them; strides do not matter."""
    runner = Recorder()
    number = ops.register(kernel, runner)
    for device in (META, torch.device("cpu")):
        x = torch.zeros(*shape, dtype=F16, device=device)
        x = x.movedim(-1, 1).contiguous().movedim(1, -1)
        one = torch.ones(1, device=device)
        scales = () if name in ("quantize_tokens", "copy") else (one, one.to(I32), one.to(I32))
        more = (torch.zeros(64, 16, dtype=F16, device=device),) if kernel.rank else ()
        found = getattr(torch.ops.tfqc_cuda, name)(x, *scales, *more, number)
        outs = found if isinstance(found, tuple) else (found,)
        assert [(tuple(out.shape), out.dtype) for out in outs] == wanted and all(out.device == device for out in outs)
    ((launched, rows, given),) = runner.launched
    assert launched == kernel.name and rows == torch.Size(wanted[0][0][:-1]).numel()
    assert set(given) == set(kernel.arguments[:-1]) and given["x"].is_contiguous()  # type: ignore[union-attr]


def product(n: int, k: int, end: Epilogue = Epilogue(), window: Window | None = None) -> Gemm:  # noqa: B008
    return Gemm("tfqc_product", n, k, "w4a4", "s4", end, window)


PRODUCTS = [
    (product(70, 64), (2, 5, 32), (2, 5, 70), F16),
    (product(70, 64, Epilogue(out="u4")), (2, 5, 32), (2, 5, 48), U8),
    (product(70, 64, Epilogue(out="u8")), (2, 5, 32), (2, 5, 96), U8),
    (product(128, 64, Epilogue(activation="geglu", out="u4")), (2, 5, 32), (2, 5, 32), U8),
    (product(128, 64, Epilogue(activation="geglu")), (3, 32), (3, 64), F16),
    (product(70, 9 * 32, window=Window(6, 5)), (2, 8, 7, 16), (2, 6, 5, 70), F16),
    (product(70, 9 * 32, window=Window(6, 5, 2)), (2, 8, 7, 16), (2, 3, 3, 70), F16),
]


@pytest.mark.parametrize(("kernel", "shape", "wanted", "dtype"), PRODUCTS)
def test_what_products_give(kernel: Gemm, shape: tuple[int, ...], wanted: tuple[int, ...], dtype: torch.dtype) -> None:
    runner = Recorder()
    number = ops.register(kernel, runner)
    for device in (META, torch.device("cpu")):
        a, one = torch.zeros(shape, dtype=U8, device=device), torch.ones(1, device=device)
        residual = torch.zeros(wanted, dtype=F16, device=device).transpose(0, 1).contiguous().transpose(0, 1)
        out = torch.ops.tfqc_cuda.product(a, a, one, one, None, one, one, one, residual, None, None, None, None, number)
        assert tuple(out.shape) == wanted and out.dtype is dtype and out.device == device
    ((_, rows, given),) = runner.launched
    assert rows == torch.Size(wanted[:-1]).numel() and set(given) == set(kernel.arguments[:-1])
    assert given["bias"] is None and given["residual"].is_contiguous()  # type: ignore[union-attr]


def test_kernels_are_known_as_long_as_their_runner_lives() -> None:
    runner = Recorder()
    numbers = [ops.register(Quantize("tfqc_rows", 32, 4), runner) for _ in range(2)]
    assert len(set(numbers)) == 2 and set(numbers) <= set(ops._known)
    del runner
    gc.collect()
    assert not set(numbers) & set(ops._known)


# -- the model ----------------------------------------------------------------------------------------------------


@pytest.fixture
def made(tmp_path: Path) -> tuple[Subject, Program, Engine]:
    """The small model, its program, and what runs it."""
    program = finished(small())
    return small(), program, loaded(emitted(program=program), tmp_path / "out")


def run(model: Callable[..., Any], call: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return first(model(**call))


@cpu
def test_mixed_timesteps_are_as_single_ones(made: tuple[Subject, Program, Engine]) -> None:
    its, program, model = made
    call = its.call([500.0, 0.0, 750.0, 500.0])
    together = run(model, call)
    for entry, timestep in enumerate([500.0, 0.0, 750.0, 500.0]):
        alone = {"x": call["x"][entry : entry + 1], "time": torch.tensor([int(timestep)])}
        torch.testing.assert_close(together[entry : entry + 1], run(model, alone), rtol=0, atol=0)
        assert torch.equal(run(model, alone), run(program, alone))
    assert together.is_contiguous() and together.dtype is F32


@cpu
def test_unknown_timesteps_append_rows(made: tuple[Subject, Program, Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    """Forms have room for the schedule's 4 steps, then for 8: graphs are forgotten only when they have to move."""
    its, program, model = made
    moved: list[int] = []
    monkeypatch.setattr(model.tensors, "_moved", lambda: moved.append(len(model.tensors.get("table.add_2"))))
    run(model, its.call([750.0]))
    for number, timestep in enumerate((33.0, 34.5, 35.0, 36.0, 37.0)):
        call = its.call([timestep])
        assert torch.equal(run(model, call), run(program, call))
        for name in ("table.add_2", "act.x.scale", "act.mul.zero_point"):
            assert len(model.tensors.get(name)) == 5 + number
    assert set(moved) == {5, 9}
    assert len(moved) == 2 * (1 + 3 * 3)  # the biases, and of three values scales, what they are 1 / of, zero points
    assert run(model, its.call([33.0])).shape == (1, 32, 4, 4)
    assert len(model.tensors.get("table.add_2")) == 9
    mixed = its.call([37.0, 750.0])
    assert torch.equal(run(model, mixed)[1:], run(program, {"x": mixed["x"][1:], "time": torch.tensor([750])}))


@cpu
def test_only_devices_are_followed(made: tuple[Subject, Program, Engine]) -> None:
    """A change of dtype is refused, and leaves the numbers that kernels read as they are."""
    its, _, model = made
    call = its.call([750.0])
    want = run(model, call)
    types = {name: model.tensors.get(name).dtype for name in ("wide.bias", "act.x.scale", "wide.weight.packed")}
    assert types == {"wide.bias": F32, "act.x.scale": F32, "wide.weight.packed": U8}
    for move in ((torch.float16,), ("cpu", torch.bfloat16), (torch.float64,)):
        with pytest.raises(ValueError, match=r"cannot be turned into"):
            model.to(*move)
    for moved in (model.float(), model.to("cpu"), model.to(torch.float32)):
        assert moved is model and {name: model.tensors.get(name).dtype for name in types} == types
        assert torch.equal(run(model, call), want)


def test_a_step_on_the_meta_device(made: tuple[Subject, Program, Engine]) -> None:
    """Everything follows, and no kernel is launched."""
    _, _, model = made
    model.move(META)
    assert model.tensors.device == META
    row = torch.zeros(1, dtype=torch.int64, device=META)
    with torch.no_grad():
        out = model.step(x=torch.empty(3, 32, 4, 4, device=META), row=row)
    assert out.shape == (3, 32, 4, 4) and out.dtype is F32 and out.is_meta


def test_what_is_made_of_nothing_is_made_where_the_inputs_are(subject: Subjects, tmp_path: Path) -> None:
    """Timesteps that are not in the schedule go through sines of an `arange` that was captured on a CPU."""
    its = subject("unet-sd")
    program = finished(its)
    model = loaded(emitted(program=program), tmp_path / "out")
    model.move(META)
    inputs = {i.name: torch.empty(1, *i.type.shape[1:], dtype=i.type.dtype, device=META) for i in program.inputs}  # type: ignore[arg-type]
    assert model.time is not None
    with torch.no_grad():
        found = model.time(**inputs)
    assert all(t.is_meta for t in found)


@cpu
def test_inputs_of_a_pipeline_in_half_precision(subject: Subjects, tmp_path: Path) -> None:
    """What is computed once an image is, and outputs are of the type of the sample."""
    its = subject("unet-sd")
    model = loaded(emitted(program=finished(its)), tmp_path / "out")
    call = its.call([750.0, 750.0])
    halves = {k: v.half() if v.is_floating_point() else v for k, v in call.items()}
    want = run(model, {k: v.float() if v.is_floating_point() else v for k, v in halves.items()})
    begun: list[int] = []
    begin = model.begin
    assert begin is not None
    model.begin = lambda **inputs: begun.append(1) or begin(**inputs)  # type: ignore[method-assign]
    for _ in range(2):
        got = run(model, halves)
        assert got.dtype is torch.float16 and torch.equal(got, want.half())
    assert len(begun) == 1
    halves["encoder_hidden_states"].mul_(-1)
    assert not torch.equal(run(model, halves), got) and len(begun) == 2
    with torch.inference_mode():
        halves["encoder_hidden_states"] = halves["encoder_hidden_states"].clone()  # which has no version
        for changed in (1, -1):
            halves["encoder_hidden_states"].mul_(changed)
            got = run(model, halves)
    assert len(begun) == 4 and torch.equal(got, want.half())


def test_a_cpu_is_warned_of(made: tuple[Subject, Program, Engine]) -> None:
    its, _, model = made
    with pytest.warns(UserWarning, match=r"^Kernels for CUDA run with torch here, slowly: move the model and its"):
        run(model, its.call([750.0]))
