"""What the methods share that make a generator's law, noised at every level, the same as a teacher's.

Roles      generator (trained, the product), teacher (frozen: D_real), fake_score (trained on the generator's images:
           D_fake; it holds the discriminator's head where there is one, as one optimiser trains both).
Source     Yin et al. 2024 (DMD, arXiv 2311.18828): equations 4 to 8, in denoisers, x_t = x + sigma eps:
               score_fake - score_real = (D_fake - D_real) / sigma^2,
               g = (D_fake - D_real) / mean |x - D_real|,      the step in x; the mean is over C, H, W of one image.
Checked    g against the derivative of the KL divergence of Gaussians; its surrogate's gradient; equal denoisers.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from imagewright.methods.edm import denoising_loss
from imagewright.models.consistency import edm_teacher
from imagewright.models.generator import FewStepGenerator
from imagewright.models.preconditioning import EDMPrecond, student_network
from imagewright.moving import sent
from imagewright.noise import StepNoise
from imagewright.precision import wide
from imagewright.types import UNCONDITIONAL, Condition, DataSpec, Denoiser, Frozen, Trained, UserError


@dataclass(frozen=True, kw_only=True)
class KarrasLevels:
    """Noise levels whose index is uniform on first .. last of a grid of `points`, even in sigma^(1/rho).

    Indices rise with the noise: 0 is sigma_min, points - 1 is sigma_max.
    """

    first: int = 0
    last: int = 999
    points: int = 1000
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        if not 0 <= self.first <= self.last < self.points or self.points < 2:
            raise UserError(
                f"levels.first is {self.first}, last is {self.last} and points is {self.points}; "
                "they must satisfy 0 <= first <= last < points, and points must be at least 2"
            )
        if not 0 < self.sigma_min < self.sigma_max < math.inf or not 0 < self.rho < math.inf:
            raise UserError(
                f"levels.sigma_min is {self.sigma_min}, sigma_max is {self.sigma_max} and rho is {self.rho}; "
                "they must satisfy 0 < sigma_min < sigma_max, and rho > 0, all finite"
            )

    def at(self, index: Tensor) -> Tensor:
        """sigma of grid indices, any shape; float64."""
        low, high = self._ends
        sigma: Tensor = (low + wide(index) / (self.points - 1) * (high - low)) ** self.rho
        return sigma

    def spacing(self, sigma: Tensor) -> Tensor:
        """One over the density of a drawn sigma: d sigma / d index, times how many indices are drawn from."""
        low, high = self._ends
        per_index: Tensor = self.rho * sigma ** (1 - 1 / self.rho) * (high - low) / (self.points - 1)
        return per_index * (self.last - self.first + 1)

    @property
    def _ends(self) -> tuple[float, float]:
        return self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)

    def sample(self, noise: StepNoise, like: Tensor) -> Tensor:
        """Draw sigma [N], dtype and device of `like` [N]."""
        return self.at(self.first + noise.integers(self.last - self.first + 1, like)).to(like)


def check_levels(teacher: Any, **laws: Any) -> None:
    """Raise UserError where a law of noise levels with bounds goes beyond those that the teacher knows."""
    for name, law in laws.items():
        if isinstance(law, KarrasLevels) and not (
            teacher.sigma_min <= law.sigma_min and law.sigma_max <= teacher.sigma_max
        ):
            raise UserError(
                f"method.{name} go from {law.sigma_min:g} to {law.sigma_max:g}; the teacher knows noise levels from "
                f"{teacher.sigma_min:g} to {teacher.sigma_max:g}"
            )


class Generated(NamedTuple):
    """A generator's images [N, C, H, W], and the classes that it was asked for."""

    images: Tensor
    cond: Condition


def matching_parts(
    teacher: Denoiser,
    spec: DataSpec,
    *,
    student: Denoiser | None = None,
    sigma_max: float | None = None,
    dropout: bool = False,
) -> dict[str, Any]:
    """The roles: generator and fake_score start from the teacher's weights, without its dropout unless `dropout`.

    teacher: an EDM-preconditioned denoiser. spec: of the data, of whose known classes the generator is asked alone.
    student: a denoiser, of another size say, that the generator starts from in the teacher's place. sigma_max: the
    generator's level of pure noise; None = the teacher's. Raises UserError for denoisers of another kind, and for a
    student of another range of noise levels.
    """
    known = edm_teacher(teacher)
    start = known if dropout else with_network(known, student_network(known))
    begin = start if student is None else edm_teacher(student)
    if (begin.sigma_max, begin.sigma_data, begin.noise_label) != (start.sigma_max, start.sigma_data, start.noise_label):
        raise UserError(
            f"student has sigma_max {begin.sigma_max:g}, sigma_data {begin.sigma_data:g} and noise label "
            f"{begin.noise_label}; the teacher has {start.sigma_max:g}, {start.sigma_data:g} and {start.noise_label}"
        )
    generator = FewStepGenerator.from_denoiser(begin, sigma_max)
    generator.asked = spec.known_classes if spec.empty_classes else None
    return {
        "generator": Trained(module=generator),
        "teacher": Frozen(module=known),
        "fake_score": Trained(module=copy.deepcopy(start).requires_grad_(True).train(), ema=False),
    }


def with_network(denoiser: EDMPrecond, network: nn.Module) -> EDMPrecond:
    """The same preconditioning around another network."""
    changed = copy.copy(denoiser)
    changed._modules = {**denoiser._modules, "network": network}
    return changed


def fresh_noise(generator: FewStepGenerator, like: Tensor, noise: StepNoise) -> tuple[Tensor, Condition]:
    """Standard normal latents, shape of `like` [N, C, H, W], and classes drawn uniformly, where there are any.

    They are drawn from those that the generator is asked for.
    """
    latents = noise.normal(like)
    if not generator.num_classes:
        return latents, UNCONDITIONAL
    asked = generator.asked
    label = noise.integers(generator.num_classes if asked is None else len(asked), like[:, 0, 0, 0])
    if asked is not None:
        label = sent(torch.tensor(asked), label.device)[label]
    return latents, Condition(label=label)


def generate(generator: FewStepGenerator, latents: Tensor, cond: Condition) -> Generated:
    """One call at the level of pure noise, with gradient unless the caller forbids it."""
    sigma = torch.full_like(latents[:, 0, 0, 0], generator.sigma_max)
    return Generated(generator.start(generator.sigma_max * latents, sigma, cond), cond)


def matching_direction(real: Tensor, fake: Tensor, clean: Tensor) -> Tensor:
    """g: how the divergence rises in `clean`; real, fake: both denoisers' answers at the noised `clean`. No gradient.

    All [N, C, H, W]. Entries that are not finite (a teacher that is exactly right) become 0.
    """
    with torch.no_grad():
        scale = (clean - real).abs().flatten(1).mean(1)[:, None, None, None]
        return torch.nan_to_num((fake - real) / scale, nan=0.0, posinf=0.0, neginf=0.0)


def surrogate(clean: Tensor, direction: Tensor) -> Tensor:
    """A loss [N] whose gradient in `clean` is `direction` / (C H W)."""
    aim = (clean - direction).detach()
    return 0.5 * (clean - aim).square().flatten(1).mean(1)


def matching_loss(parts: Any, generated: Generated, levels: KarrasLevels, noise: StepNoise) -> tuple[Tensor, Tensor]:
    """The distribution-matching loss [N] at one noise level per image, and those levels [N]."""
    images, cond = generated
    sigma = levels.sample(noise, images[:, 0, 0, 0])
    with torch.no_grad():
        noisy = images + sigma[:, None, None, None] * noise.normal(images)
        direction = matching_direction(parts.teacher(noisy, sigma, cond), parts.fake_score(noisy, sigma, cond), images)
    return surrogate(images, direction), sigma


def fake_score_loss(parts: Any, generated: Generated, levels: Any, noise: StepNoise) -> tuple[Tensor, Tensor]:
    """EDM's denoising loss [N] of the fake denoiser on generated images, and its noise levels [N].

    levels: any law with `sample(noise, like)`.
    """
    images = generated.images.detach()
    sigma = levels.sample(noise, images[:, 0, 0, 0])
    fake = parts.fake_score
    return denoising_loss(fake, images, sigma, generated.cond, noise, fake.sigma_data), sigma


def diversity(images: Tensor) -> Tensor:
    """Mean distance between two images of a batch, root mean square per number: falls where a generator collapses.

    images: [N, C, H, W]; NaN for a single image.
    """
    return torch.pdist(images.detach().float().flatten(1)).mean() / math.sqrt(images[0].numel())
