"""Windows of convolutions, as products of codes have them."""

from __future__ import annotations

from torch import fx

from tfqc.ir.program import Program
from tfqc.ir.views import Conv, Product


def window_of(program: Program, node: fx.Node) -> tuple[int, int] | None:
    """Height and width of the images that a 3 x 3 convolution or its product reads; None for any other operation."""
    if product := Product.of(node):
        weight, read = product.weight, product.codes
    elif conv := Conv.of(node):
        weight, read = conv.weight, conv.input
    else:
        return None
    kernel, image = program.tensor_type(weight), program.tensor_type(read)
    if kernel is None or image is None or tuple(kernel.shape[2:]) != (3, 3):
        return None
    height, width = image.shape[2:]
    return (height, width) if isinstance(height, int) and isinstance(width, int) else None
