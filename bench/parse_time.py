"""How long IR text of many operations takes to be read and verified: in proportion to their number.

python bench/parse_time.py
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from tfqc.ir import parse, verify

RESULT = Path(__file__).parent / "results" / "parse-time.json"


def text(operations: int) -> str:
    """A chain of linear layers, of which each has a weight of its own, and of activations."""
    layers = operations // 2
    lines = ["tfqc-ir 1", 'model "chain"', "stage captured", "symbols B=2"]
    lines += ['input %x sample ["x"]: Bx4xf32', 'input %t time ["t"]: Bxi64']
    lines += [f"tensor @layers.{i}.weight: 4x4xf32" for i in range(layers)]
    lines += ["", "func @step(%x: Bx4xf32, %t: Bxi64) {"]
    value = "x"
    for i in range(layers):
        lines.append(f"  %linear_{i}: Bx4xf32 = aten.linear.default(%{value}, @layers.{i}.weight)")
        lines.append(f'  %silu_{i}: Bx4xf32 = aten.silu.default(%linear_{i})   {{at="layers.{i}" src="chain.py:7"}}')
        value = f"silu_{i}"
    return "\n".join([*lines, f"  return %{value}", "}", ""])


def main() -> None:
    rows: list[dict[str, float]] = []
    for operations in (2_000, 5_000, 20_000):
        source = text(operations)
        began = time.process_time()
        program = parse(source)
        read = time.process_time()
        verify(program)
        done = time.process_time()
        rows.append({"operations": operations, "parse_s": round(read - began, 3), "verify_s": round(done - read, 3)})
        print(*(f"{key} {value}" for key, value in rows[-1].items()), sep="   ")
    RESULT.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
