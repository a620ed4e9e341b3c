"""Inputs that are constants of a capture: code may decide by their values, which torch.export never sees traced."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from tfqc.frontend.deciding import REPEATS, tensors_in
from tfqc.frontend.inputs import replaced

aten = torch.ops.aten
_MOST = 2**16  # numbers that a constant may hold
_MAKES = {torch.arange, torch.zeros, torch.ones, torch.full, torch.tensor, torch.eye}


@contextmanager
def fixed_inputs(model: torch.nn.Module, values: Mapping[tuple[str, ...], Tensor]) -> Generator[None]:
    """Within it the model computes with these values, whatever it is given in their places.

    What is computed from them alone is computed now. Where it meets what is traced, it is a constant of the graph.
    """
    mode = _Fixed()

    def enter(_: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        mode.__enter__()
        return args, replaced(kwargs, {path: mode.fix(value) for path, value in values.items()})

    def leave(*_: Any) -> None:
        mode.__exit__(None, None, None)

    hooks = [
        model.register_forward_pre_hook(enter, with_kwargs=True),
        model.register_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Fixed(TorchFunctionMode):
    """Computes what has only fixed operands on the spot, past whatever traces."""

    def __init__(self) -> None:
        super().__init__()
        self._fixed: dict[int, Tensor] = {}  # by identity; they are kept, so that it is not given to others
        self._traced: dict[int, Tensor] = {}  # what stands for one of them in the graph

    def fix(self, value: Tensor) -> Tensor:
        """A copy that is fixed."""
        with _disable_current_modes():
            return self._keep(value.detach().clone())

    def _keep(self, value: Tensor) -> Tensor:
        self._fixed[id(value)] = value
        return value

    def _is_fixed(self, value: Any) -> bool:
        return id(value) in self._fixed and id(value) not in self._traced

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = tensors_in((args, kwargs))
        if not given and (made := self._made_of_numbers(func, args, kwargs)) is not None:
            return made
        if not any(id(tensor) in self._fixed for tensor in given):
            return func(*args, **kwargs)
        if all(map(self._is_fixed, given)):
            with _disable_current_modes():
                result = func(*args, **kwargs)
            for made in tensors_in(result):
                self._keep(made)
            return result
        writes = func is Tensor.__setitem__ or getattr(func, "__name__", "").rstrip("_") + "_" == func.__name__
        written = args[0] if writes and args and self._is_fixed(args[0]) else None
        if func in REPEATS and self._is_fixed(args[1] if len(args) > 1 else kwargs.get("repeats")):
            return self._repeated(*args, **kwargs)
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            args = (args[0], self._positions(args[1]), *args[2:])
        args, kwargs = self._traceable(args), self._traceable(kwargs)
        if written is not None:  # from now on it is what was traced
            self._traced[id(written)] = args[0]
        return func(*args, **kwargs)

    def _made_of_numbers(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor | None:
        """What is made of numbers alone, and not large: positions and masks are computed with such."""
        if func not in _MAKES or any(isinstance(each, torch.SymInt) for each in pytree.tree_leaves((args, kwargs))):
            return None
        with _disable_current_modes():
            made = func(*args, **kwargs)
        return None if made.numel() > _MOST or made.is_meta else self._keep(made)

    def _repeated(self, value: Tensor, repeats: Tensor, dim: int | None = None, **_: Any) -> Tensor:
        with _disable_current_modes():
            positions = self._keep(torch.repeat_interleave(repeats.expand(value.shape[dim or 0])))
        return torch.index_select(value if dim is not None else value.flatten(), dim or 0, positions)

    def _positions(self, index: Any) -> Any:
        """An index with positions in the place of fixed masks."""
        found: list[Any] = []
        for each in index if isinstance(index, tuple) else (index,):
            if isinstance(each, Tensor) and self._is_fixed(each) and each.dtype in (torch.bool, torch.uint8):
                with _disable_current_modes():
                    found += [self._keep(positions) for positions in each.bool().nonzero(as_tuple=True)]
            else:
                found.append(each)
        return tuple(found)

    def _traceable(self, value: Any) -> Any:
        """Operands with constants of the graph in the place of fixed tensors, and numbers in that of bounds."""
        match value:
            case Tensor() if id(value) in self._fixed:
                return self._traced[id(value)] if id(value) in self._traced else _lifted(value)
            case dict():
                return {key: self._traceable(item) for key, item in value.items()}
            case slice(start=start, stop=stop, step=step):
                return slice(*(int(each) if isinstance(each, Tensor) and self._is_fixed(each) else each
                               for each in (start, stop, step)))  # fmt: skip
            case list() | tuple():
                return type(value)(self._traceable(item) for item in value)
            case _:
                return value


def _lifted(value: Tensor) -> Tensor:
    if value.dtype != torch.complex128:
        return aten.lift_fresh_copy.default(value)
    with _disable_current_modes():
        pairs = torch.view_as_real(value.resolve_conj()).clone()  # files hold no complex128
    return torch.view_as_complex(aten.lift_fresh_copy.default(pairs))
