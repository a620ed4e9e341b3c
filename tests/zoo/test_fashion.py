"""The shipped model: it loads, keeps its promises and draws its classes. The metrics on known answers."""

from __future__ import annotations

import math

import pytest
import torch

from tfqc.models.zoo import fashion, metrics
from tfqc.sampling.loop import initial_noise, sample


def test_unet_is_small_fp32_and_frozen() -> None:
    unet = fashion.load_unet()
    parameters = list(unet.parameters())
    assert 4e6 < sum(p.numel() for p in parameters) < 7e6
    assert {p.dtype for p in parameters} == {torch.float32}
    assert not unet.training and not any(p.requires_grad for p in parameters)


def test_weights_are_shipped_as_half_precision_and_readable() -> None:
    file = fashion.FOLDER / "unet" / "diffusion_pytorch_model.safetensors"
    assert 9e6 < file.stat().st_size < 14e6
    assert all(f.stat().st_mode & 0o044 == 0o044 for f in fashion.FOLDER.rglob("*") if f.is_file())


def test_no_machine_path_in_the_shipped_text() -> None:
    for file in fashion.FOLDER.rglob("*"):
        if file.suffix in (".json", ".md"):
            assert "/work/" not in file.read_text() and "/root/" not in file.read_text(), file


def test_time_path_depends_on_the_timestep_alone() -> None:
    """The label goes through cross-attention only, so the temporal features are step-static."""
    config = fashion.load_unet().config
    assert config["class_embed_type"] is None and config["num_class_embeds"] is None
    assert config["addition_embed_type"] is None and config["encoder_hid_dim_type"] is None


def test_tokens_tell_labels_apart() -> None:
    tokens = fashion.load_tokens()(torch.arange(11))
    assert tokens.shape == (11, 4, 128) and tokens.dtype == torch.float32
    assert len(tokens.flatten(1).unique(dim=0)) == 11


def test_each_load_is_a_fresh_module() -> None:
    first, second = fashion.load_tokens(), fashion.load_tokens()
    first.table.weight.zero_()
    assert second.table.weight.abs().sum() > 0


def test_encode_and_decode_are_inverse() -> None:
    images = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    latents = fashion.encode(images)
    assert latents.shape == (3, *fashion.LATENT_SHAPE) and latents.abs().max() <= 1
    torch.testing.assert_close(fashion.decode(latents), images)
    assert fashion.decode(10 * latents).min() == 0 and fashion.decode(10 * latents).max() == 1


def test_sampler_starts_in_pure_noise() -> None:
    scheduler = fashion.load_scheduler()
    scheduler.set_timesteps(50)
    assert scheduler.timesteps[0] == 999 and scheduler.alphas_cumprod[999] < 1e-8


def test_generated_images_belong_to_their_classes() -> None:
    unet, tokens = fashion.load_unet(), fashion.load_tokens()
    labels = torch.arange(20) % 10
    latents = sample(
        unet,
        fashion.load_scheduler(),
        steps=10,
        latents=initial_noise(20, fashion.LATENT_SHAPE, seed=0),
        cond={"encoder_hidden_states": tokens(labels)},
        uncond={"encoder_hidden_states": tokens(torch.full_like(labels, fashion.UNCONDITIONAL))},
    )
    images = fashion.decode(latents)
    assert metrics.class_accuracy(images, labels) >= 0.8
    # 20 images cannot span 64 features, but noise is much further from clothes than a few clothes are.
    noise = torch.rand(20, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    assert metrics.fd_fashion_cnn(images) < 0.5 * metrics.fd_fashion_cnn(noise)


def test_classifier_shapes() -> None:
    classifier = fashion.load_classifier()
    images = torch.rand(5, 1, 28, 28)
    features = classifier.features(images)
    assert features.shape == (5, 64) and features.min() >= 0
    torch.testing.assert_close(classifier(images), classifier.head(features))


def test_frechet_distance_of_the_reference_with_itself_is_zero() -> None:
    mean, covariance = metrics.reference_statistics()
    assert mean.dtype == covariance.dtype == torch.float64 and covariance.shape == (64, 64)
    assert torch.equal(covariance, covariance.T)
    assert metrics.frechet_distance(mean, covariance, mean, covariance) == pytest.approx(0, abs=1e-6)
    assert metrics.frechet_distance(mean, covariance, mean + 2, covariance) == pytest.approx(4 * 64)


def test_frechet_distance_of_commuting_gaussians() -> None:
    """For diagonal covariances the distance is the sum of (sqrt a - sqrt b)^2; a variance may be 0."""
    a, b = torch.tensor([1.0, 4.0, 0.0]), torch.tensor([9.0, 4.0, 16.0])
    zero = torch.zeros(3)
    assert metrics.frechet_distance(zero, a.diag(), zero, b.diag()) == pytest.approx(4 + 0 + 16)


def test_frechet_distance_is_symmetric_and_rotation_invariant() -> None:
    g = torch.Generator().manual_seed(1)
    a, b, m = (torch.randn(5, 5, generator=g, dtype=torch.float64) for _ in range(3))
    a, b, rotation = a @ a.T, b @ b.T, torch.linalg.qr(m).Q
    zero = torch.zeros(5)
    distance = metrics.frechet_distance(zero, a, zero, b)
    assert distance > 0
    assert metrics.frechet_distance(zero, b, zero, a) == pytest.approx(distance)
    turned = metrics.frechet_distance(zero, rotation @ a @ rotation.T, zero, rotation @ b @ rotation.T)
    assert turned == pytest.approx(distance)


def test_psnr_known_answers() -> None:
    a = torch.zeros(2, 1, 4, 4)
    assert metrics.psnr(a, a + 0.1, data_range=1.0) == pytest.approx(20.0, abs=1e-5)
    assert metrics.psnr(a, a + 0.1, data_range=2.0) == pytest.approx(20 + 20 * math.log10(2), abs=1e-5)
    assert metrics.psnr(a, a, data_range=1.0) == math.inf


def test_metrics_refuse_what_they_cannot_answer() -> None:
    images = torch.zeros(2, 1, 28, 28)
    with pytest.raises(ValueError, match="2 images, 3 labels"):
        metrics.class_accuracy(images, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="at least two images"):
        metrics.fd_fashion_cnn(images[:1])
    with pytest.raises(ValueError, match="shapes differ"):
        metrics.psnr(images, images[:1], data_range=1.0)
    with pytest.raises(ValueError, match="data_range"):
        metrics.psnr(images, images, data_range=0.0)
