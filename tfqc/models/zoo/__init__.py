"""Trained models that ship with the package, their data-free loaders and their quality metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from tfqc.models.spec import ModelSpec


def fashion_unet() -> ModelSpec:
    """A class-conditional UNet2DConditionModel for Fashion-MNIST, in the shape of Stable Diffusion."""
    import torch

    from tfqc.models.spec import ModelSpec
    from tfqc.quiet import quiet_import

    with quiet_import():
        from tfqc.models.zoo import fashion, metrics

    tokens = fashion.load_tokens()

    def labels(n: int, seed: int) -> Tensor:
        return (torch.arange(n) + seed) % 10

    def conditions(n: int, seed: int) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        with torch.no_grad():
            cond = tokens(labels(n, seed))
            uncond = tokens(torch.full((n,), fashion.UNCONDITIONAL))
        return {"encoder_hidden_states": cond}, {"encoder_hidden_states": uncond}

    cond, _ = conditions(2, 0)
    example = {"sample": torch.zeros(2, *fashion.LATENT_SHAPE), "timestep": torch.tensor([10, 10]), **cond}
    return ModelSpec(
        name="fashion-unet",
        model=fashion.load_unet(),
        example_inputs=example,
        scheduler=fashion.load_scheduler(),
        conditions=conditions,
        guidance=2.0,
        decode=fashion.decode,
        labels=labels,
        class_names=fashion.CLASS_NAMES,
        metrics={
            "class accuracy": metrics.class_accuracy,
            "FD(fashion-cnn)": lambda images, _labels: metrics.fd_fashion_cnn(images),
        },
        note="trained on Fashion-MNIST; 10 classes, 28x28",
    )


MODELS: dict[str, Callable[[], ModelSpec]] = {"fashion-unet": fashion_unet}
