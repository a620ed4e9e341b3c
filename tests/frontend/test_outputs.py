"""What a model returns comes back in the type in which the model returns it, on every backend."""

from __future__ import annotations

import collections
import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.utils import BaseOutput
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import tfqc
from tfqc.errors import CaptureError, IRError, VerifyError
from tfqc.frontend import capture
from tfqc.ir.parse import parse
from tfqc.ir.render import render
from tfqc.ir.verify import verify
from tfqc.models.spec import ModelSpec
from tfqc.runtime import Output
from tfqc.runtime.outputs import prediction_of, put_together, taken_apart

X, T = torch.linspace(-1, 1, 16).reshape(2, 8), torch.tensor([7, 421])


@dataclass
class Pair:
    noise: Tensor
    extra: list[Tensor] | None = None
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Frozen:
    sample: Tensor


@dataclass
class Named(BaseOutput):
    sample: Tensor
    logits: Tensor | None = None


class Two(NamedTuple):
    sample: Tensor
    logvar: Tensor


class Returning(nn.Module):
    """A layer that the time shifts; `make` puts its result, and a sum of it, into what is returned."""

    def __init__(self, make: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.make = nn.Linear(8, 8).requires_grad_(False), make

    def forward(self, x: Tensor, t: Tensor) -> Any:
        y = self.inner(x) + torch.sin(t / 1000).to(x.dtype)[:, None]
        return self.make(y, y.sum(1))


CASES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tensor": lambda y, s: y,
    "tuple": lambda y, s: (y, s),
    "one": lambda y, s: (y,),
    "list": lambda y, s: [s, y],
    "dict": lambda y, s: {"sums": s, "sample": y},
    "ordered": lambda y, s: collections.OrderedDict(eps=y),
    "numbers-as-keys": lambda y, s: {0: s, 1: y},
    "dataclass": lambda y, s: Pair(y, [s, y * 2]),
    "frozen": lambda y, s: Frozen(y),
    "model-output": lambda y, s: UNet2DOutput(sample=y),
    "own-model-output": lambda y, s: Named(y),
    "namedtuple": lambda y, s: Two(y, s),
    "nested": lambda y, s: {"loss": None, "name": "eps", "deep": (s, [{"y": y}]), "out": Frozen(y + 1)},
}


def same(got: Any, want: Any) -> None:
    """Types and values, all the way down."""
    a, b = taken_apart(got), taken_apart(want)
    assert a[1] == b[1] or isinstance(got, Output)
    assert [place for place, _ in a[0]] == [place for place, _ in b[0]]
    for (_, one), (_, other) in zip(a[0], b[0], strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", ["fake-quant{weights=none activations=none}", "cpu-int8"])
@pytest.mark.parametrize("case", CASES)
def test_it_comes_back_as_it_was(case: str, target: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = Returning(CASES[case]).to(dtype)
    example = {"x": X.to(dtype), "t": T}
    spec = ModelSpec("a model", model, example, diffusers.DDIMScheduler())
    tfqc.compile(spec, target, steps=4, calibration=2).save(tmp_path / "out")
    got, want = tfqc.load(tmp_path / "out")(**example), model(**example)
    assert type(got) is (Output if type(want) is tuple else dict if isinstance(want, dict) and case == "ordered" else
                         type(want))  # fmt: skip
    same(got, want)
    own = tfqc.runtime.load(tmp_path / "out", trust_code=True)(**example)
    assert type(own) is type(got)
    if case not in ("tensor", "tuple", "one"):
        assert '"module' not in (tmp_path / "out" / "program.ir").read_text()
        assert "\noutputs [" in (tmp_path / "out" / "program.ir").read_text()


@pytest.mark.parametrize("case", CASES)
def test_programs_and_their_text(case: str) -> None:
    model = Returning(CASES[case])
    program = capture(model, {"x": X, "t": T})
    verify(program)
    again = parse(render(program), program.tensors)
    assert render(again) == render(program)
    same(again(x=X, t=T), model(X, T))
    torch.testing.assert_close(prediction_of(again.clone()(x=X, t=T), X), prediction_of(model(X, T), X))


def test_a_class_that_is_not_there_is_an_output_of_its_fields() -> None:
    tensors, structure = taken_apart(Pair(X, [T]))
    made = put_together([structure[0], "nowhere:Pair", *structure[2:]], [t for _, t in tensors])
    assert type(made) is Output and made.fields == ("noise", "extra", "scale")
    assert made.noise is X and made["extra"][0] is T and made.scale == 1.0 and made.sample is X
    with pytest.raises(AttributeError, match="'shape'"):
        made.shape  # noqa: B018


@pytest.mark.parametrize("name", ["subprocess:Popen", "builtins:dict", "os:system", "pathlib:Path", "no such:thing"])
def test_only_classes_of_those_fields_are_made(name: str) -> None:
    assert type(put_together(["fields", name, [["args", ["value", "ls"]]]], [])) is Output


def test_no_code_of_a_class_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pair, "__init__", lambda *_: pytest.fail("was run"))
    made = put_together(["fields", f"{__name__}:Pair", [[n, ["value", 1]] for n in ("noise", "extra", "scale")]], [])
    assert type(made) is Pair and made.scale == 1


@pytest.mark.parametrize(
    "line",
    ['["tensor",1]', '["code","x"]', '["list",[["tensor",0],["tensor",2]]]', "3", '["dict",[["a"]]]', '["value",[1]]'],
)
def test_text_that_is_no_structure(line: str) -> None:
    text = render(capture(Returning(CASES["dict"]), {"x": X, "t": T}))
    begin = text.index("\noutputs ") + 1
    with pytest.raises((IRError, VerifyError)):
        program = parse(text[:begin] + f"outputs {line}" + text[text.index("\n", begin) :])
        verify(program)


@pytest.mark.parametrize("make", [lambda y, s: {"y": y, "f": object()}, lambda y, s: {"a": 1.0}, lambda y, s: None])
def test_what_cannot_be_returned_is_refused(make: Callable[[Tensor, Tensor], Any]) -> None:
    with pytest.raises(CaptureError, match=r"Returning returns what no compiled model can: .*; return tensors"):
        capture(Returning(make), {"x": X, "t": T})


def test_an_output_is_a_pytree_and_can_be_copied() -> None:
    output = Output((X, [T]), ("sample", "rest"))
    doubled = pytree.tree_map(lambda t: t * 2, output)
    assert type(doubled) is Output and doubled.fields == output.fields and torch.equal(doubled.rest[0], T * 2)
    assert len(pytree.tree_leaves(output)) == 2
    for again in (pickle.loads(pickle.dumps(output)), copy.deepcopy(output), copy.copy(output)):
        assert type(again) is Output and again.fields == output.fields and torch.equal(again.sample, X)
