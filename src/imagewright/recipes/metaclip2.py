"""Meta CLIP 2 (Chuang et al. 2025, 2507.22062): pictures and captions of all languages in one space, of a curated pool.

The small ones learn from made-up captions (`standin_captions`), the published ones from a table of your own, with
entries of each language beside it; rate, batch, decay and length are the program's for H/14. B/16 and S/16 are its own
sizes, of which it has released weights that were distilled; here they learn from pairs, as H/14 does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from imagewright.data.captions import CaptionsConfig
from imagewright.interop.clip import MEAN, STD
from imagewright.methods.metaclip2 import MetaCLIP2
from imagewright.networks.clip import SIZES, CLIPConfig
from imagewright.training.config import OptimizerConfig, TrainingConfig
from imagewright.training.experiment import Experiment

BATCH = 196 * 8 * 48
"""Images a process, processes a machine, machines."""
EPOCHS, EPOCH = 32, 920_000_000
WARM_UP = 2000
"""Steps."""


def digits() -> Experiment:
    """8x8 digits with captions in three languages: three minutes on a CPU thread."""
    sizes = CLIPConfig(img_resolution=8, in_channels=1, patch=2, width=48, depth=3, head_width=16, embed=32,
                       vocabulary=128, length=12, text_width=48, text_depth=2, text_heads=3)  # fmt: skip
    return Experiment(
        data=CaptionsConfig(length=12),
        method=MetaCLIP2(area=1.0, resize="box"),
        network=sizes,
        training=_small(60_000, each=20_000),
    )


def emoji64_32() -> Experiment:
    """Emoji at 32x32 with captions in three languages, of their nine groups."""
    sizes = CLIPConfig(img_resolution=32, patch=4, width=96, depth=4, head_width=32, embed=64,
                       vocabulary=128, length=12, text_width=64, text_depth=2, text_heads=4)  # fmt: skip
    return Experiment(
        data=CaptionsConfig(pictures="emoji64", resolution=32, length=12),
        method=MetaCLIP2(resize="box"),
        network=sizes,
        training=_small(200_000, each=50_000),
    )


def _optimizer(lr: float, ramp: float, cooldown: float) -> OptimizerConfig:
    """As published, but for the rate and its lengths."""
    return OptimizerConfig(
        kind="adamw",
        lr=lr,
        betas=(0.9, 0.95),
        eps=1e-6,
        weight_decay=0.1,
        decay_vectors=False,
        lr_ramp_images=ramp,
        lr_cooldown_images=cooldown,
        lr_cooldown_shape="cosine",
    )


def worldwide(size: str) -> Experiment:
    """As published, at 224 pixels, from a table of captions and the tokenizer of XLM-V."""
    total, warm = EPOCHS * (EPOCH // BATCH) * BATCH, WARM_UP * BATCH
    data = CaptionsConfig(
        source="pairs.parquet", resolution=224, t=170_000, metadata="entries.json", vocabulary="xlm-v.json"
    )
    return Experiment(
        data=data,
        method=MetaCLIP2(mean=MEAN, std=STD),
        network=CLIPConfig(**SIZES[size]),
        training=TrainingConfig(
            total_images=total,
            batch=BATCH,
            optimizer=_optimizer(4e-4, warm, total - warm),
            precision="bf16",
            recompute=True,
            log_images=100 * BATCH,
            snapshot_images=EPOCH,
            checkpoint_images=EPOCH,
            keep_checkpoints=1,
        ),
    )


def _small(total: int, each: int) -> TrainingConfig:
    """The published optimiser at a rate for small networks."""
    return TrainingConfig(
        total_images=total,
        batch=128,
        optimizer=_optimizer(1e-3, 0.05, 0.95),
        log_images=2_560,
        snapshot_images=each,
        checkpoint_images=each,
    )


FAMILY: Mapping[str, Callable[[], Experiment]] = {
    "metaclip2-digits": digits,
    "metaclip2-emoji64-32": emoji64_32,
    **{f"metaclip2-{size.lower().replace('/', '')}": partial(worldwide, size) for size in ("S/16", "B/16", "H/14")},
}
