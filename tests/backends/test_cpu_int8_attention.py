"""The attention kernel: every instruction set that runs here and every mode against float64."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.backends.kernels import DTYPES, EVERY_ISA, at_end, run
from tfqc.backends.cpu_int8.runtime import abi

MODES = (0, 1, 2)
TOLERANCE = (2e-6, 1e-2, 2e-2)  # of the largest |v|, by mode
everywhere = EVERY_ISA
in_all_modes = pytest.mark.parametrize("mode", MODES)


class Codes(NamedTuple):
    """Scale and zero point of each batch entry, [batch]."""

    scale: Tensor
    zero: Tensor


def attend(
    isa: str,
    mode: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    out: Tensor | None = None,
    mask: Tensor | None = None,
    codes: Codes | None = None,
    scale: float | None = None,
    threads: int = 1,
    scratch: int = 4 << 20,
    filled: int = 0xAA,
) -> Tensor:
    """The kernel on views [batch, heads, tokens, d]; the output is f32 unless given."""
    out = at_end(torch.full(q.shape, math.nan)) if out is None else out
    q, k, v = at_end(q), at_end(k), at_end(v)
    (batch, heads, queries, d), keys = q.shape, k.shape[2]
    args = abi.AttentionArgs(
        q=q.data_ptr(), k=k.data_ptr(), v=v.data_ptr(), out=out.data_ptr(), batch=batch, heads=heads, queries=queries,
        keys=keys, d=d, scale=scale or d**-0.5, q_dtype=DTYPES[q.dtype], k_dtype=DTYPES[k.dtype],
        v_dtype=DTYPES[v.dtype], out_dtype=DTYPES[out.dtype], mode=mode,
    )  # fmt: skip
    for name, x in {"q": q, "k": k, "v": v, "out": out}.items():
        assert x.stride(3) == 1
        for axis, stride in zip(("entry", "head", "token"), x.stride(), strict=False):
            setattr(args, f"{name}_{axis}", stride)
    if mask is not None:
        mask = at_end(mask).expand(batch, heads, queries, keys)
        args.mask = mask.data_ptr()
        args.mask_entry, args.mask_head, args.mask_query, args.mask_key = mask.stride()
    if codes is not None:
        args.quant.scale = abi.Rows(base=codes.scale.data_ptr(), entry=1)
        args.quant.zero = abi.Rows(base=codes.zero.data_ptr(), entry=1)
    run(isa, "attention", args, [0] * batch, threads, scratch, filled=filled)
    return out


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    scores = q.double() @ k.double().mT * (scale or q.shape[-1] ** -0.5)
    if mask is not None:
        scores = scores + mask.double()
    weights = scores.softmax(-1).nan_to_num(0)  # of a row that is forbidden altogether: 0, as in torch's attention
    return weights @ v.double()


def error(got: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> float:
    """Largest difference from float64, relative to the largest |v|."""
    return ((got.double() - exact(q, k, v, mask)).abs().max() / v.abs().max()).item()


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def heads_of(seed: int, heads: int, tokens: int, d: int, batch: int = 1) -> Tensor:
    return normal(seed, batch, heads, tokens, d)


class Case(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any sizes; each tensor f32 or bf16, and a view of a projection or of heads that lie apart."""
    batch, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    queries, keys = draw(st.integers(1, 100)), draw(st.integers(1, 200))
    d = draw(st.one_of(st.integers(1, 256), st.sampled_from([4, 8, 40, 64, 80, 160])))
    seed = draw(st.integers(0, 2**31))

    def view(tokens: int, seed: int) -> Tensor:
        dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
        if draw(st.booleans()):
            more = draw(st.integers(0, 5))
            return (
                normal(seed, batch, tokens, heads * d + more)
                .to(dtype)[..., more:]
                .unflatten(2, (heads, d))
                .transpose(1, 2)
            )
        return normal(seed, batch, heads, tokens + 1, d).to(dtype)[:, :, 1:]

    mask = None
    if draw(st.booleans()):
        shape = [draw(st.sampled_from([1, size])) for size in (batch, heads, queries, keys)]
        mask = 3 * normal(seed + 3, *shape)
        mask[normal(seed + 4, *shape) > draw(st.sampled_from([0.5, 9.0]))] = -math.inf
    return Case(view(queries, seed), view(keys, seed + 1), view(keys, seed + 2), mask)


@everywhere
@in_all_modes
@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_any_shape(isa: str, mode: int, case: Case) -> None:
    assert error(attend(isa, mode, *case[:3], mask=case.mask), *case) < TOLERANCE[mode]


@everywhere
@in_all_modes
@pytest.mark.parametrize(
    ("queries", "keys", "d"), [(70, 1024, 64), (256, 77, 40), (1, 1, 4), (33, 4096, 8), (9, 5, 160)]
)
def test_sizes_of_models(isa: str, mode: int, queries: int, keys: int, d: int) -> None:
    q, k, v = heads_of(0, 2, queries, d), heads_of(1, 2, keys, d), heads_of(2, 2, keys, d)
    assert error(attend(isa, mode, q, k, v), q, k, v) < TOLERANCE[mode]


@everywhere
@in_all_modes
def test_keys_that_do_not_fit_in_scratch(isa: str, mode: int) -> None:
    q, k, v = heads_of(0, 2, 600, 32), heads_of(1, 2, 1500, 32), heads_of(2, 2, 1500, 32)
    assert error(attend(isa, mode, q, k, v, scratch=400 << 10), q, k, v) < TOLERANCE[mode]


@everywhere
@in_all_modes
def test_huge_scores(isa: str, mode: int) -> None:
    """Scores of +-10^4 that are exact in every number format: each query picks its own key."""
    k = torch.eye(64)[None, None]
    q, v = (2 * k - 1) * 1e4 * 8, heads_of(2, 1, 64, 64)
    assert error(attend(isa, mode, q, k, v), q, k, v) < (2e-6, 5e-3, 5e-3)[mode]


@everywhere
@in_all_modes
def test_scores_that_grow(isa: str, mode: int) -> None:
    """The maximum moves on with every key, so what has been summed shrinks each time."""
    q, v = torch.ones(1, 1, 5, 16), heads_of(2, 1, 300, 16)
    k = torch.arange(300).view(1, 1, 300, 1).expand(1, 1, 300, 16).contiguous()
    assert (
        error(attend(isa, mode, q, k.float(), v), q, k, v) < (2e-4, 0.1, 0.1)[mode]
    )  # a float of 1000 has steps of 6e-5


@everywhere
@in_all_modes
def test_keys_with_a_large_common_mean(isa: str, mode: int) -> None:
    q, k, v = heads_of(0, 1, 40, 64), heads_of(1, 1, 300, 64) + 20, heads_of(2, 1, 300, 64)
    assert error(attend(isa, mode, q, k, v), q, k, v) < (2e-5, 1e-2, 2e-2)[mode]


@everywhere
@in_all_modes
def test_a_forbidden_row_is_0_and_a_nan_stays(isa: str, mode: int) -> None:
    q, k, v = heads_of(0, 1, 20, 8), heads_of(1, 1, 70, 8), heads_of(2, 1, 70, 8)
    mask = torch.zeros(1, 1, 20, 70)
    mask[:, :, 3] = -math.inf
    q[:, :, 17] = math.nan
    got = attend(isa, mode, q, k, v, mask=mask)
    assert (got[:, :, 3] == 0).all()
    assert got[:, :, 17].isnan().all() and got.isnan().sum() == 8
    assert attend(isa, mode, q, k, v)[:, :, 17].isnan().all()


@everywhere
@in_all_modes
def test_threads_do_not_change_a_bit(isa: str, mode: int) -> None:
    q, k, v = (heads_of(seed, 3, 100, 40, batch=2) for seed in range(3))
    one, *others = (attend(isa, mode, q, k, v, threads=threads) for threads in (1, 2, 3))
    assert all(torch.equal(one, other) for other in others)


@everywhere
@in_all_modes
def test_codes_of_each_entry(isa: str, mode: int) -> None:
    q, k, v = heads_of(0, 2, 45, 40, batch=3), heads_of(1, 2, 77, 40, batch=3), heads_of(2, 2, 77, 40, batch=3)
    codes = Codes(torch.tensor([0.004, 0.02, 0.001]), torch.tensor([100, 128, 7], dtype=torch.int32))
    out = attend(isa, mode, q, k, v, out=at_end(torch.zeros(q.shape, dtype=torch.uint8)), codes=codes)
    scale, zero = codes.scale.view(3, 1, 1, 1), codes.zero.view(3, 1, 1, 1)
    ideal = (exact(q, k, v) / scale + zero).clamp(0, 255)
    assert ((out - ideal).abs() <= 0.51 + TOLERANCE[mode] * v.abs().max() / scale).all()


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("d", [16, 13])
def test_writes_nothing_beside_the_output(isa: str, dtype: torch.dtype, d: int) -> None:
    q, k, v = heads_of(0, 2, 37, d), heads_of(1, 2, 50, d), heads_of(2, 2, 50, d)
    codes = Codes(torch.tensor([0.01]), torch.tensor([128], dtype=torch.int32))
    room = torch.full((1, 2, 40, d + 5), 77).to(dtype)
    attend(isa, 1, q, k, v, out=room[:, :, 1:38, 2 : 2 + d], codes=codes)
    room[:, :, 1:38, 2 : 2 + d] = 77
    assert (room == 77).all()


@everywhere
@in_all_modes
@pytest.mark.parametrize("d", [512, 1024, 2048])
def test_wide_heads(isa: str, mode: int, d: int) -> None:
    """Blocks of queries are as many as scratch has room for beside some keys."""
    q, k, v = heads_of(0, 1, 600, d), heads_of(1, 1, 1100, d), heads_of(2, 1, 1100, d)
    assert error(attend(isa, mode, q, k, v), q, k, v) < TOLERANCE[mode]


@everywhere
@in_all_modes
def test_what_lay_in_scratch_changes_nothing(isa: str, mode: int) -> None:
    q, k, v = heads_of(0, 2, 45, 40), heads_of(1, 2, 77, 40), heads_of(2, 2, 77, 40)
    one, other = (attend(isa, mode, q, k, v, filled=filled) for filled in (0, 0xFF))
    assert torch.equal(one, other)
