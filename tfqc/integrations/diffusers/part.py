"""What a pipeline has beside its denoiser, compiled: a text encoder, or the two halves of an autoencoder.

It stays the model that it was, of its own class, and answers as that does; modules within it (or all of it) compute
what was compiled. Their weights are gone. A pipeline's `model_index.json` names it as `["tfqc", "TfqcPart"]`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor
from transformers import PreTrainedModel

from tfqc.codegen.artifact import copy_artifact
from tfqc.driver import load
from tfqc.errors import ArtifactError, TfqcError
from tfqc.files.storage import parse_json, read_tensors, read_text, write_tensors, write_text
from tfqc.integrations.diffusers.denoiser import ARTIFACT, placed
from tfqc.integrations.diffusers.names import class_of, full_name
from tfqc.integrations.diffusers.refusing import CHANGING, refuse
from tfqc.version import __version__

CONFIG, TENSORS = "config.json", "model.safetensors"
_FACTS = "quantization_config"


class TfqcPart(ModelMixin, ConfigMixin):
    """A model some of whose modules are compiled; attributes and methods are the model's.

    Args:
        model: of diffusers or transformers; it is changed.
        artifacts: directories by the names of modules in it; "" is the model itself.
    """

    config_name = CONFIG

    def __init__(self, model: Any, artifacts: Mapping[str, Path]) -> None:
        super().__init__()
        dtype = str(model.dtype).removeprefix("torch.")
        self.model = model
        self.facts = {
            "quant_method": "tfqc", "version": __version__, "model_class": full_name(type(model)), "dtype": dtype,
            "compiled": sorted(artifacts),
        }  # fmt: skip
        self._parameters_before = sum(parameter.numel() for parameter in model.parameters())
        self.artifacts = {place: Path(directory).resolve() for place, directory in artifacts.items()}
        self._running = {place: load(directory) for place, directory in self.artifacts.items()}
        self.kept: Any = None  # a temporary directory that the artifacts lie in
        for place, compiled in self._running.items():
            module = model.get_submodule(place)
            _empty(module)
            module.forward = compiled.__call__
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns."""
        self._follow()  # to where hooks have moved what they see of it
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    @property
    def config(self) -> Any:
        """The model's."""
        return self.model.config

    @property
    def dtype(self) -> torch.dtype:
        """The model's, of what is not compiled; compiled modules take every dtype, and return it."""
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next((t.device for t in self.model.parameters()), torch.device("cpu"))

    def __deepcopy__(self, memo: dict[int, Any]) -> TfqcPart:
        made = type(self)(copy.deepcopy(self.model, memo), self.artifacts)
        made.kept, made._parameters_before = self.kept, self._parameters_before
        return made

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TfqcPart:
        super()._apply(fn, recurse)
        self._follow()
        return self

    def _follow(self) -> None:
        """Go where hooks have moved what they see of it."""
        device = self.device
        for compiled in self._running.values():
            if device.type != "meta" and device != next((t.device for t in compiled.buffers()), device):
                compiled.to(device)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Of the model that was compiled; none of them is trained."""
        return 0 if only_trainable else self._parameters_before

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of all tensors, compiled or not."""
        models = (self.model, *self._running.values())
        return sum(t.numel() * t.itemsize for model in models for t in (*model.parameters(), *model.buffers()))

    def to(self, *args: Any, **kwargs: Any) -> TfqcPart:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As any module; what is compiled takes every dtype."""
        torch.nn.Module.to(self, *args, **kwargs)
        return self

    def unload_lora(self) -> None:
        """Nothing: there is none."""

    def extra_repr(self) -> str:
        """What of it is compiled."""
        return f"compiled by tfqc: {', '.join(place or 'all of it' for place in self.artifacts)}"

    # -- files ------------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Write `config.json`, what is not compiled (`model.safetensors`), and the artifacts in directories beside it.

        Raises:
            TfqcError: it is to be pushed to a hub.
        """
        if kwargs.get("push_to_hub"):
            raise TfqcError("A compiled model is not pushed to a hub from here: save it, and upload the directory.")
        target = Path(save_directory)
        target.mkdir(parents=True, exist_ok=True)
        for place, directory in self.artifacts.items():
            copy_artifact(directory, target / _folder(place))
        write_tensors(target / TENSORS, {name: t.contiguous() for name, t in self.model.state_dict().items()})
        own = self.config.to_dict() if hasattr(self.config, "to_dict") else dict(self.config)
        config = {"_class_name": type(self).__name__, _FACTS: self.facts, "model": own}
        write_text(target / CONFIG, json.dumps(config, indent=2, sort_keys=True, default=str) + "\n")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *args: Any, subfolder: str = "", **kwargs: Any
    ) -> TfqcPart:
        """Load what `save_pretrained` wrote. Arguments of diffusers that say how weights are read have no meaning here.

        Args:
            torch_dtype: of what is not compiled; as it was saved by default.

        Raises:
            ArtifactError: there is no such thing, or its files have changed.
        """
        directory = Path(pretrained_model_name_or_path) / (subfolder or "")
        found = parse_json(read_text(directory / CONFIG, ArtifactError), f"{directory / CONFIG}", ArtifactError)
        match found:
            case {
                "quantization_config": {
                    "quant_method": "tfqc", "model_class": str(name), "dtype": str(dtype), "compiled": list(places)
                },
                "model": dict(config),
            } if all(isinstance(place, str) for place in places):  # fmt: skip
                pass
            case _:
                raise ArtifactError(f"{directory / CONFIG} is not that of a part which tfqc compiled.")
        model = _without_values(name, config, dtype)
        tensors, own = read_tensors(directory / TENSORS, ArtifactError)[0], model.state_dict()
        if strange := [n for n, t in tensors.items() if n not in own or own[n].shape != t.shape]:
            raise ArtifactError(f"{directory / TENSORS} holds {strange[0]!a:.100}, which {name} does not have so.")
        model.load_state_dict(tensors, strict=False, assign=True)
        made = cls(model.eval(), {place: directory / _folder(place) for place in places})
        if lacking := [name for name, t in model.state_dict().items() if t.is_meta]:
            raise ArtifactError(f"{directory / TENSORS} lacks {lacking[0]}.")
        return placed(made, kwargs)

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The model without values, by which diffusers tells how large it is."""
        facts = config[_FACTS]
        return _without_values(facts["model_class"], config["model"], facts["dtype"])


def _without_values(name: str, config: Mapping[str, Any], dtype: str) -> Any:
    kind: Any = class_of(name, "diffusers", "transformers")
    if not issubclass(kind, (ModelMixin, PreTrainedModel)):
        raise ArtifactError(f"{name} is no model.")
    with init_empty_weights():
        if issubclass(kind, PreTrainedModel):
            model: Any = kind._from_config(cast(Any, kind).config_class.from_dict(dict(config)))
        else:
            model = cast(Any, kind).from_config(dict(config))
    return torch.nn.Module.to(model, getattr(torch, dtype))


def _empty(module: torch.nn.Module) -> None:
    """Leave no matrices; what has one dimension stays, since pipelines call norms by themselves."""
    for own in module.modules():
        for held in (own._parameters, own._buffers):
            held.update({name: None for name, tensor in held.items() if tensor is not None and tensor.dim() > 1})


def _folder(place: str) -> str:
    return f"artifact.{place}" if place else ARTIFACT


refuse(
    TfqcPart, *CHANGING, "add_adapter", "load_adapter", "load_lora_adapter", "get_input_embeddings",
    "resize_token_embeddings", "set_attn_processor",
)  # fmt: skip
TfqcPart.__module__ = "tfqc"  # where diffusers looks for it
