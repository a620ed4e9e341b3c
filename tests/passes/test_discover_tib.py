"""discover-tib: which features it finds in real architectures, and that data flow alone decides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import networkx as nx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tests.helpers import evaluate_nodes, features, find, roles_of, run_pass
from tests.models import MODELS, Example
from tfqc.analysis.binding import data_flow
from tfqc.analysis.outline import outline
from tfqc.errors import PassError, PipelineError
from tfqc.frontend import capture
from tfqc.ir.program import Input, Program, Role
from tfqc.ir.render import render
from tfqc.ir.rows import BindingTime, Tib
from tfqc.passes.discover_tib import DiscoverTib
from tfqc.passes.normalize import Normalize

X, T = torch.linspace(-1, 1, 12).reshape(2, 6), torch.tensor([7, 421])
STATIC, REQUEST = {Role.TIME}, {Role.TIME, Role.REQUEST}

# How many features, and what they wait for. A residual block has one (two with scale-shift norm); an adaLN-zero
# block has six (shift, scale, gate; twice), a last norm two. SD3 and Flux modulate the text with the timestep before
# the first block reads it: there q, k and v of the text are features, in the place of its scale and shift.
EXPECTED: dict[str, tuple[int, set[Role]]] = {
    "unet2d": (8, STATIC),
    "unet2d-scale-shift": (16, STATIC),
    "unet2d-classes": (8, REQUEST),
    "unet-sd": (8, STATIC),
    "unet-sdxl": (8, REQUEST),
    "dit": (2 * 6 + 2, REQUEST),
    "pixart": (2 * 6 + 2, STATIC),
    "sd3": ((6 + 4 + 3) + (6 + 2) + 2, REQUEST),
    "flux": ((6 + 4 + 3) + 3 + 2, REQUEST),
    "flux-guidance": ((6 + 4 + 3) + 3 + 2, REQUEST),
    "odd-names": (1, STATIC),
    "in-place": (1, STATIC),
}


def discover(model: nn.Module, **inputs: Tensor) -> Program:
    """Capture, normalize, discover."""
    model.requires_grad_(False)
    return run_pass(run_pass(capture(model, inputs), Normalize()), DiscoverTib())


def flat(program: Program, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Example inputs by the names of the program's parameters."""

    def pick(path: tuple[str, ...]) -> Tensor:
        value: Any = inputs
        for key in path:
            value = value[key]
        return value

    return {i.name: pick(i.path) for i in program.inputs}


# -- every model ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPECTED)
def test_features_of_real_architectures(name: str, discovered: Callable[[str], Program]) -> None:
    program = discovered(name)
    count, roles = EXPECTED[name]
    assert [roles_of(program, n) for n in features(program)] == [roles] * count


def test_features_of_different_kinds(discovered: Callable[[str], Program]) -> None:
    program = discovered("chain")
    kinds = [roles_of(program, n) for n in features(program)]
    assert [kinds.count(STATIC), kinds.count(REQUEST)] == [2, 1]


@pytest.mark.parametrize("name", MODELS)
def test_the_sample_does_not_move_a_feature_and_the_time_does(
    name: str, discovered: Callable[[str], Program], example: Callable[[str], Example]
) -> None:
    program, (_, inputs) = discovered(name), example(name)
    (sample,), (time,) = program.input(Role.SAMPLE), program.input(Role.TIME)
    nodes = features(program)
    here = evaluate_nodes(program, nodes, inputs)
    noised = evaluate_nodes(program, nodes, {**inputs, sample.path[0]: inputs[sample.path[0]] * 2 + 1})
    later = evaluate_nodes(program, nodes, {**inputs, time.path[0]: inputs[time.path[0]].flip(0)})
    for node, value, same, other in zip(nodes, here, noised, later, strict=True):
        assert torch.equal(value, same), node
        assert not torch.equal(value, other), node
        # Rows over the batch: the timesteps are exchanged, and so are the rows where they alone matter.
        if roles_of(program, node) == STATIC:
            torch.testing.assert_close(value, other.flip(0))


@pytest.mark.parametrize("name", MODELS)
def test_features_can_be_computed_without_the_sample(
    name: str, discovered: Callable[[str], Program], example: Callable[[str], Example]
) -> None:
    program, (_, inputs) = discovered(name), example(name)
    nodes = features(program)
    program.functions["probe"] = outline(program, nodes, {Role.TIME, Role.REQUEST})
    given = flat(program, inputs)
    del given[program.input(Role.SAMPLE)[0].name]
    got = program.module("probe")(**given)
    torch.testing.assert_close(list(got), evaluate_nodes(program, nodes, inputs), rtol=0, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_membership_is_transitive(name: str, discovered: Callable[[str], Program]) -> None:
    """The TIB is what features are computed from that waits for the time, and what only it reads."""
    program = discovered(name)
    tib = program.table(Tib)
    flow = data_flow(program.step)
    above = set().union(*(nx.ancestors(flow, n.name) for n in features(program)))
    for node in program.step.nodes:
        if node.op != "call_function":
            continue
        waits = Role.TIME in roles_of(program, node) and node.name in above
        constant = not roles_of(program, node) & {Role.TIME, Role.SAMPLE} and all(u.name in tib for u in node.users)
        is_feature = node.name in tib and tib[node.name].part == "feature"
        assert (node.name in tib) == (waits or constant or is_feature), node
        if is_feature:
            assert Role.SAMPLE not in roles_of(program, node)
            assert any(u.op == "output" or Role.SAMPLE in roles_of(program, u) for u in node.users)


# -- names do not matter -------------------------------------------------------------------------------------


def renamed(program: Program) -> Program:
    """The same program where every node, input, tensor and origin has another name."""
    graph, mapping, tensors = fx.Graph(), dict[fx.Node, fx.Node](), dict[str, Tensor]()
    inputs, types = list[Input](), dict[str, Any]()
    for number, node in enumerate(program.step.nodes):
        args = fx.map_arg(node.args, lambda n: mapping[n])
        kwargs = fx.map_arg(node.kwargs, lambda n: mapping[n])
        target = node.target
        if node.op == "get_attr":
            target = f"p{number}"
            tensors[target] = program.tensors[str(node.target)]
        if node.op == "placeholder":
            target = f"v{number}"
            item = next(i for i in program.inputs if i.name == node.name)
            inputs.append(Input(target, item.role, (target,), item.type, item.domain))
        new = mapping[node] = graph.create_node(node.op, target, args, kwargs, name=f"v{number}")
        if node.op != "output":
            types[new.name] = program.types[node.name]
    return Program({"step": graph}, tensors, tuple(inputs), types, {}, dict(program.symbols), model="m")


@pytest.mark.parametrize("name", MODELS)
def test_names_do_not_matter(
    name: str, captured: Callable[[str], Program], discovered: Callable[[str], Program]
) -> None:
    other = run_pass(run_pass(renamed(captured(name)), Normalize()), DiscoverTib())

    def parts(program: Program) -> list[tuple[str, str]]:
        tib = program.table(Tib)
        nodes = [n for n in program.step.nodes if n.op == "call_function"]
        return [(str(n.target), tib[n.name].part if n.name in tib else "") for n in nodes]

    assert parts(other) == parts(discovered(name))


def test_a_wrapper_with_misleading_names_finds_the_same(
    example: Callable[[str], Example], discovered: Callable[[str], Program]
) -> None:
    inner, inputs = example("unet2d")

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.time_embedding_linear = inner  # not the whole model is an embedding of the time
            self.decoder = nn.Identity()

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return self.decoder(self.time_embedding_linear(sample, timestep, return_dict=False)[0])

    program = discover(Wrapper(), **inputs)
    assert [(str(n.target), str(program.type(n))) for n in features(program)] == [
        (str(n.target), str(discovered("unet2d").type(n))) for n in features(discovered("unet2d"))
    ]


# -- what is and is not a feature ----------------------------------------------------------------------------


class Base(nn.Module):
    """x [B, 6] through one layer, t [B] through another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.embed = nn.Linear(6, 6), nn.Linear(6, 6)


def test_constants_that_others_read_are_not_part_of_it() -> None:
    class Shared(Base):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            shared = torch.arange(6.0).exp()
            own = torch.arange(6.0).cos()
            feature = self.embed(torch.sin(t[:, None] * shared * own))
            return (self.inner(x) + feature) * shared

    program = discover(Shared(), x=X, t=T)
    (exp,), (cos,) = find(program, "exp."), find(program, "cos")
    assert exp.name not in program.table(Tib)
    assert program.table(Tib)[cos.name].part == "body"
    assert program.table(BindingTime)[exp.name].time == "constant"


def test_a_constant_read_by_dynamic_time_is_not_part_of_it() -> None:
    """A reader that waits for the time and the sample is no part of the block either."""

    class Late(Base):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            constant = torch.arange(6.0).exp()
            feature = self.embed(torch.sin(t[:, None] * constant))
            return torch.tanh(self.inner(x) + feature) * constant

    program = discover(Late(), x=X, t=T)
    (exp,) = find(program, "exp.")
    assert exp.name not in program.table(Tib)


def test_shapes_of_the_sample_are_not_the_sample() -> None:
    class Shapes(Base):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            time = t * torch.ones(x.shape[0]) * torch.ones_like(x[:, 0])
            return self.inner(x) + self.embed(time[:, None].expand(-1, x.shape[1]))

    program = discover(Shapes(), x=X, t=T)
    (feature,) = features(program)
    assert roles_of(program, feature) == STATIC
    assert "linear" in str(feature.target)


def test_values_of_the_sample_are_the_sample() -> None:
    class Mixed(Base):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.inner(x) + self.embed(t[:, None] + x.mean(1, keepdim=True).expand(-1, 6))

    program = discover(Mixed(), x=X, t=T)
    assert ["linear" in str(n.target) for n in features(program)] == [False]  # t[:, None] alone


def test_a_value_without_rows_is_passed_over() -> None:
    class Turned(Base):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            embedded = self.embed(t[:, None].float().expand(-1, 6))
            return self.inner(x) + embedded.transpose(0, 1).exp().transpose(0, 1)

    (feature,) = features(discover(Turned(), x=X, t=T))
    assert "transpose" in str(feature.target)

    class TurnedAgain(Base):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            embedded = self.embed(t[:, None].float().expand(-1, 6))
            return F.linear(self.inner(x).transpose(0, 1) + embedded.transpose(0, 1), torch.ones(1, x.shape[0]))

    (feature,) = features(discover(TurnedAgain(), x=X, t=T))
    assert "linear" in str(feature.target)


def test_a_feature_that_is_an_output() -> None:
    class Returns(Base):
        def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            return self.inner(x), self.embed(t[:, None].float().expand(-1, 6))

    (feature,) = features(discover(Returns(), x=X, t=T))
    assert "linear" in str(feature.target)


# -- unchanged, refused --------------------------------------------------------------------------------------


def test_it_only_adds_tables_and_a_second_run_changes_nothing(discovered: Callable[[str], Program]) -> None:
    program = discovered("unet-sdxl")
    text = render(program)
    assert render(run_pass(program.clone(), DiscoverTib())) == text
    bare = program.clone()
    bare.tables = {}
    assert render(run_pass(bare, DiscoverTib())) == text


def test_a_model_that_ignores_the_time_is_refused() -> None:
    class Ignores(Base):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.inner(x)

    sentence = "No value that depends on %t is read by one that depends on the sample: Ignores has no temporal"
    with pytest.raises(PassError, match=sentence):
        discover(Ignores(), x=X, t=T)


def test_a_captured_program_is_refused(captured: Callable[[str], Program]) -> None:
    with pytest.raises(PipelineError, match="discover-tib needs stage normalized but the program is only captured"):
        run_pass(captured("chain"), DiscoverTib())
