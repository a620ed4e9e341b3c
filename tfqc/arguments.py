"""What a caller gives `tfqc.compile`, checked at once: one sentence for each mistake, before anything slow."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils import _pytree as pytree

from tfqc.codegen.recipes import STRATEGIES
from tfqc.codegen.target import Target
from tfqc.errors import CalibrationError, PipelineError, SpecError, TfqcError, suggest
from tfqc.files.storage import parse_json, read_text
from tfqc.instruments import Instrument
from tfqc.ir.rows import QuantPlan
from tfqc.passing.pipeline import Pipeline
from tfqc.quant.plan_text import read_plan as check_plan
from tfqc.quant.step_policy import KEY, StepPolicy, policy_in, read_policy
from tfqc.sampling.calls import ModelCalls
from tfqc.sampling.data import Calibration
from tfqc.sampling.schedule import SamplingSchedule, number
from tfqc.sampling.scheduler import is_scheduler


def read_target(given: Any) -> Target:
    """A target, from text if it is that.

    Raises:
        SpecError: it is neither, or names what there is not.
    """
    if isinstance(given, Target):
        return given
    if not isinstance(given, str):
        raise SpecError(
            f"target={_shown(given)} is no target: give text, such as 'fake-quant{{weights=4}}', or a Target."
        )
    return Target.parse(given)


def read_pipeline(given: Any, target: Target, strategy: Any) -> Pipeline:
    """A pipeline, the target's own for a strategy if none is given.

    Raises:
        PipelineError, SpecError: it is none, or names what there is not.
    """
    if not isinstance(strategy, str) or strategy not in STRATEGIES:
        raise SpecError(f"There is no strategy {strategy!r}.{suggest(str(strategy), list(STRATEGIES))}")
    if given is None:
        given = target.backend.pipeline(target.options, strategy)
    if isinstance(given, Pipeline):
        return given
    if not isinstance(given, str):
        raise PipelineError(
            f"pipeline={_shown(given)} is no pipeline: give text, such as 'normalize,discover-tib', or a Pipeline."
        )
    return Pipeline.parse(given)


def read_plan(given: Any, pipeline: Pipeline) -> str:
    """The text of a plan for quantization, from a file if a Path is given; empty for None.

    Raises:
        SpecError: it is no plan.
        PipelineError: no pass of the pipeline plans anything.
    """
    if given is None:
        return ""
    if not isinstance(given, (str, Path)):
        raise SpecError(
            f"plan={_shown(given)} is no plan: give text, or the Path of a file, as `tfqc inspect` prints it."
        )
    if isinstance(given, str) and os.path.exists(given):
        raise SpecError(f"plan={_shown(given)} is text, and there is a file of that name: give its Path.")
    text = given if isinstance(given, str) else read_text(given, SpecError)
    if not check_plan(text):
        raise SpecError("The plan has no line: leave it out, or say for a layer what its operands are quantized to.")
    if not any(QuantPlan in item.contract().provides for item in pipeline.passes):
        raise PipelineError("No pass of the pipeline reads a plan: put plan-quantization behind discover-tib.")
    return text


def read_step_policy(given: Any) -> StepPolicy | None:
    """Steps that are protected, from whatever `compile` takes; None for None.

    Raises:
        SpecError: it says none, or one that cannot be carried out.
    """
    if given is None:
        return None
    where = ""
    if isinstance(given, StepPolicy):
        given = given.to_config()  # which is checked as JSON is
    if isinstance(given, Path):
        where = str(given / "config.json" if given.is_dir() else given)
        given = parse_json(read_text(Path(where), SpecError), where, SpecError)
    if not isinstance(given, Mapping):
        raise SpecError(
            f"step_policy={_shown(given)} is no policy: give what stands under {KEY}, or the Path of a config.json."
        )
    if "schema_version" in given:
        return read_policy(given)
    if (found := policy_in(given)) is None:
        raise SpecError(f"{where or 'step_policy'} has no quantization_config.runtime.{KEY}.")
    return found


def read_schedule(given: Any, steps: Any) -> SamplingSchedule | None:
    """A schedule from whatever `compile` takes; None for None.

    Raises:
        CalibrationError: it is none, or `steps` is no number of steps.
    """
    if steps is not None:
        steps = whole("steps", steps, CalibrationError, least=1)
    if given is None or isinstance(given, SamplingSchedule):
        return given
    if isinstance(given, Tensor) or hasattr(given, "tolist"):
        given = given.tolist()
    if isinstance(given, Sequence) and not isinstance(given, (str, bytes)):
        given = [number(t) for t in given]  # pyright: ignore[reportUnknownVariableType]
        if strange := [t for t in given if not _is_number(t)]:
            raise CalibrationError(f"The schedule holds {_shown(strange[0])}, which is no timestep.")
        return SamplingSchedule.of([float(t) for t in given])
    if not is_scheduler(given):
        raise CalibrationError(
            f"schedule={_shown(given)} is no schedule: give a diffusers scheduler, a list of timesteps, or a "
            "SamplingSchedule."
        )
    return SamplingSchedule.of(given, steps)


def read_calibration(given: Any) -> Calibration | ModelCalls | Mapping[str, Any] | Tensor | int | None:
    """Calibration data, calls of the model, or a number of images; None for None.

    Raises:
        CalibrationError: none of these.
    """
    if given is None or isinstance(given, (Calibration, ModelCalls, Mapping)):
        return given
    if isinstance(given, Tensor) and not is_number(given):
        return given
    if isinstance(given, Iterable) and not isinstance(given, (str, bytes, Tensor)):
        return ModelCalls.of(given)  # pyright: ignore[reportUnknownArgumentType]
    others = ", Calibration data, noise, inputs by name, or a list of calls of the model, each a mapping by argument"
    return whole("calibration", given, CalibrationError, least=1, beside=others)


def is_number(given: Any) -> bool:
    """True for a tensor that stands for one whole number."""
    return isinstance(given, Tensor) and given.numel() == 1 and not given.is_floating_point()


def check_others(
    roles: Any, example_inputs: Any, dynamic: Any, seed: Any, workdir: Any, instruments: Any, progress: Any
) -> None:
    """Raises:
    TfqcError: an argument that is of another kind than `compile` takes.
    """
    whole("seed", seed, TfqcError, least=0, below=2**63)
    if roles is not None and not isinstance(roles, (Mapping, list, tuple)) and not callable(roles):
        raise TfqcError(
            f"roles={_shown(roles)} is no mapping from names or positions of inputs, no list, and no function."
        )
    if dynamic is not None and not isinstance(dynamic, (str, Mapping)):
        raise TfqcError(f"dynamic={_shown(dynamic)} is neither text, such as 'H,W', nor a mapping.")
    if isinstance(dynamic, Mapping):
        for name, dims in dynamic.items():
            if not isinstance(dims, Mapping) or not all(
                isinstance(d, int) and isinstance(s, str) for d, s in dims.items()
            ):
                raise TfqcError(
                    f"dynamic={{{name!r}: {_shown(dims)}}} maps no dimensions to names, as {{2: 'H'}} does."
                )
    if example_inputs is not None and not isinstance(example_inputs, (Mapping, list, tuple)):
        raise TfqcError(
            f"example_inputs={_shown(example_inputs)} is neither a mapping nor a list of the model's arguments."
        )
    arrays = [leaf for leaf in pytree.tree_leaves(example_inputs) if isinstance(leaf, np.ndarray)]
    if arrays or (example_inputs is not None and not example_inputs):
        raise TfqcError(
            f"example_inputs holds {'a numpy array' if arrays else 'nothing'}: give the tensors of a call of the model."
        )
    if workdir is not None and not isinstance(workdir, (str, Path)):
        raise TfqcError(f"workdir={_shown(workdir)} is no path.")
    if workdir is not None and Path(workdir).exists() and not Path(workdir).is_dir():
        raise TfqcError(f"workdir={workdir} is a file: give a directory.")
    if instruments is not None and not (
        isinstance(instruments, Iterable) and all(isinstance(i, Instrument) for i in instruments)
    ):
        raise TfqcError(f"instruments={_shown(instruments)} is no list of instruments.")
    if progress is not None and not (hasattr(progress, "track") and hasattr(progress, "say")):
        raise TfqcError(f"progress={_shown(progress)} has no track() and say().")


def whole(
    name: str, given: Any, error: type[TfqcError], *, least: int, below: float = math.inf, beside: str = ""
) -> int:
    """A whole number; Python's, numpy's or a tensor's.

    Raises:
        error: it is none, or too small or large.
    """
    if isinstance(given, (bool, str, float)) or not hasattr(given, "__index__"):
        raise error(f"{name}={_shown(given)} is no whole number{beside}.")
    try:
        value = int(given.__index__())
    except (TypeError, ValueError) as reason:  # a tensor of several values, or of fractions
        raise error(f"{name}={_shown(given)} is no whole number{beside}.") from reason
    if not least <= value < below:
        raise error(
            f"{name}={value} is out of range: at least {least}{f', below {below:.4g}' if below < math.inf else ''}."
        )
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 and "\n" not in text else f"<{type(value).__name__}>"
