"""What one network step of a model does on a GPU: its products, attention, and all that only moves memory.

Shapes come from torch.export of the diffusers model on the meta device: there are no weights. What a product's
epilogue can do (bias, residual, activation, GEGLU) is taken from the graph and put into it; pointwise operations in a
row are one kernel, with a norm in front of them too; views, and divisions by one, are nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import accelerate
import diffusers
import torch
from cpu_models import ARCHITECTURES, Architecture, Case
from torch.fx import Node
from torch.utils._pytree import tree_map

from tfqc.backends.cuda_int4.runtime.specialise import Epilogue, Window
from tfqc.models.zoo import fashion

FEWEST_ROWS = 32  # products of fewer rows (of time embeddings) stay in fp16: a tile of 64 is empty with them
FEWEST_CHANNELS = 32  # so do the first and the last layer

When = Literal["step", "request", "table"]

_VIEWS = {
    "view", "reshape", "transpose", "permute", "dropout", "contiguous", "unsqueeze", "squeeze", "flatten", "expand",
    "to", "clone", "alias", "slice", "chunk", "getitem", "detach", "unflatten", "select", "_assert_tensor_metadata",
}  # fmt: skip
_PLAIN = Epilogue("step", "none")
_ROLES = {"sample": "sample", "hidden_states": "sample", "timestep": "time"}
_NORMS = {"group_norm": 3, "layer_norm": 2}  # how often memory is passed over: statistics of a group, then the values


@dataclass(frozen=True)
class Product:
    """A linear layer or convolution: y [m, n] = a [m, k] w [n, k]^T, with what its epilogue does.

    values: fp16 numbers of its input in memory, which are fewer than m * k where windows overlap. when: executed in
    each step, once a request (text), or never since it is a row of a table (time). quantized: has an int4 kernel.
    """

    kind: str  # linear, conv3x3, conv1x1
    m: int
    n: int
    k: int
    values: int
    images: int
    epilogue: Epilogue
    window: Window | None
    when: When
    quantized: bool

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        return 2 * self.m * self.n * self.k

    @property
    def out_n(self) -> int:
        """Columns that it writes."""
        return self.n // 2 if self.epilogue.activation == "geglu" else self.n

    @property
    def padded_k(self) -> int:
        """Codes in a row, as kernels take them: channels padded to 32."""
        taps = 9 if self.window else 1
        return taps * (-(-self.k // taps // 32) * 32)

    @property
    def name(self) -> str:
        """For tables."""
        end = self.epilogue
        does = {"bias": end.bias != "none", end.activation: end.activation != "none", "residual": end.residual}
        does["codes"] = end.out == "u4"
        stride = "/2" if self.window and self.window.stride == 2 else ""
        return " ".join([f"{self.kind}{stride} {self.m}x{self.n}x{self.k}", *(name for name in does if does[name])])


@dataclass(frozen=True)
class Attention:
    """softmax(q k^T) v of `heads` (of all images): queries [tokens, width], `keys` keys."""

    heads: int
    tokens: int
    keys: int
    width: int

    @property
    def operations(self) -> int:
        """Of both products; the width padded to 32 as flash attention does."""
        return 4 * self.heads * self.tokens * self.keys * (-(-self.width // 32) * 32)

    @property
    def bytes(self) -> int:
        """fp16."""
        return 2 * self.heads * self.width * 2 * (self.tokens + self.keys)


@dataclass(frozen=True)
class Moved:
    """A kernel that is as fast as memory: bytes read and written; of quantize, codes are written."""

    what: Literal["norm", "pointwise", "quantize", "geglu"]
    read: int
    written: int


@dataclass
class Step:
    """How often a network step does what.

    siblings: quantized linear layers that read the same input, as q, k and v do: they are among the products too.
    """

    products: Counter[Product] = field(default_factory=Counter)
    siblings: Counter[tuple[Product, ...]] = field(default_factory=Counter)
    attentions: Counter[Attention] = field(default_factory=Counter)
    moved: Counter[Moved] = field(default_factory=Counter)

    def joined(self) -> Step:
        """The same with siblings as one product, their columns beside each other."""
        products = Counter(self.products)
        for several, count in self.siblings.items():
            for product in several:
                products[product] -= count
            products[replace(several[0], n=sum(product.n for product in several))] += count
        return replace(self, products=+products, siblings=Counter())


def step_of(model: str, batch: int) -> Step:
    """One step of a model of `cpu_models`, at its own latent size."""
    return _Reader(_exported(ARCHITECTURES[model], Case(model, batch, ARCHITECTURES[model].latent, Path()))).step


def _exported(architecture: Architecture, case: Case) -> torch.export.ExportedProgram:
    if architecture.config is None:
        model = fashion.load_unet()
    else:
        with accelerate.init_empty_weights():
            model = getattr(diffusers, architecture.cls).from_config(architecture.config)
    inputs = tree_map(lambda x: x.to("meta", torch.float16 if x.is_floating_point() else None), case.inputs())
    model = model.to("meta").half().eval().requires_grad_(False)
    with torch.device("meta"), torch.no_grad():
        return torch.export.export(model, (), {**inputs, "return_dict": False}, strict=False)


class _Reader:
    """Reads a graph: from its end to its start for products, so that a residual belongs to what is computed last."""

    def __init__(self, exported: torch.export.ExportedProgram) -> None:
        self.nodes = list(exported.graph.nodes)
        self.step = Step()
        self.sources = self._sources(exported)
        self.taken: dict[Node, Node] = {}  # what an epilogue does -> its product
        self.ends: dict[Node, tuple[Node, Epilogue]] = {}  # product -> the node of its result
        for node in reversed(self.nodes):
            if _op(node) in ("linear", "conv2d"):
                self.ends[node] = self._epilogue(node)
        written = self._codes([node for node in self.ends if self._product(node).quantized])
        readers: dict[Node, list[Product]] = {}
        for node in reversed(self.ends):
            product = self._product(node, codes=node in written)
            self.step.products[product] += 1
            if product.quantized and product.kind == "linear" and product.epilogue == _PLAIN:
                readers.setdefault(_origin(node.args[0]), []).append(product)
        self.step.siblings.update(tuple(several) for several in readers.values() if len(several) > 1)
        for node in self.nodes:
            self._other(node)

    def _sources(self, exported: torch.export.ExportedProgram) -> dict[Node, frozenset[str]]:
        """Which inputs of the step each node depends on: sample, time, request."""
        users = exported.graph_signature.user_inputs
        found: dict[Node, frozenset[str]] = {}
        for node in self.nodes:
            mine = frozenset([_ROLES.get(node.name, "request")] if node.name in users else [])
            found[node] = mine.union(*(found[n] for n in node.all_input_nodes))
        return found

    def _epilogue(self, node: Node) -> tuple[Node, Epilogue]:
        """Follow what alone reads the result, as far as the epilogue can do it."""
        bias = "one" if len(node.args) > 2 and node.args[2] is not None else "none"
        activation, residual, at = "none", False, node
        while True:
            users = [user for user in _users(at) if user not in self.taken]
            if pair := _geglu(users) if activation == "none" and not residual else None:
                activation, at = "geglu", pair[-1]
                self.taken |= dict.fromkeys(pair, node)
                continue
            if len(_users(at)) != 1 or len(users) != 1:
                break
            (user,) = users
            if _op(user) == "add" and len(user.all_input_nodes) == 2:
                other = next(n for n in user.all_input_nodes if n is not at)
                full = _numel(other) == _numel(at)
                if residual or (not full and activation != "none"):
                    break
                bias, residual = (bias, True) if full else ("step", False)
                self.taken[user] = node
            elif _op(user) in ("silu", "gelu") and activation == "none" and not residual:
                activation = _op(user)
                self.taken[user] = node
            elif not _is_view(user):
                break
            at = user
        return at, Epilogue("step", bias, activation, residual)

    def _product(self, node: Node, codes: bool = False) -> Product:
        x, weight, out = (n.meta["val"].shape for n in (*node.args[:2], node))
        n, k = weight[0], math.prod(weight[1:])
        kind, window = "linear" if len(weight) == 2 else f"conv{weight[2]}x{weight[3]}", None
        if len(weight) == 4:
            stride = (node.args[3] if len(node.args) > 3 else [1])[0]
            window = Window(x[2], x[3], stride) if weight[2] == 3 else None
        m = math.prod(out) // n
        seen = self.sources[node]
        when = "step" if "sample" in seen or len(seen) > 1 else "table" if seen == {"time"} else "request"
        fits = when == "step" and min(n, weight[1]) >= FEWEST_CHANNELS and m >= FEWEST_ROWS
        end = replace(self.ends[node][1], out="u4" if codes else "f16")
        return Product(kind, m, n, k, math.prod(x), x[0], end, window, when, fits)

    def _codes(self, quantized: list[Node]) -> set[Node]:
        """Products whose result only one quantized one reads: they write its codes. Others get a quantize kernel."""
        ends = {_origin(self.ends[node][0]): node for node in quantized}
        written, inputs = set[Node](), dict[Node, Node]()
        for node in quantized:
            inputs.setdefault(_origin(node.args[0]), node)
        for source, node in inputs.items():
            window = self._product(node).window
            maker = ends.get(source)
            alone = maker is not None and all(user in quantized for user in _readers(source))
            values = codes = _numel(node.args[0])
            if window is not None:
                codes = values // (window.height * window.width) * (window.height + 2) * (window.width + 2)
            elif alone:
                written.add(maker)
                continue
            self.step.moved[Moved("quantize", 2 * values, codes)] += 1
        return written

    def _other(self, node: Node) -> None:
        """Attention, norms and pointwise operations that depend on the sample."""
        name = _op(node)
        if node.op != "call_function" or node in self.ends or "sample" not in self.sources[node] or _is_view(node):
            return
        if name == "scaled_dot_product_attention":
            q, k = (n.meta["val"].shape for n in node.args[:2])
            self.step.attentions[Attention(q[0] * q[1], q[2], k[2], q[3])] += 1
        elif node not in self.taken:
            self._moved(node)
        elif name == "mul":  # of GEGLU: a kernel of its own in fp16
            self.step.moved[Moved("geglu", 4 * _numel(node), 2 * _numel(node))] += 1

    def _moved(self, node: Node) -> None:
        fused, passes = self._is_fused(node), _NORMS.get(_op(node), 2) - 1
        read = sum(2 * _numel(n) for n in node.all_input_nodes if n.op != "placeholder" and _origin(n) is not fused)
        only = list(_readers(node))
        written = 0 if len(only) == 1 and self._is_fused(only[0]) is node else 2 * _numel(node)
        self.step.moved[Moved(self._head(node), passes * read, written)] += 1

    def _is_fused(self, node: Node) -> Node | None:
        """The norm or pointwise operation in whose kernel this one is, as the only one that reads it."""
        if node in self.taken or node in self.ends or _op(node) in (*_NORMS, "cat", "scaled_dot_product_attention"):
            return None
        for source in map(_origin, node.all_input_nodes):
            plain = _op(source) not in ("", "cat", "scaled_dot_product_attention")
            if plain and source not in self.ends and source not in self.taken and len(_readers(source)) == 1:
                return source
        return None

    def _head(self, node: Node) -> Literal["norm", "pointwise"]:
        while (source := self._is_fused(node)) is not None:
            node = source
        return "norm" if _op(node) in _NORMS else "pointwise"


def _op(node: Node) -> str:
    target = getattr(node.target, "__name__", str(node.target))
    return target.removeprefix("aten.").partition(".")[0] if node.op == "call_function" else ""


def _is_view(node: Node) -> bool:
    return _op(node) in _VIEWS or (_op(node) == "div" and node.args[1] == 1)


def _numel(node: Node) -> int:
    return node.meta["val"].numel() if isinstance(node.meta.get("val"), torch.Tensor) else 0


def _users(node: Node) -> list[Node]:
    return [user for user in node.users if _op(user) != "_assert_tensor_metadata"]


def _readers(node: Node) -> set[Node]:
    """What reads the node's values, through views."""
    found: set[Node] = set()
    for user in _users(node):
        found |= _readers(user) if _is_view(user) else {user}
    return found


def _origin(node: Node) -> Node:
    while _is_view(node):
        node = node.args[0]
    return node


def _geglu(users: list[Node]) -> tuple[Node, ...] | None:
    """gelu and the multiplication, where a result is read as halves of which one gates the other."""
    chunks = [user for user in users if _op(user) == "chunk"]
    gates = [u for chunk in chunks for half in _users(chunk) for u in _users(half) if _op(u) == "gelu"]
    products = [u for gate in gates for u in _users(gate) if _op(u) == "mul"]
    return (gates[0], products[0]) if len(users) == len(gates) == len(products) == 1 else None
