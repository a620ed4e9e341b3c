"""The model inside what torch puts around models, and what others hang on it."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.parallel import DataParallel, DistributedDataParallel

from tfqc.errors import CaptureError


def unwrapped(model: Any) -> Any:
    """Without `torch.compile`, DataParallel and DistributedDataParallel; whatever is none of them stays as it is."""
    while isinstance(model, torch.nn.Module):
        compiled_from = getattr(model, "_orig_mod", None)
        if isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        elif isinstance(compiled_from, torch.nn.Module):
            model = compiled_from
        else:
            break
    return model


def refuse_caches(model: torch.nn.Module) -> None:
    """Hooks of diffusers that keep state from step to step (`enable_cache`, `apply_first_block_cache`, ...) skip blocks
    at some steps; a capture sees one step.

    Raises:
        CaptureError: a module has such a hook.
    """
    for path, module in model.named_modules():
        hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
        for name, hook in hooks.items():
            if getattr(hook, "_is_stateful", False):
                raise CaptureError(
                    f"{path or type(model).__name__} has the hook {name!r}, by which blocks are skipped at some steps; "
                    "what is captured is one step, the same for all: remove it (model.disable_cache()), compile then. "
                    "To skip deep blocks, compile two modules of your own: the whole model, which returns "
                    "what the deep blocks give, too, and one without them that takes it as an input."
                )
