"""Steps of quantizers for timesteps that no table holds: their networks join @time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from tfqc.analysis.outline import add_outlined
from tfqc.ir.match import returned_value
from tfqc.ir.program import TIME, Program, Role
from tfqc.ir.rows import Quantizer, RowSource
from tfqc.quant.time_scales import Networks, TimeScales, parameters_at

aten = torch.ops.aten


def scales_join_time(program: Program) -> None:
    """Let @time compute the scales and zero points that networks give, for inputs that are still quantized by them."""
    read = {tensor for row in program.table(Quantizer).values() for tensor in row.tensors()}
    for row in program.table(TimeScales).values():
        wanted = [i for i, name in enumerate(row.scales) if name in read]
        if not wanted:
            continue
        if TIME not in program.functions:
            add_outlined(program, TIME, [], {Role.TIME, Role.REQUEST})
        _append(program, row, wanted)


def _append(program: Program, row: TimeScales, wanted: list[int]) -> None:
    end = next(n for n in reversed(program.functions[TIME].nodes) if n.op == "output")

    def call(operation: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return program.insert(end, operation, args, kwargs, function=TIME)

    networks = Networks(**{k: program.tensor_node(name, TIME) for k, name in row.networks.items()})
    time = program.node(program.input(Role.TIME)[0].name, TIME)
    outputs: list[fx.Node] = list(returned_value(end))
    for names, values in zip((row.scales, row.zero_points), parameters_at(call, time, networks), strict=True):
        for i in wanted:
            sources = program.tables[RowSource.table]
            sources[names[i]] = replace(sources[names[i]], kind="table", output=len(outputs))
            outputs.append(call(aten.select.int, values, 0, i))
    end.args = (tuple(outputs),)
