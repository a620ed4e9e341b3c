"""lower-attention: attention of four dimensions, with what it is scaled by and how it is multiplied."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import args_of, find
from tests.lowered import apply, before, example, parts, quantized, round_trip
from tests.subjects import Subjects, of_example
from tfqc.backends.cpu_int8.integer import why_not_attention
from tfqc.errors import PipelineError, SpecError
from tfqc.ir import views
from tfqc.ir.render import render
from tfqc.passing.pipeline import Pipeline


@pytest.mark.parametrize("mode", ["fp32", "bf16", "int8"])
def test_self_attention(mode: str) -> None:
    its = parts()
    old = before("lower-attention", its)
    program = apply(f"lower-attention{{mode={mode}}}", old)
    (node,) = find(program, "tfqc.attention")
    name = "scaled_dot_product_attention"
    assert node.name == name and not find(program, f"aten.{name}")
    assert [str(n) for n in args_of(node)[:3]] == ["transpose_1", "transpose_2", "transpose_3"]
    assert args_of(node)[3:] == (None, 1 / math.sqrt(8), mode, None, None, None, "f32")
    assert program.types[name] == old.types[name]
    round_trip(its, program)


def test_hoisted_keys_and_values(subject: Subjects) -> None:
    its = subject("unet-sd")
    program = apply("lower-attention", before("lower-attention", its))
    nodes = find(program, "tfqc.attention")
    assert len(nodes) == 8
    assert all(n.op == "placeholder" for n in args_of(nodes[1])[1:3])  # type: ignore[union-attr]
    round_trip(its, program)


class Attention(nn.Module):
    """Attention as a function of queries, keys and values, [B, 2, 5, 8]."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.attend = attend
        self.time, self.inner = nn.Linear(1, 48), nn.Linear(16, 48)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        mixed = self.inner(x) + self.time(time.float()[:, None] / 1000)[:, None]
        q, k, v = mixed.unflatten(2, (6, 8)).transpose(1, 2).chunk(3, dim=1)
        return x + self.attend(q, k, v).transpose(1, 2).flatten(2)


LEFT: dict[str, tuple[Callable[..., Tensor], str]] = {
    "causal": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        "it has dropout, a causal mask, or grouped queries",
    ),
    "boolean": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, (q @ k.mT) > 0.1),
        "its mask is not f32 in four dimensions",
    ),
    "three": (
        lambda q, k, v: F.scaled_dot_product_attention(q[:, 0], k[:, 0], v[:, 0])[:, None].expand(-1, 2, -1, -1),
        "it has not the shape [batch, heads, tokens, dimension]",
    ),
    "wide": (
        lambda q, k, v: F.scaled_dot_product_attention(q[..., :4], k[..., :4], v),
        "its queries, keys and values differ in batch, heads or dimension",
    ),
    "shared": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :1], v[:, :1]),
        "its queries, keys and values differ in batch, heads or dimension",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_to_torch(name: str) -> None:
    attend, reason = LEFT[name]
    old = quantized(of_example(f"attention-{name}", example(lambda: Attention(attend), 5, 16)))
    (node,) = find(old, "scaled_dot_product_attention")
    assert why_not_attention(old, views.Attention(node)) == reason
    assert render(apply("lower-attention", old)) == render(old)


def test_a_mask_and_a_scale() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, q @ k.mT, scale=0.5)

    its = of_example("attention-scale", example(lambda: Attention(attend), 5, 16))
    program = apply("lower-attention", quantized(its))
    (node,) = find(program, "tfqc.attention")
    assert str(args_of(node)[3]) == "matmul" and args_of(node)[4] == 0.5
    round_trip(its, program)


def test_refused() -> None:
    with pytest.raises(PipelineError, match="needs stage lowered"):
        parts().run("lower-attention")
    with pytest.raises(SpecError, match="mode"):
        Pipeline.parse("lower-attention{mode=int4}")
