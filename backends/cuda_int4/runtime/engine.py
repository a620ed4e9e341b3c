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
from tfqc.runtime import Plan, Stepper


class Engine(Stepper):
    """A compiled model, called like the one that was captured.

    `to("cuda")` brings it to a device, where each new combination of input shapes is captured as one CUDA graph; on a
    CPU it computes the same with torch. source: of kernels.cu. batched: which dimension of a step's parameters is
    the batch.
    """

    lines: Callable[..., Any]
    """The model's step: `lines(k, w, **inputs)` with kernels k and tensors w."""
    constants: Callable[..., Mapping[str, Tensor]] | None = None
    """Values that need no input: `constants(w)`."""

    def __init__(
        self, directory: Path, source: str, plan: Plan, kernels: Sequence[Kernel], batched: Mapping[str, int]
    ) -> None:
        super().__init__(plan)
        self._graphs = Graphs({*plan.hoisted, *plan.request_tables})
        self.tensors = Tensors(directory, self._graphs.clear)
        self.runner = Runner(source)
        self._kernels = {kernel.name: (kernel, register(kernel, self.runner)) for kernel in kernels}
        self._batched = {**batched, **dict.fromkeys(plan.label_rows, 0)}
        for name, value in self.constants(self.get_tensor).items() if self.constants else ():
            self.tensors.put(name, value)

    def get_tensor(self, name: str) -> Tensor:
        """A tensor of the program."""
        return self.tensors.get(name)

    def set_tensor(self, name: str, value: Tensor) -> None:
        """Replace a table."""
        self.tensors.put(name, value)

    def move(self, device: torch.device) -> None:
        """Follow to a device; the numbers that kernels read stay of the types that they are."""
        self.tensors.to(device)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Every tensor of the artifact by its name; weights as they are packed."""
        return self.tensors.all()

    def step(self, /, **values: Any) -> Any:
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
        several, fixed = False, isinstance(self.plan.sample.shape[0], int)  # a batch that code fixes is computed whole
        for row in rows.unique():
            mine = (rows == row).nonzero().flatten()
            parted = {} if fixed else self._batched
            part = {k: v.index_select(parted[k], mine) if k in parted else v for k, v in values.items()}
            found = self.step(**{**part, self.plan.row: row[None]})
            several = isinstance(found, tuple)
            outs = found if several else (found,)
            result = result or [out.new_empty(len(rows), *out.shape[1:]) for out in outs]
            for whole, out in zip(result, outs, strict=True):
                whole[mine] = out[mine] if fixed else out
        return tuple(result) if several else result[0]


class Runner:
    """Launches kernels where their arguments are."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._devices: dict[int, Loaded] = {}

    def launch(self, kernel: Kernel, rows: int, given: Given) -> None:
        """On the device of what is written."""
        out = given["out"]
        assert out is not None
        if out.is_cuda:
            index = out.device.index or 0
            if index not in self._devices:
                self._devices[index] = Loaded(self._source, index)
            self._devices[index].launch(kernel, rows, given)
        else:
            _warn_of_cpu()
            reference.launch(kernel, rows, given)


def _warn_of_cpu() -> None:
    message = "Kernels for CUDA run with torch here, slowly: move the model and its inputs to a CUDA device."
    warnings.warn(message, stacklevel=2)
