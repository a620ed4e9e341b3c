"""One capture of a model a session, also where `tfqc.compile` is what captures: torch.export is half of a test's time.

A second model with the same classes, attributes, tensors and example gets a copy of the first one's program that holds
its own tensors. What capture itself does is tested with `tfqc.frontend.capture`, which is left alone.
"""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Callable
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tfqc.files.storage import bytes_of
from tfqc.frontend import capture
from tfqc.frontend.unwrap import unwrapped
from tfqc.ir.program import Program

LARGEST = 64 << 20  # bytes of a model that is worth its hash
_PLAIN = (bool, int, float, str, bytes, type(None), Enum, torch.dtype, torch.device)
_NAMED = (type, FunctionType, BuiltinFunctionType, ModuleType)  # compared by identity


class Unknown(Exception):
    """Something of a model that two models cannot be compared by."""


def captures_once() -> Callable[..., Program]:
    """What `tfqc.frontend.capture` does, done once for models that are alike."""
    kept: dict[str, tuple[Program, dict[str, str]]] = {}

    @functools.wraps(capture)
    def once(model: nn.Module, example_inputs: Any, **options: Any) -> Program:
        try:
            key = _key(model, example_inputs, options)
        except Unknown:
            return capture(model, example_inputs, **options)
        state = _state(unwrapped(model))
        if key in kept:
            program = kept[key][0].clone()
            program.tensors |= {name: state[path].detach() for name, path in kept[key][1].items()}
            return program
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            program = capture(model, example_inputs, **options)
        if told:  # to be told every time
            for each in told:
                warnings.warn(each.message, each.category, stacklevel=2)
            return program
        places = {_place(tensor): path for path, tensor in state.items()}
        own = {name: places[_place(t)] for name, t in program.tensors.items() if t.numel() and _place(t) in places}
        copy = program.clone()
        copy.tensors = {name: t if name in own else t.clone() for name, t in copy.tensors.items()}
        for name in own:
            copy.tensors[name] = torch.empty(0)  # not kept alive: the next model has its own
        kept[key] = copy, own
        return program

    return once


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _key(model: nn.Module, example: Any, options: Any) -> str:
    model = unwrapped(model)
    if sum(t.nbytes for t in _state(model).values()) > LARGEST:
        raise Unknown
    digest, seen = hashlib.sha256(), dict[int, int]()

    def add(value: Any) -> None:
        digest.update(type(value).__qualname__.encode())
        if isinstance(value, Tensor):
            if type(value) not in (Tensor, nn.Parameter) or value.device.type != "cpu":
                raise Unknown
            digest.update(repr((value.dtype, value.shape, value.stride(), value.requires_grad)).encode())
            digest.update(bytes_of(value.detach()) if value.numel() else b"")
        elif isinstance(value, _PLAIN):
            digest.update(repr(value).encode())
        elif isinstance(value, _NAMED):
            digest.update(str(_number(value)).encode())
        elif id(value) in seen:
            digest.update(f"#{seen[id(value)]}".encode())
        else:
            seen[id(value)] = len(seen)
            parts(value)
        digest.update(b";")

    def parts(value: Any) -> None:
        if isinstance(value, (list, tuple)):
            each = list(value)
        elif isinstance(value, (set, frozenset)):
            each = sorted(value, key=repr)
        elif isinstance(value, dict):
            each = [part for item in value.items() for part in item]
        elif isinstance(value, MethodType):
            each = [value.__func__, value.__self__]
        elif isinstance(value, functools.partial):
            each = [value.func, value.args, value.keywords]
        elif hasattr(value, "__dict__"):
            each = [type(value), vars(value)]
        else:
            raise Unknown
        for part in (len(each), *each):
            add(part)

    for part in (model, *pytree.tree_flatten(example), options):
        add(str(part) if isinstance(part, pytree.TreeSpec) else part)
    return digest.hexdigest()


_numbers: dict[int, tuple[int, Any]] = {}


def _number(value: Any) -> int:
    """A number for a class or function, which then lives as long as the session does: no other gets its address."""
    return _numbers.setdefault(id(value), (len(_numbers), value))[0]
