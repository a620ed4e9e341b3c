"""`tfqc export --format`: weights of a model in the formats of other tools."""

from __future__ import annotations

from pathlib import Path

from tests.cli.conftest import Tfqc
from tests.cli.conftest import tfqc as command
from tfqc.integrations.formats.convrot import read_convrot

call_tfqc = command  # the fixture, in this module
DIT = "tests.cli.factories:dit"


def test_int8_weights(call_tfqc: Tfqc, tmp_path: Path) -> None:
    out = tmp_path / "dit.safetensors"
    done = call_tfqc(
        "export", DIT, "--format", "comfy-int8", "--group", 4, "--skip", "transformer_blocks.0", "--out", out
    )
    assert done.code == 0 and "linear layers of DiTTransformer2DModel in comfy-int8" in done.out
    assert "transformer_blocks.1.attn1.to_q.weight" in read_convrot(out)


def test_a_folder_of_four_bits(call_tfqc: Tfqc, tmp_path: Path) -> None:
    done = call_tfqc("export", DIT, "--format", "nunchaku-lite", "--out", tmp_path / "out")
    assert done.code == 1 and "DiTTransformer2DModel has no layer that kernels take" in done.err
    done = call_tfqc("export", tmp_path / "x.ir", "--format", "nunchaku-lite", "--out", tmp_path / "out", "--json")
    assert done.json["error"].startswith("nunchaku-lite is made of a model's own weights, and ")
