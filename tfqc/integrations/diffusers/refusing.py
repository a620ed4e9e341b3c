"""What models of diffusers and transformers can be told to do with layers and weights, and compiled ones cannot."""

from __future__ import annotations

from typing import Any, NoReturn

from tfqc.errors import TfqcError

CHANGING = (
    "compile_repeated_blocks", "enable_gradient_checkpointing", "enable_layerwise_casting", "fuse_qkv_projections",
    "load_state_dict", "set_attention_backend",
)  # fmt: skip


def unchanging(name: str) -> str:
    """The sentence for a method that is refused."""
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


def refuse(cls: type, *names: str) -> None:
    """Have methods of a class raise a TfqcError."""
    for name in names:
        setattr(cls, name, _refusing(name))


def _refusing(name: str) -> Any:
    def refused(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise TfqcError(unchanging(name))

    return refused
