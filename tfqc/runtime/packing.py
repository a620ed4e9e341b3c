"""Two 4-bit values per byte, exactly and reversibly."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tfqc.errors import TfqcError


def pack_int4(q: Tensor, *, signed: bool = True) -> Tensor:
    """Packs int8 values -8..7 (`signed`) or 0..15 of any shape into uint8 [ceil(n / 2)].

    Row-major order; the even element is the low nibble (as in ONNX);
    an odd count leaves the last high nibble zero. Signed values are two's complement. Raises TfqcError for
    other dtypes and values out of range.
    """
    if q.dtype != torch.int8:
        raise TfqcError(f"pack_int4 takes int8 values, not {q.dtype}")
    low, high = (-8, 7) if signed else (0, 15)
    if not bool(((q >= low) & (q <= high)).all()):
        raise TfqcError(f"pack_int4(signed={signed}) takes values {low}..{high}, not {int(q.min())}..{int(q.max())}")
    nibbles = (q.flatten() & 0xF).to(torch.uint8)
    nibbles = torch.nn.functional.pad(nibbles, (0, nibbles.numel() % 2))
    return nibbles[0::2] | (nibbles[1::2] << 4)


def unpack_int4(packed: Tensor, shape: Sequence[int], *, signed: bool = True) -> Tensor:
    """The int8 tensor of `shape` that `pack_int4` packed with the same `signed`.

    Raises TfqcError if `packed` is not uint8 of the length that `shape` needs, or if a padding nibble is not
    zero.
    """
    count = torch.Size(shape).numel()
    if packed.dtype != torch.uint8 or tuple(packed.shape) != ((count + 1) // 2,):
        raise TfqcError(
            f"int4 values of shape {list(shape)} are packed as uint8 {[(count + 1) // 2]}, "
            f"not {packed.dtype} {list(packed.shape)}"
        )
    nibbles = torch.stack([packed & 0xF, packed >> 4], dim=1).flatten()
    if bool(nibbles[count:].any()):
        raise TfqcError(f"packed int4 values of shape {list(shape)} have a padding nibble that is not 0: wrong shape?")
    values = nibbles[:count].to(torch.int8).reshape(torch.Size(shape))
    return (values ^ 8) - 8 if signed else values  # sign extension: flipping bit 3 adds 8 modulo 16
