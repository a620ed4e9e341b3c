"""The plan for quantization: printed, edited, given back, and refused at the door where it is wrong."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

import tfqc as library
from tests.cli.conftest import FEW, TINY, UNET, Tfqc
from tests.cli.factories import tiny
from tfqc.ir.store import load_program, save_program
from tfqc.models.find import find_model
from tfqc.quant.plan_text import read_plan


@pytest.fixture(scope="module")
def printed(tfqc: Tfqc) -> str:
    """The plan of a small UNet with weights of 4 bits."""
    done = tfqc("inspect", UNET, "--plan", "--target", "fake-quant{weights=4}")
    assert done.code == 0, done.err
    return done.out


def test_what_is_printed_is_given_back(printed: str, tfqc: Tfqc, tmp_path: Path) -> None:
    assert {line.key for line in read_plan(printed)} > {"conv_in", "conv_out"}
    program, file = tmp_path / "unet.ir", tmp_path / "unet.plan"
    edited = printed.replace("conv_in ", "conv_in input -> float #", 1)
    file.write_text(edited)
    spec = find_model(UNET)
    save_program(library.capture(spec.model, spec.example_inputs, name=spec.name), program)
    passes = "normalize,discover-tib,plan-quantization{activations=none}"
    done = tfqc("opt", program, "-p", passes, "--plan", file, "-o", tmp_path / "planned.ir")
    assert done.code == 0, done.err
    again = tfqc("inspect", tmp_path / "planned.ir", "--plan")
    planned = {line.key: line.operands for line in read_plan(again.out)}
    wanted = {line.key: line.operands for line in read_plan(printed)}
    conv_in = planned.pop("conv_in")
    assert {operand: str(spec) for operand, (spec,) in conv_in.items()} == {
        "input": "float{by=plan-quantization}",
        "weight": "int8{per=channel by=plan-quantization}",
    }
    wanted.pop("conv_in")
    assert planned == wanted
    assert load_program(tmp_path / "planned.ir").tables["plan"]


def test_compile_does_what_it_says(tfqc: Tfqc, tmp_path: Path) -> None:
    file = tmp_path / "plan"
    file.write_text('conv_out weight -> float input -> float{why="it is the last"}\n')
    for arguments, left in (((), 0), (("--plan", file), 1)):
        done = tfqc("compile", TINY, *FEW, *arguments, "--out", tmp_path / "out", "--json")
        assert done.code == 0, done.err
        shown = tfqc("inspect", tmp_path / "out", "--json").json["program"]["quantized"]
        assert len(shown["float_weights"]) == left
    refused = tfqc("inspect", tmp_path / "out", "--plan")
    assert refused.code == 1 and "is an artifact, whose plan has been carried out" in refused.err


def test_it_is_json_too(tfqc: Tfqc) -> None:
    done = tfqc("inspect", TINY, "--plan", "--json")
    assert done.json["plan"].startswith("# What is quantized of tiny")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("conv_in weight -> int9", "Line 1 of the plan: There is no format 'int9'. Did you mean 'int8'?"),
        ("conv_in weight > int8", "Line 1 of the plan: Expected '->' after 'weight'"),
        ("\nconv_inn weight -> int8{per=channel}", "Line 2 of the plan: tiny has no linear or convolution conv_inn"),
        ("conv_out weight -> fp4-e2m1{per=channel}", "passes quantize to integers"),
        ("# nothing", "The plan has no line"),
    ],
)
def test_a_wrong_plan_is_refused_before_anything_is_sampled(text: str, said: str, tfqc: Tfqc, tmp_path: Path) -> None:
    file = tmp_path / "plan"
    file.write_text(text)
    done = tfqc("compile", TINY, *FEW, "--plan", file, "--out", tmp_path / "out")
    assert done.code == 1
    assert said in " ".join(done.err.split())
    assert "sampling" not in done.err
    assert not (tmp_path / "out").exists()


def test_a_reproducer_has_the_plan(tfqc: Tfqc, tmp_path: Path) -> None:
    program, file = tmp_path / "tiny.ir", tmp_path / "tiny.plan"
    spec = tiny()
    save_program(library.capture(spec.model, spec.example_inputs, name="tiny"), program)
    file.write_text("nowhere weight -> float")
    given = ("opt", program, "-p", "normalize,discover-tib,plan-quantization", "--plan", file)
    failed = tfqc(*given, "-o", tmp_path / "out.ir")
    assert "Line 1 of the plan" in failed.err
    (command,) = (tmp_path / "out.ir.reproducer" / "command.txt").read_text().splitlines()
    again = tfqc(*shlex.split(command)[1:])
    assert "Line 1 of the plan: tiny has no linear or convolution nowhere" in " ".join(again.err.split())


def test_a_pipeline_without_a_plan(tfqc: Tfqc, tmp_path: Path) -> None:
    file = tmp_path / "plan"
    file.write_text("conv_in weight -> float")
    passes = "normalize,discover-tib,select-maintenance,fold-cache"
    done = tfqc("compile", TINY, *FEW, "--pipeline", passes, "--plan", file, "--out", tmp_path / "out")
    assert "No pass of the pipeline reads a plan: put plan-quantization" in " ".join(done.err.split())
    done = tfqc("inspect", TINY, "--plan", "--pipeline", passes)
    assert "The pipeline has no plan-quantization" in done.err
    done = tfqc("compile", TINY, *FEW, "--plan", tmp_path / "none", "--out", tmp_path / "out")
    assert "cannot be read" in " ".join(done.err.split())


def test_the_library_takes_text_or_a_path() -> None:
    with pytest.raises(library.TfqcError, match=r"plan=7 is no plan"):
        library.compile(tiny(), plan=7)  # type: ignore[arg-type]
    with pytest.raises(library.TfqcError, match=r"Line 1 of the plan: Expected"):
        library.compile(tiny(), plan="nonsense")
