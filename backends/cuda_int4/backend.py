"""The cuda-int4 backend: products with 4-bit weights as CUDA kernels, everything else as torch in f16."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from tabulate import tabulate
from torch import fx

from tfqc.backends.cuda_int4.emit import emit
from tfqc.backends.cuda_int4.legalize import legalize
from tfqc.backends.cuda_int4.runtime.specialise import ARCHS, Body, Mode, body_for
from tfqc.backends.cuda_int4.tensor_cores import support_of
from tfqc.codegen.artifact import Artifact
from tfqc.codegen.backend import Backend
from tfqc.codegen.recipes import quantization_pipeline
from tfqc.codegen.support import YES, Support
from tfqc.ir.program import Program
from tfqc.passing import Pass
from tfqc.passing.remarks import Remark
from tfqc.progress import Progress
from tfqc.runtime.kernel_ops import GROUP

_INSTRUCTIONS: dict[tuple[Body, Mode], str] = {
    ("s4", "w4a4"): "m16n8k64 u4 x s4",
    ("nibble", "w4a4"): "m16n8k32 u8 x s8, both of 16 times the codes",
    ("nibble", "w4a8"): "m16n8k32 u8 x s8, weights 16 times the codes",
    ("half", "w4a16"): "m16n8k16 f16 x f16, weights expanded",
}
_ACTIVATIONS: dict[Mode, int | None] = {"w4a4": 4, "w4a8": 8, "w4a16": None}


@dataclass(frozen=True)
class CudaInt4Options:
    """Options of the target.

    arch: the chip whose instructions multiply; fat = one text for all of them. mode: bits of weights and activations.
    group: columns of a linear's weight that share a scale, none = all of them. rank: of a branch in f16 beside each
    linear, none = no branch. activations: their ranges, fixed, a row for each step, or of each token at run time.
    edges: bits of the first and last layer, which torch runs where that is more than 4. policy: for timesteps that are
    not in the schedule.
    """

    arch: Literal["sm_80", "sm_86", "sm_89", "sm_90a", "sm_120a", "fat"] = "fat"
    mode: Mode = "w4a4"
    group: int | None = None
    rank: int | None = None
    activations: Literal["static", "per-step", "per-token"] = "per-step"
    edges: int | None = 8
    policy: Literal["recompute", "nearest", "error"] = "recompute"

    def __post_init__(self) -> None:
        if self.group not in (None, GROUP):
            raise ValueError(f"group={self.group} is out of range: kernels take groups of {GROUP} columns, or none")
        if self.rank is not None and (self.rank % 16 or not 16 <= self.rank <= 128):
            raise ValueError(f"rank={self.rank} is out of range: multiples of 16 up to 128, or none")
        if self.edges is not None and not 2 <= self.edges <= 8:
            raise ValueError(f"edges={self.edges} is out of range: 2 to 8 bits, or none")


class CudaInt4Backend(Backend):
    """Runs models with 4-bit weights on the tensor cores of NVIDIA GPUs."""

    name: ClassVar[str] = "cuda-int4"
    options: ClassVar[type[Any]] = CudaInt4Options
    files: ClassVar[frozenset[str]] = frozenset({"model.py", "kernels.cu", "program.ir", "weights.safetensors"})

    @classmethod
    def notes(cls) -> str:
        """The instruction that multiplies, by chip and mode."""
        rows = [(arch, *(_INSTRUCTIONS[body_for(arch, mode), mode] for mode in get_args(Mode))) for arch in ARCHS]
        return tabulate(rows, headers=("arch", *get_args(Mode)))

    def remarks(self, options: CudaInt4Options) -> list[Remark]:
        """What multiplies, which not every chip does in the bits of the mode."""
        mode, archs = options.mode, ARCHS if options.arch == "fat" else (options.arch,)
        said = {arch: _INSTRUCTIONS[body_for(arch, mode), mode] for arch in archs}
        return [
            Remark(self.name, "instruction", numbers={"mode": mode, "arch": arch, "instruction": instruction})
            for arch, instruction in said.items()
        ]

    def supports(self, program: Program, node: fx.Node, options: CudaInt4Options) -> Support:
        """Everything runs; products with stored weights that torch runs say why."""
        return support_of(program, node) if node.graph is program.step else YES

    def pipeline(self, options: CudaInt4Options, strategy: str) -> str:
        """The recipe of a strategy at the mode's bits."""
        return quantization_pipeline(
            strategy,
            weights=4,
            activations=_ACTIVATIONS[options.mode],
            group=options.group,
            group_scope="linear",
            rank=options.rank,
            mode=options.activations,
            edges=options.edges,
            policy=options.policy,
        )

    def legalize(self, options: CudaInt4Options) -> tuple[Pass, ...]:
        """Products, fusions, f16."""
        return legalize()

    def emit(self, program: Program, options: CudaInt4Options) -> Artifact:
        """`model.py` with the lines of a step, `kernels.cu`, the program's text, and its tensors."""
        return emit(program, options.arch)

    def check(self, artifact: Path | None, progress: Progress) -> dict[str, Any]:
        """Stored vectors and times on this machine's GPU."""
        from tfqc.backends.cuda_int4.checking.check import check  # it loads artifacts, with all that this imports

        return check(artifact, progress)
