"""tfqc/ir/README.md says what the code says."""

from __future__ import annotations

import re

from tests.ir.readme import PARTS, README, up_to_date
from tfqc.ir import Stage, parse, render, verify


def test_it_is_up_to_date() -> None:
    text = README.read_text()
    assert [name for name in re.findall(r"<!-- (\w+) -->", text) if name != "end"] == list(PARTS)
    assert up_to_date(text) == text, "write it anew: python -m tests.ir.readme"


def test_what_is_old_is_noticed() -> None:
    text = README.read_text()
    assert up_to_date(text.replace("`Tib`", "`Tub`")) == text


def test_its_example_is_a_program() -> None:
    (text,) = re.findall(r"^```\n(tfqc-ir 1\n.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    program = parse(text)
    verify(program)
    assert render(program) == text


def test_every_stage_has_a_line() -> None:
    section = README.read_text().partition("## Stages")[2].partition("##")[0]
    assert re.findall(r"^\| (\w+) \|", section, re.MULTILINE) == ["stage", *map(str, Stage)]
