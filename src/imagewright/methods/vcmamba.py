"""Training VCMamba to classify, taught by labels and by another classifier (Munir et al. 2025, arXiv 2509.04669).

Networks   classifier (trained, the product, its average); teacher (frozen, a classifier; may be left out).
Loss       (1 - a) CE(first head, smoothed and mixed classes) + a t^2 KL(teacher || second head) / classes, both at
           temperature t. The division by the number of classes is the released program's (its KL is a sum over batch
           and classes that is divided by both), and `per_class=False` leaves it out.
Pictures   cut out and enlarged (`area`), or shifted where that is 1; a rectangle erased with noise; then two mixed, by
           weights (mixup) or a rectangle (CutMix), one or the other, by one number for the whole batch. The teacher
           sees what the student sees.
Optimiser  the run's, published: AdamW, 1e-3 for 512 images, weight decay 0.05 on what has two dimensions, half a cosine
           over 300 epochs whose first 5 are a warm-up, average 0.99996 a step (of the norms' statistics, too).
Source     The released code: Wertyuui345/VCMamba (model/main.py, losses.py, scripts), which decides; Mixup, CutMix and
           erasing as timm has them.
Departs    RandAugment and repeated augmentation are not made (colour jitter is not there either, beside RandAugment),
           and cut-outs are bilinear, of pictures of the network's size (there bicubic, of the full photograph). A
           cut-out or rectangle that would not fit is cut to the picture (there drawn again). Partners for mixing are
           those of the micro-batch, in reverse. Norms see a micro-batch, and of several processes the first one's
           statistics are kept (there all processes' batches are one). The rate moves with every update (there once an
           epoch), ends at 0 (there 1e-5), and rises from 0 (1e-6) times the cosine, 0.07 % less. The product is the
           average; the program scores, and released, the raw weights. Without a teacher both heads learn the classes
           (there the second learns nothing, and counts in evaluation).
Checked    a step's loss by hand, with and without a teacher; what mixing and erasing do; resume bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from scipy.special import betaincinv
from torch import Tensor, nn
from torch.nn import functional as F

from imagewright.checks import require_number, require_positive, require_whole
from imagewright.errors import an
from imagewright.methods.classification import shifted
from imagewright.models.classifier import Classifier
from imagewright.models.view import seen
from imagewright.networks.vcmamba import VCMamba
from imagewright.noise import StepNoise
from imagewright.types import Batch, Clock, DataSpec, Encoder, Event, Frozen, Parts, Trained, Update, UserError

ERASED_AREA, ERASED_ASPECT = (0.02, 1 / 3), 0.3
"""Of a rectangle: shares of the picture; the least ratio of its sides, whose inverse is the largest."""
CUT_ASPECT = 3 / 4


@dataclass(frozen=True, kw_only=True)
class VCMambaTraining:
    """Name the classes of pictures that are cut out, erased and mixed, and answer as a teacher does."""

    product: ClassVar[str] = "classifier"

    shift: int = 4
    """Pixels by which a picture is moved at most, in each direction, where `area` is 1."""
    area: float = 1.0
    """Least share of the picture that is cut out and enlarged; 1 = none is (published: 0.08)."""
    erasing: float = 0.25
    """Probability that a rectangle is erased."""
    mixup: float = 0.8
    """Of the Beta distribution of weights; 0 = pictures are not mixed by weights."""
    cutmix: float = 1.0
    """Of the Beta distribution of areas; 0 = pictures are not mixed by rectangles."""
    smoothing: float = 0.1
    """Share of the aim that all classes have alike."""
    distillation: float = 0.5
    """Weight of the teacher, a."""
    temperature: float = 1.0
    per_class: bool = True
    """Whether the divergence from the teacher is divided by the number of classes."""
    mean: tuple[float, ...] = (0.5,)
    """Subtracted from colours in [0, 1]: one number, or one for each channel."""
    std: tuple[float, ...] = (0.5,)
    """Then divided by."""

    def __post_init__(self) -> None:
        require_whole("method.shift", self.shift, 0, 1024)
        require_number("method.area", self.area, 0.01, 1)
        for name in ("erasing", "smoothing", "distillation"):
            require_number(f"method.{name}", getattr(self, name), 0, 1)
        for name in ("mixup", "cutmix"):
            require_number(f"method.{name}", getattr(self, name), 0, 100)
        require_positive("method.temperature", self.temperature)

    def parts(self, *, network: nn.Module, spec: DataSpec, teacher: Encoder | None = None) -> Parts:
        """network: a `VCMamba`. Raises UserError for another, data without classes, a teacher that names others."""
        if spec.num_classes < 2:
            raise UserError(f"{spec.name} has {spec.num_classes} classes; a classifier needs at least 2")
        if not isinstance(network, VCMamba):
            raise UserError(f"this method trains a VCMamba, not {an(type(network).__name__)}")
        student = Trained(module=Classifier(network, self.mean, self.std))
        if teacher is None:
            return Parts(classifier=student)
        assert isinstance(teacher, nn.Module)
        _check_teacher(teacher, spec)
        return Parts(classifier=student, teacher=Frozen(module=teacher))

    def step(self, parts: Any, batch: Batch, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        """One update. Pictures without a class, and those mixed with one, count nothing."""
        model, label = parts.classifier, batch.cond.label
        assert label is not None
        x = seen(batch.images, model.view)
        x = shifted(x, self.shift, noise) if self.area == 1 else cut_out(x, self.area, noise)
        x = erased(x, self.erasing, noise)
        x, own = mixed(x, self.mixup, self.cutmix, noise)
        made = model.network(x)
        aim = smoothed(label, made.logits.shape[1], self.smoothing)
        aim = own * aim + (1 - own) * aim.flip(0)
        known = (label >= 0) & ((label.flip(0) >= 0) | (own == 1))
        loss = _cross_entropy(made.logits, aim)
        if "teacher" in parts.roles:
            with torch.no_grad():
                told = parts.teacher.encode(_unseen(x, model)).logits
            taught = self._divergence(told, made.taught)
        else:
            taught = _cross_entropy(made.taught, aim)
        loss = (1 - self.distillation) * loss + self.distillation * taught
        right = (made.logits.argmax(1) == label).float()
        yield Update("classifier", loss * known, parts={"accuracy": right, "taught": taught})

    def _divergence(self, told: Tensor, taught: Tensor) -> Tensor:
        """t^2 KL(told || taught) of each picture, both at the temperature; over the classes' number by `per_class`."""
        aim, answer = (F.log_softmax(logits.float() / self.temperature, 1) for logits in (told, taught))
        divergence = self.temperature**2 * F.kl_div(answer, aim, reduction="none", log_target=True).sum(1)
        return divergence / taught.shape[1] if self.per_class else divergence


def smoothed(label: Tensor, classes: int, smoothing: float) -> Tensor:
    """The aims of labels [N] (-1 = none), [N, classes]: a share of 1 is spread evenly."""
    return (1 - smoothing) * F.one_hot(label.clamp_min(0), classes).float() + smoothing / classes


def cut_out(images: Tensor, least: float, noise: StepNoise, sides: float = CUT_ASPECT) -> Tensor:
    """A random part of each picture [N, C, H, W], of at least a share of it, enlarged; sides: their least ratio."""
    area, aspect, down, right = (noise.uniform(images.detach()[:, 0, 0, 0].float()) for _ in range(4))
    area, aspect = least + (1 - least) * area, _log_uniform(aspect, sides)
    wide, high = ((area * r).sqrt().clamp_max(1) for r in (aspect, 1 / aspect))
    x, y = (1 - wide) * (2 * right - 1), (1 - high) * (2 * down - 1)
    zero = torch.zeros_like(x)
    theta = torch.stack([torch.stack([wide, zero, x], 1), torch.stack([zero, high, y], 1)], 1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, padding_mode="reflection", align_corners=False).to(images.dtype)


def erased(images: Tensor, chance: float, noise: StepNoise) -> Tensor:
    """Pictures [N, C, H, W] of which some have lost a rectangle to standard normal noise."""
    if not chance:
        return images
    height, width = images.shape[2:]
    like = images.detach()[:, 0, 0, 0].float()
    chosen, area, aspect, down, right = (noise.uniform(like) for _ in range(5))
    area = height * width * (ERASED_AREA[0] + (ERASED_AREA[1] - ERASED_AREA[0]) * area)
    aspect = _log_uniform(aspect, ERASED_ASPECT)
    inside = (chosen < chance)[:, None, None]
    for axis, side, ratio, place in ((1, height, aspect, down), (2, width, 1 / aspect, right)):
        length = (area * ratio).sqrt().round().clamp_max(side)
        start = (place * (side - length + 1)).floor()
        at = torch.arange(side, device=images.device)
        along = (at >= start[:, None]) & (at < (start + length)[:, None])
        inside = inside & along.unsqueeze(3 - axis)
    return torch.where(inside[:, None], noise.normal(images), images)


def mixed(images: Tensor, mixup: float, cutmix: float, noise: StepNoise) -> tuple[Tensor, float]:
    """Pictures each mixed with that at its place from the end, and the share that is its own.

    Half of the batches by weights, half by a rectangle, where both have a parameter above 0.
    """
    which, share, down, right = noise.common(torch.empty(4)).tolist()
    by_rectangle = cutmix > 0 and (mixup == 0 or which < 0.5)
    alpha = cutmix if by_rectangle else mixup
    if not alpha:
        return images, 1.0
    own = float(betaincinv(alpha, alpha, share))
    if not by_rectangle:
        return own * images + (1 - own) * images.flip(0), own
    height, width = images.shape[2:]
    ratio = math.sqrt(1 - own)
    ends = []
    for side, place in ((height, down), (width, right)):
        half, centre = int(side * ratio) // 2, int(place * side)
        ends.append((max(centre - half, 0), min(centre + half, side)))
    (top, bottom), (left, edge) = ends
    out = images.clone()
    out[:, :, top:bottom, left:edge] = images.flip(0)[:, :, top:bottom, left:edge]
    return out, 1 - (bottom - top) * (edge - left) / (height * width)


def _log_uniform(uniform: Tensor, least: float) -> Tensor:
    """Between a ratio and its inverse, its logarithm evenly."""
    return least ** (1 - 2 * uniform)


def _cross_entropy(logits: Tensor, aim: Tensor) -> Tensor:
    return -(aim * F.log_softmax(logits.float(), 1)).sum(1)


def _unseen(x: Tensor, model: Classifier) -> Tensor:
    """What the network saw, as pictures in [-1, 1] again."""
    mean, std = (
        torch.tensor(v, dtype=x.dtype, device=x.device)[:, None, None] for v in (model.view.mean, model.view.std)
    )
    return 2 * (x * std + mean) - 1


def _check_teacher(teacher: nn.Module, spec: DataSpec) -> None:
    view: Any = teacher.view
    like = next(teacher.parameters())
    logits = teacher.eval().encode(like.new_zeros(1, spec.channels, view.side, view.side)).logits  # type: ignore[operator]
    known = 0 if logits is None else logits.shape[1]
    if known != spec.num_classes:
        raise UserError(f"the teacher names {known} classes; {spec.name} has {spec.num_classes}")
