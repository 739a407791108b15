"""Classification as of the downsampled ImageNet (Chrabaszcz et al. 2017, arXiv 1707.08819): a network names classes.

Networks   classifier (trained, the product; its raw weights, as published).
Loss       the cross-entropy of the class; colours in [0, 1] less their mean; crops of the size of the picture from one
           with `shift` pixels of zeros, which are the mean, on every side; each picture mirrored half of the time
           (`data.xflip`).
Optimiser  the run's, published: SGD with momentum 0.9, rate 0.01 times 0.2 after each quarter of the run, batch 128.
Source     the program of PatrykChrabaszcz/Imagenet32_Scripts, which decides. Its momentum is the plain one, not
           Nesterov's. Its penalty is 5e-4 times the sum of squares, without a half: a weight decay of 1e-3. An epoch of
           it has every picture as it is and mirrored: its 40 are 80 passes over ImageNet.
Departs    The mean is one of a channel, the program's one of a pixel. Mirroring is by chance, there both are seen in
           every epoch. Decay falls on all parameters, there on weights and the norms' scales alone. A new rate acts on
           the momentum that there is, too, there only on what is added to it. The whole set is shuffled, there each of
           its ten files in turn. Norms see a micro-batch, and of several processes the first one's statistics are kept:
           `micro_batch` changes what is learned.
Checked    a step's loss and gradient by hand; crops against slices of the padded picture; resume bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imagewright.checks import require_whole
from imagewright.models.classifier import Classifier
from imagewright.models.view import seen
from imagewright.noise import StepNoise
from imagewright.types import Batch, Clock, DataSpec, Event, Parts, Trained, Update, UserError


@dataclass(frozen=True, kw_only=True)
class Classification:
    """Name the class of a picture that is shifted at random."""

    product: ClassVar[str] = "classifier"
    of_images: ClassVar[bool] = True

    shift: int = 4
    """Pixels by which a picture is moved at most, in each direction."""
    mean: tuple[float, ...] = (0.5,)
    """Subtracted from colours in [0, 1]: one number, or one for each channel."""

    def __post_init__(self) -> None:
        require_whole("method.shift", self.shift, 0, 1024)

    def parts(self, *, network: nn.Module, spec: DataSpec) -> Parts:
        """network: one of `models.classifier.Sees`. Raises UserError for another, and for data without classes."""
        if spec.num_classes < 2:
            raise UserError(f"{spec.name} has {spec.num_classes} classes; a classifier needs at least 2")
        return Parts(classifier=Trained(module=Classifier(network, self.mean), ema=False))

    def step(self, parts: Any, batch: Batch, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        """One update. Pictures without a class count nothing."""
        model, label = parts.classifier, batch.cond.label
        assert label is not None
        logits = model.network(shifted(seen(batch.images, model.view), self.shift, noise)).logits
        loss = F.cross_entropy(logits.float(), label, ignore_index=-1, reduction="none")
        yield Update("classifier", loss, parts={"accuracy": (logits.argmax(1) == label).float()})


def shifted(images: Tensor, most: int, noise: StepNoise) -> Tensor:
    """Every picture of [N, C, H, W] moved by up to `most` pixels down and across; zeros come in."""
    if not most:
        return images
    n, _, height, width = images.shape
    start = noise.integers(2 * most + 1, images[:, 0, :2, 0])  # [N, 2]
    rows = start[:, :1] + torch.arange(height, device=images.device)
    columns = start[:, 1:] + torch.arange(width, device=images.device)
    places = torch.arange(n, device=images.device)[:, None, None]
    padded = F.pad(images, (most, most, most, most)).permute(0, 2, 3, 1)
    cropped: Tensor = padded[places, rows[:, :, None], columns[:, None, :]]
    return cropped.permute(0, 3, 1, 2)
