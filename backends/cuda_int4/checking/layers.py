"""Which kernels are timed, at how many rows: those of a step of SDXL, or of an artifact."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import fx

from tfqc.backends.cuda_int4.runtime.specialise import Epilogue, Gemm, Kernel, Mode, Quantize, Window, body_for
from tfqc.ir.program import Program
from tfqc.ir.types import TensorType, evaluate

IMAGES = 2  # one, with guidance

# Every quantized product of a step at 1024 x 1024, as bench/gpu_layers.py reads them from the exported model: how
# often, what, rows x columns x inputs, and what its epilogue does.
_SDXL = """
  5 conv3x3 32768x320x2880 bias              40 linear 8192x640x640
  2 conv3x3 32768x320x2880 bias residual      5 linear 8192x640x640 bias
  2 conv3x3 32768x320x5760 bias              25 linear 8192x640x640 bias residual
  1 conv3x3 32768x320x8640 bias              10 linear 8192x5120x640 bias geglu codes
  1 conv3x3 32768x640x5760 bias               5 linear 8192x640x2560 bias residual
  1 conv3x3/2 8192x320x2880 bias              5 linear 8192x640x2560 bias residual codes
  1 conv3x3 8192x640x2880 bias                6 linear 2048x1280x1280 bias
  5 conv3x3 8192x640x5760 bias              240 linear 2048x1280x1280
  1 conv3x3 8192x640x5760 bias residual     126 linear 2048x1280x1280 bias residual
  1 conv3x3 8192x640x8640 bias               60 linear 2048x10240x1280 bias geglu codes
  1 conv3x3 8192x640x11520 bias              54 linear 2048x1280x5120 bias residual
  1 conv3x3 8192x640x17280 bias               6 linear 2048x1280x5120 bias residual codes
  1 conv3x3 8192x1280x11520 bias              2 conv1x1 32768x320x640 bias residual
  1 conv3x3/2 2048x640x5760 bias              1 conv1x1 32768x320x960 bias residual
  1 conv3x3 2048x1280x5760 bias               1 conv1x1 8192x640x320 bias residual
  7 conv3x3 2048x1280x11520 bias              1 conv1x1 8192x640x960 bias residual
  3 conv3x3 2048x1280x11520 bias residual     1 conv1x1 8192x640x1280 bias residual
  1 conv3x3 2048x1280x17280 bias              1 conv1x1 8192x640x1920 bias residual
  2 conv3x3 2048x1280x23040 bias              1 conv1x1 2048x1280x640 bias residual
                                              1 conv1x1 2048x1280x1920 bias residual
                                              2 conv1x1 2048x1280x2560 bias residual
"""
_LINE = re.compile(r"(\d+) ((conv3x3|conv1x1|linear)(/2)? (\d+)x(\d+)x(\d+)((?: [a-z]+)*))")
_QUANTIZED = ((8192, 640), (2048, 1280), (8192, 2560))  # rows x values: of tokens, and of the pixels below
_IMAGES = ((128, 320), (64, 640), (32, 1280))  # height and width, channels


@dataclass(frozen=True)
class Layer:
    """A kernel at so many rows, `count` times in a step. Its name is that of the modelled report."""

    name: str
    count: int
    kernel: Kernel
    rows: int

    @property
    def images(self) -> int:
        """Of a convolution's input."""
        assert isinstance(self.kernel, Gemm)
        window = self.kernel.window
        return self.rows // math.prod(window.out) if window is not None else 1


def sdxl_layers(mode: Mode, arch: str) -> list[Layer]:
    """Products of a step for two images, with what is best on a chip, and kernels that quantize their inputs."""
    codes: Literal["u4", "u8", "f16"] = "u4" if mode == "w4a4" else "u8" if mode == "w4a8" else "f16"
    found: list[Layer] = []
    for count, name, kind, stride, *sizes, does in _LINE.findall(_SDXL):
        m, n, k = map(int, sizes)
        step = 2 if stride else 1
        side = math.isqrt(m // IMAGES) * step
        end = Epilogue(
            bias="one" if "bias" in does else "none",
            activation="geglu" if "geglu" in does else "none",
            residual="residual" in does,
            out=codes if "codes" in does else "f16",
        )
        window = Window(side, side, step) if kind == "conv3x3" else None
        kernel = Gemm(f"tfqc_{mode}_{len(found)}", n, k, mode, body_for(arch, mode), end, window)
        found.append(Layer(name, int(count), kernel, m))
    return [*found, *_quantizers(mode)]


def _quantizers(mode: Mode) -> Iterator[Layer]:
    """For f16 products, what gives images a border."""
    bits: Literal[4, 8, 16] = 4 if mode == "w4a4" else 8 if mode == "w4a8" else 16
    for rows, k in _QUANTIZED if bits < 16 else ():
        for kernel in (Quantize(f"tfqc_rows_{k}", k, bits), Quantize(f"tfqc_tokens_{k}", k, bits, "token")):
            yield Layer(_name(kernel, rows), 1, kernel, rows)
    for side, k in _IMAGES:
        kernel, rows = Quantize(f"tfqc_image_{k}", k, bits, "step", (side, side)), IMAGES * (side + 2) ** 2
        yield Layer(_name(kernel, rows), 1, kernel, rows)


def program_layers(program: Program, used: Mapping[str, str], kernels: Sequence[Kernel]) -> list[Layer]:
    """An artifact's: which kernel computes which value (`used`), for two images.

    Raises:
        IRError: sizes other than the batch are open.
    """
    by_name = {kernel.name: kernel for kernel in kernels}
    counts: Counter[tuple[Kernel, int]] = Counter()
    for node in program.step.nodes:
        if (kernel := by_name.get(used.get(node.name, ""))) is not None:
            counts[kernel, _rows(program, node, kernel)] += 1
    return [Layer(_name(kernel, rows), count, kernel, rows) for (kernel, rows), count in counts.items()]


def _rows(program: Program, node: fx.Node, kernel: Kernel) -> int:
    """Of a product's output, or of what is quantized."""
    value: Any = node.kwargs["x"] if isinstance(kernel, Quantize) else node
    type_ = program.types[value.name]
    assert isinstance(type_, TensorType)
    numbers = math.prod(evaluate(size, {"B": IMAGES}) for size in type_.shape)
    if isinstance(kernel, Gemm):
        return numbers // (kernel.n // 2 if kernel.paired else kernel.n)
    if kernel.image is None:
        return numbers // kernel.k
    height, width = kernel.image
    return numbers // (kernel.k * height * width) * (height + 2) * (width + 2)


def _name(kernel: Kernel, rows: int) -> str:
    return " ".join(_words(kernel, rows))


def _words(kernel: Kernel, rows: int) -> Iterator[str]:
    if isinstance(kernel, Quantize):
        yield "quantize"
        yield f"{rows}x{kernel.k}"
        yield from ["tokens"] if kernel.scales == "token" else ["border"] if kernel.image else []
        return
    end, window = kernel.epilogue, kernel.window
    if window is not None:
        yield "conv3x3/2" if window.stride == 2 else "conv3x3"
    else:
        yield "conv1x1" if kernel.name.startswith("tfqc_conv1x1") else "linear"
    yield f"{rows}x{kernel.n}x{kernel.k}"
    yield from ["bias"] if end.bias != "none" else []
    yield from [end.activation] if end.activation != "none" else []
    yield from ["residual"] if end.residual else []
    yield from ["codes"] if end.out in ("u4", "u8") else []
