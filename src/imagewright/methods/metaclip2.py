"""Meta CLIP 2: pictures and captions of all languages in one space, of a curated pool (Chuang et al. 2025, 2507.22062).

Networks   clip (trained, the product; its raw weights, as published).
Data       pairs of which each pass draws anew: one caption of a picture, kept with the probability of its rarest
           entries, by a threshold for each language (`data.captions`, `data.curation`).
Loss       s cos(picture, text) over the whole batch, s = exp(log_scale): the cross-entropy of each picture's own
           caption among all captions, and of each caption's own picture, halved; the mean over pairs. Features come
           from all processes with their gradients, and each process has the losses of its own pairs.
Scale      its logarithm is kept within [0, ln 100] after every step.
Pictures   a part of at least `area` cut out and enlarged; nothing else.
Optimiser  the run's, published: AdamW, 4e-4, betas 0.9 and 0.95, eps 1e-6, decay 0.1 on matrices alone
           (`optimizer.decay_vectors`), 2,000 steps of warm-up, half a cosine to 0, a batch of 75,264 in bf16.
Capacity   the same number of steps as for English alone, with a batch larger by what English is of the pool: 1 / 0.44.
Source     facebookresearch/MetaCLIP: `src/mini_clip/{loss,model_worldwide}.py`, `src/training/train.py`,
           `configs/metaclip_v2.py`.
Departs    Pictures are cut out of ones of the network's size, bilinear (there of the full photograph, bicubic), with
           sides as unequal as their least share allows (there up to 4 : 3; what does not fit is drawn again, ten times,
           and then the whole is taken). Logits are float32 (there of bf16's precision), and the rate is one step
           further down the cosine. For zero-shot accuracy pictures are of the network's size (`imagewright data
           convert` makes them; there bicubic, from the middle). With `micro_batch` a pair is compared with those of its
           micro-batch, of all processes, alone. Hygiene (filters of content, blurred faces, near-duplicates of
           benchmarks) is not made: a table is taken as it is.
Checked    the loss on orthonormal features, gradients by finite differences, two processes against one; causal texts;
           features, loss and gradients of the released program on equal weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imagewright.checks import require_number
from imagewright.data.captions import Captioned, Texts
from imagewright.errors import an
from imagewright.gathering import gathered, own
from imagewright.methods.vcmamba import CUT_ASPECT, cut_out
from imagewright.models.image_text import ImageText, listed
from imagewright.models.view import seen
from imagewright.networks import CLIP
from imagewright.noise import StepNoise
from imagewright.precision import uncast
from imagewright.types import Clock, Event, Parts, Resize, Trained, Update, UserError

MOST = math.log(100)
"""Of the scale's logarithm."""


@dataclass(frozen=True, kw_only=True)
class MetaCLIP2:
    """Bring a picture and its caption together, and apart from all others of the batch."""

    product: ClassVar[str] = "clip"

    area: float = 0.9
    """Least share of the picture that is cut out and enlarged; 1 = none is."""
    mean: tuple[float, ...] = (0.5,)
    """Subtracted from colours in [0, 1]: one number, or one for each channel."""
    std: tuple[float, ...] = (0.5,)
    """Then divided by."""
    resize: Resize = "bicubic"
    """How pictures of other sizes are brought to the network's, when it is used."""

    def __post_init__(self) -> None:
        require_number("method.area", self.area, 0.01, 1)

    def sizes(self, texts: Texts) -> dict[str, int]:
        """What the network takes from the captions."""
        return {"vocabulary": texts.vocabulary.values, "length": texts.length}

    def parts(self, *, network: nn.Module, texts: Texts) -> Parts:
        """network: a `CLIP`. Raises UserError for another."""
        if not isinstance(network, CLIP):
            raise UserError(f"this method trains a CLIP, not {an(type(network).__name__)}")
        model = ImageText(network, texts.vocabulary.describe(), listed(texts.prompts), self.mean, self.std, self.resize)
        return Parts(clip=Trained(module=model, ema=False))

    def step(self, parts: Any, batch: Captioned, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        """One update."""
        model: ImageText = parts.clip
        x = seen(batch.images, model.view)
        x = x if self.area == 1 else cut_out(x, self.area, noise, max(self.area, CUT_ASPECT))
        pictures, texts = model.network.image(x).pooled, model.network.text(batch.tokens)
        with uncast(x.device):
            pictures, texts = (F.normalize(each.float(), dim=1) for each in (pictures, texts))
            scale = model.network.log_scale.exp()
            losses = contrast(pictures, texts, gathered(pictures), gathered(texts), scale, own(len(x)))
        yield Update("clip", losses["loss"], parts={k: v for k, v in losses.items() if k != "loss"} | {"scale": scale})
        with torch.no_grad():
            model.network.log_scale.clamp_(0, MOST)


def contrast(
    pictures: Tensor, texts: Tensor, all_pictures: Tensor, all_texts: Tensor, scale: Tensor, rows: slice
) -> dict[str, Tensor]:
    """The loss of each pair, [N], and whether a picture's own caption is the nearest one.

    pictures, texts: [N, D] of unit length. all_...: [B, D], those of the whole batch, of which these are `rows`.
    """
    of_picture, of_text = scale * pictures @ all_texts.mT, scale * texts @ all_pictures.mT
    right = torch.arange(len(all_texts), device=texts.device)[rows]
    told, shown = (F.cross_entropy(each, right, reduction="none") for each in (of_picture, of_text))
    return {"loss": (told + shown) / 2, "accuracy": (of_picture.argmax(1) == right).float()}
