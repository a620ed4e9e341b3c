"""Full-precision trajectories of the calibration images: what the network is called with at every step.

Each image is sampled once: T network calls, whatever the number of passes that observe them. Trajectories are kept on
disk, a batch at a time, so memory does not grow with the number of images and an interrupted run goes on where it
stopped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from tfqc.errors import CalibrationError
from tfqc.files.storage import read_tensors, tensors_hash, write_tensors
from tfqc.ir.program import Input, Program, Role
from tfqc.passing.context import Context
from tfqc.runtime.cache import private_directory, used_now
from tfqc.runtime.outputs import prediction_of
from tfqc.runtime.plan import as_time
from tfqc.runtime.pruning import prune
from tfqc.sampling.data import Calibration
from tfqc.sampling.loop import sample
from tfqc.sampling.schedule import nearest

_VISITS = "samples.at"  # in files, beside "samples"; names of inputs have no dots


@dataclass(frozen=True)
class TrajectoryBatch:
    """What the network was called with for a batch of images, call by call: `visits`, their positions in the schedule,
    `samples` [visits, rows, ...], request inputs [rows, ...], and by path the times that are multiples of the step's
    (`Calibration.following`).

    Samplers of higher order come back to a timestep: what they come with first may be a probe, far from the path.
    """

    timesteps: tuple[float, ...]
    visits: tuple[int, ...]
    samples: Tensor
    request: Mapping[str, Tensor]
    following: Mapping[str, Tensor]

    def calls(self, program: Program) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """(position in the schedule, inputs of @step by name) of each network call."""
        noisy = program.input(Role.SAMPLE)[0].name
        for step, x in zip(self.visits, self.samples, strict=True):
            t = self.timesteps[step]
            times = {i.name: timestep_tensor(program, [t]).expand(len(x)) for i in program.input(Role.TIME)}
            times |= followed(program, self.following, t, len(x))
            yield step, {noisy: x, **times, **self.request}


def timestep_tensor(program: Program, timesteps: Sequence[float]) -> Tensor:
    """Timesteps [T] in the dtype with which the model was captured; float32 where that is integer and they are not."""
    t, dtype = torch.tensor(timesteps, dtype=torch.float32), program.input(Role.TIME)[0].type.dtype
    return t if not dtype.is_floating_point and bool((t != t.round()).any()) else t.to(dtype)


def followed(program: Program, following: Mapping[str, Tensor], t: float, images: int) -> dict[str, Tensor]:
    """Times beside the step's, by input name: multiples of it."""
    found: dict[str, Tensor] = {}
    for item in program.input(Role.SAMPLE)[1:]:
        if (factor := following.get(".".join(item.path))) is not None:
            value = (factor * t).to(item.type.dtype)
            found[item.name] = value.expand(images, *value.shape[1:]) if item.type.shape[:1] == ("B",) else value
    return found


def given_once(program: Program, following: Iterable[str]) -> dict[str, Input]:
    """Inputs by path that calibration holds for all steps: of requests, and samples beside the one that is denoised."""
    held = [*program.input(Role.REQUEST), *program.input(Role.SAMPLE)[1:]]
    return {path: i for i in held if (path := ".".join(i.path)) not in {*following}}


class Trajectories:
    """The trajectories of the calibration images, batch by batch: in the context's working directory, or else in the
    user's cache.

    Args:
        program: not quantized yet: it is what is sampled from.

    Attributes:
        key: identifies what is sampled: the model and its weights, the noise, the conditions, the schedule.
        timesteps: of the schedule.
        exact: whether the sampler calls the network with the very timesteps of the schedule.
        calls: network calls that sampling a batch takes.

    Raises:
        CalibrationError: no calibration data or schedule.
    """

    def __init__(self, program: Program, ctx: Context) -> None:
        if not isinstance(ctx.calibration, Calibration) or ctx.schedule is None:
            raise CalibrationError("Trajectories need calibration data and a schedule.")
        self._program, self._calibration, self._schedule = program, ctx.calibration, ctx.schedule
        self._cached = ctx.workdir is None  # others use it, too
        self._directory = ctx.workdir or private_directory("trajectories")
        self.key = _key(program, ctx.calibration, ctx.schedule.identity())
        self.timesteps = ctx.schedule.timesteps
        visited = [ctx.schedule.time(t) for t in ctx.schedule.scheduler().timesteps]
        self.calls, self.exact = len(visited), set(visited) >= set(self._schedule.timesteps)

    def __len__(self) -> int:
        return -(-len(self._calibration) // self._calibration.batch_size)

    def __iter__(self) -> Iterator[TrajectoryBatch]:
        """One after another; what is not there yet is sampled."""
        for number in range(len(self)):
            yield self.read(number) or self.sample(number)

    def path(self, number: int) -> Path:
        """Where a batch is kept."""
        return self._directory / f"trajectory-{self.key}-{number:04d}.safetensors"

    def is_there(self, number: int) -> bool:
        """It need not be sampled."""
        return self.path(number).exists()

    def read(self, number: int) -> TrajectoryBatch | None:
        """A batch as it was written; None if it is not there, or broken."""
        path = self.path(number)
        try:
            tensors, metadata = read_tensors(path, CalibrationError)
        except CalibrationError:
            return None
        if metadata != {"sha256": tensors_hash(tensors.items())}:
            return None
        if self._cached:
            used_now(path)
        samples, visits = tensors.pop("samples"), tuple(tensors.pop(_VISITS).tolist())
        return TrajectoryBatch(self._schedule.timesteps, visits, samples, tensors, self._calibration.following)

    def sample(
        self, number: int, network: Callable[..., Any] | None = None, before: Callable[[int | None], Any] | None = None
    ) -> TrajectoryBatch:
        """Sample a batch and keep it.

        Args:
            network: called like the captured model; the program by default.
            before: told before each network call which position of the schedule it is, None where it is none of them.

        Raises:
            CalibrationError: the model's output became NaN (at which step).
        """
        program, calibration, schedule = self._program, self._calibration, self._schedule
        rows = slice(number * calibration.batch_size, (number + 1) * calibration.batch_size)
        position = {t: step for step, t in enumerate(schedule.timesteps)}
        seen: list[tuple[float, Tensor]] = []
        wanted = given_once(program, calibration.following)
        request: dict[str, Tensor] = {}

        def denoiser(x: Tensor, t: Tensor, /, **conditions: Tensor) -> Any:
            time = as_time(t)
            if before is not None:
                before(position.get(time))
            conditions |= calibration.shared
            if lacking := [n for n in wanted if n not in conditions]:
                raise CalibrationError(f"The calibration data have no {lacking[0]!r}, which the model needs.")
            request.update({item.name: conditions[k].to(item.type.dtype) for k, item in wanted.items()})
            seen.append((time, x))
            given = {item.path: conditions[k] for k, item in wanted.items()}
            times = {i.path: t for i in program.input(Role.TIME)}
            others = followed(program, calibration.following, time, len(x))
            times |= {i.path: others[i.name] for i in program.inputs if i.name in others}
            result = (network or program)(**nested({program.input(Role.SAMPLE)[0].path: x, **times, **given}))
            output = prediction_of(result, x)
            if not bool(torch.isfinite(output).all()):
                raise CalibrationError(f"The full-precision model returns NaN or infinity at timestep {time:g}.")
            return output

        sample(
            denoiser,
            schedule.scheduler(),
            latents=calibration.latents[rows],
            cond={k: v[rows] for k, v in calibration.cond.items()},
            uncond={k: v[rows] for k, v in calibration.uncond.items()} if calibration.uncond is not None else None,
            guidance=calibration.guidance,
            batch_size=calibration.batch_size,
            seed=calibration.seed,
            time_of=schedule.time,
        )
        if self.exact:
            visits = [(position[t], x) for t, x in seen if t in position]
        else:
            first = dict(reversed(seen))
            visits = [(i, first[nearest(t, sorted(first))]) for i, t in enumerate(schedule.timesteps)]
        at, samples = tuple(step for step, _ in visits), torch.stack([x for _, x in visits])
        tensors = {"samples": samples, _VISITS: torch.tensor(at), **request}
        self._directory.mkdir(parents=True, exist_ok=True)
        write_tensors(self.path(number), tensors, {"sha256": tensors_hash(tensors.items())})
        if self._cached and number == len(self) - 1:
            prune()
        return TrajectoryBatch(schedule.timesteps, at, samples, request, calibration.following)


def nested(values: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """Keyword arguments of a model from values by path: `("a", "b") -> x` becomes `{"a": {"b": x}}`."""
    call: dict[str, Any] = {}
    for path, value in values.items():
        target = call
        for key in path[:-1]:
            target = target.setdefault(key, {})
        target[path[-1]] = value
    return call


def model_key(program: Program, facts: object, tensors: Sequence[tuple[str, Tensor]]) -> str:
    """Identifies a model with its weights, facts, and data."""
    digest = hashlib.sha256(repr(facts).encode())
    # What passes have added (codes, scales) is read by no operation yet: another pass finds the same trajectories.
    read: set[str] = set()
    for name, graph in program.functions.items():
        digest.update(f"@{name}\n{graph.python_code('self').src}".encode())
        read |= {str(n.target) for n in graph.nodes if n.op == "get_attr"}
    weights = [(f"weight.{name}", program.tensors[name]) for name in sorted(read)]
    digest.update(tensors_hash([*tensors, *weights]).encode())
    return digest.hexdigest()[:32]


def _key(program: Program, calibration: Calibration, schedule: str) -> str:
    """Identifies what would be sampled: the model and its weights, the noise, the conditions, the schedule."""
    facts = ["visits", schedule, calibration.guidance, calibration.batch_size, torch.__version__, diffusers.__version__]
    parts = {"cond": calibration.cond, "uncond": calibration.uncond or {}, "shared": calibration.shared}
    parts |= {"following": calibration.following}
    own = [(f"{part}.{name}", tensor) for part, tensors in parts.items() for name, tensor in tensors.items()]
    return model_key(program, facts, [("latents", calibration.latents), *own])
