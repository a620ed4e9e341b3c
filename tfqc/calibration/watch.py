"""A program that is run and watched: its values are shown to observers, and what is in memory is counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from tfqc.analysis.weighted import weight_of
from tfqc.calibration.observers.base import Observer
from tfqc.errors import CalibrationError
from tfqc.ir.interpret import Interpreter
from tfqc.ir.program import STEP, Program


class Watch:
    """A program whose values observers see, by the name of the node that computes a value. Called like the program.

    Args:
        program: with @step alone.
        timesteps: of the schedule.

    Attributes:
        observers: by the name of the value.
        at: the position in the schedule of the next call; None: nobody looks.
        activations: bytes that the values of a call take at most: all that is read later on, weights not counted.
    """

    def __init__(self, program: Program, timesteps: Sequence[float]) -> None:
        self.observers: Mapping[str, Sequence[Observer[Any]]] = {}
        self.at: int | None = None
        self.activations = 0
        self._program, self._timesteps = program, timesteps
        self._watched = _Watched(program, self)
        self._broken: CalibrationError | None = None
        self._counted = False

    def __call__(self, **call: Any) -> Any:
        return self._watched(**call)

    def seen(self, node: fx.Node, value: Any, held: Mapping[fx.Node, Any]) -> None:
        """A node has been computed, `held` is what is kept of others."""
        if self.at is None:
            return
        if not self._counted:
            self.activations = max(self.activations, _bytes({**held, node: value}))
        for observer in self.observers.get(node.name, ()):
            if observer.steps is None or self.at in observer.steps:
                self._show(observer, node, value)

    def finished(self) -> None:
        """A call is over.

        Raises:
            CalibrationError: a value was NaN or infinite (which, and at which step).
        """
        self._counted = self._counted or self.at is not None  # sizes are those of the first
        if self._broken is not None:
            raise self._broken

    def _show(self, observer: Observer[Any], node: fx.Node, value: Any) -> None:
        try:
            observer.update(value, self.at or 0)
        except CalibrationError as error:
            if self._broken is None:  # what else a broken model does is seen first: it may return NaN
                assert self.at is not None
                self._broken = CalibrationError(
                    f"{self._named(node)} is NaN or infinite at timestep {self._timesteps[self.at]:g}: the model or "
                    "its calibration inputs are broken there."
                )
                self._broken.__cause__ = error

    def _named(self, node: fx.Node) -> str:
        own = self._program.node(node.name)
        reader = next((user for user in own.users if weight_of(user) is not None), None)
        return self._program.at(own) if reader is None else f"The input of {self._program.at(reader)}"


class _Watched(Interpreter):
    """Binds calls as any program does, and runs @step node by node."""

    def __init__(self, program: Program, watch: Watch) -> None:
        super().__init__(program)
        self._nodes = _Nodes(self._modules_by_name[STEP], watch)

    def step(self, /, **values: Any) -> Any:
        """One timestep."""
        return self._nodes.run(*(values[name] for name in self._parameters_of[STEP]))


class _Nodes(fx.Interpreter):
    """Lets go of values that nothing reads any more."""

    def __init__(self, module: fx.GraphModule, watch: Watch) -> None:
        super().__init__(module, garbage_collect_values=True)
        self._watch = watch

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self._watch.seen(n, value, self.env)
        return value


def _bytes(values: Mapping[fx.Node, Any]) -> int:
    """Of the memory behind tensors, views counted once, weights not at all; of inputs what they show of it, since the
    samples of all steps may lie behind them."""
    tensors = [(node.op, value) for node, value in values.items() if isinstance(value, Tensor)]
    weights = {_memory(value) for op, value in tensors if op == "get_attr"}
    sizes = {_memory(value): value.untyped_storage().nbytes() for _, value in tensors if _memory(value) not in weights}
    sizes |= {_memory(value): value.nbytes for op, value in tensors if op == "placeholder"}
    return sum(sizes.values())


def _memory(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()
