"""A third-party package, built and installed by pip, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tests" / "plugin_package"
OWNER = {"owner": "tfqc-example-plugin", "version": "1.2.3"}

USE = """
import json, sys, tempfile
from pathlib import Path
import torch
from tests.tiny import INPUTS, tiny
from tfqc.codegen.artifact import check_files
from tfqc.codegen.support import refusals
from tfqc.instruments import CheckNumerics, VerifyEach
from tfqc.passing import Context
from tfqc.passing.pipeline import Pipeline
from tfqc.passing.known import sound_passes
from tfqc.registry import entries
from tfqc.sampling.schedule import SamplingSchedule
from tfqc.codegen.target import Target

said = {"listed": [vars(entries("passes")["swap-silu"]), vars(entries("backends")["example-ir"])]}
said["loaded to be listed"] = "tfqc_example_plugin" in sys.modules
said["sound"] = [name for name, _ in sound_passes()]

ctx, numerics = Context(schedule=SamplingSchedule((421.0, 7.0))), CheckNumerics()
program = Pipeline.parse("normalize,swap-silu{limit=1}").run(tiny(), ctx, [numerics, VerifyEach()])
targets = [str(n.target) for n in program.step.nodes]
said["operations"] = [t for t in targets if "sigmoid" in t or "silu" in t]
said["error"], said["report"] = numerics.errors["#2 swap-silu"], list(ctx.report)

target = Target.parse("example-ir")
backend, options = target.backend, target.options
program = Pipeline.parse(backend.pipeline(options, "fold")).run(tiny(), ctx)
said["refused"] = refusals(backend, program, options)
Pipeline(backend.legalize(options)).run(program, ctx)
said["still refused"] = refusals(backend, program, options)
with tempfile.TemporaryDirectory() as directory:
    backend.emit(program, options).save(directory)
    said["files"] = list(check_files(directory)["files"])
    loaded = backend.load(Path(directory))
want, got = (m(INPUTS["sample"], INPUTS["timestep"])[0] for m in (tiny(), loaded))
said["difference"] = float((want - got).abs().max() / want.abs().max())
print(json.dumps(said))
"""

WRITE = """
from tests.tiny import tiny
from tfqc.passing.pipeline import Pipeline
print(Pipeline.parse("normalize,swap-silu{own=true}").run(tiny()), end="")
"""

READ = """
import sys
from tfqc.errors import TfqcError
from tfqc.ir import parse, render
text = sys.stdin.read()
try:
    program = parse(text)
    rows = {type(row).__name__ for table in program.tables.values() for row in table.values()}
    print(render(program) == text + "\\n", sorted(rows))
except TfqcError as error:
    print(f"{type(error).__name__}: {error}")
"""

ASK = """
from tfqc.errors import TfqcError
from tfqc.passing.pipeline import Pipeline
try:
    print(Pipeline.parse({text!r}))
except TfqcError as error:
    print(f"{{type(error).__name__}}: {{error}}")
"""


def copy_package(to: Path, **replacements: str) -> Path:
    """The example package with words replaced in its files and their names, as another author's might be."""
    for file in [*PACKAGE.glob("*.toml"), *PACKAGE.glob("tfqc_example_plugin/*.py")]:
        name, text = str(file.relative_to(PACKAGE)), file.read_text()
        for old, new in replacements.items():
            for a, b in ((old, new), (old.replace("_", "-"), new.replace("_", "-"))):
                name, text = name.replace(a, b), text.replace(a, b)
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        (to / name).write_text(text)
    return to


def install(into: Path, *packages: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    command += ["--no-deps", "--no-build-isolation", "--target", str(into), *map(str, packages)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def python(code: str, *paths: Path, given: str = "") -> str:
    """What a process prints whose path has tfqc and these directories."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, *paths))), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False, cwd="/", input=given)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two directories: the example and a broken plug-in; a rival that claims the example's names."""
    work = tmp_path_factory.mktemp("plugins")
    example = copy_package(work / "example")
    broken = copy_package(work / "broken", example="broken", swap_silu="broken_pass")
    with (broken / "tfqc_broken_plugin" / "broken_pass.py").open("a") as file:
        file.write("\nimport no_such_library\n")
    rival = copy_package(work / "rival", tfqc_example="tfqc_rival")
    install(work / "site", example, broken)
    install(work / "other", rival)
    return work / "site", work / "other"


def test_an_installed_plugin_works_and_a_broken_one_beside_it_does_no_harm(sites: tuple[Path, Path]) -> None:
    said: dict[str, Any] = json.loads(python(USE, sites[0]))
    assert said["loaded to be listed"] is False
    assert said["listed"] == [
        {"name": "swap-silu", "path": "tfqc_example_plugin.swap_silu:SwapSilu", **OWNER},
        {"name": "example-ir", "path": "tfqc_example_plugin.example_ir:ExampleIrBackend", **OWNER},
    ]  # fmt: skip
    assert "swap-silu" in said["sound"]
    assert "broken-pass" not in said["sound"]
    assert said["operations"] == ["aten.sigmoid.default", "aten.silu.default"]
    assert 0 <= said["error"] <= 1e-6
    assert said["report"] == ["1 SiLU swapped"]
    assert said["refused"]
    assert all(line.endswith("the device has no SiLU") for line in said["refused"])
    assert said["still refused"] == []
    assert said["files"] == ["program.ir", "program.safetensors"]
    assert said["difference"] < 1e-5


def test_text_with_an_operation_and_a_table_of_a_plugin(sites: tuple[Path, Path]) -> None:
    """It is read by who has not imported the plug-in; without it the operation is refused, the table kept."""
    text = python(WRITE, sites[0])
    assert "tfqc_example.gate.default(%" in text
    assert 'tfqc-example-swapped="silu"' in text
    assert python(READ, sites[0], given=text) == "True ['Swapped']"
    said = python(READ, given=text)
    assert "No operation 'tfqc_example.gate.default' is known: install the plug-in that registers operations of" in said
    plain = "\n".join(line.replace("tfqc_example.gate.default(%", "aten.mul.Tensor(%") for line in text.split("\n"))
    assert python(READ, given=plain) == "True ['OpaqueRow']"


def test_a_broken_plugin_fails_when_asked_for(sites: tuple[Path, Path]) -> None:
    assert python(ASK.format(text="normalize,broken-pass"), sites[0]) == (
        "SpecError: The pass 'broken-pass' of tfqc-broken-plugin does not load: "
        "ModuleNotFoundError: No module named 'no_such_library'"
    )


def test_two_plugins_that_claim_one_name_are_both_named(sites: tuple[Path, Path]) -> None:
    said = python(ASK.format(text="normalize"), *sites)
    assert said.startswith("TfqcError: The pass 'swap-silu' is claimed by ")
    assert "tfqc-example-plugin (tfqc_example_plugin.swap_silu:SwapSilu)" in said
    assert "tfqc-rival-plugin (tfqc_rival_plugin.swap_silu:SwapSilu)" in said


def test_one_distribution_that_stands_twice_on_the_path_is_no_conflict(sites: tuple[Path, Path]) -> None:
    assert python(ASK.format(text="normalize,swap-silu"), sites[1], sites[1]) == "normalize,swap-silu"
