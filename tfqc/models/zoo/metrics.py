"""Quality of generated Fashion-MNIST images, judged by the classifier that ships with the model; and PSNR."""

from __future__ import annotations

from functools import cache

import torch
from safetensors.torch import load_file
from torch import Tensor

from tfqc.models.zoo.fashion import FOLDER, Classifier, load_classifier

_BATCH = 256
_classifier = cache(load_classifier)  # read only here, so one instance serves every call


def class_accuracy(images: Tensor, labels: Tensor) -> float:
    """Share of ``images`` [N, 1, 28, 28] in [0, 1] that the classifier gives their ``labels``, int64 [N]."""
    if len(images) != len(labels) or not len(images):
        raise ValueError(f"need one label per image, at least one: {len(images)} images, {len(labels)} labels")
    model = _classifier()
    hits = 0
    with torch.no_grad():
        for x, y in zip(images.split(_BATCH), labels.split(_BATCH), strict=True):
            hits += int((model(x).argmax(1) == y).sum())
    return hits / len(images)


def feature_statistics(images: Tensor, classifier: Classifier | None = None) -> tuple[Tensor, Tensor]:
    """Mean [64] and unbiased covariance [64, 64], float64, of the features over images [N, 1, 28, 28]."""
    if len(images) < 2:
        raise ValueError(f"a covariance needs at least two images, got {len(images)}")
    model = classifier or _classifier()
    with torch.no_grad():
        features = torch.cat([model.features(x).double() for x in images.split(_BATCH)])
    return features.mean(0), torch.cov(features.T)


def reference_statistics() -> tuple[Tensor, Tensor]:
    """The same statistics of the 10,000 real test images, as shipped."""
    tensors = load_file(FOLDER / "classifier" / "reference.safetensors")
    return tensors["mean"], tensors["covariance"]


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """Squared Fréchet distance of two Gaussians: |m_a - m_b|^2 + tr(A) + tr(B) - 2 tr((A B)^1/2), in float64.

    (A B) has the eigenvalues of the symmetric A^1/2 B A^1/2, so two symmetric decompositions do what scipy's
    ``sqrtm`` of a non-symmetric matrix does, without its complex round-off (Dowson and Landau 1982; Heusel et
    al. 2017).
    """
    values, vectors = torch.linalg.eigh(cov_a.double())
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b.double() @ root).clamp(min=0).sqrt().sum()
    shift = (mean_a.double() - mean_b.double()).square().sum()
    return float((shift + cov_a.double().trace() + cov_b.double().trace() - 2 * cross).clamp(min=0))


def fd_fashion_cnn(images: Tensor) -> float:
    """Fréchet distance from the features of images [N, 1, 28, 28] in [0, 1] to those of the real test set.

    Lower is better. It is biased upwards for small N (the covariance has 64 x 64 entries): compare at equal N
    only. It is *not* FID: the features come from the shipped classifier, so values compare within this
    project alone.
    """
    return frechet_distance(*feature_statistics(images), *reference_statistics())


def psnr(a: Tensor, b: Tensor, data_range: float) -> float:
    """Peak signal-to-noise ratio in dB over all elements: 10 log10(data_range^2 / mse); inf if a equals b."""
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}")
    if data_range <= 0:
        raise ValueError(f"data_range must be positive, got {data_range}")
    mse = (a.double() - b.double()).square().mean()
    return float(10 * torch.log10(data_range**2 / mse))
