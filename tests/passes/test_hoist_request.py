"""hoist-request: what waits for the request alone runs once per image, and never answers for another request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import first
from tests.models import TIMES, Example
from tests.subjects import SUBJECTS, Subject, Subjects, assert_text_round_trip, of_example
from tfqc.errors import PipelineError
from tfqc.instruments.numerics import relative_error
from tfqc.ir.interpret import interpreter, plan_of
from tfqc.ir.program import BEGIN, Program
from tfqc.ir.render import render

TEXT = "select-maintenance,fold-cache,hoist-request"
# Values that each model takes once per image; none for the others.
HOISTED = {"unet-sd": 8, "unet-sdxl": 16, "pixart": 6, "sd3": 1, "flux": 9, "flux-guidance": 9}


@pytest.mark.parametrize("name", SUBJECTS)
def test_every_model(name: str, subject: Subjects) -> None:
    its = subject(name)
    folded = its.run("select-maintenance,fold-cache")
    program = its.run("hoist-request", program=folded.clone(), numerics=True)
    assert len(plan_of(program).hoisted) == HOISTED.get(name, 0)
    if name not in HOISTED:  # unchanged
        assert render(program) == render(folded)
        return
    for call in [its.call([t] * b) for t, b in zip(its.timesteps, (1, 2, 3, 2), strict=True)]:
        assert relative_error(first(folded(**call)), first(program(**call))) == 0
    assert_text_round_trip(program, its.call(list(its.timesteps[:2])))


def test_keys_and_values_leave_the_step(subject: Subjects) -> None:
    its = subject("unet-sd")
    program = its.run(TEXT)
    text = next(n for n in program.functions[BEGIN].nodes if n.op == "placeholder")
    assert text.name == "encoder_hidden_states"
    assert "encoder_hidden_states" not in {n.name for n in program.step.nodes}
    read = {str(n.target) for n in program.step.nodes if n.op == "get_attr"}
    assert not any(".attn2.to_k." in name or ".attn2.to_v." in name for name in read)


def test_refused_before_folding(subject: Subjects) -> None:
    with pytest.raises(PipelineError, match=r"needs stage folded"):
        subject("unet-sd").run("hoist-request")


class NoBatch(nn.Module):
    """A request without a batch, made as wide as the sample: its size is known in the step alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.text, self.inner = nn.Linear(1, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        wide = torch.tanh(self.text(text)).expand(x.shape[0], 6)
        joined = torch.cat([wide, self.inner(x)], dim=1).reshape(-1, 2, 6).sum(1)
        return joined + self.embed(t.float()[:, None] / 1000) * torch.relu(wide)


def no_batch() -> Example:
    torch.manual_seed(0)
    return NoBatch().eval().requires_grad_(False), {"x": torch.randn(2, 6), "t": TIMES, "text": torch.randn(1, 6)}


def test_a_request_without_a_batch() -> None:
    its = of_example("no-batch", no_batch)
    program = its.run(TEXT)
    assert plan_of(program).hoisted
    text = its.inputs["text"]
    for batch in (1, 2, 3, 2):  # the same request, other batches
        for t in ([951.0] * batch, [951.0, 37.0, 421.0][:batch]):
            call = its.call(t, text=text)
            assert relative_error(its.reference(call), first(program(**call))) <= 1e-5


# -- requests -----------------------------------------------------------------------------------------------------


def count_begins(program: Program, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    stepper = interpreter(program)
    begin, seen = stepper.begin, []
    assert begin is not None

    def counted(**values: Tensor) -> Any:
        seen.append(1)
        return begin(**values)

    monkeypatch.setattr(stepper, "begin", counted)
    return seen


@pytest.fixture
def lowered(subject: Subjects) -> tuple[Subject, Program]:
    its = subject("unet-sd")
    return its, its.run(TEXT)


Lowered = tuple[Subject, Program]


def check(its: Subject, program: Program, prompt: Tensor, t: float = 951.0) -> None:
    call = its.call([t] * 2, encoder_hidden_states=prompt)
    assert relative_error(its.reference(call), first(program(**call))) <= 1e-5


def test_once_per_image(lowered: Lowered, monkeypatch: pytest.MonkeyPatch) -> None:
    its, program = lowered
    begins = count_begins(program, monkeypatch)
    prompts = [torch.randn(2, 5, 12) for _ in range(3)]
    for t in its.timesteps:
        for prompt in prompts:  # in turn
            check(its, program, prompt, t)
    assert len(begins) == 3


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", [lambda p: p.copy_(p.flip(0)), lambda p: p.mul_(2), lambda p: p[1].zero_()])
def test_changed_in_place(
    context: Callable[[], Any], change: Any, lowered: Lowered, monkeypatch: pytest.MonkeyPatch
) -> None:
    its, program = lowered
    begins = count_begins(program, monkeypatch)
    with context():
        prompt = torch.randn(2, 5, 12)
        check(its, program, prompt)
        change(prompt)
        check(its, program, prompt)
        check(its, program, prompt, 37.0)
    assert len(begins) == 2


def test_freed_and_allocated_again(lowered: Lowered, monkeypatch: pytest.MonkeyPatch) -> None:
    its, program = lowered
    begins = count_begins(program, monkeypatch)
    for _ in range(8):
        prompt = torch.randn(2, 5, 12)
        check(its, program, prompt)
        del prompt
    assert len(begins) == 8


def test_request_tables_follow_the_request(subject: Subjects) -> None:
    """Tables of features that wait for time and request are built anew for a changed request."""
    its = subject("unet-sdxl")
    program = its.run(TEXT)
    call = its.call([951.0, 951.0])
    text = call["added_cond_kwargs"]["text_embeds"].clone()
    call["added_cond_kwargs"] = {**call["added_cond_kwargs"], "text_embeds": text}
    for _ in range(2):
        assert relative_error(its.reference(call), first(program(**call))) <= 1e-5
        text.mul_(-3)
