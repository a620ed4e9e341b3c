"""channels-last: one reordering on the way in, one on the way out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import args_of, find, first, name_of
from tests.lowered import apply, before, example, parts, round_trip
from tests.subjects import of_example
from tfqc.errors import PipelineError
from tfqc.ir.render import render


def test_in_and_out() -> None:
    its = parts()
    program = apply("channels-last", before("channels-last", its))
    (inside,) = find(program, "tfqc.channels_last")
    (outside,) = find(program, "tfqc.plain")
    sample = program.node("x")
    assert inside.name == "x_nhwc" and args_of(inside) == (sample,)
    assert {name_of(u) for u in sample.users} == {"tfqc.channels_last.default", "aten.sym_size.int"}
    assert [n.op for n in outside.users] == ["output"]
    result = first(program(**its.call([750.0])))
    assert result.is_contiguous() and result.dtype is torch.float32
    round_trip(its, program)


def test_what_is_reordered_is_left() -> None:
    """Where the pass runs again, on a program that branches were put into."""
    program = apply("channels-last", before("channels-last", parts()))
    assert render(apply("channels-last", program)) == render(program)


class Orders(nn.Module):
    """Reorders by itself, and looks at the result with views that ask for an order."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.first, self.last = nn.Linear(1, 8), nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 2, 1)
        self.inner, self.all = nn.Linear(8, 8), nn.Linear(8 * 36, 8)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = F.silu(self.first(x) + self.time(time.float()[:, None] / 1000)[:, :, None, None])
        tokens = self.inner(h.flatten(2).transpose(1, 2).contiguous().view(x.shape[0], 36, 8))
        pooled = self.all(h.view(x.shape[0], 288))
        image = tokens.transpose(1, 2).contiguous().view(x.shape[0], 8, 6, 6)
        return self.last(image + pooled[:, :, None, None])


ORDERS = example(Orders, 2, 6, 6)


def test_views_stay_possible() -> None:
    its = of_example("orders", ORDERS)
    old = before("channels-last", its)
    assert find(old, "contiguous") and find(old, "aten.view")
    program = apply("channels-last", old)
    assert not find(program, "contiguous") and not find(program, "aten.view")
    for timesteps in ([750.0], [750.0, 0.0, 250.0]):
        call = its.call(timesteps)
        torch.testing.assert_close(first(program(**call)), first(old(**call)))
    round_trip(its, program)


class Tokens(nn.Module):
    """No image at all."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.inner = nn.Linear(1, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return F.silu(self.inner(x + self.time(time.float()[:, None] / 1000)[:, None]))


TOKENS = example(Tokens, 3, 8)


def test_tokens_are_left_as_they_are() -> None:
    """But for the output, which the caller wants in f32."""
    old = before("channels-last", of_example("tokens", TOKENS))
    program = apply("channels-last", old)
    (added,) = find(program, "tfqc.plain")
    program.replace(added, args_of(added)[0])  # type: ignore[arg-type]
    program.prune()
    assert render(program) == render(old)


def test_refused() -> None:
    with pytest.raises(PipelineError, match="needs stage lowered"):
        parts().run("channels-last")
