"""The stored vectors: made again they are the same bytes, and what is executed from real PTX agrees with them."""

from __future__ import annotations

import functools
import json
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest

from tests.cuda.vectors import vectors
from tests.ptx import run
from tfqc.backends.cuda_int4.checking.vectors import FILE, Tolerance, Vector, described, kernel_of, load, to_bytes
from tfqc.backends.cuda_int4.runtime.build import MissingCompilerError, compile
from tfqc.backends.cuda_int4.runtime.specialise import Epilogue, Gemm, Quantize, source

STORED = {vector.kernel.name: vector for vector in load()}


@functools.cache
def ptx_of(name: str) -> str:
    """For compute_80, as every image has it; 8-bit bodies run there too."""
    try:
        return compile(source([STORED[name].kernel]), "sm_80", "ptx").image.decode()
    except MissingCompilerError as error:
        pytest.skip(str(error))


def test_they_are_what_the_generator_makes() -> None:
    made = to_bytes(vectors())
    assert made == FILE.read_bytes(), "write them again: python -m tests.cuda.vectors"
    assert len(made) < 400_000


def test_every_option_of_every_kernel_has_a_vector() -> None:
    kernels = [vector.kernel for vector in STORED.values()]
    for part, found in (
        (Gemm, [k for k in kernels if isinstance(k, Gemm)]),
        (Epilogue, [k.epilogue for k in kernels if isinstance(k, Gemm)]),
        (Quantize, [k for k in kernels if isinstance(k, Quantize)]),
    ):
        for name, hint in get_type_hints(part).items():
            seen = {getattr(each, name) for each in found}
            wanted = {a for h in (hint, *get_args(hint)) if get_origin(h) is Literal for a in get_args(h)}
            if hint in (bool, int):
                assert len(seen) > 1, (part, name)
            assert wanted <= seen, (part, name)


@pytest.mark.parametrize("name", STORED)
def test_a_kernel_is_read_back_from_its_description(name: str) -> None:
    kernel = STORED[name].kernel
    assert kernel_of(json.loads(json.dumps(described(kernel)))) == kernel


@pytest.mark.parametrize(
    ("off", "tolerance", "passed"),
    [
        ([0, 0, 0, 0], Tolerance(), True),
        ([1, 0, 0, 0], Tolerance(), False),
        ([1, -1, 1, 1], Tolerance(steps=1), True),
        ([0, 2, 0, 0], Tolerance(steps=1), False),
        ([0, 0, 1, 1], Tolerance(steps=1, share=0.25), False),
        ([0, 0, 0, 1], Tolerance(steps=1, share=0.25), True),
        ([9, 0, 0, 0], Tolerance(steps=1, slack=1e-5), True),  # of a number that is nearly 0
        ([0, 9, 0, 0], Tolerance(steps=1, slack=1e-5), False),
    ],
)
def test_tolerances_count_units_in_the_last_place(off: list[int], tolerance: Tolerance, passed: bool) -> None:
    want = np.array([0, 1, -2, 3], np.float16)
    got = want.copy()
    for place, steps in enumerate(off):
        for _ in range(abs(steps)):
            got[place] = np.nextafter(got[place], np.float16(np.copysign(np.inf, steps)))
    found = Vector(STORED["tfqc_quantize_rows_72_u4_step"].kernel, 1, {}, {"scale": want}, tolerance)
    difference = found.difference({"scale": got})
    assert (difference.differing > 0, difference.passed) == (any(off) and not (tolerance.slack and off[0]), passed)
    assert not found.difference({"scale": np.full_like(want, np.nan)}).passed


@pytest.mark.parametrize("name", STORED)
def test_the_interpreter_of_ptx_agrees(name: str) -> None:
    vector = STORED[name]
    got = {argument: np.full_like(want, 77) for argument, want in vector.outputs.items()}
    for array in vector.inputs.values():
        array.setflags(write=False)
    *pointers, _ = vector.kernel.arguments
    arguments = [(vector.inputs | got).get(argument, np.uint64(0)) for argument in pointers]
    threads, shared = (vector.kernel.threads, 1, 1), vector.kernel.shared_bytes
    grid = vector.kernel.grid(vector.rows)
    run(ptx_of(name), name, grid, threads, [*arguments, np.int32(vector.rows)], shared)
    found = vector.difference(got)
    assert found.passed, found
    if not vector.tolerance.slack and vector.tolerance.share == 1:
        assert not found.differing  # where no activation is approximate, a GPU has no freedom either
