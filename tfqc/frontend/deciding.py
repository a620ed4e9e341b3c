"""Which inputs a model's code decides by: whose values it turns into Python's, or into sizes."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from tfqc.frontend.evaluating import evaluating
from tfqc.frontend.inputs import keys_of

Path = tuple[str, ...]
_FROM = "_tfqc_from"  # on a tensor: the inputs that it was computed from

# What gives Python a value, or a tensor whose sizes hang on values.
_DECIDES = {
    Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__,
    Tensor.__array__, Tensor.__contains__, Tensor.nonzero, torch.nonzero, torch.argwhere, Tensor.argwhere,
    torch.masked_select, Tensor.masked_select, torch.unique, Tensor.unique, torch.unique_consecutive,
    Tensor.unique_consecutive, torch.bincount, Tensor.bincount, torch.equal, Tensor.equal, torch.allclose,
    Tensor.allclose, torch.is_nonzero,
}  # fmt: skip
REPEATS = {torch.repeat_interleave, Tensor.repeat_interleave}


def deciding_inputs(
    model: torch.nn.Module, arguments: Mapping[str, Any], source: Callable[[traceback.StackSummary], str]
) -> dict[Path, str]:
    """Places in a call of the inputs by whose values the code decides, and the line that does it first.

    The model is run once on the example. Nothing is found in a model that does not run so.

    Args:
        source: where the last frame of the model's own code stands.
    """
    leaves = {keys_of(path): leaf for path, leaf in pytree.tree_flatten_with_path(dict(arguments))[0]}
    own = {path: leaf.detach().clone() for path, leaf in leaves.items() if isinstance(leaf, Tensor)}
    for path, tensor in own.items():
        setattr(tensor, _FROM, frozenset({path}))
    call = pytree.tree_map_with_path(lambda path, leaf: own.get(keys_of(path), leaf), dict(arguments))
    watch = _Watch(source)
    with evaluating(model), suppress(Exception), torch.no_grad(), watch:
        model(**call)
    return watch.found


class _Watch(TorchFunctionMode):
    def __init__(self, source: Callable[[traceback.StackSummary], str]) -> None:
        super().__init__()
        self.found: dict[Path, str] = {}
        self._source = source

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        read = frozenset[Path]().union(*(getattr(t, _FROM, ()) for t in tensors_in((args, kwargs))))
        if func in _DECIDES or (func in REPEATS and len(tensors_in((args, kwargs))) > 1) or _by_index(func, args):
            deciding = args[0] if func in _DECIDES else args[1:]
            for path in frozenset[Path]().union(*(getattr(t, _FROM, ()) for t in tensors_in(deciding))):
                self.found.setdefault(path, self._source(traceback.extract_stack()))
        result = func(*args, **kwargs)
        if func is Tensor.__setitem__:
            setattr(args[0], _FROM, read)
        for made in tensors_in(result) if read else ():
            setattr(made, _FROM, read)
        return result


def _by_index(func: Any, args: Any) -> bool:
    """`x[mask]`, and slices that end where a tensor says; `x[mask] = y` does not decide."""
    if func not in (Tensor.__getitem__, Tensor.__setitem__):
        return False
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    bounds = [bound for item in index if isinstance(item, slice) for bound in (item.start, item.stop, item.step)]
    masks = [item for item in index if isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8)]
    return any(isinstance(bound, Tensor) for bound in bounds) or (func is Tensor.__getitem__ and bool(masks))


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in nested operands, bounds of slices among them."""
    found: list[Tensor] = []
    waiting: list[Any] = [value]
    while waiting:
        match waiting.pop():
            case Tensor() as tensor:
                found.append(tensor)
            case dict() as mapping:
                waiting += mapping.values()
            case list() | tuple() as items:
                waiting += items
            case slice(start=start, stop=stop, step=step):
                waiting += (start, stop, step)
            case _:
                pass
    return found
