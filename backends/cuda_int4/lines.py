"""Lines of an emitted step: which kernel computes an operation, on which values and tensors."""

from __future__ import annotations

from itertools import chain, count
from typing import Any

from torch import fx

from tfqc.analysis.rewrite import is_branch, name_of, operands
from tfqc.backends.cuda_int4.runtime.specialise import Gemm
from tfqc.backends.cuda_int4.selection import PRODUCTS, Selection, is_image
from tfqc.codegen.python.expressions import Stored, expression, value
from tfqc.ir.program import Program
from tfqc.lowering.windows import window_of

_QUANTIZERS = {"tfqc.map.default", "tfqc.quantize_tokens.default"}


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
        name = name_of(node)
        if name in PRODUCTS:
            return self._product(node, k, stored)
        if name not in _QUANTIZERS:
            return expression(node, stored)
        x = _pixels_last(operands(node)["x"], is_image(node), stored)
        if name == "tfqc.quantize_tokens.default":
            return f'{k}.quantize_tokens("{self._use(node, self.selection.tokens(node).name)}", {x})'
        has = operands(node)
        scales = f"{_name(has['out_scale'])}, {_name(has['out_zero_point'])}"
        if (low := self._branch(node)) is not None:
            down = low.args[1]
            assert isinstance(down, fx.Node)
            rank = int(self.program.types[low.name].shape[-1])  # type: ignore[union-attr]
            kernel = self._use(node, self.selection.quantizer(node, False, rank).name)
            return f'{k}.quantize("{kernel}", {x}, {scales}, down={_name(down)})'
        kernels = [self.selection.quantizer(node, windowed) for windowed in self._layouts(node)]
        calls = [f'{k}.quantize("{self._use(node, kernel.name)}", {x}, {scales})' for kernel in kernels]
        return ", ".join(calls)

    def _layouts(self, codes: fx.Node) -> list[bool]:
        """How the products want a value's codes: as rows (False), as images with a border (True), or both."""
        return sorted({window_of(self.program, user) is not None for user in codes.users})

    def _product(self, node: fx.Node, k: str, stored: Stored) -> str:
        has, kernel = operands(node), self.selection.product(node)
        image = name_of(node) == "tfqc.qconv.default"
        codes, low = value(has["codes"], stored), self._branch(has["codes"])
        if name_of(has["codes"]) == "tfqc.map.default" and len(layouts := self._layouts(has["codes"])) > 1:
            codes += f"[{layouts.index(kernel.window is not None)}]"
        if low is not None:
            codes += "[0]"
        operand = has["scale"]
        if operand is None:
            codes, scales = self._values(node, kernel, codes, k), "None"
        elif isinstance(operand, fx.Node) and operand.op == "get_attr":
            scales = f"({_name(operand)}, {_name(has['zero_point'])})"
        else:
            scales = f"({value(operand, stored)}, {value(has['zero_point'], stored)})"
        parts = [
            f'"{self._use(node, kernel.name)}"',
            codes,
            f'"{self._weight(str(has["weight"].target), kernel)}"',
            _name(has["weight_scale"]),
            scales,
        ]
        if (bias := has["bias"]) is not None:
            parts.append(f"bias={_name(bias if bias.op == 'get_attr' else bias.args[0])}")
        if has.get("up") is not None:
            branch = f"{value(has['codes'], stored)}[1]" if has["low"] is low else value(has["low"], stored)
            parts.append(f"low={branch}, up={_name(has['up'])}")
        if has["residual"] is not None:
            parts.append(f"residual={_pixels_last(has['residual'], image, stored)}")
        if has["out_scale"] is not None:
            parts.append(f"out_scales=({_name(has['out_scale'])}, {_name(has['out_zero_point'])})")
        return f"{k}.product({', '.join(parts)})" + (
            ".permute(0, 3, 1, 2)" if image and kernel.epilogue.out == "f16" else ""
        )

    def _values(self, product: fx.Node, kernel: Gemm, x: str, k: str) -> str:
        """Values f16 as a product reads them."""
        pixels = f"{x}.permute(0, 2, 3, 1)" if name_of(product) == "tfqc.qconv.default" else x
        copier = self.selection.copier(product, kernel.window is not None)
        return pixels if copier is None else f'{k}.copy("{copier.name}", {pixels})'

    def _branch(self, codes: Any) -> fx.Node | None:
        """The product `x @ down` that whatever quantizes x computes on the way; None if it does not."""
        if name_of(codes) != "tfqc.map.default" or self._layouts(codes) != [False] or is_image(codes):
            return None
        lows = {operands(user).get("low") for user in codes.users} - {None}
        low = lows.pop() if len(lows) == 1 else None
        return low if low is not None and is_branch(low) and low.args[0] is codes.args[0] else None

    def is_done(self, node: fx.Node) -> bool:
        """True for a product `x @ down` that needs no line of its own."""
        products = [u for u in node.users if name_of(u) == "tfqc.qlinear.default"]
        return (
            is_branch(node)
            and len(products) == len(node.users)
            and all(self._branch(operands(u)["codes"]) is node for u in products)
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


def _name(tensor: fx.Node) -> str:
    return f'"{tensor.target}"'


def _form(kernel: Gemm) -> tuple[object, ...]:
    """What the order of packed weights depends on."""
    return kernel.mode, kernel.tile.n, kernel.paired, kernel.window is None, kernel.group
