"""Pre-training on events paired with pictures (Yang, Pan & Liu 2023, 2301.01928), a probe, and fine-tuning.

Published for N-ImageNet at 224 pixels with CLIP's features of ImageNet (`--teacher clip:FOLDER`): ViT-S/16, B/16 and
L/16. On stand-in events, which a moving picture makes, the shipped classifiers teach. A `-probe` starts from the run of
its name, `-tuning` from the probe; `three_stages` is all of it as a chain. `edm-events-digits` draws frames of events.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from imagewright.data.event_files import EventFiles
from imagewright.data.event_simulator import Simulator
from imagewright.data.events import StandinEvents
from imagewright.methods.event_classification import EventClassification
from imagewright.methods.event_pretraining import EventPretraining, EventViews
from imagewright.networks.event_vit import SIZES, EventViTConfig
from imagewright.recipes.edm import digits as edm_digits
from imagewright.recipes.published import halflife_images
from imagewright.training.chain import OF_STAGE, Chain, Stage
from imagewright.training.config import EmaConfig, OptimizerConfig, TrainingConfig
from imagewright.training.experiment import Experiment

IMAGENET = 1_281_167
"""Recordings of N-ImageNet's training set, one of each of ImageNet's pictures."""
EPOCHS, WARM_UP, BATCH = 300, 40, 1024
GPU = 64
"""Pairs of a GPU in the released recipes: those whose structure is compared."""
SMALL = EventViews(shift=1, copies=(10, 50), copies_least=100, area=0.9)
"""For frames of 16 or 32 pixels."""
STILL = EventViews(reversal=0.0, shift=0, copies=(0, 0), area=1.0, mirror=False)
"""Views that differ by which patches are kept alone."""
CAMERA = Simulator(stroke=(0.5, 1.0))
"""Whose movements leave an 8x8 digit legible."""


def digits() -> Experiment:
    """Handwritten digits that move, frames of 16x16, with the published losses."""
    return Experiment(
        data=StandinEvents(source="digits", ground=4, most=512, simulator=CAMERA),
        method=EventPretraining(views=STILL, hidden=256, out=64),
        network=EventViTConfig(img_resolution=16, patch=8, width=64, depth=4, heads=4, head_norm=True),
        given={"teacher": "digits"},
        training=_small(76_800, 3e-3, batch=64),
    )


def digits_without_structure() -> Experiment:
    """What learns from so little: a minute on a CPU thread.

    On seed 0 a probe of held-out digits gains on the untrained network's; turned and shifted views took half of the
    gain and more, the structure of a teacher that knows ten classes all of it.
    """
    run = digits()
    return replace(run, method=replace(run.method, structure=0.0))


def emoji64_32() -> Experiment:
    """Emoji that move, frames of 32x32."""
    return Experiment(
        data=StandinEvents(source="emoji64", resolution=32, most=2048),
        method=EventPretraining(views=SMALL, hidden=512, out=128),
        network=EventViTConfig(img_resolution=32, patch=4, width=128, depth=6, heads=4, head_norm=True),
        given={"teacher": "emoji"},
        training=_small(400_000, 5e-4),
    )


def classifying(name: str, *, probe: bool) -> Experiment:
    """A probe of what a small run has pre-trained, or fine-tuning that starts from the probe."""
    run = FAMILY[name]()
    method = EventClassification(
        probe=probe,
        views=replace(run.method.views, area=0.9 if probe else 0.85),
        layer_decay=1.0 if probe else 0.75,
    )
    total = run.training.total_images
    training = _small(total, 5e-2 if probe else 1e-3, decay=0.0 if probe else 0.05)
    network = replace(run.network, head_norm=False, drop_path=0.0 if probe else 0.1)
    start = f"runs/{name}" if probe else f"runs/{name}-probe"
    return replace(run, method=method, network=network, given={}, start=start, training=training)


def three_stages(recipe: str) -> Chain:
    """Pre-training by one of this family's recipes, a probe of it, and fine-tuning that starts from the probe."""
    return Chain(
        Stage("pretraining", FAMILY[recipe]()),
        Stage("probe", replace(FAMILY[f"{recipe}-probe"](), start=f"{OF_STAGE}pretraining")),
        Stage("tuning", replace(FAMILY[f"{recipe}-tuning"](), start=f"{OF_STAGE}probe")),
    )


def imagenet(size: str) -> Experiment:
    """N-ImageNet as published."""
    return Experiment(
        data=EventFiles(source="N_Imagenet", pictures="imagenet"),
        method=EventPretraining(group=GPU, masking="published"),
        network=EventViTConfig(img_resolution=224, head_norm=True, **SIZES[size]),
        given={"teacher": "clip:clip-vit-base-patch32"},
        training=_published(EPOCHS, WARM_UP, BATCH, 1.5e-4, decay=0.03),
    )


def imagenet_probe(size: str) -> Experiment:
    """A linear probe of it."""
    return Experiment(
        data=EventFiles(source="N_Imagenet", pictures="imagenet"),
        method=EventClassification(probe=True, views=EventViews(area=0.9)),
        network=EventViTConfig(img_resolution=224, **SIZES[size]),
        start=f"runs/events-{size.lower()}-nimagenet",
        training=_published(20, 1, 1024, 2e-4, decay=0.0, clip=5.0),
    )


def imagenet_tuning(size: str) -> Experiment:
    """Fine-tuning of it."""
    return Experiment(
        data=EventFiles(source="N_Imagenet", pictures="imagenet"),
        method=EventClassification(layer_decay=0.75),
        network=EventViTConfig(img_resolution=224, drop_path=0.1, learn_positions=True, **SIZES[size]),
        start=f"runs/events-{size.lower()}-nimagenet-probe",
        training=_published(100, 20, 2048, 1e-4, decay=0.3, clip=5.0),
    )


def edm_events() -> Experiment:
    """Frames of events of moving digits, drawn by EDM: pictures of two channels."""
    run = edm_digits()
    return replace(run, data=replace(digits().data, frames=True))


def _published(
    epochs: int, warm_up: int, batch: int, rate: float, *, decay: float, clip: float | None = None
) -> TrainingConfig:
    total, warm = epochs * IMAGENET, warm_up * IMAGENET
    return TrainingConfig(
        total_images=total,
        batch=batch,
        precision="fp16",
        optimizer=OptimizerConfig(
            kind="adamw",
            lr=rate * batch / 256,
            weight_decay=decay,
            clip_norm=clip,
            lr_ramp_images=warm,
            lr_cooldown_images=total - warm,
            lr_cooldown_shape="cosine",
        ),
        ema=EmaConfig(halflife_images=halflife_images(batch, 0.9999), rampup_ratio=None),
        log_images=102_400,
        snapshot_images=10 * IMAGENET,
        checkpoint_images=IMAGENET,
        keep_checkpoints=1,
    )


def _small(total: int, rate: float, decay: float = 0.03, batch: int = 128) -> TrainingConfig:
    """AdamW and half a cosine, as published, over a short run."""
    return TrainingConfig(
        total_images=total,
        batch=batch,
        optimizer=OptimizerConfig(
            kind="adamw",
            lr=rate,
            weight_decay=decay,
            lr_ramp_images=0.1,
            lr_cooldown_images=0.9,
            lr_cooldown_shape="cosine",
        ),
        ema=EmaConfig(halflife_images=2_000),
        log_images=2_560,
        snapshot_images=total,
        checkpoint_images=total // 4,
    )


FAMILY: Mapping[str, Callable[[], Experiment]] = {
    "events-digits": digits_without_structure,
    "events-emoji64-32": emoji64_32,
    **{
        f"{name}-{stage}": partial(classifying, name, probe=stage == "probe")
        for name in ("events-digits", "events-emoji64-32")
        for stage in ("probe", "tuning")
    },
    **{f"events-{size.lower()}-nimagenet": partial(imagenet, size) for size in SIZES},
    **{f"events-{size.lower()}-nimagenet-probe": partial(imagenet_probe, size) for size in SIZES},
    **{f"events-{size.lower()}-nimagenet-tuning": partial(imagenet_tuning, size) for size in SIZES},
    "edm-events-digits": edm_events,
}
