"""`tfqc gpu-check`: whether a GPU computes what it should, and how fast."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from tfqc.cli import options
from tfqc.cli.output import guarded, show

BACKEND = "cuda-int4"
_SHOWN = 16  # layers, those that take longest


@guarded
def check(
    artifact: Annotated[Path | None, typer.Argument(help="Time the kernels and a step of this, not SDXL's.")] = None,
    out: Annotated[Path, typer.Option(help="JSON with all that was measured.")] = Path("gpu-check.json"),
    as_json: options.AsJson = False,
) -> None:
    """Replay stored test vectors on the GPU, and time kernels against fp16; without a GPU, say so."""
    from tfqc.cli.progress import StderrProgress
    from tfqc.codegen.known import find_backend
    from tfqc.files.storage import write_text

    with StderrProgress() as progress:
        report = find_backend(BACKEND)().check(artifact, progress)
    if not report["measured"]:
        return show(report, report["because"], as_json)
    show(report, _text(report, out), as_json)  # first: it is there even if nothing can be written
    write_text(out, json.dumps(report, indent=1) + "\n")  # whole: what was measured before is not lost
    if not report["passed"]:
        raise typer.Exit(1)


def _text(report: dict[str, Any], out: Path) -> str:
    from tfqc.report.tables import facts, size

    (chip,) = report["chips"]
    device = {
        "device": f"{chip['name']}, {chip['arch']}",
        "multiprocessors": f"{chip['sms']} at {chip['ghz']:.2f} GHz",
        "memory": size(chip["memory"]),
        "driver": f"CUDA {chip['driver']}",
    }
    blocks = [facts(device), _vectors(report["vectors"]), *map(_case, report["cases"]), *report["notes"]]
    return "\n\n".join([*blocks, f"all numbers: {out}"])


def _vectors(vectors: list[dict[str, Any]]) -> str:
    from tfqc.report.tables import table

    wrong = [vector for vector in vectors if not vector["passed"]]
    if not wrong:
        return f"All {len(vectors)} stored vectors agree."
    rows = [(v["kernel"], v["differing"], v["of"], v["most"], v["steps"]) for v in wrong]
    title = f"{len(wrong)} of {len(vectors)} stored vectors do NOT agree:"
    return f"{title}\n{table(('kernel', 'differ', 'of', 'by', 'allowed'), rows, right=(1, 2, 3, 4))}"


def _case(case: dict[str, Any]) -> str:
    from tfqc.report.tables import seconds, table

    compared = "gemm_ratio" in case
    layers = sorted(case["layers"], key=lambda layer: -layer["count"] * layer["us"])
    head = ("layer", "count", "µs", "fp16 µs", "× fp16")[: None if compared else 3]
    rows = [(line["layer"], line["count"], *_numbers(line)) for line in [*layers[:_SHOWN], *case["quantize"]]]
    whole = {"us": case["gemm_us"], "fp16_us": case.get("gemm_fp16_us"), "ratio": case.get("gemm_ratio")}
    rows.append((f"all {len(layers)} products", sum(layer["count"] for layer in layers), *_numbers(whole)))
    lines = [f"{case['model']}, {case['mode']}, batch {case['batch']}, measured"]
    lines.append(table(head, [row[: len(head)] for row in rows], right=range(1, len(head))))
    if "step_us" in case:
        lines.append(f"a whole step: {seconds(case['step_us'] / 1e6)}")
    return "\n".join(lines)


def _numbers(line: dict[str, Any]) -> tuple[str, ...]:
    """Times in microseconds and their ratio, as far as they are known: quantize kernels have no peer in fp16."""
    wanted = (("us", ".1f"), ("fp16_us", ".1f"), ("ratio", ".2f"))
    return tuple("" if line.get(name) is None else format(line[name], how) for name, how in wanted)
