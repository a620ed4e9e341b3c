"""Which file of an artifact holds which tensors."""

from __future__ import annotations

from torch import Tensor

from tfqc.ir.program import TIME, Program

WEIGHTS, TIME_WEIGHTS = "weights.safetensors", "time.safetensors"


def tensor_files(program: Program) -> dict[str, dict[str, Tensor]]:
    """Tensors by file: those that only @time reads, which few calls need, lie in one of their own."""
    read = {f: {str(n.target) for n in g.nodes if n.op == "get_attr"} for f, g in program.functions.items()}
    always = set().union(*(names for f, names in read.items() if f != TIME))
    only_time = read.get(TIME, set()) - always
    files = {WEIGHTS: {n: t for n, t in program.tensors.items() if n not in only_time}}
    if only_time:
        files[TIME_WEIGHTS] = {n: program.tensors[n] for n in only_time}
    return files
