"""The grammar of passes, pipelines and targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfqc.errors import SpecError
from tfqc.passing.spec import Spec, build, options_of, parse_specs, to_text, to_yaml


@dataclass(frozen=True)
class Options:
    """One field of each kind."""

    count: int = 3
    rate: float = 0.5
    loud: bool = False
    mode: Literal["nearest", "error"] = "nearest"
    bits: Literal[4, 8] = 8
    title: str = "plain"
    names: tuple[str, ...] = ("a", "b")
    sizes: tuple[int, ...] = ()
    pair: tuple[int, float] = (1, 2.0)
    group_size: int | None = None
    limit: float | None = 1.0


OPTIONS = st.builds(
    Options,
    count=st.integers(),
    rate=st.floats(allow_nan=False),
    loud=st.booleans(),
    mode=st.sampled_from(["nearest", "error"]),
    bits=st.sampled_from([4, 8]),
    title=st.text(),
    names=st.lists(st.text()).map(tuple),
    sizes=st.lists(st.integers()).map(tuple),
    pair=st.tuples(st.integers(), st.floats(allow_nan=False)),
    group_size=st.none() | st.integers(),
    limit=st.none() | st.floats(allow_nan=False),
)


def read(text: str) -> list[Options]:
    return [build(Options, spec, "pass") for spec in parse_specs(text)]


@given(st.lists(OPTIONS, min_size=1, max_size=3))
def test_text_and_yaml_lose_nothing(values: list[Options]) -> None:
    assert read(",".join(to_text("fold", v) for v in values)) == values
    assert read(to_yaml(("fold", v) for v in values)) == values


def test_only_what_differs_from_its_default_is_printed() -> None:
    assert to_text("fold", Options()) == "fold"
    value = Options(rate=1e-05, loud=True, title="two words", names=("x",), sizes=(1, 2), limit=None)
    assert to_text("fold", value) == 'fold{rate=1e-05 loud=true title="two words" names=x sizes=1,2 limit=none}'
    assert to_text("fold", Options(names=(), title="")) == 'fold{title="" names=}'


def test_yaml_is_what_a_person_would_write() -> None:
    value = Options(count=4, loud=True, names=("x", "y"), limit=None)
    text = to_yaml([("normalize", Options()), ("fold", value)])
    assert text == (
        "- normalize\n- fold:\n    count: 4\n    loud: true\n    names:\n    - x\n    - y\n    limit: null\n"
    )


@pytest.mark.parametrize(
    ("text", "specs"),
    [
        ("", []),
        ("  \n# nothing\n", []),
        ("a", [Spec("a")]),
        ("a,b-c,", [Spec("a"), Spec("b-c")]),
        ("a{}", [Spec("a")]),
        ("a { x=1   y=p,q } , b", [Spec("a", {"x": ("1",), "y": ("p", "q")}), Spec("b")]),
        ('a{x="1, {2} # \\"3\\""}', [Spec("a", {"x": ('1, {2} # "3"',)})]),
        ("a, # first\nb{x=1 # why\n  y=2}", [Spec("a"), Spec("b", {"x": ("1",), "y": ("2",)})]),
        ("a{x_y=1}", [Spec("a", {"x-y": ("1",)})]),
        ("a{x= y=1}", [Spec("a", {"x": (), "y": ("1",)})]),
        ("# c\n- a\n- b: {x_y: 1, z: [p, q], w: true, v: null}\n",
         [Spec("a"), Spec("b", {"x-y": ("1",), "z": ("p", "q"), "w": ("true",), "v": ("none",)})]),
    ],
)  # fmt: skip
def test_what_is_read(text: str, specs: list[Spec]) -> None:
    assert parse_specs(text) == specs


@pytest.mark.parametrize(
    ("text", "message", "place"),
    [
        ("a,,b", "Expected a name at column 3 of 'a,,b'.", "  ^"),
        ("a b", "Expected ',' between names at column 3 of 'a b'.", "  ^"),
        ("a{x}", "Expected '=' after option 'x' at column 4 of 'a{x}'.", "   ^"),
        ("a{x=1", "Expected an option's name or '}' at column 6 of 'a{x=1'.", "     ^"),
        ("a{x=1,}", "Expected a value at column 7 of 'a{x=1,}'.", "      ^"),
        ("a{x=1 x=2}", "Expected each option once, not 'x' again, at column 7 of 'a{x=1 x=2}'.", "      ^"),
        ("a{x-y=1 x_y=2}", "not 'x-y' again, at column 9", "        ^"),
        ('a{x="1}', "Expected a value and its closing quote at column 5", "    ^"),
        ("a,\n# c\n  b{x}\n", "at line 3, column 6 of '  b{x}'.", "     ^"),
    ],
)
def test_malformed_text_is_underlined(text: str, message: str, place: str) -> None:
    with pytest.raises(SpecError) as error:
        parse_specs(text)
    assert message in str(error.value)
    assert error.value.notes[1] == place
    assert error.value.notes[0] in text.splitlines()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a: [", "This is no valid YAML"),
        ("- a: {}\n  b: {}", "In YAML an item is a name or `name: {option: value}`, not {'a': {}, 'b': {}}."),
        ("- a: 3", "not {'a': 3}."),
        ("- 3", "not 3."),
    ],
)
def test_yaml_of_another_form_is_refused(text: str, message: str) -> None:
    with pytest.raises(SpecError) as error:
        parse_specs(text)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fold{moed=error}", "Pass 'fold' has no option 'moed'. Did you mean 'mode'?"),
        ("fold{mode=exact}", "Pass 'fold', option 'mode': 'exact' is not one of nearest, error."),
        ("fold{bits=16}", "Pass 'fold', option 'bits': '16' is not one of 4, 8."),
        ("fold{count=1.5}", "Pass 'fold', option 'count': '1.5' is no whole number."),
        ("fold{rate=fast}", "Pass 'fold', option 'rate': 'fast' is no number."),
        ("fold{loud=yes}", "Pass 'fold', option 'loud': 'yes' is neither true nor false."),
        ("fold{count=1,2}", "Pass 'fold', option 'count': one value is wanted, not '1,2'."),
        ("fold{title=}", "Pass 'fold', option 'title': one value is wanted, not ''."),
        ("fold{pair=1,2,3}", "Pass 'fold', option 'pair': 2 values are wanted, not 3."),
        ("fold{group-size=many}", "Pass 'fold', option 'group-size': 'many' is no whole number."),
        ("fold{count=none}", "Pass 'fold', option 'count': 'none' is no whole number."),
    ],
)
def test_a_wrong_option_is_refused_in_one_sentence(text: str, message: str) -> None:
    with pytest.raises(SpecError) as error:
        read(text)
    assert str(error.value) == message


def test_a_missing_option_and_a_value_out_of_range() -> None:
    @dataclass(frozen=True)
    class Strict:
        bits: int

        def __post_init__(self) -> None:
            if self.bits not in (4, 8):
                raise ValueError(f"bits is 4 or 8, not {self.bits}")

    with pytest.raises(SpecError, match=r"^Pass 's' needs the option 'bits': s\{bits=\.\.\.\}\.$"):
        build(Strict, Spec("s"), "pass")
    with pytest.raises(SpecError, match=r"^Pass 's': bits is 4 or 8, not 5\.$"):
        build(Strict, Spec("s", {"bits": ("5",)}), "pass")


def test_options_are_listed_with_types_and_defaults() -> None:
    @dataclass(frozen=True)
    class Some:
        needed: int
        bits: Literal[4, 8] = 8
        group_size: int | None = None
        names: tuple[str, ...] = ("a", "two words")
        loud: bool = True

    assert options_of(Some) == {
        "needed": ("int", "required"),
        "bits": ("4|8", "8"),
        "group-size": ("int|none", "none"),
        "names": ("str,...", 'a,"two words"'),
        "loud": ("bool", "true"),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("#---\n" * 60, None),  # nothing, in no time
        ("fold{title=\x00}", "not the character '\\x00', at column 12"),
        ("fold{title=\ud800}", "not the character '\\ud800'"),
        ('fold{title="\\ud800"}', "whole characters"),
        ("fold{count=" + "9" * 5000 + "}", "is no whole number"),
        ("fold{count=\u0663}", "is no whole number"),
        ("fold{rate=nan}", "'nan' is no number"),
        ("fold{rate=1e999}", "'1e999' is no number"),
        ("f" * 3000, "Expected ',' between names"),
        ("x" * 2**21, "as many as specs have"),
        ("- a: &x [1]\n- b: *x", "an anchor, an alias or a tag at line 1, column 6"),
        ("- a: !!python/name:os.system x", "an anchor, an alias or a tag"),
        ("- " * 2000, "more than 8 levels"),
        ("- a\n- " + "{a: " * 2000, "more than 8 levels"),
        ("- a: {b: {c: d}}", "has {'c': 'd'}: numbers and text can stand there"),
        ("- 2020-99-99", "This is no valid YAML"),
        ("- " + "9" * 5000, "This is no valid YAML"),
        ("- a: {x_y: 1, x-y: 2}", "has the option 'x-y' twice"),
        ("- a b", "is no name of a pass, a target or an option"),
        ("- a\n---\n- b", "This is no valid YAML"),
    ],
)
def test_text_of_strangers_is_an_error_of_one_sentence(text: str, message: str | None) -> None:
    if message is None:
        assert parse_specs(text) == []
        return
    with pytest.raises(SpecError) as error:
        read(text)
    assert message in str(error.value)
    assert len(str(error.value)) < 600
    "\n".join([str(error.value), *error.value.notes]).encode()  # it can be printed
