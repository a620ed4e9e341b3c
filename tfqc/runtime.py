"""The run time of a folded model: which row of the schedule a timestep is, and what is computed once per image.

It needs torch alone. The interpreter uses it, and emitters copy it into the `model.py` that they write.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Table:
    """A tensor of rows over the schedule, made from one output of the time function."""

    tensor: str
    output: int
    encoding: str = "fp"
    scale: str = ""
    zero_point: str = ""


@dataclass(frozen=True)
class Plan:
    """How a call of the model becomes calls of its functions.

    `inputs` are (name, role, path in the call); `positional` the names of the model's positional arguments;
    `time_dtype_is_float` whether the model was captured with floating point timesteps. The dictionaries map
    parameters of the step function to outputs of `begin` and of `time`.
    """

    inputs: tuple[tuple[str, str, tuple[str, ...]], ...]
    positional: tuple[str, ...]
    time_is_float: bool = False
    timesteps: tuple[float, ...] = ()
    policy: str = "recompute"
    row: str = ""
    tables: tuple[Table, ...] = ()
    activations: tuple[str, ...] = ()
    hoisted: Mapping[str, int] = field(default_factory=dict)
    request_tables: Mapping[str, int] = field(default_factory=dict)


class Output(tuple[Any, ...]):
    """The model's outputs as a tuple; `.sample` is the first, as in the outputs of diffusers."""

    @property
    def sample(self) -> Any:
        """The first output."""
        return self[0]


@dataclass
class _Request:
    """What was computed for one set of request inputs; holding the inputs keeps their identities from being reused."""

    inputs: dict[str, Tensor]
    versions: tuple[int, ...]
    copies: dict[str, Tensor]
    hoisted: dict[str, Tensor]
    tables: dict[str, Tensor]

    def serves(self, inputs: Mapping[str, Tensor]) -> bool:
        """True if the inputs are the same tensors, unchanged. Inference tensors have no version: compare values."""
        if any(self.inputs[k] is not v for k, v in inputs.items()) or self.versions != _versions(inputs):
            return False
        return all(torch.equal(copied, inputs[k]) for k, copied in self.copies.items())


def _versions(inputs: Mapping[str, Tensor]) -> tuple[int, ...]:
    return tuple(-1 if t.is_inference() else t._version for t in inputs.values())


class Stepper(torch.nn.Module):
    """A model in up to three functions, called like the model that was captured.

    Subclasses define `step`, and `time` and `begin` where the plan uses them; each takes the captured inputs (and,
    for `step`, the plan's parameters) by keyword. Not safe for use from several threads at once.
    """

    MAX_EXTRA_ROWS = 1000
    MAX_REQUESTS = 4

    step: Callable[..., Any]
    time: Callable[..., Any] | None = None
    begin: Callable[..., Any] | None = None

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self._known = {t: i for i, t in enumerate(plan.timesteps)}
        self._original: dict[str, Tensor] = {}
        self._requests: list[_Request] = []
        self._row_tensors: dict[tuple[int, ...], Tensor] = {}

    # -- what a subclass may override -------------------------------------------------------------------------------

    def get_tensor(self, name: str) -> Tensor:
        """A table by its name in the program."""
        return self.get_buffer(buffer_name(name))

    def set_tensor(self, name: str, value: Tensor) -> None:
        """Replace a table, when it gets a row more."""
        setattr(self, buffer_name(name), value)

    # -- one call ---------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The captured model's inputs in, its outputs out."""
        values = self.bind(args, kwargs)
        plan = self.plan
        request = {name: values[name] for name, role, _ in plan.inputs if role == "request"}
        steps = [(name, values[name]) for name, role, _ in plan.inputs if role == "time"]
        if plan.row:
            rows = tuple(self._row_of(float(t), values) for t in _distinct(steps[0][1]))
            if rows not in self._row_tensors:
                self._row_tensors[rows] = torch.tensor(rows, device=steps[0][1].device)
            values[plan.row] = self._row_tensors[rows]
        if plan.hoisted or plan.request_tables:
            entry = self._request(request, values)
            values |= entry.hoisted | entry.tables
        result = self.step(**values)
        return Output(result) if isinstance(result, tuple) else result

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Name the tensors of a call; timesteps become one value for each batch entry.

        Raises:
            TypeError: an input is missing, or one is given that the captured model did not use.
        """
        call = dict(zip(self.plan.positional, args, strict=False)) | dict(kwargs)
        if len(args) > len(self.plan.positional):
            raise TypeError(f"The model takes {len(self.plan.positional)} positional arguments, {len(args)} given.")
        values: dict[str, Any] = {}
        for name, _, path in self.plan.inputs:
            value: Any = call
            for key in path:
                value = value.get(key) if isinstance(value, Mapping) else None
            if value is None:
                raise TypeError(f"The model needs the input {'.'.join(path)!r}.")
            values[name] = value
        used = {path[0] for _, _, path in self.plan.inputs} | {"return_dict"}
        if strange := [k for k, v in call.items() if k not in used and v is not None]:
            raise TypeError(f"The model was captured without {strange[0]!r}; it takes {sorted(used)}.")
        sample = next(values[name] for name, role, _ in self.plan.inputs if role == "sample")
        for name, role, _ in self.plan.inputs:
            if role == "time":
                values[name] = self._timesteps(values[name], sample)
        return values

    def _timesteps(self, t: Any, sample: Tensor) -> Tensor:
        t = torch.as_tensor(t, device=sample.device).reshape(-1)
        if self.plan.time_is_float and not t.is_floating_point():
            t = t.to(torch.float32)
        elif not self.plan.time_is_float and t.is_floating_point() and bool((t == t.round()).all()):
            t = t.to(torch.int64)
        return t.expand(sample.shape[0]) if t.shape[0] == 1 else t

    # -- rows -------------------------------------------------------------------------------------------------------

    def _row_of(self, t: float, values: Mapping[str, Tensor]) -> int:
        if t in self._known:
            return self._known[t]
        if self.plan.policy == "error":
            raise ValueError(
                f"Timestep {t:g} is not in the schedule of {len(self.plan.timesteps)} steps that this model was "
                "compiled for, and its policy is 'error': compile it for this schedule, or with policy=recompute."
            )
        nearest = min(range(len(self.plan.timesteps)), key=lambda i: abs(self.plan.timesteps[i] - t))
        if self.plan.policy == "nearest":
            return nearest
        return self._add_row(t, nearest, values)

    def _add_row(self, t: float, nearest: int, values: Mapping[str, Tensor]) -> int:
        """Compute the rows of an unknown timestep in full precision, once, and append them to every table."""
        if len(self._known) - len(self.plan.timesteps) >= self.MAX_EXTRA_ROWS:
            for name, tensor in self._original.items():
                self.set_tensor(name, tensor)
            self._known = {t: i for i, t in enumerate(self.plan.timesteps)}
            self._requests.clear()
        features = self._features(t, values) if self.plan.tables else ()
        for table in self.plan.tables:
            row = features[table.output][:1]
            if table.encoding == "fp":
                self._append(table.tensor, row)
            else:
                codes, scale, zero_point = encode_row(row, table.encoding)
                self._append(table.tensor, codes)
                self._append(table.scale, scale)
                self._append(table.zero_point, zero_point)
        for name in self.plan.activations:
            self._append(name, self.get_tensor(name)[nearest : nearest + 1])
        self._known[t] = len(self._known)
        return self._known[t]

    def _append(self, name: str, row: Tensor) -> None:
        tensor = self.get_tensor(name)
        self._original.setdefault(name, tensor)
        self.set_tensor(name, torch.cat([tensor, row.to(tensor.dtype)]))

    def _features(self, t: float, values: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Outputs of the time function at one timestep, for the whole batch."""
        if self.time is None:
            raise RuntimeError("This model holds no time function: compile it with policy=recompute.")
        inputs = {name: values[name] for name, role, _ in self.plan.inputs if role != "sample"}
        for name, role, _ in self.plan.inputs:
            if role == "time":
                inputs[name] = torch.full_like(values[name], t, dtype=_time_dtype(values[name], t))
        return self.time(**inputs)

    # -- requests ---------------------------------------------------------------------------------------------------

    def _request(self, request: dict[str, Tensor], values: Mapping[str, Tensor]) -> _Request:
        entry = next((e for e in self._requests if e.serves(request)), None)
        if entry is None:
            hoisted: dict[str, Tensor] = {}
            if self.plan.hoisted:
                assert self.begin is not None
                outputs = self.begin(**request)
                hoisted = {name: outputs[i] for name, i in self.plan.hoisted.items()}
            copies = {k: v.clone() for k, v in request.items() if v.is_inference()}
            entry = _Request(request, _versions(request), copies, hoisted, {})
            self._requests = [entry, *self._requests[: self.MAX_REQUESTS - 1]]
        if self.plan.request_tables:
            done = len(next(iter(entry.tables.values()))) if entry.tables else 0
            missing = [self._features(t, values) for t in list(self._known)[done:]]
            for name, output in self.plan.request_tables.items() if missing else ():
                rows = torch.stack([features[output] for features in missing])
                entry.tables[name] = torch.cat([entry.tables[name], rows]) if done else rows
        return entry


def buffer_name(tensor: str) -> str:
    """Name of the buffer that holds a tensor of the program: modules do not allow dots."""
    return tensor.replace(".", "__")


def encode_row(row: Tensor, encoding: str) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize a table row [1, ...] with one asymmetric scale: codes, scale [1], zero point [1] (i32).

    `int8` codes are -128..127, of the row's shape; `int4` codes are 0..15, packed two a byte, low nibble first.
    """
    top = 255 if encoding == "int8" else 15
    low, high = row.min().clamp(max=0), row.max().clamp(min=0)
    scale = ((high - low) / top).clamp(min=torch.finfo(torch.float32).tiny * 1e6)
    zero_point = torch.round(-low / scale)
    codes = torch.clamp(torch.round(row / scale) + zero_point, 0, top)
    if encoding == "int8":
        return (codes - 128).to(torch.int8), scale.reshape(1), (zero_point - 128).to(torch.int32).reshape(1)
    flat = codes.to(torch.uint8).flatten()
    flat = torch.cat([flat, flat.new_zeros(flat.numel() % 2)])
    return (flat[::2] | (flat[1::2] << 4))[None], scale.reshape(1), zero_point.to(torch.int32).reshape(1)


def _distinct(t: Tensor) -> list[float]:
    """One timestep if all are equal, else one for each batch entry."""
    values = t.tolist()
    return values[:1] if all(v == values[0] for v in values) else values


def _time_dtype(like: Tensor, t: float) -> torch.dtype:
    return like.dtype if like.is_floating_point() or t == int(t) else torch.float32
