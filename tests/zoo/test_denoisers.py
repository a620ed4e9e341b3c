"""The quick half of `bench/denoisers.py`: classes of each kind whose graphs are small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.zoo.denoisers import DENOISERS, NO_DENOISERS, classes_of_diffusers
from tests.zoo.walk import EXACT, walk

# Of each kind: U-Nets, images, packed tokens, lists of images, vectors, no time.
QUICK = [
    "UNet2DModel", "DiTTransformer2DModel", "FluxTransformer2DModel", "ZImageTransformer2DModel", "PriorTransformer",
    "DreamLiteTransformer2DModel",
]  # fmt: skip


def test_no_class_is_skipped_silently() -> None:
    assert classes_of_diffusers() == {*DENOISERS, *NO_DENOISERS}
    assert not DENOISERS.keys() & NO_DENOISERS.keys()


def test_every_class_has_a_row_in_the_table() -> None:
    bench = Path(__file__).parents[2] / "bench"
    results = json.loads((bench / "results" / "denoisers.json").read_text())
    assert results.keys() <= DENOISERS.keys()
    table = (bench / "README.md").read_text().partition("<!-- denoisers -->")[2].partition("<!-- end of")[0]
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in table.splitlines() if line.startswith("| ")}
    assert [*rows][1:] == [*DENOISERS]
    assert {
        name for name, line in rows.items() if line.endswith("| not run yet |")
    } == DENOISERS.keys() - results.keys()


@pytest.mark.parametrize("name", QUICK)
def test_without_quantization_nothing_changes(name: str) -> None:
    walked = walk(name, DENOISERS[name], stages=("exact",))
    assert not walked.torch and not walked.refused
    assert walked.exact is not None and walked.exact <= EXACT
