"""What kernels run, and how each operation of a lowered step is written down."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from tfqc.analysis.rewrite import name_of, operands, stores
from tfqc.analysis.weighted import WEIGHTED
from tfqc.backends.cpu_int8.integer import on_integers, why_not_attention
from tfqc.codegen.support import YES, Support
from tfqc.ir.ops import is_view
from tfqc.ir.program import Program

# What has a kernel beside the operations that say how they store their result.
_ALSO = {"tfqc.quantize_tokens.default", "tfqc.channels_last.default", "tfqc.plain.default"}
_ROWS = {"bias", "gate", "weight"}  # arguments of kernels that may be rows of the schedule
READS = {"tfqc.table_read.default", "tfqc.request_read.default"}


def support_of(program: Program, node: fx.Node) -> Support:
    """Whether kernels run an operation of @step that works on tensors, or torch; `YES` also if nothing has to."""
    found = _on_kernels(program, node)
    return replace(found, because=f"runs in torch: {found.because}") if found.because else YES


def _on_kernels(program: Program, node: fx.Node) -> Support:
    name = name_of(node)
    if is_kernel(program, node) or is_view(node) or is_row(node) or program.tensor_type(node) is None:
        return YES
    if name in WEIGHTED:
        return on_integers(program, node)
    if name == "aten.scaled_dot_product_attention.default":
        return Support(True, why_not_attention(program, node))
    if name == "tfqc.unpack_tiles.default" or name.startswith("tfqc.dequantize_weight"):
        return YES
    return Support(True, f"there is no kernel for {name}")


def is_kernel(program: Program, node: fx.Node) -> bool:
    """True for an operation that `Recorder` has a kernel for."""
    return is_own(node) or is_concat(program, node) or upsampling(node) > 0


def is_own(node: fx.Node) -> bool:
    """True for one of our operations that `Recorder` has a method of the same name for."""
    return stores(node) or name_of(node) in _ALSO


def is_concat(program: Program, node: fx.Node) -> bool:
    """True for two images put together along their channels."""
    if name_of(node) != "aten.cat.default" or len(node.args[0]) != 2 or node.args[1:] != (1,):  # type: ignore[arg-type]
        return False
    types = [program.tensor_type(n) for n in node.all_input_nodes]
    return all(t is not None and len(t.shape) == 4 and t.dtype.is_floating_point for t in types)


def upsampling(node: fx.Node) -> int:
    """The factor of a nearest-neighbour enlargement of images by a whole number; 0 for anything else."""
    if name_of(node) != "aten.upsample_nearest2d.vec" or node.args[1] is not None:
        return 0
    factors = set(node.args[2])  # type: ignore[arg-type]
    factor = factors.pop()
    return int(factor) if not factors and isinstance(factor, float) and factor.is_integer() else 0


def is_row(node: fx.Node) -> bool:
    """True for a read of a table that only kernels use, which then go to the row themselves."""
    return name_of(node) in READS and all(
        stores(u) and {name for name, given in operands(u).items() if given is node} <= _ROWS for u in node.users
    )
