"""Denoiser, compiled by tfqc. Generated.

Read `Model.step` first: it is what runs at every timestep. `Model.begin` runs once per image, `Model.time` for
timesteps that are not in the schedule (PLAN). `load(directory)` makes the model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from safetensors.torch import load_file
from tfqc.runtime import Input, Plan, Table
from tfqc.runtime import Stepper, buffer_name
from tfqc.runtime.ops import conv2d_rows, dequantize_weight, dequantize_weight_int4, fake_quantize, table_read

aten = torch.ops.aten


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


class Model(Stepper):
    """Denoiser: called with the inputs of the model that was captured."""

    def __init__(self, directory: Path, plan: Plan) -> None:
        super().__init__(plan)
        self.directory = directory
        for name, value in load_file(directory / "weights.safetensors").items():
            self.register_buffer(buffer_name(name), value)
        # Weights are kept as integers on disk and turned into fp32 once.
        self.register_buffer("conv2d_weight", dequantize_weight(self.enter__weight__codes, self.enter__weight__scale, self.enter__weight__zero_point, 27), persistent=False)
        self.register_buffer("conv2d_1_weight", dequantize_weight(self.leave__weight__codes, self.leave__weight__scale, self.leave__weight__zero_point, 288), persistent=False)
        self.register_buffer("linear_1_weight", dequantize_weight_int4(self.text__weight__packed, self.text__weight__scale, self.text__weight__zero_point, 8, [32, 8]), persistent=False)
        self.time_is_loaded = False

    def step(self, sample: Tensor, row: Tensor, unsqueeze_4: Tensor, **_: Tensor) -> Any:
        """One timestep; `row` picks the rows of the tables."""
        add_2 = table_read(self.table__add_2, row)
        # enter
        sample_dq = fake_quantize(sample, self.act__sample__scale, self.act__sample__zero_point, row, 0, 255)
        conv2d = conv2d_rows(sample_dq, self.conv2d_weight, add_2, [1, 1], [1, 1], [1, 1], 1); del sample_dq, add_2
        # norm
        group_norm = F.group_norm(conv2d, 8, self.norm__weight, self.norm__bias); del conv2d
        silu = F.silu(group_norm); del group_norm
        add_1 = silu + unsqueeze_4; del silu
        # leave
        add_1_dq = fake_quantize(add_1, self.act__add_1__scale, self.act__add_1__zero_point, row, 0, 255); del add_1
        conv2d_1 = F.conv2d(add_1_dq, self.conv2d_1_weight, self.leave__bias, padding=[1, 1]); del add_1_dq
        return conv2d_1

    def begin(self, prompt: Tensor, **_: Tensor) -> Any:
        """What is constant over one image, computed once."""
        # text
        prompt_dq = fake_quantize(prompt, self.act__prompt__scale, self.act__prompt__zero_point, None, 0, 255)
        linear_1 = F.linear(prompt_dq, self.linear_1_weight, self.text__bias); del prompt_dq
        unsqueeze_3 = linear_1.unsqueeze(2); del linear_1
        unsqueeze_4 = unsqueeze_3.unsqueeze(3); del unsqueeze_3
        return (unsqueeze_4,)

    def time(self, timestep: Tensor, prompt: Tensor, **_: Tensor) -> Any:
        """Temporal features in full precision, for timesteps that the tables do not hold."""
        if not self.time_is_loaded:
            device = str(next(self.buffers()).device)
            for name, value in load_file(self.directory / "time.safetensors", device).items():
                self.register_buffer(buffer_name(name), value, persistent=False)
            self.time_is_loaded = True
        to = timestep.to(torch.float32)
        unsqueeze = to.unsqueeze(1); del to
        div = unsqueeze / 1000; del unsqueeze
        # time
        linear = F.linear(div, self.time__weight, self.time__bias); del div
        unsqueeze_1 = linear.unsqueeze(2); del linear
        unsqueeze_2 = unsqueeze_1.unsqueeze(3); del unsqueeze_1
        reshape = unsqueeze_2.reshape([-1, 32]); del unsqueeze_2
        add_2 = self.enter__bias + reshape; del reshape
        return (add_2,)


def load(directory: str | Path) -> Model:
    """The model, from the directory that holds its tensors."""
    return Model(Path(directory), PLAN).eval()
