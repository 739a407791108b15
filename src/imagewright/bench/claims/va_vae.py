"""VA-VAE: aligned with a frozen network, wide latents are in order and still reconstruct (2501.01423)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from imagewright.bench.claims.claim import Budget, Claim, Row, lower, times
from imagewright.bench.claims.plane import seeded
from imagewright.data import Loader, from_uint8, open_images
from imagewright.data.image_set import ImageSet
from imagewright.methods.edm import EDM
from imagewright.methods.va_vae import VAVAE
from imagewright.metrics import embed, emoji_features
from imagewright.metrics.frechet import frechet_of_images
from imagewright.metrics.probe import probe_accuracy
from imagewright.models.latents import LatentSpace
from imagewright.networks import KLAutoencoder, KLAutoencoderConfig, SongUNet, SongUNetConfig
from imagewright.samplers import Heun
from imagewright.samplers.generator import ImageGenerator
from imagewright.training.config import EmaConfig, OptimizerConfig, TrainingConfig
from imagewright.training.trainer import Trainer
from imagewright.types import Batch, Condition

SIDE, BATCH = 16, 64
PLAIN = VAVAE(perceptual=0.0, adversarial=0.0, vf=0.0)
PSNR, PROBE = "PSNR, dB", "linear probe, %"
NARROW, WIDE, ALIGNED = "4 channels", "32 channels", "32 channels, aligned"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How an autoencoder of the claim is trained, and a denoiser in its latents; updates are of BATCH images."""

    updates: int = 500
    lr: float = 2e-3
    width: int = 8
    mult: tuple[int, ...] = (1, 1, 2)
    vf: float = 0.5
    cosine_margin: float = 0.0
    distance_margin: float = 0.0
    denoiser_updates: int = 0
    denoiser_width: int = 32
    denoiser_lr: float = 2e-3
    drawn: int = 1000


def trained(method: Any, parts: Any, loader: Any, seed: int, updates: int, lr: float, batch: int) -> Any:
    """The product's averaged weights after so many updates, the rate falling over the second half."""
    total = updates * batch
    betas = (0.5, 0.9) if isinstance(method, VAVAE) else (0.9, 0.999)
    optimizer = OptimizerConfig(lr=lr, betas=betas, lr_ramp_images=total // 20, lr_cooldown_images=total // 2)
    ema = EmaConfig(halflife_images=total / 40, rampup_ratio=None)
    config = TrainingConfig(
        total_images=total, batch=batch, seed=seed, channels_last=True, optimizer=optimizer, ema=ema
    )
    trainer = Trainer(method, parts, loader, config, Path())  # only `train` writes
    for _ in range(updates):
        trainer.train_step()
    product = copy.deepcopy(trainer.learners[method.product].module)
    product.load_state_dict(trainer.product_state())
    return product.eval()


def autoencoder(seed: int, channels: int, aligned: bool, images: ImageSet, setting: Setting) -> Any:
    """An autoencoder by 4; seeds decide weights and the order of images, for all contenders alike."""
    config = KLAutoencoderConfig(
        img_resolution=SIDE, in_channels=3, latent_channels=channels, model_channels=setting.width,
        channel_mult=setting.mult, num_blocks=1, attn_resolutions=(),
    )  # fmt: skip
    method = PLAIN
    if aligned:
        method = replace(PLAIN, vf=setting.vf, cosine_margin=setting.cosine_margin,
                         distance_margin=setting.distance_margin)  # fmt: skip
    parts = seeded(seed, lambda: method.parts(network=KLAutoencoder(config), spec=images.spec))
    return trained(method, parts, Loader(images, BATCH, seed), seed, setting.updates, setting.lr, BATCH)


def encoded(model: Any, images: ImageSet) -> torch.Tensor:
    """Means of the latents of all images, [N, C, h, w]."""
    pictures = from_uint8(images.images())
    return torch.cat([model.encode(pictures[start : start + 250]) for start in range(0, len(pictures), 250)])


def psnr(model: Any, images: ImageSet, latents: torch.Tensor) -> float:
    """Of what is decoded, in dB, the mean over images of a colour range of 2."""
    rebuilt = torch.cat([model.decode(latents[start : start + 250]) for start in range(0, len(latents), 250)])
    errors = (rebuilt - from_uint8(images.images())).double().square().flatten(1).mean(1)
    return float((10 * (4 / errors).log10()).mean())


class Latents:
    """Latents that are there already, for a `Trainer`: drawn in an endless order of a seed."""

    def __init__(self, latents: torch.Tensor, labels: torch.Tensor, seed: int) -> None:
        self.latents, self.labels, self.seed = latents, labels, seed

    def follow(self, *_: Any) -> None:
        """Nothing is read ahead."""

    def batch(self, position: int, size: int) -> Batch:
        """Images position .. position + size - 1."""
        rows = torch.from_numpy(np.random.default_rng((self.seed, position)).integers(0, len(self.latents), size))
        return Batch(self.latents[rows], Condition(label=self.labels[rows]))


def generated(seed: int, model: Any, images: ImageSet, latents: torch.Tensor, setting: Setting) -> dict[str, float]:
    """fd_emoji of images that a denoiser draws in an autoencoder's latents."""
    space = LatentSpace(model)
    by_channel = latents.transpose(0, 1).flatten(1)
    space.measured(by_channel.mean(1), by_channel.std(1))
    channels, side, _ = space.shape
    config = SongUNetConfig(
        img_resolution=side, in_channels=channels, out_channels=channels, label_dim=images.spec.num_classes,
        model_channels=setting.denoiser_width, channel_mult=(2,), num_blocks=2, attn_resolutions=(4,), dropout=0.0,
    )  # fmt: skip
    method = EDM()
    parts = seeded(seed, lambda: method.parts(network=SongUNet(config), spec=space.spec(images.spec)))
    loader = Latents(space.normalised(latents), torch.from_numpy(images.labels), seed)
    denoiser = trained(method, parts, loader, seed, setting.denoiser_updates, setting.denoiser_lr, BATCH)
    extractor = emoji_features()
    generator = ImageGenerator(denoiser, images.spec, Heun(num_steps=12), space=space)
    labels = images.labels[np.arange(setting.drawn) % len(images)]
    batches = generator.batches(setting.drawn, labels=labels, seed=seed, batch_size=250)
    return {"fd_emoji": frechet_of_images(batches, extractor, embed(images, extractor).moments)}


def compared(seed: int, setting: Setting, arms: Mapping[str, tuple[int, bool]]) -> list[Row]:
    """Probe, PSNR and what is drawn, of each autoencoder."""
    train, test = (open_images("emoji64", resolution=SIDE, split=split) for split in ("train", "test"))
    rows = []
    for name, (channels, aligned) in arms.items():
        model = autoencoder(seed, channels, aligned, train, setting)
        known, new = encoded(model, train), encoded(model, test)
        found = 100 * probe_accuracy(known.numpy(), train.labels, new.numpy(), test.labels)
        more = {PSNR: psnr(model, test, new)}
        if setting.denoiser_updates:
            more |= generated(seed, model, train, known, setting)
        rows.append(Row(name=name, score=found, cost=setting.updates * BATCH, more=more))
    return rows


ARMS = {NARROW: (4, False), WIDE: (32, False), ALIGNED: (32, True)}


def run(seed: int, budget: Budget) -> Sequence[Row]:
    """All three."""
    return compared(seed, Setting() if budget == "full" else Setting(updates=2), ARMS)


CLAIM = Claim(
    key="va_vae",
    paper="2501.01423",
    headline="",
    miniature="",
    measure=PROBE,
    cost="images",
    run=run,
    better="higher",
    checks=(lower("x", WIDE, ALIGNED, by=10.0), times("y", NARROW, WIDE, of=PSNR)),
)
