"""Captured steps, with a stand-in for torch.cuda."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from tfqc.backends.cuda_int4.runtime.graphs import Graphs


class Cuda:
    """Stands in for torch.cuda: what is called in a capture is called again, on the same tensors, at each replay."""

    def __init__(self) -> None:
        self.capturing: list[Callable[[], None]] | None = None
        self.captures = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cuda = self

        class Stream:
            def wait_stream(self, other: Stream) -> None:
                pass

        class Graph:
            def __init__(self) -> None:
                self.calls: list[Callable[[], None]] = []

            def replay(self) -> None:
                for call in self.calls:
                    call()

        @contextlib.contextmanager
        def capture(graph: Graph) -> Iterator[None]:
            cuda.capturing, cuda.captures = graph.calls, cuda.captures + 1
            yield
            cuda.capturing = None

        for name, value in {"Stream": Stream, "CUDAGraph": Graph, "graph": capture, "current_stream": Stream,
                            "stream": lambda stream: contextlib.nullcontext()}.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)

    def step(self, **values: Tensor) -> Tensor:
        """x * scale, as a kernel that a capture records."""
        out = torch.full_like(values["x"], float("nan"))

        def kernel() -> None:
            out.copy_(values["x"] * values.get("scale", 2.0))

        if self.capturing is None:
            kernel()
        else:
            self.capturing.append(kernel)
        return out


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    stand_in = Cuda()
    stand_in.install(monkeypatch)
    return stand_in


def test_captured_once_for_each_shape(cuda: Cuda) -> None:
    graphs = Graphs(set())
    for number in range(3):
        for shape in ((2,), (3,), (2, 2)):
            x = torch.randn(shape)
            assert torch.equal(graphs.run(cuda.step, {"x": x}), 2 * x), number
    assert cuda.captures == 3
    graphs.run(cuda.step, {"x": torch.ones(2, dtype=torch.float64)})
    assert cuda.captures == 4
    graphs.clear()
    x = torch.randn(2)
    assert torch.equal(graphs.run(cuda.step, {"x": x}), 2 * x) and cuda.captures == 5


def test_inputs_are_copied_and_outputs_are_the_callers(cuda: Cuda) -> None:
    graphs = Graphs(set())
    x = torch.ones(2)
    before = graphs.run(cuda.step, {"x": x})
    x.fill_(3.0)  # in place: it is read at every step
    after = graphs.run(cuda.step, {"x": x})
    assert before.tolist() == [2.0, 2.0] and after.tolist() == [6.0, 6.0]
    after.zero_()
    assert graphs.run(cuda.step, {"x": x}).tolist() == [6.0, 6.0] and x.tolist() == [3.0, 3.0]


def test_several_outputs(cuda: Cuda) -> None:
    graphs = Graphs(set())

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        return cuda.step(x=x), cuda.step(x=x, scale=torch.tensor(5.0))

    for value in (1.0, 2.0):
        found = graphs.run(both, {"x": torch.full((2,), value)})
        assert isinstance(found, tuple) and [out.tolist() for out in found] == [[2 * value] * 2, [5 * value] * 2]


def test_what_is_fixed_is_copied_once(cuda: Cuda) -> None:
    """Values of the request are the same tensors until there is another image."""
    graphs = Graphs({"scale"})
    x, scale = torch.ones(2), torch.tensor(3.0)
    assert graphs.run(cuda.step, {"x": x, "scale": scale}).tolist() == [3.0, 3.0]
    scale.fill_(4.0)  # as nothing does: it would be seen if it were copied
    assert graphs.run(cuda.step, {"x": 2 * x, "scale": scale}).tolist() == [6.0, 6.0]
    assert graphs.run(cuda.step, {"x": x, "scale": torch.tensor(5.0)}).tolist() == [5.0, 5.0]
    assert graphs.run(cuda.step, {"x": x, "scale": scale}).tolist() == [4.0, 4.0]
    assert cuda.captures == 1


def test_the_longest_unused_is_forgotten(cuda: Cuda) -> None:
    graphs = Graphs(set())
    inputs = [{"x": torch.ones(size)} for size in range(1, Graphs.MOST + 2)]
    for values in inputs[:-1]:
        graphs.run(cuda.step, values)
    graphs.run(cuda.step, inputs[0])  # used again: no longer the oldest
    assert cuda.captures == Graphs.MOST
    graphs.run(cuda.step, inputs[-1])
    graphs.run(cuda.step, inputs[0])
    assert cuda.captures == Graphs.MOST + 1
    graphs.run(cuda.step, inputs[1])
    assert cuda.captures == Graphs.MOST + 2
