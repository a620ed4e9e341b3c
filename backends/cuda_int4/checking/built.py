"""Kernels built for a device and loaded into it, as many at once as there are cores."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from tfqc.backends.cuda_int4.runtime.images import fitting, images, target_for
from tfqc.backends.cuda_int4.runtime.libcuda import Device, Function
from tfqc.backends.cuda_int4.runtime.specialise import Kernel, source
from tfqc.progress import Progress

_AT_ONCE = 8  # kernels in one text for the compiler


def functions(device: Device, kernels: Sequence[Kernel], what: str, progress: Progress) -> dict[str, Function]:
    """By name. Raises what `images` does, and `DriverError`."""
    target = target_for(device.arch)
    parts = [kernels[at : at + _AT_ONCE] for at in range(0, len(kernels), _AT_ONCE)]
    found: dict[str, Function] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = pool.map(lambda part: images(source(part), (target,)), parts)
        for part, image in zip(parts, progress.track(made, f"building {what}", len(parts)), strict=True):
            module = device.driver.module(fitting(image, device.arch))
            found |= {kernel.name: module.function(kernel.name, kernel.shared_bytes) for kernel in part}
    return found
