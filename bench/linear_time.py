"""How long a program of many operations takes to be read, verified and rewritten: in proportion to their number.

python bench/linear_time.py
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from cpu_models import ARCHITECTURES  # beside this file
from torch import fx

import tfqc
from tfqc.analysis.binding import binding_times
from tfqc.ir import Program, parse, render, verify
from tfqc.ir.edit import Rewriter, Rule, rewrite
from tfqc.ir.match import call, capture

RESULT = Path(__file__).parent / "results" / "linear-time.json"
aten = torch.ops.aten


def text(operations: int) -> str:
    """A chain of linear layers, of which each has a weight of its own, and of activations."""
    layers = operations // 2
    lines = ["tfqc-ir 1", 'model "chain"', "stage normalized", "symbols B=2"]
    lines += ['input %x sample ["x"]: Bx4xf32', 'input %t time ["t"]: Bxi64']
    lines += [f"tensor @layers.{i}.weight: 4x4xf32" for i in range(layers)]
    lines += ["", "func @step(%x: Bx4xf32, %t: Bxi64) {"]
    value = "x"
    for i in range(layers):
        lines.append(f"  %linear_{i}: Bx4xf32 = aten.linear.default(%{value}, @layers.{i}.weight)")
        lines.append(f'  %silu_{i}: Bx4xf32 = aten.silu.default(%linear_{i})   {{at="layers.{i}" src="chain.py:7"}}')
        value = f"silu_{i}"
    return "\n".join([*lines, f"  return %{value}", "}", ""])


def _swap(edit: Rewriter, node: fx.Node, x: fx.Node) -> None:
    """silu(x) as x * sigmoid(x): two nodes, two names, for one."""
    gate = edit.insert(node, aten.sigmoid.default, x)
    edit.replace(node, edit.insert(node, aten.mul.Tensor, x, gate))


def measured(source: str) -> dict[str, float]:
    """Seconds of the process for each thing that is done with a program's text."""
    row: dict[str, float] = {}

    def timed(what: str, work: Callable[[], Any]) -> Any:
        began = time.process_time()
        made = work()
        row[f"{what}_s"] = round(time.process_time() - began, 3)
        return made

    program: Program = timed("parse", lambda: parse(source))
    row = {"operations": sum(n.op == "call_function" for n in program.step.nodes), **row}
    timed("verify", lambda: verify(program))
    timed("render", lambda: render(program))
    timed("binding", lambda: binding_times(program))
    rules = [Rule(call(aten.silu.default, self=capture("x")), _swap)]
    timed("rewrite", lambda: rewrite(program, rules))
    timed("names", lambda: [program.node(n.name) for n in program.nodes()])
    return row


def sdxl() -> str:
    """SDXL's UNet, normalized; without weights."""
    architecture = ARCHITECTURES["sdxl"]
    with torch.device("meta"):
        model = diffusers.UNet2DConditionModel(**(architecture.config or {}))
        inputs = {
            "sample": torch.randn(2, 4, architecture.latent, architecture.latent),
            "timestep": torch.zeros(2, dtype=torch.int64),
            **architecture.request(2, torch.randn),
        }
    return render(tfqc.Pipeline.parse("normalize").run(tfqc.capture(model, inputs)))


def main() -> None:
    rows: list[dict[str, float]] = []
    measured(text(200))
    for source in (*map(text, (2_000, 5_000, 20_000)), sdxl()):
        rows.append(measured(source))
        print(*(f"{key} {value}" for key, value in rows[-1].items()), sep="   ")
    RESULT.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
