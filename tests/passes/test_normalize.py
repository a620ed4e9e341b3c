"""normalize: what it rewrites, what it leaves, what it refuses; `run_pass` checks the outputs bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import args_of, find, first, run_pass
from tests.models import MODELS
from tfqc.errors import PassError
from tfqc.frontend import capture
from tfqc.ir.ops import op_name, works_in_place
from tfqc.ir.program import Program, Stage
from tfqc.ir.render import render
from tfqc.passes.normalize import Normalize

X, T = torch.linspace(-1, 1, 12).reshape(2, 6), torch.tensor([7, 421])


Forward = Callable[[Any, Tensor, Tensor], Tensor]


class Model(nn.Module):
    """One linear layer `inner`, and any code around it."""

    def __init__(self, code: Forward) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.code = nn.Linear(6, 6), code
        self.requires_grad_(False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.code(self, x, t)


def program_of(code: Forward) -> Program:
    """A captured model of `code(self, x, t)`, checked against eager."""
    model = Model(code)
    program = capture(model, {"x": X, "t": T})
    torch.testing.assert_close(program(x=X, t=T), model(X, T), rtol=0, atol=0)
    return program


def ops(program: Program) -> list[str]:
    return [op_name(n.target) for n in program.step.nodes if n.op == "call_function"]


@pytest.mark.parametrize("name", MODELS)
def test_every_model_then_nothing_more(name: str, captured: Callable[[str], Program]) -> None:
    """Rewriting and unchanged: the second run finds nothing."""
    program = run_pass(captured(name), Normalize())
    assert program.stage is Stage.NORMALIZED
    assert len(program.step.nodes) < len(captured(name).step.nodes)
    assert not any("assert" in op or "dropout" in op for op in ops(program))
    text = render(program)
    assert render(run_pass(program, Normalize())) == text


def test_a_normal_program_is_unchanged() -> None:
    program = program_of(lambda self, x, t: torch.tanh(self.inner(x)).mul(torch.sin(t).unsqueeze(1)))
    text = render(program)
    assert render(run_pass(program, Normalize())) == text.replace("stage captured", "stage normalized")


def test_identities_go() -> None:
    def forward(self: Any, x: Tensor, t: Tensor) -> Tensor:
        hidden = torch.dropout(self.inner(x), 0.5, False)
        hidden = hidden.to(torch.float32).expand(x.shape).reshape(x.shape)[:, :6].clone()
        return hidden * 1 - 0.0 + t.unsqueeze(1)

    program = run_pass(program_of(forward), Normalize())
    assert ops(program) == ["aten.linear.default", "aten.unsqueeze.default", "aten.add.Tensor"]


def test_parts_of_nothing_go() -> None:
    """No layer is left that would be calibrated on no value."""

    def forward(self: Any, x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([self.inner(x[:, None][:, 1:]), x[:, None], x[:, None] * t[:, None, None]], 1)

    program = run_pass(program_of(forward), Normalize())
    assert "aten.linear.default" not in ops(program)
    assert len(find(program, "aten.cat")[0].kwargs["tensors"]) == 2
    torch.testing.assert_close(program(x=X, t=T), Model(forward)(X, T))


def test_adding_zero_stays() -> None:
    """−0.0 + 0.0 is 0.0, and integer / 1 is a float."""
    program = run_pass(program_of(lambda self, x, t: self.inner(x) + 0.0 + (t / 1).unsqueeze(1)), Normalize())
    assert "aten.div.Tensor" in ops(program)
    assert ops(program).count("aten.add.Tensor") == 2


def test_slices_that_cut_stay() -> None:
    program = run_pass(program_of(lambda self, x, t: self.inner(x)[:, 1:4] + t[:, None]), Normalize())
    assert ops(program) == [
        "aten.linear.default", "aten.slice.Tensor", "aten.unsqueeze.default", "aten.add.Tensor"
    ]  # fmt: skip


def test_a_copy_for_its_strides_stays() -> None:
    def forward(self: Any, x: Tensor, t: Tensor) -> Tensor:
        turned = self.inner(x).unsqueeze(2).expand(-1, -1, 2).transpose(1, 2)
        return turned.clone(memory_format=torch.contiguous_format).view(-1, 12) + t[:, None]

    assert "aten.clone.default" in ops(run_pass(program_of(forward), Normalize()))


def test_in_place_becomes_functional() -> None:
    def forward(self: Any, x: Tensor, t: Tensor) -> Tensor:
        hidden = self.inner(x)
        before = hidden * 3  # reads the value from before
        hidden += t[:, None]
        hidden.clamp_(min=-1)
        return hidden.view(-1, 6) + before  # a view taken afterwards

    program = program_of(forward)
    assert any("add_" in op for op in ops(program))
    run_pass(program, Normalize())
    assert not any("_." in op.removeprefix("aten.") for op in ops(program))


def test_in_place_through_what_returns_its_operand() -> None:
    """dropout in eval mode and a conversion to the same dtype return their operand: a change is seen there."""

    def forward(self: Any, x: Tensor, t: Tensor) -> Tensor:
        hidden = self.inner(x)
        torch.dropout(hidden, 0.1, False).to(torch.float32).add_(t[:, None])
        return hidden * 2

    program = run_pass(program_of(forward), Normalize())
    assert ops(program)[-1] == "aten.mul.Tensor"
    assert "aten.add.Tensor" in ops(program)


def test_in_place_on_a_copy_leaves_the_original() -> None:
    def forward(self: Any, x: Tensor, t: Tensor) -> Tensor:
        hidden = self.inner(x)
        return hidden.clone().add_(t[:, None]) * hidden

    run_pass(program_of(forward), Normalize())


def test_in_place_keeps_the_dtype() -> None:
    def forward(self: Any, x: Tensor, t: Tensor) -> Tensor:
        hidden = self.inner(x).to(torch.bfloat16)
        hidden += t[:, None].float() / 3  # float32 into bfloat16
        return hidden

    program = run_pass(program_of(forward), Normalize())
    assert ops(program)[-2:] == ["aten.add.Tensor", "aten.to.dtype"]


@pytest.mark.parametrize(
    "create",
    [
        lambda h: torch.zeros_like(h) + 1, lambda h: torch.ones_like(h[:, :1]),
        lambda h: torch.full_like(h, 2.5),
        lambda h: h.new_ones(h.shape[0], 6), lambda h: h.new_full((6,), 2), lambda h: h.new_zeros(1) + 1,
    ],
)  # fmt: skip
def test_created_tensors_say_their_size(create: Callable[[Tensor], Tensor]) -> None:
    """The timestep times `ones_like(sample)` does not depend on the sample."""
    program = program_of(lambda self, x, t: self.inner(x) + torch.sin(t[:, None] * create(x)))
    run_pass(program, Normalize())
    assert "aten.full.default" in ops(program)
    assert not any("_like" in op or "new_" in op for op in ops(program))
    (full,) = find(program, "full")
    assert all(op_name(n.target) == "aten.sym_size.int" for n in full.all_input_nodes)


def view_first(self: Any, x: Tensor, t: Tensor) -> Tensor:
    hidden = self.inner(x)
    left = hidden[:, :3]
    hidden += t[:, None]
    return left * 2


def part(self: Any, x: Tensor, t: Tensor) -> Tensor:
    hidden = self.inner(x)
    hidden.chunk(2, dim=1)[0].add_(t[:, None])
    return hidden


def rotary(self: Any, x: Tensor, t: Tensor) -> Tensor:
    """As rotary embeddings are written: halves of a new tensor, one after the other."""
    hidden = self.inner(x)
    even, odd = hidden[..., 0::2], hidden[..., 1::2]
    turned = torch.empty_like(hidden)
    turned[..., 0::2] = even * 2 - odd
    turned[..., 1::2] = even + odd * t[:, None]
    return turned


def number(self: Any, x: Tensor, t: Tensor) -> Tensor:
    hidden = self.inner(x)
    hidden[:, 0] = t  # an integer into a float
    hidden[:, 1:3].fill_(7)
    hidden[:, 3:4] = 1.5
    return hidden


def deep(self: Any, x: Tensor, t: Tensor) -> Tensor:
    """Through several views at once, with readers of each before and after."""
    hidden = self.inner(x)
    square = hidden.view(-1, 2, 3)
    turned = square.transpose(1, 2).unsqueeze(0)
    before = square.sum((1, 2)) + turned.sum((0, 2, 3))
    turned[0, :, 1].mul_(t[:, None]).sub_(1)
    square.unbind(1)[0][:, 2:].zero_()
    return hidden + (before + square.mean((1, 2)))[:, None] + turned.permute(1, 0, 3, 2).reshape(-1, 6)


def masked(self: Any, x: Tensor, t: Tensor) -> Tensor:
    hidden = self.inner(x).clone()
    hidden[hidden > 0.1] = 0.0
    hidden.narrow(1, 1, 2)[:, torch.tensor([0, 1])] = 3.0
    hidden.split([2, 4], 1)[1].clamp_(max=0.05)
    return hidden * t[:, None]


def swapped(self: Any, x: Tensor, t: Tensor) -> Tensor:
    """What is written is read from the same memory."""
    hidden = self.inner(x)
    hidden[:, :3], hidden[:, 3:] = hidden[:, 3:] + t[:, None], hidden[:, :3] * 1
    return hidden


@pytest.mark.parametrize("forward", [view_first, part, rotary, number, deep, masked, swapped])
def test_what_lies_in_the_same_memory_follows(forward: Forward) -> None:
    program = program_of(forward)
    run_pass(program, Normalize())
    assert not any(works_in_place(n.target) for n in program.step.nodes)
    for batch in (2, 3):
        x, t = torch.randn(batch, 6), torch.arange(batch) + 3
        assert torch.equal(first(program(x=x, t=t)), Model(forward)(x, t))


def test_what_is_overwritten_is_not_read() -> None:
    """So a temporal feature that is written into a new tensor stays one."""

    def forward(self: Any, x: Tensor, t: Tensor) -> Tensor:
        made = torch.empty_like(t[:, None].expand(-1, 6)).float()
        made.copy_(torch.sin(t)[:, None])
        return self.inner(x) + made

    program = run_pass(program_of(forward), Normalize())
    assert "aten.full.default" not in ops(program) and "aten.expand.default" in ops(program)


def of_input(self: Any, x: Tensor, t: Tensor) -> Tensor:
    return self.inner(x[:, :6].add_(t[:, None]))


def of_the_model(self: Any, x: Tensor, t: Tensor) -> Tensor:
    self.inner.weight[0].add_(1.0)
    return self.inner(x) + t[:, None]


def through_reshape(self: Any, x: Tensor, t: Tensor) -> Tensor:
    hidden = self.inner(x)
    hidden.t().reshape(-1).add_(1)
    return hidden + t[:, None]


def through_expand(self: Any, x: Tensor, t: Tensor) -> Tensor:
    hidden = self.inner(x)
    hidden.unsqueeze(0).unfold(2, 2, 2).add_(1)
    return hidden + t[:, None]


@pytest.mark.parametrize(
    ("forward", "sentence"),
    [
        (
            of_input,
            r"aten.add_.Tensor changes the input 'x', which is not this call's own: let the model change a copy",
        ),
        (of_the_model, r"aten.add_.Tensor changes the model's tensor 'inner.weight', which"),
        (through_reshape, r"aten.add_.Tensor may change %linear or not, as %reshape is a view of it or a copy: use"),
        (through_expand, r"the model writes through aten.unfold.default, which tfqc cannot turn around: write to"),
    ],
)
def test_what_cannot_be_said_as_values_is_refused(forward: Forward, sentence: str) -> None:
    with pytest.raises(PassError, match=rf"\(test_normalize.py:\d+\): {sentence}"):
        run_pass(capture(Model(forward), {"x": X.clone(), "t": T}), Normalize())


def test_a_failed_pass_leaves_the_program_as_it_was() -> None:
    program = capture(Model(of_input), {"x": X, "t": T})
    text = render(program)
    with pytest.raises(PassError):
        run_pass(program, Normalize())
    assert render(program) == text


# -- products with stored weights ----------------------------------------------------------------------------


class Products(Model):
    """The model above with a matrix of 6 x 6, a vector, and a kernel of convolutions."""

    def __init__(self, code: Forward) -> None:
        super().__init__(code)
        self.w, self.b = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6))
        self.kernel = nn.Parameter(torch.randn(3, 3, 4, 3))
        self.requires_grad_(False)


def product(code: Forward) -> Program:
    """`code` and a time; what is multiplied is to stay the same bit for bit."""
    model = Products(lambda self, x, t: code(self, x, t).sum() + x * t[:, None])
    program = capture(model, {"x": X, "t": T})
    run_pass(program, Normalize())
    torch.testing.assert_close(program(x=X, t=T), model(X, T), rtol=0, atol=0)
    return program


@pytest.mark.parametrize(
    "code",
    [
        lambda m, x, t: x @ m.w,
        lambda m, x, t: x @ m.w.T,
        lambda m, x, t: torch.mm(x, m.w.t()),
        lambda m, x, t: x @ m.w.transpose(1, 0).t().permute(1, 0),
        lambda m, x, t: x.reshape(-1, 1, 6) @ m.w,
        lambda m, x, t: torch.mm(x, m.w) + m.b,
        lambda m, x, t: torch.addmm(m.b, x, m.w),
        lambda m, x, t: torch.addmm(m.b, x, m.w.transpose(0, 1)),
        lambda m, x, t: x @ m.w + x @ m.w,
    ],
)  # fmt: skip
def test_products_with_stored_matrices_become_linear(code: Forward) -> None:
    program = product(code)
    assert "aten.linear.default" in ops(program)
    assert not {"aten.mm.default", "aten.matmul.default", "aten.addmm.default"} & set(ops(program))
    assert len([t for t in program.tensors if "transposed" in t]) <= 1


@pytest.mark.parametrize(
    "code",
    [
        lambda m, x, t: x @ x.T,
        lambda m, x, t: m.w @ x.T,
        lambda m, x, t: torch.addmm(x, x, m.w),
        lambda m, x, t: torch.addmm(m.b, x, m.w, beta=2),
        lambda m, x, t: torch.addmm(m.b[:1], x, m.w),
        lambda m, x, t: x[0] @ m.w,
        lambda m, x, t: m.w @ m.w,
    ],
)
def test_other_products_stay(code: Forward) -> None:
    program = product(code)
    assert "aten.linear.default" not in ops(program)
    assert {"aten.mm.default", "aten.matmul.default", "aten.addmm.default"} & set(ops(program))


def test_a_matrix_is_transposed_once() -> None:
    program = product(lambda m, x, t: x @ m.w @ m.w + x @ m.w.T)
    assert sorted(program.tensors) == ["w", "w.transposed"]


@pytest.mark.parametrize(
    ("options", "padding"),
    [
        ({"padding": "valid"}, [0, 0]), ({"padding": "valid", "stride": 2}, [0, 0]),
        ({"padding": "same"}, [0, 0]),  # an even kernel: what is odd is padded before
        ({"padding": "same", "dilation": 2}, [3, 2]), ({"padding": "same", "dilation": (2, 3)}, [3, 3]),
        ({"padding": "same", "dilation": (3, 1)}, [0, 0]),
    ],
)  # fmt: skip
def test_padding_by_name_becomes_numbers(options: dict[str, Any], padding: list[int]) -> None:
    def forward(self: Any, x: Tensor, t: Tensor) -> Tensor:
        image = x.repeat(1, 18).reshape(-1, 3, 6, 6) * t[:, None, None, None]
        return nn.functional.conv2d(image, self.kernel, self.b[:3], **options)

    program = product(forward)
    (conv,) = find(program, "conv2d")
    assert op_name(conv.target) == "aten.conv2d.default"
    assert args_of(conv)[4] == padding
    assert ("aten.constant_pad_nd.default" in ops(program)) == (padding == [0, 0] and options["padding"] == "same")


def test_padding_of_sequences_by_name_becomes_numbers() -> None:
    program = product(lambda m, x, t: nn.functional.conv1d(x[:, None], m.kernel[:1, :1, 0], padding="same"))
    (conv,) = find(program, "conv1d")
    assert op_name(conv.target) == "aten.conv1d.default"
    assert args_of(conv)[4] == [1]
