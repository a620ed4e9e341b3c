"""What kernels run, and how each operation of a lowered step is written down."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from tfqc.backends.cpu_int8.integer import on_integers, why_not_attention
from tfqc.codegen.support import YES, Support
from tfqc.ir.match import is_call
from tfqc.ir.ops import is_view, op_name
from tfqc.ir.program import Program
from tfqc.ir.views import Attention, Cat, Conv, Linear, Stores, Upsample

ours = torch.ops.tfqc
# What has a kernel beside the operations that say how they store their result.
_ALSO = (ours.quantize_tokens.default, ours.channels_last.default, ours.plain.default)
_ROWS = {"bias", "gate", "weight"}  # operands of kernels that may be rows of the schedule
READS = (ours.table_read.default, ours.request_read.default)
_WEIGHTS = (ours.unpack_tiles.default, ours.dequantize_weight.default, ours.dequantize_weight_int4.default)


def support_of(program: Program, node: fx.Node) -> Support:
    """Whether kernels run an operation of @step that works on tensors, or torch; `YES` also if nothing has to."""
    found = _on_kernels(program, node)
    return replace(found, because=f"runs in torch: {found.because}") if found.because else YES


def _on_kernels(program: Program, node: fx.Node) -> Support:
    if is_kernel(program, node) or is_view(node) or is_row(node) or program.tensor_type(node) is None:
        return YES
    if layer := Linear.of(node) or Conv.of(node):
        return on_integers(program, layer)
    if attention := Attention.of(node):
        return Support(True, why_not_attention(program, attention))
    return YES if is_call(node, *_WEIGHTS) else Support(True, f"there is no kernel for {op_name(node.target)}")


def is_kernel(program: Program, node: fx.Node) -> bool:
    """True for an operation that `Recorder` has a kernel for."""
    return is_own(node) or is_concat(program, node) or upsampling(node) > 0


def is_own(node: fx.Node) -> bool:
    """True for one of our operations that `Recorder` has a method of the same name for."""
    return is_call(node, *Stores.targets, *_ALSO)


def is_concat(program: Program, node: fx.Node) -> bool:
    """True for two images put together along their channels."""
    cat, types = Cat.of(node), [program.tensor_type(n) for n in images_of(node)]
    if cat is None or len(types) != 2 or cat.dim != 1:
        return False
    return all(t and len(t.shape) == 4 and t.shape[1] != 0 and t.dtype.is_floating_point for t in types)


def images_of(node: fx.Node) -> list[fx.Node]:
    """What a concatenation puts together, a value as often as it stands there; nothing for another node."""
    cat = Cat.of(node)
    return [] if cat is None or isinstance(cat.tensors, fx.Node) else list(cat.tensors)


def upsampling(node: fx.Node) -> int:
    """The factor of a nearest-neighbour enlargement of images by a whole number; 0 for anything else."""
    larger = Upsample.of(node)
    if larger is None or larger.output_size is not None or larger.scale_factors is None:
        return 0
    factors = set(larger.scale_factors)
    factor = factors.pop()
    return int(factor) if not factors and isinstance(factor, float) and factor.is_integer() else 0


def is_row(node: fx.Node) -> bool:
    """True for a read of a table that only kernels use, which then go to the row themselves."""
    return is_call(node, *READS) and all(
        is_call(u, *Stores.targets) and {name for name, given in u.kwargs.items() if given is node} <= _ROWS
        for u in node.users
    )
