"""How tests call the command: in this process, or as a program of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tfqc.cli import app

TINY = "tests.cli.factories:tiny"
UNET = "tests.cli.factories:unet"
FEW = ("--steps", "3", "--calibration-images", "2")


@dataclass(frozen=True)
class Called:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """stdout, which must be JSON and nothing else."""
        return json.loads(self.out)


Tfqc = Callable[..., Called]


@pytest.fixture(scope="session")
def tfqc() -> Tfqc:
    """Call `tfqc ARGUMENTS` in this process."""

    def call(*arguments: object) -> Called:
        result = CliRunner(env={"TERM": "dumb"}).invoke(app, [str(a) for a in arguments])
        return Called(result.exit_code, result.stdout, result.stderr)

    return call


@pytest.fixture(scope="session")
def artifact(tfqc: Tfqc, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small UNet compiled for 3 steps; shared, so not to be changed."""
    out = tmp_path_factory.mktemp("artifact") / "unet"
    done = tfqc("compile", UNET, "--target", "fake-quant{weights=4}", *FEW, "--out", out)
    assert done.code == 0, done.err
    return out
