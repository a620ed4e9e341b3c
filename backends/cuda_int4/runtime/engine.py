"""The run time of a compiled model: lines of a step on a CUDA device, or with torch on a CPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tfqc.backends.cuda_int4.runtime import reference
from tfqc.backends.cuda_int4.runtime.graphs import Graphs
from tfqc.backends.cuda_int4.runtime.launches import Launches
from tfqc.backends.cuda_int4.runtime.loaded import Loaded
from tfqc.backends.cuda_int4.runtime.ops import register
from tfqc.backends.cuda_int4.runtime.reference import Given
from tfqc.backends.cuda_int4.runtime.specialise import Kernel
from tfqc.backends.cuda_int4.runtime.tensors import Tensors
from tfqc.runtime import Output, Plan, Stepper


class Engine(Stepper):
    """A compiled model, called like the one that was captured. Not safe for use from several threads at once.

    `to("cuda")` brings it to a device, where each new combination of input shapes is captured as one CUDA graph; on a
    CPU it computes the same with torch. Inputs may be in f16 or bf16, as pipelines have them: outputs are then, too.
    batched: which dimension of a step's parameters is the batch.
    """

    lines: Callable[..., Any]
    """The model's step: `lines(k, w, **inputs)` with kernels k and tensors w."""
    constants: Callable[..., Mapping[str, Tensor]] | None = None
    """Values that need no input: `constants(w)`."""

    def __init__(self, directory: Path, plan: Plan, kernels: Sequence[Kernel], batched: Mapping[str, int]) -> None:
        super().__init__(plan)
        self._widened: dict[str, tuple[Tensor, int, Tensor]] = {}
        self._given = torch.float32
        self._graphs = Graphs({*plan.hoisted, *plan.request_tables})
        self.tensors = Tensors(directory, self._graphs.clear)
        self.runner = Runner(directory / "kernels.cu")
        self._kernels = {kernel.name: (kernel, register(kernel, self.runner)) for kernel in kernels}
        self._batched = {**batched, **dict.fromkeys(plan.label_rows, 0)}
        for name, value in self.constants(self.get_tensor).items() if self.constants else ():
            self.tensors.put(name, value)

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """As `Stepper.bind`, in the types of the captured model."""
        values = super().bind(args, kwargs)
        roles = {name: role for name, role, _ in self.plan.inputs}
        self._given = next(value.dtype for name, value in values.items() if roles[name] == "sample")
        return {name: value if roles[name] == "time" else self._wide(name, value) for name, value in values.items()}

    def _wide(self, name: str, value: Tensor) -> Tensor:
        """An input in f32, the same tensor for the same input: what it gives once an image is known by it."""
        if value.dtype not in (torch.float16, torch.bfloat16):
            return value
        narrow, version, wide = self._widened.get(name, (None, 0, value))
        by_value = value.is_inference() or value.device.type == "cpu"  # versions miss some writes
        if narrow is value and (torch.equal(value.to(torch.float32), wide) if by_value else value._version == version):
            return wide
        self._widened[name] = (value, 0 if value.is_inference() else value._version, value.to(torch.float32))
        return self._widened[name][2]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The captured model's inputs in, its outputs out."""
        result = super().forward(*args, **kwargs)
        if self._given not in (torch.float16, torch.bfloat16):
            return result
        return result.to(self._given) if isinstance(result, Tensor) else Output(t.to(self._given) for t in result)

    def get_tensor(self, name: str) -> Tensor:
        """A tensor of the program."""
        return self.tensors.get(name)

    def set_tensor(self, name: str, value: Tensor) -> None:
        """Replace a table."""
        self.tensors.put(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Engine:
        """Follow to a device; the numbers that kernels read stay of the types that they are."""
        super()._apply(fn, recurse)
        self.tensors.to(fn(torch.empty(0, device=self.tensors.device)).device)
        return self

    def step(self, **values: Any) -> Any:
        """One timestep; a launch has one row of the schedule, so a batch of several is computed in parts."""
        rows = values.get(self.plan.row)
        if rows is not None and len(rows) > 1:
            return self._by_row(rows, values)
        if self.tensors.device.type == "cuda":
            return self._graphs.run(self._once, values)
        return self._once(**values)

    def _once(self, **values: Any) -> Any:
        rows = values.get(self.plan.row)
        none = torch.zeros(1, dtype=torch.int32, device=self.tensors.device)
        step = none if rows is None else rows.to(torch.int32)
        with torch.no_grad():
            return self.lines(Launches(self._kernels, self.tensors, step), self._whole, **values)

    def _whole(self, name: str) -> Tensor:
        """A tensor for operations of a step: tables with all the room that they have."""
        growing = name in self.plan.activations or any(
            name in (t.tensor, t.scale, t.zero_point) for t in self.plan.tables
        )
        return self.tensors.form(name, "rows") if growing else self.tensors.get(name)

    def _by_row(self, rows: Tensor, values: Mapping[str, Any]) -> Any:
        result: list[Tensor] = []
        several = False
        for row in rows.unique():
            mine = (rows == row).nonzero().flatten()
            part = {k: v.index_select(self._batched[k], mine) if k in self._batched else v for k, v in values.items()}
            found = self.step(**{**part, self.plan.row: row[None]})
            several = isinstance(found, tuple)
            outs = found if several else (found,)
            result = result or [out.new_empty(len(rows), *out.shape[1:]) for out in outs]
            for whole, out in zip(result, outs, strict=True):
                whole[mine] = out
        return tuple(result) if several else result[0]


class Runner:
    """Launches kernels where their arguments are."""

    def __init__(self, source: Path) -> None:
        self._source = source
        self._devices: dict[int, Loaded] = {}

    def launch(self, kernel: Kernel, rows: int, given: Given) -> None:
        """On the device of what is written."""
        out = given["out"]
        assert out is not None
        if out.is_cuda:
            index = out.device.index or 0
            if index not in self._devices:
                self._devices[index] = Loaded(self._source.read_text(), index)
            self._devices[index].launch(kernel, rows, given)
        else:
            _warn_of_cpu()
            reference.launch(kernel, rows, given)


def _warn_of_cpu() -> None:
    message = "Kernels for CUDA run with torch here, slowly: move the model and its inputs to a CUDA device."
    warnings.warn(message, stacklevel=2)
