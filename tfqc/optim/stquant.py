"""STQuantAdam: Adam whose moments are kept in 3 to 8 bits, allocated over layers, states and time."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from tfqc.errors import CalibrationError, TfqcError
from tfqc.optim.allocation import FIRST, Allocation, Factors
from tfqc.optim.moments import BLOCK, Linear, Logarithmic, factors

GRIDS = {"exp_avg": Linear, "exp_avg_sq": Logarithmic}
SCALES = {"exp_avg": 16 / BLOCK, "exp_avg_sq": 24 / BLOCK}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of what is trained
SMALLEST = 2 * BLOCK  # values of a layer that are worth scales; smaller ones are kept in float32, and counted so


class STQuantAdam(torch.optim.Optimizer):
    """Adam with decoupled weight decay (AdamW), its moments in few bits, after STQuant (arXiv 2604.06836).

    Every `every` steps each layer's factors are compared with averages over all layers and over time, and the bits of
    its two moments go up or down one rung (`tfqc.optim.allocation`: which rules are published, and which are ours).
    Rounding is at random (`tfqc.optim.moments`), by the seed, the step and the layer alone: equal runs are equal, and
    so are runs that go on from a `state_dict`.

    Args:
        params: as of any optimizer; float32, bfloat16 or float16. The arithmetic is float32.
        lr, betas, eps, weight_decay: of AdamW.
        budget: bits of a value of a moment, on average, with its scales; nothing is raised beyond it. At least 4.25:
            all start with 4 bits and scales.
        every: steps from one look at the factors to the next.
        seed: of the rounding.

    Raises:
        TfqcError: an option is out of its range.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        budget: float = 4.99,
        every: int = 50,
        seed: int = 0,
    ) -> None:
        wrong = {
            "lr": not 0 <= lr < math.inf, "betas": len(betas) != 2 or not all(0 <= b < 1 for b in betas),
            "eps": not 0 < eps < math.inf, "weight_decay": not 0 <= weight_decay < math.inf,
            "budget": not 4.25 <= budget <= 32, "every": every < 1 or every % 1 != 0,
        }  # fmt: skip
        given = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "budget": budget, "every": every}
        for name in (n for n, w in wrong.items() if w):
            raise TfqcError(f"{name}={given[name]} is out of the range of STQuantAdam.")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self.budget, self.every, self.seed = budget, every, seed
        self._generators: dict[torch.device, torch.Generator] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step.

        Raises:
            CalibrationError: a gradient is sparse or of another dtype than those above, it or its square is NaN or
                infinite; nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_gradients()
        done = self.param_groups[0].get("steps", 0) + 1
        self.param_groups[0]["steps"] = done
        seen: dict[int, Factors] = {}
        for number, (group, param) in enumerate(self._params()):
            if param.grad is None:
                continue
            grad = param.grad.float()
            first, second = self._moved(group, param, grad)
            if param.numel() < SMALLEST:
                self.state[param] |= {"exp_avg": first, "exp_avg_sq": second}
                continue
            self._keep(param, first, second, self._generator(param.device, done, number))
            if done % self.every == 0:
                seen[number] = factors(grad, first, second)
        if seen:
            self._allocate(seen)
        return loss

    def bits(self) -> float:
        """Bits of a value of a moment, on average: of all bytes that are held, scales, padding and all."""
        held = [(tensors_of(self.state[p]), p.numel()) for _, p in self._params() if self.state.get(p)]
        values = sum(2 * count for _, count in held)
        return sum(8 * t.nbytes for tensors, _ in held for t in tensors) / max(values, 1)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As of any optimizer; codes and scales keep their dtypes.

        Raises:
            TfqcError: it is another optimizer's, or of parameters of other sizes; nothing has changed then.
        """
        for number, (_, param) in enumerate(self._params()):
            if (given := state_dict["state"].get(number)) is not None and not _fits(given, param):
                raise TfqcError(
                    f"The state of parameter #{number} is none of STQuantAdam's for {'x'.join(map(str, param.shape))}: "
                    "give one that the same optimizer wrote, of the same model."
                )
        super().load_state_dict(dict(state_dict))
        for number, (_, param) in enumerate(self._params()):
            if (given := state_dict["state"].get(number)) is not None:
                self.state[param] = tree_map_only(Tensor, functools.partial(_copied, device=param.device), given)

    def __getstate__(self) -> dict[str, Any]:
        own = {"budget": self.budget, "every": self.every, "seed": self.seed}
        return {**super().__getstate__(), **own, "_generators": {}}  # which are seeded anew at each use

    def _params(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        yield from ((group, param) for group in self.param_groups for param in group["params"])

    def _check_gradients(self) -> None:
        for number, (_, param) in enumerate(self._params()):
            if param.grad is None:
                continue
            where = f"The gradient of parameter #{number} ({'x'.join(map(str, param.shape))})"
            if param.grad.layout is not torch.strided:
                raise CalibrationError(f"{where} is sparse: STQuantAdam takes dense ones.")
            if param.grad.dtype not in DTYPES:
                raise CalibrationError(
                    f"{where} is {param.grad.dtype}: STQuantAdam takes float32, bfloat16 and float16."
                )
            if param.numel() and not bool(torch.isfinite(param.grad.abs().max().float().square())):
                raise CalibrationError(
                    f"{where} is NaN or infinite, or its square is: a lower learning rate may keep it from that."
                )

    def _moved(self, group: dict[str, Any], param: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Move a parameter; returns its moments in float32."""
        state = self.state[param]
        if not state:
            state |= {"step": 0, "bits": dict.fromkeys(GRIDS, FIRST)}
        state["step"] += 1
        (beta1, beta2), steps = group["betas"], state["step"]
        first, second = (self._moment(param, name) for name in GRIDS)
        first = first.lerp_(grad, 1 - beta1)
        second = second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        size = (second / (1 - beta2**steps)).sqrt_().add_(group["eps"])
        moved = param.float().mul(1 - group["lr"] * group["weight_decay"])
        param.copy_(moved.addcdiv_(first, size, value=-group["lr"] / (1 - beta1**steps)))
        return first, second

    def _moment(self, param: Tensor, name: str) -> Tensor:
        kept = self.state[param].get(name)
        if kept is None:
            return torch.zeros(param.shape, device=param.device, dtype=torch.float32)
        return kept if isinstance(kept, Tensor) else GRIDS[name](**kept).values(param)

    def _keep(self, param: Tensor, first: Tensor, second: Tensor, generator: torch.Generator) -> None:
        state = self.state[param]
        for (name, grid), value in zip(GRIDS.items(), (first, second), strict=True):
            state[name] = vars(grid.of(value, state["bits"][name], generator))

    def _generator(self, device: torch.device, step: int, number: int) -> torch.Generator:
        generator = self._generators.setdefault(device, torch.Generator(device))
        return generator.manual_seed(((self.seed * 1_000_003 + step) * 1_000_003 + number) % 2**63)

    def _allocate(self, seen: Mapping[int, Factors]) -> None:
        """Bits from the next step on."""
        params = [param for _, param in self._params()]
        large = [p.numel() >= SMALLEST for p in params]
        allocation = Allocation(
            values=[-(-p.numel() // BLOCK) * BLOCK * is_large for p, is_large in zip(params, large, strict=True)],
            scales=SCALES,
            budget=self.budget,
            whole=sum(p.numel() for p, is_large in zip(params, large, strict=True) if not is_large),
            averages=self.param_groups[0].get("averages", {}),
            bits={(n, k): b for n in seen for k, b in self.state[params[n]]["bits"].items()},
        )
        allocation.look(seen)
        self.param_groups[0]["averages"] = allocation.averages
        for number in seen:
            self.state[params[number]]["bits"] = {name: allocation.bits[number, name] for name in GRIDS}


def tensors_of(state: Mapping[str, Any]) -> list[Tensor]:
    """Of a parameter's state, what it holds."""
    return [leaf for leaf in tree_leaves(dict(state)) if isinstance(leaf, Tensor)]


def _fits(state: Mapping[str, Any], param: Tensor) -> bool:
    def fits(moment: Any) -> bool:
        if isinstance(moment, Tensor):
            return moment.shape == param.shape
        return isinstance(moment, Mapping) and moment["scale"].numel() == -(-param.numel() // BLOCK)

    return {"step", "bits", *GRIDS} <= set(state) and all(fits(state[name]) for name in GRIDS)


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.detach().to(device, copy=True)
