"""What kernels run, and how each operation of a lowered step is written down."""

from __future__ import annotations

from torch import fx

from tfqc.analysis.rewrite import name_of, operands, stores
from tfqc.analysis.weighted import WEIGHTED
from tfqc.backends.cpu_int8.integer import why_not_attention, why_not_integer
from tfqc.ir.ops import is_view
from tfqc.ir.program import Program

# What has a kernel beside the operations that say how they store their result.
_ALSO = {"tfqc.quantize_tokens.default", "tfqc.channels_last.default", "tfqc.plain.default"}
_ROWS = {"bias", "gate", "weight"}  # arguments of kernels that may be rows of the schedule
READS = {"tfqc.table_read.default", "tfqc.request_read.default"}


def why_not_real(program: Program, node: fx.Node) -> str:
    """Why an operation of @step that works on tensors runs in torch; empty if kernels run it, or nothing has to."""
    name = name_of(node)
    if is_kernel(program, node) or is_view(node) or is_row(node) or program.tensor_type(node) is None:
        return ""
    if name in WEIGHTED:
        return why_not_integer(program, node)
    if name == "aten.scaled_dot_product_attention.default":
        return why_not_attention(program, node)
    if name == "tfqc.unpack_tiles.default" or name.startswith("tfqc.dequantize_weight"):
        return ""
    return f"there is no kernel for {name}"


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
