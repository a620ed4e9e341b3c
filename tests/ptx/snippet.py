"""A few lines of PTX as a kernel: each thread reads its entry of the inputs and writes its entry of the output."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tests.ptx.launch import run

HEADER = ".version 8.0\n.target sm_80\n.address_size 64\n"
TEXT = (
    HEADER
    + """.visible .entry snippet({params})
{{
  .reg .b64 %at<{count}>;
  .reg .b32 %tid;
  .reg .pred %p, %q;
  .reg .b32 %t<8>;
  {registers}
  mov.u32 %tid, %tid.x;
  {loads}
  {body}
  {store}
  ret;
}}
"""
)


def compute(body: str, dtype: type[np.generic], **inputs: NDArray) -> NDArray:
    """The register %d, of that type, after `body` has run with the inputs in registers of their names."""
    arrays = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
    (size,) = {array.size for array in arrays.values()}
    arrays["d"] = np.zeros(size, dtype)
    widths = {name: array.itemsize for name, array in arrays.items()}
    at = {
        name: f"ld.param.u64 %at{i}, [p{i}]; mad.wide.u32 %at{i}, %tid, {widths[name]}, %at{i};"
        for i, name in enumerate(arrays)
    }
    kinds = {name: f"b{8 * width}" for name, width in widths.items()}
    last = len(arrays) - 1
    text = TEXT.format(
        params=", ".join(f".param .u64 p{i}" for i in range(len(arrays))),
        count=len(arrays),
        registers=" ".join(f".reg .b{max(8 * widths[name], 16)} %{name};" for name in arrays),
        loads="\n  ".join(
            [f"{at[name]} ld.global.{kinds[name]} %{name}, [%at{i}];" for i, name in enumerate(arrays) if name != "d"]
        ),
        body=body,
        store=f"{at['d']} st.global.{kinds['d']} [%at{last}], %d;",
    )
    run(text, "snippet", (1, 1, 1), (size, 1, 1), list(arrays.values()))
    return arrays["d"]
