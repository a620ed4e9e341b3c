"""Denoiser, compiled by tfqc for CPUs in 8-bit integers. Generated.

`step` is what runs at every timestep, a line for each kernel: k.KERNEL(value, operands...) appends it to the
recording and gives back the memory that it will write; w(name) is a tensor, t(name) packed weights. `begin` runs
once per image, `time` for timesteps that are not in the schedule. `load(directory)` makes the model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tfqc.backends.cpu_int8.runtime.engine import Engine
from tfqc.runtime import Input, Plan, Table
from tfqc.runtime.ops import dequantize_weight, fake_quantize

aten = torch.ops.aten


def step(k: Any, w: Any, t: Any, /, *, sample: Tensor, row: Tensor, unsqueeze_4: Tensor, **_: Tensor) -> Any:
    """One timestep; `row` picks the rows of the tables."""
    sample_nhwc = k.channels_last("sample_nhwc", sample)
    add_2 = k.table_read("add_2", w("table.add_2"), row=row)
    # enter
    sample_q = k.map(
        "sample_q", sample_nhwc, row=row, out_scale=w("act.sample.scale"), out_zero_point=w("act.sample.zero_point"),
        out="u8"
    ); del sample_nhwc
    conv2d = k.qconv(
        "conv2d", sample_q, scale=w("act.sample.scale"), zero_point=w("act.sample.zero_point"), row_in=row,
        weight=t("enter.weight.tiles"), weight_scale=w("enter.weight.scale.flat"), bias=add_2, padding=1, out="bf16"
    ); del sample_q, add_2
    silu = k.norm("silu", conv2d, groups=8, weight=w("norm.weight"), bias=w("norm.bias"), act="silu"); del conv2d
    add_1 = k.torch("add_1", aten.add.Tensor, silu, unsqueeze_4); del silu
    # leave
    add_1_q = k.map(
        "add_1_q", add_1, row=row, out_scale=w("act.add_1.scale"), out_zero_point=w("act.add_1.zero_point"), out="u8"
    ); del add_1
    conv2d_1 = k.qconv(
        "conv2d_1", add_1_q, scale=w("act.add_1.scale"), zero_point=w("act.add_1.zero_point"), row_in=row,
        weight=t("leave.weight.tiles"), weight_scale=w("leave.weight.scale.flat"), bias=w("leave.bias"), padding=1,
        out="bf16"
    ); del add_1_q
    plain_value = k.plain("plain", conv2d_1); del conv2d_1
    return plain_value


def begin(w: Any, /, *, prompt: Tensor, **_: Tensor) -> Any:
    """What is constant over one image, computed once."""
    # text
    prompt_dq = fake_quantize(prompt, w("act.prompt.scale"), w("act.prompt.zero_point"), None, 0, 255)
    linear_1_weight = dequantize_weight(w("text.weight.codes"), w("text.weight.scale"), w("text.weight.zero_point"), 8)
    linear_1 = F.linear(prompt_dq, linear_1_weight, w("text.bias")); del prompt_dq, linear_1_weight
    unsqueeze_3 = linear_1.unsqueeze(2); del linear_1
    unsqueeze_4 = unsqueeze_3.unsqueeze(3); del unsqueeze_3
    return (unsqueeze_4,)


def time(w: Any, /, *, timestep: Tensor, prompt: Tensor, **_: Tensor) -> Any:
    """Temporal features in full precision, for timesteps that the tables do not hold."""
    to = timestep.to(torch.float32)
    unsqueeze = to.unsqueeze(1); del to
    div = unsqueeze / 1000; del unsqueeze
    # time
    linear = F.linear(div, w("time.weight"), w("time.bias")); del div
    unsqueeze_1 = linear.unsqueeze(2); del linear
    unsqueeze_2 = unsqueeze_1.unsqueeze(3); del unsqueeze_1
    reshape = unsqueeze_2.reshape([-1, 32]); del unsqueeze_2
    add_2 = w("enter.bias") + reshape; del reshape
    return (add_2,)


PLAN = Plan(inputs=(Input(name='sample', role='sample', path=('sample',), dtype=torch.float32, shape=('B', 3, 8, 8)),
             Input(name='timestep', role='time', path=('timestep',), dtype=torch.int64, shape=('B',)),
             Input(name='prompt', role='request', path=('prompt',), dtype=torch.float32, shape=('B', 8))),
     arguments=('sample', 'timestep', 'prompt'),
     constants=(),
     guards=(),
     timesteps=(750.0, 500.0, 250.0, 0.0),
     policy='recompute',
     row='row',
     label_rows={},
     per_image=('prompt',),
     tables=(Table(tensor='table.add_2',
                   output=0,
                   encoding='fp',
                   scale='',
                   zero_point='',
                   label='',
                   classes=1),),
     activations=('act.add_1.scale', 'act.add_1.zero_point', 'act.sample.scale', 'act.sample.zero_point'),
     hoisted={'unsqueeze_4': 0},
     request_tables={})

# Where values lie: the buffer, and the first and last line that needs it.
MEMORY = {'add_1_q': (4, 24, 26),
 'conv2d': (2, 21, 22),
 'conv2d_1': (5, 26, 27),
 'plain': (6, 27, 28),
 'sample_nhwc': (0, 17, 19),
 'sample_q': (1, 19, 21),
 'silu': (3, 22, 23)}

# Packed weights: their own shape, groups, whether columns are paired for GEGLU, bits.
TILES = {'enter.weight.tiles': ((32, 3, 3, 3), 1, False, 8), 'leave.weight.tiles': ((3, 32, 3, 3), 1, False, 8)}


class Model(Engine):
    """Denoiser: called with the inputs of the model that was captured."""

    lines = staticmethod(step)

    def begin(self, /, **inputs: Tensor) -> Any:
        """What is constant over one image, computed once."""
        return begin(self.get_tensor, **inputs)

    def time(self, /, **inputs: Tensor) -> Any:
        """Temporal features in full precision, for timesteps that the tables do not hold."""
        return time(self.get_tensor, **inputs)


def load(directory: str | Path, kernels: str | None = None) -> Model:
    """The model, from the directory of its tensors; `kernels` is the text of kernels.cpp, which is
    read beside this file if there is none."""
    text = Path(__file__).with_name("kernels.cpp").read_text() if kernels is None else kernels
    return Model(Path(directory), text, PLAN, MEMORY, TILES, "auto").eval()
