"""Remarks are data: who said what of which node, in which numbers; sentences come from one table."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tfqc
from tests.tiny import INPUTS, Tiny, make_pass, tiny
from tfqc.codegen.artifact import read_manifest
from tfqc.errors import PassError
from tfqc.instruments import DumpIR, VerifyEach
from tfqc.ir.program import Program
from tfqc.passing import Context
from tfqc.passing.pipeline import Pipeline
from tfqc.passing.remarks import Remark, remark_kind, remark_kinds

ROOT = Path(__file__).parents[2]

# kind: numbers and the sentence, of one and of several
SENTENCES: dict[str, tuple[tuple[dict[str, Any], str], ...]] = {
    "random-conditions": (({}, "calibrated on random conditions: give your own for quality that counts"),),
    "fixed-argument": (
        (
            {"argument": "flip", "value": "True"},
            "flip is True, as in the example inputs: a call that leaves it out gets that, too",
        ),
    ),
    "times-not-recorded": (
        (
            {"pipeline": "FluxPipeline", "why": "no VAE"},
            "what FluxPipeline calls its model with could not be recorded (no VAE): taken for the times of its "
            "scheduler; give schedule=SamplingSchedule.of(scheduler, steps, times=...) where they are others",
        ),
    ),
    "instruction": (({"mode": "w4a4", "arch": "sm_86", "instruction": "mma"}, "w4a4 on sm_86: mma"),),
    "another-way": (({"at": "%a (m)", "because": "runs in torch"}, "%a (m): runs in torch"),),
    "another-way-each": (
        ({"count": 2, "operation": "aten.div", "places": "a, b", "because": "why"}, "2 x aten.div (a, b): why"),
    ),
    "float-product": (
        (
            {"at": "%a", "operation": "aten.bmm", "does": "multiplies by", "weight": "w", "why": "it has experts"},
            "%a: aten.bmm multiplies by @w in floating point: it has experts",
        ),
    ),
    "features": (
        (
            {"features": 1, "compile_time": 1, "per_request": 0},
            "1 temporal feature: 1 known at compile time, 0 per request",
        ),
        (
            {"features": 3, "compile_time": 1, "per_request": 2},
            "3 temporal features: 1 known at compile time, 2 per request",
        ),
    ),
    "timeless": (
        ({"model": "Net"}, "Net is told no time that is one number for each image: it has no temporal features"),
    ),
    "step-inputs": (
        (
            {"names": "times, sigma"},
            "what depends on times, sigma is computed at each step: no table can have rows for it",
        ),
    ),
    "maintenance": (
        ({"fold": 1}, "maintenance: fold for 1 feature"),
        ({"fold": 20, "cache8": 1}, "maintenance: cache8 for 1 feature, fold for 20 features"),
    ),
    "split-off": (
        ({"rank": 16, "linears": 1}, "split off rank 16: 1 linear"),
        ({"rank": 16, "linears": 8}, "split off rank 16: 8 linears"),
    ),
    "concat-split": (
        ({"count": 1}, "split into parts by concatenated values: 1 linear or convolution"),
        ({"count": 6}, "split into parts by concatenated values: 6 linears and convolutions"),
    ),
    "reconstructed": (
        (
            {"nearest": 1.23456789, "reconstructed": 0.5},
            "TIAR: loss 1.235 with nearest rounding, 0.5 reconstructed",
        ),
    ),
    "reconstructed-blocks": (
        (
            {"blocks": 17, "better": 16, "before": 0.1234, "after": 0.0567},
            "BRECQ: 16 of 17 blocks better; error of a block 0.123 before, 0.0567 after",
        ),
        (
            {"blocks": 1, "better": 0, "before": 0.1, "after": 0.1},
            "BRECQ: 0 of 1 block better; error of a block 0.1 before, 0.1 after",
        ),
    ),
    "time-scales": (
        (
            {"inputs": 1, "learned": 0.01234, "single": 0.02, "each": 0.0123},
            "learned steps of 1 input as functions of time: error in outputs 0.0123, 0.02 with the best single step of "
            "each, 0.0123 with the best for each time",
        ),
        (
            {"inputs": 92, "learned": 0.0129, "single": 0.0167, "each": 0.0128},
            "learned steps of 92 inputs as functions of time: error in outputs 0.0129, 0.0167 with the best single "
            "step of each, 0.0128 with the best for each time",
        ),
    ),
    "observed": (
        (
            {"values": 1, "steps": 1, "images": 1, "mebibytes": 0.6},
            "observed 1 value over 1 step of 1 image in one run, at most 1 MiB of activations and statistics",
        ),
        (
            {"values": 73, "steps": 50, "images": 16, "mebibytes": 210.2},
            "observed 73 values over 50 steps of 16 images in one run, at most 210 MiB of activations and statistics",
        ),
    ),
    "not-reconstructed": (
        (
            {"nearest": 1.0, "reconstructed": 2e-9},
            "TIAR: loss 1 with nearest rounding, 2e-09 reconstructed; nearest rounding kept",
        ),
    ),
    "folded": (
        ({"before": 1, "after": 1}, "fold: 1 operation a step became 1"),
        ({"before": 322, "after": 273}, "fold: 322 operations a step became 273"),
    ),
    "hoisted": (
        ({"operations": 1, "values": 1}, "hoist: 1 operation runs once per image, giving 1 value"),
        ({"operations": 25, "values": 8}, "hoist: 25 operations run once per image, giving 8 values"),
    ),
    "left-in-float": (({"group_norm": 21, "bmm": 1}, "left in floating point: 1 bmm, 21 group_norm"),),
    "protected-steps": (
        (
            {"count": 1, "protected": 6, "steps": 50},
            "protected steps: 1 input stays in floating point at 6 of 50 steps; at the others values are rounded, and "
            "multiplied in floating point, too: no kernel takes both",
        ),
    ),
    "lowered": (
        ({"to": "int8", "count": 1}, "lowered to int8: 1 linear or convolution"),
        ({"to": "tensor cores", "count": 12}, "lowered to tensor cores: 12 linears and convolutions"),
    ),
    "low-rank-fused": (({"count": 1}, "branches of low rank in products: 1"),),
    "fused": (
        ({"count": 1}, "fused into products: 1 activation, gate or addition"),
        ({"count": 2}, "fused into products: 2 activations, gates and additions"),
    ),
    "quantized-at-source": (
        ({"fused": 0, "values": 1}, "quantized where it is computed: 0 of 1 value"),
        ({"fused": 50, "values": 57}, "quantized where it is computed: 50 of 57 values"),
    ),
    "stored": (
        ({"form": "bf16", "count": 1}, "stored in bf16: 1 value"),
        ({"form": "bf16", "count": 56}, "stored in bf16: 56 values"),
    ),
    "memory": (
        ({"values": 9, "shared": 1}, "memory: 9 values, 1 of them in place of what it adds to"),
        ({"values": 120, "shared": 17}, "memory: 120 values, 17 of them in place of what they add to"),
    ),
}
EXAMPLES = [(kind, *case) for kind, cases in SENTENCES.items() for case in cases]


@pytest.mark.parametrize(("kind", "numbers", "sentence"), EXAMPLES)
def test_sentences(kind: str, numbers: dict[str, Any], sentence: str) -> None:
    assert str(Remark("any", kind, "", numbers)) == sentence


@pytest.mark.parametrize(("kind", "numbers", "sentence"), EXAMPLES)
def test_json_loses_nothing(kind: str, numbers: dict[str, Any], sentence: str) -> None:
    said = Remark("a-pass", kind, "conv2d_1", numbers, 7)
    text = json.dumps(said.to_json(), sort_keys=True, allow_nan=False)
    read = Remark.from_json(json.loads(text))
    assert read == said and str(read) == sentence


def test_losses_that_are_no_numbers_are_written_as_words() -> None:
    said = Remark("reconstruct-tib", "not-reconstructed", "", {"nearest": 1.0, "reconstructed": float("nan")})
    read = Remark.from_json(json.loads(json.dumps(said.to_json(), allow_nan=False)))
    assert str(read) == str(said) and "nan reconstructed" in str(read)


def calls(file: Path) -> Iterator[str]:
    """Kinds that a file gives to `ctx.remark` and to `Remark`."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call):
            at = {"ctx.remark": 0, "Remark": 1}.get(ast.unparse(node.func))
            if at is not None:
                yield from (
                    n.value for n in ast.walk(node.args[at]) if isinstance(n, ast.Constant) and isinstance(n.value, str)
                )


def test_every_kind_is_said_and_everything_said_is_known() -> None:
    files = [f for folder in ("tfqc", "passes", "backends") for f in (ROOT / folder).rglob("*.py")]
    said = {kind for file in files for kind in calls(file)}
    assert said == set(SENTENCES)
    assert set(SENTENCES) <= set(remark_kinds())


# -- what passes say ------------------------------------------------------------------------------------------------


def test_the_pipeline_knows_who_speaks() -> None:
    def speak(program: Program, ctx: Context) -> None:
        ctx.remark("fused", "silu", count=1)

    quiet, loud = make_pass("quiet"), make_pass("loud", speak)
    ctx = Context()
    Pipeline((quiet, loud, quiet, loud)).run(tiny(), ctx)
    assert ctx.remarks == [Remark("loud", "fused", "silu", {"count": 1}, number) for number in (2, 4)]
    assert ctx.report == ("fused into products: 1 activation, gate or addition",) * 2
    ctx.remark("random-conditions")
    assert ctx.remarks[-1] == Remark("", "random-conditions")


def test_a_pass_that_fails_speaks_no_longer() -> None:
    def fail(program: Program, ctx: Context) -> None:
        raise PassError("No.")

    ctx = Context()
    with pytest.raises(PassError):
        Pipeline((make_pass("fails", fail),)).run(tiny(), ctx)
    assert (ctx.pass_name, ctx.pass_number) == ("", 0)


@pytest.mark.parametrize(
    ("kind", "numbers", "why"),
    [
        ("fusd", {"count": 1}, "There is no kind of remark 'fusd'. Did you mean 'fused'?"),
        ("fused", {"number": 1}, "A remark 'fused' with number does not fit 'fused into products: {count}"),
        ("stored", {"form": "bf16"}, "A remark 'stored' with form does not fit"),
    ],
)
def test_what_has_no_sentence_is_refused_where_it_is_said(kind: str, numbers: dict[str, Any], why: str) -> None:
    ctx = Context()
    with pytest.raises(PassError, match=re.escape(why)):
        ctx.remark(kind, **numbers)
    assert ctx.remarks == []


def test_kinds_of_plugins() -> None:
    kind = remark_kind("test-found", "{count} {count:|thing|things} found")
    assert remark_kind("test-found", "{count} {count:|thing|things} found") == kind  # imported twice
    ctx = Context()
    ctx.remark(kind, count=1)
    ctx.remark(kind, count=0)
    assert ctx.report == ("1 thing found", "0 things found")
    with pytest.raises(PassError, match=r"'test-found' is known as '.* found': take another name"):
        remark_kind("test-found", "{count}")


# -- where they go --------------------------------------------------------------------------------------------------


def test_a_whole_compile(tmp_path: Path) -> None:
    """The manifest has what the report says, from the backend's first words to what runs in torch; so has the dump."""
    artifact = tfqc.compile(
        Tiny().requires_grad_(False), "cpu-int8", schedule=[421.0, 7.0], example_inputs=INPUTS,
        pipeline="normalize,discover-tib,select-maintenance{strategy=table},calibrate-weights,fold-cache,insert-qdq",
        instruments=[VerifyEach(), DumpIR(tmp_path / "ir")],
    )  # fmt: skip
    manifest = read_manifest(artifact.save(tmp_path / "out"))
    remarks = [Remark.from_json(value) for value in manifest["remarks"]]
    assert list(map(str, remarks)) == manifest["report"]
    said = {remark.kind: remark for remark in remarks}
    assert said["features"] == Remark(
        "discover-tib", "features", "", {"features": 1, "compile_time": 1, "per_request": 0}, 2
    )
    assert said["maintenance"].numbers == {"table": 1}
    others = [r for r in remarks if r.kind.startswith("another-way")]
    assert others and {(r.pass_name, r.number) for r in others} == {("cpu-int8", 0)}
    assert all(r.node and "runs in torch" in str(r) for r in others)
    assert json.loads((tmp_path / "ir" / "remarks.json").read_text()) == manifest["remarks"]


@pytest.mark.parametrize("backend", ["fake-quant", "cpu-int8", "cuda-int4"])
def test_manifests_from_before_there_were_remarks(backend: str) -> None:
    directory = ROOT / "tests" / "artifacts" / "v1" / backend
    assert "remarks" not in json.loads((directory / "manifest.json").read_text())
    manifest = read_manifest(directory)
    assert manifest["remarks"] == [] and manifest["report"]
