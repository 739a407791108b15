"""Consistency training with a learnt coupling of images and noise, VCT (Silvestri et al. 2025, arXiv 2502.18197).

Source     the program sony/vct (`models/`, `kernels/`, `conf/`, README).
Networks   student (trained): consistency model and encoder in one, one optimiser and one average for both; the target
           is the student under stop-gradient. No teacher.
Coupling   learnt:  n = mu(x0) + std(x0) e, the same n at both ends of a pair; the loss gets
                    beta w KL(N(mu, (std + 1e-8)^2) || N(0, 1)), summed over an image's numbers, w the weight of the
                    uppermost interval, 1 / (T - its lower end), or 1 with EDM's weights.
           Gradients reach the encoder through the upper end alone, and through the KL.
           The baselines: independent, and the transport of a batch (`methods.noise_couplings`).
Bases      `methods.improved_consistency` or `methods.easy_consistency`: levels, weight, stages; the distance of iCT is
           of every number by itself and summed here, as in the program.
Kernels    "ve" and "li" (`models.coupled`).
Sampling   one step begins with prior noise; before a further one the encoder says the noise of what was drawn.
Departs    see `models.coupled`, and the bases for what is theirs. The assignment of transport moves the noise, theirs
           the images and labels: the same pairs in another order. At drawing its baseline takes fresh noise, where
           theirs pairs the images of a batch anew. A gradient that is not finite stops the training, where it becomes 0
           there. The gradient's norm is cut over student and encoder together, as there.
Checked    losses and gradients of the program, both bases, both kernels; mu = 0 and std = 1 is independent coupling,
           bit for bit; the KL against a Monte Carlo estimate; which branches the encoder hears of.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, get_args

from torch import Tensor, nn

from imagewright.checks import require_non_negative
from imagewright.errors import an
from imagewright.methods.distances import Distance, Features
from imagewright.methods.easy_consistency import EasyConsistencyTuning
from imagewright.methods.improved_consistency import ImprovedConsistencyTraining
from imagewright.methods.noise_couplings import Independent, Transported
from imagewright.methods.pairs import column, consistency_parts, match
from imagewright.models.coupled import CoupledConsistencyModel, Kernel
from imagewright.networks import UNet
from imagewright.noise import StepNoise
from imagewright.types import Batch, Clock, Coupling, DataSpec, Event, Parts, UserError

Base = ImprovedConsistencyTraining | EasyConsistencyTuning
ICT = ImprovedConsistencyTraining(distance=Distance(kind="pseudo_huber_each"))


@dataclass(frozen=True, kw_only=True)
class Learnt:
    """An encoder says which noise belongs to an image."""

    beta: float = 30.0
    """Weight of the KL (30 with iCT, 10 with ECM on CIFAR-10, 90 on ImageNet-64); at 0 the prior is left behind."""
    channels: int = 32
    """Of the encoder, which is the student's network otherwise, with so many channels at its finest level."""
    blocks: int = 1
    """Its residual blocks at a level: 1, or 2 on ImageNet-64."""

    def __post_init__(self) -> None:
        require_non_negative("method.coupling.beta", self.beta)
        for name in ("channels", "blocks"):
            if getattr(self, name) < 1:
                raise UserError(f"method.coupling.{name} is {getattr(self, name)}; it must be at least 1")

    def encoder(self, network: nn.Module) -> nn.Module:
        """An untrained encoder for a student with that network. Raises UserError for one that is none of the U-Nets."""
        if not isinstance(network, UNet):
            raise UserError(f"the network is {an(type(network).__name__)}; an encoder of noise is made of a U-Net")
        config = replace(
            network.config, model_channels=self.channels, num_blocks=self.blocks,
            out_channels=2 * network.config.out_channels, augment_dim=0,
        )  # fmt: skip
        return type(network)(config)


@dataclass(frozen=True, kw_only=True)
class VariationalConsistencyTraining:
    """Consistency training on pairs whose noise is learnt, or drawn, or transported."""

    product: ClassVar[str] = "student"

    base: Base = ICT
    """Levels, weights, stages and distance."""
    coupling: Learnt | Independent | Transported = Learnt()
    kernel: Kernel = "ve"
    """x_t = x0 + t n, or "li": (1 - t / sigma_max) x0 + t n."""

    def __post_init__(self) -> None:
        if self.kernel not in get_args(Kernel):
            raise UserError(f"method.kernel is {self.kernel!r}; allowed: {', '.join(get_args(Kernel))}")

    def parts(self, *, network: nn.Module, spec: DataSpec, features: Features | None = None) -> Parts:
        """network: F(x, noise_label, cond) of `networks`, untrained, or with a denoiser's weights by `start`."""
        encoder = self.coupling.encoder(network) if isinstance(self.coupling, Learnt) else None
        return consistency_parts(self.student(network, encoder), features, self.base.distance)

    def student(self, network: nn.Module, encoder: nn.Module | None) -> CoupledConsistencyModel:
        """The model that is trained."""
        base = self.base
        boundary = isinstance(base, ImprovedConsistencyTraining)
        sizes = base.sigma_min, base.sigma_max, base.sigma_data
        return CoupledConsistencyModel(network, *sizes, kernel=self.kernel, boundary=boundary, encoder=encoder)

    def step(self, parts: Any, batch: Batch, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        """One update of student and encoder."""
        student, base = parts.student, self.base
        most = student.latest if self.kernel == "li" else float("inf")
        t, r, weight = base.neighbours(clock.fraction, noise, batch.images[:, 0, 0, 0], most)
        pair, beside = self._pair(student, batch, noise, base.last_weight(clock.fraction))
        upper, lower = ((pair.images + column(s) * pair.latents, s) for s in (student.sigma(t), student.sigma(r)))
        decay = base.target_decay if isinstance(base, ImprovedConsistencyTraining) else 0.0
        yield from match(parts, upper, lower, pair.cond, noise, base.distance, decay, weight, beside)

    def _pair(
        self, student: CoupledConsistencyModel, batch: Batch, noise: StepNoise, last: float
    ) -> tuple[Coupling, dict[str, Tensor]]:
        """Images with their noise, and what that costs."""
        if not isinstance(self.coupling, Learnt):
            return self.coupling(batch, noise), {}
        fresh = noise.normal(batch.images)
        mean, deviation = student.encode(batch.images, batch.cond)
        cost = self.coupling.beta * last * divergence(mean, deviation)
        return Coupling((mean + deviation * fresh).to(fresh.dtype), batch.images, batch.cond), {"coupling": cost}


def divergence(mean: Tensor, deviation: Tensor) -> Tensor:
    """KL(N(mean, (deviation + 1e-8)^2) || N(0, 1)) summed over an image's numbers, in nats: [N, C, H, W] -> [N]."""
    variance = (deviation + 1e-8).square()
    each: Tensor = (variance + mean.square() - 1 - variance.log()) / 2
    return each.flatten(1).sum(1)
