"""The kernels of a program on one CUDA device, launched on the memory and the streams of torch."""

from __future__ import annotations

import torch

from tfqc.backends.cuda_int4.driver import Driver, Function
from tfqc.backends.cuda_int4.images import fitting, images, target_for
from tfqc.backends.cuda_int4.reference import Given
from tfqc.backends.cuda_int4.specialise import Kernel


class Loaded:
    """Kernels built for a device, unless that was done before.

    Raises:
        TfqcError: there is no compiler, or the kernels do not run on the device.
    """

    def __init__(self, source: str, index: int) -> None:
        torch.cuda.current_stream(index)  # torch's context of the device is the one that is used
        driver = Driver.load()
        self._device, self._index = driver.device(index), index
        target = target_for(self._device.arch)
        self._module = driver.module(fitting(images(source, (target,)), self._device.arch))
        self._functions: dict[str, Function] = {}

    def launch(self, kernel: Kernel, rows: int, given: Given) -> None:
        """Start a kernel on torch's stream; `given` are its arguments by name, but for the number of rows."""
        function = self._functions.get(kernel.name)
        if function is None:
            self._device.use()
            function = self._functions[kernel.name] = self._module.function(kernel.name, kernel.shared_bytes)
        tensors = (given[name] for name in kernel.arguments[:-1])
        pointers = (0 if tensor is None else tensor.data_ptr() for tensor in tensors)
        stream = torch.cuda.current_stream(self._index).cuda_stream
        function.launch(kernel.grid(rows), kernel.threads, (*pointers, rows), stream)
