"""What the stored vectors hold, as lines; `python -m tests.cuda.vectors` writes the file that ships with tfqc."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch

from tests.cuda.kernels import F16, F32, Array, Problem, eighths, quantize, two_a_byte
from tfqc.backends.cuda_int4.checking.vectors import FILE, Tolerance, Vector, to_bytes
from tfqc.backends.cuda_int4.runtime import pack
from tfqc.backends.cuda_int4.runtime.specialise import Body, Epilogue, Gemm, Mode, Quantize, Rows, Tile, Window
from tfqc.runtime.kernel_ops import quantize_tokens

# mode, body, inputs in a group.
KINDS: dict[str, tuple[Mode, Body, Literal[128] | None]] = {
    "s4": ("w4a4", "s4", None),
    "nibble": ("w4a4", "nibble", None),
    "auto": ("w4a4", "auto", None),
    "w4a8": ("w4a8", "nibble", None),
    "half": ("w4a16", "half", None),
    "s4-groups": ("w4a4", "s4", 128),
    "w4a8-groups": ("w4a8", "nibble", 128),
    "half-groups": ("w4a16", "half", 128),
}
SMALL = Tile(m=64, n=64)
INVERSE = np.array([0.5, 40, 1e6], F32)

# n, k, rows, epilogue, tile: with each body.
LINEAR: list[tuple[int, int, int, Epilogue, Tile]] = [
    (33, 416, 8, Epilogue("step", out="s32"), SMALL),  # the ring goes round, and has half a unit at its end
    (40, 64, 12, Epilogue("step", "step", residual=True), Tile()),
    (37, 64, 12, Epilogue("one", "one", residual=True), SMALL),  # no row begins at an aligned address
    (40, 64, 12, Epilogue("step", "step", out="u4"), SMALL),
    (37, 64, 12, Epilogue("one", residual=True, out="u8", out_scales="one"), SMALL),
]

# kind, n, k, rows, epilogue, tile.
MORE: list[tuple[str, int, int, int, Epilogue, Tile]] = [
    ("s4", 66, 64, 65, Epilogue("step", out="u4"), SMALL),  # four blocks
    ("auto", 40, 64, 12, Epilogue("step", out="s32"), Tile(m=128, n=64, row_bytes=128, stages=2)),
    ("half", 40, 96, 12, Epilogue("one", "step", residual=True), SMALL),
    ("s4", 40, 64, 12, Epilogue("step", "one", rank=32), SMALL),
    ("s4-groups", 40, 160, 12, Epilogue("step", "one", residual=True), SMALL),
    ("w4a8-groups", 37, 160, 12, Epilogue("token", "one", out="u8"), SMALL),
    ("half-groups", 40, 160, 12, Epilogue("one", "one"), SMALL),
    ("s4", 40, 64, 20, Epilogue("step", "step", "silu", residual=True), SMALL),
    ("nibble", 36, 64, 20, Epilogue("one", activation="gelu"), SMALL),
    ("auto", 36, 64, 20, Epilogue("one", activation="gelu_tanh"), SMALL),
    ("w4a8", 80, 64, 20, Epilogue("token", "one", "geglu", residual=True), SMALL),
    ("s4", 80, 64, 20, Epilogue("step", "step", "geglu", out="u4"), SMALL),
    ("nibble", 40, 64, 20, Epilogue("step", "one", "silu", out="u4"), SMALL),
    ("w4a8", 40, 64, 20, Epilogue("step", "step", "gelu", out="u8"), SMALL),
]

# kind, n, images, window, epilogue: over 32 channels.
CONVOLUTIONS: list[tuple[str, int, int, Window, Epilogue]] = [
    ("s4", 36, 2, Window(3, 5), Epilogue("step", "step", residual=True)),
    ("w4a8", 33, 1, Window(5, 7, 2), Epilogue("one", "one", residual=True)),
]

# k, bits, scales, height and width of an image, rank.
QUANTIZE: list[tuple[int, Literal[4, 8, 16], Rows, tuple[int, int] | None, int]] = [
    (72, 4, "step", None, 0),
    (70, 8, "one", None, 0),
    (33, 4, "one", None, 0),
    (264, 8, "token", None, 0),
    (37, 4, "token", None, 0),
    (40, 4, "step", (3, 4), 0),
    (33, 8, "step", (3, 4), 0),
    (33, 16, "step", (3, 4), 0),
    (72, 4, "step", None, 32),
]


def vectors() -> Iterator[Vector]:
    """All of them."""
    for kind in ("s4", "nibble", "w4a8"):
        for n, k, rows, end, tile in LINEAR:
            yield of_product(_product(kind, n, k, end, tile), rows)
    for kind, n, k, rows, end, tile in MORE:
        yield of_product(_product(kind, n, k, end, tile), rows)
    for kind, n, images, window, end in CONVOLUTIONS:
        kernel = _product(kind, n, 9 * 32, end, SMALL, window)
        size = (images, window.height + 2, window.width + 2, 32)
        image = np.random.default_rng(n).integers(0, 2**kernel.a_bits, size, np.uint8)
        rows = images * -(-window.height // window.stride) * -(-window.width // window.stride)
        yield of_product(kernel, rows, image)
    for k, bits, scales, image, rank in QUANTIZE:
        name = f"tfqc_quantize_{'image' if image else 'rows'}_{k}_u{bits}_{scales}" + (f"_rank{rank}" if rank else "")
        yield of_quantize(Quantize(name, k, bits, scales, image, rank))


def of_product(kernel: Gemm, rows: int, image: Array | None = None, step: int = 1) -> Vector:
    """A product's numbers at a step, and what comes of them."""
    problem, end = Problem(kernel, rows, image), kernel.epilogue
    weight, tile_n, paired = torch.from_numpy(problem.weight), kernel.tile.n, kernel.paired

    def columns(values: Array) -> Array:
        return pack.columns(torch.from_numpy(values), tile_n, paired).numpy()

    a = problem.rows if image is None else image
    codes = end.out in ("u4", "u8")
    scales = end.scales if kernel.mode != "w4a16" else "one"
    stepped = "step" in (scales, end.bias) or (codes and end.out_scales == "step")
    inputs = {
        "a": two_a_byte(a) if kernel.a_bits == 4 else a,
        "weight": pack.pack(weight, kernel.mode, tile_n, paired).numpy(),
    }
    if kernel.mode != "w4a16":
        inputs |= {"weight_sum": pack.weight_sums(weight, tile_n, paired, kernel.group).numpy(), "zero": problem.zero}
        inputs |= {"scale": problem.scale} if end.out != "s32" else {}
    inputs |= {"weight_scale": columns(problem.weight_scale)} if end.out != "s32" else {}
    inputs |= {"bias": columns(problem.bias)} if end.bias != "none" else {}
    inputs |= {"step": np.array([step], np.int32)} if stepped else {}
    inputs |= {"residual": problem.residual} if end.residual else {}
    if end.rank:
        inputs |= {"low": problem.low, "up": pack.pack_up(torch.from_numpy(problem.up), tile_n, paired).numpy()}
    inputs |= {"out_inverse": problem.out_inverse, "out_zero": problem.out_zero} if codes else {}
    want = problem.want(step)
    approximate = end.activation != "none" or end.rank > 0  # tensor cores add f32 with a rounding of their own
    if end.out == "s32":
        out, tolerance = problem.sums(step), Tolerance()
    elif end.out == "f16":
        slack = float(np.abs(want).max()) * 2.0**-20 if approximate else 0.0
        out, tolerance = want.astype(F16), Tolerance(steps=1, slack=slack)
    else:
        found = problem.codes(want, step)
        zero = problem.out_zero[step if end.out_scales == "step" else 0]
        out = np.full((rows, -(-found.shape[1] // 32) * 32), zero, np.uint8)
        out[:, : found.shape[1]] = found
        out = two_a_byte(out) if end.out == "u4" else out
        tolerance = Tolerance(steps=1, share=0.002) if approximate else Tolerance()
    return Vector(kernel, rows, inputs, {"out": out}, tolerance)


def of_quantize(kernel: Quantize, step: int = 1) -> Vector:
    """Values, among them some that are rounded to the even code or bounded, and their codes."""
    batch, (height, width) = (2, kernel.image) if kernel.image else (1, (3, 3))
    make = np.random.default_rng(kernel.k)
    x = make.normal(size=(batch, height, width, kernel.k)).astype(F16)
    top, pitch = 2**kernel.bits - 1, -(-kernel.k // 32) * 32
    if kernel.scales == "token":
        rows = x.reshape(-1, kernel.k)
        rows[1], rows[2], rows[3] = 0, np.abs(rows[2]), -np.abs(rows[3])
        codes, scale, zero = (part.numpy() for part in quantize_tokens(torch.from_numpy(rows), kernel.bits))
        padded = np.broadcast_to(zero[:, None], (len(rows), pitch)).astype(np.uint8)
        padded[:, : kernel.k] = codes
        out = {"scale": scale, "zero": zero, "out": two_a_byte(padded) if kernel.bits == 4 else padded}
        return Vector(kernel, len(rows), {"x": rows}, out)
    if kernel.rank:
        x = eighths(make, *x.shape)
    else:
        x[0, 0, 0, :6] = [0.5, 1.5, -0.5, np.inf, -np.inf, 65504]
    border = 1 if kernel.image else 0
    shape = batch, height + 2 * border, width + 2 * border, pitch
    inside = slice(None), slice(border, height + border), slice(border, width + border), slice(kernel.k)
    rows = math.prod(shape[:3])
    if kernel.bits == 16:
        out = np.zeros(shape, F16)
        out[inside] = x
        return Vector(kernel, rows, {"x": x}, {"out": out})
    stepped = kernel.scales == "step"
    inverse = INVERSE if stepped else np.ones(1, F32)
    zero = np.array([0, 7, top] if stepped else [3], np.int32)
    row = step if stepped else 0
    codes = np.full(shape, zero[row], np.uint8)
    codes[inside] = quantize(x.astype(F32), inverse[row], zero[row], top)
    inputs = {"x": x, "inverse": inverse, "zero": zero} | ({"step": np.array([step], np.int32)} if stepped else {})
    outputs = {"out": two_a_byte(codes) if kernel.bits == 4 else codes}
    if kernel.rank:
        down = eighths(make, kernel.k, kernel.rank)
        inputs |= {"down": pack.pack_down(torch.from_numpy(down)).numpy()}
        outputs |= {"low": (x.astype(np.float64) @ down.astype(np.float64)).reshape(rows, -1).astype(F16)}
    return Vector(kernel, rows, inputs, outputs)


def _product(kind: str, n: int, k: int, end: Epilogue, tile: Tile = SMALL, window: Window | None = None) -> Gemm:
    where = "linear" if window is None else f"conv{window.stride}"
    mode, body, group = KINDS[kind]
    words = ["tfqc", kind.replace("-", "_"), where, f"{n}x{k}", f"{tile.m}x{tile.n}", end.scales]
    words += ["bias"] * (end.bias != "none") + [end.activation] * (end.activation != "none")
    words += ["residual"] * end.residual + [f"rank{end.rank}"] * (end.rank > 0) + [end.out]
    return Gemm("_".join(words), n, k, mode, body, end, window, tile, group)


if __name__ == "__main__":
    FILE.write_bytes(to_bytes(vectors()))
    print(f"{FILE}: {FILE.stat().st_size} bytes")
