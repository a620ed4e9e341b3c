"""A saved artifact with adapters: another artifact, of the same codes, scales and ranges.

Branches are put into the program that the artifact holds, and the target's own passes run once more on it: they find
quantized products as they left them, and take the new operations in. Nothing is calibrated, so what was measured
without adapters stays; the weights that codes stand for are not needed, and so not kept anywhere.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from tfqc.adapters.branches import add_branches
from tfqc.adapters.low_rank import LowRank
from tfqc.adapters.places import Place, places
from tfqc.adapters.refold import is_sealed, refold
from tfqc.codegen.artifact import Artifact, read_manifest
from tfqc.codegen.manifest import PROGRAM
from tfqc.codegen.reading import read_program
from tfqc.codegen.support import refusals
from tfqc.codegen.target import Target
from tfqc.errors import ArtifactError, TfqcError
from tfqc.files.storage import read_text
from tfqc.instruments import VerifyEach
from tfqc.ir.parse import parse
from tfqc.ir.program import TIME, Program
from tfqc.ir.views import Conv, Linear, Product, QConv
from tfqc.passing.context import Context
from tfqc.passing.pipeline import Pipeline

_OF_FILES = ("format", "version", "files")  # what a manifest says of its own files


def check_adapters(directory: str | Path, adapters: Mapping[str, LowRank]) -> None:
    """Refuse adapters that an artifact cannot be given, without reading its tensors.

    Raises:
        TfqcError: naming the layers.
    """
    _backend(directory)
    _found(parse(read_text(Path(directory) / PROGRAM, ArtifactError)), adapters)


def adapted(directory: str | Path, adapters: Mapping[str, LowRank]) -> Artifact:
    """What a saved artifact becomes with adapters: quantized products as they were, each with its branch in floating
    point; and temporal features that depend on an adapted layer computed anew, for every row of the schedule.

    Args:
        adapters: by the names of layers in the model that was compiled.

    Raises:
        TfqcError: the target takes no adapters, or layers are not computed as layers any more: they were split, or
            folded and nothing is kept to compute them from.
    """
    target, manifest = _backend(directory), read_manifest(directory)
    program = read_program(directory)
    found = _found(program, adapters)
    temporal = {node.name for its in found.values() for function, node in its if function == TIME}
    add_branches(program, dict(adapters), found)
    refold(program, temporal)
    program = Pipeline(tuple(target.backend.legalize(target.options))).run(program, Context(), [VerifyEach()])
    if refused := refusals(target.backend, program, target.options):
        raise TfqcError(f"{target.name} does not run {program.model} with these adapters.", *refused)
    artifact = target.backend.emit(program, target.options)
    artifact.facts = {k: v for k, v in manifest.items() if k not in _OF_FILES} | artifact.facts
    return artifact


def _backend(directory: str | Path) -> Target:
    target = Target.parse(read_manifest(directory)["target"])
    if not target.backend.adapts:
        raise TfqcError(
            f"What is compiled for {target.name} takes no LoRA afterwards: load it (pipe.load_lora_weights) before "
            "tfqc.quantize, which compiles it with the model."
        )
    return target


def _found(program: Program, adapters: Mapping[str, LowRank]) -> dict[str, list[Place]]:
    found = places(program, adapters)
    sealed = is_sealed(program)
    folded = [k for k, its in found.items() if sealed and (not its or any(function == TIME for function, _ in its))]
    if folded:
        raise TfqcError(
            f"The LoRA adapts layers that were folded into tables of the schedule ({_named(folded)}), and this model "
            "was compiled without what they are computed from: compile it with policy=recompute, or load the LoRA "
            "before tfqc.quantize."
        )
    if lost := [layer for layer, its in found.items() if not its]:
        raise TfqcError(
            f"The LoRA adapts layers that the compiled model does not have as they were ({_named(lost)}): passes have "
            "split or merged them, or nothing depends on them. Load the LoRA before tfqc.quantize."
        )
    if unlike := [layer for layer, its in found.items() if not all(_fits(program, n, adapters[layer]) for _, n in its)]:
        raise TfqcError(
            f"The LoRA does not fit layers of the compiled model ({_named(unlike)}): they have other sizes, or are "
            "convolutions in groups."
        )
    return found


def _fits(program: Program, node: object, adapter: LowRank) -> bool:
    layer = Product.of(node) or Linear.of(node) or Conv.of(node)
    grouped = QConv.of(node) or Conv.of(node)
    type_ = None if layer is None else program.tensor_type(layer.weight)
    return type_ is not None and type_.shape == adapter.shape and (grouped is None or grouped.groups == 1)


def _named(layers: Collection[str]) -> str:
    shown = list(layers)
    more = f", ... {len(shown) - 3} more" if len(shown) > 3 else ""
    return ", ".join(shown[:3]) + more
