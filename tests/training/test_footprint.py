"""The footprint of a network against what a real call on one image does."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from imagewright.networks import SongUNet, SongUNetConfig
from imagewright.training.footprint import footprint
from imagewright.types import DataSpec

CONFIG = SongUNetConfig(img_resolution=8, in_channels=3, out_channels=3, model_channels=16, channel_mult=(1, 2),
                        num_blocks=1, attn_resolutions=(4,), dropout=0.1)  # fmt: skip
SPEC = DataSpec(name="toy", resolution=8, channels=3)


def test_operations_are_those_of_a_real_call() -> None:
    network, counter = SongUNet(CONFIG), FlopCounterMode(display=False)
    with counter:
        network(torch.zeros(1, 3, 8, 8), torch.zeros(1))
    assert footprint(network, SPEC).flops == counter.get_total_flops() > 1e6
    assert next(network.parameters()).device.type == "cpu"


def test_activations_grow_with_the_pixels() -> None:
    small = footprint(SongUNet(CONFIG), SPEC)
    large = footprint(SongUNet(replace(CONFIG, img_resolution=16, attn_resolutions=(8,))), replace(SPEC, resolution=16))
    assert 3.5 < large.activation_bytes / small.activation_bytes < 6
    # At least the outputs of the eight convolutions at full resolution.
    assert small.activation_bytes > 4 * 16 * 64 * 8


def test_a_told_network_is_measured_too() -> None:
    plain = SongUNet(CONFIG)
    assert footprint(plain.told_destination(), SPEC).flops > footprint(plain, SPEC).flops
