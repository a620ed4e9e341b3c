"""The front end: a torch module and example inputs become a captured Program, by torch.export.

Weights are not needed (a model on the meta device can be captured), and the batch is a symbol from the start.
"""

from __future__ import annotations

import dataclasses
import inspect
import operator
import re
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.fx.graph import _Namespace
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree
from torch.utils._sympy.functions import FloorDiv, Mod

from tfqc.errors import CaptureError
from tfqc.ir.ops import op_by_name, op_name
from tfqc.ir.program import STEP, Input, Origin, Program, Role
from tfqc.ir.types import DTYPES, SYMBOL, ScalarType, TensorType, TupleType, Type

# What diffusers calls the inputs of its denoisers. Anything else that is a tensor is constant over one image.
SAMPLE_NAMES = {"sample", "hidden_states", "x", "latents", "noisy_latents", "x_t"}
TIME_NAMES = {"timestep", "timesteps", "t", "time", "time_step", "sigma"}

_UNKNOWN = TensorType(torch.float32, ())  # until torch.export has told

Example = Mapping[str, Any] | Sequence[Any]
DynamicDims = Mapping[str, Mapping[int, str]]


def capture(
    model: torch.nn.Module,
    example_inputs: Example,
    *,
    roles: Mapping[str, str] | None = None,
    domains: Mapping[str, int] | None = None,
    dynamic: DynamicDims | None = None,
    name: str | None = None,
) -> Program:
    """Capture a denoiser as a Program.

    Args:
        model: called as `model(**example_inputs)` (or positionally). Put in eval mode for the capture.
        example_inputs: tensors of any device; the first dimension of the sample is the batch, and so is that of every
            input with the same first dimension. Not-tensor values are captured as constants.
        roles: input name (dotted for nested ones) -> `sample`, `time` or `request`. By default inputs are
            recognised by the names that diffusers gives them.
        domains: request inputs of integer class labels -> how many labels there are.
        dynamic: further symbolic dimensions: `{"sample": {2: "H", 3: "W"}}`; symbols are capital letters.
        name: what the IR calls the model; its class name by default.

    Raises:
        CaptureError: no input is the time or the sample, torch.export failed (the message names the line of the
            model's source at which it did), or the model's code took a way that is right for some batches only.
    """
    arguments = _by_name(model, example_inputs)
    flat = _tensors_by_path(arguments)
    inputs = _assign_roles(flat, dict(roles or {}), dict(domains or {}))
    if strange := [s for d in (dynamic or {}).values() for s in d.values() if not SYMBOL.fullmatch(s)]:
        raise CaptureError(f"{strange[0]!r} is no name for a dimension: use capital letters, such as 'H'.")
    arguments, dims = _prepare(arguments, inputs, flat, dict(dynamic or {}))
    exported = _export(model, arguments, dims)
    return _to_program(model, exported, inputs, dims, name or type(model).__name__)


# -- inputs -------------------------------------------------------------------------------------------------------


def _by_name(model: torch.nn.Module, example: Example) -> dict[str, Any]:
    parameters = list(inspect.signature(model.forward).parameters.values())
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if isinstance(example, Mapping):
        arguments = {str(k): v for k, v in example.items() if v is not None}
    else:
        arguments = {k: v for k, v in zip(names, example, strict=False) if v is not None}
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
    if not open_ended and (unknown := [k for k in arguments if k not in names]):
        raise CaptureError(f"{type(model).__name__} takes no input {unknown[0]!r}; it takes {', '.join(names)}.")
    if "return_dict" in names:
        arguments["return_dict"] = False
    order = {n: i for i, n in enumerate(names)}
    return dict(sorted(arguments.items(), key=lambda item: order.get(item[0], len(order))))


def _tensors_by_path(arguments: Mapping[str, Any]) -> dict[tuple[str, ...], Tensor]:
    found: dict[tuple[str, ...], Tensor] = {}
    leaves, _ = pytree.tree_flatten_with_path(dict(arguments))
    for path, leaf in leaves:
        keys = tuple(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)
        if isinstance(leaf, Tensor):
            found[keys] = leaf
        elif keys[-1] in TIME_NAMES and isinstance(leaf, (int, float)):
            found[keys] = torch.tensor(leaf)
    return found


def _assign_roles(
    flat: Mapping[tuple[str, ...], Tensor], roles: dict[str, str], domains: dict[str, int]
) -> list[Input]:
    names = {".".join(path): path for path in flat}
    for given in (*roles, *domains):
        if given not in names:
            raise CaptureError(f"There is no input {given!r} to give a role; the inputs are {', '.join(names)}.")
    unknown = [r for r in roles.values() if r not in set(Role)]
    if unknown:
        raise CaptureError(f"{unknown[0]!r} is no role: use sample, time or request.")

    def role(name: str) -> Role:
        if name in roles:
            return Role(roles[name])
        last = name.rpartition(".")[2]
        if last in TIME_NAMES and "time" not in roles.values():
            return Role.TIME
        if last in SAMPLE_NAMES and "sample" not in roles.values():
            return Role.SAMPLE
        return Role.REQUEST

    names_of_nodes = _Namespace()  # keeps off the names that Python code cannot use
    inputs = [
        Input(names_of_nodes.create_name("_".join(path), None), role(n), path, _UNKNOWN, domains.get(n))
        for n, path in names.items()
    ]
    for needed, hint in ((Role.TIME, "the timestep"), (Role.SAMPLE, "the noisy sample")):
        found = [i for i in inputs if i.role is needed]
        if not found:
            raise CaptureError(
                f"No input has the role {str(needed)!r}: name {hint} with roles={{...: {str(needed)!r}}}; the inputs "
                f"are {', '.join(names)}."
            )
        if needed is Role.TIME and len(found) > 1:
            raise CaptureError(f"Only one input can be the time, not {', '.join(i.name for i in found)}.")
    return inputs


def _prepare(
    arguments: dict[str, Any],
    inputs: list[Input],
    flat: Mapping[tuple[str, ...], Tensor],
    dynamic: dict[str, Mapping[int, str]],
) -> tuple[dict[str, Any], dict[tuple[str, ...], dict[int, str]]]:
    """Example arguments with a batch of at least two and one timestep an entry, and the symbols of their dimensions."""
    sample = next(flat[i.path] for i in inputs if i.role is Role.SAMPLE)
    batch = sample.shape[0]
    repeat = 2 if batch == 1 else 1
    tensors: dict[tuple[str, ...], Tensor] = {}
    dims: dict[tuple[str, ...], dict[int, str]] = {}
    for item in inputs:
        value = flat[item.path].detach()
        dims[item.path] = dict(dynamic.pop(".".join(item.path), {}))
        if item.role is Role.TIME:
            value = value.reshape(-1)[:1].expand(batch * repeat)
        if item.role is Role.TIME or (value.dim() and value.shape[0] == batch):
            # torch.export takes sizes 0 and 1 for constants.
            value = value if value.shape[0] > 1 else torch.cat([value] * repeat)
            dims[item.path][0] = "B"
        tensors[item.path] = value
    if dynamic:
        raise CaptureError(f"There is no input {next(iter(dynamic))!r} with dynamic dimensions.")

    def build(value: Any, path: tuple[str, ...]) -> Any:
        if path in tensors:
            return tensors[path]
        if isinstance(value, Mapping):
            return {k: build(v, (*path, str(k))) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(build(v, (*path, str(i))) for i, v in enumerate(value))
        return value

    return {k: build(v, (k,)) for k, v in arguments.items()}, dims


# -- export -------------------------------------------------------------------------------------------------------


def _export(
    model: torch.nn.Module, arguments: dict[str, Any], dims: Mapping[tuple[str, ...], dict[int, str]]
) -> torch.export.ExportedProgram:
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
    training = model.training
    model.eval()
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            dynamic_shapes = {k: shapes(v, (k,)) for k, v in arguments.items()}
            return torch.export.export(model, (), arguments, dynamic_shapes=dynamic_shapes, strict=False)
    except Exception as error:
        where = _source_of(error)
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CaptureError(
            f"{type(model).__name__} could not be exported{f' at {where}' if where else ''}: {reason}",
            f"symbolic dimensions: {sorted(symbols)}",
        ) from error
    finally:
        model.train(training)


def _source_of(error: BaseException) -> str:
    """`file:line in function` of the last line of the model's own code in a traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/torch/" not in f.filename and "/tfqc/" not in f.filename]
    if not own:
        return ""
    return f"{_short(own[-1].filename)}:{own[-1].lineno} in {own[-1].name}"


def _short(path: str) -> str:
    return "/".join(path.split("/site-packages/")[-1].split("/")[-4:])


# -- program ------------------------------------------------------------------------------------------------------


def _to_program(
    model: torch.nn.Module,
    exported: torch.export.ExportedProgram,
    inputs: list[Input],
    dims: Mapping[tuple[str, ...], dict[int, str]],
    name: str,
) -> Program:
    root = exported.module(check_guards=True)
    _check_guards(root, exported, dims, type(model).__name__)
    _inline_regions(root)
    tensors = _tensors_of(model)
    by_path = {i.path: i for i in inputs}
    program = Program({STEP: fx.Graph()}, {}, tuple(inputs), model=name)
    naming = _Symbols(program)
    graph = program.step
    mapping: dict[fx.Node, Any] = {}
    parameters = [n for n in root.graph.nodes if n.op == "placeholder"]
    leaves, _ = pytree.tree_flatten_with_path(_call_tree(exported, parameters))
    for path, parameter in leaves:
        keys = tuple(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)
        value = parameter.meta.get("val")
        if keys not in by_path:
            mapping[parameter] = value
            continue
        if isinstance(value, Tensor):
            naming.bind(value, dims[keys])
        mapping[parameter] = graph.placeholder(by_path[keys].name)
        type_ = naming.type(value)
        assert isinstance(type_, TensorType)
        by_path[keys] = dataclasses.replace(by_path[keys], type=type_)
        program.types[by_path[keys].name] = type_
    program.inputs = tuple(by_path.values())
    for node in root.graph.nodes:
        if node.op == "get_attr":
            target = str(node.target)
            tensor = tensors.get(target)
            if tensor is None:  # a constant that the model's code made, lifted by torch.export
                tensor = _attribute(root, target)
                if not isinstance(tensor, Tensor):
                    raise CaptureError(f"The model keeps {target!r}, a {type(tensor).__name__}: only tensors can be.")
            if target not in program.tensors:
                program.tensors[target] = tensor.detach()
            mapping[node] = target
        elif node.op == "call_module" and node.target != "_guards_fn":
            raise CaptureError(f"torch.export left a call of submodule {node.target!r} in the graph.")
    # Parameters must stand before tensors, and tensors before operations.
    output = graph.output(None)
    for node in root.graph.nodes:
        if node.op == "get_attr":
            mapping[node] = program.tensor_node(mapping[node])
    graph.erase_node(output)
    for node in root.graph.nodes:
        if node.op == "call_function":
            args = fx.map_arg(node.args, lambda n: mapping[n])
            kwargs = fx.map_arg(node.kwargs, lambda n: mapping[n])
            args, kwargs = map_aggregate((args, kwargs), _on_cpu)
            target = _known(node)
            new = graph.create_node("call_function", target, args, kwargs, name=node.name)
            mapping[node] = new
            program.types[new.name] = naming.type(node.meta.get("val"))
            program.origins[new.name] = _origin(node)
        elif node.op == "output":
            structure = pytree.tree_unflatten(
                [mapping[n] if isinstance(n, fx.Node) else n for n in pytree.tree_leaves(node.args[0])],
                exported.call_spec.out_spec or pytree.tree_structure(node.args[0]),
            )
            graph.output(structure)
    program.prune()
    return program


def _on_cpu(value: Any) -> Any:
    """The device at capture (meta, say) means nothing to the program."""
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _check_guards(
    root: fx.GraphModule,
    exported: torch.export.ExportedProgram,
    dims: Mapping[tuple[str, ...], dict[int, str]],
    model: str,
) -> None:
    """Refuse a capture that holds for the example's sizes only, as after `if x.shape[0] % 2:` in the model's code.

    torch.export remembers such decisions as guards. They must allow a batch of three, and for every other symbol its
    double or its half.
    """
    guards = getattr(root, "_guards_fn", None)
    if guards is None:
        return
    inputs = [n for n in root.graph.nodes if n.op == "placeholder"]
    leaves, _ = pytree.tree_flatten_with_path(_call_tree(exported, inputs))
    path_of = {n: tuple(str(getattr(k, "key", getattr(k, "idx", k))) for k in path) for path, n in leaves}

    def complaint(symbol: str, resize: Callable[[int], int]) -> str:
        examples: list[Any] = []
        for node in inputs:
            value = node.meta.get("val")
            if isinstance(value, Tensor):
                named = dims.get(path_of[node], {})
                sizes = [int(s.node.hint) if isinstance(s, torch.SymInt) else s for s in value.shape]
                sizes = [resize(s) if named.get(d) == symbol else s for d, s in enumerate(sizes)]
                value = torch.empty(sizes, dtype=value.dtype, device="meta")
            examples.append(value)
        try:
            guards(*examples)
        except AssertionError as error:
            return str(error).strip().splitlines()[0].removeprefix("Guard failed: ")
        return ""

    for symbol in sorted({s for d in dims.values() for s in d.values()}):
        ways: list[Callable[[int], int]] = [lambda _: 3] if symbol == "B" else [lambda s: 2 * s, lambda s: s // 2]
        if all(reasons := [complaint(symbol, way) for way in ways]):
            raise CaptureError(
                f"{model} cannot be captured for every {symbol}: its code depends on {reasons[0]}.",
                "An `if` or an int(...) on a size fixes it; so does a view with that size as a number.",
            )


# Regions that change how operations are differentiated or cast, not what they are.
_REGIONS = {"wrap_with_set_grad_enabled", "wrap_with_autocast"}


def _inline_regions(root: fx.GraphModule) -> None:
    """Put the body of `with torch.no_grad():` and of a disabled autocast in the place of its call."""
    for node in list(root.graph.nodes):
        target = node.target
        if not isinstance(target, torch._ops.HigherOrderOperator) or target.name() not in _REGIONS:
            continue
        at = next(i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a.op == "get_attr")
        region, operands = node.args[at], node.args[at + 1 :]
        body = getattr(root, str(region.target))
        if target.name() == "wrap_with_autocast" and node.args[2]:
            inside = next((_origin(n).source for n in body.graph.nodes if n.op == "call_function"), "")
            raise CaptureError(
                f"The model turns autocast on around {inside or 'nothing'}: convert it to the dtype that it is to run "
                "in, and capture it without autocast."
            )
        _inline_regions(body)
        parameters = [n for n in body.graph.nodes if n.op == "placeholder"]
        mapping = dict(zip(parameters, operands, strict=True))
        with root.graph.inserting_before(node):
            results = root.graph.graph_copy(body.graph, mapping)
        assert isinstance(results, (tuple, list))
        for user in list(node.users):
            assert user.target is operator.getitem and isinstance(user.args[1], int)  # it picks one of the results
            user.replace_all_uses_with(results[user.args[1]])  # type: ignore[arg-type]
            root.graph.erase_node(user)
        root.graph.erase_node(node)
        if not region.users:
            root.graph.erase_node(region)


def _tensors_of(model: torch.nn.Module) -> dict[str, Tensor]:
    named = dict(model.named_parameters(remove_duplicate=False))
    return named | dict(model.named_buffers(remove_duplicate=False))


def _attribute(root: torch.nn.Module, target: str) -> Any:
    owner, _, leaf = target.rpartition(".")
    return getattr(root.get_submodule(owner), leaf)


def _call_tree(exported: torch.export.ExportedProgram, parameters: list[fx.Node]) -> dict[str, Any]:
    assert exported.call_spec.in_spec is not None
    _, kwargs = pytree.tree_unflatten(parameters, exported.call_spec.in_spec)
    return kwargs


def _known(node: fx.Node) -> Any:
    """The node's target, if the IR can name it and find it again by that name."""
    try:
        name = op_name(node.target)
        return op_by_name(name)
    except Exception as error:
        raise CaptureError(f"%{node.name} ({_origin(node).source}) calls {node.target}: {error}") from error


def _origin(node: fx.Node) -> Origin:
    stack = (node.meta.get("nn_module_stack") or {}).values()
    modules = [path for path, _ in stack if not path.startswith("_empty_nn_module_stack")]  # torch's placeholder
    trace = node.meta.get("stack_trace") or ""
    frames = re.findall(r'File "([^"]+)", line (\d+)', trace)
    own = [(f, n) for f, n in frames if "/torch/" not in f] or frames
    source = f"{_short(own[-1][0]).rpartition('/')[2]}:{own[-1][1]}" if own else ""
    return Origin(modules[-1] if modules else "", source)


def _exact(dividend: sympy.Expr, divisor: sympy.Expr) -> Any:
    """dividend // divisor, without rounding where there is none: (6*B) // B is 6. Sizes are not zero."""
    quotient = sympy.cancel(dividend / divisor)
    return quotient if quotient.is_integer else FloorDiv(dividend, divisor)


def _remainder(dividend: sympy.Expr, divisor: sympy.Expr) -> Any:
    return sympy.Integer(0) if sympy.cancel(dividend / divisor).is_integer else Mod(dividend, divisor)


class _Symbols:
    """Readable names for torch.export's symbols: B for the batch, then the names the caller gave, then S0, S1..."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.names: dict[str, str] = {}

    def bind(self, value: Tensor, dims: Mapping[int, str]) -> None:
        for dim, name in dims.items():
            size = value.shape[dim]
            if isinstance(size, torch.SymInt) and str(size.node.expr).isidentifier():
                self.names.setdefault(str(size.node.expr), name)
                self.program.symbols[self.names[str(size.node.expr)]] = int(size.node.hint or 2)

    def dim(self, size: int | torch.SymInt) -> int | str:
        if isinstance(size, int):
            return size
        expression = size.node.expr
        ours: dict[sympy.Symbol, sympy.Symbol] = {}
        for symbol in sorted(expression.free_symbols, key=str):
            if str(symbol) not in self.names:
                self.names[str(symbol)] = f"S{len(self.names)}"
                self.program.symbols[self.names[str(symbol)]] = 2
            ours[symbol] = sympy.Symbol(self.names[str(symbol)], integer=True, positive=True)
        expression = expression.xreplace(ours).replace(FloorDiv, _exact).replace(Mod, _remainder)
        renamed = str(expression)
        if expression.is_Integer:
            return int(renamed)
        if re.search(r"[^\w\s+*()/\-%]", renamed):
            raise CaptureError(f"A dimension is {renamed}, which the IR cannot say.")
        return renamed

    def type(self, value: Any) -> Type:
        if isinstance(value, Tensor):
            if value.dtype not in DTYPES.values():
                raise CaptureError(f"The model computes in {value.dtype}, which the IR does not know.")
            return TensorType(value.dtype, tuple(self.dim(s) for s in value.shape))
        if isinstance(value, (list, tuple)):
            return TupleType(tuple(self.type(v) for v in value))
        if isinstance(value, torch.SymInt):
            return ScalarType("int", str(self.dim(value)))
        if isinstance(value, torch.SymFloat):
            return ScalarType("float")
        if value is None:
            return ScalarType("none")
        if isinstance(value, torch.SymBool):
            return ScalarType("bool")
        return ScalarType(type(value).__name__, str(value) if isinstance(value, int) else None)
