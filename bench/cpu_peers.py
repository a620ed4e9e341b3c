"""What competes in the CPU benchmark: each peer prepares files once and then runs network steps from them.

`prepare` and `load` run in processes of their own (see `cpu.py`), so nothing here cleans up after itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from cpu_models import STEPS, TIMESTEP, Case, Flat, flat
from torch import Tensor

import tfqc
from tfqc.models.spec import ModelSpec

Inputs = Mapping[str, Any]
Step = Callable[[Inputs], Tensor]


class Peer(Protocol):
    """One row of the table.

    note: what the table says below about it. memory, preparing: the most that `load` and a step, or `prepare`, take, in
    multiples of the fp32 weights: a run that would not fit is not started.
    """

    note: str
    memory: float
    preparing: float

    def prepared(self, case: Case) -> Path | None:
        """What `prepare` makes and `load` reads; None if there is nothing to prepare."""
        ...

    def prepare(self, case: Case) -> None:
        """Make it, whole or not at all."""
        ...

    def load(self, case: Case, threads: int) -> Step:
        """A function from the inputs of `Case.inputs` to the output."""
        ...


@dataclass(frozen=True)
class Torch:
    """The diffusers model as it is, or compiled by inductor with its weights frozen in."""

    dtype: torch.dtype
    compiled: bool = False
    note: str = ""
    preparing: float = 0.0

    @property
    def memory(self) -> float:
        """Frozen weights are packed, and inductor holds more than one copy while it packs them."""
        return (4.0 if self.compiled else 1.2) * self.dtype.itemsize / 4

    def prepared(self, case: Case) -> None:
        """Nothing: inductor keeps its own cache."""

    def prepare(self, case: Case) -> None:
        """Nothing."""

    def load(self, case: Case, threads: int) -> Step:
        """The model, compiled at its first call."""
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(case.work / "inductor")
        model = Flat(case.load(self.dtype), case.inputs())
        if self.compiled:
            from torch._inductor import config

            config.freezing = True
            model = torch.compile(model)

        def step(inputs: Inputs) -> Tensor:
            tensors = flat(inputs).values()
            return model(*(t.to(self.dtype) if t.is_floating_point() else t for t in tensors))

        return step


@dataclass(frozen=True)
class TorchInt8:
    """PT2E: exported, quantized for x86 by torchao, compiled by inductor. Needs torchao, which tfqc does not.

    Static u8 activations per tensor (calibrated by one forward), s8 weights per channel, everything else fp32: autocast
    to bf16 fails on the dtype asserts of exported graphs. There is nothing to save in between, so every process
    quantizes again and `load` is slow.
    """

    note: str = "PT2E through torchao and inductor; rest fp32"
    memory: float = 4.0
    preparing: float = 0.0

    def prepared(self, case: Case) -> None:
        """Nothing: a quantized program cannot be saved before inductor has compiled it."""

    def prepare(self, case: Case) -> None:
        """Nothing."""

    def load(self, case: Case, threads: int) -> Step:
        """The quantized model, compiled at its first call."""
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(case.work / "inductor")
        from torch._inductor import config
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

        example = case.inputs()
        tensors = tuple(flat(example).values())
        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
        exported = torch.export.export(Flat(case.load(), example), tensors, strict=True).module()
        observed = prepare_pt2e(exported, quantizer)
        observed(*tensors)
        config.freezing = True
        model = torch.compile(convert_pt2e(observed))
        return lambda inputs: model(*flat(inputs).values())


@dataclass(frozen=True)
class OpenVino:
    """The traced model, in the precision of the hint."""

    hint: str
    note: str = ""
    memory: float = 1.4
    preparing: float = 1.5

    def fp32(self, case: Case) -> Path:
        """The intermediate representation in fp32."""
        return case.home / "openvino" / f"fp32-{case.sizes}.xml"

    def prepared(self, case: Case) -> Path:
        """The intermediate representation that is run."""
        return self.fp32(case)

    def prepare(self, case: Case) -> None:
        """Trace and convert."""
        import openvino

        inputs = case.example()
        tensors = tuple(flat(inputs).values())
        # OpenVINO would trace by itself, but then freezes the graph, which takes minutes.
        traced = torch.jit.trace(Flat(case.load(), inputs), tensors, check_trace=False)
        graph = openvino.convert_model(traced, example_input=tensors)
        save_graph(graph, self.fp32(case))

    def load(self, case: Case, threads: int) -> Step:
        """The graph, compiled for the shapes of the inputs."""
        import openvino

        graph = openvino.Core().read_model(self.prepared(case))
        graph.reshape(shapes(graph, case.inputs()))
        settings = {
            "INFERENCE_PRECISION_HINT": self.hint,
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
        }
        compiled = openvino.compile_model(graph, "CPU", settings)
        return lambda inputs: torch.from_numpy(compiled(arrays(inputs))[0])


@dataclass(frozen=True)
class OpenVinoInt8(OpenVino):
    """The graph of `OpenVino`, with int8 for all convolutions and matrix products; the rest in the hint's precision.

    The graph is edited directly: NNCF makes the same graph but holds several copies of it. Activations are FakeQuantize
    per tensor over the range that one forward showed (speed does not depend on ranges), symmetric where they take both
    signs: that was as fast as zero points or faster. Weights are int8 constants with a scale for each output channel.
    """

    attention: bool = False
    memory: float = 0.6
    preparing: float = 1.2

    def prepared(self, case: Case) -> Path:
        """The quantized intermediate representation."""
        name = "int8-attention" if self.attention else "int8"
        return case.home / "openvino" / f"{name}-{case.sizes}.xml"

    def prepare(self, case: Case) -> None:
        """Convert, observe ranges, edit."""
        import openvino

        if not self.fp32(case).exists():
            super().prepare(case)
        graph = openvino.Core().read_model(self.fp32(case))
        if self.attention:
            spell_out_attention(graph)
        quantize(graph, case.example())
        save_graph(graph, self.prepared(case))


@dataclass(frozen=True)
class OnnxRuntimeInt8:
    """Static QDQ quantization by onnxruntime: activations u8 per tensor, weights s8 per channel, rest fp32."""

    note: str = "QDQ, static; rest fp32"
    memory: float = 3.0
    preparing: float = 10.0

    def prepared(self, case: Case) -> Path:
        """The quantized graph."""
        return case.home / "onnxruntime" / f"b{case.batch}-l{case.latent}" / "int8.onnx"

    def prepare(self, case: Case) -> None:
        """Export at the shapes of the case, then quantize with its inputs."""
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        path = self.prepared(case)
        path.parent.mkdir(parents=True, exist_ok=True)
        inputs = case.inputs()
        names = [name.replace(".", "_") for name in flat(inputs)]
        exported, ready = path.with_name("exported.onnx"), path.with_name("ready.onnx")
        model = Flat(case.load(), inputs)
        torch.onnx.export(model, tuple(flat(inputs).values()), exported, input_names=names, dynamo=True)
        quant_pre_process(exported, ready)

        class Once(CalibrationDataReader):
            def __init__(self) -> None:
                self.rows = iter([dict(zip(names, arrays(inputs), strict=True))])

            def get_next(self) -> dict[str, np.ndarray] | None:
                return next(self.rows, None)

        part = path.with_suffix(".part")
        quantize_static(
            ready,
            part,
            Once(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        part.rename(path)

    def load(self, case: Case, threads: int) -> Step:
        """A session."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(self.prepared(case), options, providers=["CPUExecutionProvider"])
        names = [i.name for i in session.get_inputs()]
        return lambda inputs: torch.from_numpy(session.run(None, dict(zip(names, arrays(inputs), strict=True)))[0])


@dataclass(frozen=True)
class Tfqc:
    """An artifact of this compiler: folded for thirty timesteps, calibrated on one image, for all sizes if it can be.

    What depends on the request alone is computed by the warm-up, as it is once an image when sampling.
    """

    target: str
    note: str = ""
    memory: float = 1.5
    preparing: float = 1.7

    def prepared(self, case: Case) -> Path:
        """The artifact."""
        name = "".join(c if c.isalnum() else "-" for c in self.target)
        return case.home / "tfqc" / f"{name}-{case.sizes}"

    def prepare(self, case: Case) -> None:
        """Compile and save."""
        from diffusers import DDIMScheduler

        schedule = DDIMScheduler()
        schedule.set_timesteps(STEPS)
        assert TIMESTEP in schedule.timesteps
        part = self.prepared(case).with_suffix(".part")
        inputs = case.example(batch=2)  # one image more than one: the batch is symbolic
        sizes = {case.architecture.sample: {2: "H", 3: "W"}} if case.architecture.any_size else None
        spec = ModelSpec(case.model, case.load(), inputs, dynamic=sizes)
        tfqc.compile(spec, target=self.target, schedule=schedule, steps=STEPS, calibration=1).save(part)
        part.rename(self.prepared(case))

    def load(self, case: Case, threads: int) -> Step:
        """The artifact's model, called like the diffusers model."""
        model = tfqc.load(self.prepared(case))
        return lambda inputs: model(**inputs, return_dict=False)[0]


def peers(targets: Sequence[str]) -> dict[str, Peer]:
    """All peers by name, in the order of the table; one of tfqc for each target."""
    int8 = "all convolutions and linears"
    return {
        "torch-fp32": Torch(torch.float32),
        "torch-bf16": Torch(torch.bfloat16),
        "torch-compile-fp32": Torch(torch.float32, compiled=True),
        "torch-compile-bf16": Torch(torch.bfloat16, compiled=True),
        "torch-int8": TorchInt8(),
        "openvino-fp32": OpenVino("f32"),
        "openvino-bf16": OpenVino("bf16"),
        "openvino-int8": OpenVinoInt8("bf16", note=f"{int8}; rest bf16"),
        "openvino-int8-attention": OpenVinoInt8(
            "bf16", note=f"{int8}, products of attention; rest bf16", attention=True
        ),
        "onnxruntime-int8": OnnxRuntimeInt8(),
        **{f"tfqc {target}": Tfqc(target) for target in targets},
    }


def arrays(inputs: Inputs) -> list[np.ndarray]:
    """The tensors of a call, by position."""
    return [tensor.numpy() for tensor in flat(inputs).values()]


def shapes(graph: Any, inputs: Inputs) -> dict[Any, list[int]]:
    """The shape of each input of an OpenVINO graph."""
    return {port: list(tensor.shape) for port, tensor in zip(graph.inputs, flat(inputs).values(), strict=True)}


def save_graph(graph: Any, path: Path) -> None:
    """Write the weights, then the graph: if it is there, both are whole."""
    import openvino

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.stem}.part.xml")
    openvino.save_model(graph, part, compress_to_fp16=False)
    part.with_suffix(".bin").rename(path.with_suffix(".bin"))
    part.rename(path)


def spell_out_attention(graph: Any) -> None:
    """Replace ScaledDotProductAttention (unmasked, in all our models) by the products that it stands for."""
    from openvino import opset13 as ops

    for op in graph.get_ordered_ops():
        if op.get_type_name() != "ScaledDotProductAttention":
            continue
        query, key, value = (op.input_value(i) for i in range(3))
        width = query.get_partial_shape()[-1].get_length()
        scores = ops.matmul(ops.multiply(query, np.float32(width**-0.5)), key, False, True)
        op.output(0).replace(ops.matmul(ops.softmax(scores, -1), value, False, False).output(0))
    graph.validate_nodes_and_infer_types()


def quantize(graph: Any, inputs: Inputs) -> None:
    """Put int8 on all inputs of all Convolutions and MatMuls of an OpenVINO graph, in place."""
    from openvino import opset13 as ops

    users: dict[tuple[str, int], list[Any]] = {}  # an activation that feeds three products is quantized once
    weights: list[Any] = []
    for op in graph.get_ordered_ops():
        if op.get_type_name() not in ("Convolution", "MatMul"):
            continue
        for port in op.inputs():
            source = port.get_source_output()
            if source.get_node().get_type_name() == "Constant":
                weights.append(port)
            else:
                users.setdefault((source.get_node().get_name(), source.get_index()), []).append(port)
    activations = [ports[0].get_source_output() for ports in users.values()]
    ranges = observe(graph, activations, inputs)
    for activation, ports, (low, high) in zip(activations, users.values(), ranges, strict=True):
        bound = max(-low, high, 1e-3)
        low, high = (np.float32(0), np.float32(bound)) if low >= 0 else np.float32([-bound, bound * 127 / 128])
        quantized = ops.fake_quantize(activation, low, high, low, high, 256)
        for port in ports:
            port.replace_source_output(quantized.output(0))
    for port in weights:
        value = port.get_source_output().get_node().get_data()  # [out, in, ...]: MatMul comes with transpose_b
        scale = np.abs(value).max(axis=tuple(range(1, value.ndim)), keepdims=True) / np.float32(127)
        constant = ops.convert(ops.constant(np.round(value / scale).astype(np.int8)), "f32")
        port.replace_source_output(ops.multiply(constant, ops.constant(scale)).output(0))
    graph.validate_nodes_and_infer_types()


def observe(graph: Any, activations: list[Any], inputs: Inputs) -> list[tuple[float, float]]:
    """Least and greatest value of each activation in one forward."""
    import openvino
    from openvino import opset13 as ops

    ends: list[Any] = []
    for activation in activations:
        axes = np.arange(len(activation.get_partial_shape()))
        ends += [ops.reduce_min(activation, axes), ops.reduce_max(activation, axes)]
    probe = openvino.Model(ends, graph.get_parameters())
    found = openvino.compile_model(probe, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})(arrays(inputs))
    values = [float(v.item()) for v in found.values()]
    return list(zip(values[::2], values[1::2], strict=True))
