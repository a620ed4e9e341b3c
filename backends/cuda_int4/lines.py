"""Lines of an emitted step: which kernel computes an operation, on which values and tensors."""

from __future__ import annotations

from itertools import chain, count

from torch import fx

from tfqc.backends.cuda_int4.runtime.specialise import Gemm
from tfqc.backends.cuda_int4.selection import Selection, is_image
from tfqc.codegen.python.expressions import Stored, expression, value
from tfqc.ir.match import is_stored
from tfqc.ir.program import Program
from tfqc.ir.views import Map, MatMul, Product, QuantizeTokens, TableRead
from tfqc.lowering.values import branch_of
from tfqc.lowering.windows import window_of


class Lines:
    """Writes the operations of a step. `used` says which kernel computes which value; `packed`, by the name under which
    weights are packed, the tensor of their codes and a kernel that multiplies by them.
    """

    def __init__(self, program: Program, arch: str) -> None:
        self.program, self.selection = program, Selection(program, arch)
        self.used: dict[str, str] = {}
        self.packed: dict[str, tuple[str, Gemm]] = {}

    def write(self, node: fx.Node, k: str, stored: Stored) -> str:
        """One operation of a step: a kernel, or torch."""
        if product := Product.of(node):
            return self._product(product, k, stored)
        if tokens := QuantizeTokens.of(node):
            x = _pixels_last(tokens.x, is_image(node), stored)
            return f'{k}.quantize_tokens("{self._use(node, self.selection.tokens(tokens).name)}", {x})'
        codes = Map.of(node)
        if codes is None:
            return expression(node, stored)
        x = _pixels_last(codes.x, is_image(node), stored)
        scales = f"{_name(codes.out_scale)}, {_name(codes.out_zero_point)}"
        if (low := self._branch(node)) is not None:
            rank = int(self.program.types[low.node.name].shape[-1])  # type: ignore[union-attr]
            kernel = self._use(node, self.selection.quantizer(codes, False, rank).name)
            return f'{k}.quantize("{kernel}", {x}, {scales}, down={_name(low.other)})'
        kernels = [self.selection.quantizer(codes, windowed) for windowed in self._layouts(node)]
        calls = [f'{k}.quantize("{self._use(node, kernel.name)}", {x}, {scales})' for kernel in kernels]
        return ", ".join(calls)

    def _layouts(self, codes: fx.Node) -> list[bool]:
        """How the products want a value's codes: as rows (False), as images with a border (True), or both."""
        return sorted({window_of(self.program, user) is not None for user in codes.users})

    def _product(self, product: Product, k: str, stored: Stored) -> str:
        node, kernel, image = product.node, self.selection.product(product), not product.is_linear
        codes, low = value(product.codes, stored), self._branch(product.codes)
        if Map.of(product.codes) and len(layouts := self._layouts(product.codes)) > 1:
            codes += f"[{layouts.index(kernel.window is not None)}]"
        if low is not None:
            codes += "[0]"
        if product.scale is None:
            codes, scales = self._values(product, kernel, codes, k), "None"
        elif is_stored(product.scale):
            scales = f"({_name(product.scale)}, {_name(product.zero_point)})"
        else:
            scales = f"({value(product.scale, stored)}, {value(product.zero_point, stored)})"
        parts = [
            f'"{self._use(node, kernel.name)}"',
            codes,
            f'"{self._weight(str(product.weight.target), kernel)}"',
            _name(product.weight_scale),
            scales,
        ]
        if (bias := product.bias) is not None:
            table = TableRead.of(bias)
            parts.append(f"bias={_name(table.table if table else bias)}")
        if product.up is not None:
            on_the_way = low is not None and product.low is low.node
            branch = f"{value(product.codes, stored)}[1]" if on_the_way else value(product.low, stored)
            parts.append(f"low={branch}, up={_name(product.up)}")
        if product.residual is not None:
            parts.append(f"residual={_pixels_last(product.residual, image, stored)}")
        if product.out_scale is not None:
            parts.append(f"out_scales=({_name(product.out_scale)}, {_name(product.out_zero_point)})")
        return f"{k}.product({', '.join(parts)})" + (
            ".permute(0, 3, 1, 2)" if image and kernel.epilogue.out == "f16" else ""
        )

    def _values(self, product: Product, kernel: Gemm, x: str, k: str) -> str:
        """Values f16 as a product reads them."""
        pixels = x if product.is_linear else f"{x}.permute(0, 2, 3, 1)"
        copier = self.selection.copier(product, kernel.window is not None)
        return pixels if copier is None else f'{k}.copy("{copier.name}", {pixels})'

    def _branch(self, codes: fx.Node) -> MatMul | None:
        """The product `x @ down` that whatever quantizes x computes on the way; None if it does not."""
        made = Map.of(codes)
        if made is None or self._layouts(codes) != [False] or is_image(codes):
            return None
        lows = {p.low: None for user in codes.users if (p := Product.of(user)) and p.low is not None}
        low = branch_of(next(iter(lows))) if len(lows) == 1 else None
        return low if low is not None and low.self_ is made.x else None

    def is_done(self, node: fx.Node) -> bool:
        """True for a product `x @ down` that needs no line of its own."""
        readers = [product for u in node.users if (product := Product.of(u)) and product.is_linear]
        branches = [self._branch(product.codes) for product in readers]
        return (
            branch_of(node) is not None
            and len(readers) == len(node.users)
            and all(branch is not None and branch.node is node for branch in branches)
        )

    def _weight(self, codes: str, kernel: Gemm) -> str:
        """The name of a packed weight; one that is packed in two ways has two."""
        base = codes.removesuffix(".codes")
        for name in chain([base], (f"{base}.{number}" for number in count(1))):
            tensor, other = self.packed.setdefault(name, (codes, kernel))
            if tensor == codes and _form(other) == _form(kernel):
                return name
        raise AssertionError

    def _use(self, node: fx.Node, kernel: str) -> str:
        self.used[node.name] = kernel
        return kernel


def _pixels_last(image: fx.Node, is_image: bool, stored: Stored) -> str:
    return value(image, stored) + (".permute(0, 2, 3, 1)" if is_image else "")


def _name(tensor: fx.Node | None) -> str:
    assert tensor is not None
    return f'"{tensor.target}"'


def _form(kernel: Gemm) -> tuple[object, ...]:
    """What the order of packed weights depends on."""
    return kernel.mode, kernel.tile.n, kernel.paired, kernel.window is None, kernel.group
