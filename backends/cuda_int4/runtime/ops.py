"""Kernels as operations of torch: `torch.ops.tfqc_cuda`, on CUDA devices, on CPUs and on the meta device.

A kernel is known by a number that `register` gives out. The same function serves all devices: it makes room for the
result, and `Runner.launch` decides what fills it.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from tfqc.backends.cuda_int4.runtime.reference import Given
from tfqc.backends.cuda_int4.runtime.specialise import Gemm, Kernel, Quantize


class Runner(Protocol):
    """Who runs kernels."""

    def launch(self, kernel: Kernel, rows: int, given: Given) -> None:
        """Run a kernel on the tensors that are its arguments, by name; the last argument is the number of rows."""
        ...


_known: dict[int, tuple[Kernel, weakref.ref[Runner]]] = {}
_numbers = itertools.count()


def register(kernel: Kernel, runner: Runner) -> int:
    """A number by which operations find a kernel, for as long as the runner lives."""
    number = next(_numbers)
    _known[number] = (kernel, weakref.ref(runner, lambda _: _known.pop(number, None)))
    return number


def _launch(number: int, rows: int, given: Given) -> None:
    kernel, reference = _known[number]
    runner = reference()
    assert runner is not None
    runner.launch(kernel, rows, given)


def _copy(x: Tensor, kernel: int) -> Tensor:
    its = _known[kernel][0]
    assert isinstance(its, Quantize)
    lead, rows = _lead(its, x)
    out = x.new_empty(*lead, -(-its.k // 32) * 32)
    if x.device.type != "meta":
        _launch(kernel, rows, {"x": x.contiguous(), "out": out})
    return out


def _quantize_low_rank(
    x: Tensor, inverse: Tensor, zero: Tensor, step: Tensor, down: Tensor, kernel: int
) -> tuple[Tensor, Tensor]:
    its = _known[kernel][0]
    assert isinstance(its, Quantize)
    lead, rows = _lead(its, x)
    out, low = x.new_empty(*lead, _pitch(its.k, its.bits), dtype=torch.uint8), x.new_empty(*lead, its.rank)
    given = {"x": x.contiguous(), "inverse": inverse, "zero": zero, "step": step, "out": out, "down": down, "low": low}
    if x.device.type != "meta":
        _launch(kernel, rows, given)
    return out, low


def _quantize(x: Tensor, inverse: Tensor, zero: Tensor, step: Tensor, kernel: int) -> Tensor:
    its = _known[kernel][0]
    assert isinstance(its, Quantize)
    lead, rows = _lead(its, x)
    out = x.new_empty(*lead, _pitch(its.k, its.bits), dtype=torch.uint8)
    given = {"x": x.contiguous(), "inverse": inverse, "zero": zero, "step": step, "out": out}
    if x.device.type != "meta":
        _launch(kernel, rows, given)
    return out


def _quantize_tokens(x: Tensor, kernel: int) -> tuple[Tensor, Tensor, Tensor]:
    its = _known[kernel][0]
    assert isinstance(its, Quantize)
    lead, rows = _lead(its, x)
    out = x.new_empty(*lead, _pitch(its.k, its.bits), dtype=torch.uint8)
    scale, zero = x.new_empty(lead, dtype=torch.float32), x.new_empty(lead, dtype=torch.int32)
    if x.device.type != "meta":
        _launch(kernel, rows, {"x": x.contiguous(), "scale": scale, "zero": zero, "out": out})
    return out, scale, zero


def _product(
    a: Tensor,
    weight: Tensor,
    weight_sum: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    zero: Tensor | None,
    step: Tensor,
    residual: Tensor | None,
    low: Tensor | None,
    up: Tensor | None,
    out_inverse: Tensor | None,
    out_zero: Tensor | None,
    kernel: int,
) -> Tensor:
    its = _known[kernel][0]
    assert isinstance(its, Gemm)
    lead = a.shape[:-1] if its.window is None else (a.shape[0], *its.window.out)
    columns = its.n // 2 if its.paired else its.n
    bits = {"u4": 4, "u8": 8}.get(its.epilogue.out)
    dtype = torch.uint8 if bits else torch.float16
    out = a.new_empty(*lead, _pitch(columns, bits) if bits else columns, dtype=dtype)
    given = {
        "a": a.contiguous(), "weight": weight, "weight_sum": weight_sum, "weight_scale": weight_scale, "bias": bias,
        "scale": scale, "zero": zero, "step": step, "residual": None if residual is None else residual.contiguous(),
        "low": low, "up": up, "out_inverse": out_inverse, "out_zero": out_zero, "out": out,
    }  # fmt: skip
    if a.device.type != "meta":
        _launch(kernel, torch.Size(lead).numel(), given)
    return out


def _lead(kernel: Quantize, x: Tensor) -> tuple[tuple[int, ...], int]:
    """The shape of what is written without its last dimension, and how many rows that is."""
    if kernel.image is None:
        lead = tuple(x.shape[:-1])
    else:
        height, width = kernel.image
        lead = (x.shape[0], height + 2, width + 2)
    return lead, torch.Size(lead).numel()


def _pitch(codes: int, bits: int) -> int:
    """Bytes of a row of codes."""
    return -(-codes // 32) * 32 * bits // 8


_SIGNATURES: dict[str, tuple[Callable[..., Any], str]] = {
    "quantize": (_quantize, "Tensor x, Tensor inverse, Tensor zero, Tensor step, int kernel) -> Tensor"),
    "quantize_low_rank": (
        _quantize_low_rank,
        "Tensor x, Tensor inverse, Tensor zero, Tensor step, Tensor down, int kernel) -> (Tensor, Tensor)",
    ),
    "quantize_tokens": (_quantize_tokens, "Tensor x, int kernel) -> (Tensor, Tensor, Tensor)"),
    "copy": (_copy, "Tensor x, int kernel) -> Tensor"),
    "product": (
        _product,
        "Tensor a, Tensor weight, Tensor weight_sum, Tensor weight_scale, Tensor? bias, Tensor? scale, Tensor? zero,"
        " Tensor step, Tensor? residual, Tensor? low, Tensor? up, Tensor? out_inverse, Tensor? out_zero, int kernel)"
        " -> Tensor",
    ),
}
_LIBRARY = torch.library.Library("tfqc_cuda", "DEF")
for _name, (_function, _signature) in _SIGNATURES.items():
    _LIBRARY.define(f"{_name}({_signature}")
    for _device in ("CPU", "CUDA", "Meta"):
        _LIBRARY.impl(_name, _function, _device)
