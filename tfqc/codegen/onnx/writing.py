"""From a lowered program to an ONNX model: torch.onnx writes ATen, we write quantization; tensors stay outside."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Generator
from typing import Any

import torch
from torch.utils import _pytree as pytree

from tfqc.codegen.onnx.extra import needed
from tfqc.codegen.onnx.operations import OPSET, instead, translations
from tfqc.errors import TfqcError
from tfqc.files.storage import places_of
from tfqc.ir.flat import nested
from tfqc.ir.program import Program
from tfqc.ir.pt2 import exported_program
from tfqc.ir.views import StoredInt4, StoredWeight
from tfqc.runtime import buffer_name
from tfqc.runtime.packing import unpack_int4

WEIGHTS = "weights.safetensors"
_SMALL = 1024  # bytes of a tensor that stands in the model's own file


def onnx_model(program: Program) -> bytes:
    """A lowered program as a model that stands beside its tensors, as `write_tensors` puts them into
    `weights.safetensors`: large ones are read from there, by place and length.

    Raises:
        TfqcError: torch.onnx does not write one of its operations.
    """
    plain, packed = _unpacked(program)
    exported = exported_program(plain, instead(), one_row=True)
    try:
        with warnings.catch_warnings(), _without_log_lines():
            warnings.simplefilter("ignore")  # of torch.onnx, about itself
            written = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=OPSET,
                custom_translation_table=translations(),
                external_data=False,
                optimize=True,
                verbose=False,
            )
    except Exception as error:
        cause = error
        while cause.__cause__ is not None:  # the outer ones say at which step of an export they were raised
            cause = cause.__cause__
        why = next(iter(str(cause).splitlines()), "").rstrip(".")
        raise TfqcError(f"torch.onnx does not write {program.model}: {why[:300]}.") from error
    assert written is not None
    model: Any = written.model
    names = pytree.tree_leaves(nested(program, {i.name: i.name for i in program.inputs}))
    for value, name in zip(model.graph.inputs, names, strict=True):
        value.name = name
    for value in model.graph.outputs:
        if value.name in names:  # an input that is returned as it is, which torch.onnx calls so twice
            value.name = f"{value.name}.returned"
    _forget(model)
    _keep_outside(model, program, packed)
    return needed("onnx_ir").to_proto(model).SerializeToString(deterministic=True)


@contextlib.contextmanager
def _without_log_lines() -> Generator[None]:
    """Without what torch.onnx says of packages that are not installed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(max(level, logging.ERROR))
    try:
        yield
    finally:
        logger.setLevel(level)


def _forget(model: Any) -> None:
    """Take out what torch.onnx notes at each operation: paths of this machine."""
    model.producer_name, model.producer_version = "tfqc", None
    for item in (model, model.graph, *model.graph, *model.graph.initializers.values(), *model.graph.inputs):
        item.metadata_props.clear()
    for function in model.functions.values():
        for item in (function, *function):
            item.metadata_props.clear()
    for node in model.graph:
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()


def _unpacked(program: Program) -> tuple[Program, dict[str, str]]:
    """A copy in which 4-bit weights are codes of a byte, which torch.onnx knows, and whose codes are which packed ones.

    Where zero points are not zero they stay codes of a byte: those of DequantizeLinear have the type of its codes.
    """
    copy, packed = program.clone(), dict[str, str]()
    for function in copy.functions:
        for node in copy.nodes(function):
            stored, int4 = StoredWeight.of(node), StoredInt4.of(node)
            if stored is None or int4 is None:
                continue
            source, scale = str(int4.packed.target), copy.tensors[str(stored.scale.target)]
            shape = [int(size) for size in int4.shape if isinstance(size, int)]
            codes = unpack_int4(copy.tensors[source], shape)
            operands = {k: v for k, v in node.kwargs.items() if k != "packed"}
            if bool(copy.tensors[str(stored.zero_point.target)].any()):
                node.target = torch.ops.tfqc.dequantize_weight.default
                del operands["shape"]
                operand, name = "codes", copy.add_tensor(f"{source}.codes", codes)
            else:
                flat = codes if scale.shape[1] == 1 else codes.flatten(1)  # groups are along the row
                operand, name = "packed", copy.add_tensor(f"{source}.codes", flat)
                packed[name] = source
            node.kwargs = {operand: copy.tensor_node(name, function), **operands}
    return copy, packed


def _keep_outside(model: Any, program: Program, packed: dict[str, str]) -> None:
    """Let initializers that are tensors of the program be read from their file; 4-bit ones as they are packed there."""
    ir, places = needed("onnx_ir"), places_of(program.tensors)
    known = {buffer_name(name): name for name in (*program.tensors, *packed)}
    for full, value in model.graph.initializers.items():
        name = known.get(full.rpartition(".")[2])
        tensor: Any = value.const_value
        if name is None or tensor is None:
            continue
        start, length = places[packed.get(name, name)]
        if name in packed:
            dtype = value.dtype = ir.DataType.INT4
        elif list(tensor.shape) == list(program.tensors[name].shape) and tensor.nbytes == length >= _SMALL:
            dtype = tensor.dtype
        else:
            continue
        value.const_value = ir.ExternalTensor(WEIGHTS, start, length, dtype, shape=tensor.shape, name=full)
