"""`tfqc inspect`: what a program or an artifact holds."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tfqc.cli import options
from tfqc.cli.output import guarded, show

if TYPE_CHECKING:
    from tfqc.ir import Program


@guarded
def inspect(
    what: Annotated[
        Path,
        typer.Argument(metavar="PROGRAM_OR_ARTIFACT", help="A .ir file, or a directory; with --plan a model, too."),
    ],
    plan: Annotated[
        bool, typer.Option("--plan", help="Print what is quantized to what, to edit and give back.")
    ] = False,
    target: Annotated[str, typer.Option(help="With --plan: what is compiled for.")] = "fake-quant",
    strategy: Annotated[str, typer.Option(help="With --plan: how temporal features are kept.")] = "fold",
    pipeline: Annotated[str | None, typer.Option(help="With --plan: your own passes, text or a file.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Show what a program or an artifact holds; an artifact's files are checked against their hashes.

    With --plan it is the plan for quantization: that of a program, or what `tfqc compile` would plan for a model.
    """
    from tfqc.cli.subjects import is_artifact
    from tfqc.errors import TfqcError
    from tfqc.ir.store import load_program

    if plan:
        from tfqc.cli.planning import plan_of

        if is_artifact(str(what)):
            raise TfqcError(
                f"{what} is an artifact, whose plan has been carried out: give the model that it was compiled from."
            )
        text = plan_of(str(what), target, strategy, pipeline)
        return show({"plan": text}, text.rstrip("\n"), as_json)
    if what.is_dir() or is_artifact(str(what)):
        value = _artifact(what)
        return show(value, _printable(_artifact_text(value)), as_json)
    if not what.exists():
        raise TfqcError(f"There is no {what}: give a program (.ir) or an artifact's directory.")
    value = {"program": str(what), **_program(load_program(what))}
    return show(value, _printable(_program_text(value)), as_json)


def _program(program: Program) -> dict[str, Any]:
    from tfqc.ir.ops import op_name
    from tfqc.ir.rows import Maintenance, Tib
    from tfqc.report.disturbance import label

    maintenance = program.table(Maintenance)
    features = [name for name, row in program.table(Tib).items() if row.part == "feature"]
    return {
        "model": program.model,
        "stage": str(program.stage),
        "inputs": [{"name": ".".join(i.path), "role": str(i.role), "type": str(i.type)} for i in program.inputs],
        "functions": {
            name: dict(Counter(op_name(n.target) for n in graph.nodes if n.op == "call_function").most_common())
            for name, graph in program.functions.items()
        },
        "tables": {name: len(rows) for name, rows in sorted(program.tables.items())},
        "features": [
            {
                "name": name,
                "module": label(program, name),
                "type": str(program.types[name]),
                "maintenance": list(maintenance[name].strategy) if name in maintenance else None,
            }
            for name in features
        ],
        "has_weights": program.has_weights,
        "tensors": len(program.tensors),
        "bytes": sum(t.numel() * t.element_size() for t in program.tensors.values()),
        "quantized": _quantized(program),
    }


def _quantized(program: Program) -> dict[str, Any]:
    """Linears and convolutions by the bits of their weight and input as the graph has them now."""
    from tfqc.analysis.weighted import WEIGHTED, is_weighted
    from tfqc.ir.program import TIME
    from tfqc.ir.views import StoredWeight

    weights: Counter[str] = Counter()
    inputs: Counter[str] = Counter()
    float_weights: list[str] = []
    for function in (f for f in program.functions if f != TIME):
        for node in filter(is_weighted, program.nodes(function)):
            names = WEIGHTED[node.target]
            if stored := StoredWeight.of(node.kwargs[names.weight]):
                weights["4 bits or fewer, packed" if stored.is_int4 else "8 bits"] += 1
            else:
                weights["floating point"] += 1
                float_weights.append(program.at(node))
            inputs[_input_bits(node.kwargs[names.input])] += 1
    return {"weights": dict(weights), "inputs": dict(inputs), "float_weights": float_weights}


def _input_bits(value: Any) -> str:
    """Bits of the value that a quantized operation reads."""
    from tfqc.ir.views import Dequantize, Quantize, QuantizeDynamic

    if dynamic := QuantizeDynamic.of(value):
        return f"{dynamic.bits} bits, per token"
    if (known := Dequantize.of(value)) and (made := Quantize.of(known.codes)):
        return f"{(made.qmax - made.qmin + 1).bit_length() - 1} bits"
    return "floating point"


def _program_text(value: dict[str, Any]) -> str:
    from tfqc.report.tables import facts, size, table

    functions = {
        f"@{name}": f"{sum(ops.values())} operations: "
        + ", ".join(f"{count} {op.removesuffix('.default')}" for op, count in list(ops.items())[:6])
        + (", ..." if len(ops) > 6 else "")
        for name, ops in value["functions"].items()
    }
    blocks = [
        facts(
            {
                "model": value["model"],
                "stage": value["stage"],
                "tensors": f"{value['tensors']}, {size(value['bytes'])}"
                + ("" if value["has_weights"] else " (declared; without weights)"),
                "tables": ", ".join(f"{name} ({n})" for name, n in value["tables"].items()),
            }
        ),
        table(("input", "role", "type"), [(i["name"], i["role"], i["type"]) for i in value["inputs"]]),
        facts(functions),
    ]
    if value["features"]:
        rows = [
            (f["module"], f["name"], f["type"], " ".join(dict.fromkeys(f["maintenance"] or [])))
            for f in value["features"]
        ]
        blocks.append(table(("temporal feature", "node", "type", "maintenance"), rows))
    if value["stage"] == "lowered":
        blocks.append(_quantized_text(value["quantized"]))
    return "\n\n".join(blocks)


def _printable(text: str) -> str:
    """Without what would command a terminal: names in files of others may hold anything."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def _quantized_text(quantized: dict[str, Any]) -> str:
    from tfqc.report.tables import facts

    lines = facts(
        {
            "weights": ", ".join(f"{n} at {bits}" for bits, n in quantized["weights"].items()),
            "inputs": ", ".join(f"{n} at {bits}" for bits, n in quantized["inputs"].items()),
        }
    )
    left = [f"  {name}" for name in quantized["float_weights"]]
    return "\n".join([lines, *(["weights left in floating point:", *left] if left else [])])


def _artifact(directory: Path) -> dict[str, Any]:
    from tfqc.codegen.artifact import check_files
    from tfqc.ir.store import load_program

    manifest = check_files(directory)
    value: dict[str, Any] = {"artifact": str(directory), **manifest, "files_are_whole": True}
    program = load_program(directory / "program.ir")
    value["program"] = {k: v for k, v in _program(program).items() if k not in ("has_weights", "bytes")}
    return value


def _artifact_text(value: dict[str, Any]) -> str:
    from tfqc.report.tables import facts, size, table

    schedule: dict[str, Any] = value["schedule"] or {"timesteps": []}
    timesteps, sampler = schedule["timesteps"], schedule.get("sampler", {})
    calibration = value["calibration"]
    files = [(name, size(entry["bytes"])) for name, entry in value["files"].items()]
    files.append(("together", size(sum(entry["bytes"] for entry in value["files"].values()))))
    blocks = [
        facts(
            {
                "model": value["model"],
                "target": value["target"],
                "pipeline": value["pipeline"],
                "schedule": f"{len(timesteps)} steps from {timesteps[0]:g} to {timesteps[-1]:g}, "
                f"{sampler.get('_class_name') or sampler.get('_scheduler', 'no sampler')}"
                if timesteps
                else "",
                "calibration": f"{calibration['images']} images, seed {calibration['seed']}" if calibration else "",
                "versions": ", ".join(f"{name} {version}" for name, version in value["versions"].items()),
            }
        ),
        table(("file", "size"), files, right=(1,)),
        table(("input", "role", "type"), [(".".join(i["path"]), i["role"], i["type"]) for i in value["inputs"]]),
    ]
    blocks.append(_quantized_text(value["program"]["quantized"]))
    blocks.append("\n".join(value["report"]))
    blocks.append("All files have the hashes that the manifest says.")
    return "\n\n".join(blocks)
