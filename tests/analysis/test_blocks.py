"""Blocks are whole, in order, and compute together what the program computes."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from tests.subjects import Subjects
from tfqc.analysis.blocks import MOST, blocks_of, given_of
from tfqc.analysis.weighted import weighted_nodes
from tfqc.calibration.simulate import Simulation
from tfqc.ir.match import returned_by
from tfqc.ir.rows import Tib


@pytest.mark.parametrize("name", ["unet-sd", "unet-sdxl", "dit-labels", "sd3", "chain"])
def test_one_after_another_they_are_the_network(name: str, subject: Subjects) -> None:
    its = subject(name)
    program = its.discovered
    given, blocks = given_of(program), blocks_of(program)
    call = its.call([951.0, 37.0])
    values: dict[str, Any] = {
        item.name: functools.reduce(lambda at, key: at[key], item.path, call) for item in program.inputs
    }
    with torch.no_grad():
        for block in (given, *blocks):
            assert set(block.reads) <= set(values), "what a block reads was there before"
            run = Simulation(program, block.graph)
            values |= dict(zip(block.gives, run.call(values), strict=True))
        outputs = returned_by(program.step)
        first = outputs[0] if isinstance(outputs, (tuple, list)) else outputs
        assert torch.allclose(values[first.name], its.reference(call), atol=1e-5)
    layers = [layer for block in blocks for layer in block.layers]
    assert layers == [n.name for n in weighted_nodes(program) if n.name not in {m.name for m in given.graph.nodes}]
    assert not set(layers) & {name for name in program.table(Tib)}
    assert all(len(block.layers) <= MOST for block in blocks)


def test_a_block_is_a_part_of_the_model(subject: Subjects) -> None:
    blocks = blocks_of(subject("unet-sd").discovered)
    modules = [block.module for block in blocks]
    assert modules[0] == "conv_in" and modules[-1] == "conv_out" and any(m.startswith("mid_block") for m in modules)
    assert all(block.layers for block in blocks)
