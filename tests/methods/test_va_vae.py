"""VA-VAE's training: its losses against closed forms, who learns from what, stages, resume, mistakes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from imagewright.methods.va_vae import VAVAE, cosine_loss, distance_loss, divergence
from imagewright.metrics.features import EncoderFeatures
from imagewright.metrics.vision import VisionFeatures
from imagewright.models.classifier import Classifier
from imagewright.models.kl import GaussianAutoencoder
from imagewright.networks import KLAutoencoder, KLAutoencoderConfig, WideResNet, WideResNetConfig
from imagewright.networks.patch_discriminator import PatchDiscriminator
from imagewright.noise import StepNoise
from imagewright.pretrained import find_model
from imagewright.recipes import RECIPES
from imagewright.recipes.latents import EPOCH, three_stages, vavae_imagenet256
from imagewright.training.experiment import Experiment
from imagewright.types import Batch, Clock, DataSpec, Parts, Update, UserError

SPEC = DataSpec(name="digits", resolution=8, channels=1)
TINY = KLAutoencoderConfig(
    img_resolution=8, in_channels=1, latent_channels=3, model_channels=8, channel_mult=(1, 1), num_blocks=1,
    attn_resolutions=(),
)  # fmt: skip


class Pooled(nn.Module):
    """Feature maps of a fixed network."""

    def forward(self, images: Tensor) -> list[Tensor]:
        return [images, nn.functional.avg_pool2d(images, 2)]


def made(**settings: Any) -> tuple[VAVAE, Parts]:
    torch.manual_seed(0)
    usual = {"discriminator_width": 4, "discriminator_layers": 1, "adversarial_start_images": 0}
    method = VAVAE(**{**usual, **settings})
    return method, method.parts(network=KLAutoencoder(TINY), spec=SPEC, features=Pooled())


def images(n: int = 4) -> Tensor:
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


def events(method: VAVAE, parts: Parts, seen: int = 0) -> list[Update]:
    found = list(method.step(parts, Batch(images()), StepNoise(0, 0), Clock(0, seen, 100)))
    return [each for each in found if isinstance(each, Update)]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("margin", [0.0, 0.25, 0.9])
def test_latents_that_are_the_features_cost_nothing(margin: float) -> None:
    z = drawn(2, 5, 4, 4)
    assert float(cosine_loss(z, z, margin).max()) < 1e-12 and float(distance_loss(z, z, margin).max()) < 1e-12
    assert float(cosine_loss(z, -z, margin).min()) == pytest.approx(2 - margin)


def test_distances_do_not_change_when_latents_are_turned_or_scaled() -> None:
    z, f = drawn(2, 5, 4, 4), drawn(2, 7, 4, 4, seed=1)
    turn, _ = torch.linalg.qr(drawn(5, 5, seed=2))
    scales = drawn(2, 1, 4, 4, seed=3).exp()
    turned = torch.einsum("dc,nchw->ndhw", turn, z) * scales
    before = distance_loss(z, f, 0.1)
    torch.testing.assert_close(distance_loss(turned, f, 0.1), before)
    assert float((cosine_loss(turned, z, 0.0) - cosine_loss(z, z, 0.0)).min()) > 0.1  # which sees the turn


def test_there_is_no_gradient_within_the_margins() -> None:
    f = drawn(1, 6, 3, 3)
    near = (f + 0.1 * drawn(1, 6, 3, 3, seed=1)).requires_grad_(True)
    for loss in (cosine_loss, distance_loss):
        (inside,) = torch.autograd.grad(loss(near, f, 0.5).sum(), near)
        (outside,) = torch.autograd.grad(loss(near, f, 0.0).sum(), near)
        assert not inside.any() and outside.abs().sum() > 0


def test_the_divergence_is_that_of_normal_distributions() -> None:
    mean, log_variance = drawn(3, 2, 2, 2), drawn(3, 2, 2, 2, seed=1)
    ours = torch.distributions.Normal(mean, (log_variance / 2).exp())
    standard = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    expected = torch.distributions.kl_divergence(ours, standard).flatten(1).sum(1)
    torch.testing.assert_close(divergence(mean, log_variance), expected)


def test_the_weighted_alignment_pulls_at_the_encoder_as_hard_as_reconstruction_times_its_weight() -> None:
    method, parts = made(vf=0.3, adversarial=0.0, kl=0.0, cosine_margin=0.0, distance_margin=0.0)
    model, network = parts.autoencoder, parts.autoencoder.network
    (update,) = events(method, parts)
    plain, _ = made(vf=0.0, adversarial=0.0, kl=0.0)
    (alone,) = events(plain, parts)
    (all_of_it,) = torch.autograd.grad(update.loss.mean(), network.last_of_encoder, retain_graph=True)
    (rebuilding,) = torch.autograd.grad(alone.loss.mean(), network.last_of_encoder, retain_graph=True)
    assert float((all_of_it - rebuilding).norm() / rebuilding.norm()) == pytest.approx(0.3, rel=1e-3)
    (slope,) = torch.autograd.grad(update.loss.mean(), model.projection.weight)
    assert slope.abs().sum() > 0  # W learns


def test_the_adversary_pulls_at_the_decoder_as_hard_as_reconstruction_times_its_weight() -> None:
    method, parts = made(vf=0.0, adversarial=0.5, kl=0.0)
    layer = parts.autoencoder.network.last_layer
    update, _ = events(method, parts)
    plain, _ = made(vf=0.0, adversarial=0.0, kl=0.0)
    (alone,) = events(plain, parts)
    (all_of_it,), (rebuilding,) = (torch.autograd.grad(u.loss.mean(), layer) for u in (update, alone))
    assert float((all_of_it - rebuilding).norm() / rebuilding.norm()) == pytest.approx(0.5, rel=1e-2)


def test_the_discriminator_comes_in_when_it_is_told_and_learns_from_both() -> None:
    method, parts = made(adversarial_start_images=64)
    assert [u.part for u in events(method, parts, 63)] == ["autoencoder"]
    first, second = events(method, parts, 64)
    assert (first.part, second.part) == ("autoencoder", "discriminator")
    assert "adversarial" in first.parts and second.loss.shape == (4,)
    slopes = torch.autograd.grad(second.loss.mean(), list(parts.discriminator.parameters()))
    assert all(bool(slope.abs().sum() > 0) for slope in slopes[:1])
    kept = torch.autograd.grad(first.loss.mean(), list(parts.autoencoder.parameters()))
    assert all(torch.isfinite(slope).all() for slope in kept)


def test_latents_are_drawn_in_training_and_the_mean_where_no_noise_is_given() -> None:
    _, parts = made(vf=0.0, adversarial=0.0)
    model = parts.autoencoder.eval()
    mean = model.encode(images())
    assert mean.shape == (4, 3, 4, 4) and torch.equal(mean, model.encode(images()))
    one, other = (model.encode(images(), StepNoise(0, k)) for k in (1, 2))
    assert not torch.equal(one, other)
    draws = torch.stack([model.encode(images(1), StepNoise(1, k)) for k in range(400)])
    log_variance = model.network.encode(images(1))[1]
    torch.testing.assert_close(draws.mean(0), mean[:1], atol=0.3, rtol=0)
    torch.testing.assert_close(draws.var(0).log(), log_variance, atol=0.4, rtol=0)
    assert model.decode(100 * mean).abs().max() <= 1


def test_vision_networks_answer_with_their_last_map_on_the_grid_asked_for() -> None:
    digits = VisionFeatures.open("digits")
    assert digits(images(2), 4).shape == (2, 64, 4, 4) and digits.dim == 64
    network: Any = digits.maps.encoder.network
    assert torch.equal(nn.functional.silu(digits(images(2), 4)), network.body(images(2)))
    twice = digits(images(2), 8)
    assert twice.shape == (2, 64, 8, 8) and not twice.requires_grad
    resnet = WideResNet(WideResNetConfig(img_resolution=8, in_channels=1, num_classes=3, widen=1, blocks=1)).eval()
    run = VisionFeatures(EncoderFeatures(Classifier(resnet), name="run", sha256=""))
    torch.testing.assert_close(run(images(2), 4).mean((2, 3)), Classifier(resnet).encode(images(2)).pooled)


def test_patches_of_dinov2_are_its_map(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28,
                                       patch_size=14)  # fmt: skip
    torch.manual_seed(0)
    network = transformers.Dinov2Model(config).eval()
    network.save_pretrained(tmp_path)
    vision = VisionFeatures.open(str(tmp_path))
    maps = vision(images(2), 16)
    assert maps.shape == (2, 16, 16, 16) and vision.dim == 16
    shown = nn.functional.interpolate(images(2).expand(-1, 3, -1, -1), size=(224, 224), mode="bilinear")
    tokens = network(pixel_values=shown).last_hidden_state[:, 1:]
    torch.testing.assert_close(maps[:, :, 3, 5], tokens[:, 3 * 16 + 5])


def test_what_does_not_fit_is_said_in_a_sentence() -> None:
    for settings, told in (
        ({"vf": -1.0}, "method.vf is -1.0"),
        ({"cosine_margin": 2.0}, r"method.cosine_margin is 2.0; it must lie in \[0, 2\)"),
        ({"distance_margin": -0.1}, r"method.distance_margin is -0.1; it must lie in \[0, 2\)"),
        ({"discriminator_layers": 0}, "method.discriminator_layers is 0"),
    ):
        with pytest.raises(UserError, match=told):
            VAVAE(**settings)
    network = KLAutoencoder(TINY)
    with pytest.raises(UserError, match=r"method\.perceptual is 1\.0; it needs a feature network"):
        VAVAE().parts(network=network, spec=SPEC)
    with pytest.raises(UserError, match=r"method\.vf is 0\.1; it needs a vision network"):
        VAVAE(perceptual=0.0).parts(network=network, spec=replace(SPEC, name="photos"))
    with pytest.raises(UserError, match=r"vision has no effect where method\.vf is 0"):
        VAVAE(perceptual=0.0, vf=0.0).parts(network=network, spec=SPEC, vision=VisionFeatures.open("digits"))
    with pytest.raises(UserError, match="after the halvings 3 pixels a side must be left"):
        PatchDiscriminator(8, 1, layers=3)
    with pytest.raises(UserError, match="needs a KLAutoencoder as its network, not a Linear"):
        GaussianAutoencoder(nn.Linear(1, 1))
    with pytest.raises(UserError, match=r"latents are \[1, 2, 4, 4\]; this autoencoder decodes \[N, 3, 4, 4\]"):
        GaussianAutoencoder(network).decode(torch.zeros(1, 2, 4, 4))
    with pytest.raises(UserError, match=r"images are \[1, 1, 4, 4\]; this autoencoder takes \[N, 1, 8, 8\]"):
        GaussianAutoencoder(network).encode(torch.zeros(1, 1, 4, 4))
    with pytest.raises(UserError, match="img_resolution is 6; it must be divisible by 4"):
        KLAutoencoderConfig(img_resolution=6, in_channels=1, channel_mult=(1, 1, 1))


def test_the_published_stages() -> None:
    stages = {s.name: s.work for s in three_stages(vavae_imagenet256(), 130 * EPOCH).stages}
    works = [work for work in stages.values() if isinstance(work, Experiment)]
    assert [round(w.training.total_images / EPOCH) for w in works] == [100, 15, 15]
    assert [(w.method.vf, w.method.cosine_margin, w.method.distance_margin) for w in works] == [
        (0.5, 0.0, 0.0), (0.1, 0.0, 0.0), (0.1, 0.5, 0.25),
    ]  # fmt: skip
    assert [w.method.adversarial_start_images for w in works] == [640_256, 0, 0]
    assert [w.start for w in works] == [None, "stage:align", "stage:rebuild"]
    assert [(w.training.batch, w.training.micro_batch) for w in works] == [(256, 8)] * 3  # a process's 8 of 32 x 8


def test_a_run_is_resumed_bit_for_bit_with_its_discriminator(resumed_run: Callable[[Experiment], Path]) -> None:
    run = RECIPES["vavae-digits"]()
    training = replace(
        run.training, total_images=48, batch=16, micro_batch=8, log_images=16, snapshot_images=48, checkpoint_images=16
    )
    method = replace(run.method, discriminator_width=4, adversarial_start_images=16)
    file = find_model(resumed_run(replace(run, method=method, network=TINY, training=training)))
    assert isinstance(file.model, GaussianAutoencoder) and file.model.aligned == 64
    assert file.origin["psnr"] > 0 and "codebook" not in file.origin
