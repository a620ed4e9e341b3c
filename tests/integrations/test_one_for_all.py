"""One row for several images, repeated by the same view for as long as the row is the same."""

from __future__ import annotations

from pathlib import Path

import torch

import tfqc
from tests.adapters.model import compiled, inputs, made
from tfqc.integrations.diffusers.one_for_all import OneForAll


def test_a_view_is_that_of_the_values_that_the_row_has_now(tmp_path: Path) -> None:
    model = tfqc.load(compiled(made(), "fake-quant", tmp_path / "artifact"))
    spreads = OneForAll(model.plan)
    sample, time, row = (value[:1] for value in inputs().values())
    sample = sample.expand(3, -1, -1, -1)

    def view() -> torch.Tensor:
        _, call = spreads.spread((sample, time), {"encoder_hidden_states": row})
        assert torch.equal(call["encoder_hidden_states"], row.expand(3, -1, -1))
        return call["encoder_hidden_states"]

    first = view()
    assert view() is first
    row.mul_(2)
    assert view() is first
    row.data = torch.ones_like(row)
    assert view() is not first
