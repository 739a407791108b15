"""Analog bits (Chen et al. 2022, 2208.04202): diffusion of the bits of pixels, or of a tokenizer's tokens.

The published runs: AdamW without decay, betas (0.9, 0.999), eps 1e-8, gradients of norm 1 at most, 10,000 updates of
warm-up, averages of 0.9999 an update; the loss is a mean, as ours, so eps stays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from imagewright.methods.analog_bits import AnalogBitsTraining
from imagewright.networks import SongUNetConfig
from imagewright.recipes.edm import FROM_DATA
from imagewright.samplers import BitDiffusion
from imagewright.training.config import EmaConfig, OptimizerConfig, TrainingConfig
from imagewright.training.experiment import DataConfig, Experiment


def digits() -> Experiment:
    """The bits of digits' pixels: minutes on a CPU thread."""
    return Experiment(
        data=DataConfig(source="digits"),
        method=AnalogBitsTraining(),
        network=SongUNetConfig(
            **FROM_DATA, model_channels=32, channel_mult=(2, 2), num_blocks=2, attn_resolutions=(4,), dropout=0.0
        ),
        sampler=BitDiffusion(num_steps=100, rule="ddim"),
        training=TrainingConfig(
            total_images=96_000,
            batch=64,
            channels_last=True,
            optimizer=OptimizerConfig(
                kind="adamw", lr=1e-3, lr_ramp_images=4_800, lr_cooldown_images=48_000, clip_norm=1.0
            ),
            ema=EmaConfig(halflife_images=4_000, rampup_ratio=0.1),
            log_images=1_280,
            snapshot_images=48_000,
            checkpoint_images=48_000,
        ),
    )


FAMILY: Mapping[str, Callable[[], Experiment]] = {
    "analog-bits-digits": digits,
}
