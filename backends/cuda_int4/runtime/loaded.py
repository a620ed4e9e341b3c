"""The kernels of a program on one CUDA device, launched on the memory and the streams of torch."""

from __future__ import annotations

import warnings

import torch

from tfqc.backends.cuda_int4.runtime.images import images, target_for
from tfqc.backends.cuda_int4.runtime.libcuda import Driver, Function
from tfqc.backends.cuda_int4.runtime.reference import Given
from tfqc.backends.cuda_int4.runtime.specialise import Gemm, Kernel, body_for


class Loaded:
    """Kernels built for a device, unless that was done before.

    Raises:
        TfqcError: there is no compiler, or the kernels do not run on the device.
    """

    def __init__(self, source: str, index: int) -> None:
        torch.cuda.current_stream(index)  # torch's context of the device is the one that is used
        driver = Driver.load()
        self._device, self._index = driver.device(index), index
        arch = self._device.arch
        target_for(arch)  # refuses what is too old; the compiler is here, so what comes later gets its own code
        self._module = driver.module(images(source, (arch,))[arch])
        self._functions: dict[str, Function] = {}

    def launch(self, kernel: Kernel, rows: int, given: Given) -> None:
        """Start a kernel on torch's stream; `given` are its arguments by name, but for the number of rows."""
        function = self._functions.get(kernel.name)
        if function is None:
            if isinstance(kernel, Gemm) and kernel.body == "s4" and body_for(self._device.arch, kernel.mode) != "s4":
                _warn_of_emulation(self._device.arch)
            self._device.use()
            function = self._functions[kernel.name] = self._module.function(kernel.name, kernel.shared_bytes)
        tensors = (given[name] for name in kernel.arguments[:-1])
        pointers = (0 if tensor is None else tensor.data_ptr() for tensor in tensors)
        stream = torch.cuda.current_stream(self._index).cuda_stream
        function.launch(kernel.grid(rows), kernel.threads, (*pointers, rows), stream)


def _warn_of_emulation(arch: str) -> None:
    message = f"These kernels are for chips with 4-bit products, which {arch} emulates, slowly: compile for arch=fat."
    warnings.warn(message, stacklevel=2)
