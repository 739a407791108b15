"""The tokenizer's training: its losses against closed forms, who learns from what, resume, mistakes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from imagewright.methods.adversary import gradient_penalty
from imagewright.methods.vq_tokenizer import VQTokenizerTraining, entropy_loss
from imagewright.models.vq import VQTokenizer
from imagewright.networks import VQAutoencoder, VQAutoencoderConfig
from imagewright.noise import StepNoise
from imagewright.pretrained import find_model
from imagewright.recipes import RECIPES
from imagewright.training.experiment import Experiment
from imagewright.types import Batch, Clock, DataSpec, Parts, Update, UserError

SPEC = DataSpec(name="test", resolution=8, channels=1)
TINY = VQAutoencoderConfig(
    img_resolution=8, in_channels=1, model_channels=8, channel_mult=(1, 1), num_blocks=1, codebook_size=12,
    codebook_dim=4,
)  # fmt: skip
CLOCK = Clock(step=0, images=0, total_images=100)


class Pooled(nn.Module):
    """Feature maps of a fixed network."""

    def forward(self, images: Tensor) -> list[Tensor]:
        return [images, nn.functional.avg_pool2d(images, 2)]


def made(**settings: Any) -> tuple[VQTokenizerTraining, Parts]:
    torch.manual_seed(0)
    method = VQTokenizerTraining(discriminator_width=4, **settings)
    return method, method.parts(network=VQAutoencoder(TINY), spec=SPEC, features=Pooled())


def images(n: int = 4) -> Tensor:
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


def updates(method: VQTokenizerTraining, parts: Parts, clock: Clock = CLOCK) -> list[Update]:
    found = list(method.step(parts, Batch(images()), StepNoise(0), clock))
    assert all(isinstance(event, Update) for event in found)
    return found  # type: ignore[return-value]


def test_the_entropy_loss_is_least_where_tokens_are_decided_and_codes_alike() -> None:
    size = 8
    distances = torch.full((4, 2, size), 10.0)
    distances.view(8, size).fill_diagonal_(0.0)  # token i is on code i
    # 1e-5 stands within the logarithm.
    torch.testing.assert_close(entropy_loss(distances, 0.01), torch.full((4,), math.log(1 / size + 1e-5)))
    assert entropy_loss(torch.ones(4, 2, size), 0.01).abs().max() < 1e-4  # undecided: log K each way
    collapsed = torch.full((4, 2, size), 10.0)
    collapsed[..., 0] = 0
    assert entropy_loss(collapsed, 0.01).abs().max() < 1e-4  # decided, but all for one code


def test_the_entropy_loss_keeps_its_slope_finite() -> None:
    distances = torch.zeros(1, 2, 3)
    distances[..., 1:] = 1e4  # shares that are exactly 0
    distances.requires_grad_(True)
    entropy_loss(distances, 0.01).sum().backward()
    assert distances.grad is not None and torch.isfinite(distances.grad).all()


def test_the_penalty_of_a_linear_discriminator_is_its_weight_squared() -> None:
    weight = torch.randn(64, dtype=torch.float64, requires_grad=True)
    real = torch.randn(3, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    logits = (real.flatten(1) @ weight)[:, None] * torch.tensor([1.0, 3.0])  # two places, mean 2
    penalty = gradient_penalty(logits, real)
    torch.testing.assert_close(penalty, (4 * weight.square().sum()).expand(3))
    (slope,) = torch.autograd.grad(penalty.sum(), weight)
    torch.testing.assert_close(slope, 24 * weight)


def test_the_loss_is_the_sum_of_its_parts() -> None:
    method, parts = made()
    torch.nn.init.normal_(parts.tokenizer.network.quantiser.codebook, std=0.3)
    first, second = updates(method, parts)
    assert (first.part, second.part) == ("tokenizer", "discriminator")
    x_hat, q = parts.tokenizer(images())
    squares = (q.codes - q.z).square().flatten(1).mean(1)
    logits = parts.discriminator(x_hat)
    expected = ((x_hat - images()) / 2).square().flatten(1).mean(1) + 1.25 * squares
    expected = expected + 0.1 * entropy_loss(q.distances, 0.01) + 0.1 * nn.functional.softplus(-logits).mean(1)
    expected = expected + 0.1 * first.parts["perceptual"]
    torch.testing.assert_close(first.loss, expected)
    assert 1 <= float(first.parts["perplexity"]) <= 12
    assert float(first.parts["unused_codes"]) == 12 - len(q.tokens.unique())
    real = nn.functional.softplus(-parts.discriminator(images())).mean(1)
    fake = nn.functional.softplus(logits).mean(1)
    torch.testing.assert_close(second.loss, real + fake + 10 * second.parts["r1"])


def test_the_commitment_moves_the_encoder_and_the_codebook_loss_the_codes() -> None:
    settings = {"perceptual": 0.0, "adversarial": 0.0, "entropy": 0.0}
    method, parts = made(commitment=0.0, **settings)
    network = parts.tokenizer.network
    network.decoder.requires_grad_(False)
    (event,) = updates(method, parts)
    rebuilt, q = parts.tokenizer(images())
    (book,) = torch.autograd.grad(event.loss.sum(), network.quantiser.codebook, retain_graph=True)
    (alone,) = torch.autograd.grad(
        (q.codes - q.z.detach()).square().flatten(1).mean(1).sum(), network.quantiser.codebook
    )
    torch.testing.assert_close(book, alone)
    # Without commitment the encoder learns from the reconstruction alone.
    first = network.encoder[0].weight
    (whole,) = torch.autograd.grad(event.loss.sum(), first)
    (pixels,) = torch.autograd.grad(((rebuilt - images()) / 2).square().flatten(1).mean(1).sum(), first)
    torch.testing.assert_close(whole, pixels)


def test_each_update_reaches_what_it_is_to_train_and_nothing_else() -> None:
    method, parts = made(pixels=0.0, perceptual=0.0, adversarial=0.1, entropy=0.0)
    network = parts.tokenizer.network
    first, second = updates(method, parts)
    _, q = parts.tokenizer(images())
    codes = (q.codes - q.z.detach()).square().flatten(1).mean(1).sum()
    # The commitment, whatever its weight, does not move the codes; nor does what the decoder makes of them.
    (book,) = torch.autograd.grad(first.loss.sum(), network.quantiser.codebook, retain_graph=True)
    torch.testing.assert_close(book, torch.autograd.grad(codes, network.quantiser.codebook)[0])
    second.loss.sum().backward()
    assert all(p.grad is None for p in parts.tokenizer.parameters())
    assert all(p.grad is not None for p in parts.discriminator.parameters())


def test_the_discriminator_comes_in_when_it_is_to() -> None:
    method, parts = made(adversarial_start=0.5)
    assert [u.part for u in updates(method, parts)] == ["tokenizer"]
    later = Clock(step=1, images=50, total_images=100)
    assert [u.part for u in updates(method, parts, later)] == ["tokenizer", "discriminator"]
    _, without = made(adversarial=0.0)
    assert sorted(without.roles) == ["features", "tokenizer"]


def test_mistakes_are_named() -> None:
    for name, value, said in (
        ("perceptual", -1.0, "must be >= 0"),
        ("pixels", math.inf, "must be >= 0 and finite"),
        ("entropy_temperature", 0.0, "must be positive"),
        ("adversarial_start", 1.0, r"must lie in \[0, 1\)"),
    ):
        with pytest.raises(UserError, match=f"method.{name} is .*{said}"):
            VQTokenizerTraining(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"method.perceptual is 0.1; it needs a feature network \(`features`\)"):
        VQTokenizerTraining().parts(network=VQAutoencoder(TINY), spec=SPEC)


def test_resuming_changes_no_bit_and_the_run_leaves_reconstructions(
    resumed_run: Callable[[Experiment], Path],
) -> None:
    base = RECIPES["vq-digits"]()
    training = replace(base.training, total_images=96, batch=16, micro_batch=8, log_images=16, snapshot_images=96,
                       checkpoint_images=32)  # fmt: skip
    method = VQTokenizerTraining(discriminator_width=4)
    experiment = replace(base, network=TINY, method=method, training=training)

    folder = resumed_run(experiment)
    file = find_model(folder)
    assert isinstance(file.model, VQTokenizer) and file.sampler is None
    assert file.origin["codebook"]["size"] == 12 and 0 <= file.origin["codebook"]["dead"] < 12
    assert 1 <= file.origin["codebook"]["perplexity"] <= 12 and file.origin["psnr"] > 0
