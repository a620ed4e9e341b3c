"""A compiled denoiser that diffusers takes for one of its models: called, saved and loaded like any.

A pipeline's `model_index.json` names it as `["tfqc", "TfqcDenoiser"]`. Diffusers takes classes of other libraries from
modules that have been imported, which torch does where tfqc is installed (`tfqc.integrations.be_there`).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from tfqc.codegen.artifact import copy_artifact, read_manifest
from tfqc.driver import load
from tfqc.errors import ArtifactError, TfqcError
from tfqc.files.storage import parse_json, read_text, write_text
from tfqc.integrations.diffusers.lora import CHANGES, READS, Adapters, scale_in
from tfqc.integrations.diffusers.names import class_of
from tfqc.integrations.diffusers.one_for_all import OneForAll
from tfqc.integrations.diffusers.refusing import CHANGING, refuse, unchanging
from tfqc.integrations.diffusers.skeleton import skeleton_of, with_zeros
from tfqc.quant.step_policy import KEY, policy_in
from tfqc.version import __version__

CONFIG, ARTIFACT = "config.json", "artifact.tfqc"  # diffusers looks for variants behind a dot in every name
_OF_BEFORE = "artifact"  # where models lie that an earlier tfqc saved
_FACTS = "quantization_config"
_KEPT = ("cache_context", "disable_freeu", *CHANGES, *READS)  # methods of the model that change nothing of it


class TfqcDenoiser(ModelMixin, ConfigMixin):
    """Takes the arguments of the model that was compiled, and returns what that returns.

    `config` is that model's. Its submodules and attributes can be read (`add_embedding.linear_1.in_features`), from a
    copy of it without values; what would change it is refused. It computes as it was compiled in every dtype: `dtype`
    is what pipelines make their inputs in.

    Args:
        directory: of the artifact.
        config: the compiled model's, as diffusers has it.
        facts: `model_class` and `output_class` (names in diffusers), `dtype`.
    """

    config_name = CONFIG

    def __init__(self, directory: Path, config: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        super().__init__()
        vars(self)["compiled"] = load(directory)  # no submodule: hooks that move tensors one by one would break it
        self.facts = {"quant_method": "tfqc", "version": __version__, **facts}
        self._internal_dict = FrozenDict({**config, _FACTS: self.facts})
        self._artifact = directory
        self.place = torch.nn.Parameter(torch.zeros(1, dtype=_dtype(self.facts)), False)  # for hooks
        self.kept: Any = None  # a temporary directory that the artifact lies in
        self.eval()

    # -- a call -----------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        """What the compiled model returns: its output class, or with `return_dict=False` a tuple."""
        scale, kwargs = scale_in(kwargs, self.compiled)
        compiled = (self._adapters.model(scale) if self._has_adapters else None) or self.compiled
        self._follow(compiled)
        args, given = self._one_for_all.spread(args, kwargs)
        found = compiled(*args, **given)
        values = tuple(found) if isinstance(found, tuple) else (found,)
        return self._output_class(*values) if return_dict else values

    @functools.cached_property
    def _one_for_all(self) -> OneForAll:
        return OneForAll(self.compiled.plan)

    @functools.cached_property
    def _output_class(self) -> Any:
        return class_of(self.facts["output_class"], "diffusers")

    # -- a model of diffusers ---------------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """Of the inputs that it is called with, and of its outputs."""
        return self.place.dtype

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.place.device

    def to(self, *args: Any, **kwargs: Any) -> TfqcDenoiser:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Move to a device that it was compiled for; a dtype is that of inputs and outputs, and of nothing within."""
        torch.nn.Module.to(self, *args, **kwargs)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TfqcDenoiser:
        super()._apply(fn, recurse)
        self._follow(self.compiled)
        return self

    def _follow(self, compiled: Any) -> None:
        """Have what computes go where hooks have moved what they see of it."""
        device = self.place.device
        if device.type != "meta" and device != next((t.device for t in compiled.buffers()), device):
            compiled.to(device)

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the compiled model's tensors."""
        return sum(tensor.numel() * tensor.itemsize for tensor in self.compiled.buffers())

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Of the model that was compiled; none of them is trained."""
        return 0 if only_trainable else self._skeleton.num_parameters(exclude_embeddings=exclude_embeddings)

    @functools.cached_property
    def _skeleton(self) -> Any:
        """The model without values: what is read of it, is read there."""
        return skeleton_of(self.facts["model_class"], self.config)

    # -- adapters ---------------------------------------------------------------------------------------------------

    def refold(self) -> None:
        """Do at once what the next call does after LoRA was loaded, weighed or unloaded: put its branches beside
        products, and compute tables anew that hold temporal features of its layers, for each step of the schedule.

        Raises:
            TfqcError: a layer was folded, and nothing is kept to compute its features from; which, and what to do.
        """
        self._adapters.model(1.0)

    @functools.cached_property
    def _adapters(self) -> Adapters:
        return Adapters(self._artifact, with_zeros(skeleton_of(self.facts["model_class"], self.config)))

    @property
    def _has_adapters(self) -> bool:
        return "_adapters" in vars(self) and self._adapters.loaded

    def modules(self, *args: Any, **kwargs: Any) -> Iterator[torch.nn.Module]:
        """Itself, and adapters' layers, which pipelines look for."""
        yield from super().modules(*args, **kwargs)
        if self._has_adapters:
            yield from self._adapters.skeleton.modules(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "facts" not in vars(self):
                raise
        if self._has_adapters and name in READS:
            return getattr(self._adapters.skeleton, name)
        found = getattr(self._skeleton, name)
        if name in CHANGES and (self._has_adapters or name == "load_lora_adapter"):
            return functools.partial(self._adapters.change, name)
        if callable(found) and not isinstance(found, torch.nn.Module) and name not in _KEPT:
            raise AttributeError(unchanging(name))
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> TfqcDenoiser:
        self._check()
        made = type(self)(self._artifact, _without_facts(self.config), self.facts)
        made.kept = self.kept
        if self._has_adapters:
            vars(made)["_adapters"] = self._adapters.copy()
        return made.to(self.dtype)

    def _check(self) -> None:
        """Its directory is read again: it has to be as it was."""
        if (origin := getattr(self.compiled, "reload", None)) is not None:
            origin.check()

    def extra_repr(self) -> str:
        """What it was compiled from."""
        return f"{self.facts['model_class'].rpartition('.')[2]}, compiled by tfqc for {self.facts['target']}"

    # -- files ------------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Write `config.json` and the artifact beside it, in `artifact.tfqc/`.

        Raises:
            TfqcError: it is to be pushed to a hub, or has LoRA.
            ValueError: the artifact that it was loaded from has become another, or is gone.
        """
        if kwargs.get("push_to_hub"):
            raise TfqcError("A compiled model is not pushed to a hub from here: save it, and upload the directory.")
        if self._has_adapters:
            raise TfqcError(
                "What is saved is the model without its LoRA: unload it (pipe.unload_lora_weights()), save, and load "
                "it again; to have it in the files, load it before tfqc.quantize."
            )
        self._check()
        target = Path(save_directory)
        target.mkdir(parents=True, exist_ok=True)
        copy_artifact(self._artifact, target / ARTIFACT)
        config = {"_class_name": type(self).__name__, **{k: v for k, v in self.config.items() if k != "_class_name"}}
        write_text(target / CONFIG, json.dumps(config, indent=2, sort_keys=True, default=str) + "\n")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *args: Any, subfolder: str = "", **kwargs: Any
    ) -> TfqcDenoiser:
        """Load what `save_pretrained` wrote. Arguments of diffusers that say how weights are read have no meaning here.

        Args:
            torch_dtype: of inputs and outputs; as it was saved by default.
            device_map: where it is to lie.

        Raises:
            ArtifactError: there is no such thing, or its files have changed.
            SpecError: its config has a step policy that is none.
        """
        directory = Path(pretrained_model_name_or_path) / (subfolder or "")
        config = parse_json(read_text(directory / CONFIG, ArtifactError), f"{directory / CONFIG}", ArtifactError)
        facts = config.pop(_FACTS, None) if isinstance(config, dict) else None
        if not isinstance(facts, dict) or facts.get("quant_method") != "tfqc":
            raise ArtifactError(f"{directory / CONFIG} is not that of a model which tfqc compiled.")
        artifact = directory / ARTIFACT
        artifact = artifact if artifact.is_dir() else directory / _OF_BEFORE
        compiled = runtime_of(read_manifest(artifact))
        if policy_in(facts) != policy_in(compiled):
            raise ArtifactError(
                f"{directory / CONFIG} has another {KEY} than the artifact was compiled with: quantize the model "
                "again with step_policy=..., or leave the config as it was saved."
            )
        return placed(cls(artifact, config, facts), kwargs)

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The model without values, by which diffusers tells how large it is."""
        facts = config[_FACTS]
        with torch.device("meta"):
            return class_of(facts["model_class"], "diffusers").from_config(_without_facts(config))


def placed(model: Any, given: Mapping[str, Any]) -> Any:
    """A loaded model in the dtype and on the device that `from_pretrained` was given."""
    device, dtype = given.get("device_map"), given.get("torch_dtype")
    device = device.get("") if isinstance(device, Mapping) else device
    if device not in (None, "auto", "balanced"):
        model.to(torch.device(device))
    return model if dtype is None else model.to(dtype)


def runtime_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a `quantization_config` says of steps that an artifact protects; nothing where there are none."""
    policy = manifest["step_policy"]
    return {} if policy is None else {"runtime": {KEY: policy}}


def _dtype(facts: Mapping[str, Any]) -> torch.dtype:
    name = facts.get("dtype")
    found = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(found, torch.dtype):
        raise ArtifactError(f"The {_FACTS} of a compiled model has dtype={name!r}, which is none: load what was saved.")
    return found


def _without_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != _FACTS}


refuse(TfqcDenoiser, *CHANGING)
TfqcDenoiser.__module__ = "tfqc"  # where diffusers looks for it, and for the ModelMixin that tells how it is loaded
