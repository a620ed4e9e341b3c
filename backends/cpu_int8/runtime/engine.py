"""The run time of a compiled model: recordings by the shapes of the inputs, and their execution."""

from __future__ import annotations

import ctypes
import os
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tfqc.backends.cpu_int8.runtime import abi
from tfqc.backends.cpu_int8.runtime.arena import place
from tfqc.backends.cpu_int8.runtime.build import BuildError, best_isa, build_best, runs_here, why_not
from tfqc.backends.cpu_int8.runtime.draft import Line
from tfqc.backends.cpu_int8.runtime.eager import Eager
from tfqc.backends.cpu_int8.runtime.memory import load_aligned, room
from tfqc.backends.cpu_int8.runtime.recorder import Recorder
from tfqc.backends.cpu_int8.runtime.tiles import Tiles
from tfqc.runtime import Plan, Stepper


class Engine(Stepper):
    """A compiled model, called like the one that was captured.

    kernels: the text of kernels.cpp. memory: value -> (buffer, first, last). tiles: tensor of packed weights ->
    (shape, groups, paired, bits). isa: `auto`, or one of `build.ISAS`. Without a compiler, or on another CPU, it
    computes with torch, and says so.
    """

    MAX_RECORDINGS = 64  # one lock holds the model, so they share one arena, and a recording more costs little

    lines: Callable[..., Any]
    """The model's step: `lines(k, w, t, **inputs)` with kernels k, tensors w, packed weights t."""

    def __init__(
        self,
        directory: Path,
        kernels: str,
        plan: Plan,
        memory: Mapping[str, tuple[int, int, int]],
        tiles: Mapping[str, tuple[tuple[int, ...], int, bool, int]],
        isa: str,
    ) -> None:
        super().__init__(plan)
        self.directory, self.memory = directory, memory
        self._tensors = load_aligned(directory / "weights.safetensors")
        taken = self._tensors.pop
        self._tiles = {name: Tiles.of(taken(name), taken(f"{name}.sums"), *its) for name, its in tiles.items()}
        self._recordings: dict[Any, Recording] = {}
        self._rooms: dict[str, Tensor] = {}
        self._arena = torch.empty(0, dtype=torch.uint8, device="cpu")
        self.isa, self._library = _kernels(kernels, isa)

    def get_tensor(self, name: str) -> Tensor:
        """A tensor of the program; those of the time function are read when it is first called."""
        if name not in self._tensors:
            self._tensors |= load_file(self.directory / "time.safetensors")
        return self._tensors[name]

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Every tensor of the artifact by its name in the program; packed weights as they are packed."""
        packed = {name: part for k, t in self._tiles.items() for name, part in ((k, t.packed), (f"{k}.sums", t.sums))}
        return {**self._tensors, **packed}

    def move(self, device: torch.device) -> None:
        """Kernels are for CPUs alone."""
        if device.type != "cpu":
            raise ValueError(f"This model is compiled for CPUs and does not go to {device}: compile it for cuda-int4.")

    def set_tensor(self, name: str, value: Tensor) -> None:
        """Replace a table. Schedules point into the old one, so it gets spare rows, and they stay for as long as these
        last."""
        room = self._rooms.get(name)
        if room is None or len(room) < len(value):
            room = self._rooms[name] = value.new_empty(_with_spare(len(value)), *value.shape[1:])
            self._recordings.clear()
        self._tensors[name] = room[: len(value)].copy_(value)

    def step(self, /, **values: Any) -> Any:
        """One timestep."""
        if self._library is None:
            return self.watched_step(**values)
        with torch.no_grad():
            return self.recording(values).run(values)

    def watched_step(self, /, **values: Any) -> Any:
        """With torch instead of kernels."""
        return self.lines(Eager(), self.get_tensor, self._tiles.__getitem__, **values)

    def recording(self, values: Mapping[str, Tensor]) -> Recording:
        """The recording for inputs of these shapes; made on their first call."""
        assert self._library is not None
        shapes = ((k, self._shape(k, v), v.dtype) for k, v in sorted(values.items()))
        key = (torch.get_num_threads(), *shapes)
        found = self._recordings.pop(key, None)
        if found is None or found.capacity < len(self._known):
            found = self._recorded(values)
        self._recordings[key] = found  # the last used is the last
        if len(self._recordings) > self.MAX_RECORDINGS:
            del self._recordings[next(iter(self._recordings))]
        return found

    def _shape(self, name: str, value: Tensor) -> torch.Size:
        """Of the memory for an input: tables of a request get spare rows, as more timesteps may come."""
        if name in self.plan.request_tables:
            return torch.Size((_with_spare(len(value)), *value.shape[1:]))
        return value.shape

    def _recorded(self, values: Mapping[str, Tensor]) -> Recording:
        try:
            return self._record(values)
        except (ValueError, MemoryError):
            raise
        except Exception as error:  # the compiler writes no such step: a damaged or forged artifact has it
            what = next(iter(str(error).splitlines()), "")
            raise ValueError(f"The artifact's step cannot be laid out: {type(error).__name__}: {what}") from error

    def _record(self, values: Mapping[str, Tensor]) -> Recording:
        rows = len(self._known)
        nowhere = Recorder(self.memory, rows=rows)
        with _fake_mode() as mode:
            shapes = {k: mode.from_tensor(v.new_empty(self._shape(k, v))) for k, v in values.items()}
            self.lines(nowhere, self.get_tensor, self._tiles.__getitem__, **shapes)
        offsets, size = place(nowhere.sizes, nowhere.spans)
        inputs = {k: v.new_zeros(self._shape(k, v)) for k, v in values.items()}
        if self._arena.numel() < size:
            self._arena = room(size)
        spare = {room.data_ptr(): len(room) for room in self._rooms.values()}
        recorder = Recorder(self.memory, self._arena[:size], offsets, rows=rows, spare=spare)
        outputs = self.lines(recorder, self.get_tensor, self._tiles.__getitem__, **inputs)
        fixed = {*self.plan.hoisted, *self.plan.request_tables}
        row = inputs[self.plan.row] if self.plan.row else None
        return Recording(self._library, recorder, inputs, outputs, fixed, row, self.plan)


class Recording:
    """Commands for kernels, and calls of torch between them."""

    def __init__(
        self, library: Any, recorder: Recorder, inputs: dict[str, Tensor], outputs: Any, fixed: set[str],
        rows: Tensor | None, plan: Plan,
    ) -> None:  # fmt: skip
        self.inputs, self.outputs, self.lines = inputs, outputs, recorder.lines
        self.arena_bytes = 0 if recorder.arena is None else recorder.arena.numel()
        self.reorders, self.capacity = recorder.reorders, recorder.capacity
        self._kept = (recorder.kept, recorder.arena)
        self._given: dict[str, Tensor] = {}
        self._fixed, self._row_input = fixed, rows
        self._rows = torch.zeros(inputs[plan.sample.name].shape[0], dtype=torch.int64, device="cpu")
        self._threads = torch.get_num_threads()
        self._scratch_size = -(-recorder.scratch // 64) * 64
        self._scratch = room(self._threads * self._scratch_size)
        self._shared_size = recorder.shared
        self._shared = torch.empty(self._shared_size + 64, dtype=torch.uint8, device="cpu")
        self._library = library
        self._segments = list(self._group(recorder.lines))

    def _group(self, lines: list[Line]) -> Any:
        batch: list[Line] = []
        for line in [*lines, None]:
            if line is not None and line.args is not None:
                batch.append(line)
                continue
            if batch:
                yield self._commands(batch)
                batch = []
            if line is not None:
                yield line.call

    def _commands(self, lines: list[Line]) -> Callable[[], None]:
        commands = (abi.Command * len(lines))()
        for command, line in zip(commands, lines, strict=True):
            command.run = ctypes.cast(self._library[f"tfqc_{line.kernel}"], ctypes.c_void_p).value
            command.args = ctypes.addressof(line.args)  # type: ignore[arg-type]
        pointer, count = ctypes.byref(commands), ctypes.c_int64(len(lines))
        rows, threads = ctypes.c_void_p(self._rows.data_ptr()), ctypes.c_int32(self._threads)
        scratch, scratch_size = ctypes.c_void_p(_aligned(self._scratch)), ctypes.c_int64(self._scratch_size)
        shared, shared_size = ctypes.c_void_p(_aligned(self._shared)), ctypes.c_int64(self._shared_size)
        run = self._library.tfqc_run
        return lambda: run(pointer, count, rows, threads, scratch, scratch_size, shared, shared_size)

    def run(self, values: Mapping[str, Tensor]) -> Any:
        """The outputs for inputs of the shapes that this was recorded for."""
        self._take(values)
        for segment in self._segments:
            segment()
        if isinstance(self.outputs, Tensor):
            return self.outputs.clone()
        return tuple(t.clone() for t in self.outputs)

    def _take(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            if name in self._fixed and self._given.get(name) is value:
                continue
            room = self.inputs[name]
            (room[: len(value)] if room.shape != value.shape else room).copy_(value)
            self._given[name] = value
        if self._row_input is not None:
            self._rows.copy_(self._row_input.expand_as(self._rows))

    def profile(self, values: Mapping[str, Tensor], rounds: int = 5) -> list[tuple[Line, float]]:
        """Each line and its time in seconds, the median of several rounds."""
        self._take(values)
        steps = [(line, line.call or self._commands([line])) for line in self.lines]
        times: list[list[float]] = [[] for _ in steps]
        for _ in range(rounds):
            for taken, (_, step) in zip(times, steps, strict=True):
                began = time.perf_counter()
                step()
                taken.append(time.perf_counter() - began)
        return [(line, sorted(taken)[len(taken) // 2]) for (line, _), taken in zip(steps, times, strict=True)]


def _fake_mode() -> FakeTensorMode:
    """torch imports its tracer for the first; Ctrl-C in the middle of that would leave it half imported for ever, and
    goes to the main thread alone."""
    made: list[FakeTensorMode] = []
    thread = threading.Thread(target=lambda: made.append(FakeTensorMode(allow_non_fake_inputs=True)))
    thread.start()
    thread.join()
    return made[0]


def _with_spare(rows: int) -> int:
    """Rows that memory is taken for: a power of two."""
    return 1 << (rows - 1).bit_length()


def _aligned(memory: Tensor) -> int:
    return -(-memory.data_ptr() // 64) * 64


def _kernels(source: str, isa: str) -> tuple[str, Any]:
    """The instruction set that is used, and the built kernels; ("torch", None) where there can be none."""
    wanted = os.environ.get("TFQC_ISA") or isa
    chosen = best_isa() if wanted == "auto" else wanted
    try:
        if chosen is None or not runs_here(chosen):
            raise BuildError(why_not(wanted))
        return build_best(source, chosen)
    except BuildError as error:
        warnings.warn(f"{error} The model runs with torch instead, slowly.", stacklevel=3)
        return "torch", None
