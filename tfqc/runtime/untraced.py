"""Keeping torch.compile out of a compiled model: it would trace for minutes, and gain nothing."""

from __future__ import annotations

from typing import Any, TypeVar

from torch._C._dynamo import eval_frame

F = TypeVar("F")


def untraced(function: F) -> F:
    """A function that torch.compile breaks its graph for, and in which it traces nothing.

    torch.compiler.disable says the same, but imports the tracer (seconds) into programs that do not use it.
    """
    marked: Any = function
    marked._torchdynamo_disable = True
    skip = eval_frame._FrameExecStrategy(eval_frame._FrameAction.SKIP, eval_frame._FrameAction.SKIP)
    eval_frame.set_code_exec_strategy(marked.__code__, skip)
    return function
