"""The wheel holds what the tree holds, and tfqc runs from it as from the tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tfqc import registry

ROOT = Path(__file__).parents[1]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "tfqc", "passes", "backends")
DATA = {".json", ".md", ".py", ".pyi", ".safetensors", ".txt", ".c", ".cpp", ".cu", ".cuh", ".h", ".typed"}

# Run where the user keeps folders of their own with the names of ours.
USE = """
import tfqc, tfqc.passes.normalize, tfqc.backends.fake_quant
from tfqc.passing.pipeline import Pipeline
from tfqc.passing.known import sound_passes
print(tfqc.__path__[0], len(list(sound_passes())), Pipeline.parse("normalize,discover-tib"))
"""


def ours(directory: str, names: list[str]) -> set[str]:
    return {n for n in names if n == "__pycache__" or n.startswith(".") or n.endswith(".egg-info")}


def call(*command: str, cwd: Path, path: Path | None = None) -> str:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    env |= {"PYTHONPATH": str(path)} if path else {}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools leaves build/ and *.egg-info behind."""
    copy = tmp_path_factory.mktemp("tree")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ours)
        else:
            shutil.copy(ROOT / name, copy / name)
    build = ("-m", "build", "--wheel", "--no-isolation", "--outdir", str(copy / "dist"))
    call(sys.executable, *build, cwd=copy)
    (found,) = (copy / "dist").glob("*.whl")
    return found


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A user's directory with `passes/` and `backends/` of its own."""
    for name in ("passes", "backends"):
        (tmp_path / "home" / name).mkdir(parents=True)
        (tmp_path / "home" / name / "__init__.py").write_text("raise ImportError('the wrong one')\n")
    return tmp_path / "home"


def test_the_wheel_holds_the_code_the_data_and_nothing_else(wheel: Path) -> None:
    held = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    kept = [f for tree in ("tfqc", "passes", "backends") for f in (ROOT / tree).rglob("*") if f.is_file()]
    real = [f for f in kept if f.suffix in DATA and "__pycache__" not in f.parts]
    wanted = {str(f.relative_to(ROOT)) for f in real}
    wanted = {name if name.startswith("tfqc/") else f"tfqc/{name}" for name in wanted}
    assert held == wanted
    assert {"tfqc/passing/pipeline.py", "tfqc/passes/normalize.py", "tfqc/backends/fake_quant/backend.py"} <= held


def test_tfqc_runs_from_the_wheel(wheel: Path, elsewhere: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    options = ("--quiet", "--disable-pip-version-check", "--no-index", "--no-deps", "--target", str(site))
    call(sys.executable, "-m", "pip", "install", *options, str(wheel), cwd=tmp_path)
    place, count, pipeline = call(sys.executable, "-c", USE, cwd=elsewhere, path=site).split()
    assert place == str(site / "tfqc")
    assert int(count) == len(registry.PASSES)
    assert pipeline == "normalize,discover-tib"


def test_tfqc_runs_from_the_tree_by_path_alone(elsewhere: Path) -> None:
    place, *_, pipeline = call(sys.executable, "-c", USE, cwd=elsewhere, path=ROOT).split()
    assert place == str(ROOT / "tfqc")
    assert pipeline == "normalize,discover-tib"


def test_the_links_are_relative_and_kept_as_links() -> None:
    for name in ("passes", "backends"):
        assert os.readlink(ROOT / "tfqc" / name) == f"../{name}"
