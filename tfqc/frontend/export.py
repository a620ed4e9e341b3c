"""torch.export, and what has to be done to its result: regions inlined."""

from __future__ import annotations

import inspect
import os
import re
import traceback
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.export.graph_signature import InputKind, OutputKind
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from tfqc import version
from tfqc.errors import CaptureError
from tfqc.frontend.attention import dense_attention
from tfqc.frontend.evaluating import evaluating
from tfqc.frontend.hushed import hushed
from tfqc.frontend.inputs import keys_of
from tfqc.frontend.lengths import symbolic_lengths
from tfqc.frontend.names import printable, tensor_names
from tfqc.ir.match import item_of
from tfqc.ir.program import Input, Origin, Role
from tfqc.runtime.outputs import Structure, taken_apart
from tfqc.sampling.untouched import untouched

_TENSORS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR, OutputKind.BUFFER_MUTATION)

# Where code that is not the model's own lies: torch's, ours, and what is made up on the way.
_NOT_THE_MODELS = (*(f"{Path(str(p.__file__)).parent}{os.sep}" for p in (torch, version)), inspect.__file__, "<")


@dataclass(frozen=True)
class Returned:
    """What a model returns: the place of each tensor, and the structure around them (`tfqc.runtime.outputs`)."""

    places: tuple[tuple[str, ...], ...]
    structure: Structure


class _Unreturnable(Exception):
    """The model returns something else than tensors and constants: what, as the end of a sentence."""


def export(
    model: torch.nn.Module, arguments: dict[str, Any], dims: Mapping[tuple[str, ...], dict[int, str]]
) -> tuple[torch.export.ExportedProgram, Returned]:
    """The graph of a model that returns its tensors in a tuple, and how it returns them itself."""
    symbols = {s for d in dims.values() for s in d.values()}
    auto = torch.export.Dim.AUTO

    def shapes(value: Any, path: tuple[str, ...]) -> Any:
        if path in dims:
            return dict.fromkeys(dims[path], auto)
        if isinstance(value, Mapping):
            return {k: shapes(v, (*path, str(k))) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(shapes(v, (*path, str(i))) for i, v in enumerate(value))
        return None

    device = next(model.parameters(), torch.empty(0)).device
    arguments = pytree.tree_map_only(Tensor, lambda t: t.to(device), arguments)
    returned = Returned((), ["tensor", 0])

    def take_apart(_module: torch.nn.Module, _inputs: Any, output: Any) -> tuple[Tensor, ...]:
        nonlocal returned
        try:
            tensors, structure = taken_apart(output)
        except TypeError as error:
            raise _Unreturnable(str(error)) from error
        if not tensors:
            raise _Unreturnable("there is no tensor in it")
        returned = Returned(tuple(place for place, _ in tensors), structure)
        return tuple(tensor for _, tensor in tensors)

    hook = model.register_forward_hook(take_apart)
    try:
        with (
            evaluating(model), warnings.catch_warnings(), torch.no_grad(), untouched(model), _Attached(),
            dense_attention(model), symbolic_lengths(model), hushed(),
        ):  # fmt: skip
            warnings.simplefilter("ignore")
            dynamic_shapes = {k: shapes(v, (k,)) for k, v in arguments.items()}
            exported = torch.export.export(model, (), arguments, dynamic_shapes=dynamic_shapes, strict=False)
            return exported, returned
    except _Unreturnable as error:
        raise CaptureError(
            f"{type(model).__name__} returns what no compiled model can: {error}; return tensors, numbers, texts and "
            "None, in dictionaries, lists, tuples and dataclasses, from a module around it."
        ) from error
    except Exception as error:
        where = _source_of(error)
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CaptureError(
            f"{type(model).__name__} could not be exported{f' at {where}' if where else ''}: {reason}",
            f"symbolic dimensions: {sorted(symbols)}",
        ) from error
    finally:
        hook.remove()


_PAD_SEQUENCE = torch._C._nn.pad_sequence  # pyright: ignore[reportAttributeAccessIssue]


class _Attached(TorchFunctionMode):
    """`x.data` as `x.detach()`: torch.export does not see what is written to the former. Sequences of one as they are:
    there is nothing to pad."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.data.__get__:  # type: ignore[attr-defined]
            return args[0].detach()
        if func is _PAD_SEQUENCE and len(args[0]) == 1:
            return args[0][0].unsqueeze(0 if args[1:2] == (True,) or (kwargs or {}).get("batch_first") else 1)
        return func(*args, **(kwargs or {}))


def _source_of(error: BaseException) -> str:
    """`file:line in function` of the last line of the model's own code in a traceback."""
    return source_of(traceback.extract_tb(error.__traceback__))


def source_of(frames: traceback.StackSummary) -> str:
    """`file:line in function` of the last of them that is the model's own."""
    own = [f for f in frames if not f.filename.startswith(_NOT_THE_MODELS)]
    if not own:
        return ""
    return f"{_short(own[-1].filename)}:{own[-1].lineno} in {own[-1].name}"


def _short(path: str) -> str:
    return "/".join(path.split("/site-packages/")[-1].split("/")[-4:])


def graph_module(exported: torch.export.ExportedProgram, model: str) -> tuple[fx.GraphModule, dict[str, str]]:
    """The graph with the model's tensors as attributes, and what those are called: {name there: name in the model}."""
    specs = [*exported.graph_signature.input_specs, *exported.graph_signature.output_specs]
    own = [str(spec.target) for spec in specs if spec.kind in _TENSORS]
    names = tensor_names(dict.fromkeys(own))
    for spec in specs:
        if spec.kind in _TENSORS:
            spec.target = names[str(spec.target)]
    exported._state_dict = {names.get(name, name): value for name, value in exported._state_dict.items()}
    exported._constants = {names.get(name, name): value for name, value in exported._constants.items()}
    try:
        return exported.module(check_guards=True), {name: original for original, name in names.items()}
    except Exception as error:
        raise CaptureError(
            f"{model} has submodules or parameters with names that torch.export cannot restore; rename them.",
            str(error),
        ) from error


# Regions that change how operations are differentiated or cast, not what they are.
_REGIONS = {"wrap_with_set_grad_enabled", "wrap_with_autocast"}


def inline_regions(root: fx.GraphModule) -> None:
    """Put the body of `with torch.no_grad():` and of a disabled autocast in the place of its call."""
    for node in list(root.graph.nodes):
        target = node.target
        if not isinstance(target, torch._ops.HigherOrderOperator) or target.name() not in _REGIONS:
            continue
        given = inspect.signature(target.__call__).bind(*node.args, **node.kwargs).arguments
        region, operands = given["wrapped_func"], given["args"]
        body = getattr(root, str(region.target))
        if given.get("enabled"):
            inside = next((origin_of(n).source for n in body.graph.nodes if n.op == "call_function"), "")
            raise CaptureError(
                f"The model turns autocast on around {inside or 'nothing'}: convert it to the dtype that it is to run "
                "in, and capture it without autocast."
            )
        inline_regions(body)
        parameters = [n for n in body.graph.nodes if n.op == "placeholder"]
        mapping = dict(zip(parameters, operands, strict=True))
        with root.graph.inserting_before(node):
            results = root.graph.graph_copy(body.graph, mapping)
        assert isinstance(results, (tuple, list))
        for user in list(node.users):
            item = item_of(user)
            assert item, "a region's results are picked one by one"
            user.replace_all_uses_with(results[item[1]])  # type: ignore[arg-type]
            root.graph.erase_node(user)
        root.graph.erase_node(node)
        if not region.users:
            root.graph.erase_node(region)


def shared_by_all(
    exported: torch.export.ExportedProgram, inputs: Iterable[Input], dims: Mapping[tuple[str, ...], dict[int, str]]
) -> dict[tuple[str, ...], bool]:
    """Places of inputs that are one for all images: their first dimension is as long as the example's batch by chance.

    The model fixes that dimension (True), or asks nothing of it that has to do with the batch, so that it may have any
    length (False). (A time is one for each image, whatever it does.)
    """
    parameters = [n for n in exported.graph.nodes if n.op == "placeholder"][
        -len(exported.graph_signature.user_inputs) :
    ]
    leaves, _ = pytree.tree_flatten_with_path(call_tree(exported, parameters))
    first = {
        keys_of(path): str(n.meta["val"].shape[0]) for path, n in leaves if dims.get(keys_of(path), {}).get(0) == "B"
    }
    noisy = next(i.path for i in inputs if i.role is Role.SAMPLE)
    batch = first[noisy]
    if batch.isdigit():
        return {}
    equations = [guard.expr for guard in shape_environment(exported).guards if isinstance(guard.expr, sympy.Eq)]
    together = [{str(symbol) for symbol in e.free_symbols} for e in equations]
    related = {batch, *(symbol for symbols in together if batch in symbols for symbol in symbols)}
    others = [i.path for i in inputs if i.role is not Role.TIME and i.path != noisy]
    apart = [path for path in others if first.get(path, batch) not in related]
    return {path: first[path].isdigit() for path in apart}


def shape_environment(exported: torch.export.ExportedProgram) -> Any:
    """torch's record of symbols and guards; None if no input has a symbolic dimension."""
    values = (node.meta.get("val") for node in exported.graph.nodes)
    return next((v.fake_mode.shape_env for v in values if isinstance(v, FakeTensor)), None)


def call_tree(exported: torch.export.ExportedProgram, parameters: list[fx.Node]) -> dict[str, Any]:
    assert exported.call_spec.in_spec is not None
    _, kwargs = pytree.tree_unflatten(parameters, exported.call_spec.in_spec)
    return kwargs


def origin_of(node: fx.Node) -> Origin:
    """Module path and source line of a node of torch.export's graph."""
    stack = (node.meta.get("nn_module_stack") or {}).values()
    modules = [path for path, _ in stack if not path.startswith("_empty_nn_module_stack")]  # torch's placeholder
    trace = node.meta.get("stack_trace") or ""
    frames = re.findall(r'File "([^"]+)", line (\d+)', trace)
    own = [(f, n) for f, n in frames if not f.startswith(_NOT_THE_MODELS)] or frames
    source = f"{_short(own[-1][0]).rpartition('/')[2]}:{own[-1][1]}" if own else ""
    return Origin(printable(modules[-1]) if modules else "", printable(source))
