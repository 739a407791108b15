"""Analog bits: a diffusion of discrete data's bits (Chen et al. 2022, arXiv 2208.04202), with self-conditioning.

Networks   denoiser (trained), of a codec's bits (`models.bits`).   Time   t uniform on [0, 1], gamma(t) cosine.
Ingredients   bits in {-b, b}, x_t = sqrt(gamma) x0 + sqrt(1 - gamma) eps; the network is told gamma and answers x0;
           loss |x0 - bits|^2, the mean over bits, unweighted; or cross-entropies (`head`); three encodings; half of the
           images are shown the network's own estimate (`methods.self_conditioning`); samplers with asymmetric intervals
           that return the last estimate (`samplers.BitDiffusion`).
Departs    b is 1, the paper's; the released configuration has 0.5 with the softmax. The class goes where our networks
           take it, not behind the first layer of the time's embedding, except in `networks.BitUNet`, which is the
           released one. The sigmoid's loss is exact, the official one stops at 18.4 nats a bit. The released program's
           other schedules, its latent self-conditioning (of Recurrent Interface Networks, 2212.11972) and guidance are
           left out, and so is captioning: there is no text here.
Likelihood none: `evaluate --metrics bpd` refuses it.
Checked    `tests/methods/test_analog_bits.py`: round trips, update rules against the released program's numbers, the
           estimate takes no gradient, the best answer to one bit in closed form, resume bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from imagewright.methods.self_conditioning import estimated
from imagewright.models.bits import AnalogBits, BitDenoiser, Encoding, Head, answers
from imagewright.models.self_conditioned import SelfConditioned
from imagewright.noise import StepNoise
from imagewright.paths.gammas import gamma, sigma_of
from imagewright.precision import wide
from imagewright.types import Batch, Clock, Codec, DataSpec, Event, Parts, Trained, Update


@dataclass(frozen=True, kw_only=True)
class AnalogBitsTraining:
    """Train a denoiser of bits."""

    product: ClassVar[str] = "denoiser"

    encoding: Encoding = "binary"
    """Of tokens in bits: binary, gray, random (a fixed shuffling); one-hot, a channel for every value, as a control."""
    scale: float = 1.0
    """b, what a bit is."""
    head: Head = "mse"
    """mse, the network answers bits; sigmoid, logits of bits; softmax, logits of all codes of a token."""
    schedule: str = "cosine"
    """gamma(t): cosine, linear."""
    self_conditioning: bool = True
    """Show the network its own earlier answer: of every second image in training, along the path in sampling."""

    def __post_init__(self) -> None:
        gamma(self.schedule, torch.zeros(1))

    def sizes(self, *, codec: Codec) -> dict[str, int]:
        """Of the network: the bits' places and channels, twice as many coming in with an estimate."""
        bits = AnalogBits(codec, self.encoding, self.scale)
        channels, side, _ = bits.latent
        coming = 2 * channels if self.self_conditioning else channels
        return {"img_resolution": side, "in_channels": coming, "out_channels": answers(bits, self.head)}

    def parts(self, *, network: nn.Module, codec: Codec, spec: DataSpec) -> Parts:
        """network: F(x, noise_label, cond) of `networks`. codec: a `types.Codec`, kept as it is."""
        network = SelfConditioned(network, self.scale) if self.self_conditioning else network
        model = BitDenoiser(network, codec, self.encoding, self.scale, self.head, self.schedule)
        return Parts(denoiser=Trained(module=model))

    def step(self, parts: Any, batch: Batch, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        """One update of the denoiser."""
        model, cond = parts.denoiser, batch.cond
        with torch.no_grad():
            tokens = model.codec.encode(batch.images)
            bits = model.bits.encode(tokens)
        t = noise.uniform(wide(bits[:, 0, 0, 0]))
        sigma = sigma_of(gamma(self.schedule, t)).to(bits.dtype)
        noisy = bits + sigma[:, None, None, None] * noise.normal(bits)
        if self.self_conditioning:
            cond = estimated(model, noisy, sigma, cond, noise)
        yield Update("denoiser", model.loss(model.answer(noisy, sigma, cond), tokens), at=sigma)
