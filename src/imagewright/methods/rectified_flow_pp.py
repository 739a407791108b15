"""2-rectified flow++: reflow in one round, trained where it is hard (Lee et al. 2024, arXiv 2405.20320).

Networks   flow (trained): the teacher's flow exactly (`models.flow`), from its weights; its own dropout.
Pairs      of a teacher's noise and images, with their classes (`data.couplings`); and of real images and the noise that
           the teacher's flow makes of them, in a second store (`imagewright couple --invert`, config G).
Ingredients   x_t = (1 - t) x + t z, target z - x; U-shaped times, a = 4, within [1e-5, 1 - 1e-5];
           premetric (1 - t) m(v - (z - x)) + d(x_hat, x) / t, with x_hat = x_t - t v, m(r) = (sqrt(|r|^2 + c^2) - c) /
           D, c = 0.00054 D over an image's D numbers, d perceptual (config F; without the 1 / t, config E). Without
           an image distance the velocity's has no factor.
Sampling   `samplers.Straight`, order 1, keep_noise: the estimate of the image is mixed with the first noise; upwards
           (`invert`) from t = 1e-3 with that much of fresh noise; translation is inversion with one class and
           drawing with another.
Source     the paper; github.com/sangyun884/rfpp: `train.py`, `t_dist.py`, `network_edm.py`, `generate.py`.
Departs    Stored images are float16 as the sampler gave them, the program's are rounded to 8 bits. Config G's share of
           real pairs, and how they are mixed, are not in the program: here by weight (`data.coupling_weights`), and
           the recipes are configs F and E, without. Without LPIPS the perceptual distance is the shipped
           classifier's. A step whose gradient overflows in half precision is skipped by the trainer's scaler. The
           rate's ramp is one step ahead of the program's, whose first is 0, which stops a step short of the whole rate
           and stays there; its average begins with the third step's weights.
Checked    the losses against the program's formulas, in closed form, and their limits; the flow at the start is the
           teacher's; resume bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor, nn

from imagewright.checks import require_positive
from imagewright.methods.distances import Distance, Features
from imagewright.methods.flow_matching import Times, on_path
from imagewright.methods.noise_couplings import Stored, check_coupling
from imagewright.models.flow import flow_of, forgotten
from imagewright.noise import StepNoise
from imagewright.paths.noise_levels import UShaped
from imagewright.types import (
    Batch,
    Clock,
    DataSpec,
    Denoiser,
    Event,
    Frozen,
    Parts,
    Trained,
    Update,
    UserError,
)

VelocityLoss = Literal["huber", "squared", "root", "none"]
Start = Literal["teacher", "fresh"]
PERCEPTUAL = Distance(kind="perceptual")


@dataclass(frozen=True, kw_only=True)
class RectifiedFlowPlusPlus:
    """Straighten a teacher's flow: learn the velocity of its pairs, and the image at the end of it."""

    product: ClassVar[str] = "flow"

    times: Times = UShaped()
    """Law of t in training."""
    velocity: VelocityLoss = "huber"
    """Of the velocity: huber; squared, the mean of squares; root, its root; none."""
    huber_c: float = 0.00054
    """c of "huber", per number of the image."""
    image: Distance | None = PERCEPTUAL
    """Of the image that the velocity leads to; None = none, and then the velocity's loss has no factor 1 - t."""
    over_time: bool = True
    """Divide the image's distance by t (config F); ImageNet-64 did not (config E)."""
    start: Start = "teacher"
    """Whose weights the flow begins with; "fresh" is for comparisons."""
    dropout: float = 0.0
    """Of the flow; the paper keeps the teacher's."""

    def __post_init__(self) -> None:
        for name, allowed in (("velocity", VelocityLoss), ("start", Start)):
            if getattr(self, name) not in get_args(allowed):
                value = getattr(self, name)
                raise UserError(f"method.{name} is {value!r}; allowed: {', '.join(get_args(allowed))}")
        require_positive("method.huber_c", self.huber_c)
        if self.velocity == "none" and self.image is None:
            raise UserError("method.velocity is 'none' and method.image is none; nothing would be learnt")
        if self.image is None and not self.over_time:
            raise UserError("method.over_time is False; it has no effect without method.image")

    def parts(
        self, *, teacher: Denoiser, spec: DataSpec, features: Features | None = None, couplings: bool = True
    ) -> Parts:
        """teacher: the denoiser whose pairs they are.

        Raises UserError for one without an exact flow, without pairs, and for a perceptual distance without features.
        """
        check_coupling(Stored(), couplings)
        flow = flow_of(teacher, self.dropout)
        roles: dict[str, Any] = {"flow": Trained(module=flow if self.start == "teacher" else forgotten(flow))}
        if self.image is not None and self.image.kind == "perceptual":
            if not isinstance(features, nn.Module):
                raise UserError("method.image.kind is 'perceptual'; it needs a feature network (give `features`)")
            roles["features"] = Frozen(module=features)
        return Parts(**roles)

    def step(self, parts: Any, batch: Batch, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        """One update of the flow."""
        pair = Stored()(batch, noise)
        point = on_path(pair, self.times, noise)
        t = point.t.to(point.sigma.dtype)
        guess = parts.flow.velocity(point.x_t, point.t, pair.cond)
        off = velocity_loss(self.velocity, guess - point.velocity, self.huber_c)
        if self.image is None:
            yield Update("flow", off, at=point.sigma)
            return
        image = point.x_t - t[:, None, None, None] * guess
        distance = self.image(image, pair.images, getattr(parts, "features", None))
        loss = (1 - point.t).to(off) * off + (distance / t if self.over_time else distance)
        yield Update("flow", loss, parts={"velocity": off, "image": distance}, at=point.sigma)


def velocity_loss(kind: VelocityLoss, off: Tensor, huber_c: float) -> Tensor:
    """What a velocity that is off by [N, C, H, W] costs, [N]."""
    flat = off.flatten(1)
    size = flat.shape[1]
    if kind == "huber":
        c = huber_c * size
        huber: Tensor = ((flat.square().sum(1) + c**2).sqrt() - c) / size
        return huber
    if kind == "none":
        return flat.new_zeros(len(flat))
    squares = flat.square().mean(1)
    # A root has no slope at 0: where nothing is off, nothing is learnt.
    return squares if kind == "squared" else squares.clamp(min=1e-20).sqrt()
