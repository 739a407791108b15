"""Pictures that a classifier's calibration is made of, from its own weights: no data (arXiv 2204.04215).

Matched    the batch norms' stored statistics are those of the pictures' maps (ZeroQ, Cai et al. 2020, 2001.00281), in
           units of the stored deviation s: L_BNS = mean over norms and channels of ((mean - stored) / s)^2
           + (deviation / s - 1)^2.
Responding AAC: they also make the network say a drawn class y as strongly as it can. Cross-entropy is satisfied by a
           margin; what sets a range is an absolute number, so the logit itself is pushed up:
           L = weight L_BNS + mean over pictures of max(0, aim_y - logit_y).
Aim        the paper's objective as far as it is known has no bound; ours is what the head can say at most of features
           as large as those of matched pictures: aim_y = |w_y| max |f| + b_y. What is reached is recorded beside.
Departs    pictures are optimised directly, by Adam from normal noise, and kept in [-1, 1]; the paper's weights, and
           whether it draws them by a generator, are not known. ZeroQ and GDFQ take errors as they are, of deviations
           and of variances: channels of small deviation then hardly count, and ABN by re-estimation from such pictures
           ruins a network that nothing else has touched. ZeroQ matches the input's statistics, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagewright.checks import require_number, require_whole
from imagewright.errors import an
from imagewright.noise import StepNoise
from imagewright.tuning.quantization import batch_norms, batches
from imagewright.types import UserError


@dataclass(frozen=True, kw_only=True)
class Synthesis:
    """How pictures are made. weight: of L_BNS against the response; it is the only part of matched pictures."""

    iterations: int = 100
    rate: float = 0.1
    weight: float = 300.0
    batch: int = 256
    """Pictures whose statistics are taken together."""

    def __post_init__(self) -> None:
        require_whole("iterations", self.iterations, 1, 10**6)
        require_whole("batch", self.batch, 2, 10**6)
        for name in ("rate", "weight"):
            require_number(name, getattr(self, name), 1e-9, 1e9)


@dataclass(frozen=True)
class Made:
    """Pictures [n, C, H, W] in [-1, 1], the classes that they were asked to be of, and what was reached.

    response, aim: mean logit of the asked class, and what it was pushed to; the latter only of responding pictures.
    """

    pictures: Tensor
    labels: Tensor
    response: float
    aim: float | None = None


def noise_pictures(encoder: Any, count: int, noise: StepNoise) -> Made:
    """Normal noise, as baseline: what a range is measured on where nothing is known."""
    pictures, labels = _start(encoder, count, noise)
    return _judged(encoder, pictures.clamp(-1, 1), labels)


def matched_pictures(encoder: Any, count: int, config: Synthesis, noise: StepNoise) -> Made:
    """Pictures of the training data's statistics. Raises UserError for a network without batch norms."""
    pictures, labels = _start(encoder, count, noise)
    return _judged(encoder, _optimised(encoder, pictures, config, lambda rows, logits: 0.0), labels)


def responding_pictures(encoder: Any, matched: Made, count: int, config: Synthesis, noise: StepNoise) -> Made:
    """Pictures whose class the network says as strongly as it can; matched: others, which say what it can."""
    pictures, labels = _start(encoder, count, noise)
    aims = head_bounds(encoder, matched.pictures)

    def unheard(rows: slice, logits: Tensor) -> Tensor:
        return absolute_loss(logits, labels[rows], aims)

    made = _judged(encoder, _optimised(encoder, pictures, config, unheard), labels)
    return Made(made.pictures, labels, made.response, float(aims[labels].mean()))


def absolute_loss(logits: Tensor, labels: Tensor, aims: Tensor) -> Tensor:
    """How far logits of the asked classes are below their aims, mean over pictures."""
    loss: Tensor = F.relu(aims[labels] - logits.gather(1, labels[:, None])[:, 0]).mean()
    return loss


@torch.no_grad()
def head_bounds(encoder: Any, pictures: Tensor) -> Tensor:
    """The greatest logit of each class that features as large as these pictures' could have, [classes]."""
    head = getattr(encoder.network, "head", None)
    if not isinstance(head, nn.Linear):
        raise UserError(f"{an(type(encoder.network).__name__)} has no linear head; give --ranges matched")
    most = encoder(pictures).pooled.norm(dim=1).amax()
    bias = 0.0 if head.bias is None else head.bias
    bounds: Tensor = head.weight.norm(dim=1) * most + bias
    return bounds


def _start(encoder: Any, count: int, noise: StepNoise) -> tuple[Tensor, Tensor]:
    view, like = encoder.view, next(encoder.parameters())
    pictures = noise.normal(like.new_empty(count, view.channels, view.side, view.side))
    classes = _classes(encoder, pictures[:2])
    return pictures, noise.integers(classes, like.new_empty(count))


@torch.no_grad()
def _classes(encoder: Any, pictures: Tensor) -> int:
    logits = encoder(pictures).logits
    if logits is None:
        raise UserError(f"{an(type(encoder).__name__)} names no classes; pictures cannot be made of it")
    return int(logits.shape[1])


def _optimised(
    encoder: Any, start: Tensor, config: Synthesis, more: Callable[[slice, Tensor], Tensor | float]
) -> Tensor:
    """Pictures after so many steps, batch by batch; the rate falls by half a cosine."""
    norms = batch_norms(encoder)
    if not norms:
        raise UserError(f"{an(type(encoder.network).__name__)} has no batch norm whose statistics pictures could have")
    done = [_batch(encoder, norms, start, rows, config, more) for rows in batches(len(start), config.batch)]
    return torch.cat(done)


def _batch(
    encoder: Any,
    norms: list[nn.BatchNorm2d],
    start: Tensor,
    rows: slice,
    config: Synthesis,
    more: Callable[[slice, Tensor], Tensor | float],
) -> Tensor:
    pictures = start[rows].clamp(-1, 1).requires_grad_(True)
    optimizer = torch.optim.Adam([pictures], lr=config.rate)
    faults: list[Tensor] = []
    handles = [norm.register_forward_pre_hook(lambda n, args: faults.append(mismatch(n, args[0]))) for norm in norms]
    try:
        for step in range(config.iterations):
            optimizer.param_groups[0]["lr"] = config.rate * (1 + math.cos(math.pi * step / config.iterations)) / 2
            faults.clear()
            logits = encoder(pictures).logits
            loss = config.weight * torch.stack(faults).mean() + more(rows, logits)
            (pictures.grad,) = torch.autograd.grad(loss, pictures)
            optimizer.step()
            with torch.no_grad():
                pictures.clamp_(-1, 1)
    finally:
        for handle in handles:
            handle.remove()
    return pictures.detach()


def mismatch(norm: Any, x: Tensor) -> Tensor:
    """L_BNS of one norm: squared relative errors of mean and deviation of x [N, C, H, W], mean over channels."""
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    stored = norm.running_var + norm.eps
    by_deviation = ((var + norm.eps) / stored).sqrt() - 1
    loss: Tensor = ((mean - norm.running_mean).square() / stored + by_deviation.square()).mean()
    return loss


@torch.no_grad()
def _judged(encoder: Any, pictures: Tensor, labels: Tensor) -> Made:
    logits = encoder(pictures).logits
    return Made(pictures, labels, float(logits.gather(1, labels[:, None]).mean()))
