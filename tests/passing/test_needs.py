"""What each pass asks for with its options, in one table; and what it does not ask for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.tiny import make_pass, tiny
from tfqc.errors import PassError, PipelineError
from tfqc.frontend import capture
from tfqc.ir.program import Program
from tfqc.ir.rows import Quantizer
from tfqc.ir.tables import fact_name
from tfqc.passing import Context
from tfqc.passing.known import pass_names
from tfqc.passing.pipeline import Pipeline

SAMPLES = "calibration sampler weights"
COMPUTES = "schedule weights"
# text of a pass: data from outside, tables and columns
NEEDS: dict[str, tuple[str, str]] = {
    "normalize": ("", ""),
    "discover-tib": ("", ""),
    "measure-disturbance": (COMPUTES, "tib"),
    "measure-disturbance{trajectory=0}": (COMPUTES, "tib"),
    "measure-disturbance{trajectory=1}": (f"{SAMPLES} schedule", "tib"),
    "select-maintenance": ("", "tib"),
    "select-maintenance{strategy=cache4}": ("", "tib"),
    "select-maintenance{strategy=auto candidates=tib,fold}": (
        "", "disturbance disturbance.fold disturbance.tib tib",
    ),
    "split-low-rank": ("", "tib"),
    "split-concat": ("", "tib"),
    "calibrate-weights": ("", ""),
    "calibrate-weights{method=mse edge-bits=8}": ("", ""),
    "calibrate-weights{scope=linear group=8}": ("", ""),
    "calibrate-weights{scope=tib}": ("", "tib"),
    "calibrate-activations": (SAMPLES, ""),
    "calibrate-activations{mode=per-step}": (SAMPLES, ""),
    "calibrate-activations{mode=per-token}": (SAMPLES, ""),
    "calibrate-activations{scope=tib}": (SAMPLES, "tib"),
    "calibrate-finite-set": (COMPUTES, "tib"),
    "calibrate-finite-set{scope=all}": (f"{SAMPLES} schedule", "tib"),
    "reconstruct-tib": (COMPUTES, "tib"),
    "reconstruct-weights": (SAMPLES, "tib"),
    "reconstruct-weights{scope=linear steps=1}": (SAMPLES, "tib"),
    "learn-time-scales": (SAMPLES, ""),
    "reconstruct-blocks": (SAMPLES, "quantizer tib"),
    "learn-time-scales{scope=tib}": (SAMPLES, "tib"),
    "plan-quantization": ("", ""),
    "plan-quantization{scope=tib}": ("", "tib"),
    "fold-cache": ("schedule", "maintenance tib"),
    "fold-cache{policy=nearest mode=table}": ("schedule", "maintenance tib"),
    "hoist-request": ("", ""),
    "insert-qdq": ("", "quantizer"),
    "lower-int8": ("", ""),
    "lower-int4": ("", ""),
    "lower-attention{mode=fp32}": ("", ""),
    "fuse-low-rank": ("", ""),
    "fuse-epilogues{gates=false}": ("", ""),
    "fuse-norms": ("", ""),
    "fuse-quantize{rows=true}": ("", ""),
    "channels-last": ("", ""),
    "half-precision": ("", ""),
    "narrow-residual": ("", ""),
    "prepack-weights{bits=4}": ("", ""),
    "plan-memory": ("", ""),
}  # fmt: skip


@pytest.mark.parametrize("text", NEEDS)
def test_needs(text: str) -> None:
    (item,) = Pipeline.parse(text).passes
    its = item.contract()
    assert (" ".join(sorted(its.data)), " ".join(sorted(map(fact_name, its.requires)))) == tuple(
        " ".join(sorted(words.split())) for words in NEEDS[text]
    )


def test_no_pass_is_left_out() -> None:
    assert {text.partition("{")[0] for text in NEEDS} == set(pass_names())


@pytest.mark.parametrize(("strategies", "columns"), [("tib", ["tib"]), ("cache4,fold", ["cache4", "fold"])])
def test_what_is_measured_is_provided(strategies: str, columns: list[str]) -> None:
    (item,) = Pipeline.parse(f"measure-disturbance{{strategies={strategies}}}").passes
    provided = {"disturbance", "trajectory", *(f"disturbance.{column}" for column in columns)}
    assert set(map(fact_name, item.contract().provides)) == provided


# -- needs that depend on the program, too --------------------------------------------------------------------------


class Linears(nn.Module):
    """A denoiser of rows, without a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.enter, self.leave = nn.Linear(1, 8), nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        shift = self.time(timestep[:, None].to(torch.float32) / 1000)
        return self.leave(torch.relu(self.enter(sample) + shift[:, None]))


def linears() -> Program:
    return capture(Linears().requires_grad_(False), {"sample": torch.randn(2, 3, 4), "timestep": torch.tensor([7, 9])})


DYNAMIC = "normalize,discover-tib,select-maintenance,calibrate-activations{mode=per-token}"


def test_per_token_alone_needs_no_calibration() -> None:
    program = Pipeline.parse(DYNAMIC).run(linears(), Context())
    rows = program.table(Quantizer)
    assert len(rows) == 2 and {row.input_how for row in rows.values()} == {"per-token"}


@pytest.mark.parametrize("mode", ["static", "per-step"])
def test_other_modes_do(mode: str) -> None:
    with pytest.raises(PipelineError, match=r"#4 calibrate-activations needs a schedule: give one"):
        Pipeline.parse(DYNAMIC.replace("per-token", mode)).run(linears(), Context())


def test_convolutions_need_it_per_token_too() -> None:
    pipeline = Pipeline.parse(DYNAMIC)
    with pytest.raises(PipelineError, match=r"#4 calibrate-activations needs a schedule: give one"):
        pipeline.run(tiny(), Context())
    with pytest.raises(PipelineError, match=r"#4 calibrate-activations needs a schedule: give one"):
        pipeline.check(ctx=Context())  # of no program in particular


@pytest.mark.parametrize("what", ["schedule", "calibration"])
def test_a_pass_that_does_not_declare_what_it_takes(what: str) -> None:
    greedy = make_pass("greedy", lambda program, ctx: (getattr(ctx, f"need_{what}")(), None)[1])
    with pytest.raises(PassError, match=rf"^greedy needs a {what}: give one \({what}=\.\.\.\)\."):
        Pipeline((greedy,)).run(tiny(), Context())
