"""Captured programs, one capture a session; and no pipeline of any test ends in an invalid program."""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Callable, Sequence
from typing import Any

import hypothesis
import pytest

# Before torch is loaded, and for all processes that tests start. Without it MKL's products depend, on some CPUs, on
# where operands lie in memory, and two runs of one float model differ in their last bits.
os.environ["MKL_CBWR"] = "AVX2,STRICT"

import torch

from tests.captures import captures_once
from tests.models import MODELS, ROLES, Example
from tests.subjects import Subject, find_subject
from tfqc import driver
from tfqc.frontend import capture
from tfqc.instruments import Instrument
from tfqc.ir.program import Program
from tfqc.ir.verify import verify
from tfqc.passing import Context
from tfqc.passing.pipeline import Pipeline

# A busy machine is no failure.
hypothesis.settings.register_profile("patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("patient")
torch.set_num_threads(1)
driver.capture = captures_once()

Programs = Callable[[str], Program]


def pytest_collection_finish() -> None:
    """Let the garbage collector pass over what lives to the end: torch's objects are most of what it looks through."""
    gc.collect()
    gc.freeze()


@functools.cache
def _example(name: str) -> Example:
    return MODELS[name]()


@functools.cache
def _captured(name: str) -> Program:
    model, inputs = _example(name)
    return capture(model, inputs, roles=ROLES.get(name))


@functools.cache
def _discovered(name: str) -> Program:
    return Pipeline.parse("normalize,discover-tib").run(_captured(name).clone())


@pytest.fixture(scope="session")
def example() -> Callable[[str], Example]:
    """A model of `tests.models` and its inputs, by name; shared, so not to be changed."""
    return _example


@pytest.fixture(scope="session")
def captured() -> Programs:
    """A model of `tests.models` as captured, by name; every caller has its own."""
    return lambda name: _captured(name).clone()


@pytest.fixture(scope="session")
def discovered() -> Programs:
    """The same after normalize and discover-tib."""
    return lambda name: _discovered(name).clone()


@pytest.fixture(autouse=True)
def _pipelines_end_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verify what any pipeline returns, also where a test runs it without the verifier."""
    run = Pipeline.run

    def checked(
        self: Pipeline,
        program: Program,
        ctx: Context | None = None,
        instruments: Sequence[Instrument] | None = None,
        **options: Any,
    ) -> Program:
        result = run(self, program, ctx, instruments, **options)
        if instruments is not None:  # by default each pass is followed by the verifier
            verify(result, str(self))
        return result

    monkeypatch.setattr(Pipeline, "run", checked)


@pytest.fixture(scope="session")
def subject(example: Callable[[str], Example], discovered: Programs) -> Callable[[str], Subject]:
    """A model with its analysed program and calls to make, by its name in `tests.subjects.SUBJECTS`."""
    return lambda name: find_subject(name, example, discovered)
