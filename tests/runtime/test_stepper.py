"""The run time by itself: rows, requests and encodings, on a stepper whose functions count their calls."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tfqc.runtime import Input, Output, Plan, Stepper, Table, encode_row

INPUTS = (
    Input("x", "sample", ("x",), torch.float32, ("B", 1)),
    Input("t", "time", ("t",), torch.int64, ("B",)),
    Input("text", "request", ("added", "text"), torch.float32, ("B", 1)),
    Input("k", "request", ("k",), torch.int64, ("B",)),
)


class Counting(Stepper):
    """step = text keys + row of a table + row of a request table; every function counts its calls."""

    def __init__(self, policy: str = "recompute", **plan: Any) -> None:
        super().__init__(
            Plan(
                INPUTS,
                ("x", "t", "added", "k"),
                timesteps=(900.0, 500.0, 100.0),
                policy=policy,
                row="row",
                tables=(Table("table", 0),),
                activations=("scale",),
                hoisted={"keys": 0},
                request_tables={"pairs": 1},
                per_image=("text", "k"),
                **plan,
            )
        )
        self.register_buffer("table", torch.tensor([900.0, 500.0, 100.0])[:, None])
        self.register_buffer("scale", torch.tensor([9.0, 5.0, 1.0]))
        self.begins: list[Tensor] = []
        self.times: list[float] = []
        self.begin, self.time = self._begin, self._time
        self.rows: list[list[int]] = []

    def _begin(self, text: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        self.begins.append(text.clone())
        return (text * 2,)

    def _time(self, t: Tensor, text: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        self.times.append(float(t[0]))
        rows = t.to(torch.float32)[:, None]
        return rows, rows + text

    def step(self, **v: Tensor) -> Tensor:
        self.rows.append(v["row"].tolist())
        own = self.table[v["row"]]
        pairs = v["pairs"][v["row"], torch.arange(len(v["row"]))] if len(v["row"]) > 1 else v["pairs"][v["row"][0]]
        return v["x"] + v["keys"] + own + pairs


def expected(x: Tensor, t: Any, text: Tensor) -> Tensor:
    rows = torch.as_tensor(t, dtype=torch.float32).reshape(-1, 1)
    return x + 2 * text + rows + rows + text


X, TEXT, K = torch.zeros(2, 1), torch.tensor([[1.0], [2.0]]), torch.zeros(2, dtype=torch.int64)


def call(model: Stepper, t: Any, text: Tensor = TEXT, x: Tensor = X) -> Tensor:
    k = K if len(x) == 2 else torch.zeros(len(x), dtype=torch.int64)  # the same tensor is the same request
    result = model(x, t, {"text": text}, k)
    assert torch.equal(result, expected(x, t, text)), (t, text)
    return result


# -- once per image -----------------------------------------------------------------------------------------------


def test_begin_runs_once_for_an_image() -> None:
    model = Counting()
    for t in (900, 500, 100):
        call(model, t)
    assert len(model.begins) == 1
    assert model.times == [900, 500, 100]  # each timestep's request rows, once


def test_prompts_in_turn_are_kept() -> None:
    model = Counting()
    prompts = [TEXT * i for i in range(3)]
    for t in (900, 500, 100):
        for prompt in prompts:
            call(model, t, prompt)
    assert len(model.begins) == 3


@pytest.mark.parametrize("mode", ["normal", "no_grad", "inference"])
@pytest.mark.parametrize("born", ["normal", "inference"])
@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.copy_(torch.tensor([[3.0], [5.0]])), lambda p: p.mul_(-1), lambda p: p.view(-1)[1:].fill_(7),
        lambda p: p.detach().add_(1), lambda p: p.data.mul_(3), lambda p: p.numpy().fill(8),
        lambda p: p.__setitem__(0, 4.0), lambda p: p.unsqueeze(0).zero_(),
    ],
)  # fmt: skip
def test_a_prompt_changed_in_place_is_seen(change: Any, born: str, mode: str) -> None:
    model = Counting()
    with torch.inference_mode(born == "inference"):
        prompt = TEXT.clone()
    contexts = {"normal": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}
    with contexts[mode]():
        call(model, 900, prompt)
        call(model, 900, prompt)
        assert len(model.begins) == 1
    with torch.inference_mode(mode == "inference" or born == "inference"):
        change(prompt)
    with contexts[mode]():
        call(model, 900, prompt)
        call(model, 500, prompt)
    assert len(model.begins) == 2


def test_a_view_of_a_changed_tensor_is_seen() -> None:
    model = Counting()
    base = torch.tensor([[1.0], [2.0], [3.0]])
    view = base[:2]
    call(model, 900, view)
    base.mul_(3)
    call(model, 900, view)
    assert len(model.begins) == 2


def test_an_address_used_again_is_another_prompt() -> None:
    """Prompts that are freed give their memory, and their id(), to the next ones."""
    model = Counting()
    seen: set[int] = set()
    again = False
    for i in range(40):
        prompt = torch.full((2, 1), float(i))
        again = again or id(prompt) in seen or prompt.data_ptr() in seen
        seen |= {id(prompt), prompt.data_ptr()}
        call(model, 900, prompt)
        del prompt
    assert again  # else the test proves nothing
    assert len(model.begins) == 40


def test_other_inputs_of_the_request_count_too() -> None:
    model = Counting()
    call(model, 900)
    model(X, 900, {"text": TEXT}, K + 1)
    assert len(model.begins) == 2


def test_memory_is_bounded() -> None:
    model = Counting()
    for i in range(10):
        call(model, 900, TEXT * i)
    assert len(model._requests) == Stepper.MAX_REQUESTS


def test_the_same_request_with_another_batch() -> None:
    """A request without a batch of its own: its tables are built for the batch that is there."""

    class Shared(Counting):
        def _time(self, t: Tensor, text: Tensor, k: Tensor) -> tuple[Tensor, ...]:
            rows = t.to(torch.float32)[:, None]
            return rows, rows + text[:1]

    model = Shared()
    shared = tuple(dataclasses.replace(i, shape=(1, 1)) if i.name == "text" else i for i in INPUTS)
    Stepper.__init__(model, dataclasses.replace(model.plan, inputs=shared))
    model.begin, model.time = model._begin, model._time
    model.register_buffer("table", torch.tensor([900.0, 500.0, 100.0])[:, None])
    model.register_buffer("scale", torch.tensor([9.0, 5.0, 1.0]))
    text = torch.tensor([[1.0]])
    for batch in (2, 3, 1):
        call(model, [900] * batch, text, torch.zeros(batch, 1))


# -- rows ---------------------------------------------------------------------------------------------------------


def test_one_row_where_all_timesteps_are_equal() -> None:
    model = Counting()
    for t in (500, [500, 500], torch.tensor(500), torch.tensor([500.0, 500.0])):
        call(model, t)
        assert model.rows[-1] == [1]
    call(model, [500, 900])
    assert model.rows[-1] == [1, 0]


def test_unknown_timesteps_are_computed_once() -> None:
    model = Counting()
    for t in (333, [333, 900], 333, [444, 333], 444.5, [444.5, 500]):
        call(model, t)
    unknown = [t for t in model.times if t not in (900, 500, 100)]
    assert unknown.count(333) == 2  # for its table, and for the rows of this image
    assert model.get_tensor("scale").tolist() == [9, 5, 1, 5, 5, 5]  # the nearest
    before = len(model.times)
    call(model, 333)
    assert len(model.times) == before


def test_too_many_unknown_timesteps(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Counting()
    monkeypatch.setattr(Counting, "MAX_EXTRA_ROWS", 3)
    for t in (1, 2, 3, [2, 900], 4, [3, 4], [5, 6], [1, 2], [900, 100], [7, 8]):
        call(model, t)
        assert len(model._known) <= 6
        assert len(model.get_tensor("table")) == len(model.get_tensor("scale")) == len(model._known)
    call(model, [11, 12, 13, 14], TEXT.repeat(2, 1), torch.zeros(4, 1))  # more than may be kept: still right
    call(model, 900)


def test_policies() -> None:
    model = Counting("nearest")
    assert torch.equal(model(X, 480, {"text": TEXT}, K), expected(X, 500, TEXT))
    assert torch.equal(model(X, [480, 3], {"text": TEXT}, K), expected(X, [500, 100], TEXT))
    model = Counting("error")
    call(model, 900)
    with pytest.raises(ValueError, match=r"Timestep 901 is not in the schedule of 3 steps .* policy=recompute"):
        model(X, 901, {"text": TEXT}, K)


def test_float_schedules_are_found_in_float32() -> None:
    model = Counting()
    floats = tuple(dataclasses.replace(i, dtype=torch.float32) if i.name == "t" else i for i in INPUTS)
    arguments = ("x", "t", "added", "k")
    Stepper.__init__(model, Plan(floats, arguments, timesteps=(0.9, 0.7, 0.1), policy="error", row="row"))
    model.register_buffer("table", torch.tensor([[0.9], [0.7], [0.1]]))
    model.step = lambda **v: v["row"]
    for i, t in enumerate((0.9, 0.7, 0.1)):
        for value in (t, torch.tensor(t), torch.tensor([t, t]), torch.tensor(t, dtype=torch.float64)):
            assert model(X, value, {"text": TEXT}, K).tolist() == [i]


def test_labels() -> None:
    class Labels(Counting):
        def _time(self, t: Tensor, text: Tensor, k: Tensor) -> tuple[Tensor, ...]:
            self.times.append(float(t[0]))
            assert len(t) == len(text) == len(k)
            return (torch.stack([t.to(torch.float32), k.to(torch.float32)], 1),)

        def step(self, **v: Tensor) -> Tensor:
            return self.table[v["row_k"]]

    model = Labels()
    plan = Plan(
        INPUTS, ("x", "t", "added", "k"), timesteps=(900.0, 500.0), label_rows={"row_k": ("k", 3)},
        per_image=("text", "k"), tables=(Table("table", 0, label="k", classes=3),),
    )  # fmt: skip
    Stepper.__init__(model, plan)
    model.begin, model.time = model._begin, model._time
    model.times = []
    rows = [[t, k] for t in (900.0, 500.0) for k in range(3)]
    model.register_buffer("table", torch.tensor(rows))
    for t in ([900, 500], [500, 500], [77, 900], [77, 78], [78, 78]):
        for labels in ([0, 2], [1, 1], [2, 0]):
            got = model(X, torch.tensor(t), {"text": TEXT}, torch.tensor(labels))
            assert got.tolist() == [[a, b] for a, b in zip(t, labels, strict=True)]
    assert model.times == [77, 78]
    with pytest.raises(ValueError, match=r"k holds 3, but the model was captured for the labels 0 to 2"):
        model(X, 900, {"text": TEXT}, torch.tensor([0, 3]))


# -- calls --------------------------------------------------------------------------------------------------------


def test_bad_calls() -> None:
    model = Counting()
    with pytest.raises(TypeError, match=r"needs the input 'added.text'"):
        model(X, 900, k=K)
    with pytest.raises(TypeError, match=r"captured without 'mask'"):
        model(X, 900, {"text": TEXT}, K, mask=X)
    with pytest.raises(TypeError, match=r"4 positional arguments, 5 given"):
        model(X, 900, {"text": TEXT}, K, X)
    assert model(X, 900, {"text": TEXT}, K, return_dict=False, mask=None).shape == (2, 1)


def test_outputs_are_tuples_with_a_sample() -> None:
    model = Counting()
    step = model.step
    model.step = lambda **v: (step(**v), 1)
    result = model(X, 900, {"text": TEXT}, K)
    assert isinstance(result, Output) and result.sample is result[0]


# -- encodings ----------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=33), st.sampled_from(["int8", "int4"]))
def test_encoded_rows_are_within_half_a_step(values: list[float], encoding: str) -> None:
    row = torch.tensor([values])
    codes, scale, zero_point = encode_row(row, encoding)
    first = torch.zeros(1, dtype=torch.int64)
    if encoding == "int8":
        assert codes.dtype == torch.int8 and codes.shape == row.shape
        back = torch.ops.tfqc.table_decode(codes, scale, zero_point, first)
    else:
        assert codes.dtype == torch.uint8 and codes.shape == (1, -(-len(values) // 2))
        back = torch.ops.tfqc.table_decode_int4(codes, scale, zero_point, first, [len(values)])
    assert back.shape == row.shape
    assert bool(((back - row).abs() <= scale * 0.5 * (1 + 1e-4)).all())
    assert bool((back[row == 0] == 0).all())


def test_a_constant_row_is_kept() -> None:
    for value in (0.0, 3.25, -1e-20):
        codes, scale, zero_point = encode_row(torch.full((1, 4), value), "int8")
        back = torch.ops.tfqc.table_decode(codes, scale, zero_point, torch.zeros(1, dtype=torch.int64))
        assert torch.allclose(back, torch.full((1, 4), value), rtol=1e-6, atol=1e-25)
