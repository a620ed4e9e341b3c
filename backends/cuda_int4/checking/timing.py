"""Times of kernels on a device, by its own clock, and of the same products in fp16 as torch computes them."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from contextlib import ExitStack

import numpy as np
import torch
import torch.nn.functional as F

from tfqc.backends.cuda_int4.checking.layers import Layer
from tfqc.backends.cuda_int4.runtime.libcuda import Driver, Function
from tfqc.backends.cuda_int4.runtime.specialise import Gemm, Kernel, Quantize

WARM_UP, GROUPS, EACH = 20, 15, 10
DEVICE = "cuda"  # torch's name of it


def microseconds(driver: Driver, start: Callable[[], object]) -> float:
    """Of what `start` starts on the default stream, the median of several groups.

    Nothing is waited for in between, so that the device is never idle while the next launch is prepared.
    """
    events = [driver.event() for _ in range(GROUPS + 1)]
    for _ in range(WARM_UP):
        start()
    events[0].record()
    for event in events[1:]:
        for _ in range(EACH):
            start()
        event.record()
    driver.synchronize()
    groups = [later.since(earlier) for earlier, later in itertools.pairwise(events)]
    return statistics.median(groups) * 1000 / EACH


def kernel_us(driver: Driver, function: Function, layer: Layer) -> float:
    """Of a kernel on random numbers."""
    kernel = layer.kernel
    with ExitStack() as stack:
        pointers: list[int] = []
        for name, size in _sizes(kernel, layer).items():
            memory = driver.allocate(size)
            stack.callback(memory.free)
            memory.write(_random(size) if name != "step" else np.zeros(size, np.uint8))
            pointers.append(memory.pointer)
        launch = function.prepared(kernel.grid(layer.rows), kernel.threads, [*pointers, layer.rows])
        return microseconds(driver, launch)


def fp16_us(driver: Driver, layer: Layer, kernel: Gemm) -> float:
    """Of cuBLAS, or cuDNN for 3 x 3, on the same product with a bias; torch has to have CUDA."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float16, device=DEVICE)

    bias, window = random(kernel.n), kernel.window
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, benchmark=True):
        if window is None:
            x, weight = random(layer.rows, kernel.k), random(kernel.n, kernel.k)
            return microseconds(driver, lambda: F.linear(x, weight, bias))
        channels = kernel.k // 9
        x = random(layer.images, channels, window.height, window.width).contiguous(memory_format=torch.channels_last)
        weight = random(kernel.n, channels, 3, 3).contiguous(memory_format=torch.channels_last)
        return microseconds(driver, lambda: F.conv2d(x, weight, bias, window.stride, 1))


def _sizes(kernel: Kernel, layer: Layer) -> dict[str, int]:
    """Bytes of each array that a kernel takes, or more, in the order of its arguments; tables have one row."""
    rows = layer.rows
    own = {"scale": rows * 4, "zero": rows * 4}
    if isinstance(kernel, Quantize):
        pitch, rank = -(-kernel.k // 32) * 32, max(kernel.rank, 1)
        own |= {"x": rows * kernel.k * 2, "out": rows * pitch * 2, "down": pitch * rank * 2, "low": rows * rank * 2}
    else:
        window, end = kernel.window, kernel.epilogue
        pixels = rows if window is None else layer.images * (window.height + 2) * (window.width + 2)
        inputs = kernel.k if window is None else kernel.k // 9
        columns, padded_k, rank = kernel.padded_n * 4, -(-kernel.k // 64) * 64, max(end.rank, 1)
        groups = 1 if kernel.group is None else -(-kernel.k // kernel.group)
        own |= {"a": pixels * inputs * kernel.a_bits // 8, "weight": kernel.padded_n * padded_k // 2}
        own |= {"weight_sum": groups * columns, "weight_scale": groups * columns, "bias": columns}
        own |= {"residual": rows * kernel.n * 2, "low": rows * rank * 2, "up": kernel.padded_n * rank * 2}
        own["out"] = rows * -(-kernel.n // 32) * 32 * (4 if end.out == "s32" else 2)
    own |= dict.fromkeys(("step", "inverse", "out_inverse", "out_zero"), 4)
    return {name: own[name] for name in kernel.arguments[:-1]}


def _random(size: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    some = np.random.default_rng(0).integers(0, 256, min(size, 2**20), np.uint8)
    return np.resize(some, size)
