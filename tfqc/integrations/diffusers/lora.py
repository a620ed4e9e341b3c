"""LoRA on a compiled denoiser, by diffusers' own methods.

They load, weigh and unload adapters in the model's skeleton, as in any model: file formats, names, weights of blocks
are theirs. What is active there is then given to the artifact (`tfqc.adapters`), and the model computes with the
artifact that this makes.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch

from tfqc.adapters import LowRank, adapted, check_adapters
from tfqc.driver import load
from tfqc.errors import TfqcError
from tfqc.integrations.diffusers.skeleton import copy_of
from tfqc.integrations.diffusers.temporary import Temporary

CHANGES = (
    "delete_adapters", "disable_adapters", "disable_lora", "enable_adapters", "enable_lora", "load_lora_adapter",
    "set_adapter", "set_adapters", "unload_lora",
)  # fmt: skip
READS = ("active_adapters", "peft_config", "save_lora_adapter")
_SCALED = ("attention_kwargs", "cross_attention_kwargs", "joint_attention_kwargs")
_PLAIN = ("Linear", "Conv1d", "Conv2d", "Conv3d")  # peft's layers of LoRA whose products are those of torch's


class Adapters:
    """What adapters make of a compiled model. Nothing is made before a call needs it, or `model` is asked for it.

    Args:
        directory: of the artifact without adapters.
        skeleton: the model that diffusers' methods load adapters into.
    """

    def __init__(self, directory: Path, skeleton: Any) -> None:
        self.directory, self.skeleton = directory, skeleton
        self._state: Any = None
        self._model: Any = None
        self._lock = threading.Lock()

    @property
    def loaded(self) -> bool:
        """True if there are any, active or not."""
        return bool(getattr(self.skeleton, "peft_config", None))

    def change(self, method: str, /, *args: Any, **kwargs: Any) -> Any:
        """Call one of `CHANGES`. What cannot be done leaves everything as it was.

        Raises:
            TfqcError: the artifact cannot be given the adapter.
        """
        before = copy_of(self.skeleton)
        try:
            returned = getattr(self.skeleton, method)(*args, **kwargs)
            if adapters := _joined(_active(self.skeleton), 1.0):
                check_adapters(self.directory, adapters)
        except Exception:
            self.skeleton = before
            raise
        if method == "load_lora_adapter":
            self._state = None  # hot swaps write into tensors in ways that leave no trace in them
        return returned

    def model(self, scale: float) -> Any:
        """The compiled model with the adapters that are active, times `scale`; None if there are none.

        Raises:
            TfqcError: the artifact cannot be given them.
        """
        with self._lock:
            active = _active(self.skeleton)
            state = scale, [(k, _identity(a), _identity(b), own) for k, its in active.items() for a, b, own in its]
            if state != self._state:
                self._model = self._state = None
                if adapters := _joined(active, scale):
                    place = Temporary()
                    self._model = load(adapted(self.directory, adapters).save(place.path / "artifact"))
                    self._model.place = place  # threads may read files of it when this has another already
                self._state = state
            return self._model

    def copy(self) -> Adapters:
        """The same adapters for a copy of the model."""
        return Adapters(self.directory, copy_of(self.skeleton))

    def __reduce__(self) -> Any:
        return Adapters, (self.directory, self.skeleton)


def scale_in(kwargs: dict[str, Any], compiled: Any) -> tuple[float, dict[str, Any]]:
    """What a call multiplies adapters by, and the arguments that are left for a compiled model: those that it was
    compiled with stay, others say nothing to it."""
    constants = {path for path, _ in compiled.plan.constants}
    rest, scale = dict(kwargs), 1.0
    for name in _SCALED:
        if isinstance(given := kwargs.get(name), dict) and "scale" in given:
            scale = float(given["scale"])
            if (name, "scale") not in constants:
                rest[name] = {key: value for key, value in given.items() if key != "scale"} or None
    return scale, rest


def _joined(active: dict[str, list[tuple[Any, Any, float]]], scale: float) -> dict[str, LowRank]:
    parts = {name: [(down, up, own * scale) for down, up, own in its if own * scale] for name, its in active.items()}
    return {name: LowRank.of(its) for name, its in parts.items() if its}


def _active(skeleton: Any) -> dict[str, list[tuple[Any, Any, float]]]:
    """Of each layer that adapters are active for: down, up and scale of each.

    Raises:
        TfqcError: one is no LoRA, of a kind that is no product of two matrices, or not finite.
    """
    if not getattr(skeleton, "peft_config", None):
        return {}
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    found: dict[str, list[tuple[Any, Any, float]]] = {}
    for name, module in skeleton.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            raise TfqcError(f"The adapter replaces {name}, and the weights of a compiled model are fixed: {_BEFORE}")
        if not isinstance(module, BaseTunerLayer) or module.disable_adapters:
            continue
        for adapter in [a for a in module.active_adapters if _has(module, a)]:
            if not isinstance(module, LoraLayer) or type(module).__name__ not in _PLAIN:
                raise TfqcError(f"The adapter of {name} is a {type(module).__name__}, no LoRA of a product: {_BEFORE}")
            if adapter in module.lora_variant or module.lora_bias.get(adapter):
                raise TfqcError(f"The LoRA of {name} is DoRA or has a bias, more than a product: {_BEFORE}")
            down: Any = module.lora_A[adapter].weight
            up: Any = module.lora_B[adapter].weight
            if not (bool(torch.isfinite(down).all()) and bool(torch.isfinite(up).all())):
                raise TfqcError(f"The LoRA of {name} ({adapter!r}) holds NaN or infinity: its file is broken.")
            found.setdefault(name, []).append((down, up, float(module.scaling[adapter])))
    return found


_BEFORE = "load it before tfqc.quantize, which compiles it with the model."


def _has(module: Any, adapter: str) -> bool:
    return any(adapter in getattr(module, names, ()) for names in module.adapter_layer_names)


def _identity(tensor: Any) -> tuple[int, int]:
    return id(tensor), tensor._version
