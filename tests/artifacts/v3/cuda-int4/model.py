"""Denoiser, compiled by tfqc for CUDA devices in 4-bit integers. Generated.

`step` is what runs at every timestep: k.product, k.quantize and k.quantize_tokens launch the kernel of that name,
everything else is torch in f16; w(name) is a tensor. `begin` runs once per image, `time` for timesteps that are
not in the schedule. `load(directory)` makes the model, which builds `kernels.cu`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tfqc.backends.cuda_int4.runtime.engine import Engine
from tfqc.backends.cuda_int4.runtime.specialise import Epilogue, Gemm, Quantize, Tile, Window
from tfqc.runtime import Input, Plan, Table
from tfqc.runtime.kernel_ops import channels_last, plain
from tfqc.runtime.ops import conv2d_rows, dequantize_weight, dequantize_weight_int4, fake_quantize, table_read

aten = torch.ops.aten


def step(k: Any, w: Any, /, *, sample: Tensor, row: Tensor, unsqueeze_4: Tensor, **_: Tensor) -> Any:
    """One timestep; `row` picks the rows of the tables."""
    sample_f16 = sample.to(torch.float16)
    sample_nhwc = channels_last(sample_f16); del sample_f16
    sample_nhwc_f32 = sample_nhwc.to(torch.float32); del sample_nhwc
    add_2 = table_read(w("table.add_2"), row)
    add_2_f16 = add_2.to(torch.float16); del add_2
    # enter
    sample_dq = fake_quantize(
        sample_nhwc_f32, w("act.sample.scale"), w("act.sample.zero_point"), row, 0, 255
    ); del sample_nhwc_f32
    sample_dq_f16 = sample_dq.to(torch.float16); del sample_dq
    conv2d = conv2d_rows(
        sample_dq_f16, w("conv2d_weight_f16"), add_2_f16, [1, 1], [1, 1], [1, 1], 1
    ); del sample_dq_f16, add_2_f16
    # norm
    group_norm = F.group_norm(conv2d, 8, w("norm.weight.f16"), w("norm.bias.f16")); del conv2d
    silu = F.silu(group_norm); del group_norm
    unsqueeze_4_f16 = unsqueeze_4.to(torch.float16)
    add_1 = silu + unsqueeze_4_f16; del silu, unsqueeze_4_f16
    add_1_f32 = add_1.to(torch.float32); del add_1
    # leave
    add_1_dq = fake_quantize(add_1_f32, w("act.add_1.scale"), w("act.add_1.zero_point"), row, 0, 255); del add_1_f32
    add_1_dq_f16 = add_1_dq.to(torch.float16); del add_1_dq
    conv2d_1 = F.conv2d(add_1_dq_f16, w("conv2d_1_weight_f16"), w("leave.bias.f16"), padding=[1, 1]); del add_1_dq_f16
    plain_value = plain(conv2d_1); del conv2d_1
    return plain_value


def begin(w: Any, /, *, prompt: Tensor, **_: Tensor) -> Any:
    """What is constant over one image, computed once."""
    # text
    prompt_dq = fake_quantize(prompt, w("act.prompt.scale"), w("act.prompt.zero_point"), None, 0, 15)
    linear_1 = F.linear(prompt_dq, w("linear_1_weight"), w("text.bias")); del prompt_dq
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


def constants(w: Any, /) -> dict[str, Tensor]:
    """What needs no input, computed when the model is loaded: weights that torch reads."""
    made = {}
    made["conv2d_weight"] = dequantize_weight(w("enter.weight.codes"), w("enter.weight.scale"), w("enter.weight.zero_point"), 27)
    made["conv2d_weight_f16"] = made["conv2d_weight"].to(torch.float16)
    made["conv2d_1_weight"] = dequantize_weight(w("leave.weight.codes"), w("leave.weight.scale"), w("leave.weight.zero_point"), 288)
    made["conv2d_1_weight_f16"] = made["conv2d_1_weight"].to(torch.float16)
    made["linear_1_weight"] = dequantize_weight_int4(w("text.weight.packed"), w("text.weight.scale"), w("text.weight.zero_point"), 8, [32, 8])
    return {name: made[name] for name in ['conv2d_weight_f16', 'conv2d_1_weight_f16', 'linear_1_weight']}


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

# What kernels.cu holds.
KERNELS = [
]

# Which dimension of a parameter of `step` is the batch.
BATCHED = {'sample': 0, 'unsqueeze_4': 0}


class Model(Engine):
    """Denoiser: called with the inputs of the model that was captured."""

    lines = staticmethod(step)
    constants = staticmethod(constants)

    def begin(self, /, **inputs: Tensor) -> Any:
        """What is constant over one image, computed once."""
        return begin(self.get_tensor, **inputs)

    def time(self, /, **inputs: Tensor) -> Any:
        """Temporal features in full precision, for timesteps that the tables do not hold."""
        return time(self.get_tensor, **inputs)


def load(directory: str | Path, kernels: str | None = None) -> Model:
    """The model, from the directory of its tensors; `kernels` is the text of kernels.cu, which is
    read beside this file if there is none."""
    text = Path(__file__).with_name("kernels.cu").read_text() if kernels is None else kernels
    return Model(Path(directory), text, PLAN, KERNELS, BATCHED).eval()
