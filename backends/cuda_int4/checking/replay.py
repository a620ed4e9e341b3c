"""The stored vectors on a device."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from tfqc.backends.cuda_int4.checking import vectors
from tfqc.backends.cuda_int4.checking.built import functions
from tfqc.backends.cuda_int4.checking.vectors import Array, Vector
from tfqc.backends.cuda_int4.runtime.libcuda import Device, DriverError, Function
from tfqc.progress import Progress


def replay(device: Device, progress: Progress) -> list[dict[str, Any]]:
    """How far each is off: its kernel, `Difference`, and `Tolerance`.

    Raises:
        DriverError: a kernel fails; its name is in the notes.
    """
    every = vectors.load()
    made = functions(device, [vector.kernel for vector in every], "the kernels of the vectors", progress)
    found: list[dict[str, Any]] = []
    for vector in progress.track(every, "replaying stored vectors"):
        difference = vector.difference(_run(made[vector.kernel.name], vector))
        found.append({"kernel": vector.kernel.name, **asdict(difference), **asdict(vector.tolerance)})
    return found


def _run(function: Function, vector: Vector) -> dict[str, Array]:
    """What a kernel writes."""
    driver, kernel = function.driver, vector.kernel
    with ExitStack() as stack:
        memory = {name: driver.allocate(array.nbytes) for name, array in (vector.inputs | vector.outputs).items()}
        for each in memory.values():
            stack.callback(each.free)
        for name, array in vector.inputs.items():
            memory[name].write(array)
        for name in vector.outputs:
            memory[name].fill(77)
        pointers = [memory[name].pointer if name in memory else 0 for name in kernel.arguments[:-1]]
        try:
            function.launch(kernel.grid(vector.rows), kernel.threads, [*pointers, vector.rows])
            driver.synchronize()
        except DriverError as error:
            error.add_note(f"The kernel was {kernel.name}.")
            raise
        return {name: memory[name].read(array) for name, array in vector.outputs.items()}
