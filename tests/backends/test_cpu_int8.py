"""The cpu-int8 backend keeps what all backends keep, and each line of its schedules is held to rounding."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from tests.backends.border import Border
from tests.backends.conformance import Conformance, compile_for
from tests.backends.conformance import pytest_generate_tests as pytest_generate_tests
from tests.helpers import first
from tests.subjects import Subjects
from tfqc.backends.cpu_int8.runtime.build import ISAS, runs_here
from tfqc.backends.cpu_int8.runtime.eager import Eager
from tfqc.driver import load

EXACT = "cpu-int8{residual=fp32 attention=fp32}"
DEFAULT = "cpu-int8"


class TestCpuInt8Border(Border):
    target = "cpu-int8"


class TestCpuInt8(Conformance):
    backend = "cpu-int8"
    targets = (EXACT, "cpu-int8{}", "cpu-int8{activations=static}", "cpu-int8{weights=4 activations=per-token}")
    models: ClassVar = ("unet-sd", "unet2d", "unet-sdxl", "dit")
    # One code that rounding turns the other way moves the outputs of these small random networks by percents: what
    # rounding does is held line by line below.
    tolerance = 0.3

    def check(self, want: Any, got: Any) -> None:
        a, b = first(want), first(got)
        assert a.shape == b.shape and a.dtype == b.dtype
        assert float((a - b).norm() / a.norm()) <= self.tolerance


class Remembering(Eager):
    """Computes with torch, and remembers every value."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def __getattr__(self, operation: str) -> Callable[..., Any]:
        call = super().__getattr__(operation)

        def remember(name: str, *args: Any, **kwargs: Any) -> Any:
            self.values[name] = call(name, *args, **kwargs)
            return self.values[name]

        return remember


@pytest.mark.parametrize("model", ["unet2d-scale-shift", "unet-sd", "dit", "pixart"])
@pytest.mark.parametrize("target", [EXACT, "cpu-int8{residual=fp32 attention=bf16 activations=per-token}", DEFAULT])
def test_every_line(
    target: str, model: str, subject: Subjects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given the reference's operands, each kernel of each instruction set gives the reference's result: codes off by
    one where a value lies between two of them, floating point values by rounding."""
    its = subject(model)
    _, artifact = compile_for(its, target, "fold", tmp_path / "work")
    out = artifact.save(tmp_path / "out")
    for isa in filter(runs_here, ISAS):
        monkeypatch.setenv("TFQC_ISA", isa)
        loaded: Any = load(out)
        assert loaded.isa == isa
        for timesteps in ([its.timesteps[0]], [its.timesteps[1], its.timesteps[3]]):
            for line, want, got in lines(loaded, its.call(list(timesteps))):
                rough = line.kernel == "attention" and "attention=fp32" not in target
                hold_to_rounding(f"{isa} {line.name}", rough, want, got)


def hold_to_rounding(name: str, rough: bool, want: Tensor, got: Tensor) -> None:
    """rough: products were rounded to 16 or 8 bits."""
    if got.dtype is torch.uint8:
        off = (want.int() - got.int()).abs()
        assert int(off.max()) <= (12 if rough else 1), name
        assert rough or float((off > 0).float().mean()) < 0.02, name
    else:
        rounding = 2**-8 if got.dtype is torch.bfloat16 else 1e-5
        error = float((want.float() - got.float()).abs().max() / want.float().abs().max())
        assert error <= (3e-2 if rough else rounding), name


def lines(loaded: Any, call: dict[str, Any]) -> list[tuple[Any, Tensor, Tensor]]:
    """Each kernel's line, what the reference gives there, and what the kernel does from the reference's operands."""
    eager = Remembering()
    inputs: dict[str, Tensor] = {}

    def step(**values: Tensor) -> Any:
        inputs.update(values)
        return loaded.lines(eager, loaded.get_tensor, loaded._tiles.__getitem__, **values)

    loaded.step = step
    with torch.no_grad():
        loaded(**call)
        del loaded.step
        schedule = loaded.recording(inputs)
        schedule._take(inputs)
        found: list[tuple[Any, Tensor, Tensor]] = []
        for line in schedule.lines:
            (line.call or schedule._commands([line]))()
            want = eager.values.get(line.name)
            if line.args is not None and want is not None:
                want = want[0] if isinstance(want, tuple) else want
                found.append((line, want, line.made.clone()))
                line.made.copy_(want)
    assert found
    return found


def test_structs_are_those_of_the_header() -> None:
    """Sizes that g++ gives the structs of abi.h: ctypes and C++ agree."""
    from tfqc.backends.cpu_int8.runtime import abi
    from tfqc.backends.cpu_int8.runtime.build import best_isa, build, source_of

    names = [n for n in vars(abi) if n.endswith("Args") or n in ("Rows", "Quant", "Epilogue", "Command")]
    body = "".join(
        f'extern "C" size_t size_{n}() {{ return sizeof({n}{"<float>" if n == "Rows" else ""}); }}\n' for n in names
    )
    library = build(source_of("abi.h") + body, best_isa() or "avx2")
    for name in names:
        assert library[f"size_{name}"]() == ctypes.sizeof(getattr(abi, name)), name
