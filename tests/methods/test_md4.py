"""MD4's training: the loss is the bound at spread times, known tokens give no gradient, it learns, resume, mistakes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from imagewright.methods.md4 import MD4, batch_times
from imagewright.models.masked_diffusion import MaskedDiffusionModel
from imagewright.models.tokens import PixelCodec
from imagewright.networks import TokenTransformerConfig, VQAutoencoderConfig
from imagewright.noise import StepNoise
from imagewright.pretrained import find_model
from imagewright.recipes import RECIPES
from imagewright.samplers import Ancestral
from imagewright.training.experiment import Experiment, run_experiment
from imagewright.types import UNCONDITIONAL, Batch, Clock, Condition, DataSpec, Update, UserError

SPEC = DataSpec(name="test", resolution=4, channels=1, num_classes=3)
CLOCK = Clock(step=0, images=0, total_images=1)
CODEC = PixelCodec(4, 1, 5)


class Table(nn.Module):
    """The same logits for every image; keeps what it was shown."""

    def __init__(self, size: int = 16, values: int = 5) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.logits = nn.Parameter(torch.randn(size, values, generator=generator).double())

    def forward(self, tokens: Tensor, time: Tensor | None = None, cond: Condition = UNCONDITIONAL) -> Tensor:
        self.shown, self.time, self.cond = tokens, time, cond
        self.out = self.logits.expand(len(tokens), -1, -1) + 0
        if self.out.requires_grad:
            self.out.retain_grad()
        return self.out


def batch(n: int = 64) -> Batch:
    levels = torch.randint(5, (n, 16), generator=torch.Generator().manual_seed(2))
    return Batch(CODEC.decode(levels), Condition(label=torch.arange(n) % 3))


def stepped(method: MD4, n: int = 64, seed: int = 0) -> tuple[Table, Update]:
    network = Table()
    parts = method.parts(network=network, codec=PixelCodec(4, 1, 5), spec=SPEC)
    (event,) = method.step(parts, batch(n), StepNoise(seed), CLOCK)
    assert isinstance(event, Update) and event.part == "model"
    return network, event


SETTINGS = [MD4(), MD4(schedule="cosine"), MD4(schedule="polynomial", power=2.0), MD4(steps=8)]
each = pytest.mark.parametrize("method", SETTINGS, ids=lambda m: f"{m.schedule}-{m.steps}")


@each
def test_the_loss_is_the_weighted_cross_entropy_of_unknown_tokens(method: MD4) -> None:
    network, event = stepped(method)
    assert network.time is not None and network.cond.label is not None
    levels = CODEC.encode(batch().images)
    masked = network.shown == 5
    assert torch.equal(network.shown[~masked], levels[~masked])
    t = 1 - batch_times(levels, StepNoise(0))
    path = MaskedDiffusionModel(Table(), CODEC, method.schedule, method.power, method.epsilon).path
    if method.steps:
        t = (t * method.steps).ceil() / method.steps
        weight = method.steps * path.reveal(t, t - 1 / method.steps)
    else:
        weight = path.rate(t)
    torch.testing.assert_close(network.time, path.masked(t).float())
    nats = -torch.log_softmax(network.logits.detach(), 1).expand(64, -1, -1).gather(2, levels[..., None])[..., 0]
    ends = 16 * 1e-4 * math.log(5)
    torch.testing.assert_close(event.loss.detach(), (weight * (nats * masked).sum(1) + ends) / 16 / math.log(2))
    torch.testing.assert_close(event.parts["bits_per_token"], event.loss.detach())


@each
def test_known_tokens_give_no_gradient(method: MD4) -> None:
    network, event = stepped(method)
    event.loss.sum().backward()
    slope = network.out.grad
    masked = network.shown == 5
    assert slope is not None and not slope[~masked].any() and slope[masked].abs().sum(1).min() > 0


def test_times_are_spread_over_the_batch() -> None:
    t = batch_times(torch.zeros(100, 3, dtype=torch.int64), StepNoise(4))
    torch.testing.assert_close(t.sort().values.diff(), torch.full((99,), 0.01, dtype=torch.float64))
    network, _ = stepped(MD4(), n=512)
    assert network.time is not None
    share = (network.shown == 5).float().mean(1)
    assert float((share - network.time).abs().mean()) < 0.12  # as many as the network is told, but for chance
    assert network.time.min() < 0.01 and network.time.max() > 0.99


def test_the_mean_loss_is_the_bound_whatever_the_schedule() -> None:
    """Independent tokens: every schedule and every number of steps costs their cross-entropy."""
    network, _ = stepped(MD4())
    levels = CODEC.encode(batch(512).images)
    nats = -torch.log_softmax(network.logits.detach(), 1).expand(512, -1, -1).gather(2, levels[..., None]).mean()
    bits = float(nats) / math.log(2)
    for method in SETTINGS:
        found = torch.stack([stepped(method, 512, seed)[1].loss.detach().mean() for seed in range(20)])
        assert float(found.mean()) == pytest.approx(bits, abs=4 * float(found.std()) / 20**0.5 + 1e-3)


def test_training_finds_the_frequencies_of_the_values() -> None:
    network = Table(1, 4)
    method = MD4()
    parts = method.parts(network=network, codec=PixelCodec(1, 1, 4), spec=SPEC)
    levels = torch.tensor([0, 1, 1, 3]).repeat(64)
    images = PixelCodec(1, 1, 4).decode(levels[:, None])
    optimiser = torch.optim.Adam([network.logits], lr=0.1)
    for i in range(200):
        (event,) = method.step(parts, Batch(images), StepNoise(i), CLOCK)
        assert isinstance(event, Update)
        optimiser.zero_grad()
        event.loss.mean().backward()
        optimiser.step()
    found = torch.softmax(network.logits.detach()[0], 0)
    torch.testing.assert_close(found, torch.tensor([0.25, 0.5, 0.0, 0.25]).double(), rtol=0, atol=0.02)


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="schedule is 'cosin'"):
        MD4(schedule="cosin")
    with pytest.raises(UserError, match=r"method\.steps is 0; it must be at least 1, or none"):
        MD4(steps=0)
    with pytest.raises(UserError, match=r"epsilon is 1\.0"):
        MD4(epsilon=1.0)


def small(recipe: str, tokenizer: Path | None) -> Any:
    base = RECIPES[recipe]()
    training = replace(base.training, total_images=96, batch=16, micro_batch=8, log_images=16, snapshot_images=96,
                       checkpoint_images=32)  # fmt: skip
    network = replace(base.network, model_channels=8, num_blocks=1)
    if tokenizer is not None:
        network = TokenTransformerConfig(values=2, length=1, width=16, depth=1, heads=2)
    named = None if tokenizer is None else str(tokenizer)
    return replace(base, network=network, training=training, sampler=Ancestral(num_steps=3)).giving(tokenizer=named)


@pytest.mark.parametrize("codec", ["pixels", "codebook"])
@pytest.mark.parametrize("recipe", ["md4-digits", "genmd4-digits"])
def test_resuming_changes_no_bit(
    recipe: str, codec: str, tmp_path: Path, resumed_run: Callable[[Experiment], Path]
) -> None:
    tokenizer = None
    if codec == "codebook":
        base = RECIPES["vq-digits"]()
        vq = VQAutoencoderConfig(img_resolution=8, in_channels=1, model_channels=4, channel_mult=(1, 1), num_blocks=1,
                                 codebook_size=7, codebook_dim=4)  # fmt: skip
        run = replace(base, network=vq, method=replace(base.method, discriminator_width=4),
                      training=replace(base.training, total_images=16, batch=16))  # fmt: skip
        tokenizer = run_experiment(run, tmp_path / "vq")
    experiment = small(recipe, tokenizer)

    folder = resumed_run(experiment)
    model: Any = find_model(folder).model
    assert isinstance(model, MaskedDiffusionModel)
    assert (model.codec.values, model.codec.length) == ((256, 64) if codec == "pixels" else (7, 16))


PUBLISHED = {
    # model, blocks, transformer, schedule, grid, batch
    "md4-cifar10": (128, 32, 0, "linear", "cosine", 256),
    "md4-imagenet64": (256, 24, 12, "linear", "cosine", 512),
    "md4-imagenet64-classes": (256, 8, 20, "cosine", "uniform", 512),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_have_the_published_settings(name: str) -> None:
    run = RECIPES[name]()
    network, training = run.network, run.training
    found = (
        network.model_channels, network.num_blocks, network.transformer_depth, run.method.schedule, run.sampler.grid,
        training.batch,
    )  # fmt: skip
    assert found == PUBLISHED[name] and run.method.epsilon == 1e-4 and run.method.steps is None
    optimizer = training.optimizer
    assert (optimizer.kind, optimizer.lr, optimizer.betas, optimizer.weight_decay) == ("adamw", 2e-4, (0.9, 0.99), 0.01)
    assert optimizer.clip_norm is None and optimizer.lr_ramp_images == 100 * training.batch
    half = optimizer.lr_at(training.total_images // 2 + 50 * training.batch, training.total_images)
    assert half == pytest.approx(1e-4) and optimizer.lr_cooldown_shape == "cosine"
    assert 0.5 ** (training.batch / training.ema.halflife_images) == pytest.approx(0.9999, abs=1e-9)
    assert training.total_images == 2_000_000 * training.batch and network.dropout == 0.1
