"""Branches of low rank beside the products of a lowered program, in floating point."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from tfqc.adapters.low_rank import LowRank
from tfqc.ir.edit import Rewriter
from tfqc.ir.match import is_stored
from tfqc.ir.program import Program
from tfqc.ir.views import Conv, Linear, Product, QConv, Tiles
from tfqc.runtime.tiles import unpack

aten, ours = torch.ops.aten, torch.ops.tfqc
_CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
_ENDING: dict[str, Any] = {"row": None, "out_scale": None, "out_zero_point": None, "out": "f32"}


@dataclass
class Branches:
    """Puts branches into one function of a program. Each reads what its layer's own product reads: values that are
    quantized there are quantized for it, too."""

    program: Program
    function: str
    values: dict[tuple[fx.Node, ...], fx.Node] = field(default_factory=dict[tuple[fx.Node, ...], fx.Node])

    def add(self, node: fx.Node, down: str, up: str) -> None:
        """Let the readers of a linear's or convolution's result read it with the branch; `down` and `up` are tensors
        of the program, those of a `LowRank`."""
        edit = Rewriter(self.program, self.function)
        if (product := Product.of(node)) is not None:
            self._add_to_kernel(edit, product, down, up)
            return
        layer = Linear.of(node) or Conv.of(node)
        assert layer is not None
        windows = None if isinstance(layer, Linear) else (layer.stride, layer.padding, layer.dilation)
        readers = list(node.users)
        branch = self._branch(edit, node, layer.input, windows, down, up)
        total = edit.insert(node.next, aten.add.Tensor, node, branch, like=node)
        for reader in readers:
            edit.reread(reader, node, total)

    def _branch(self, edit: Rewriter, at: fx.Node, x: fx.Node, windows: Any, down: str, up: str) -> fx.Node:
        """up(down(x)), before a node."""
        first, second = (self.program.tensor_node(name, self.function) for name in (down, up))
        if windows is None:
            low = edit.insert(at, aten.linear.default, x, first)
            return edit.insert(at, aten.linear.default, low, second)
        convolution = _CONVOLUTIONS[len(self.program.tensors[down].shape) - 3]
        low = edit.insert(at, convolution, x, first, None, *windows)
        return edit.insert(at, convolution, low, second)

    def _add_to_kernel(self, edit: Rewriter, product: Product, down: str, up: str) -> None:
        """act(y + branch) * gate + residual, where kernels compute act(y) * gate + residual.

        Without an activation the branch goes to the residual: y * gate + (branch * gate + residual). An activation is
        taken out of the kernel, to be done on the sum.
        """
        node, conv = product.node, QConv.of(product.node)
        windows = None if conv is None else ([conv.stride] * 2, [conv.padding] * 2)
        branch = self._branch(edit, node, self._values(edit, product), windows, down, up)
        if product.act == "none":
            if product.gate is not None or product.residual is not None:
                branch = edit.insert(node, ours.gated_add.default, branch, product.gate, product.residual)
            edit.update(node, residual=branch)
            return
        alone: dict[str, Any] = {**node.kwargs, "act": "none", "gate": None, "residual": branch, **_ENDING}
        alone["weight"] = self._apart(product)
        total = edit.insert(node, product.target, **alone)
        ending = {name: node.kwargs[name] for name in _ENDING}
        if product.gate is None and product.residual is None:
            edit.become(node, ours.map.default, total, product.act, **ending)
            return
        active = edit.insert(node, ours.map.default, total, product.act, like=node)
        edit.become(node, ours.gated_add.default, active, product.gate, product.residual, **ending)

    def _values(self, edit: Rewriter, product: Product) -> fx.Node:
        """What a kernel multiplies, in f32; made once for all that read the same codes."""
        codes, scale, zero, row = product.codes, product.scale, product.zero_point, product.row_in
        assert scale is not None and zero is not None  # kernels of other targets alone take values as they are
        if (made := self.values.get((codes, scale))) is None:
            if is_stored(scale):
                made = edit.insert(product.node, ours.dequantize.default, codes, scale, zero, row)
            else:  # of each token
                zero, scale = (edit.insert(product.node, aten.unsqueeze.default, n, -1) for n in (zero, scale))
                wide = edit.insert(product.node, aten.to.dtype, codes, torch.float32)
                centred = edit.insert(product.node, aten.sub.Tensor, wide, zero)
                made = edit.insert(product.node, aten.mul.Tensor, centred, scale)
            self.values[codes, product.scale or scale] = made
        return made

    def _apart(self, product: Product) -> fx.Node:
        """The weight of a product that pairs no columns for an activation: codes, to be packed again."""
        tiles = Tiles.of(product.weight)
        if tiles is None or not tiles.paired:
            return product.weight
        packed = str(tiles.packed.target)
        codes = unpack(self.program.tensors[packed], tiles.shape, tiles.groups, True, tiles.bits)
        name = self.program.add_tensor(f"{packed.rpartition('.pairs')[0]}.codes", codes)
        return self.program.tensor_node(name, self.function)


def add_branches(program: Program, adapters: dict[str, LowRank], found: dict[str, list[tuple[str, fx.Node]]]) -> None:
    """Put a branch beside every product of the layers that adapters are for."""
    in_function = {function: Branches(program, function) for function in program.functions}
    for layer, adapter in adapters.items():
        up = adapter.up.reshape(*adapter.up.shape, *[1] * (adapter.down.dim() - 2))
        names = [program.add_tensor(f"{layer}.{name}", t) for name, t in (("lora_A", adapter.down), ("lora_B", up))]
        for function, node in found[layer]:
            in_function[function].add(node, *names)
    program.prune()
