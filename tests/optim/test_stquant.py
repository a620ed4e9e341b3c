"""STQuantAdam: Adam but for its rounding; the same again from a state that was saved; few bits; refusals."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tfqc.errors import CalibrationError, TfqcError
from tfqc.optim import STQuantAdam
from tfqc.optim.allocation import RUNGS

INPUTS = torch.randn(512, 16, generator=torch.Generator().manual_seed(1))
TARGETS = torch.tanh(INPUTS @ torch.randn(16, 4, generator=torch.Generator().manual_seed(2)))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 4))


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> float:
    """The mean loss of the last ten steps."""
    losses: list[float] = []
    for number in range(first, first + steps):
        batch = slice(64 * number % 512, 64 * number % 512 + 64)
        loss = (net(INPUTS[batch]) - TARGETS[batch]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-10:]) / len(losses[-10:])


def test_small_layers_are_those_of_adam() -> None:
    """Biases and the like are kept in float32, so that the arithmetic can be compared."""
    ours, theirs = nn.Linear(3, 4), nn.Linear(3, 4)
    theirs.load_state_dict(ours.state_dict())
    options: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.99), "weight_decay": 0.1}
    for net, optimizer in ((ours, STQuantAdam(ours.parameters(), **options)),
                           (theirs, torch.optim.AdamW(theirs.parameters(), **options))):  # fmt: skip
        for n in range(20):
            optimizer.zero_grad()
            (net(INPUTS[n : n + 8, :3]) - TARGETS[n : n + 8]).square().mean().backward()
            optimizer.step()
    assert torch.allclose(ours.weight, theirs.weight, rtol=0, atol=1e-6)


def test_it_learns_what_adam_learns() -> None:
    def learned(make: Callable[[Iterable[Tensor]], torch.optim.Optimizer]) -> float:
        net = network()
        return train(net, make(net.parameters()), 400)

    start = train(network(), torch.optim.SGD(network().parameters(), lr=0.0), 10)
    adam, ours = (
        learned(lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0)),
        learned(lambda p: STQuantAdam(p, 3e-3)),
    )
    assert abs(ours - adam) < 0.01 * start and adam < 0.05 * start


def test_bits_are_those_of_the_bytes_that_are_held() -> None:
    net = nn.Linear(256, 256, bias=False)
    optimizer = STQuantAdam(net.parameters(), every=5)
    net(torch.randn(8, 256)).square().mean().backward()
    optimizer.step()
    assert optimizer.bits() == 4 + (16 + 24) / 2 / 128
    for _ in range(20):
        optimizer.step()
    assert optimizer.bits() <= 4.99
    (state,) = optimizer.state.values()
    assert all(state[name]["codes"].shape[1] in RUNGS for name in ("exp_avg", "exp_avg_sq"))


def test_layers_differ_in_their_bits() -> None:
    net = network()
    optimizer = STQuantAdam(net.parameters(), every=5)
    train(net, optimizer, 60)
    assert len({s["bits"]["exp_avg"] for s in optimizer.state.values() if isinstance(s["exp_avg"], dict)}) > 1
    assert optimizer.bits() < 32


def test_it_goes_on_as_if_it_had_not_stopped() -> None:
    whole = network()
    train(whole, STQuantAdam(whole.parameters(), every=7, seed=5), 40)
    first = network()
    optimizer = STQuantAdam(first.parameters(), every=7, seed=5)
    train(first, optimizer, 25)
    file = io.BytesIO()
    torch.save({"net": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = network()
    second.load_state_dict(saved["net"])
    again = STQuantAdam(second.parameters(), every=7, seed=5)
    again.load_state_dict(saved["optimizer"])
    train(first, optimizer, 3, 25)  # what was loaded is not shared
    train(second, again, 15, 25)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))


def test_another_seed_rounds_otherwise() -> None:
    weights: list[Tensor] = []
    for seed in (0, 0, 1):
        net = network()
        train(net, STQuantAdam(net.parameters(), seed=seed), 5)
        weights.append(net[0].weight.detach())  # pyright: ignore[reportArgumentType]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_bfloat16_parameters_and_those_without_gradients() -> None:
    net = network().bfloat16()
    optimizer = STQuantAdam(net.parameters(), lr=1e-2)
    before = [p.detach().clone() for p in net.parameters()]
    net[2](INPUTS[:, :1].repeat(1, 64).bfloat16()).square().mean().backward()
    optimizer.step()
    changed = [not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True)]
    assert changed == [False, False, True, True, False, False] and len(optimizer.state) == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_gradient_changes_nothing(value: float) -> None:
    net = network()
    optimizer = STQuantAdam(net.parameters())
    train(net, optimizer, 2)
    net[4].weight.grad[1, 2] = value  # type: ignore[index]
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(CalibrationError, match=r"gradient of parameter #4 \(4x64\) is NaN or infinite"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_sparse_gradients_are_refused() -> None:
    table = nn.Embedding(10, 8, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(CalibrationError, match="sparse"):
        STQuantAdam(table.parameters()).step()


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1},
        {"betas": (1.0, 0.9)},
        {"eps": 0},
        {"weight_decay": -1},
        {"budget": 4},
        {"every": 0},
        {"every": 2.5},
        {"betas": (0.9,)},
    ],
)
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(TfqcError, match=next(iter(options))):
        STQuantAdam(network().parameters(), **options)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
def test_a_copy_goes_on_alike(copied: Callable[[Any], Any]) -> None:
    net = network()
    optimizer = STQuantAdam(net.parameters(), every=5, seed=3)
    train(net, optimizer, 7)
    twin, its = copied((net, optimizer))
    assert train(net, optimizer, 8, 7) == train(twin, its, 8, 7)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("shape", [(), (0, 5), (1,)])
def test_parameters_of_any_size(shape: tuple[int, ...]) -> None:
    param = nn.Parameter(torch.zeros(shape))
    optimizer = STQuantAdam([param], lr=0.5)
    param.grad = torch.ones(shape)
    optimizer.step()
    assert torch.allclose(param, torch.full(shape, -0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_nothing(dtype: torch.dtype) -> None:
    def learned() -> float:
        net = network()
        return train(net, STQuantAdam(net.parameters(), every=2), 4)

    wanted, net = learned(), network()
    optimizer = STQuantAdam(net.parameters(), every=2)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert train(net, optimizer, 4) == wanted
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("size", [8, 500])
def test_a_gradient_whose_square_is_infinite_is_refused(size: int) -> None:
    """The second moment would be infinite from then on, and the parameter would never move again."""
    param = nn.Parameter(torch.zeros(size))
    param.grad = torch.full((size,), 1e20)
    with pytest.raises(CalibrationError, match="or its square is"):
        STQuantAdam([param]).step()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float64])
def test_dtypes_that_lose_something_are_refused(dtype: torch.dtype) -> None:
    param = nn.Parameter(torch.zeros(5, dtype=dtype))
    param.grad = torch.ones(5, dtype=dtype)
    with pytest.raises(CalibrationError, match=f"is {dtype}: STQuantAdam takes"):
        STQuantAdam([param]).step()


def test_states_of_others_are_refused() -> None:
    net = network()
    adam, ours = torch.optim.AdamW(net.parameters()), STQuantAdam(net.parameters())
    train(net, adam, 1)
    with pytest.raises(TfqcError, match=r"parameter #0 is none of STQuantAdam's for 64x16"):
        ours.load_state_dict(adam.state_dict())
    train(net, ours, 1)
    wide = nn.Sequential(nn.Linear(16, 80), nn.SiLU(), nn.Linear(80, 64), nn.SiLU(), nn.Linear(64, 4))
    with pytest.raises(TfqcError, match="parameter #0 is none of STQuantAdam's for 80x16"):
        STQuantAdam(wide.parameters()).load_state_dict(ours.state_dict())
