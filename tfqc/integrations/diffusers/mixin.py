"""Diffusers' own way to quantize: `from_pretrained(..., quantization_config=TfqcConfig())`, behind one `register()`."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from tfqc.errors import SpecError, TfqcError, suggest
from tfqc.integrations.diffusers.layers import Int8Layer, replace_layers, restore_layers
from tfqc.quant.step_policy import policy_in
from tfqc.version import __version__

_TARGETS = ("cpu-int8",)
_STORED = ("quant_method", "version", "runtime")  # what a config.json holds beside
_WEIGHT, _SCALE = "weight", "weight_scale"


class TfqcMethod(StrEnum):
    """The name under which diffusers knows it; diffusers asks for a str that has a `value`."""

    TFQC = "tfqc"


class TfqcConfig(QuantizationConfigMixin):
    """Weights in 8 bits, without data, while they are read: `Model.from_pretrained(dir, quantization_config=this)`.

    What happens when: *at loading* each weight of a linear layer or a convolution becomes int8 codes and a scale for
    each output (min-max) as soon as it has been read, so the model is never held whole in floating point. *In a call*
    the layers compute in the model's dtype with what the codes stand for: a model of a third to a quarter of the size
    that is no faster. Nothing is known of activations and of time yet: `tfqc.quantize(pipe)` runs the pipeline, and
    compiles the same codes for kernels, with temporal features kept. *Saved* it is a model of diffusers with
    `quantization_config` in its config.json, which is loaded without a config once `register()` has been called.

    Args:
        target: whose weights these are; `cpu-int8`.
        modules_to_not_convert: names of modules, or parts of them between dots, whose layers stay as they are; so do
            those that the model itself keeps in float32.
        facts: `runtime`, with the `diffusion_step_policy` that `tfqc.quantize(pipe)` carries out.

    Raises:
        SpecError: another target, or a `runtime` that is no step policy.
        TfqcError: the config of a compiled model, which is loaded in another way.
    """

    def __init__(
        self, target: str = "cpu-int8", modules_to_not_convert: list[str] | str | None = None, **facts: Any
    ) -> None:
        if "model_class" in facts:
            raise TfqcError(
                "This is a compiled model, no quantized one of diffusers: load it with "
                "tfqc.TfqcDenoiser.from_pretrained."
            )
        if target not in _TARGETS:
            raise SpecError(
                f"target={target!r} has no weights that diffusers could load: use {' or '.join(_TARGETS)}, and give "
                "options of a target to tfqc.quantize(pipe, target)."
            )
        if strange := [name for name in facts if name not in _STORED]:
            raise SpecError(
                f"TfqcConfig takes no {strange[0]!r}: weights have 8 bits; target and modules_to_not_convert are taken."
            )
        names: Any = modules_to_not_convert or ()  # a config.json may hold anything
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise SpecError(f"modules_to_not_convert={modules_to_not_convert!r} is no list of names of modules.")
        self.quant_method = TfqcMethod.TFQC  # pyright: ignore[reportAttributeAccessIssue] (its enumeration is closed)
        self.target, self.version = target, facts.get("version", __version__)
        self.modules_to_not_convert = list(names)
        if facts.get("runtime") is not None:  # nothing here quantizes activations; `tfqc.quantize(pipe)` does
            policy_in(facts)
            self.runtime = facts["runtime"]

    def to_diff_dict(self) -> dict[str, Any]:
        """All of it: there is little."""
        return self.to_dict()


class TfqcQuantizer(DiffusersQuantizer):
    """What diffusers calls while it loads a model with a `TfqcConfig`."""

    use_keep_in_fp32_modules = True

    def __init__(self, quantization_config: TfqcConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.modules_to_not_convert: list[str] = list(quantization_config.modules_to_not_convert)
        self.dtype = torch.float32

    @property
    def is_serializable(self) -> Any:
        """It can be saved and loaded."""
        return True

    @property
    def is_trainable(self) -> Any:
        """Adapters beside its layers can be trained; codes cannot."""
        return True

    @property
    def is_compileable(self) -> bool:
        """`torch.compile` takes it whole."""
        return True

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        """Of what is not quantized; float32 by default."""
        self.dtype = torch_dtype or torch.float32
        return self.dtype

    def adjust_target_dtype(self, torch_dtype: torch.dtype) -> torch.dtype:
        """What sizes are estimated with."""
        del torch_dtype
        return torch.int8

    def _process_model_before_weight_loading(
        self, model: Any, keep_in_fp32_modules: list[str] | None = None, **kwargs: Any
    ) -> None:
        names = [name for name, _ in model.named_modules()]
        keys = sorted({key for name in names for key in name.split(".")} - {""})
        for part in self.modules_to_not_convert:
            if not any(_within(name, part) for name in names):
                raise SpecError(
                    f"modules_to_not_convert names {part!r}, which is no module of {type(model).__name__}, nor a part "
                    f"of a name of one.{suggest(part, keys)}"
                )
        self.modules_to_not_convert += keep_in_fp32_modules or []
        if not replace_layers(model, lambda name: not any(_within(name, m) for m in self.modules_to_not_convert)):
            raise TfqcError(
                f"{type(model).__name__} has no linear layer or convolution to quantize"
                f"{' outside of modules_to_not_convert' if self.modules_to_not_convert else ''}: load it without a "
                "TfqcConfig."
            )
        model.config.quantization_config = self.quantization_config

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, module in model.named_modules():
            for part in (_WEIGHT, _SCALE) if isinstance(module, Int8Layer) else ():
                if getattr(module, part).is_meta and not hasattr(module, "_hf_hook"):  # a hook may have offloaded it
                    raise ValueError(f"The model's files hold no {name}.{part}: they are not whole.")
        return model

    def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
        """Scales are made here, unless the model was quantized before."""
        return [k for k in missing_keys if self.pre_quantized or k.rpartition(".")[2] != _SCALE]

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Scales as integers of the same bits, so that diffusers does not round them to the model's dtype."""
        return {k: v.view(torch.int32) if _is_scale(k, v) else v for k, v in state_dict.items()}

    def check_if_quantized_param(
        self, model: Any, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        """True for weights and scales of layers that hold codes."""
        layer, part = _split(model, param_name)
        return isinstance(layer, Int8Layer) and part in (_WEIGHT, _SCALE)

    def create_quantized_param(  # pyright: ignore[reportIncompatibleMethodOverride] (what it returns is not used)
        self, model: Any, param_value: Tensor, param_name: str, target_device: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Take codes or a scale as they were stored, or quantize a weight.

        Raises:
            ValueError: what is stored is neither, or has not the layer's shape.
        """
        layer, part = _split(model, param_name)
        assert isinstance(layer, Int8Layer)
        value = param_value.to(target_device)
        if value.shape != (wanted := getattr(layer, part).shape):  # else they would be broadcast
            raise ValueError(
                f"{param_name} is {_size(value.shape)} in the model's files, and the model's {_size(wanted)}."
            )
        if part == _SCALE:
            if value.dtype not in (torch.float32, torch.int32):  # `maybe_update_state_dict`
                raise ValueError(f"{param_name} holds {value.dtype}, and scales are float32.")
            layer.take_scale(value.view(torch.float32))
        elif not self.pre_quantized:
            layer.take_weight(value)
        elif value.dtype == torch.int8:
            layer.take_codes(value)
        else:
            raise ValueError(f"{param_name} holds {value.dtype}, and the model's config says that it holds int8 codes.")

    def _dequantize(self, model: Any) -> Any:
        restore_layers(model, self.dtype)
        rest = {name: value for name, value in model.config.items() if name != "quantization_config"}
        model._internal_dict = FrozenDict(rest)
        return model


def register() -> None:
    """Let diffusers know `TfqcConfig`, in `from_pretrained` and in `PipelineQuantizationConfig(quant_mapping=...)`."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[TfqcMethod.TFQC.value] = TfqcConfig  # pyright: ignore[reportArgumentType]
    AUTO_QUANTIZER_MAPPING[TfqcMethod.TFQC.value] = TfqcQuantizer  # pyright: ignore[reportArgumentType]


def _within(name: str, part: str) -> bool:
    return f".{part}." in f".{name}."


def _split(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    layer, _, part = name.rpartition(".")
    return model.get_submodule(layer), part


def _size(shape: torch.Size) -> str:
    return "x".join(map(str, shape)) or "one number"


def _is_scale(name: str, value: Any) -> bool:
    return name.rpartition(".")[2] == _SCALE and isinstance(value, Tensor) and value.dtype == torch.float32
