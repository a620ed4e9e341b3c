"""Windows of convolutions, as products of codes have them."""

from __future__ import annotations

from torch import fx

from tfqc.analysis.rewrite import name_of
from tfqc.analysis.weighted import WEIGHTED
from tfqc.ir.program import Program


def window_of(program: Program, node: fx.Node) -> tuple[int, int] | None:
    """Height and width of the images that a 3 x 3 convolution or its product reads; None for any other operation."""
    weight = node.args[1] if name_of(node) in WEIGHTED else node.args[4]  # of a product
    kernel, image = (program.tensor_type(n) for n in (weight, node.args[0]))  # type: ignore[arg-type]
    if kernel is None or image is None or tuple(kernel.shape[2:]) != (3, 3):
        return None
    height, width = image.shape[2:]
    return (height, width) if isinstance(height, int) and isinstance(width, int) else None
