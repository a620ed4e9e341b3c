"""What a GPU says: stored vectors replayed, kernels timed, a step of an artifact.

What it finds is JSON with the names of bench/results/gpu-model.json, so that the modelled and the measured line up.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch

from tfqc.backends.cuda_int4.checking import timing
from tfqc.backends.cuda_int4.checking.built import functions
from tfqc.backends.cuda_int4.checking.layers import IMAGES, Layer, program_layers, sdxl_layers
from tfqc.backends.cuda_int4.checking.replay import replay
from tfqc.backends.cuda_int4.runtime.libcuda import Device, Driver, NoDriverError
from tfqc.backends.cuda_int4.runtime.specialise import Gemm, Kernel, Mode, body_for
from tfqc.codegen.artifact import read_manifest
from tfqc.driver import load as load_artifact
from tfqc.errors import ArtifactError, TfqcError
from tfqc.ir.store import load_program
from tfqc.ir.types import TensorType, evaluate, parse_type
from tfqc.progress import Progress

TITLE = "measured"
WARM = "Operands are the same in every launch, of fp16 too: what fits into the L2 cache is there."
NO_PEER = "There is no fp16 to compare with: torch has no CUDA here."


def check(artifact: Path | None, progress: Progress) -> dict[str, Any]:
    """A report as `tfqc.codegen.backend.Backend.check` wants it.

    Raises:
        ArtifactError: no artifact of this backend.
        TfqcError: there is no compiler.
        DriverError: the device fails.
    """
    manifest = None if artifact is None else _manifest(artifact)
    try:
        driver = Driver.load()
    except NoDriverError as error:
        return {"title": TITLE, "measured": False, "because": str(error)}
    device = driver.device()
    progress.say(f"{device.name}, {device.arch}, CUDA {driver.version()}")
    vectors = replay(device, progress)
    notes = [WARM] if torch.cuda.is_available() else [WARM, NO_PEER]
    if artifact is None or manifest is None:
        cases = [_case(device, "sdxl", mode, sdxl_layers(mode, device.arch), progress) for mode in get_args(Mode)]
    else:
        cases = [_artifact(device, artifact, manifest, notes, progress)]
    return {
        "title": TITLE,
        "measured": True,
        "passed": all(vector["passed"] for vector in vectors),
        "chips": [_chip(device)],
        "vectors": vectors,
        "notes": notes,
        "cases": cases,
    }


def _chip(device: Device) -> dict[str, Any]:
    return {
        "name": device.name,
        "arch": device.arch,
        "sms": device.multiprocessors,
        "ghz": device.ghz,
        "memory": device.memory,
        "driver": device.driver.version(),
    }


# -- times ------------------------------------------------------------------------------------------------------------


def _case(device: Device, model: str, mode: str, layers: Sequence[Layer], progress: Progress) -> dict[str, Any]:
    """Times of a step's kernels, in microseconds."""
    made = functions(device, list(dict.fromkeys(layer.kernel for layer in layers)), model, progress)
    lines: list[dict[str, Any]] = []
    quantize: list[dict[str, Any]] = []
    for layer in progress.track(layers, f"timing {model} {mode}"):
        us = timing.kernel_us(device.driver, made[layer.kernel.name], layer)
        if isinstance(layer.kernel, Gemm):
            lines.append(_line(device, layer, layer.kernel, us))
        else:
            quantize.append({"layer": layer.name, "count": layer.count, "us": us})
    ours = sum(line["count"] * line["us"] for line in lines)
    case = {
        "title": TITLE,
        "model": model,
        "mode": mode,
        "batch": IMAGES,
        "card": device.name,
        "arch": device.arch,
        "gemm_us": ours,
    }
    if torch.cuda.is_available():
        fp16 = sum(line["count"] * line["fp16_us"] for line in lines)
        case |= {"gemm_fp16_us": fp16, "gemm_ratio": fp16 / ours}
    return case | {"layers": lines, "quantize": quantize}


def _line(device: Device, layer: Layer, kernel: Gemm, us: float) -> dict[str, Any]:
    line = {
        "layer": layer.name,
        "count": layer.count,
        "operations": 2 * layer.rows * kernel.n * kernel.k,
        "tile": asdict(kernel.tile),
        "body": body_for(device.arch, kernel.mode) if kernel.body == "auto" else kernel.body,
        "shared_bytes": kernel.shared_bytes,
        "us": us,
        "blocks": math.prod(kernel.grid(layer.rows)),
    }
    if torch.cuda.is_available():
        fp16 = timing.fp16_us(device.driver, layer, kernel)
        line |= {"ratio": fp16 / us, "fp16_us": fp16}
    return line


# -- artifacts --------------------------------------------------------------------------------------------------------


def _manifest(artifact: Path) -> dict[str, Any]:
    manifest = read_manifest(artifact)
    if manifest["backend"] != "cuda-int4":
        raise ArtifactError(f"{artifact} was compiled for {manifest['target']}: compile the model for cuda-int4.")
    return manifest


def _artifact(
    device: Device, artifact: Path, manifest: Mapping[str, Any], notes: list[str], progress: Progress
) -> dict[str, Any]:
    model = load_artifact(artifact)
    kernels: Sequence[Kernel] = sys.modules[type(model).__module__].KERNELS  # of the artifact's model.py
    layers = program_layers(load_program(artifact / "program.ir"), manifest["kernels"], kernels)
    mode = " ".join(sorted({layer.kernel.mode for layer in layers if isinstance(layer.kernel, Gemm)}))
    case = _case(device, manifest["model"], mode, layers, progress)
    try:
        case["step_us"] = _step_us(device, model, manifest)
    except (TfqcError, RuntimeError) as error:  # torch raises the latter for whatever a device refuses
        notes.append(f"No whole step was timed: {error}")
    return case


def _step_us(device: Device, model: torch.nn.Module, manifest: Mapping[str, Any]) -> float:
    """Of one call on random inputs, at the first timestep of the schedule."""
    if not torch.cuda.is_available():
        raise TfqcError("torch has no CUDA here.")
    model = model.to(timing.DEVICE)
    timestep = manifest["schedule"]["timesteps"][0] if manifest["schedule"] else 1
    arguments: dict[str, Any] = {}
    for each in manifest["inputs"]:
        *above, last = each["path"]
        place = arguments
        for name in above:
            place = place.setdefault(name, {})
        place[last] = _input(each["type"], timestep if each["role"] == "time" else None)
    with torch.no_grad():
        return timing.microseconds(device.driver, lambda: model(**arguments))


def _input(text: str, timestep: float | None) -> torch.Tensor:
    type_ = parse_type(text)
    assert isinstance(type_, TensorType)
    shape = [evaluate(size, {"B": IMAGES}) for size in type_.shape]
    if timestep is None and type_.dtype.is_floating_point:
        return torch.randn(shape, dtype=type_.dtype, device=timing.DEVICE)
    return torch.full(shape, timestep or 0, dtype=type_.dtype, device=timing.DEVICE)
