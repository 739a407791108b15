"""Analog bits: self-conditioning makes better samples, a shuffled code worse ones (2208.04202)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from imagewright.bench.claims.plane import seeded
from imagewright.bench.claims.plane_training import PointRun, distil
from imagewright.bench.claims.rings import distance_to, ring
from imagewright.methods.analog_bits import AnalogBitsTraining
from imagewright.models.bits import TIME_SCALE
from imagewright.models.tokens import PixelCodec
from imagewright.noise import StepNoise
from imagewright.samplers import BitDiffusion
from imagewright.samplers.generator import ImageGenerator
from imagewright.training.config import EmaConfig
from imagewright.types import UNCONDITIONAL, Condition, DataSpec

CODEC = PixelCodec(1, 2)
SPEC = DataSpec(name="points", resolution=1, channels=2)
SHRUNK = 0.6
"""What brings a ring and its modes' width into [-1, 1]."""


class BitNetwork(nn.Module):
    """(x [N, C, 1, 1], 1000 gamma [N], cond) -> [N, out, 1, 1]: a multilayer perceptron."""

    def __init__(self, coming: int, going: int, width: int, depth: int = 3, frequencies: int = 6) -> None:
        super().__init__()
        self.frequencies: Tensor
        self.register_buffer("frequencies", 2.0 ** torch.arange(frequencies) * math.pi / 2 / TIME_SCALE)
        inner = [layer for _ in range(depth - 1) for layer in (nn.Linear(width, width), nn.SiLU())]
        self.layers = nn.Sequential(
            nn.Linear(coming + 2 * frequencies, width), nn.SiLU(), *inner, nn.Linear(width, going)
        )

    def forward(self, x: Tensor, noise_label: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        phase = noise_label[:, None] * self.frequencies
        answer: Tensor = self.layers(torch.cat([x.flatten(1), phase.sin(), phase.cos()], 1))
        return answer[:, :, None, None]


def trained(method: AnalogBitsTraining, seed: int, updates: int, lr: float, width: int = 128, batch: int = 256) -> Any:
    """The averaged denoiser of a ring's points, whose coordinates are 8-bit values."""
    oracle, sizes = ring(seed), method.sizes(codec=CODEC)
    network = seeded(seed, lambda: BitNetwork(sizes["in_channels"], sizes["out_channels"], width))
    parts = method.parts(network=network, codec=CODEC, spec=SPEC)

    def draw(n: int, noise: StepNoise) -> tuple[Tensor, Condition]:
        return SHRUNK * oracle.sample(n, noise), UNCONDITIONAL

    run = PointRun(iterations=updates, batch=batch, lr=lr, seed=seed, ema=EmaConfig(halflife_images=20 * batch))
    return distil(method, parts, draw, run)


def score(model: Any, sampler: BitDiffusion, seed: int, count: int) -> float:
    """Energy distance x 1000 of samples to the ring."""
    generator = ImageGenerator(model, SPEC, sampler)
    drawn = generator.drawn(range(count), seed=seed)
    return distance_to(ring(seed), drawn.flatten(1).double().numpy() / SHRUNK)
