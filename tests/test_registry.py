"""Passes and backends by name. What installed packages do to it is in test_plugin_package.py."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from tfqc import registry
from tfqc.codegen.known import backend_names, find_backend
from tfqc.errors import SpecError, TfqcError
from tfqc.passing import Pass
from tfqc.passing.known import find_pass, pass_names, sound_passes
from tfqc.registry import entries

Declare = Callable[[str, str, dict[str, str]], None]


@dataclass(frozen=True)
class Good(Pass):
    """A pass."""

    name: ClassVar[str] = "good"


@dataclass
class Thawed:
    """Not frozen, and no pass."""

    name: ClassVar[str] = "thawed"


class Undecorated(Pass):
    """Its option would be lost: it inherits the fields of its base."""

    name: ClassVar[str] = "undecorated"
    option: int = 3


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Every test reads the entry points anew."""
    caches = (entries, find_pass, find_backend)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def declare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Declare:
    """Puts the metadata of a distribution on the path, as installing one leaves it."""

    def declare(owner: str, group: str, points: dict[str, str]) -> None:
        info = tmp_path / f"{owner}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {owner}\nVersion: 1.0\n")
        lines = [f"{name} = {target}\n" for name, target in points.items()]
        (info / "entry_points.txt").write_text("".join([f"[tfqc.{group}]\n", *lines]))
        monkeypatch.syspath_prepend(str(tmp_path))

    return declare


HERE = "tests.test_registry"


def test_every_built_in_name_loads_and_has_a_first_line_of_documentation() -> None:
    assert [name for name, _ in sound_passes()] == pass_names()
    assert pass_names()[0] == "normalize"
    for name in pass_names():
        assert (find_pass(name).__doc__ or "").strip(), name
    for name in backend_names():
        assert find_backend(name).name == name


def test_an_unknown_name_gets_a_suggestion() -> None:
    with pytest.raises(SpecError, match=r"There is no pass 'fold-cahce'\. Did you mean 'fold-cache'\?"):
        find_pass("fold-cahce")
    with pytest.raises(SpecError, match=r"There is no backend 'tpu'\. Known: .*fake-quant"):
        find_backend("tpu")


def test_a_plugin_is_listed_with_its_owner_after_the_built_in_ones(declare: Declare) -> None:
    declare("some-plugin", "passes", {"good": f"{HERE}:Good"})
    assert pass_names()[-1] == "good"
    assert entries("passes")["good"] == registry.Entry("good", f"{HERE}:Good", "some-plugin", "1.0")
    assert entries("passes")["normalize"].owner == "tfqc"
    assert find_pass("good").name == "good"


@pytest.mark.parametrize("group", ["passes", "backends"])
def test_a_name_that_two_own_names_both(declare: Declare, group: str) -> None:
    name = {"passes": "normalize", "backends": "fake-quant"}[group]
    declare("some-plugin", group, {name: "some.module:Thing"})
    with pytest.raises(TfqcError) as error:
        entries(group)
    kind = {"passes": "pass", "backends": "backend"}[group]
    path = {"passes": registry.PASSES, "backends": registry.BACKENDS}[group][name]
    assert str(error.value) == (
        f"The {kind} {name!r} is claimed by tfqc ({path}) and by some-plugin (some.module:Thing): "
        "uninstall one of them."
    )


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            "no_such_module:X",
            r"The pass 'bad' of some-plugin does not load: ModuleNotFoundError: .*no_such_mod",
        ),
        (f"{HERE}:Absent", r"The pass 'bad' of some-plugin does not load: AttributeError: .*Absent"),
        (f"{HERE}:Good", r"The pass 'bad' is registered under that name, but calls itself 'good'\."),
        (
            f"{HERE}:Thawed",
            r"Pass 'bad': .*Thawed.* is no frozen dataclass derived from tfqc\.passing\.Pass\.",
        ),
        (f"{HERE}:Undecorated", r"Pass 'bad': .*Undecorated.* is no frozen dataclass derived"),
        (f"{HERE}:HERE", r"Pass 'bad': 'tests\.test_registry' is no frozen dataclass derived"),
    ],
)
def test_a_broken_plugin_fails_only_when_asked_for(declare: Declare, target: str, message: str) -> None:
    declare("some-plugin", "passes", {"bad": target})
    assert find_pass("normalize").name == "normalize"
    assert "bad" in pass_names()
    assert "bad" not in dict(sound_passes())
    with pytest.raises(SpecError, match=message):
        find_pass("bad")


def test_what_is_no_backend_is_refused(declare: Declare) -> None:
    declare("some-plugin", "backends", {"bad": f"{HERE}:Good"})
    with pytest.raises(SpecError, match=r"Backend 'bad': .*Good.* is no class derived from tfqc\.codegen\.backend"):
        find_backend("bad")


LOOKS_UP = """
from dataclasses import dataclass
from typing import ClassVar
import tfqc.passing.known
from tfqc.passing import Pass
{when_imported}
@dataclass(frozen=True)
class Found(Pass):
    name: ClassVar[str] = {name!r}
    def other(self):
        return tfqc.passing.known.find_pass({other!r})
"""


def _write(folder: Path, name: str, other: str, when_imported: str = "") -> None:
    text = LOOKS_UP.format(name=name, other=other, when_imported=when_imported)
    (folder / f"plugin_{name}.py").write_text(text)


@pytest.fixture
def pair(declare: Declare, tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """Two plug-ins, `one` and `two`, that look each other up; `when` they are imported, or when they run."""

    def make(when: str) -> None:
        for name, other in (("one", "two"), ("two", "one")):
            _write(tmp_path, name, other, f"tfqc.passing.known.find_pass({other!r})" if when == "imported" else "")
            declare(f"plugin{name}", "passes", {name: f"plugin_{name}:Found"})

    yield make
    for name in ("plugin_one", "plugin_two"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("first", ["one", "two"])
def test_plugins_that_look_each_other_up_when_they_run(first: str, pair: Callable[[str], None]) -> None:
    pair("run")
    cls = find_pass(first)
    assert find_pass(cls().other().name) is cls().other()  # type: ignore[attr-defined]


@pytest.mark.parametrize(("first", "second"), [("one", "two"), ("two", "one")])
def test_plugins_that_need_each_other_while_they_are_imported(
    first: str, second: str, pair: Callable[[str], None]
) -> None:
    pair("imported")
    for _ in range(2):  # the second time as the first
        with pytest.raises(SpecError) as caught:
            find_pass(first)
        assert str(caught.value).startswith(f"The pass '{first}' of plugin{first} does not load: The pass '{second}'")
        assert f"'{first}' -> '{second}' -> '{first}' need each other while they are imported" in str(caught.value)
    assert "normalize" in dict(sound_passes())


@pytest.mark.parametrize(
    "first",
    ["plugin_one", "tfqc.registry", "tfqc.passing", "tfqc.passing.pipeline", "tfqc.ir", "tfqc.codegen.backend"],
)
def test_a_plugin_may_be_imported_first(first: str, tmp_path: Path) -> None:
    """In a fresh interpreter, whatever is imported first."""
    _write(tmp_path, "one", "normalize", "tfqc.passing.known.find_pass('normalize')")
    code = f"import {first}, plugin_one, tfqc; tfqc.Pipeline.parse('normalize'); print(plugin_one.Found().other().name)"
    path = os.pathsep.join([str(tmp_path), str(Path(registry.__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        cwd=tmp_path,
    )
    assert (done.stdout.strip(), done.stderr) == ("normalize", "")
