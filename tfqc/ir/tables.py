"""Side tables: what analyses and calibration know about values, as JSON-able rows keyed by name.

A row class declares the table that it belongs to. Tensors never live in rows: a row names them, the program holds
them. Tables are derived, dropped by the pass manager unless a pass preserves them, or durable.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from tfqc.errors import IRError


@dataclass(frozen=True)
class Row:
    """Base of side-table rows: a frozen dataclass of JSON values.

    `inline` rows are printed on their node's line, others in a section of their own. `of_node` rows are keyed by a
    node and disappear with it; others are keyed by anything (a tensor, a schedule). A `durable` table stays through
    every pass, whatever passes know of it; one that is not is true of the program that it was derived from, so a pass
    that rewrites has to say that it preserves it.
    """

    table: ClassVar[str]
    inline: ClassVar[bool] = False
    of_node: ClassVar[bool] = True
    durable: ClassVar[bool] = False

    def tensors(self) -> tuple[str, ...]:
        """Names of tensors that this row keeps alive although no node reads them yet."""
        return ()

    def columns(self) -> tuple[str, ...]:
        """What the row has of several things that it may have, where passes need some of them."""
        return ()

    @classmethod
    def column(cls, name: str) -> Column:
        """One of `columns`, for passes that need or make it."""
        return Column(cls, name)

    def to_json(self) -> Any:
        """The row as JSON: an object, or the bare value when there is one field."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return next(iter(values.values())) if len(values) == 1 else values


@dataclass(frozen=True)
class Column:
    """What all rows of a table have of several things: `Disturbance.column("cache4")`."""

    row: type[Row]
    name: str


Fact = type[Row] | Column


def fact_name(fact: Fact) -> str:
    """A table or a column, as messages and listings name it: `disturbance`, `disturbance.cache4`."""
    return f"{fact.row.table}.{fact.name}" if isinstance(fact, Column) else fact.table


SideTable = dict[str, Row]
T = TypeVar("T", bound=type[Row])
R = TypeVar("R", bound=Row)
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


def row_class(table: str, *, inline: bool = False) -> type[Row]:
    """The row class of a table, from a plug-in if need be; rows of a table that none has are `OpaqueRow`s.

    `inline` says where an opaque row was read, and is to be printed.
    """
    if table not in _KINDS:
        from tfqc.registry import load_plugins

        load_plugins()
    return _KINDS[table] if table in _KINDS else _opaque(table, inline)


@functools.lru_cache(maxsize=256)
def _opaque(table: str, inline: bool) -> type[OpaqueRow]:
    return type("OpaqueRow", (OpaqueRow,), {"table": table, "inline": inline, "of_node": inline})


def understood(kind: type[R], rows: Mapping[str, Row]) -> dict[str, R]:
    """Rows of a kind; what was read before its class was loaded is read again."""
    return {
        name: row_from_json(kind, row.value) if isinstance(row, OpaqueRow) else row  # type: ignore[misc]
        for name, row in rows.items()
    }


def row_from_json(cls: type[R], value: Any) -> R:
    """Inverse of `Row.to_json`.

    Raises:
        IRError: the value has other fields than the class, or fields of other types.
    """
    if issubclass(cls, OpaqueRow):
        return cls(value)
    fields, hints = dataclasses.fields(cls), _hints(cls)
    single = len(fields) == 1
    try:
        if not single and not isinstance(value, dict):
            raise TypeError("it is no object")
        values: Mapping[str, Any] = {fields[0].name: value} if single else value
        return cls(**{name: _read(hints[name], item) for name, item in values.items()})
    except (TypeError, KeyError, AttributeError) as error:
        shown = repr(value)
        shown = shown if len(shown) <= 400 else shown[:397] + "..."
        names = [f.name for f in fields]
        raise IRError(f"{shown} is no row of table {cls.table!r}, which has {names}: {error}.") from error


@functools.cache
def _hints(cls: type[Row]) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _read(hint: Any, value: Any) -> Any:
    """A JSON value as the type hint of a field wants it: JSON has lists where rows have tuples.

    Raises:
        TypeError: it is of another type. Hints of other kinds than these take any value.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple and isinstance(value, list):
        items = typing.cast("list[Any]", value)
        each = (arguments[0],) * len(items) if arguments[-1] is Ellipsis else arguments
        if len(each) != len(items):
            raise TypeError(f"{len(each)} values are wanted, not {len(items)}")
        return tuple(_read(a, v) for a, v in zip(each, items, strict=True))
    if origin is Mapping and isinstance(value, dict):
        return {k: _read(arguments[1], v) for k, v in typing.cast("dict[str, Any]", value).items()}
    wanted = _WANTED.get(origin or hint)
    if wanted is not None and (not isinstance(value, wanted) or (isinstance(value, bool) and hint is not bool)):
        raise TypeError(f"{str(value)[:80]} is no {getattr(hint, '__name__', hint)}")
    return _frozen(value)


_WANTED: dict[Any, tuple[type, ...]] = {
    str: (str,), int: (int,), float: (float, int), bool: (bool,), tuple: (list,), Mapping: (dict,),
}  # fmt: skip


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value


@dataclass(frozen=True)
class OpaqueRow(Row):
    """A row of a table whose class is not loaded: kept and printed as it was read."""

    table: ClassVar[str] = "opaque"
    value: Any
