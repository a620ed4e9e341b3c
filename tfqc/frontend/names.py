"""Names in the program of what a model calls as it likes: ASCII words, each of them once, that hide nothing of ours."""

from __future__ import annotations

import builtins
import itertools
import keyword
import re
from collections.abc import Callable, Iterable

from torch import fx

from tfqc.ir.program import BEGIN, STEP, TIME, tensor_node_name
from tfqc.runtime import Stepper, buffer_name, kernel_ops, ops

# What functions of an emitted `model.py` read beside their parameters.
_READ = {
    "self", "cls", "inputs", "aten", "device_of_inputs", "fake_quantize", "load", STEP, TIME, BEGIN, *vars(ops),
    *vars(kernel_ops), *vars(builtins), *keyword.kwlist, *keyword.softkwlist,
}  # fmt: skip

# What modules that hold a program's tensors have beside them.
_ATTRIBUTES = {STEP, TIME, BEGIN, "plan", "graph", *dir(Stepper), *dir(fx.GraphModule)}


def input_names(paths: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """A parameter's name for each place in a call: `added_cond_kwargs_time_ids` for that of `time_ids` in a mapping.

    Small letters alone, as fx wants the names of parameters to be.
    """
    taken: set[str] = set()
    names: dict[tuple[str, ...], str] = {}
    for path in paths:
        word = re.sub("(?<=[a-z0-9])(?=[A-Z])", "_", _word("_".join(path), rest="_")).lower().strip("_") or "input"
        # Rows of the schedule are parameters, too.
        hides = word in _READ or word.startswith("row") or not word[0].isalpha()
        names[path] = _free(f"input_{word}" if hides else word, taken)
    return names


def tensor_names(tensors: Iterable[str]) -> dict[str, str]:
    """A name for each tensor, its own where that can be said in IR text and can be an attribute of a module."""
    taken: set[str] = set()
    names: dict[str, str] = {}
    for own in tensors:
        words = _word(own, rest="_.").split(".")
        name = ".".join(f"{word}_" if keyword.iskeyword(word) else word for word in words)
        if name in _ATTRIBUTES or not name[:1].isalpha():
            name = f"tensor_{name}"
        names[own] = _free(name, taken, buffer_name, tensor_node_name)
    return names


def printable(text: str) -> str:
    """In one line: it stands in comments of emitted code."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _word(text: str, rest: str) -> str:
    return re.sub(rf"[^A-Za-z0-9{rest}]", "_", text)


def _free(name: str, taken: set[str], *spellings: Callable[[str], str]) -> str:
    """The name, with a number behind it if it would be written like another one somewhere."""
    numbered = itertools.chain([name], (f"{name}_{i}" for i in itertools.count(1)))
    free = next(n for n in numbered if taken.isdisjoint({n, *(write(n) for write in spellings)}))
    taken |= {free, *(write(free) for write in spellings)}
    return free
