"""How often a classifier names the class of a picture (top-1), and has it among its five likeliest (top-5)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from imagewright.data import ImageSet, from_uint8
from imagewright.errors import an
from imagewright.precision import tf32
from imagewright.types import UserError


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Shares of the pictures, in [0, 1].

    top5: None for five classes or fewer. stderr: of top1, over pictures. reference: their fingerprint.
    """

    top1: float
    top5: float | None
    stderr: float
    num_images: int
    classes: int
    reference: str

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@tf32(False)
def measure_accuracy(
    model: nn.Module,
    images: ImageSet,
    *,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    on_progress: Callable[[int], None] = lambda done: None,
) -> Accuracy:
    """Of an encoder with logits, on pictures that have classes, the model's own. Raises UserError for others."""
    encoder: Any = model.eval().to(device)
    labels = torch.from_numpy(images.labels)
    if not len(images) or bool((labels < 0).any()):
        raise UserError(f"{images.source} has pictures without a class, or none; there is no accuracy to measure")
    found: list[Tensor] = []
    with torch.inference_mode():
        for start in range(0, len(images), batch_size):
            rows = np.arange(start, min(start + batch_size, len(images)))
            logits = encoder.encode(from_uint8(images.images(rows), device)).logits
            if logits is None:
                raise UserError(f"{an(type(model).__name__)} names no classes; there is no accuracy to measure")
            if images.spec.num_classes != logits.shape[1]:
                raise UserError(
                    f"{images.source} has {images.spec.num_classes} classes; the classifier knows {logits.shape[1]}"
                )
            found.append(logits.cpu())
            on_progress(int(rows[-1]) + 1)
    answers = torch.cat(found)
    classes = answers.shape[1]
    top1 = float((answers.argmax(1) == labels).double().mean())
    five = (answers.topk(5).indices == labels[:, None]).any(1).double().mean() if classes > 5 else None
    return Accuracy(
        top1=top1,
        top5=None if five is None else float(five),
        stderr=math.sqrt(top1 * (1 - top1) / len(images)),
        num_images=len(images),
        classes=classes,
        reference=images.fingerprint,
    )


def pooled(
    model: nn.Module, images: ImageSet, *, batch_size: int = 64, device: torch.device | str = "cpu"
) -> npt.NDArray[np.float32]:
    """An encoder's features of pictures, float32 [N, D]."""
    encoder: Any = model.eval().to(device)
    found = []
    with torch.inference_mode():
        for start in range(0, len(images), batch_size):
            rows = np.arange(start, min(start + batch_size, len(images)))
            found.append(encoder.encode(from_uint8(images.images(rows), device)).pooled.float().cpu())
    features: npt.NDArray[np.float32] = torch.cat(found).numpy()
    return features
