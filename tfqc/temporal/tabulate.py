"""Rows of temporal features for a schedule: computed in full precision, and encoded as tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import networkx as nx
import torch
from torch import Tensor, fx

from tfqc.analysis.binding import data_flow
from tfqc.analysis.outline import outline
from tfqc.calibration.trajectories import timestep_tensor
from tfqc.ir.program import STEP, Input, Program, Role
from tfqc.runtime import encode_row


def label_of(program: Program, nodes: Iterable[fx.Node]) -> dict[str, Input | None]:
    """For each node that waits for request inputs by way of class labels alone: that input; for the others None.

    The labels are one input with a declared domain, one label for each image.
    """
    flow = data_flow(program.step)
    requests = {i.name: i for i in program.input(Role.REQUEST) if i.name in flow}
    found: dict[str, Input | None] = {}
    for node in nodes:
        read = [requests[name] for name in nx.ancestors(flow, node.name) if name in requests]
        labels = len(read) == 1 and read[0].domain is not None and read[0].type.shape == ("B",)
        found[node.name] = read[0] if labels else None
    return found


def feature_rows(
    program: Program, nodes: Sequence[fx.Node], timesteps: Sequence[float], label: Input | None = None
) -> dict[str, Tensor]:
    """Rows [T, ...] of values that depend on the timestep alone, in full precision, by name.

    With a label input: [T * labels, ...], the labels of a timestep next to each other. A program without weights has
    rows without values.
    """
    classes = 1 if label is None else label.domain or 1
    if not nodes:
        return {}
    if not program.has_weights:
        types = {n.name: program.tensor_type(n) for n in nodes}
        return {
            name: torch.empty((len(timesteps) * classes, *type_.shape[1:]), dtype=type_.dtype, device="meta")  # type: ignore[arg-type]
            for name, type_ in types.items()
            if type_ is not None
        }
    roles = {Role.TIME} if label is None else {Role.TIME, Role.REQUEST}
    scratch = Program({STEP: outline(program, nodes, roles)}, program.tensors, program.inputs).module()
    parameters = [n.name for n in scratch.graph.nodes if n.op == "placeholder"]
    t = timestep_tensor(program, timesteps)
    given: dict[str, Tensor] = {}
    parts: list[tuple[Tensor, ...]] = []
    fixed = program.batch if isinstance(program.batch, int) else None
    # The labels of one timestep at once: bounded memory. Where code fixes the batch, its rows are all the same.
    for part in [t] if label is None and fixed is None else t.split(1):
        given[program.input(Role.TIME)[0].name] = part.repeat_interleave(fixed or classes)
        if label is not None:
            given[label.name] = torch.arange(classes, dtype=label.type.dtype)
        with torch.no_grad():
            rows = scratch(*(given.get(name, torch.empty(0)) for name in parameters))
        parts.append(rows if fixed is None else tuple(row[:1] for row in rows))
    columns = zip(*parts, strict=True)
    return {n.name: torch.cat(rows).contiguous() for n, rows in zip(nodes, columns, strict=True)}


def encode(rows: Tensor, encoding: str) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zero points of table rows [N, ...]; see `tfqc.runtime.encode_row`."""
    if rows.is_meta:
        shape = rows.shape[1:] if encoding == "int8" else (-(-rows[0].numel() // 2),)
        codes = rows.new_empty((len(rows), *shape), dtype=torch.int8 if encoding == "int8" else torch.uint8)
        return codes, rows.new_empty(len(rows)), rows.new_empty(len(rows), dtype=torch.int32)
    parts = zip(*(encode_row(row[None], encoding) for row in rows), strict=True)
    codes, scale, zero_point = (torch.cat(part) for part in parts)
    return codes, scale, zero_point


def decode(codes: Tensor, scale: Tensor, zero_point: Tensor, encoding: str, shape: Sequence[int]) -> Tensor:
    """Rows [N, *shape] of an encoded table."""
    every = torch.arange(len(codes))
    if encoding == "int8":
        return torch.ops.tfqc.table_decode(codes, scale, zero_point, every)
    return torch.ops.tfqc.table_decode_int4(codes, scale, zero_point, every, list(shape))


def as_kept(rows: Tensor, strategies: Sequence[str]) -> Tensor:
    """Rows [N, ...] in floating point, each after the rounding of its own strategy."""
    kept = rows.clone()
    for strategy in {s for s in strategies if s.startswith("cache")} if not rows.is_meta else ():
        encoding = f"int{strategy.removeprefix('cache')}"
        at = torch.tensor([s == strategy for s in strategies])
        kept[at] = decode(*encode(rows[at], encoding), encoding, rows.shape[1:])
    return kept
