"""Quantization specs: text that says them back, and refusals of what cannot be."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfqc.errors import SpecError
from tfqc.quant.formats import FORMATS, QuantSpec, specs_of_text, specs_to_text

WORDS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\x00"), max_size=12)


@st.composite
def specs(draw: st.DrawFn) -> QuantSpec:
    """Any spec of a whole operand."""
    format = draw(st.sampled_from(list(FORMATS.values())))
    said: dict[str, Any] = {"by": draw(WORDS), "why": draw(WORDS)}
    if format.kind != "none":
        per = said["per"] = draw(st.sampled_from(["tensor", "channel", "group", "token", "step"]))
        said |= {"group": draw(st.integers(1, 512))} if per == "group" else {}
        said |= {"intervals": draw(st.integers(0, 50))} if per == "step" else {}
        ranges = ["min-max", "mse", *(["fsc", "tdq"] if per in ("step", "tensor") else [])]
        said |= {"range": draw(st.sampled_from(ranges)), "symmetric": draw(st.booleans()), "smooth": draw(WORDS)}
    return QuantSpec(format=format, **said)


@st.composite
def operands(draw: st.DrawFn) -> tuple[QuantSpec, ...]:
    """One spec, or one for each part of the channels or of the steps."""
    from dataclasses import replace

    ends = sorted(draw(st.sets(st.integers(1, 4096), max_size=3)))
    if len(ends) < 2:
        return (draw(specs()),)
    what = draw(st.sampled_from(["channels", "steps"]))
    parts = zip([0, *ends], ends, strict=False)
    return tuple(replace(draw(specs()), **{what: part}) for part in parts)


@given(operands())
def test_what_is_written_is_read_back(found: tuple[QuantSpec, ...]) -> None:
    text = specs_to_text(found)
    assert specs_of_text(text) == found
    assert "\n" not in text


def test_what_it_can_say() -> None:
    texts = (
        "int4{per=group group=64 range=mse}",
        "int8{channels=0,320 per=step symmetric=false},int4{channels=320,640 symmetric=false}",
        "int8{steps=0,5},float{steps=5,20}",
        "fp8-e4m3{per=token}",
        "int8{smooth=smooth.conv_in}",
        'int8{per=step intervals=4 range=fsc symmetric=false by=someone why="it\'s first, and last"}',
        ",".join(
            f"int{b}{{channels={c} steps={s}}}"
            for b, c, s in ((8, "0,2", "0,1"), (4, "2,4", "0,1"), (2, "0,2", "1,2"), (3, "2,4", "1,2"))
        ),
    )
    for text in texts:
        assert specs_of_text(specs_to_text(specs_of_text(text))) == specs_of_text(text)
    first, second = specs_of_text(texts[1])
    assert (first.channels, first.format.bits, second.channels, second.format.bits) == ((0, 320), 8, (320, 640), 4)
    assert not specs_of_text(texts[3])[0].format.is_integer


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("int9", r"no format 'int9'\. Did you mean 'int8'"),
        ("int8{pr=token}", r"Format 'int8' has no option 'pr'\. Did you mean 'per'"),
        ("int8{per=tokens}", r"'tokens' is not one of tensor, channel"),
        ("int4{per=group}", "group=0 with per=group"),
        ("int4{group=4}", "group=4 with per=tensor"),
        ("int8{intervals=2}", "intervals=2 with per=tensor"),
        ("int8{per=token range=fsc}", "finite sets have a scale for each step"),
        ("int8{per=channel range=tdq}", "finite sets have a scale for each step"),
        ("int8{channels=5,5}", "channels=5,5: a first one"),
        ("float{per=token}", "stays in floating point has no per"),
        ("", "say `float`"),
        ("int8,int4", "do not share it out"),
        ("int8{channels=0,4},int4{channels=2,6}", "0,4 and 2,6 of an operand overlap"),
        ("int8{steps=0,4},int4{steps=5,6}", "leave a gap"),
        ("int8{steps=0,4},int4", "all say their steps, or none"),
        ("int8{steps=0,4 channels=0,2},int4{steps=4,8 channels=2,4}", "do not share it out"),
        ("int8{format=int4}", "no option 'format'"),
    ],
)
def test_what_cannot_be(text: str, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        specs_of_text(text)
