"""Simple ReFlow: reflow within flow matching, seven choices one by one (Kim et al. 2024, arXiv 2410.07815).

Networks   flow (trained): the teacher's flow exactly (`models.flow`), from its weights.
Time       t = 0 the image, 1 the noise; the denoiser D(x_t, t) = x_t - t v.
Loss       w |phi(x_0) - phi(D)|^2, the mean over an image's numbers, phi linear and invertible.
Choices    1 weight: w = 1 / stopgrad of that very image's loss ("loss"); before it 1 / t, 1 / t^2 (which is the
             velocity's loss), 1
           2 times: p(t) ~ 10^t; before it uniform, or towards both ends
           3 metric: phi = share I + (1 - share) H, H the part that a binomial blur takes away (`HighPass`)
           4 dropout: less than the teacher's
           5 pairs: real images with the noise that the teacher's flow makes of them beside its own
             (`data.couplings`, `data.coupling_weights`, docs/couplings.md)
           6, 7 solver and grid: `samplers.Straight` with r = 0.4 and the sigmoid grid of k = 20, five steps and 9
             calls
Guidance   away from a worse model at sampling, as for any denoiser (`--guidance auto`); it doubles the calls.
Source     The paper's public summaries and reviews. No program of the authors' is public, and the paper names none.
Departs    Not stated there, and so chosen: phi's filter and share (0.5), dropout (0.03 on CIFAR-10, a quarter of
           the teacher's elsewhere), the share of real pairs (0.05, theirs among the 1,050,000), r and k as stated by
           others than the authors. No pairs are projected (their gain is at most 0.02 of FID, at the price of a
           discriminator and Sinkhorn's iterations): the coupling's marginals are as the teacher left them.
Checked    w = 1 / stopgrad(loss): every image's loss is 1, its gradient that of its logarithm; phi's scale drops out;
           phi's transfer function and condition number; the grids; resume bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from imagewright.methods.flow_matching import Times, on_path
from imagewright.methods.noise_couplings import Stored, check_coupling
from imagewright.models.flow import flow_of
from imagewright.noise import StepNoise
from imagewright.paths.noise_levels import ExponentialTime
from imagewright.types import Batch, Clock, DataSpec, Denoiser, Event, Parts, Trained, Update, UserError

Weight = Literal["loss", "time", "velocity", "one"]


@dataclass(frozen=True, kw_only=True)
class HighPass:
    """phi(x) = share x + (1 - share) (x - blur(x)) = x - (1 - share) blur(x), with the borders joined.

    The blur is binomial, (1, 2, 1) / 4 along both axes, whose transfer function goes from 1 for constant images to 0 at
    the highest frequency: phi's from `share` to 1. share: in (0, 1]; 1 is the identity. Raises UserError at 0, where
    phi forgets the mean.
    """

    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UserError(
                f"method.metric.share is {self.share}; it must lie in (0, 1]: at 0 the filter has a zero at frequency 0"
            )

    @property
    def condition(self) -> float:
        """Largest over smallest value of the transfer function, for images of even size."""
        return 1 / self.share

    def __call__(self, images: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W]."""
        if self.share == 1:
            return images
        return images - (1 - self.share) * _blurred(images)

    def transfer(self, side: int) -> Tensor:
        """The factor by which each frequency is multiplied, float64 [side, side]."""
        cosine = (1 + torch.cos(2 * torch.pi * torch.arange(side, dtype=torch.float64) / side)) / 2
        return 1 - (1 - self.share) * cosine[:, None] * cosine


@dataclass(frozen=True, kw_only=True)
class SimpleReflow:
    """Straighten a teacher's flow: learn the image of its pairs from every point between."""

    product: ClassVar[str] = "flow"

    weight: Weight = "loss"
    """"loss": one over the image's own loss; "time": 1 / t; "velocity": 1 / t^2; "one"."""
    times: Times = ExponentialTime()
    """Law of t in training."""
    metric: HighPass = HighPass()
    """What images are compared by; share 1 is the plain squared difference."""
    dropout: float = 0.0
    """Of the flow; the paper's is smaller than the teacher's."""

    def __post_init__(self) -> None:
        if self.weight not in get_args(Weight):
            raise UserError(f"method.weight is {self.weight!r}; allowed: {', '.join(get_args(Weight))}")

    def parts(self, *, teacher: Denoiser, spec: DataSpec, couplings: bool = True) -> Parts:
        """teacher: the denoiser whose pairs they are. Raises UserError for one without an exact flow, or no pairs."""
        check_coupling(Stored(), couplings)
        return Parts(flow=Trained(module=flow_of(teacher, self.dropout)))

    def step(self, parts: Any, batch: Batch, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        """One update of the flow."""
        pair = Stored()(batch, noise)
        point = on_path(pair, self.times, noise)
        t = point.t.to(point.sigma.dtype)
        velocity = parts.flow.velocity(point.x_t, point.t, pair.cond)
        off = self.metric(point.x_t - t[:, None, None, None] * velocity - pair.images)
        distance = off.square().flatten(1).mean(1)
        yield Update("flow", weighted(distance, t, self.weight), parts={"distance": distance}, at=point.sigma)


def weighted(distance: Tensor, t: Tensor, weight: Weight) -> Tensor:
    """w times the distance of each image; all [N]."""
    match weight:
        case "loss":
            return distance / distance.detach().clamp(min=1e-20)
        case "time":
            return distance / t
        case "velocity":
            return distance / t**2
        case "one":
            return distance


def _blurred(images: Tensor) -> Tensor:
    channels = images.shape[1]
    line = torch.tensor([1.0, 2.0, 1.0], dtype=images.dtype, device=images.device) / 4
    kernel = (line[:, None] * line).expand(channels, 1, 3, 3)
    return F.conv2d(F.pad(images, (1, 1, 1, 1), mode="circular"), kernel, groups=channels)
