"""discover-tib: binding times of all values, and with them the temporal information block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from tfqc.analysis.binding import binding_table, binding_times
from tfqc.errors import PassError
from tfqc.ir.program import Program, Role, Stage
from tfqc.ir.rows import BindingTime, Tib
from tfqc.ir.tables import Fact
from tfqc.passing import Context, Pass


@dataclass(frozen=True)
class DiscoverTib(Pass):
    """Find the temporal features by data flow, and everything that computes them.

    A temporal feature depends on the timestep, not on the sample, and is read by something that depends on the
    sample. It has one row for each batch entry; a value that has not is passed over for the ones it is made from. A
    program without a time has none.
    """

    name: ClassVar[str] = "discover-tib"
    needs: ClassVar[Stage] = Stage.NORMALIZED
    below: ClassVar[Stage | None] = Stage.FOLDED
    provides: ClassVar[frozenset[Fact]] = frozenset({BindingTime, Tib})

    def run(self, program: Program, ctx: Context) -> None:
        """Provide the tables `binding` and `tib`."""
        roles = binding_times(program)
        features = temporal_features(program, roles)
        if others := [i.name for i in program.input(Role.SAMPLE)[1:]]:
            ctx.remark("step-inputs", names=", ".join(others))
        if not program.input(Role.TIME):
            ctx.remark("timeless", model=program.model)
        elif not features:
            time = program.input(Role.TIME)[0].name
            raise PassError(
                f"No value that depends on %{time} is read by one that depends on the sample: {program.model} has no "
                "temporal features. Check the roles of its inputs."
            )
        tib = {n.name: Tib("feature") for n in features}
        for node in reversed(list(program.step.nodes)):  # readers first, so that membership is transitive
            if node.op == "call_function" and node.name not in tib and Role.SAMPLE not in roles[node.name]:
                readers = [u.name in tib for u in node.users]
                if any(readers) if Role.TIME in roles[node.name] else all(readers):
                    tib[node.name] = Tib("body")
        order = [n.name for n in program.step.nodes if n.name in tib]
        program.set_table(BindingTime, binding_table(program))
        program.set_table(Tib, {name: tib[name] for name in order})
        steps = sum(Role.REQUEST not in roles[n.name] for n in features)
        if features:
            ctx.remark("features", features=len(features), compile_time=steps, per_request=len(features) - steps)


def temporal_features(program: Program, roles: dict[str, frozenset[Role]]) -> list[fx.Node]:
    """Nodes that wait for the timestep but not the sample, are rows over the batch, and are read by others that do."""

    def waits(node: fx.Node) -> bool:
        found = roles.get(node.name, frozenset())
        return Role.TIME in found and Role.SAMPLE not in found

    def rows(node: fx.Node) -> bool:
        type_ = program.tensor_type(node)
        return type_ is not None and len(type_.shape) > 0 and type_.shape[0] == program.batch

    # From the readers back: a value that is no row over the batch is computed at every step, as its readers are.
    dynamic: set[fx.Node] = set()
    for node in reversed(list(program.step.nodes)):
        late = node.op == "output" or not waits(node)
        if late or (not rows(node) and any(u in dynamic for u in node.users)):
            dynamic.add(node)
    return [
        n
        for n in program.step.nodes
        if n.op == "call_function" and n not in dynamic and rows(n) and any(u in dynamic for u in n.users)
    ]
