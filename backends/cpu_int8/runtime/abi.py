"""The structs of `kernels/abi.h`, field by field, for ctypes."""

from __future__ import annotations

import ctypes as c
import enum

I32, I64, F32, PTR = c.c_int32, c.c_int64, c.c_float, c.c_void_p


class DType(enum.IntEnum):
    """Of values in memory."""

    F32 = 0
    BF16 = 1
    U8 = 2


class Act(enum.IntEnum):
    """Activation functions that kernels apply on the way."""

    NONE = 0
    SILU = 1
    GELU = 2
    GELU_TANH = 3
    GEGLU = 4


def _struct(name: str, **fields: type) -> type[c.Structure]:
    return type(name, (c.Structure,), {"_fields_": list(fields.items())})


Rows = _struct("Rows", base=PTR, row=I64, entry=I64, token=I64, size=I64)
Quant = _struct("Quant", scale=Rows, zero=Rows)
Epilogue = _struct(
    "Epilogue", bias=Rows, gate=Rows, residual=PTR, out=PTR, residual_ld=I64, out_ld=I64, residual_dtype=I32,
    out_dtype=I32, act=I32, unused=I32, quant=Quant,
)  # fmt: skip
LinearArgs = _struct(
    "LinearArgs", x=PTR, ldx=I64, batch=I64, seq=I64, k=I64, n=I64, quant=Quant, weight=PTR, weight_scale=PTR,
    weight_sum=PTR, epilogue=Epilogue,
)  # fmt: skip
ConvArgs = _struct(
    "ConvArgs", x=PTR, batch=I64, h=I64, w=I64, c=I64, n=I64, kh=I64, kw=I64, stride=I64, pad=I64, groups=I64,
    out_h=I64, out_w=I64, quant=Quant, weight=PTR, weight_scale=PTR, weight_sum=PTR, epilogue=Epilogue,
)  # fmt: skip
NormArgs = _struct(
    "NormArgs", x=PTR, out=PTR, batch=I64, seq=I64, c=I64, groups=I64, weight=Rows, bias=Rows, eps=F32,
    x_dtype=I32, out_dtype=I32, act=I32, quant=Quant,
)  # fmt: skip
MapArgs = _struct(
    "MapArgs", x=PTR, out=PTR, batch=I64, seq=I64, c=I64, ldx=I64, x_dtype=I32, out_dtype=I32, act=I32, unused=I32,
    quant=Quant,
)  # fmt: skip
TokenQuantizeArgs = _struct(
    "TokenQuantizeArgs", x=PTR, out=PTR, scale=PTR, zero=PTR, tokens=I64, c=I64, x_dtype=I32, unused=I32
)
AddArgs = _struct(
    "AddArgs", a=PTR, b=PTR, out=PTR, batch=I64, seq=I64, c=I64, a_entry=I64, b_entry=I64, gate=Rows, a_dtype=I32,
    b_dtype=I32, out_dtype=I32, unused=I32, quant=Quant,
)  # fmt: skip
ConcatArgs = _struct(
    "ConcatArgs", a=PTR, b=PTR, out=PTR, tokens=I64, c=I64, c2=I64, a_dtype=I32, b_dtype=I32, out_dtype=I32, unused=I32
)
UpsampleArgs = _struct("UpsampleArgs", x=PTR, out=PTR, batch=I64, h=I64, w=I64, pixel_bytes=I64, factor=I64)
AttentionArgs = _struct(
    "AttentionArgs", q=PTR, k=PTR, v=PTR, mask=PTR, out=PTR, batch=I64, heads=I64, queries=I64, keys=I64, d=I64,
    q_entry=I64, q_token=I64, q_head=I64, k_entry=I64, k_token=I64, k_head=I64, v_entry=I64, v_token=I64, v_head=I64,
    mask_entry=I64, mask_head=I64, mask_query=I64, mask_key=I64, out_entry=I64, out_token=I64, out_head=I64,
    scale=F32, q_dtype=I32, k_dtype=I32, v_dtype=I32, out_dtype=I32, mode=I32, quant=Quant,
)  # fmt: skip
Command = _struct("Command", run=PTR, args=PTR)
