"""Who may import whom, read from the source: no circle, no arrow up; passes and backends know not each other."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

from tfqc import registry
from tfqc.passing import Pass

ROOT = Path(__file__).parents[1]
LINKS = {ROOT / "tfqc" / "passes", ROOT / "tfqc" / "backends"}
CORE = sorted(f for f in (ROOT / "tfqc").rglob("*.py") if not LINKS & set(f.parents))
SHARED = sorted(f for f in (ROOT / "passes").glob("*.py") if f.name != "__init__.py")
OWN = sorted(f for f in (ROOT / "backends").glob("*/passes/*.py") if f.name != "__init__.py")
PASSES = SHARED + OWN
BACKENDS = sorted((ROOT / "backends").rglob("*.py"))
# From the bottom up: a package imports itself and what stands in a line above it.
LAYERS = """
version
errors quiet progress
registry runtime optim
files
ir
sampling analysis
frontend passing
instruments quant
calibration lowering
temporal codegen
models adapters
arguments recipe report
driver
integrations
__init__
cli
__main__
"""


def name_of(file: Path) -> str:
    """The module's import name."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "tfqc" else ("tfqc", *parts)
    return ".".join(parts).removesuffix(".__init__")


def imports(file: Path, source: str | None = None) -> Iterator[str]:
    """Full names of everything that a file imports, wherever in it, also by `import_module("name")`."""
    package = name_of(file) if file.name == "__init__.py" else name_of(file).rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text() if source is None else source)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                above = package.split(".")[: len(package.split(".")) - level + 1] if level else []
                base = ".".join([*above, *([module] if module else [])])
                yield from (f"{base}.{alias.name}" for alias in names)
            case ast.Call(func=ast.Attribute(attr="import_module") | ast.Name(id="import_module"), args=[first, *_]):
                if isinstance(first, ast.Constant):
                    yield str(first.value)
            case _:
                pass


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def layer_of(module: str) -> int:
    """The line of `LAYERS` that a module of the core stands in."""
    part = module.split(".")[1] if "." in module else "__init__"
    return next(number for number, line in enumerate(LAYERS.split("\n")) if part in line.split())


def module_graph() -> nx.DiGraph:
    """Imports among all modules of the package, wherever they stand and whatever they are for."""
    files = {name_of(f): f for f in (*CORE, *(ROOT / "passes").glob("*.py"), *BACKENDS)}
    graph: nx.DiGraph = nx.DiGraph()
    for module, file in files.items():
        for found in imports(file):
            target = found if found in files else found.rpartition(".")[0]
            if target in files and target != module:
                graph.add_edge(module, target)
    return graph


def ids(files: list[Path]) -> list[str]:
    return [str(f.relative_to(ROOT)) for f in files]


def test_there_is_something_to_check() -> None:
    assert len(CORE) > 20
    assert len(PASSES) > 5
    assert len(BACKENDS) > 1


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import tfqc.passes.normalize as n", "tfqc.passes.normalize"),
        ("def f():\n from tfqc import passes", "tfqc.passes"),
        ("from tfqc.passes.normalize import Normalize", "tfqc.passes.normalize.Normalize"),
        ("from ..passes import normalize", "tfqc.passes.normalize"),
        ("from .dump import DumpIR", "tfqc.instruments.dump.DumpIR"),
        ("importlib.import_module('tfqc.backends.fake_quant')", "tfqc.backends.fake_quant"),
    ],
)
def test_the_reader_of_imports_sees_every_form(source: str, found: str) -> None:
    assert list(imports(ROOT / "tfqc" / "instruments" / "timing.py", source)) == [found]


@pytest.mark.parametrize("file", CORE, ids=ids(CORE))
def test_the_core_imports_no_pass_and_no_backend(file: Path) -> None:
    assert [n for n in imports(file) if within(n, "tfqc.passes") or within(n, "tfqc.backends")] == []


def test_there_is_no_circle_of_imports() -> None:
    circles = [sorted(c) for c in nx.strongly_connected_components(module_graph()) if len(c) > 1]
    assert circles == []


def test_a_circle_would_be_found() -> None:
    graph = module_graph()
    graph.add_edge("tfqc.errors", "tfqc.driver")
    assert any(len(c) > 1 for c in nx.strongly_connected_components(graph))


def test_no_import_runs_up() -> None:
    edges = [
        (a, b)
        for a, b in module_graph().edges
        if not any(n.split(".")[1:2] in (["passes"], ["backends"]) for n in (a, b))
    ]
    up = [f"{a} -> {b}" for a, b in edges if layer_of(b) > layer_of(a)]
    assert up == []
    level = [f"{a} -> {b}" for a, b in edges if layer_of(b) == layer_of(a) and a.split(".")[1:2] != b.split(".")[1:2]]
    assert level == []


def test_the_readme_shows_the_layers_and_all_of_them() -> None:
    shown = re.findall(r"^\| (\d+) \| `(\w+)` \|", (ROOT / "tfqc" / "README.md").read_text(), re.MULTILINE)
    layers = LAYERS.strip().split("\n")
    assert shown == [(str(n), part) for n, line in enumerate(layers, 1) for part in line.split()]
    parts = {f.relative_to(ROOT / "tfqc").parts[0].removesuffix(".py") for f in CORE}
    assert parts == {part for _, part in shown}


@pytest.mark.parametrize("file", SHARED, ids=ids(SHARED))
def test_a_pass_imports_the_core_alone(file: Path) -> None:
    assert [n for n in imports(file) if within(n, "tfqc.passes") or within(n, "tfqc.backends")] == []


@pytest.mark.parametrize("file", BACKENDS, ids=ids(BACKENDS))
def test_a_backend_imports_the_core_and_itself(file: Path) -> None:
    folder = file.relative_to(ROOT / "backends").parts[0]
    own = f"tfqc.backends.{folder}"
    strange = [n for n in imports(file) if within(n, "tfqc.backends") and not within(n, own)]
    assert strange == []


@pytest.mark.parametrize("file", PASSES, ids=ids(PASSES))
def test_a_file_holds_one_pass_and_is_named_after_it(file: Path) -> None:
    module = importlib.import_module(name_of(file))
    own = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
    found = [c for c in own if issubclass(c, Pass)]
    assert [c.name for c in found] == [file.stem.replace("_", "-")]
    (cls,) = found
    assert cls.__name__ == "".join(word.capitalize() for word in file.stem.split("_"))
    assert registry.PASSES[cls.name] == f"{module.__name__}:{cls.__name__}"
    parameters = vars(cls).get("__dataclass_params__")  # its own, not its base's
    assert parameters is not None
    assert parameters.frozen
    assert "run" in vars(cls)


def test_every_registered_name_has_its_file_or_folder() -> None:
    assert {p.partition(":")[0] for p in registry.PASSES.values()} == set(map(name_of, PASSES))
    folders = {f.parent.name for f in BACKENDS if f.name == "backend.py"}  # without it, it is not one yet
    assert {p.partition(":")[0] for p in registry.BACKENDS.values()} == {f"tfqc.backends.{f}.backend" for f in folders}
    assert {name.replace("-", "_") for name in registry.BACKENDS} == folders
