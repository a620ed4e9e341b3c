"""The READMEs as a reader would follow them: files copied, commands run, and what comes out is what stands there."""

from __future__ import annotations

import doctest
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

import tfqc
from tests.integrations.pipelines import sd
from tfqc.recipe.recipe import recipe_of
from tfqc.recipe.schema import json_schema

ROOT = Path(__file__).parents[1]
READMES = [
    "README.md", "CONTRIBUTING.md", "tfqc/README.md", "tfqc/ir/README.md", "tfqc/runtime/README.md",
    "tfqc/integrations/README.md", "tfqc/integrations/formats/README.md", "passes/README.md", "backends/README.md",
    "tests/ptx/README.md", "bench/README.md",
]  # fmt: skip
TREES = ("tfqc", "passes", "backends", "tests", "bench")
MADE = {"model.py", "kernels.cpp", "kernels.cu", "program.ir", "remarks.json", "00-capture.ir"}  # what commands write
# A file is a block behind a line that begins with its name; commands and what they print are a console block.
FILE = re.compile(r"^`([\w./]+)`[^\n]*:\n\n```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CONSOLE = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^\$ ", re.MULTILINE)


def follow(readme: str, directory: Path) -> list[tuple[str, str, str]]:
    """Write a README's files, run its commands in order: of each, what it should print and what it prints."""
    for name, content in FILE.findall(readme):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(content)
    site = directory.parent / "site"  # what pip installs goes here, from here alone
    env = {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(site)]),
        "PIP_TARGET": str(site), "PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # which pip reads as --no-build-isolation
        "COLUMNS": "120", "TERM": "dumb", "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(directory.parent / "cache"),
    }  # fmt: skip
    found: list[tuple[str, str, str]] = []
    for block in CONSOLE.findall(readme):
        for step in COMMAND.split(block)[1:]:
            command, _, wanted = step.partition("\n")
            done = subprocess.run(
                ["bash", "-c", command],
                capture_output=True,
                text=True,
                env=os.environ | env,
                cwd=directory,
                check=False,
            )
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
            found.append((command, wanted, done.stdout + done.stderr))
    return found


def agrees(wanted: str, printed: str) -> bool:
    """True if a command prints what the README shows; `...` stands for anything, blanks count as one."""
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    return doctest.OutputChecker().check_output(wanted, printed, options)


@pytest.mark.parametrize("name", ["passes/README.md", "backends/README.md"])
def test_a_reader_gets_what_it_says(name: str, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    steps = follow((ROOT / name).read_text(), work)
    assert [command.split()[0] for command, _, _ in steps][:2] == ["pip", "tfqc"]
    for command, wanted, printed in steps:
        assert agrees(wanted, printed), f"{command} prints\n{printed}"


def test_what_is_not_said_is_noticed(tmp_path: Path) -> None:
    readme = "`a/b.txt`, a file:\n\n```\none\n```\n\n```console\n$ cat a/b.txt\none\n$ echo two three\nthree\n```\n"
    (cat, echo) = follow(readme, tmp_path)
    assert agrees(*cat[1:]) and not agrees(*echo[1:])
    assert agrees("t... three\n", echo[2])


@pytest.mark.parametrize("name", READMES)
def test_files_and_names_that_it_mentions_exist(name: str) -> None:
    text = (ROOT / name).read_text()
    known = {
        str(f.relative_to(ROOT)) for tree in TREES for f in (ROOT / tree).rglob("*") if "__pycache__" not in f.parts
    }
    known |= {f.name for f in ROOT.iterdir()} | MADE | {file for file, _ in FILE.findall(text)}
    paths = re.findall(r"`([\w./-]+\.(?:py|md|ir|h|cpp|cuh|toml|json|log))`", text) + re.findall(r"\]\(([^:)#]+)", text)
    assert [p for p in paths if not any(k == p or k.endswith(f"/{p}") for k in known)] == []
    dotted = [n for n in re.findall(r"`(tfqc(?:\.\w+)+)`", text) if "NAME" not in n]
    assert [n for n in dotted if not is_there(n) and not hasattr(torch.ops.tfqc, n.split(".")[1])] == []


def is_there(name: str) -> bool:
    """True for a module, or for what lies in one."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def test_what_is_not_there_is_noticed() -> None:
    assert is_there("tfqc.ir.edit.Rewriter") and is_there("tfqc.compile")
    assert not is_there("tfqc.ir.edit.Editor") and not is_there("tfqc.emission")


def test_the_example_of_the_ptx_interpreter_runs() -> None:
    (code,) = re.findall(
        r"^```python\n(.*?)^```$", (ROOT / "tests/ptx/README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    exec(compile(code, "tests/ptx/README.md", "exec"), {})


def test_the_recipes_do_what_they_say(tmp_path: Path) -> None:
    section = (ROOT / "README.md").read_text().partition("\n## Recipes\n")[2].partition("\n## ")[0]
    work = tmp_path / "work"
    work.mkdir()
    steps = follow(section, work)
    assert [command.split()[0] for command, _, _ in steps] == ["tfqc", "tfqc", "tfqc", "diff", "tfqc", "tfqc"]
    for command, wanted, printed in steps:
        assert agrees(wanted, printed), f"{command} prints\n{printed}"
    assert tfqc.Recipe.load(work / "again.yaml").resolved == recipe_of(work / "first")
    assert json.loads((work / "schema.json").read_text()) == json_schema()


def test_the_example_of_a_pipeline_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands, on a folder with random weights; and what it saves is loaded again."""
    (code,) = [
        c
        for c in re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
        if "tfqc.quantize(" in c
    ]
    sd(tmp_path).save_pretrained(tmp_path / "sd-folder")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["image"].size == (16, 16)  # pyright: ignore[reportAttributeAccessIssue]
    loaded = DiffusionPipeline.from_pretrained("sd-int8")
    assert type(loaded.unet).__name__ == "TfqcDenoiser"


def test_a_pass_and_a_target_in_few_lines(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    section = readme.partition("\n## A pass and a target of your own\n")[2].partition("\n## ")[0]
    work = tmp_path / "work"
    work.mkdir()
    steps = follow(section, work)
    assert [command.split()[0] for command, _, _ in steps] == ["python", "pip", "tfqc"]
    for command, wanted, printed in steps:
        assert agrees(wanted, printed), f"{command} prints\n{printed}"
    lines = {name: len(content.splitlines()) for name, content in FILE.findall(section)}
    assert lines["silu.py"] < 40 and lines["chip/pyproject.toml"] + lines["chip/my_chip.py"] < 40
    assert all(len(code.splitlines()) < 40 for code in re.findall(r"^```python\n(.*?)^```$", readme, re.M | re.S))


def test_the_example_of_loading_quantized_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = _integrating("TfqcConfig(")
    sd(tmp_path).save_pretrained(tmp_path / "sd-folder")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    loaded = DiffusionPipeline.from_pretrained("sd-small")
    assert type(loaded.unet.conv_in).__name__ == "Int8Conv2d"


def test_the_example_of_lora_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft", reason="LoRA needs peft, which is not installed")
    from tests.integrations.test_lora_after import saved

    code = _integrating("load_lora_weights(")
    saved("sd", tmp_path / "lora").rename(tmp_path / "lora-folder")
    tfqc.quantize(sd(tmp_path), steps=30, calibration=1).save_pretrained(tmp_path / "sd-int8")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["pipe"].get_active_adapters() == ["style"] and names["image"].size == (16, 16)


def _integrating(what: str) -> str:
    text = (ROOT / "tfqc/integrations/README.md").read_text()
    (code,) = [c for c in re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S) if what in c]
    return code
