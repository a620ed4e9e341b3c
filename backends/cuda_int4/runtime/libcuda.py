"""NVIDIA's driver through ctypes: devices, modules, launches, memory and events; of libcuda alone, no toolkit.

A device's primary context is used, which is torch's too: pointers and streams of the one are those of the other. A
context belongs to a thread: `Device.use` makes it that of the calling one. Nothing here knows a kernel.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Sequence
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_size_t, c_uint, c_uint64, c_void_p
from dataclasses import dataclass
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from tfqc.errors import TfqcError

Array = NDArray[Any]

_FUNCTIONS: dict[str, tuple[type[Any], ...]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDeviceTotalMem_v2": (POINTER(c_size_t), c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuCtxSetCurrent": (c_void_p,),
    "cuCtxSynchronize": (),
    "cuModuleLoadData": (POINTER(c_void_p), c_char_p),
    "cuModuleGetFunction": (POINTER(c_void_p), c_void_p, c_char_p),
    "cuFuncSetAttribute": (c_void_p, c_int, c_int),
    "cuLaunchKernel": (c_void_p, *[c_uint] * 7, c_void_p, c_void_p, c_void_p),
    "cuMemAlloc_v2": (POINTER(c_uint64), c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuMemcpyHtoD_v2": (c_uint64, c_void_p, c_size_t),
    "cuMemcpyDtoH_v2": (c_void_p, c_uint64, c_size_t),
    "cuMemsetD8_v2": (c_uint64, ctypes.c_ubyte, c_size_t),
    "cuEventCreate": (POINTER(c_void_p), c_uint),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventSynchronize": (c_void_p,),
    "cuEventElapsedTime": (POINTER(c_float), c_void_p, c_void_p),
}
_NO_DEVICE = 100
_CLOCK, _MULTIPROCESSORS, _MAJOR, _MINOR = 13, 16, 75, 76  # of CUdevice_attribute
_MAX_DYNAMIC_SHARED = 8  # of CUfunction_attribute
_BUFFER, _BUFFER_SIZE, _END = 1, 2, 0  # of cuLaunchKernel's last argument
_OWN_ARCH = {(9, 0): "sm_90a", (12, 0): "sm_120a"}  # chips with instructions that no later one has


class DriverError(TfqcError):
    """The driver refuses: what was being done, and what it says."""


class NoDriverError(DriverError):
    """There is no driver, or no device."""


class Driver:
    """libcuda, initialized. Whatever fails raises a `DriverError`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._functions: dict[str, Any] = {}
        for name, types in _FUNCTIONS.items():
            try:
                self._functions[name] = library[name]
            except AttributeError as error:
                raise DriverError(f"NVIDIA's driver is too old: it has no {name}.") from error
            self._functions[name].argtypes = types

    @classmethod
    def load(cls) -> Driver:
        """The driver of this machine, or the library that TFQC_LIBCUDA names.

        Raises:
            NoDriverError: there is none, or it finds no device.
        """
        name = os.environ.get("TFQC_LIBCUDA", "libcuda.so.1")
        try:
            library = ctypes.CDLL(name)
        except OSError as error:
            raise NoDriverError("There is no NVIDIA driver on this machine, so no GPU.", str(error)) from error
        driver = cls(library)
        status = driver.function("cuInit")(0)
        if status == _NO_DEVICE or (status == 0 and driver.devices() == 0):
            raise NoDriverError("There is an NVIDIA driver on this machine, but it finds no GPU.")
        driver.check(status, "starting the driver")
        return driver

    def function(self, name: str) -> Any:
        """An entry point; `check` wants what it returns."""
        return self._functions[name]

    def call(self, doing: str, name: str, *arguments: Any) -> None:
        """Call an entry point, and raise what it says."""
        self.check(self._functions[name](*arguments), doing)

    def check(self, status: int, doing: str) -> None:
        """Raise what an entry point has returned, if it is an error."""
        if status:
            code, meaning = (self._text(f"cuGetError{what}", status) for what in ("Name", "String"))
            raise DriverError(f"CUDA fails while {doing}: {code} ({meaning}).")

    def _text(self, name: str, status: int) -> str:
        text = c_char_p()
        self._functions[name](status, byref(text))
        return text.value.decode() if text.value else f"error {status}"

    def version(self) -> str:
        """The newest CUDA that this driver knows."""
        number = c_int()
        self.call("asking for the driver's version", "cuDriverGetVersion", byref(number))
        return f"{number.value // 1000}.{number.value % 1000 // 10}"

    def devices(self) -> int:
        """How many there are."""
        count = c_int()
        self.call("counting GPUs", "cuDeviceGetCount", byref(count))
        return count.value

    def device(self, index: int = 0) -> Device:
        """A device, with its context that of the calling thread."""
        doing, handle, context = f"opening GPU {index}", c_int(), c_void_p()
        name, memory = ctypes.create_string_buffer(256), c_size_t()
        self.call(doing, "cuDeviceGet", byref(handle), index)
        self.call(doing, "cuDeviceGetName", name, len(name), handle)
        self.call(doing, "cuDeviceTotalMem_v2", byref(memory), handle)
        self.call(doing, "cuDevicePrimaryCtxRetain", byref(context), handle)

        def attribute(which: int) -> int:
            value = c_int()
            self.call(doing, "cuDeviceGetAttribute", byref(value), which, handle)
            return value.value

        major, minor = attribute(_MAJOR), attribute(_MINOR)
        device = Device(
            driver=self,
            index=index,
            name=name.value.decode(),
            arch=_OWN_ARCH.get((major, minor), f"sm_{major}{minor}"),
            multiprocessors=attribute(_MULTIPROCESSORS),
            memory=memory.value,
            ghz=attribute(_CLOCK) / 1e6,
            context=context.value or 0,
        )
        device.use()
        return device

    def module(self, image: bytes) -> Module:
        """The kernels of a cubin, of a fat binary, or of PTX, which the driver then compiles."""
        handle = c_void_p()
        self.call("loading kernels", "cuModuleLoadData", byref(handle), image)
        return Module(self, handle)

    def allocate(self, size: int) -> Memory:
        """`size` bytes on the device."""
        pointer = c_uint64()
        self.call(f"allocating {size} bytes", "cuMemAlloc_v2", byref(pointer), size)
        return Memory(self, pointer.value, size)

    def event(self) -> Event:
        """A point in a stream's work whose time is taken."""
        handle = c_void_p()
        self.call("making an event", "cuEventCreate", byref(handle), 0)
        return Event(self, handle)

    def synchronize(self) -> None:
        """Wait for everything that was started. What kernels did wrong is an error here, if nowhere before."""
        self.call("waiting for kernels", "cuCtxSynchronize")


@dataclass(frozen=True)
class Device:
    """A GPU. arch: as compilers have it, such as sm_86; memory: bytes; ghz: of multiprocessors, at most."""

    driver: Driver
    index: int
    name: str
    arch: str
    multiprocessors: int
    memory: int
    ghz: float
    context: int

    def use(self) -> None:
        """Make its context that of the calling thread."""
        self.driver.call(f"taking {self.name} into use", "cuCtxSetCurrent", self.context)


@dataclass(frozen=True)
class Module:
    """Kernels on a device, as long as the process lives."""

    driver: Driver
    handle: c_void_p

    def function(self, name: str, shared_bytes: int = 0) -> Function:
        """A kernel, whose blocks get so much shared memory when it is launched."""
        handle = c_void_p()
        self.driver.call(f"looking for kernel {name}", "cuModuleGetFunction", byref(handle), self.handle, name.encode())
        doing = f"giving kernel {name} {shared_bytes} bytes of shared memory"
        self.driver.call(doing, "cuFuncSetAttribute", handle, _MAX_DYNAMIC_SHARED, shared_bytes)
        return Function(self.driver, name, handle, shared_bytes)


@dataclass(frozen=True)
class Function:
    """A kernel that takes pointers and then a count of 32 bits, as those of `specialise` do."""

    driver: Driver
    name: str
    handle: c_void_p
    shared_bytes: int

    def launch(
        self, grid: tuple[int, int, int], threads: int, arguments: Sequence[SupportsIndex], stream: int = 0
    ) -> None:
        """Start it once; see `prepared`."""
        self.prepared(grid, threads, arguments)(stream)

    def prepared(self, grid: tuple[int, int, int], threads: int, arguments: Sequence[SupportsIndex]) -> Launch:
        """Ready to be started often. `arguments` are in the kernel's order: pointers, 0 for null, and the count."""
        return Launch(self, grid, threads, arguments)


class Launch:
    """A kernel with all that it is given: starting it is one call into the driver, and any thread may."""

    def __init__(
        self, function: Function, grid: tuple[int, int, int], threads: int, arguments: Sequence[SupportsIndex]
    ) -> None:
        packed = struct.pack(f"{len(arguments) - 1}Qi", *arguments)
        self._name, self._driver = function.name, function.driver
        self._launch = function.driver.function("cuLaunchKernel")
        self._buffer = ctypes.create_string_buffer(packed, len(packed))
        self._size = c_size_t(len(packed))
        self._head = (function.handle, *map(c_uint, (*grid, threads, 1, 1, function.shared_bytes)))
        self._extra = (c_void_p * 5)(
            _BUFFER, ctypes.addressof(self._buffer), _BUFFER_SIZE, ctypes.addressof(self._size), _END
        )

    def __call__(self, stream: int = 0) -> None:
        """Start it on a stream; 0 is the default one."""
        status = self._launch(*self._head, stream, None, self._extra)
        if status:
            self._driver.check(status, f"launching kernel {self._name}")


@dataclass(frozen=True)
class Memory:
    """Bytes on a device, until they are freed."""

    driver: Driver
    pointer: int
    size: int

    def write(self, array: Array) -> None:
        """Copy an array to its beginning."""
        array = np.ascontiguousarray(array)
        self._holds(array.nbytes)
        self.driver.call("copying to the GPU", "cuMemcpyHtoD_v2", self.pointer, array.ctypes.data, array.nbytes)

    def read(self, like: Array) -> Array:
        """A new array of the shape and dtype of `like`, from its beginning; kernels before it have then ended."""
        array = np.empty(like.shape, like.dtype)
        self._holds(array.nbytes)
        self.driver.call("copying from the GPU", "cuMemcpyDtoH_v2", array.ctypes.data, self.pointer, array.nbytes)
        return array

    def fill(self, byte: int) -> None:
        """Set every byte."""
        self.driver.call("filling memory", "cuMemsetD8_v2", self.pointer, byte, self.size)

    def free(self) -> None:
        """Give it back. After a kernel's fault the driver refuses everything; that is no news by then."""
        self.driver.function("cuMemFree_v2")(self.pointer)

    def _holds(self, size: int) -> None:
        if size > self.size:
            raise DriverError(f"{size} bytes do not fit into {self.size} of the GPU's memory.")


@dataclass(frozen=True)
class Event:
    """A point in a stream's work, as long as the process lives."""

    driver: Driver
    handle: c_void_p

    def record(self, stream: int = 0) -> None:
        """Its time is when the stream's work so far is done."""
        self.driver.call("recording an event", "cuEventRecord", self.handle, stream)

    def since(self, earlier: Event) -> float:
        """Milliseconds from an earlier one; waits for this one."""
        self.driver.call("waiting for an event", "cuEventSynchronize", self.handle)
        milliseconds = c_float()
        self.driver.call("reading events", "cuEventElapsedTime", byref(milliseconds), earlier.handle, self.handle)
        return milliseconds.value
