"""Where a program computes what a layer of the model did: by the name of the weight that is multiplied by."""

from __future__ import annotations

import re
from collections.abc import Collection

from torch import fx

from tfqc.ir.match import is_stored
from tfqc.ir.program import Program
from tfqc.ir.views import Conv, Linear, Product, StoredWeight, Tiles, stored_in

# What weights are called whose product is the layer's: the model's own; what split-low-rank leaves of it, to whose
# product the other part is added; codes of either. Others that passes have made (`weight.part0`) multiply other values.
_WHOLE = re.compile(
    r"(.+?)(?:\.base_layer)?\.weight(?:\.\d+)?(?:\.rest)?(?:\.\d+)?(?:\.(?:codes|packed|tiles4?|pairs4?)(?:\.\d+)?)?"
)
Place = tuple[str, fx.Node]  # a function, and the product in it


def places(program: Program, layers: Collection[str]) -> dict[str, list[Place]]:
    """Products of each layer in each function; of a layer that the program does not compute as it was, none.

    Args:
        layers: names of modules in the model that was captured.
    """
    found: dict[str, list[Place]] = {layer: [] for layer in layers}
    for function in program.functions:
        for node in program.nodes(function):
            weight = _weight(node)
            match = None if weight is None else _WHOLE.fullmatch(weight)
            if match and match[1] in found:
                found[match[1]].append((function, node))
    return found


def _weight(node: fx.Node) -> str | None:
    """The stored tensor that holds the weight of a product; None for any other node."""
    if (product := Product.of(node)) is not None:
        tiles = Tiles.of(product.weight)
        weight = product.weight if tiles is None else tiles.packed
        return str(weight.target) if is_stored(weight) else None
    layer = Linear.of(node) or Conv.of(node)
    if layer is None:
        return None
    codes = StoredWeight.of(layer.weight)
    return stored_in(layer.weight) if codes is None else str(codes.codes.target)
