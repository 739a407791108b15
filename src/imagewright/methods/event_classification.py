"""Naming the classes of events: a probe on a frozen encoder, or fine-tuning it (Yang et al. 2023, arXiv 2301.01928).

Networks   encoder (trained, the product); with `probe` its head alone learns. `--start RUN` gives the weights of a
           pre-trained encoder, or of a probe.
Frames     events turned in time, shifted, copied; counts cut out (`area`), cut at the mean of what there is
           (`hot_pixels`), then normalised; half of them mirrored. No patches are left out.
Loss       cross-entropy.
Optimiser  the run's, published: AdamW. Probe: 2e-4 for 256 frames, batch 1024, no decay, 20 epochs, one of warm-up.
           Fine-tuning: 1e-4 for 256, batch 2048, decay 0.3 on matrices, a block's rate 0.75 of the next one's, 100
           epochs, 20 of warm-up, gradients clipped at 5, branches dropped (0.1), an average of 0.9999 a step.
Source     Yan98/Event-Camera-Data-Pre-training (trainer/ft_trainer.py, utils/lr_decay.py, config/ours), which decides.
Departs    RandAugment of frames as 8-bit pictures is not made. A probe's head begins as that of the run that it starts
           from, where that has one (there anew). The average is moved once a step (there once for each of its
           backward passes). A run is judged on frames of 256 levels, of the middle of a longer recording (there of a
           random part), whose hot pixels are not cut (there they are, where they are in training). The paper's settings
           for N-Cars, N-Caltech101 and CIFAR-10-DVS, and its decoders for flow and segmentation, are not made.
Checked    rates and decay of all weights of the released program; what learns and what does not; resume bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from imagewright.checks import require_number
from imagewright.data import event_augment as augment
from imagewright.data.events import EventPairs
from imagewright.methods.event_pretraining import EventViews
from imagewright.models.event_encoder import EventEncoder
from imagewright.networks.event_vit import EventViT
from imagewright.noise import StepNoise
from imagewright.types import Clock, DataSpec, Event, Parts, Trained, Update, UserError

PROBE_STD = 0.01


@dataclass(frozen=True, kw_only=True)
class EventClassification:
    """Name the classes of frames of events."""

    product: ClassVar[str] = "encoder"

    probe: bool = False
    """Whether the head alone learns."""
    views: EventViews = EventViews(area=0.85)
    hot_pixels: bool = False
    """Whether counts are cut to the mean of a frame's counts."""
    layer_decay: float = 1.0
    """Rate of a block, in units of the next one's."""

    def __post_init__(self) -> None:
        require_number("method.layer_decay", self.layer_decay, 0.01, 1)
        if self.probe and self.layer_decay != 1:
            raise UserError("method.layer_decay has no effect on a probe, where no block learns")

    def parts(self, *, network: nn.Module, spec: DataSpec) -> Parts:
        """network: an `EventViT` with a head. Raises UserError for another, and for data without classes."""
        if spec.num_classes < 2:
            raise UserError(f"{spec.name} has {spec.num_classes} classes; a classifier needs at least 2")
        encoder = EventEncoder(network)
        if self.probe:
            assert isinstance(network, EventViT) and network.head is not None
            linear = network.head["linear"]
            assert isinstance(linear, nn.Linear)
            nn.init.trunc_normal_(linear.weight, std=PROBE_STD)
            nn.init.zeros_(linear.bias)
            encoder.requires_grad_(False)
            network.head.requires_grad_(True)
        return Parts(encoder=Trained(module=encoder, ema=not self.probe, groups=self._groups(encoder)))

    def step(self, parts: Any, batch: EventPairs, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        """One update. Events without a class count nothing."""
        encoder, label = parts.encoder, batch.cond.label
        assert label is not None
        counts = self.views.view(self.views.counts(batch.events, encoder.view.side, noise), noise)
        counts = augment.without_hot_pixels(counts) if self.hot_pixels else counts
        logits = encoder.network(augment.normalised(counts)).logits
        loss = F.cross_entropy(logits.float(), label, ignore_index=-1, reduction="none")
        yield Update("encoder", loss, parts={"accuracy": (logits.argmax(1) == label).float()})

    def _groups(self, encoder: EventEncoder) -> Callable[[str, Tensor], tuple[float, bool]]:
        """Rates by layer: input and positions, then each block, then the rest; vectors do not decay."""
        depth = encoder.network.config.depth

        def of(name: str, weight: Tensor) -> tuple[float, bool]:
            place = name.removeprefix("network.").split(".")
            layer = int(place[1]) + 1 if place[0] == "blocks" else depth + 1
            if place[0] in ("patches", "positions", "tokens"):
                layer = 0
            decays = weight.ndim > 1 and place[0] not in ("positions", "tokens")
            return self.layer_decay ** (depth + 1 - layer), decays

        return of
