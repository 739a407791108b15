"""Pre-training on events that are paired with pictures (Yang, Pan & Liu 2023, arXiv 2301.01928).

Networks   encoder (trained, the product; its raw weights, as published): a transformer with two class tokens, heads and
           predictors; key (an average of it); teacher (frozen, any encoder of pictures; published: CLIP ViT-B/32).
Views      events are turned in time, shifted, and some are copied with jitter; two views are cut out of one normalised
           frame, mirrored, and of each are kept patches that are drawn by what is in them.
Loss       a picture's features f, y = W f (one linear layer); q, k the heads' answers on the two views.
           events     2 t CE of zeta(q_event, y) . zeta(k_event', y') / t over everybody's k', t = 0.2,
                      zeta(v, y) = (v . y) y of vectors of length 1, y without gradient, not normalised again.
           pictures   2 t CE of cos(q_image, y') / t, t = 0.1.
           structure  KL(target || softmax of cos(q_image, q_image') / 0.1), the target the y's own similarities after
                      three rounds of Sinkhorn (`form` "code"), or as the paper has it, KL(softmax q || softmax y).
           Sum        1, 1 and 2 of them; and the cross-entropy of a classifier on features without gradient, which
                      only shows what they are worth.
Key        moved before each step, by 0.99 at first and 1 at the end (a cosine). Its order: move, ask, then learn.
Optimiser  the run's, published: AdamW, 1.5e-4 for 256 pairs, batch 1024, weight decay 0.03 on all weights, 40 epochs of
           warm-up of 300, half a cosine to 0.
Source     Yan98/Event-Camera-Data-Pre-training (model/hub_model.py, trainer/pr_trainer.py, config/ours), which decides.
           There the pictures' loss gives no gradient to W, since what is gathered has none (the paper reads as if it
           had): `picture_gradient` gives it. Its KL has one towards both of its sides.
Departs    Keys are those of a micro-batch of all processes, norms and KL likewise; `group` compares the structure of so
           many pairs among themselves, as the released program does of a GPU's 64, whose sums of Sinkhorn's columns it
           adds up over GPUs. Features of pictures are computed in every step, there once. Losses are float32, there
           their products are as short as the run's precision. Patches without events come last in random order (there
           as they are sorted). The paper's form is averaged over the batch. Starting from MoCo v3's weights is not
           made (`--start` takes a run of this method). How blurring and recolouring are drawn is ours; both are off,
           as in the released program.
Checked    losses, Sinkhorn, an answer and one update of the released program on the same weights; zeta's identities;
           inclusion of patches against enumeration; no gradient where there shall be none; resume bit for bit.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imagewright.checks import require_non_negative, require_number, require_positive, require_whole
from imagewright.data import event_augment as augment
from imagewright.data.events import EventPairs
from imagewright.gathering import gathered, own
from imagewright.metrics.vision import PooledFeatures
from imagewright.models.event_encoder import EventEncoder
from imagewright.networks.event_vit import Masking, drawn, kept_count, patch_information
from imagewright.noise import StepNoise
from imagewright.precision import uncast
from imagewright.types import Average, Clock, Event, Follow, Frozen, Parts, Trained, Update, UserError

Form = Literal["code", "paper"]
HALF = (torch.float16, torch.bfloat16)
ROUNDS = 3
"""Of Sinkhorn."""


@dataclass(frozen=True, kw_only=True)
class EventViews:
    """What becomes of events before an encoder sees them."""

    reversal: float = 0.5
    """Probability that time, and with it every sign, is turned."""
    shift: int = 20
    """Pixels by which events are moved at most, in each direction."""
    copies: tuple[int, int] = (100, 5000)
    """Jittered copies that are added, from and to."""
    copies_least: int = 1000
    """Events without which none are added."""
    blur: float = 0.0
    """Deviation, in pixels, by which events' places are jittered before they are rounded."""
    colour: float = 0.0
    """By which share, and by how much, counts are scaled and moved where there are any."""
    area: float = 0.45
    """Least share of a frame that is cut out and enlarged; 1 = none is."""
    mirror: bool = True
    """Half of the frames from left to right."""

    def __post_init__(self) -> None:
        require_number("method.views.reversal", self.reversal, 0, 1)
        require_number("method.views.area", self.area, 0.01, 1)
        require_whole("method.views.shift", self.shift, 0, 1024)
        require_whole("method.views.copies_least", self.copies_least, 1)
        for name in ("blur", "colour"):
            require_number(f"method.views.{name}", getattr(self, name), 0, 100)
        if len(self.copies) != 2 or not 0 <= self.copies[0] <= self.copies[1]:
            raise UserError(f"method.views.copies is {self.copies}; it must be two numbers >= 0, the smaller first")

    def counts(self, events: Tensor, side: int, noise: StepNoise) -> Tensor:
        """Events [N, M, 4] made others of, as counts [N, 2, side, side]."""
        first = events[:, 0, 0]
        if self.reversal:
            events = augment.turned(events, noise.uniform(first) < self.reversal)
        if self.shift:
            by = noise.integers(2 * self.shift + 1, events[:, 0, :2]) - self.shift
            events = augment.shifted(events, by, side)
        if self.copies[1]:
            events = augment.copied(events, self.copies, self.copies_least, noise)
        return augment.recoloured(
            augment.histogram(augment.blurred(events, self.blur, side, noise), side), self.colour, noise
        )

    def view(self, frames: Tensor, noise: StepNoise) -> Tensor:
        """A part of each frame, or of its mirror image."""
        part = augment.cropped(frames, self.area, noise)
        return augment.mirrored(part, noise) if self.mirror else part


@dataclass(frozen=True, kw_only=True)
class EventPretraining:
    """Tell views of events apart along their pictures' features, and answer as a teacher of pictures does."""

    product: ClassVar[str] = "encoder"

    views: EventViews = EventViews()
    keep: float = 0.5
    """Share of the patches that the encoder is shown."""
    masking: Masking = "exact"
    """How they are drawn: by what is in them, exactly so, or as the released program does; or uniformly."""
    project: bool = True
    """Whether events are contrasted along their pictures' features; otherwise as they are, normalised."""
    form: Form = "code"
    """Of the loss of structure."""
    group: int | None = None
    """Pairs whose structure is compared among themselves; None = all of a micro-batch."""
    picture_gradient: bool = False
    """Whether the pictures' loss teaches the layer of the teacher's features."""
    events: float = 1.0
    """Weight of the contrast of events."""
    pictures: float = 1.0
    """Weight of the contrast with pictures."""
    structure: float = 2.0
    """Weight of the divergence of similarities."""
    event_temperature: float = 0.2
    image_temperature: float = 0.1
    momentum: float = 0.99
    """Of the key encoder, at first; 1 at the end."""
    hidden: int = 4096
    """Width of the heads and predictors."""
    out: int = 256
    """Length of what is compared."""

    def __post_init__(self) -> None:
        require_number("method.keep", self.keep, 0.001, 1)
        require_number("method.momentum", self.momentum, 0, 1)
        for name, allowed in (("masking", get_args(Masking)), ("form", get_args(Form))):
            if getattr(self, name) not in allowed:
                raise UserError(f"method.{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}")
        for name in ("events", "pictures", "structure"):
            require_non_negative(f"method.{name}", getattr(self, name))
        for name in ("event_temperature", "image_temperature"):
            require_positive(f"method.{name}", getattr(self, name))
        for name in ("hidden", "out"):
            require_whole(f"method.{name}", getattr(self, name), 1, 1 << 16)
        if self.group is not None:
            require_whole("method.group", self.group, 2)

    def parts(self, *, network: nn.Module, teacher: PooledFeatures) -> Parts:
        """network: an `EventViT`. Raises UserError for another."""
        encoder = EventEncoder(network, teacher.dim, self.hidden, self.out)
        key = copy.deepcopy(encoder)
        return Parts(
            encoder=Trained(module=encoder, ema=False),
            key=Average(module=key, of="encoder"),
            teacher=Frozen(module=teacher),
        )

    def decay(self, fraction: float) -> float:
        """Of the key encoder, after a share of the run."""
        return 1 - (1 - self.momentum) * (1 + math.cos(math.pi * fraction)) / 2

    def step(self, parts: Any, batch: EventPairs, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        """One update. Pairs without a class count nothing in the classifier that only shows."""
        yield Follow("key", "encoder", self.decay(clock.fraction))
        encoder, contrast = parts.encoder, parts.encoder.contrast
        side = encoder.view.side
        frames = augment.normalised(self.views.counts(batch.events, side, noise))
        one, two = (self._seen(encoder, self.views.view(frames, noise), noise) for _ in "ab")
        tokens, _ = encoder.network.look(*one)
        with torch.no_grad():
            k_event = parts.key.contrast.event(parts.key.network.look(*two)[0][:, 0])
        y = contrast.teacher(parts.teacher(batch.images))
        q_event = contrast.event_predictor(contrast.event(tokens[:, 0]))
        q_image = contrast.image_predictor(contrast.image(tokens[:, 1]))
        logits = encoder.network.named(tokens.flatten(1).detach())
        with uncast(batch.events.device):
            found = self.losses(*(t.float() if t.dtype in HALF else t for t in (q_event, q_image, k_event, y)))
            loss = self.events * found["events"] + self.pictures * found["pictures"]
            loss = loss + self.structure * found["structure"]
            if logits is not None and batch.cond.label is not None:
                logits = logits.float() if logits.dtype in HALF else logits
                loss = loss + F.cross_entropy(logits, batch.cond.label, ignore_index=-1, reduction="none")
                found["accuracy"] = (logits.argmax(1) == batch.cond.label).float()
        yield Update("encoder", loss, parts=found)

    def losses(self, q_event: Tensor, q_image: Tensor, k_event: Tensor, y: Tensor) -> dict[str, Tensor]:
        """The three losses, each [N], of [N, out] each."""
        if self.project:
            q_event, k_event = projected(q_event, y), projected(k_event, y)
        else:
            q_event, k_event = F.normalize(q_event, dim=1), F.normalize(k_event, dim=1)
        q_image, y = F.normalize(q_image, dim=1), F.normalize(y, dim=1)
        return {
            "events": contrasted(q_event, k_event, self.event_temperature),
            "pictures": contrasted(q_image, y if self.picture_gradient else y.detach(), self.image_temperature),
            "structure": self._structure(q_image, y),
        }

    def _seen(self, encoder: EventEncoder, frames: Tensor, noise: StepNoise) -> tuple[Tensor, Tensor | None]:
        """Frames, and which of their patches are kept."""
        if self.keep == 1:
            return frames, None
        information = patch_information(frames, encoder.network.config.patch)
        count = kept_count(information.shape[1], self.keep)
        return frames, drawn(information, count, noise.uniform(information), self.masking)

    def _structure(self, q: Tensor, y: Tensor) -> Tensor:
        rows = len(q)
        if self.group is None:
            everybody = divergence(gathered(q)[None], gathered(y)[None], self.image_temperature, self.form)
            return everybody[0, own(rows)]
        if rows % self.group:
            raise UserError(f"method.group is {self.group}; it must divide the {rows} pairs of a micro-batch")
        q, y = (t.view(-1, self.group, t.shape[1]) for t in (q, y))
        return divergence(q, y, self.image_temperature, self.form).flatten()


def projected(v: Tensor, y: Tensor) -> Tensor:
    """zeta: the parts of unit vectors v / |v| along y / |y|, [N, D]; y gets no gradient."""
    v, y = F.normalize(v, dim=1), F.normalize(y.detach(), dim=1)
    return (v * y).sum(1, keepdim=True) * y


def contrasted(q: Tensor, k: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of one's own key among everybody's, times twice the temperature, [N]."""
    place = own(len(q)).start + torch.arange(len(q), device=q.device)
    return 2 * temperature * F.cross_entropy(q @ gathered(k).T / temperature, place, reduction="none")


def divergence(q: Tensor, y: Tensor, temperature: float, form: Form) -> Tensor:
    """How far the similarities of q are from those of y, of unit vectors [G, N, D] within each group: [G, N]."""
    of_q, of_y = (t @ t.mT / temperature for t in (q, y))
    if form == "paper":
        ours, theirs = of_q.log_softmax(2), of_y.log_softmax(2)
        return (ours.exp() * (ours - theirs)).sum(2)
    target = balanced(of_y)
    return (torch.xlogy(target, target) - target * of_q.log_softmax(2)).sum(2)


def balanced(scores: Tensor, rounds: int = ROUNDS) -> Tensor:
    """exp(scores) [G, N, N] with rows, and after many rounds columns, that sum to 1 (Sinkhorn's rule).

    As in the released program, the sum over a column gets no gradient, that over a row does.
    """
    n = scores.shape[-1]
    q = scores.exp()
    q = q / q.sum((1, 2), keepdim=True).detach()
    for _ in range(rounds):
        q = q / q.sum(1, keepdim=True).detach() / n
        q = q / q.sum(2, keepdim=True) / n
    return q * n
