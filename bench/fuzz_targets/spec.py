"""Pipelines and targets, as text and as YAML: read, printed, and read back."""

from __future__ import annotations

from pathlib import Path

from tfqc.codegen.target import Target
from tfqc.passing.pipeline import Pipeline


def pipeline(data: bytes, work: Path) -> None:
    """What a pipeline prints says the same pipeline, as text and as YAML."""
    parsed = Pipeline.parse(data.decode("utf-8", "replace"))
    for text in (str(parsed), parsed.to_yaml()):
        if parsed.passes and Pipeline.parse(text) != parsed:
            raise AssertionError(f"{text!r} says another pipeline")


def target(data: bytes, work: Path) -> None:
    """What a target prints says the same target."""
    parsed = Target.parse(data.decode("utf-8", "replace"))
    if Target.parse(str(parsed)) != parsed:
        raise AssertionError(f"{parsed} says another target")


_TEXTS = [
    "normalize,discover-tib,fold-cache{mode=exact policy=nearest}",
    "normalize,discover-tib,measure-disturbance{weights=4 activations=8 strategies=tib,cache4,cache8},\n"
    "select-maintenance{strategy=auto candidates=cache4,cache8 budget=45000},\n# why\n"
    "calibrate-weights{bits=4 method=mse group=64 skip=\"a b\",c}, calibrate-activations{bits=8 mode=per-step},\n"
    "fold-cache{policy=recompute}, hoist-request, insert-qdq",
    "- normalize\n- discover-tib\n- calibrate-weights:\n    bits: 4\n    skip: [a, 'b c']\n- insert-qdq\n",
    "---\n- normalize\n- fold-cache: {policy: error}\n",
    "split-low-rank{rank=16}, calibrate-weights{bits=8},reconstruct-tib,",
]  # fmt: skip
_TARGET_TEXTS = [
    "fake-quant{weights=4 activations=8}", "cpu-int8", "cuda-int4{arch=sm_86 mode=w4a4 group=128 rank=32}",
    "cuda-int4{activations=per-token}",
]  # fmt: skip

TARGETS = {"pipeline": pipeline, "target": target}
SEEDS = {"pipeline": [t.encode() for t in _TEXTS], "target": [t.encode() for t in _TARGET_TEXTS]}
