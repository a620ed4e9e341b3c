"""Side tables: what analyses and calibration know about values, as JSON-able rows keyed by name.

A row class declares the table that it belongs to. Tensors never live in rows: a row names them, the program holds
them. Tables that a pass does not preserve are dropped by the pass manager.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from tfqc.errors import IRError


@dataclass(frozen=True)
class Row:
    """Base of side-table rows: a frozen dataclass of JSON values.

    `inline` rows are printed on their node's line, others in a section of their own. `of_node` rows are keyed by a
    node and disappear with it; others are keyed by anything (a tensor, a schedule).
    """

    table: ClassVar[str]
    inline: ClassVar[bool] = False
    of_node: ClassVar[bool] = True

    def tensors(self) -> tuple[str, ...]:
        """Names of tensors that this row keeps alive although no node reads them yet."""
        return ()

    def columns(self) -> tuple[str, ...]:
        """What the row has of several things that it may have, where passes need some of them."""
        return ()

    def to_json(self) -> Any:
        """The row as JSON: an object, or the bare value when there is one field."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return next(iter(values.values())) if len(values) == 1 else values


Table = dict[str, Row]
T = TypeVar("T", bound=type[Row])
_KINDS: dict[str, type[Row]] = {}


def row_kind(cls: T) -> T:
    """Class decorator: makes a row class known by its table name, so that IR text can be read back.

    Raises:
        IRError: another class owns the name.
    """
    other = _KINDS.get(cls.table)
    if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise IRError(f"Table {cls.table!r} belongs to {other.__module__} and to {cls.__module__}.")
    _KINDS[cls.table] = cls
    return cls


def row_class(table: str) -> type[Row]:
    """The row class of a table; tables of plug-ins that are not loaded are read as `OpaqueRow`s."""
    if table not in _KINDS:
        kind = type("OpaqueRow", (OpaqueRow,), {"table": table, "__module__": __name__})
        _KINDS[table] = kind
    return _KINDS[table]


def row_from_json(cls: type[Row], value: Any) -> Row:
    """Inverse of `Row.to_json`.

    Raises:
        IRError: the value has other fields than the class.
    """
    if issubclass(cls, OpaqueRow):
        return cls(value)
    fields = dataclasses.fields(cls)
    hints = typing.get_type_hints(cls)
    values: Mapping[str, Any] = {fields[0].name: value} if len(fields) == 1 else value
    try:
        return cls(**{name: _freeze(hints[name], item) for name, item in values.items()})
    except (TypeError, KeyError, AttributeError) as error:
        raise IRError(f"{value!r} is no row of table {cls.table!r}, which has {[f.name for f in fields]}.") from error


def _freeze(hint: Any, value: Any) -> Any:
    """JSON has lists where rows have tuples."""
    del hint
    return tuple(_freeze(None, v) for v in value) if isinstance(value, list) else value


@dataclass(frozen=True)
class OpaqueRow(Row):
    """A row of a table whose class is not loaded: kept and printed as it was read."""

    table: ClassVar[str] = "opaque"
    value: Any
