"""fold-cache: every model keeps its outputs, every feature gets the kind of table that its binding time allows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from torch import Tensor, nn

from tests.helpers import evaluate_nodes, features, find, first
from tests.models import TIMES, Example
from tests.subjects import SUBJECTS, Subject, Subjects, assert_text_round_trip, of_example
from tfqc.errors import PipelineError
from tfqc.frontend import capture
from tfqc.instruments.numerics import relative_error
from tfqc.ir.interpret import interpreter, plan_of
from tfqc.ir.program import TIME, Program, Role
from tfqc.ir.render import render
from tfqc.ir.rows import Maintenance, Quantizer
from tfqc.passes.fold_cache import FoldCache
from tfqc.passing import Context
from tfqc.passing.pipeline import Pipeline
from tfqc.sampling.loop import initial_noise, sample
from tfqc.sampling.schedule import SamplingSchedule

FOLD = "select-maintenance,fold-cache"

# How many rows each model's step reads: known at compile time, and built for each image.
TABLES = {
    "unet2d": (8, 0), "unet2d-scale-shift": (16, 0), "unet2d-classes": (0, 8), "unet-sd": (8, 0), "unet-sdxl": (0, 8),
    "dit": (0, 14), "pixart": (14, 0), "sd3": (0, 23), "flux": (0, 18), "flux-guidance": (0, 18), "odd-names": (1, 0),
    "chain": (2, 1), "in-place": (1, 0), "dit-labels": (14, 0), "unet2d-labels": (8, 0),
}  # fmt: skip
COMPILE_TIME = [name for name, (fixed, per_request) in TABLES.items() if per_request == 0]


def operations(program: Program) -> int:
    return sum(n.op == "call_function" for n in program.step.nodes)


def with_strategies(subject: Subject, strategies: tuple[str, ...]) -> Program:
    """An analysed program whose features are kept as told, step by step."""
    program = subject.run("select-maintenance{strategy=tib}")
    program.set_table(Maintenance, {n.name: Maintenance(strategies) for n in features(program)})
    return program


# -- every model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SUBJECTS)
def test_every_model_at_every_timestep(name: str, subject: Subjects) -> None:
    """Rewriting: equal to the model for the whole schedule, for three batch sizes and for mixed timesteps."""
    its = subject(name)
    program = its.run(FOLD, numerics=True)
    errors = [relative_error(its.reference(call), first(program(**call))) for call in its.calls()]
    before = operations(its.program)
    print(f"{name}: {before} -> {operations(program)} operations, error {max(errors):.1e}")  # shown by pytest -rP
    assert max(errors) <= 1e-5
    assert operations(program) < before
    plan = plan_of(program)
    assert (len(plan.tables), len(plan.request_tables)) == TABLES[name]
    assert_text_round_trip(program, its.call(list(its.timesteps[:2])))
    assert its.discovered.input(Role.TIME)[0].name not in plan_parameters(program)


def plan_parameters(program: Program) -> set[str]:
    return {n.name for n in program.step.nodes if n.op == "placeholder"}


@pytest.mark.parametrize(
    ("name", "op", "count"),
    [
        ("unet2d", "conv2d_rows", 8), ("unet-sd", "conv2d_rows", 8), ("unet-sdxl", "conv2d_rows", 8),
        ("unet2d-labels", "conv2d_rows", 8), ("unet2d-scale-shift", "group_norm_rows", 8),
        ("dit", "layer_norm_rows", 5), ("pixart", "layer_norm_rows", 5), ("sd3", "layer_norm_rows", 7),
        ("flux", "layer_norm_rows", 5),
    ],
)  # fmt: skip
def test_features_become_constants(name: str, op: str, count: int, subject: Subjects) -> None:
    """A bias of the convolution, or the affine of the norm; and the addition that took the feature is gone.

    (In SD 3 and Flux the first norm of the text waits for no sample: its result is a feature itself.)
    """
    its = subject(name)
    program = its.run(FOLD)
    assert len(find(program, op)) == count
    plain = its.run("select-maintenance,fold-cache{mode=table}")
    assert not find(plain, op)
    assert operations(plain) > operations(program)


@pytest.mark.parametrize(("mode", "has"), [("bias", "unet2d"), ("affine", "unet2d-scale-shift")])
def test_modes(mode: str, has: str, subject: Subjects) -> None:
    other = {"unet2d": "unet2d-scale-shift", "unet2d-scale-shift": "unet2d"}[has]
    assert find(subject(has).run(f"select-maintenance,fold-cache{{mode={mode}}}"), "_rows")
    assert not find(subject(other).run(f"select-maintenance,fold-cache{{mode={mode}}}"), "_rows")


def test_nothing_to_fold_is_unchanged(subject: Subjects) -> None:
    """Unchanged: features that stay in the block leave the step as it was."""
    its = subject("unet-sd")
    program = its.run("select-maintenance{strategy=tib}")
    before = [str(n.format_node()) for n in program.step.nodes]
    its.run("fold-cache", program=program)
    assert [str(n.format_node()) for n in program.step.nodes] == before
    assert list(program.functions) == ["step"]


def test_refused_without_maintenance_or_schedule(subject: Subjects) -> None:
    its = subject("unet2d")
    with pytest.raises(PipelineError, match=r"needs stage analyzed .* put select-maintenance"):
        its.run("fold-cache")
    with pytest.raises(PipelineError, match=r"needs a schedule"):
        its.run(FOLD, Context())
    with pytest.raises(PipelineError, match=r"works below stage folded"):
        its.run(f"{FOLD},fold-cache")


def test_without_weights(subject: Subjects) -> None:
    """A program from the meta device folds to the same text."""
    its = subject("unet2d-labels")
    program = its.program
    program.tensors = {name: t.to("meta") for name, t in program.tensors.items()}
    for strategy in ("fold", "cache4", "cache8"):
        text = f"select-maintenance{{strategy={strategy}}},fold-cache"
        assert render(its.run(text, program=program.clone())) == render(its.run(text))


# -- what is kept -------------------------------------------------------------------------------------------------


def tib_tensors(its: Subject) -> set[str]:
    """Tensors that only the temporal information block reads."""
    program = its.program
    tib = set(program.tables["tib"])
    readers = {str(n.target): {u.name for u in n.users} for n in program.step.nodes if n.op == "get_attr"}
    return {tensor for tensor, users in readers.items() if users <= tib}


@pytest.mark.parametrize("policy", ["nearest", "error", "recompute"])
@pytest.mark.parametrize("name", COMPILE_TIME)
def test_the_blocks_weights_go(name: str, policy: str, subject: Subjects) -> None:
    its = subject(name)
    program = its.run(f"select-maintenance,fold-cache{{policy={policy}}}")
    block = tib_tensors(its)
    assert block
    if policy == "recompute":
        assert block <= set(program.tensors)
        assert block.isdisjoint(str(n.target) for n in program.step.nodes if n.op == "get_attr")
    else:
        assert block.isdisjoint(program.tensors)
        assert TIME not in program.functions


@pytest.mark.parametrize("policy", ["nearest", "error"])
def test_only_what_a_request_needs_stays(policy: str, subject: Subjects) -> None:
    """Of `chain`, two features wait for the time alone: the layers that only they need go."""
    its = subject("chain")
    program = its.run(f"select-maintenance,fold-cache{{policy={policy}}}")
    assert {"second.weight", "first.weight"} <= tib_tensors(its)
    assert {"second.weight", "first.weight"}.isdisjoint(program.tensors)
    assert "mix.transposed" in program.tensors  # a product with a stored matrix is a linear
    for call in its.calls():
        assert relative_error(its.reference(call), first(program(**call))) <= 1e-5


# -- rows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_read_equals_the_function_it_replaced(name: str, subject: Subjects) -> None:
    its = subject(name)
    nodes = features(its.program)
    program = its.run("select-maintenance{strategy=table},fold-cache")
    reads = [n for n in program.step.nodes if n.name in {m.name for m in nodes}]
    assert len(reads) == len(nodes)
    for call in [its.call([t, t]) for t in its.timesteps] + [its.call(list(its.timesteps[:2]))]:
        values = (evaluate_nodes(its.program, nodes, call), evaluate_nodes(program, reads, call))
        for want, got in zip(*values, strict=True):
            assert relative_error(want, got.expand_as(want)) <= 2e-6


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ["unet2d-scale-shift", "pixart", "chain", "dit-labels"])
def test_cache_is_within_half_a_step(name: str, bits: int, subject: Subjects) -> None:
    its = subject(name)
    program = its.run(f"select-maintenance{{strategy=cache{bits}}},fold-cache")
    nodes = [n for n in features(its.program) if f"table.{n.name}.scale" in program.tensors]
    reads = [program.node(n.name) for n in nodes]
    assert nodes
    differs = False
    for step, t in enumerate(its.timesteps):
        call = its.call([t, t])
        values = zip(nodes, evaluate_nodes(its.program, nodes, call), evaluate_nodes(program, reads, call), strict=True)
        for node, want, got in values:
            scale = program.tensors[f"table.{node.name}.scale"]
            labels = call["class_labels"] if name in ("dit-labels",) else torch.zeros(2, dtype=torch.int64)
            half = scale.reshape(len(its.timesteps), -1)[step, labels] / 2
            half = half.reshape(-1, *[1] * (want.dim() - 1))
            assert bool(((want - got).abs() <= half * (1 + 1e-4)).all())
            differs = differs or not torch.equal(want, got.expand_as(want))
    assert differs
    stored = sum(t.nbytes for n, t in program.tensors.items() if n in {f"table.{m.name}" for m in nodes})
    values_stored = sum(t.numel() for n, t in its.run("select-maintenance{strategy=table},fold-cache").tensors.items()
                        if n in {f"table.{m.name}" for m in nodes})  # fmt: skip
    assert stored == pytest.approx(values_stored * bits / 8, rel=0.1)
    assert_text_round_trip(program, its.call(list(its.timesteps[:2])))


def test_labels_have_rows_of_their_own(subject: Subjects) -> None:
    """Every pair of timestep and label, in one batch; and a label out of the domain is refused, not misread."""
    its = subject("unet2d-labels")
    program = its.run(FOLD)
    assert plan_of(program).label_rows == {"row_class_labels": ("class_labels", 10)}
    tables = [t for n, t in program.tensors.items() if n.startswith("table.")]
    assert all(len(t) == 10 * len(its.timesteps) for t in tables)
    for t in its.timesteps:
        call = its.call([t] * 10, class_labels=torch.arange(10))
        assert relative_error(its.reference(call), first(program(**call))) <= 1e-5
    for label in (10, -1):
        with pytest.raises(ValueError, match=rf"class_labels holds {label}.*labels 0 to 9"):
            program(**its.call([its.timesteps[0]], class_labels=torch.tensor([label])))


def test_labels_and_text_together_wait_for_the_request() -> None:
    """What waits for labels and for something else has no finite set; what waits for labels alone has."""
    model, inputs = labels_and_text()
    program = Pipeline.parse("normalize,discover-tib").run(capture(model, inputs, domains={"labels": 5}))
    its = Subject("labels-and-text", model, inputs, program)
    folded = its.run(FOLD)
    plan = plan_of(folded)
    assert (len(plan.tables), len(plan.request_tables)) == (2, 1)
    assert {t.label for t in plan.tables} == {"", "labels"}
    for call in [*its.calls(), its.call([33.0, 33.0, 12.0]), its.call([33.0])]:
        assert relative_error(its.reference(call), first(folded(**call))) <= 1e-5


class LabelsAndText(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.labels, self.inner = nn.Linear(1, 6), nn.Embedding(5, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor, text: Tensor) -> Tensor:
        time = torch.sin(self.embed(t.float()[:, None] / 1000))
        both = torch.tanh(time + self.labels(labels))
        return self.inner(x) * time + self.inner(x + both) + torch.tanh(both * text) * x


def labels_and_text() -> Example:
    torch.manual_seed(0)
    noise = torch.randn(2, 6)
    return LabelsAndText().eval().requires_grad_(False), {
        "x": noise, "t": TIMES, "labels": torch.tensor([1, 4]), "text": noise.flip(0)
    }  # fmt: skip


# -- steps of several kinds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["unet2d-scale-shift", "dit-labels", "sd3"])
def test_each_step_as_it_was_chosen(name: str, subject: Subjects) -> None:
    """feature-step granularity: at each step the read is that of the strategy of this step alone."""
    its = subject(name)
    mixed = ("cache4", "fold", "cache8", "fold")
    program = its.run("fold-cache", program=with_strategies(its, mixed))
    nodes = features(its.program)
    alone = {s: its.run("fold-cache", program=with_strategies(its, (s,))) for s in ("cache4", "cache8", "table")}
    per_request = plan_of(program).request_tables
    assert bool(per_request) == (name == "sd3")
    for strategy, t in zip(mixed, its.timesteps, strict=True):
        call = its.call([t, t])
        single = alone[strategy.replace("fold", "table")]
        pairs = zip(
            evaluate_nodes(program, [program.node(n.name) for n in nodes], call),
            evaluate_nodes(single, [single.node(n.name) for n in nodes], call),
            strict=True,
        )
        assert all(torch.equal(a, b) for a, b in pairs)


def test_caches_of_two_widths_share_the_wider(subject: Subjects) -> None:
    its = subject("unet2d")
    program = its.run("fold-cache", program=with_strategies(its, ("cache4", "cache8", "cache4", "cache8")))
    tables = [t for n, t in program.tensors.items() if n.startswith("table.") and t.dim() > 1]
    assert tables and all(t.dtype == torch.int8 for t in tables)
    node = features(its.program)[0]
    steps = program.tensors[f"table.{node.name}"].flatten(1)
    assert [len(row.unique()) <= 16 for row in steps[:, :]] == [True, False, True, False] or steps.shape[1] <= 16


def test_tib_at_some_steps(subject: Subjects) -> None:
    """The block still runs where it was chosen, with its quantizers; the table answers elsewhere."""
    its = subject("unet2d-scale-shift")
    program = with_strategies(its, ("tib", "fold", "fold", "tib"))
    its.run("calibrate-finite-set{bits=8},fold-cache", program=program)
    quantized = set(program.table(Quantizer))
    assert quantized
    for call in its.calls():
        assert relative_error(its.reference(call), first(program(**call))) <= 1e-5
    assert_text_round_trip(program, its.call(list(its.timesteps[:2])))
    lowered = its.run("insert-qdq", program=program.clone())
    assert find(lowered, "tfqc.quantize")
    errors = {t: relative_error(its.reference(its.call([t])), first(lowered(**its.call([t])))) for t in its.timesteps}
    first_step, *inner, last = its.timesteps
    assert all(errors[t] <= 1e-5 for t in inner)
    assert errors[first_step] > 1e-5 and errors[last] > 1e-5
    # In a batch of both kinds, each entry goes its own way.
    both = its.call([first_step, inner[0]])
    alone = [first(lowered(**{k: v[i : i + 1] for k, v in both.items()})) for i in range(2)]
    assert relative_error(torch.cat(alone), first(lowered(**both))) <= 1e-5


class Direct(nn.Module):
    """The feature is the linear itself, and one reader takes no single row for the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out, self.inner = nn.Linear(1, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        feature = self.out(torch.tanh(self.embed(t.float()[:, None] / 1000)))
        joined = torch.cat([self.inner(x), feature], dim=1)
        return joined.reshape(-1, 2, 6).sum(1) * feature + x.mean(0, keepdim=True) * feature


def direct() -> Example:
    torch.manual_seed(0)
    return Direct().eval().requires_grad_(False), {"x": torch.randn(2, 6), "t": TIMES}


@pytest.mark.parametrize("strategy", ["fold", "table", "cache8", "cache4"])
def test_readers_that_do_not_broadcast(strategy: str) -> None:
    its = of_example("direct", direct)
    program = its.run(f"calibrate-finite-set,select-maintenance{{strategy={strategy}}},fold-cache,insert-qdq")
    assert find(program, "expand")
    tolerance = {"cache8": 0.02, "cache4": 0.3}.get(strategy, 1e-5)
    for call in its.calls():
        got = first(program(**call))
        assert got.shape == its.reference(call).shape
        assert relative_error(its.reference(call), got) <= tolerance


def test_a_feature_that_is_a_linear_keeps_its_quantizer_where_it_runs() -> None:
    its = of_example("direct", direct)
    program = with_strategies(its, ("tib", "fold", "fold", "fold"))
    text = "calibrate-weights{bits=2 skip=inner},calibrate-finite-set{bits=2},fold-cache,insert-qdq"
    its.run(text, program=program)
    assert len(find(program, "dequantize_weight")) == 2  # embed and out, which run at the first step
    errors = [relative_error(its.reference(its.call([t])), first(program(**its.call([t])))) for t in its.timesteps]
    assert errors[0] > 0.01
    assert max(errors[1:]) <= 1e-5


# -- timesteps that are not in the schedule -----------------------------------------------------------------------

OTHER = {
    "euler": lambda: EulerDiscreteScheduler(timestep_spacing="linspace"),
    "dpm": lambda: DPMSolverMultistepScheduler(),
    "ddim": lambda: DDIMScheduler(clip_sample=False),
}


def ddim10() -> Context:
    return Context(schedule=SamplingSchedule.of(DDIMScheduler(clip_sample=False), 10))


def denoise(denoiser: Any, its: Subject, sampler: str, steps: int = 7) -> Tensor:
    noisy = its.discovered.input(Role.SAMPLE)[0].path[0]
    latents = initial_noise(2, tuple(its.inputs[noisy].shape[1:]), 0)
    skip = {i.path[0] for role in (Role.SAMPLE, Role.TIME) for i in its.discovered.input(role)}
    cond = {k: v for k, v in its.inputs.items() if k not in skip}
    time = its.discovered.input(Role.TIME)[0].path[0]

    def by_name(x: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
        output = first(denoiser(**{noisy: x, time: t.expand(len(x)), **conditions}))
        return output[:, : x.shape[1]]  # PixArt predicts a variance beside

    return sample(by_name, OTHER[sampler](), steps=steps, latents=latents, cond=cond)


def count_time_calls(program: Program, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    stepper = interpreter(program)
    time, seen = stepper.time, []
    name = program.input(Role.TIME)[0].name
    assert time is not None

    def counted(**values: Tensor) -> Any:
        seen.append(float(values[name][0]))
        return time(**values)

    monkeypatch.setattr(stepper, "time", counted)
    return seen


@pytest.mark.parametrize(
    ("name", "sampler"), [("unet-sd", "euler"), ("unet2d-labels", "dpm"), ("unet2d", "ddim"), ("pixart", "euler")]
)
def test_recompute_with_another_sampler(
    name: str, sampler: str, subject: Subjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    its = subject(name)
    program = its.run(FOLD, ddim10())
    seen = count_time_calls(program, monkeypatch)
    want = denoise(its.model, its, sampler)
    assert relative_error(want, denoise(program, its, sampler)) <= 1e-4
    assert len(seen) == len(set(seen)) >= 5  # once per unknown timestep
    denoise(program, its, sampler)
    assert len(seen) == len(set(seen))  # and never again
    assert denoise(program, its, "ddim", 10).shape == want.shape
    assert len(seen) == len(set(seen))


def test_request_tables_with_another_sampler(subject: Subjects) -> None:
    for name in ("unet2d-classes", "sd3", "dit"):
        its = subject(name)
        program = its.run(FOLD, ddim10())
        if name == "unet2d-classes":
            assert relative_error(denoise(its.model, its, "euler"), denoise(program, its, "euler")) <= 1e-4
        for t in ([500.0], [500.0, 13.0], [13.5, 500.0, 901.0]):
            call = its.call(t)
            assert relative_error(its.reference(call), first(program(**call))) <= 1e-5


@pytest.mark.parametrize("strategy", ["cache8", "cache4", "table", "fold"])
@pytest.mark.parametrize("name", ["unet2d", "dit-labels"])
def test_unknown_rows_are_kept_as_known_ones(name: str, strategy: str, subject: Subjects) -> None:
    """A timestep that came later gives bit for bit what it gives as part of the schedule."""
    its = subject(name)
    text = f"select-maintenance{{strategy={strategy}}},fold-cache"
    late, known = its.run(text), its.run(text, Context(schedule=SamplingSchedule((*its.timesteps[:-1], 300.0, 37.0))))
    for t in ([300.0], [300.0, 300.0], [300.0, 951.0, 37.0]):
        call = its.call(t)
        assert relative_error(first(known(**call)), first(late(**call))) <= 1e-5
        if strategy.startswith("cache"):
            assert relative_error(its.reference(call), first(late(**call))) > 1e-5


@pytest.mark.parametrize("name", ["unet2d", "unet2d-labels", "flux"])
def test_nearest(name: str, subject: Subjects) -> None:
    its = subject(name)
    program = its.run("select-maintenance,fold-cache{policy=nearest}")
    scale = 1000 if its.fractional else 1
    pairs = [(930, 951), (830, 951), (820, 701), (0, 37), (999, 951), (421, 421)]
    for t, near in pairs:
        want, got = its.reference(its.call([near / scale])), first(program(**its.call([t / scale])))
        assert relative_error(want, got) <= 1e-5
    mixed = [930 / scale, 421 / scale, 2 / scale]
    want = its.reference(its.call([951 / scale, 421 / scale, 37 / scale]))
    assert relative_error(want, first(program(**its.call(mixed)))) <= 1e-5


@pytest.mark.parametrize("name", ["unet2d", "dit", "dit-labels"])
def test_error(name: str, subject: Subjects) -> None:
    its = subject(name)
    program = its.run("select-maintenance,fold-cache{policy=error}")
    first(program(**its.call([951.0, 37.0])))
    for t in ([950.0], [951.0, 950.0], [950.5]):
        with pytest.raises(ValueError, match=r"Timestep 950\S* is not in the schedule of 4 steps"):
            program(**its.call(t))


def test_fractions_between_integers(subject: Subjects) -> None:
    its = subject("unet2d")
    program = its.run(FOLD)
    for t in ([420.5], [420.5, 951.0], [421.0, 421.5, 0.25]):
        call = its.call(t)
        assert relative_error(its.reference(call), first(program(**call))) <= 1e-5


@pytest.mark.parametrize("name", ["unet2d", "unet2d-classes", "unet2d-labels"])
def test_rows_do_not_grow_without_end(name: str, subject: Subjects, monkeypatch: pytest.MonkeyPatch) -> None:
    its = subject(name)
    program = its.run(FOLD)
    stepper = interpreter(program)
    monkeypatch.setattr(stepper, "MAX_EXTRA_ROWS", 4)
    sizes = [t for n, t in stepper._modules_by_name["step"].named_buffers() if n.startswith("table")]
    calls = [[float(t)] for t in range(100, 107)] + [[103.0, 951.0], [1.0, 2.0, 100.0], [5.0, 6.0, 7.0], [8.0, 5.0]]
    for t in calls * 2:
        call = its.call(t)
        assert relative_error(its.reference(call), first(program(**call))) <= 1e-5
        assert len(stepper._known) <= len(its.timesteps) + 4
        now = [t for n, t in stepper._modules_by_name["step"].named_buffers() if n.startswith("table")]
        per_step = {len(a) // len(its.timesteps) for a in sizes}
        assert all(len(b) <= 8 * max(per_step) for b in now)


def test_policy_is_an_option_of_two_words() -> None:
    assert str(FoldCache(policy="nearest")) == "fold-cache{policy=nearest}"
