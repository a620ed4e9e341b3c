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
    """A tensor of rows over the schedule, made from one output of the time function.

    With a `label` (a request input of class labels) it has `classes` rows for each timestep, one for each label.
    """

    tensor: str
    output: int
    encoding: str = "fp"
    scale: str = ""
    zero_point: str = ""
    label: str = ""
    classes: int = 1


@dataclass(frozen=True)
class Plan:
    """How a call of the model becomes calls of its functions.

    `inputs` are (name, role, path in the call); `positional` the names of the model's positional arguments;
    `time_is_float` whether the model was captured with floating point timesteps; `per_image` the request inputs that
    have a row for each image. `label_rows` maps parameters of the step function to (input of class labels, how many
    labels there are): the parameter is row * labels + label. The other dictionaries map parameters of the step
    function to outputs of `begin` and of `time`.
    """

    inputs: tuple[tuple[str, str, tuple[str, ...]], ...]
    positional: tuple[str, ...]
    time_is_float: bool = False
    timesteps: tuple[float, ...] = ()
    policy: str = "recompute"
    row: str = ""
    label_rows: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    per_image: tuple[str, ...] = ()
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
    batch: int
    versions: tuple[int, ...]
    copies: dict[str, Tensor]
    hoisted: dict[str, Tensor]
    tables: dict[str, Tensor]

    def serves(self, inputs: Mapping[str, Tensor], batch: int) -> bool:
        """True if the inputs are the same tensors, unchanged.

        Versions miss what is written past torch (`.data`, numpy), and inference tensors have none. So values are
        compared too, but for those on a device that would have to be waited for.
        """
        if batch != self.batch or any(self.inputs[k] is not v for k, v in inputs.items()):
            return False
        if self.versions != _versions(inputs):
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
        # Calls bring timesteps in float32 at best, so the schedule is known by what it is in float32.
        self._schedule = torch.tensor(plan.timesteps, dtype=torch.float32).tolist()
        self._known: dict[float, int] = {t: i for i, t in enumerate(self._schedule)}
        self._original: dict[str, Tensor] = {}
        self._requests: list[_Request] = []
        self._row_tensors: dict[tuple[int, torch.device], Tensor] = {}

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
        if plan.row or plan.label_rows:
            rows = self._rows(values)
            values |= {name: _with_label(rows, values[k], k, n) for name, (k, n) in plan.label_rows.items()}
            values |= {plan.row: rows} if plan.row else {}
        if plan.hoisted or plan.request_tables:
            entry = self._request(values)
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

    def _rows(self, values: Mapping[str, Tensor]) -> Tensor:
        """Row of each batch entry's timestep: [1] where they are all equal, else [B]."""
        time = next(values[name] for name, role, _ in self.plan.inputs if role == "time")
        timesteps = _distinct(time)
        unknown = {t for t in timesteps if t not in self._known}
        if len(self._known) - len(self._schedule) + len(unknown) > self.MAX_EXTRA_ROWS:
            self._forget_extra_rows()  # before any row of this call is looked up
        rows = [self._row_of(t, values) for t in timesteps]
        if len(rows) > 1:
            return torch.tensor(rows, device=time.device)
        key = (rows[0], time.device)
        if key not in self._row_tensors:
            self._row_tensors[key] = torch.tensor(rows, device=time.device)
        return self._row_tensors[key]

    def _row_of(self, t: float, values: Mapping[str, Tensor]) -> int:
        if t in self._known:
            return self._known[t]
        if self.plan.policy == "error":
            raise ValueError(
                f"Timestep {t:g} is not in the schedule of {len(self._schedule)} steps that this model was "
                "compiled for, and its policy is 'error': compile it for this schedule, or with policy=recompute."
            )
        nearest = min(range(len(self._schedule)), key=lambda i: abs(self._schedule[i] - t))
        if self.plan.policy == "nearest":
            return nearest
        return self._add_row(t, nearest, values)

    def _add_row(self, t: float, nearest: int, values: Mapping[str, Tensor]) -> int:
        """Compute the rows of an unknown timestep in full precision, once, and append them to every table."""
        calls: dict[str, tuple[Tensor, ...]] = {}  # what the time function gives, by the label that is enumerated
        for table in self.plan.tables:
            if table.label not in calls:
                calls[table.label] = self._features(t, values, table.label, table.classes)
            rows = calls[table.label][table.output][: table.classes]
            if table.encoding == "fp":
                self._append(table.tensor, rows)
            else:
                parts = zip(*(encode_row(row[None], table.encoding) for row in rows), strict=True)
                for name, part in zip((table.tensor, table.scale, table.zero_point), parts, strict=True):
                    self._append(name, torch.cat(part))
        for name in self.plan.activations:
            self._append(name, self.get_tensor(name)[nearest : nearest + 1])
        self._known[t] = len(self._known)
        return self._known[t]

    def _append(self, name: str, row: Tensor) -> None:
        tensor = self.get_tensor(name)
        self._original.setdefault(name, tensor)
        self.set_tensor(name, torch.cat([tensor, row.to(tensor.dtype)]))

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
        inputs = {name: values[name] for name, role, _ in self.plan.inputs if role != "sample"}
        if label:
            everything = torch.arange(classes, dtype=inputs[label].dtype, device=inputs[label].device)
            for name in self.plan.per_image:  # the first image's stand in for the others: rows wait for the label alone
                inputs[name] = inputs[name][:1].expand(classes, *inputs[name].shape[1:])
            inputs[label] = everything
        for name, role, _ in self.plan.inputs:
            if role == "time":
                size = (classes,) if label else inputs[name].shape
                inputs[name] = inputs[name].new_full(size, t, dtype=_time_dtype(inputs[name], t))
        return self.time(**inputs)

    # -- requests ---------------------------------------------------------------------------------------------------

    def _request(self, values: Mapping[str, Tensor]) -> _Request:
        request = {name: values[name] for name, role, _ in self.plan.inputs if role == "request"}
        batch = next(len(values[name]) for name, role, _ in self.plan.inputs if role == "sample")
        entry = next((e for e in self._requests if e.serves(request, batch)), None)
        if entry is None:
            hoisted: dict[str, Tensor] = {}
            if self.plan.hoisted:
                assert self.begin is not None
                outputs = self.begin(**request)
                hoisted = {name: outputs[i] for name, i in self.plan.hoisted.items()}
            copies = {k: v.clone() for k, v in request.items() if v.is_inference() or v.device.type == "cpu"}
            entry = _Request(request, batch, _versions(request), copies, hoisted, {})
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


def _with_label(rows: Tensor, labels: Tensor, name: str, classes: int) -> Tensor:
    """Row of each batch entry in a table that has a row for each label at each timestep."""
    if strange := [k for k in labels.tolist() if not 0 <= k < classes]:
        raise ValueError(f"{name} holds {strange[0]}, but the model was captured for the labels 0 to {classes - 1}.")
    return rows * classes + labels


def _distinct(t: Tensor) -> list[float]:
    """One timestep if all are equal, else one for each batch entry."""
    values = t.to(torch.float32).tolist()
    return values[:1] if all(v == values[0] for v in values) else values


def _time_dtype(like: Tensor, t: float) -> torch.dtype:
    return like.dtype if like.is_floating_point() or t == int(t) else torch.float32
