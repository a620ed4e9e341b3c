"""CUDA graphs of a step: captured once for each combination of input shapes, replayed at every timestep."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


class Graphs:
    """Captured steps by the shapes of their inputs. fixed: inputs that change with the image and not with the step."""

    MOST = 8

    def __init__(self, fixed: set[str]) -> None:
        self._fixed = fixed
        self._captured: dict[Any, _Captured] = {}

    def clear(self) -> None:
        """Forget all: an address that they know is no longer right."""
        self._captured.clear()

    def run(self, step: Callable[..., Any], values: Mapping[str, Tensor]) -> Any:
        """What `step(**values)` gives."""
        key = tuple((name, value.shape, value.dtype, value.device) for name, value in sorted(values.items()))
        found = self._captured.pop(key, None) or _Captured(step, values)
        self._captured[key] = found  # the last used is the last
        if len(self._captured) > self.MOST:
            del self._captured[next(iter(self._captured))]
        return found.replay(values, self._fixed)


class _Captured:
    def __init__(self, step: Callable[..., Any], values: Mapping[str, Tensor]) -> None:
        self._inputs = {name: value.clone() for name, value in values.items()}
        self._given: dict[str, Tensor] = {}
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # what is made on first use cannot be made during a capture
            step(**self._inputs)
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = step(**self._inputs)

    def replay(self, values: Mapping[str, Tensor], fixed: set[str]) -> Any:
        for name, value in values.items():
            if name not in fixed:
                self._inputs[name].copy_(value)
            elif self._given.get(name) is not value:
                self._inputs[name].copy_(value)
                self._given[name] = value
        self._graph.replay()
        if isinstance(self._outputs, Tensor):
            return self._outputs.clone()
        return tuple(t.clone() for t in self._outputs)
