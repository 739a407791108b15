"""What the claims in the plane share: small denoisers of points, their training, and where the truth is.

Points are images of two channels and one pixel, [N, 2, 1, 1], so every denoiser, wrapper and sampler takes them as is.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from imagewright.methods.edm import denoising_error, loss_weight
from imagewright.metrics.energy import energy_distance
from imagewright.models.preconditioning import EDMPrecond, Preconditioned
from imagewright.noise import ImageNoise, StepNoise
from imagewright.oracles import GaussianMixture
from imagewright.paths.noise_levels import LogNormal, LogUniform
from imagewright.training.config import EmaConfig
from imagewright.training.ema import Ema, HalfLife
from imagewright.types import UNCONDITIONAL, Condition, Denoiser, Sampler

T = TypeVar("T")
D = TypeVar("D", bound=Preconditioned)
PLANE = 0.7
"""sigma_data of modes on the unit circle."""


class PointNetwork(nn.Module):
    """F(x, noise_label, cond) for points: a multilayer perceptron on the point and sines of the noise label.

    classes: number of labels it can be told, 0 for none. destination: whether it is told where to go, too. numbers: of
    a point; 64 for images of 8x8.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        classes: int = 0,
        frequencies: int = 8,
        *,
        destination: bool = False,
        numbers: int = 2,
    ) -> None:
        super().__init__()
        self.settings = (width, depth, classes, frequencies)
        self.frequencies: Tensor
        self.register_buffer("frequencies", 2.0 ** torch.arange(frequencies) * math.pi / 16)
        self.classes = classes
        self.towards = nn.Linear(2 * frequencies, width, bias=False) if destination else None
        inner = [layer for _ in range(depth - 1) for layer in (nn.Linear(width, width), nn.SiLU())]
        self.layers = nn.Sequential(
            nn.Linear(numbers + 2 * frequencies + classes, width), nn.SiLU(), *inner, nn.Linear(width, numbers)
        )

    def forward(self, x: Tensor, noise_label: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """x: [N, ...]; noise_label: [N]. Returns x's shape."""
        answer: Tensor = self.layers[-1](self.bottleneck(x, noise_label, cond).flatten(1))
        return answer.reshape(x.shape)

    def bottleneck(self, x: Tensor, noise_label: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """Features of the last hidden layer, [N, width, 1, 1]; as `networks.bottleneck_head.HasBottleneck`."""
        told = [x.flatten(1), self._waves(noise_label)]
        if self.classes:
            rows = x.new_zeros(len(x), self.classes)
            if cond.label is not None:
                known = cond.label >= 0
                rows[known, cond.label[known]] = 1.0
            told.append(rows)
        hidden = self.layers[0](torch.cat(told, 1))
        if self.towards is not None:
            assert cond.destination is not None
            hidden = hidden + self.towards(self._waves(cond.destination))
        features: Tensor = self.layers[1:-1](hidden)
        return features[:, :, None, None]

    def told_destination(self) -> PointNetwork:
        """As `networks.UNet.told_destination`."""
        changed = PointNetwork(*self.settings, destination=True)
        changed.load_state_dict(self.state_dict(), strict=False)
        assert changed.towards is not None
        nn.init.zeros_(changed.towards.weight)
        return changed.to(next(self.parameters()))

    @property
    def last_layer(self) -> nn.Parameter:
        """As `networks.UNet.last_layer`."""
        return cast(nn.Parameter, self.layers[-1].weight)

    def _waves(self, noise_label: Tensor) -> Tensor:
        phase = noise_label[:, None] * self.frequencies
        return torch.cat([phase.sin(), phase.cos()], 1)


@dataclass(frozen=True, kw_only=True)
class PointTraining:
    """How a denoiser of points is trained."""

    iterations: int
    batch: int = 512
    lr: float = 2e-3
    cooldown: bool = True
    """Lower the rate linearly to zero over the run."""
    ema: EmaConfig = EmaConfig(halflife_images=50_000)
    seed: int = 0
    levels: LogNormal | LogUniform = LogNormal(mean=-1.2, std=1.4)
    sigma_data: float = PLANE


def seeded(seed: int, make: Callable[[], T]) -> T:
    """What `make` makes with torch's global generator at a seed, as weights are; it is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def point_denoiser(width: int, depth: int, seed: int, *, classes: int = 0, sigma_data: float = PLANE) -> EDMPrecond:
    """An untrained denoiser; equal seeds give equal weights."""
    return EDMPrecond(seeded(seed, lambda: PointNetwork(width, depth, classes)), sigma_data=sigma_data)


def train(
    denoiser: D,
    draw: Callable[[int, StepNoise], tuple[Tensor, Condition]],
    config: PointTraining,
    on_step: Callable[[int, nn.Module], None] = lambda step, denoiser: None,
    weight: Callable[[Tensor, float], Tensor] = loss_weight,
) -> D:
    """Train a copy with EDM's loss on what `draw(n, noise)` gives; returns its average.

    on_step sees raw weights. weight: of the squared error, by sigma [N] and sigma_data.
    """
    student = copy.deepcopy(denoiser).train()
    average = Ema(student, HalfLife(config.ema.halflife_images, config.ema.rampup_ratio))
    optimizer = torch.optim.Adam(student.parameters(), lr=config.lr)
    for step in range(config.iterations):
        noise = StepNoise(config.seed, step)
        points, cond = draw(config.batch, noise)
        sigma = config.levels.sample(noise, points[:, 0, 0, 0])
        loss = (weight(sigma, config.sigma_data) * denoising_error(student, points, sigma, cond, noise)).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for group in optimizer.param_groups:
            group["lr"] = config.lr * (1 - step / config.iterations if config.cooldown else 1.0)
        optimizer.step()
        average.update(student, (step + 1) * config.batch, config.batch)
        on_step(step + 1, student)
    student.load_state_dict(average.state)
    return student.eval()


def from_set(points: Tensor, labels: Tensor | None = None) -> Callable[[int, StepNoise], tuple[Tensor, Condition]]:
    """Draws with replacement from a finite set of points [M, 2, 1, 1]."""

    def draw(n: int, noise: StepNoise) -> tuple[Tensor, Condition]:
        rows = noise.integers(len(points), torch.empty(n))
        return points[rows], Condition() if labels is None else Condition(label=labels[rows])

    return draw


def latents(seed: int, count: int) -> Tensor:
    """Standard normal [count, 2, 1, 1], float64, of a seed that says what it is for."""
    return ImageNoise(seed, [0]).normal(torch.empty(1, count, 2, 1, 1, dtype=torch.float64))[0]


def sampled(
    denoiser: Denoiser, sampler: Sampler, seed: int, count: int, cond: Condition = UNCONDITIONAL
) -> npt.NDArray[np.float64]:
    """`count` points [count, 2] of a sampler, float64."""

    noise = StepNoise(seed, 1)  # one generator for all points: fast, and the claims draw every set in one batch
    drawn: npt.NDArray[np.float64] = (
        sampler(denoiser, latents(seed, count), cond, noise=noise).flatten(1).double().numpy()
    )
    return drawn


def real_points(oracle: GaussianMixture, seed: int, count: int) -> npt.NDArray[np.float64]:
    """Points [count, 2] of the true distribution."""
    points: npt.NDArray[np.float64] = oracle.sample(count, StepNoise(seed, 2)).flatten(1).double().numpy()
    return points


def distance(points: npt.NDArray[np.float64], reference: npt.NDArray[np.float64]) -> float:
    """Energy distance, in units of 10^-3 so that tables are readable."""
    return 1000 * energy_distance(points, reference)
