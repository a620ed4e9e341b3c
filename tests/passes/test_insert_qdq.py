"""insert-qdq: the integers are those of tfqc.quant.grid, shared where they can be, and what stays in float is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers import args_of, evaluate_nodes, find, first
from tests.passes.test_calibrate_activations import context
from tests.subjects import Subjects, assert_text_round_trip
from tfqc.calibration.trajectories import Trajectories
from tfqc.errors import PipelineError
from tfqc.ir.ops import op_name
from tfqc.ir.program import TIME
from tfqc.ir.render import render
from tfqc.ir.rows import Quantizer
from tfqc.passing.pipeline import Pipeline
from tfqc.quant.grid import Grid, dequantize, quantize
from tfqc.quant.parameters import stored_weight
from tfqc.runtime.packing import unpack_int4

CALIBRATED = "select-maintenance,calibrate-weights{{{w}}},calibrate-activations{{{a}}},fold-cache,hoist-request"


@pytest.mark.parametrize("mode", ["static", "per-step"])
@pytest.mark.parametrize("bits", [8, 4])
def test_activation_codes(bits: int, mode: str, subject: Subjects, tmp_path: Path) -> None:
    """Every quantize gives the codes that tfqc.quant.grid gives for the same value, at the row of each entry."""
    its = subject("unet2d")
    ctx = context(its, tmp_path)
    before = its.run(CALIBRATED.format(w="bits=8", a=f"bits={bits} mode={mode}"), ctx)
    program = its.run("insert-qdq", ctx, before.clone())
    assert ctx.schedule is not None
    nodes = find(program, "tfqc.quantize")
    values = [args_of(n)[0] for n in nodes]
    grid = Grid(bits, symmetric=False)
    for timesteps in ([750.0, 750.0], [500.0, 0.0]):
        call = its.call(timesteps)
        outputs = evaluate_nodes(program, [*values, *nodes, *[next(iter(n.users)) for n in nodes]], call)  # type: ignore[list-item]
        xs, codes, back = (outputs[i * len(nodes) : (i + 1) * len(nodes)] for i in range(3))
        rows = [list(ctx.schedule.timesteps).index(t) for t in timesteps]
        for node, x, q, d in zip(nodes, xs, codes, back, strict=True):
            scale, zero_point = (program.tensors[str(a.target)] for a in args_of(node)[1:3])  # type: ignore[union-attr]
            assert (scale.numel() > 1) == (mode == "per-step")
            if scale.numel() > 1:
                scale, zero_point = (p[rows].reshape(-1, *[1] * (x.dim() - 1)) for p in (scale, zero_point))
            assert q.dtype == torch.uint8
            assert torch.equal(q.int(), quantize(x, scale, zero_point, grid))
            assert torch.equal(d, dequantize(q, scale, zero_point))
    assert_text_round_trip(program, its.call([750.0, 0.0]))


@pytest.mark.parametrize("options", ["bits=8", "bits=4", "bits=4 group=5", "bits=2", "bits=3 symmetric=false",
                                     "bits=4 symmetric=false", "bits=8 symmetric=false", "bits=6"])  # fmt: skip
def test_weights(options: str, subject: Subjects) -> None:
    its = subject("unet-sd")
    before = its.run(f"select-maintenance,calibrate-weights{{{options}}},fold-cache,hoist-request")
    quantizers = before.table(Quantizer)
    program = its.run("insert-qdq", program=before.clone())
    stored = {n.name: n for f in program.functions for n in program.nodes(f) if "dequantize_weight" in str(n.target)}
    assert set(stored) == {f"{n}_weight" for n in quantizers}
    narrow = int(options[5]) <= 4
    for name, row in quantizers.items():
        node = stored[f"{name}_weight"]
        args = [program.tensors[str(a.target)] if hasattr(a, "target") else a for a in args_of(node)]
        assert torch.equal(node.target(*args), stored_weight(before, row))  # type: ignore[operator]
        codes = before.tensors[row.codes]
        assert (args[0].dtype == torch.uint8) == narrow
        if narrow:
            assert args[0].numel() == (codes.numel() + 1) // 2
            assert torch.equal(unpack_int4(args[0], codes.shape), codes)
            assert row.codes not in program.tensors
    plain = {str(n.target) for n in its.program.step.nodes if n.op == "get_attr" and ".weight" in str(n.target)}
    left = {t for t in plain if t in program.tensors and program.tensors[t].dim() > 1 and "time_emb" not in t}
    assert not left  # nothing is stored twice
    assert_text_round_trip(program, its.call([951.0, 37.0]))


def test_one_quantize_for_q_k_and_v(subject: Subjects, tmp_path: Path) -> None:
    its = subject("unet-sd")
    program = its.run(CALIBRATED.format(w="bits=8", a="bits=8") + ",insert-qdq", context(its, tmp_path))
    nodes = find(program, "tfqc.dequantize.default")
    readers = [sorted(program.origins[u.name].module.rpartition(".")[2] for u in n.users) for n in nodes]
    assert readers.count(["to_k", "to_q", "to_v"]) == 4  # attn1 of each transformer block
    begin = [n for n in program.nodes("begin") if "tfqc.quantize." in str(n.target)]
    assert len(begin) == 1 and len(list(next(iter(begin[0].users)).users)) == 8  # keys and values of the text
    quantized = find(program, "tfqc.quantize.default")
    assert len({args_of(n)[0] for n in quantized}) == len(quantized)


def test_per_token(subject: Subjects, tmp_path: Path) -> None:
    its = subject("unet-sd")
    program = its.run(CALIBRATED.format(w="bits=8", a="mode=per-token") + ",insert-qdq", context(its, tmp_path))
    linears = [n for f in ("step", "begin") for n in program.nodes(f) if "aten.linear" in str(n.target)]
    assert linears
    assert all(op_name(args_of(n)[0].target) == "tfqc.quantize_dynamic.default" for n in linears)  # type: ignore[union-attr]
    assert all(op_name(args_of(n)[0].target) == "tfqc.dequantize.default" for n in find(program, "conv2d"))  # type: ignore[union-attr]
    x = torch.randn(2, 3, 8)
    got = torch.ops.tfqc.quantize_dynamic(x, 8)
    for i in range(2):  # each token by itself
        for j in range(3):
            assert torch.equal(torch.ops.tfqc.quantize_dynamic(x[i, j][None], 8)[0], got[i, j])
    assert float((got - x).abs().max()) <= float((x.amax(-1) - x.amin(-1)).max()) / 255 / 2 * 1.001


def test_time_stays_in_full_precision(subject: Subjects, tmp_path: Path) -> None:
    for name in ("unet2d", "dit"):
        its = subject(name)
        program = its.run(CALIBRATED.format(w="bits=4", a="bits=4") + ",insert-qdq", context(its, tmp_path))
        assert not any("tfqc." in str(n.target) for n in program.nodes(TIME))
        assert find(program, "tfqc.quantize")


def test_what_is_left_is_named(subject: Subjects) -> None:
    its = subject("unet-sd")
    ctx = its.context()
    its.run("select-maintenance,calibrate-weights{skip=conv_in,conv_out},fold-cache,insert-qdq", ctx)
    (line,) = [r for r in ctx.report if r.startswith("left in floating point")]
    assert "2 conv2d" in line
    assert "scaled_dot_product_attention" in line and "group_norm" in line and "layer_norm" in line


def test_without_quantizers_unchanged(subject: Subjects) -> None:
    its = subject("unet2d")
    program = its.run("select-maintenance,fold-cache")
    program.set_table(Quantizer, {})
    text = render(program)
    its.run("insert-qdq", program=program)
    assert render(program) == text.replace("stage folded", "stage lowered").replace("\n\ntable quantizer\n", "\n")


def test_refused(subject: Subjects) -> None:
    its = subject("unet2d")
    with pytest.raises(PipelineError, match=r"needs stage folded"):
        its.run("insert-qdq")
    with pytest.raises(PipelineError, match=r"needs the table 'quantizer'"):
        its.run("select-maintenance,fold-cache,insert-qdq")


def test_close_to_the_model_at_eight_bits(subject: Subjects, tmp_path: Path) -> None:
    for name in ("unet2d-scale-shift", "unet-sd"):
        its = subject(name)
        ctx = context(its, tmp_path)
        program = its.run(CALIBRATED.format(w="bits=8", a="bits=8 mode=per-step") + ",insert-qdq", ctx)
        batch = next(iter(Trajectories(its.program, ctx)))
        for _, call in batch.calls(its.program):
            want, got = its.reference(call), first(program(**call))
            assert 0 < float((want - got).norm() / want.norm()) < 0.05, name


def test_meta(subject: Subjects) -> None:
    its = subject("unet2d")
    text = "select-maintenance,calibrate-weights{bits=4},fold-cache,insert-qdq"
    program = its.program
    program.tensors = {name: t.to("meta") for name, t in program.tensors.items()}
    Pipeline.parse(text).run(program, its.context())
    assert render(program) == render(its.run(text))
