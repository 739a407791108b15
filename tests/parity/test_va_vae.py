"""The KL autoencoder, its discriminator and VA-VAE's losses against numbers of the released programs.

data/va_vae.json says from which commits its numbers are and how weights and inputs are made.
"""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from imagewright.methods.va_vae import VAVAE, cosine_loss, distance_loss, divergence
from imagewright.models.kl import GaussianAutoencoder
from imagewright.networks import KLAutoencoder, KLAutoencoderConfig
from imagewright.networks.patch_discriminator import PatchDiscriminator
from imagewright.types import Batch, Clock, Frozen, Parts, Trained, Update

REFERENCE = json.loads((Path(__file__).parent / "data" / "va_vae.json").read_text())
TINY = KLAutoencoderConfig(
    img_resolution=8, in_channels=3, latent_channels=2, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,)
)


def normal(key: str, shape: list[int]) -> Tensor:
    generator = np.random.Generator(np.random.PCG64(seed=zlib.crc32(key.encode())))
    return torch.from_numpy(np.asarray(generator.standard_normal(shape)))


def by_rule(network: nn.Module) -> nn.Module:
    network.double().eval()
    for owner, module in network.named_modules():
        scales = isinstance(module, nn.GroupNorm | nn.BatchNorm2d)
        for name, p in module.named_parameters(recurse=False):
            drawn = normal(f"{owner}.{name}".lstrip("."), list(p.shape))
            wide = drawn / math.sqrt(math.prod(p.shape[1:]))
            p.data = wide if p.ndim > 1 else 0.1 * drawn + (scales and name == "weight")
    return network


def close(found: Tensor, expected: object) -> None:
    torch.testing.assert_close(found.detach().double(), torch.tensor(expected).double(), rtol=1e-6, atol=1e-7)


def says(found: Tensor, said: dict[str, Any]) -> None:
    close(found.mean(), said["mean"])
    close(found.std(unbiased=False), said["std"])
    close(found[0, :, :2, 0].T.flatten(), said["first"])


class Given:
    """The noise that the numbers were made with."""

    def normal(self, like: Tensor) -> Tensor:
        return normal("noise", list(like.shape))


class MeanSquare(nn.Module):
    def compare(self, a: Tensor, b: Tensor) -> Tensor:
        return 0.3 * (a - b).square().flatten(1).mean(1)


class Fixed(nn.Module):
    def forward(self, images: Tensor, side: int) -> Tensor:
        return normal("features", [len(images), 5, side, side])


@pytest.fixture(scope="module")
def released() -> tuple[Parts, Tensor]:
    """The parts with the weights of the rule, and images."""
    model = GaussianAutoencoder(by_rule(KLAutoencoder(TINY)), aligned=5).double()
    model.projection.weight.data = normal("projection.weight", [5, 2, 1, 1]) / math.sqrt(2)
    judge = by_rule(PatchDiscriminator(8, 3, layers=1)).train()
    parts = Parts(autoencoder=Trained(module=model), discriminator=Trained(module=judge),
                  features=Frozen(module=MeanSquare()), vision=Frozen(module=Fixed()))  # fmt: skip
    return parts, normal("images", [2, 3, 8, 8]).clamp(-2, 2) / 2


def test_the_autoencoder_answers_as_the_released_one(released: tuple[Parts, Tensor]) -> None:
    parts, images = released
    rebuilt, mean, log_variance, _ = parts.autoencoder(images, Given())
    says(mean, REFERENCE["mean"])
    says(log_variance, REFERENCE["logvar"])
    says(rebuilt, REFERENCE["rebuilt"])
    close(divergence(mean, log_variance), REFERENCE["kl"])


@pytest.mark.parametrize("margins", [(0.0, 0.0), (0.5, 0.25)])
def test_both_terms_of_the_vf_loss(released: tuple[Parts, Tensor], margins: tuple[float, float]) -> None:
    parts, images = released
    projected = parts.autoencoder.project(parts.autoencoder(images, Given())[3])
    said, features = REFERENCE["vf_{}_{}".format(*margins)], normal("features", [2, 5, 4, 4])
    close(cosine_loss(projected, features, margins[0]).mean(), said["cosine"])
    close(distance_loss(projected, features, margins[1]).mean(), said["distance"])


def test_a_whole_step_has_the_released_losses_weights_and_gradients(released: tuple[Parts, Tensor]) -> None:
    parts, images = released
    method = VAVAE(adversarial_start_images=0, discriminator_layers=1)
    learn, judge = list(method.step(parts, Batch(images), Given(), Clock(0, 0, 1)))  # type: ignore[arg-type]
    assert isinstance(learn, Update) and isinstance(judge, Update)
    said, network = REFERENCE["loss"], parts.autoencoder.network
    close(learn.loss.mean(), said["total"])
    for name in ("adversarial", "adversarial_weight"):
        close(learn.parts[name].mean() * (0.5 if name.endswith("weight") else 1), said[name])
    close((learn.parts["cosine"] + learn.parts["distance"]).mean(), said["vf"])
    close(0.1 * learn.parts["vf_weight"], said["vf_weight"])
    weights = [network.encoder.conv_in.weight, parts.autoencoder.projection.weight, network.decoder.conv_in.weight]
    slopes = torch.autograd.grad(learn.loss.mean(), weights)
    close(torch.stack([slope.norm() for slope in slopes]), said["grad_norms"])
    close(judge.loss.mean(), REFERENCE["discriminator"]["loss"])


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("f16d32", {}),
        ("f8d4", {"latent_channels": 4, "channel_mult": (1, 2, 4, 4), "attn_resolutions": ()}),
        ("f4d3", {"latent_channels": 3, "channel_mult": (1, 2, 4), "attn_resolutions": ()}),
    ],
)
def test_counts_of_parameters(name: str, settings: dict[str, Any]) -> None:
    with torch.device("meta"):
        network = KLAutoencoder(KLAutoencoderConfig(img_resolution=256, in_channels=3, **settings))
        judge = PatchDiscriminator(256, 3)
    assert sum(p.numel() for p in network.parameters()) == REFERENCE["parameters"][name]
    assert sum(p.numel() for p in judge.parameters()) == REFERENCE["parameters"]["discriminator"]
