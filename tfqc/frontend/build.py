"""From torch.export's graph to a captured Program."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from tfqc.errors import CaptureError, IRError
from tfqc.frontend.export import Returned, call_tree, graph_module, inline_regions, origin_of
from tfqc.frontend.guards import check_guards, guards_of
from tfqc.frontend.inputs import keys_of
from tfqc.frontend.symbols import Symbols
from tfqc.ir.calls import canonical
from tfqc.ir.match import returned_value
from tfqc.ir.ops import is_assertion, op_by_name, op_name, works_in_place
from tfqc.ir.program import STEP, Input, Origin, Program, Role
from tfqc.ir.schema import check_call
from tfqc.ir.types import TensorType, Type, storable
from tfqc.runtime.outputs import prediction_at, renumbered

aten = torch.ops.aten

# Python's operators on integers and truths, as torch.export has them, and ATen's operations of the same schema.
_OPERATORS: dict[Any, Any] = {
    aten.__and__.Tensor: aten.bitwise_and.Tensor, aten.__and__.Scalar: aten.bitwise_and.Scalar,
    aten.__or__.Tensor: aten.bitwise_or.Tensor, aten.__or__.Scalar: aten.bitwise_or.Scalar,
    aten.__xor__.Tensor: aten.bitwise_xor.Tensor, aten.__xor__.Scalar: aten.bitwise_xor.Scalar,
    aten._conj.default: aten.conj_physical.default,
}  # fmt: skip


def build_program(
    model: torch.nn.Module,
    exported: torch.export.ExportedProgram,
    returned: Returned,
    inputs: list[Input],
    dims: Mapping[tuple[str, ...], dict[int, str]],
    name: str,
    multiples: bool = False,
) -> Program:
    """The program of an exported model; `inputs` are those that it has: what else the example has is fixed.

    With `multiples` it need not take every number of images: multiples of some number will do.
    """
    root, originals = graph_module(exported, type(model).__name__)
    check_guards(root, exported, dims, type(model).__name__, multiples)
    inline_regions(root)
    tensors = _tensors_of(model)
    by_path = {i.path: i for i in inputs}
    program = Program({STEP: fx.Graph()}, {}, tuple(inputs), model=name)
    naming = Symbols(program)
    graph = program.step
    mapping: dict[fx.Node, Any] = {}
    columns: dict[fx.Node, TensorType] = {}  # a time as the model wants it: [B, 1]; a program's is [B]
    parameters = [n for n in root.graph.nodes if n.op == "placeholder"]
    leaves, _ = pytree.tree_flatten_with_path(call_tree(exported, parameters))
    for path, parameter in leaves:
        keys = keys_of(path)
        value = parameter.meta.get("val")
        if keys not in by_path:
            mapping[parameter] = value
            continue
        if isinstance(value, Tensor):
            naming.bind(value, dims[keys])
        word = by_path[keys].name
        mapping[parameter] = graph.create_node("placeholder", word, name=word)
        type_ = naming.type(value)
        assert isinstance(type_, TensorType)
        if by_path[keys].role is Role.TIME and len(type_.shape) > 1:
            columns[parameter] = type_
            type_ = TensorType(type_.dtype, type_.shape[:1])
        by_path[keys] = dataclasses.replace(by_path[keys], type=type_)
        program.types[by_path[keys].name] = type_
    program.inputs = tuple(by_path.values())
    pairs: set[str] = set()
    program.guards = guards_of(exported, naming, type(model).__name__)
    for node in root.graph.nodes:
        if node.op == "get_attr":
            target = str(node.target)
            tensor = tensors.get(originals.get(target, target))
            if tensor is None:  # a constant that the model's code made, lifted by torch.export
                tensor = _attribute(root, target)
                if not isinstance(tensor, Tensor):
                    raise CaptureError(f"The model keeps {target!r}, a {type(tensor).__name__}: only tensors can be.")
            if tensor.dtype == torch.complex128:  # which files do not hold
                tensor = torch.view_as_real(tensor.resolve_conj())
                pairs.add(target)
            if reason := storable(target, tensor.dtype):
                raise CaptureError(f"The model keeps {target!r}: {reason}")
            program.tensors.setdefault(target, tensor.detach())
            mapping[node] = target
        elif node.op == "call_module" and node.target != "_guards_fn":
            raise CaptureError(f"torch.export left a call of submodule {node.target!r} in the graph.")
    # Parameters must stand before tensors, and tensors before operations.
    output = graph.output(None)
    alive = _alive(root.graph)
    stored = {node: mapping[node] for node in root.graph.nodes if node.op == "get_attr"}
    for node, name_ in stored.items():
        mapping[node] = program.tensor_node(name_)
    graph.erase_node(output)
    for parameter, type_ in columns.items():
        shape = [-1, *type_.shape[1:]]
        mapping[parameter] = graph.create_node(
            "call_function", aten.reshape.default, *canonical(aten.reshape.default, (mapping[parameter], shape), {})
        )
        program.types[mapping[parameter].name] = type_
        program.origins[mapping[parameter].name] = Origin("", "")
    for node, name_ in stored.items():
        if name_ in pairs:
            mapping[node] = graph.call_function(
                aten.view_as_complex.default, *canonical(aten.view_as_complex.default, (mapping[node],), {})
            )
            program.types[mapping[node].name] = TensorType(torch.complex128, tuple(program.tensors[name_].shape[:-1]))
            program.origins[mapping[node].name] = Origin("", "")
    for node in root.graph.nodes:
        if node.op == "call_function" and node in alive:
            args = fx.map_arg(node.args, lambda n: mapping[n])
            kwargs = fx.map_arg(node.kwargs, lambda n: mapping[n])
            args, kwargs = map_aggregate((args, kwargs), _on_cpu)
            target = _known(node)
            _check(node, target, args, kwargs, program.types)
            new = graph.create_node("call_function", target, *canonical(target, args, kwargs), name=node.name)
            mapping[node] = new
            program.types[new.name] = _type(naming, node)
            program.origins[new.name] = origin_of(node)
        elif node.op == "output":
            _return(program, returned, [mapping[n] for n in pytree.tree_leaves(returned_value(node))])
    program.prune()
    return program


def _return(program: Program, returned: Returned, values: list[fx.Node]) -> None:
    """The function's output: what is predicted of the sample first, and the structure unless it is that of `Output`."""
    structure = returned.structure
    plain = all(part[0] == "tensor" for part in structure[1]) if structure[0] == "tuple" else structure[0] == "tensor"
    if plain:
        program.step.output(values[0] if structure[0] == "tensor" else tuple(values))
        return
    sample = next(i.type.shape for i in program.inputs if i.role is Role.SAMPLE)
    types = [program.tensor_type(value) for value in values]
    first = prediction_at(returned.places, [t.shape if t else () for t in types], sample)
    order = [first, *(i for i in range(len(values)) if i != first)]
    program.step.output(tuple(values[i] for i in order))
    program.outputs = renumbered(structure, {old: new for new, old in enumerate(order)})


def _alive(graph: fx.Graph) -> set[fx.Node]:
    """What is computed for an output, or has an effect."""
    alive: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or node in alive or works_in_place(node.target) or is_assertion(node.target):
            alive |= {node, *node.all_input_nodes}
    return alive


def _on_cpu(value: Any) -> Any:
    """The device at capture (meta, say) means nothing to the program."""
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _tensors_of(model: torch.nn.Module) -> dict[str, Tensor]:
    named = dict(model.named_parameters(remove_duplicate=False))
    return named | dict(model.named_buffers(remove_duplicate=False))


def _attribute(root: torch.nn.Module, target: str) -> Any:
    owner, _, leaf = target.rpartition(".")
    return getattr(root.get_submodule(owner), leaf)


def _known(node: fx.Node) -> Any:
    """The node's target, if it is one that programs may hold and that is found again by its name."""
    if (same := _OPERATORS.get(node.target)) is not None:
        return same
    try:
        return op_by_name(op_name(node.target))
    except IRError as error:
        raise CaptureError(f"The model calls {node.target} at {_where(node)}: {error}", *error.notes) from error


def _check(node: fx.Node, target: Any, args: Any, kwargs: Any, types: dict[str, Type]) -> None:
    """What is captured can be parsed back: parsing refuses the same calls."""
    try:
        check_call(target, args, kwargs, types)
    except IRError as error:
        raise CaptureError(f"The model calls {node.target} at {_where(node)}: {error}") from error


def _type(naming: Symbols, node: fx.Node) -> Type:
    try:
        return naming.type(node.meta.get("val"))
    except CaptureError as error:
        raise CaptureError(f"The model calls {node.target} at {_where(node)}: {error}") from error


def _where(node: fx.Node) -> str:
    origin = origin_of(node)
    return ", ".join(part for part in (origin.module, origin.source) if part) or f"%{node.name}"
