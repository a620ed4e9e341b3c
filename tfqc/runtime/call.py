"""The one place where a call of a compiled model is checked: names, ranks, sizes, dtypes, constants.

Behind it nothing is checked again. A call is refused in one sentence: TypeError where it has other parts than the model
that was captured, ValueError where a part has another value than can be computed with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from tfqc.runtime.fixed import has_fixed_value
from tfqc.runtime.groups import Given
from tfqc.runtime.plan import Input, Plan
from tfqc.runtime.sizes import Dim, arithmetic, letters, meaning, solve, symbols_in, written

Path = tuple[str, ...]
EACH = "*"  # in a path: any entry of a list that has one for each image


class Call:
    """Checks calls against a plan."""

    MOST_KEPT = 256
    MOST_ENTRIES = 16
    DEEPEST = 32  # containers in containers

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._by_path = {i.path: i for i in plan.inputs}
        self._constants = dict(plan.constants)
        self._used = {path[0] for path in (*self._by_path, *self._constants)} | {"return_dict"}
        self._listed = {i.name: i for i in plan.inputs if i.path[-1] == EACH}
        self._timeless = [i for i in plan.inputs if i.role != "time"]
        self._times = [i for i in plan.inputs if i.role == "time"]
        self._noisy = plan.sample.name
        self._right: set[Any] = set()
        self._converted: dict[str, tuple[Tensor, int, Tensor]] = {}
        self._entries: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Given]:
        """Tensors by input name, as they were given; a list of images as a list.

        Raises:
            TypeError: an input is missing, is none that was captured, or is no tensor.
            ValueError: a constant has another value than the model was captured with.
        """
        return self._tensors(self._named(args, kwargs))

    def bind(self, given: Mapping[str, Given]) -> tuple[dict[str, Tensor], torch.dtype]:
        """Tensors by input name, in the captured dtypes, and the dtype that the sample had; timesteps are one value for
        each image, and a list of one image is [1, ...].

        Raises:
            TypeError: a tensor is of no fitting kind.
            ValueError: a shape or a timestep that the model was not captured for.
        """
        values = {k: self._row(self._listed[k], v) if isinstance(v, list) else v for k, v in given.items()}
        sample = values[self._noisy]
        dtype = sample.dtype
        if sample.dim() != len(self._plan.sample.shape) or 0 in sample.shape:
            self._check(values)  # timesteps are told apart by the images that there are
        for item in self._times:
            values[item.name] = self._timesteps(item, values[item.name], sample)
        key = tuple([(v.shape, v.dtype, v.device, v.layout) for v in values.values()])
        if key not in self._right:
            self._check(values)
            if len(self._right) == self.MOST_KEPT:
                self._right.clear()
            self._right.add(key)
        for item in self._timeless:
            if values[item.name].dtype != item.dtype:
                values[item.name] = self._convert(item, values[item.name])
        return values, dtype if dtype.is_floating_point else self._plan.sample.dtype

    # -- names ------------------------------------------------------------------------------------------------------

    def _named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        names = self._plan.arguments
        if len(args) > len(names):
            raise TypeError(f"The model takes {len(names)} positional arguments, {len(args)} given.")
        call = dict(zip(names, args, strict=False))
        if twice := call.keys() & kwargs.keys():
            raise TypeError(f"The model got {min(twice)!r} twice: by position and by name.")
        call |= kwargs
        for name, value in call.items():
            if (name,) not in self._by_path and value is not None:
                self._unused((name,), value)
        return call

    def _unused(self, path: Path, value: Any) -> None:
        """Accept what changes nothing: None, empty containers, constants that are as they were captured."""
        if path in self._by_path or value is None or path == ("return_dict",):
            return
        every = (*path[:1], EACH, *path[2:])  # image says the same
        if every in self._by_path:
            return
        if path not in self._constants and every in self._constants and "".join(path[1:2]).isdigit():
            path = every
        if path in self._constants:
            captured = self._constants[path]
            if isinstance(captured, str) and isinstance(value, Tensor) and has_fixed_value(captured, value):
                return
            if not _equal(captured, value):
                raise ValueError(
                    f"{'.'.join(path)} is {_short(value)}, but the model was captured with {captured!r}, which is part "
                    "of its code now: call it with that, or compile the model for the other value."
                )
            return
        if isinstance(value, (Mapping, list, tuple)):
            if len(path) > self.DEEPEST:
                raise TypeError(f"{path[0]} is nested more than {self.DEEPEST} deep, or holds itself.")
            for key, item in _items(value):
                self._unused((*path, key), item)
            return
        if any(known[: len(path)] == path for known in self._by_path):
            return  # whose parts are missed next
        raise TypeError(f"The model was captured without {'.'.join(path)!r}; it takes {sorted(self._used)}.")

    # -- tensors ----------------------------------------------------------------------------------------------------

    def _tensors(self, call: Mapping[str, Any]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for item in self._plan.inputs:
            value: Any = call.get(item.path[0])
            for key in item.path[1:]:
                if key == EACH and not isinstance(value, Mapping):
                    value = self._list(item, value)
                else:
                    value = dict(_items(value)).get(key)
            if value is None:
                raise TypeError(f"The model needs the input {'.'.join(item.path)!r} ({written(item.shape)}).")
            if not isinstance(value, Tensor) and not (item.name in self._listed and isinstance(value, list)):
                value = self._made(item, value)
            values[item.name] = value
        return values

    def _list(self, item: Input, value: Any) -> Any:
        """Entries of a list of images as tensors; rows of one tensor are entries, too."""
        if isinstance(value, (list, tuple)):
            if not value:
                raise ValueError(f"{'.'.join(item.path[:-1])} is an empty list: give an entry for each image.")
            return [each if isinstance(each, Tensor) else self._made(item, each) for each in value]
        return value

    def _row(self, item: Input, entries: list[Tensor]) -> Tensor:
        """The entry of the one image, as [1, ...]; the same tensor for the same request, since what it gives is kept
        by it."""
        name = ".".join(item.path[:-1])
        if len(entries) != 1:
            raise ValueError(f"{name} has {len(entries)} entries for 1 image: give one for each.")
        if item.role != "request":
            return entries[0].unsqueeze(0)
        key = (item.name, id(entries[0]))
        if key not in self._entries:
            if len(self._entries) == self.MOST_ENTRIES:
                self._entries.clear()
            self._entries[key] = (entries[0], entries[0].unsqueeze(0))  # kept, so that its identity is not reused
        return self._entries[key][1]

    def _made(self, item: Input, value: Any) -> Tensor:
        """Numbers and arrays as tensors."""
        try:
            return torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            why = next(iter(str(error).splitlines()), "").rstrip(".")
            raise TypeError(f"{'.'.join(item.path)} is a {type(value).__name__}, not a tensor: {why}.") from error

    def _timesteps(self, item: Input, t: Tensor, sample: Tensor) -> Tensor:
        """One timestep for each image, in the kind of number that was captured."""
        if t.dtype.is_complex or t.dtype == torch.bool:
            raise TypeError(f"{item.name} is {t.dtype}: a timestep is a number.")
        _check_plain(item, t)
        if t.is_floating_point() and t.dtype.itemsize == 1:
            t = t.to(torch.float32)
        if t.device != sample.device:
            t = t.to(sample.device)
        if t.dim() != 1:
            t = t.reshape(-1)
        if item.dtype.is_floating_point:
            t = t.to(item.dtype if t.is_floating_point() else torch.float32)
        elif t.is_floating_point() and bool(((t == t.round()) & torch.isfinite(t)).all()):
            t = t.to(torch.int64)
        images = sample.shape[0] if sample.dim() else 1
        if len(t) not in (1, images):
            raise ValueError(
                f"{item.name} has {len(t)} timesteps for {images} image{'s' if images > 1 else ''}: give one for all, "
                "or one for each."
            )
        return t.expand(images) if images > 1 and len(t) == 1 else t

    def _check(self, values: Mapping[str, Tensor]) -> None:
        """Ranks, sizes, one value for each symbol, guards, kinds of dtypes."""
        device = values[self._plan.sample.name].device
        symbols: dict[str, int] = {}
        ordered = sorted(self._plan.inputs, key=lambda i: i.role != "sample")
        for item in ordered:
            value = values[item.name]
            _check_kind(item, value)
            if value.device != device:
                raise ValueError(f"{'.'.join(item.path)} is on {value.device}, {self._plan.sample.name} on {device}.")
            if 0 in value.shape and value.dim() == len(item.shape):
                raise ValueError(f"{'.'.join(item.path)} is {written(value.shape)}: it holds nothing.")
            if value.dim() != len(item.shape):
                raise ValueError(self._misfit(item, value, symbols))
        for _ in range(3):  # expressions wait for the symbols that other dimensions tell
            for item in ordered:
                before = dict(symbols)
                sizes = zip(item.shape, values[item.name].shape, strict=True)
                if not all([solve(dim, size, symbols) for dim, size in sizes]):
                    raise ValueError(self._misfit(item, values[item.name], before))
                for guard in self._plan.guards:
                    if symbols_in(guard) <= symbols.keys() and not _holds(guard, symbols):
                        culprit = next((i for i in ordered if _mentions(i.shape, guard)), item)
                        raise ValueError(self._misfit(culprit, values[culprit.name], {}))

    def _misfit(self, item: Input, value: Tensor, known: Mapping[str, int]) -> str:
        shape = [d for d in item.shape if isinstance(d, str)]
        given = [f"{d} = {known[d]}" for d in dict.fromkeys(shape) if d in known]
        guards = [meaning(g) for g in self._plan.guards if any(_mentions((d,), g) for d in shape)]
        text = f"{'.'.join(item.path)} is {written(value.shape)}; this model takes {written(item.shape)}"
        if given or guards:
            text += f" with {' and '.join([*given, *guards])}"
        if known.get("B") and value.dim() == len(item.shape) and item.shape[:1] == ("B",) and len(value) != known["B"]:
            sizes = ", ".join([str(known["B"]), *["-1"] * (value.dim() - 1)])
            way = f": give {'.'.join(item.path)}.expand({sizes}), where one is for all" if len(value) == 1 else ""
            return f"{text}, one for each of {self._plan.sample.name}{way}."
        if value.dim() != len(item.shape):
            return f"{text}."
        pairs = enumerate(zip(item.shape, value.shape, strict=True))
        channels = 1 if len(item.shape) > 3 else len(item.shape) - 1  # which weights fix
        fixed = [i for i, (dim, size) in pairs if isinstance(dim, int) and dim != size]
        if fixed and channels not in fixed and 0 not in fixed:
            asked = ",".join(_asked(item, dim) for dim in fixed)
            text += f": compile it with dynamic='{asked}' (--dynamic {asked}) if its layers allow other sizes"
        if fixed == [0] and item.role == "request" and item.shape[:1] == (1,) and self._plan.sample.shape[:1] == ("B",):
            text += ", one for all images as in the example: compile it with an example that has one for each"
        return f"{text}."

    # -- values -----------------------------------------------------------------------------------------------------

    def _convert(self, item: Input, value: Tensor) -> Tensor:
        """In the captured dtype; the same tensor for the same request, since what it gives is kept by it."""
        if item.role != "request":
            return value.to(item.dtype)
        kept = self._converted.get(item.name)
        if kept is not None and kept[0] is value:
            _, version, made = kept
            by_value = value.is_inference() or value.device.type == "cpu"  # versions miss some writes
            if torch.equal(value.to(item.dtype), made) if by_value else value._version == version:
                return made
        made = value.detach().to(item.dtype)
        self._converted[item.name] = (value, 0 if value.is_inference() else value._version, made)
        return made


def _holds(guard: str, symbols: Mapping[str, int]) -> bool:
    try:
        return bool(arithmetic(guard)(symbols))
    except ZeroDivisionError:
        return False


def _check_plain(item: Input, value: Tensor) -> None:
    if value.layout != torch.strided or value.is_meta or value.is_nested:
        raise TypeError(f"{'.'.join(item.path)} is no plain tensor: it has no values in dense memory.")


def _check_kind(item: Input, value: Tensor) -> None:
    """Any float for a float, any integer for an integer; integers are numbers too."""
    name = ".".join(item.path)
    _check_plain(item, value)
    given, wanted = value.dtype, item.dtype
    whole = not (given.is_floating_point or given.is_complex or given == torch.bool)
    fits = (
        item.role == "time"
        or (wanted.is_complex and (given.is_complex or given.is_floating_point))
        or (wanted.is_floating_point and (given.is_floating_point or whole))
        or (wanted == torch.bool and given == torch.bool)
        or (not wanted.is_floating_point and not wanted.is_complex and wanted != torch.bool and not _is_real(given))
    )
    if not fits:
        raise TypeError(f"{name} is {_dtype(given)}; this model takes {_dtype(wanted)} there.")


def _is_real(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    """Keys and values of a dictionary, positions and items of a list."""
    if isinstance(value, Mapping):
        return ((str(key), item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ((str(key), item) for key, item in enumerate(value))
    return iter(())


def _equal(captured: Any, value: Any) -> bool:
    """True for the same number, text or truth; a tensor of one value is that value."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(captured, float) and isinstance(value, float) and math.isnan(captured) and math.isnan(value):
        return True
    if isinstance(captured, str) or isinstance(value, str):
        return isinstance(value, str) and captured == value
    return isinstance(value, (bool, int, float)) and captured is not None and captured == value


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {written(value.shape)}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _mentions(shape: tuple[Dim, ...], guard: str) -> bool:
    return any(isinstance(d, str) and symbols_in(d) & symbols_in(guard) for d in shape)


def _asked(item: Input, dim: int) -> str:
    """How a user asks for a dimension that may differ."""
    name = letters(len(item.shape))[dim]
    return name if item.role == "sample" else f"{'.'.join(item.path)}[{dim}]={name}"
