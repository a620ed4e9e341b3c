"""The option skip: module paths component by component, the same for every pass that has it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor, nn

from tests.lowered import context, example
from tests.subjects import Subject, of_example
from tfqc.analysis.skipping import skipped
from tfqc.errors import PassError
from tfqc.ir.program import Origin, Program
from tfqc.ir.rows import Quantizer


class Blocks(nn.Module):
    """Eleven blocks, so that `blocks.1` is a part of the text of `blocks.10`."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(1, 4)
        self.blocks = nn.ModuleList(nn.ModuleDict({"attn": nn.Linear(4, 4), "ff": nn.Linear(4, 4)}) for _ in range(11))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = x + self.time(time.float()[:, None] / 1000)[:, None]
        for block in self.blocks:
            h = block["ff"](block["attn"](h))  # type: ignore[index]
        return h


def blocks() -> Subject:
    return of_example("blocks", example(Blocks, 3, 4))


def modules(program: Program, quantized: Callable[[Quantizer], object]) -> set[str]:
    return {program.origins[name].module for name, row in program.table(Quantizer).items() if quantized(row)}


ALL = {f"blocks.{n}.{part}" for n in range(11) for part in ("attn", "ff")}
PATTERNS = {
    "blocks.1": {"blocks.1.attn", "blocks.1.ff"},
    "blocks.1.ff": {"blocks.1.ff"},
    "blocks.*.attn": {m for m in ALL if m.endswith("attn")},
    "blocks.1?": {"blocks.10.attn", "blocks.10.ff"},
    "blocks": ALL,
    "blocks.0,blocks.10.ff": {"blocks.0.attn", "blocks.0.ff", "blocks.10.ff"},
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("item", ["calibrate-weights", "reconstruct-weights", "calibrate-activations"])
def test_every_pass_leaves_the_same(item: str, pattern: str, tmp_path: Path) -> None:
    its = blocks()
    program = its.run(f"select-maintenance,{item}{{skip={pattern}}}", context(its, tmp_path))
    done = modules(program, lambda row: row.input_bits if item == "calibrate-activations" else row.codes)
    assert done == ALL - PATTERNS[pattern]


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("blocks.11", r"Near it: blocks\.1"),
        ("block.3", r"Near it: .*blocks\.3"),
        ("blocks.*.attention", r"of Blocks lies there"),
        ("zzz", r"Modules: blocks, time\."),
        ("locks", r"Near it: blocks"),
    ],
)
@pytest.mark.parametrize("item", ["calibrate-weights", "reconstruct-weights", "calibrate-activations"])
def test_a_pattern_that_names_nothing(item: str, pattern: str, near: str, tmp_path: Path) -> None:
    its = blocks()
    with pytest.raises(PassError, match=f"skip={pattern.replace('*', '.*')}: no linear or convolution.*{near}"):
        its.run(f"select-maintenance,{item}{{skip={pattern}}}", context(its, tmp_path))


def test_nodes_without_an_origin(tmp_path: Path) -> None:
    """Nodes that passes made, or that stood in no module, are in no module that could be skipped."""
    its = blocks()
    program = its.program
    nameless = next(n for n, origin in program.origins.items() if origin.module == "blocks.3.ff")
    del program.origins[nameless]
    other = next(n for n, origin in program.origins.items() if origin.module == "blocks.3.attn")
    program.origins[other] = Origin()
    assert not {n.name for n in skipped(program, ("blocks",))} & {nameless, other}
    for item in ("calibrate-weights", "calibrate-activations"):
        result = its.run(f"select-maintenance,{item}{{skip=blocks}}", context(its, tmp_path), program.clone())
        assert set(result.table(Quantizer)) == {nameless, other}
