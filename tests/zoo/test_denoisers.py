"""The quick half of `bench/denoisers.py`: classes of each kind whose graphs are small."""

from __future__ import annotations

import pytest

from tests.zoo.denoisers import DENOISERS, NO_DENOISERS, classes_of_diffusers
from tests.zoo.walk import EXACT, walk


def test_no_class_is_skipped_silently() -> None:
    assert classes_of_diffusers() == {*DENOISERS, *NO_DENOISERS}
    assert not DENOISERS.keys() & NO_DENOISERS.keys()


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "PriorTransformer"])
def test_without_quantization_nothing_changes(name: str) -> None:
    walked = walk(name, DENOISERS[name], stages=("exact",))
    assert not walked.torch and not walked.refused
    assert walked.exact is not None and walked.exact <= EXACT
