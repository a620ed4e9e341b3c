"""A compiled denoiser that diffusers takes for one of its models: called, saved and loaded like any.

A pipeline's `model_index.json` names it as `["tfqc", "TfqcDenoiser"]`. Diffusers takes classes of other libraries from
modules that have been imported, so `import tfqc` comes before `DiffusionPipeline.from_pretrained`.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict
from diffusers.models.modeling_utils import ModelMixin

from tfqc.codegen.artifact import copy_artifact
from tfqc.driver import load
from tfqc.errors import ArtifactError, TfqcError
from tfqc.files.storage import parse_json, read_text, write_text
from tfqc.version import __version__

CONFIG, ARTIFACT = "config.json", "artifact"
_FACTS = "quantization_config"
_KEPT = ("cache_context",)  # methods of the model that change nothing of it

# What ModelMixin does to a model's layers, of which there are none here.
_CHANGING = (
    "compile_repeated_blocks", "enable_gradient_checkpointing", "enable_group_offload", "enable_layerwise_casting",
    "fuse_qkv_projections", "set_attention_backend",
)  # fmt: skip


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
        self.compiled = load(directory)
        self.facts = {"quant_method": "tfqc", "version": __version__, **facts}
        self._internal_dict = FrozenDict({**config, _FACTS: self.facts})
        self._artifact, self._dtype = directory, getattr(torch, self.facts["dtype"])
        self.kept: Any = None  # a temporary directory that the artifact lies in
        self.eval()

    # -- a call -----------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        """What the compiled model returns: its output class, or with `return_dict=False` a tuple."""
        found = self.compiled(*args, **kwargs)
        values = tuple(found) if isinstance(found, tuple) else (found,)
        return self._output_class(*values) if return_dict else values

    @functools.cached_property
    def _output_class(self) -> Any:
        return _of_diffusers(self.facts["output_class"])

    # -- a model of diffusers ---------------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """Of the inputs that it is called with, and of its outputs."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next((t.device for t in self.compiled.buffers()), torch.device("cpu"))

    def to(self, *args: Any, **kwargs: Any) -> TfqcDenoiser:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Move to a device that it was compiled for; a dtype is that of inputs and outputs, and of nothing within."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        if dtype is not None:
            self._dtype = dtype
        if device is not None:
            self.compiled.to(device)
        return self

    def half(self, *args: Any) -> TfqcDenoiser:
        """`to(torch.float16)`."""
        return self.to(torch.float16)

    def bfloat16(self) -> TfqcDenoiser:
        """`to(torch.bfloat16)`."""
        return self.to(torch.bfloat16)

    def float(self, *args: Any) -> TfqcDenoiser:
        """`to(torch.float32)`."""
        return self.to(torch.float32)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Of the model that was compiled; none of them is trained."""
        return 0 if only_trainable else self._skeleton.num_parameters(exclude_embeddings=exclude_embeddings)

    @functools.cached_property
    def _skeleton(self) -> Any:
        """The model without values: what is read of it, is read there."""
        with torch.device("meta"):
            return _of_diffusers(self.facts["model_class"]).from_config(dict(self.config))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "facts" not in vars(self):
                raise
        found = getattr(self._skeleton, name)
        if callable(found) and not isinstance(found, torch.nn.Module) and name not in _KEPT:
            raise AttributeError(_unchanging(name))
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> TfqcDenoiser:
        made = type(self)(self._artifact, _without_facts(self.config), self.facts)
        made.kept = self.kept
        return made.to(self.dtype)

    def extra_repr(self) -> str:
        """What it was compiled from."""
        return f"{self.facts['model_class'].rpartition('.')[2]}, compiled by tfqc for {self.facts['target']}"

    # -- files ------------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Write `config.json` and the artifact beside it, in `artifact/`.

        Raises:
            TfqcError: it is to be pushed to a hub.
        """
        if kwargs.get("push_to_hub"):
            raise TfqcError("A compiled model is not pushed to a hub from here: save it, and upload the directory.")
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

        Raises:
            ArtifactError: there is no such thing, or its files have changed.
        """
        directory = Path(pretrained_model_name_or_path) / (subfolder or "")
        config = parse_json(read_text(directory / CONFIG, ArtifactError), f"{directory / CONFIG}", ArtifactError)
        facts = config.pop(_FACTS, None) if isinstance(config, dict) else None
        if not isinstance(facts, dict) or facts.get("quant_method") != "tfqc":
            raise ArtifactError(f"{directory / CONFIG} is not that of a model which tfqc compiled.")
        made = cls(directory / ARTIFACT, config, facts)
        return made if kwargs.get("torch_dtype") is None else made.to(kwargs["torch_dtype"])


def _without_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != _FACTS}


def _of_diffusers(name: str) -> Any:
    """A class by its full name; nothing outside diffusers is imported."""
    module, _, attribute = name.rpartition(".")
    if module.partition(".")[0] != "diffusers":
        raise ArtifactError(f"{name[:100]!a} is no class of diffusers.")
    found = getattr(importlib.import_module(module), attribute, None)
    if not isinstance(found, type):
        raise ArtifactError(f"This diffusers has no {name}.")
    return found


def _unchanging(name: str) -> str:
    if name == "enable_cache":
        return (
            "A compiled model cannot do enable_cache(): the blocks that it would skip are one compiled step. To skip "
            "deep blocks, compile two modules of your own: the whole model, which returns what the deep blocks give, "
            "too, and one without them that takes it as an input."
        )
    return (
        f"A compiled model cannot do {name}(): its layers and weights are fixed. Do it before tfqc.quantize, or where "
        "LoRA is loaded, fuse it into the model first (pipe.fuse_lora()) and quantize then."
    )


def _refusing(name: str) -> Any:
    def refused(self: TfqcDenoiser, *args: Any, **kwargs: Any) -> NoReturn:
        raise TfqcError(_unchanging(name))

    return refused


for _name in _CHANGING:
    setattr(TfqcDenoiser, _name, _refusing(_name))
TfqcDenoiser.__module__ = "tfqc"  # where diffusers looks for it, and for the ModelMixin that tells how it is loaded
