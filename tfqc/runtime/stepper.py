"""A model in up to three functions, called like the model that was captured."""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tfqc.runtime.call import Call
from tfqc.runtime.encoding import encode_row
from tfqc.runtime.groups import Given, groups_of, joined
from tfqc.runtime.origin import Origin
from tfqc.runtime.outputs import Output, put_together
from tfqc.runtime.plan import Plan, UnknownTimestepWarning, as_called, buffer_name
from tfqc.runtime.requests import Request, all_finite, broken_images
from tfqc.runtime.untraced import untraced
from tfqc.runtime.watching import first_not_finite

_ALIVE: weakref.WeakSet[Stepper] = weakref.WeakSet()


class Stepper(torch.nn.Module):
    """A compiled model: `step` for every timestep, `begin` once an image, `time` for timesteps without a row.

    Subclasses define `step`, and `time` and `begin` where the plan uses them; each takes the captured inputs (and,
    for `step`, the plan's parameters) by keyword. Several threads may call one model: they take turns.

    Attributes:
        check_finite: raise FloatingPointError at the first NaN or infinity, naming the layer and the step; each step is
            computed a second time for it, by torch. Without it, an image is NaN of whose inputs one is not finite.
    """

    MAX_EXTRA_ROWS = 1000
    MAX_REQUESTS = 4

    step: Callable[..., Any]
    time: Callable[..., Any] | None = None
    begin: Callable[..., Any] | None = None

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        _settle()
        self.plan = plan
        self.check_finite = False
        self.reload: Origin | None = None
        self._device = torch.device("cpu")
        self._calls = Call(plan)
        self._schedule = as_called(plan.timesteps, plan.time.dtype) if plan.time else []
        self._known: dict[float, int] = {t: i for i, t in enumerate(self._schedule)}
        self._called = False
        self._time_is_read = False
        self._original: dict[str, Tensor] = {}
        self._requests: list[Request] = []
        self._row_tensors: dict[tuple[int, torch.device], Tensor] = {}
        self._requested = [i.name for i in plan.inputs if i.role == "request"]
        self._sampled = [i.name for i in plan.inputs if i.role == "sample"]
        self._noisy, self._dtype = plan.sample.name, plan.sample.dtype
        self._clock = plan.time.name if plan.time else ""
        self._lock = threading.RLock()
        _ALIVE.add(self)

    # -- what a subclass may override -------------------------------------------------------------------------------

    def get_tensor(self, name: str) -> Tensor:
        """A table by its name in the program."""
        return self.get_buffer(buffer_name(name))

    def set_tensor(self, name: str, value: Tensor) -> None:
        """Replace a table, when it gets a row more."""
        setattr(self, buffer_name(name), value)

    def move(self, device: torch.device) -> None:
        """Follow to a device, or refuse it."""

    def watched_step(self, /, **values: Any) -> Any:
        """A step by operations of torch alone, which can be watched."""
        return self.step(**values)

    # -- one call ---------------------------------------------------------------------------------------------------

    @untraced
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The captured model's inputs in, its outputs out, in the dtype of the sample."""
        with self._lock:
            _settle()
            given = self._calls.read(args, kwargs)
            if (groups := groups_of(self.plan, given)) is None:
                return self._returned(self._bound(given))
            return self._returned(joined(self.plan, [self._bound(group) for group in groups], len(given[self._noisy])))

    def _bound(self, given: Mapping[str, Given]) -> Any:
        values, dtype = self._calls.bind(given)
        kind = values[self._noisy].device.type
        try:
            if not torch.is_autocast_enabled(kind) and not torch.is_inference_mode_enabled():
                return self._run(values, dtype)
            # It computes in what it was compiled for, and what it keeps has to serve calls of every mode.
            with torch.autocast(kind, enabled=False), torch.inference_mode(False), torch.no_grad():
                return self._run(values, dtype)
        except IndexError as error:
            raise ValueError(f"A whole number among the inputs is beyond what the model knows: {error}.") from error

    def _run(self, values: dict[str, Tensor], dtype: torch.dtype) -> Any:
        plan = self.plan
        with torch.no_grad():
            broken = self._broken(values)
            if plan.row or plan.label_rows:
                rows = self._rows(values)
                values |= {name: _with_label(rows, values[k], k, n) for name, (k, n) in plan.label_rows.items()}
                values |= {plan.row: rows} if plan.row else {}
            elif self._clock:
                self._timesteps(values)
            if self._requested:
                entry = self._request(values)
                values |= entry.hoisted | entry.tables
                broken = _either(broken, entry.broken)
        if self.check_finite:
            self._check_finite(values)
        result = self.step(**values)
        if isinstance(result, tuple):
            return tuple(self._finished(out, dtype, broken) for out in result)
        return self._finished(result, dtype, broken)

    def _returned(self, result: Any) -> Any:
        """What a step returns, as the captured model returns it."""
        if self.plan.outputs is not None:
            made = put_together(self.plan.outputs, result if isinstance(result, tuple) else (result,))
            return Output(made) if type(made) is tuple else made
        return Output(result) if isinstance(result, tuple) else result

    def _finished(self, out: Any, dtype: torch.dtype, broken: Tensor | None) -> Any:
        """An output as its caller wants it."""
        if not isinstance(out, Tensor) or not (out.is_floating_point() or out.is_complex()):
            return out
        if broken is not None:
            whole = out.shape[:1] != broken.shape
            mask = broken.any() if whole else broken.reshape(-1, *[1] * (out.dim() - 1))
            out = out.masked_fill(mask, float("nan"))
        return out if dtype == self._dtype or out.is_complex() else out.to(dtype)

    def _broken(self, values: Mapping[str, Tensor]) -> Tensor | None:
        noisy = values[self._noisy]
        if len(self._sampled) == 1 and noisy.device.type == "cpu" and all_finite(noisy):
            return None
        return broken_images({name: values[name] for name in self._sampled}, len(noisy))

    def _check_finite(self, values: Mapping[str, Tensor]) -> None:
        step = f"at timestep {float(values[self._clock][0]):g}" if self._clock else "in this call"
        for item in self.plan.inputs:
            found = broken_images({item.name: values[item.name]}, len(values[self._noisy]))
            if found is not None and bool(found.any()):
                raise FloatingPointError(f"The input {item.name!r} holds NaN or infinity {step}.")
        if where := first_not_finite(lambda: self.watched_step(**values)):
            raise FloatingPointError(f"The model computes NaN or infinity {step}; first {where}.")

    # -- rows -------------------------------------------------------------------------------------------------------

    def _rows(self, values: Mapping[str, Tensor]) -> Tensor:
        """Row of each batch entry's timestep: [1] where they are all equal, else [B]."""
        device, timesteps = values[self._clock].device, self._timesteps(values)
        unknown = {t for t in timesteps if t not in self._known}
        if not self._called:
            self._called = True
            if self.reload is not None and self.plan.policy != "error" and len(unknown) == len(set(timesteps)):
                self._warn(timesteps[0])
        if unknown and len(self._known) - len(self._schedule) + len(unknown) > self.MAX_EXTRA_ROWS:
            self._forget_extra_rows()  # before any row of this call is looked up
        if len(timesteps) > 1:
            return torch.tensor([self._row_of(t, values) for t in timesteps], device=device)
        key = (self._row_of(timesteps[0], values), device)
        found = self._row_tensors.get(key)
        if found is None:
            found = self._row_tensors[key] = torch.tensor([key[0]], device=device)
        return found

    def _timesteps(self, values: Mapping[str, Tensor]) -> list[float]:
        """One timestep if all are equal, else one for each batch entry."""
        given = values[self._clock]
        if given.stride(0) == 0:  # one for all images
            given = given[:1]
        timesteps: list[float] = given.to(torch.float32).tolist()
        for t in timesteps:
            if t - t != 0:
                where = next(i.path for i in self.plan.inputs if i.name == self._clock)
                raise ValueError(f"{'.'.join(where)} is {t}, which is no timestep.")
        return timesteps[:1] if len(set(timesteps)) == 1 else timesteps

    def _row_of(self, t: float, values: Mapping[str, Tensor]) -> int:
        if t in self._known:
            return self._known[t]
        if self.plan.policy == "error":
            raise ValueError(
                f"Timestep {t:g} is not in the schedule of {len(self._schedule)} steps that this model was "
                "compiled for, and its policy is 'error': compile it for this schedule, or with policy=recompute."
            )
        nearest = self._nearest(t)
        if self.plan.policy == "nearest":
            return nearest
        return self._add_row(t, nearest, values)

    def _nearest(self, t: float) -> int:
        return min(range(len(self._schedule)), key=lambda i: abs(self._schedule[i] - t))

    def _warn(self, t: float) -> None:
        """Calls of a model may be at times of another unit than its schedule, and look right."""
        schedule = self._schedule
        nearest = f"the nearest, {schedule[self._nearest(t)]:g}"
        does = "its rows are computed now" if self.plan.policy == "recompute" else f"it is computed as {nearest}"
        if self.plan.policy == "recompute" and self.plan.activations:
            does += f", with ranges of {nearest}"
        warnings.warn(
            f"The model was compiled for {len(schedule)} timesteps from {schedule[0]:g} to {schedule[-1]:g}, and is "
            f"first called at {t:g}: {does}. Compile it for the times that its pipeline calls it with.",
            UnknownTimestepWarning,
            stacklevel=2,
        )

    def _add_row(self, t: float, nearest: int, values: Mapping[str, Tensor]) -> int:
        """Compute the rows of an unknown timestep in full precision, once, and append them to every table."""
        calls: dict[str, tuple[Tensor, ...]] = {}  # what the time function gives, by the label that is enumerated
        added: dict[str, Tensor] = {}
        for table in self.plan.tables:
            if table.label not in calls:
                calls[table.label] = self._features(t, values, table.label, table.classes)
            rows = calls[table.label][table.output][: table.classes]
            if table.encoding == "fp":
                added[table.tensor] = rows
            else:
                parts = zip(*(encode_row(row[None], table.encoding) for row in rows), strict=True)
                for name, part in zip((table.tensor, table.scale, table.zero_point), parts, strict=True):
                    added[name] = torch.cat(part)
        for name in self.plan.activations:
            added[name] = self.get_tensor(name)[nearest : nearest + 1]
        for name, row in added.items():  # what an interrupted call appended before is written over
            tensor = self.get_tensor(name)[: len(self._known) * len(row)]
            self._original.setdefault(name, tensor)
            self.set_tensor(name, torch.cat([tensor, row.to(tensor.dtype)]))
        self._known[t] = len(self._known)
        return self._known[t]

    def _forget_extra_rows(self) -> None:
        for name, tensor in self._original.items():
            self.set_tensor(name, tensor.to(self.get_tensor(name).device))
        self._original.clear()
        self._known = {t: i for i, t in enumerate(self._schedule)}
        self._requests.clear()

    def _features(
        self, t: float, values: Mapping[str, Tensor], label: str = "", classes: int = 1
    ) -> tuple[Tensor, ...]:
        """Outputs of the time function at one timestep: for the whole batch, or for every value of a label input."""
        if self.time is None:
            raise RuntimeError("This model holds no time function: compile it with policy=recompute.")
        inputs = {i.name: values[i.name] for i in self.plan.inputs if i.role != "sample"}
        if label:
            everything = torch.arange(classes, dtype=inputs[label].dtype, device=inputs[label].device)
            for name in self.plan.per_image:  # the first image's stand in for the others: rows wait for the label alone
                inputs[name] = inputs[name][:1].expand(classes, *inputs[name].shape[1:])
            inputs[label] = everything
        time = self._clock
        size = (classes,) if label else inputs[time].shape
        inputs[time] = inputs[time].new_full(size, t, dtype=_time_dtype(inputs[time], t))
        if self.reload is not None and not self._time_is_read:  # its weights are read by its first call
            self.reload.check()
        found = self.time(**inputs)
        self._time_is_read = True
        return found

    # -- requests ---------------------------------------------------------------------------------------------------

    def _request(self, values: Mapping[str, Tensor]) -> Request:
        request = {name: values[name] for name in self._requested}
        batch = len(values[self._noisy])
        entry = next((e for e in self._requests if e.serves(request, batch)), None)
        if entry is None:
            entry = Request.of(request, batch)
            if self.plan.hoisted:
                assert self.begin is not None
                outputs = self.begin(**request)
                entry.hoisted = {name: outputs[i] for name, i in self.plan.hoisted.items()}
            self._requests = [entry, *self._requests[: self.MAX_REQUESTS - 1]]
        if self.plan.request_tables:
            done = len(next(iter(entry.tables.values()))) if entry.tables else 0
            missing = [self._features(t, values) for t in list(self._known)[done:]]
            if missing:
                rows = {k: torch.stack([f[i] for f in missing]) for k, i in self.plan.request_tables.items()}
                entry.tables = {k: torch.cat([entry.tables[k], new]) if done else new for k, new in rows.items()}
        return entry

    # -- as a module among others -----------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Stepper:
        """`.to(device)` moves the model; a change of dtype is refused, since what it computes in was compiled."""
        probe = fn(torch.empty(0))
        if probe.dtype != torch.float32:
            raise ValueError(
                f"A compiled model cannot be turned into {str(probe.dtype).removeprefix('torch.')}: its numbers are "
                "what they were compiled to. Call it with inputs of that dtype: its outputs have it then."
            )
        if probe.is_meta:
            raise ValueError("A compiled model without values is of no use: it does not go to the meta device.")
        with self._lock:
            self.move(probe.device)
            self._device = probe.device
            return super()._apply(fn, recurse)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: weights of a compiled model are tied to its ranges and tables."""
        raise RuntimeError("A compiled model takes no other weights: load the artifact that holds them.")

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.reload is None:
            raise TypeError("This model was not loaded from a directory, so it can be neither copied nor pickled.")
        return (again, (self.reload, str(self._device), self.check_finite))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        make, arguments = self.__reduce_ex__(2)
        return make(*arguments)

    def to_empty(self, **_: Any) -> Any:
        """Refused: nothing else has the numbers of a compiled model."""
        raise ValueError("A compiled model without values is of no use: it is not emptied.")


def again(origin: Origin, device: str, check_finite: bool) -> Any:
    """A model that was copied, pickled or sent to another process: loaded anew from its directory."""
    origin.check()
    model = origin.load(origin.directory)
    model.check_finite = check_finite
    return model if device == "cpu" else model.to(device)


def _either(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return a if b is None else b
    return a | b


def _with_label(rows: Tensor, labels: Tensor, name: str, classes: int) -> Tensor:
    """Row of each batch entry in a table that has a row for each label at each timestep."""
    if strange := [k for k in labels.tolist() if not 0 <= k < classes]:
        raise ValueError(f"{name} holds {strange[0]}, but the model was captured for the labels 0 to {classes - 1}.")
    return rows * classes + labels


def _time_dtype(like: Tensor, t: float) -> torch.dtype:
    return like.dtype if like.is_floating_point() or t == int(t) else torch.float32


_FORKED: list[int] = []  # processes that were forked and have not settled


def _settle() -> None:
    """One thread, as in torch's loaders, where a process was forked: OpenMP's others are not there to be waited for."""
    if _FORKED:
        torch.set_num_threads(1)
        _FORKED.clear()


def _in_a_fork() -> None:
    _FORKED.append(os.getpid())
    for model in list(_ALIVE):
        model._lock = threading.RLock()  # its owner is no thread of this process


os.register_at_fork(after_in_child=_in_a_fork)
