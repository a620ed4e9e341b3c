"""The check of a call by itself: symbols, guards, constants, places of inputs, kinds of numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tfqc.runtime import Input, Plan
from tfqc.runtime.call import Call
from tfqc.runtime.sizes import arithmetic, meaning, solve

F32, I64, BOOL = torch.float32, torch.int64, torch.bool

PLAN = Plan(
    inputs=(
        Input("sample", "sample", ("sample",), F32, ("B", 4, "H", "W")),
        Input("t", "time", ("t",), I64, ("B",)),
        Input("text", "request", ("text", "0"), F32, ("B", "S", 8)),
        Input("mask", "request", ("text", "1"), BOOL, ("B", "S")),
        Input("ids", "request", ("added", "ids"), I64, ("(H // 2)*(W // 2)", 2)),
    ),
    arguments=("sample", "t", "text", "frames", "added", "return_dict"),
    constants=((("added", "kind"), "new"), (("frames",), 2), (("scale",), 1.0), (("sizes", "0", "1"), 32)),
    guards=("H % 2 == 0", "W % 2 == 0", "H >= 4"),
)


def call(**changes: Any) -> dict[str, Any]:
    text = [torch.zeros(2, 5, 8), torch.ones(2, 5) > 0]
    usual = {"sample": torch.zeros(2, 4, 8, 6), "t": 5, "text": text, "added": {"ids": torch.zeros(12, 2, dtype=I64)}}
    return {**usual, **changes}


def bind(*args: Any, **kwargs: Any) -> dict[str, Any]:
    call = Call(PLAN)
    return call.bind(call.read(args, kwargs))[0]


def test_places_names_and_kinds() -> None:
    values = bind(**call())
    assert list(values) == ["sample", "t", "text", "mask", "ids"]
    assert values["t"].tolist() == [5, 5] and values["t"].dtype == I64
    again = bind(call()["sample"], 5, call()["text"], added=call()["added"])
    assert all(torch.equal(values[k], again[k]) for k in values)
    narrow = call(added={"ids": torch.zeros(12, 2, dtype=torch.int32)})
    assert bind(**narrow)["ids"].dtype == I64


@pytest.mark.parametrize(
    "same",
    [
        {"frames": 2}, {"frames": 2.0}, {"frames": torch.tensor(2)}, {"scale": 1}, {"scale": None}, {"other": None},
        {"other": {}}, {"other": []}, {"sizes": [(None, 32)]}, {"return_dict": True}, {"return_dict": False},
    ],
)  # fmt: skip
def test_constants_may_be_repeated(same: Mapping[str, Any]) -> None:
    bind(**call(**same))


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"frames": 3}, ValueError, r"^frames is 3, but the model was captured with 2, which is part of its code"),
        ({"frames": "2"}, ValueError, r"frames is '2', but the model was captured with 2"),
        ({"frames": torch.zeros(3)}, ValueError, r"frames is a tensor 3, but"),
        ({"scale": 0.5}, ValueError, r"scale is 0.5, but the model was captured with 1.0"),
        ({"scale": float("nan")}, ValueError, r"scale is nan"),
        ({"sizes": [(1, 64)]}, TypeError, r"without 'sizes.0.0'"),
        ({"sizes": [(None, 64)]}, ValueError, r"sizes.0.1 is 64, but"),
        ({"added": {"ids": torch.zeros(12, 2, dtype=I64), "kind": "old"}}, ValueError, r"added.kind is 'old'"),
        ({"text": torch.zeros(2, 5, 8)}, TypeError, r"needs the input 'text.0'"),
        ({"text": [torch.zeros(2, 5, 8)]}, TypeError, r"needs the input 'text.1' \(BxS\)"),
        ({"text": [torch.zeros(2, 5, 8), torch.ones(2, 5)]}, TypeError, r"text.1 is float32; this model takes bool"),
        ({"text": [torch.zeros(2, 5, 8), torch.ones(2, 6) > 0]}, ValueError, r"text.1 is 2x6; .* B = 2 and S = 5"),
        ({"sample": torch.zeros(2, 4, 7, 6)}, ValueError, r"sample is 2x4x7x6; this model takes Bx4xHxW with .*H even"),
        ({"sample": torch.zeros(2, 4, 2, 6)}, ValueError, r"sample is 2x4x2x6"),
        ({"sample": torch.zeros(2, 4, 8, 8)}, ValueError, r"added.ids is 12x2; this model takes"),
        ({"added": {"ids": torch.zeros(12, 2)}}, TypeError, r"added.ids is float32; this model takes int64"),
        ({"t": [1, 2, 3]}, ValueError, r"t has 3 timesteps for 2 images"),
        ({"t": True}, TypeError, r"t is torch.bool: a timestep is a number"),
        ({"sample": torch.zeros(2, 4, 8, 6, dtype=torch.complex64)}, TypeError, r"sample is complex64"),
    ],
)  # fmt: skip
def test_one_sentence_for_what_does_not_fit(changes: dict[str, Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence) as caught:
        bind(**call(**changes))
    assert "\n" not in str(caught.value)


def test_by_position_and_by_name() -> None:
    with pytest.raises(TypeError, match=r"got 'sample' twice"):
        bind(torch.zeros(2, 4, 8, 6), **call())
    with pytest.raises(TypeError, match=r"takes 6 positional arguments, 7 given"):
        bind(*range(7))


@given(st.integers(1, 6), st.integers(-3, 9), st.integers(1, 50))
def test_a_linear_expression_is_solved(slope: int, offset: int, value: int) -> None:
    known: dict[str, int] = {}
    size = slope * value + offset
    assert solve(f"{slope}*N + {offset}" if offset >= 0 else f"{slope}*N - {-offset}", size, known)
    assert known == {"N": value}
    assert slope == 1 or not solve(f"{slope}*M", slope * value + 1, {})


@pytest.mark.parametrize(
    "text", ["__import__('os')", "H.real", "H[0]", "f(H)", "H if W else 1", "1 < H < 3", "'a'", "(", "H ** 9"]
)
def test_sizes_are_arithmetic_and_nothing_else(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no integer arithmetic"):
        arithmetic(text)


def test_guards_as_a_person_says_them() -> None:
    assert [meaning(g) for g in ("H % 2 == 0", "W % 8 == 0", "H >= 4")] == ["H even", "W a multiple of 8", "H >= 4"]


def test_a_container_that_holds_itself() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(TypeError, match="added is nested more than 32 deep, or holds itself"):
        bind(**call(added={"ids": torch.zeros(12, 2, dtype=I64), "more": endless}))
