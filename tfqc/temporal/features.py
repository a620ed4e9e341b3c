"""The temporal information block as a function of its own: its features at every step of the schedule."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from tfqc.analysis.outline import outline
from tfqc.analysis.weighted import weighted_nodes
from tfqc.calibration.simulate import Simulation
from tfqc.calibration.trajectories import timestep_tensor
from tfqc.errors import CalibrationError
from tfqc.ir.program import Program, Role
from tfqc.ir.rows import Tib
from tfqc.passing.context import Context
from tfqc.sampling.calls import ModelCalls

REQUESTS = 4  # request inputs tried with every timestep, where features depend on them
LABELS = 16  # class labels tried with every timestep, where features depend on labels of a declared domain


@dataclass(frozen=True)
class TibRun:
    """The TIB as a graph, with inputs for all (step, request) pairs: T * requests rows, steps outermost.

    Where the model's code fixes how many images a call has, there is a call for each step: `time` of the inputs has T
    rows, the others as many as images.
    """

    program: Program
    graph: fx.Graph
    names: tuple[str, ...]
    inputs: Mapping[str, Tensor]
    steps: int

    @functools.cached_property
    def _simulation(self) -> Simulation:
        """Made once: reconstruction runs it a thousand times."""
        return Simulation(self.program, self.graph)

    def __call__(
        self,
        weights: Mapping[str, Tensor | Callable[[], Tensor]] | None = None,
        inputs: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
        observe: Callable[[str, Tensor], None] | None = None,
    ) -> dict[str, Tensor]:
        """Features by name, [T, requests, ...]; the arguments quantize or watch nodes as in `Simulation`."""
        run = self._simulation
        run.weights, run.inputs, run.observe = weights or {}, inputs or {}, observe
        if isinstance(batch := self.program.batch, int):
            time = self.program.input(Role.TIME)[0].name
            calls = [run.call({**self.inputs, time: t.expand(batch)}) for t in self.inputs[time].split(1)]
            return {name: torch.stack(rows) for name, rows in zip(self.names, zip(*calls, strict=True), strict=True)}
        values = run.call(self.inputs)
        return {name: value.unflatten(0, (self.steps, -1)) for name, value in zip(self.names, values, strict=True)}


def tib_run(program: Program, ctx: Context) -> TibRun:
    """Outline the TIB, with the schedule's timesteps and (if features depend on them) a few calibration requests.

    Raises:
        PassError: no schedule.
        CalibrationError: features that depend on request inputs without calibration data.
    """
    timesteps = ctx.need_schedule().timesteps
    features = [n for n in program.step.nodes if program.table(Tib).get(n.name, Tib("")).part == "feature"]
    roles = {Role.TIME, Role.REQUEST}
    graph = outline(program, features, roles)
    read = {n.name for n in graph.nodes if n.op == "placeholder" and n.users}
    t = timestep_tensor(program, timesteps)
    inputs: dict[str, Tensor] = {}
    wanted = [i for i in program.input(Role.REQUEST) if i.name in read]
    count = 1
    if len(wanted) == 1 and wanted[0].domain and (wanted[0].domain <= LABELS or ctx.calibration is None):
        count = min(LABELS, wanted[0].domain)
        labels = torch.linspace(0, wanted[0].domain - 1, count).round().to(wanted[0].type.dtype)
        inputs[wanted[0].name] = labels.repeat(len(t))
    elif wanted:
        if ctx.calibration is None:
            raise CalibrationError(
                f"The temporal features depend on {'.'.join(wanted[0].path)!r}, so calibration data are needed."
            )
        given, shared = {**ctx.calibration.cond, **ctx.calibration.shared}, set(ctx.calibration.shared)
        if isinstance(ctx.calibration, ModelCalls):
            shared = {".".join(i.path) for i in wanted if i.type.shape[:1] != ("B",)}
        for item in wanted:
            if (path := ".".join(item.path)) not in given:
                raise CalibrationError(f"The calibration data have no {path!r}, which the model needs.")
            inputs[item.name] = given[path].to(item.type.dtype)
        per_image = [item.name for item in wanted if ".".join(item.path) not in shared]
        if isinstance(program.batch, int):
            inputs |= {name: inputs[name][: program.batch] for name in per_image}
        else:
            count = min(REQUESTS, *(len(inputs[name]) for name in per_image)) if per_image else 1
            for name in per_image:
                rows = inputs[name][:count]
                inputs[name] = rows.repeat(len(t), *[1] * (rows.dim() - 1))
    inputs[program.input(Role.TIME)[0].name] = t if isinstance(program.batch, int) else t.repeat_interleave(count)
    for node in graph.nodes:
        if node.op == "placeholder" and node.name not in inputs:
            inputs[node.name] = torch.empty(0)  # a parameter that nothing reads
    return TibRun(program, graph, tuple(n.name for n in features), inputs, len(t))


def feature_label(program: Program, name: str) -> str:
    """Module path of the embedding layer that makes a feature: its nearest linear or convolution."""
    weighted = {n.name for n in weighted_nodes(program)}
    queue = [program.node(name)]
    while queue:
        node = queue.pop(0)
        if node.name in weighted:
            return program.origins[node.name].module if node.name in program.origins else node.name
        queue.extend(node.all_input_nodes)
    return name
