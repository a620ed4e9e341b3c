"""The maintenance strategies by name, and what each does to the temporal features and stores for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from tfqc.analysis.weighted import tib_weighted, weight_of
from tfqc.errors import CalibrationError
from tfqc.ir.program import Program
from tfqc.quant.grid import Grid, fake_quantize, quantize_weight, range_to_qparams
from tfqc.quant.parameters import input_fake_quantizer, quantizer_of, stored_weight
from tfqc.temporal.features import TibRun
from tfqc.temporal.tabulate import decode, encode

# tib: run the quantized block; cacheB: rows of B bits; table: fp rows; fold: fp, inside the next operation's constants.
STRATEGIES = ("tib", "cache4", "cache8", "table", "fold")


def disturbed(
    program: Program, run: TibRun, strategy: str, exact: Mapping[str, Tensor], bits: tuple[int, int]
) -> dict[str, Tensor]:
    """Features as a strategy keeps them, [T, requests, ...] by name.

    `tib` uses the quantizers that TIB nodes have already (from FSC, TIAR or a calibration), and for the others plain
    min-max ones of `bits` = (weights, activations), one range for all steps.
    """
    if strategy in ("table", "fold"):
        return dict(exact)
    if strategy.startswith("cache"):
        encoding = f"int{strategy.removeprefix('cache')}"
        return {
            name: decode(*encode(value.flatten(0, 1), encoding), encoding, value.shape[2:]).reshape(value.shape)
            if value.is_floating_point()
            else value  # `become_table_read` encodes no others
            for name, value in exact.items()
        }
    weights: dict[str, Callable[[], Tensor]] = {}  # one at a time: the block may be a third of the model
    inputs: dict[str, Callable[[Tensor], Tensor]] = {}
    requests = next(iter(exact.values())).shape[1]
    seen: dict[str, Tensor] = {}
    with torch.no_grad():
        run(observe=lambda name, value: seen.update({name: value}))
    for node in tib_weighted(program):
        row, weight = quantizer_of(program, node), weight_of(node)
        if node.name not in seen or weight is None:
            continue
        if row.codes:
            weights[node.name] = partial(stored_weight, program, row)
        else:
            value = program.tensors[weight]
            if not bool(torch.isfinite(value).all()):
                raise CalibrationError(f"Weight @{weight} of {program.at(node)} holds NaN or infinity.")
            weights[node.name] = partial(_nearest, value, bits[0])
        inputs[node.name] = (
            input_fake_quantizer(program, row, requests) if row.input_bits else _static(seen[node.name], bits[1])
        )
    with torch.no_grad():
        return run(weights=weights, inputs=inputs)


def stored_bytes(program: Program, feature: str, strategy: str, steps: int, values: int) -> int:
    """Bytes that a strategy stores for one feature of `values` elements; shared parts of the TIB are not counted.

    Tables: rows and their parameters (8 bytes a row). `tib`: the codes, scales and bias of the feature's own last
    linear, at the bits it has or 8.
    """
    type_ = program.tensor_type(program.node(feature))
    assert type_ is not None
    match strategy:
        case "table" | "fold":
            return type_.dtype.itemsize * steps * values
        case "cache8" | "cache4" if not type_.dtype.is_floating_point:
            return type_.dtype.itemsize * steps * values
        case "cache8":
            return steps * (values + 8)
        case "cache4":
            return steps * (math.ceil(values / 2) + 8)
        case _:
            pass
    queue = [program.node(feature)]
    while queue:
        node = queue.pop(0)
        if weight := weight_of(node):
            bits = quantizer_of(program, node).weight_bits or 8
            tensor = program.tensors[weight]
            return math.ceil(tensor.numel() * bits / 8) + 12 * tensor.shape[0]
        queue.extend(node.all_input_nodes)
    return 0


def _nearest(weight: Tensor, bits: int) -> Tensor:
    return quantize_weight(weight, Grid(bits, symmetric=True)).dequantize()


def _static(seen: Tensor, bits: int) -> Callable[[Tensor], Tensor]:
    grid = Grid(bits, symmetric=False)
    scale, zero_point = range_to_qparams(seen.amin(), seen.amax(), grid)
    return lambda x: fake_quantize(x, scale, zero_point, grid)
