"""Analog bits (Chen et al. 2022, 2208.04202): diffusion of the bits of pixels, or of a tokenizer's tokens.

The published runs: AdamW without decay, betas (0.9, 0.999), eps 1e-8, gradients of norm 1 at most, 10,000 updates of
warm-up and a constant rate, averages of 0.9999 an update, pictures mirrored at random, classes told. The loss is a
mean, as ours, so eps stays. The released configuration of bits has b = 0.5 and softmaxes; the paper's own is b = 1 and
the squared error.

Departs    Keras adds eps before it corrects the second moment's bias: in effect 30 times as much in the first update,
           a quarter more in the thousandth. The released average begins from another network's first weights, of
           which a share of 0.9999^n is left after n updates; ours begins from those that are trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from imagewright.data.config import DataConfig
from imagewright.methods.analog_bits import AnalogBitsTraining
from imagewright.networks import BitUNetConfig
from imagewright.recipes import edm
from imagewright.recipes.edm import FROM_DATA
from imagewright.recipes.published import halflife_images
from imagewright.samplers import BitDiffusion
from imagewright.training.config import EmaConfig, OptimizerConfig, TrainingConfig
from imagewright.training.experiment import Experiment


def digits() -> Experiment:
    """The bits of digits' pixels, 0.8 M parameters: minutes on a CPU thread."""
    run = _of_bits(edm.digits(), 10)
    return replace(run, sampler=replace(run.sampler, ahead=1.0))


def codebook_digits() -> Experiment:
    """The bits of the tokens of the run `runs/vq-digits`, six on each of 4 x 4 places: a minute or two."""
    run = digits()
    network = replace(run.network, channel_mult=(2, 2), attn_resolutions=(4, 2))
    return replace(run, network=network, sampler=BitDiffusion(num_steps=25, rule="ddim", ahead=2.0)).giving(
        tokenizer="runs/vq-digits"
    )


def emoji64_16() -> Experiment:
    """The bits of emoji at 16x16, 3.8 M parameters: an hour or two on a CPU thread."""
    return _of_bits(edm.emoji64_16(), 100)


def emoji64_32() -> Experiment:
    """The same at 32x32: hours on two cores."""
    return _of_bits(edm.emoji64_32(), 250)


def _of_bits(run: Experiment, steps: int) -> Experiment:
    """A recipe of EDM's, of bits: the same network, length and pace; Adam's eps and the clipping are the paper's."""
    optimizer = replace(run.training.optimizer, kind="adamw", eps=1e-8, clip_norm=1.0)
    return replace(
        run,
        method=AnalogBitsTraining(),
        sampler=BitDiffusion(num_steps=steps, rule="ddim"),
        training=replace(run.training, optimizer=optimizer),
    )


def self_conditioned_digits() -> Experiment:
    """EDM's denoiser of digits, self-conditioned: the same network, length and data."""
    return _self_conditioned(edm.digits())


def self_conditioned_emoji64_32() -> Experiment:
    """EDM's denoiser of emoji, self-conditioned."""
    return _self_conditioned(edm.emoji64_32())


def _self_conditioned(run: Experiment) -> Experiment:
    return replace(run, method=replace(run.method, self_conditioning=True))


def cifar10() -> Experiment:
    """CIFAR-10 as published: 8-bit colours as 24 bits of size 1, squared error (published FID 3.48)."""
    return _published("cifar10-32x32.zip", 128, 1_500_000, 1e-4, BitUNetConfig(**FROM_DATA), 400)


def cifar10_softmax() -> Experiment:
    """The released configuration's other half: shuffled codes of size 0.5, a softmax over the 256 of each colour."""
    run = cifar10()
    method = AnalogBitsTraining(encoding="random", scale=0.5, head="softmax")
    return replace(run, method=method, network=replace(run.network, out_kernel=1))


def imagenet64() -> Experiment:
    """ImageNet-64: the released configuration is that of pixels, and the bits' length is not known (FID 4.84)."""
    network = BitUNetConfig(**FROM_DATA, model_channels=192, channel_mult=(1, 2, 3, 4))
    return _published("imagenet-64x64.zip", 1024, 250_000, 2e-4, network, 1000)


def _published(source: str, batch: int, updates: int, lr: float, network: BitUNetConfig, steps: int) -> Experiment:
    return Experiment(
        data=DataConfig(source=source, xflip=True),
        method=AnalogBitsTraining(),
        network=network,
        sampler=BitDiffusion(num_steps=steps, rule="ddpm"),
        training=TrainingConfig(
            total_images=updates * batch,
            batch=batch,
            optimizer=OptimizerConfig(kind="adamw", lr=lr, lr_ramp_images=10_000 * batch, clip_norm=1.0),
            ema=EmaConfig(halflife_images=halflife_images(batch, 0.9999), rampup_ratio=None),
            log_images=100 * batch,
            snapshot_images=10_000 * batch,
            checkpoint_images=10_000 * batch,
        ),
    )


FAMILY: Mapping[str, Callable[[], Experiment]] = {
    "analog-bits-digits": digits,
    "analog-bits-codebook-digits": codebook_digits,
    "analog-bits-emoji64-16": emoji64_16,
    "analog-bits-emoji64-32": emoji64_32,
    "analog-bits-cifar10": cifar10,
    "analog-bits-cifar10-softmax": cifar10_softmax,
    "analog-bits-imagenet64": imagenet64,
    "self-conditioned-digits": self_conditioned_digits,
    "self-conditioned-emoji64-32": self_conditioned_emoji64_32,
}
