"""The footprint of a network against what a real call on one image does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from imagewright.networks import SongUNet, SongUNetConfig
from imagewright.precision import Precision
from imagewright.training.footprint import footprint
from imagewright.types import DataSpec

CONFIG = SongUNetConfig(img_resolution=8, in_channels=3, out_channels=3, model_channels=16, channel_mult=(1, 2),
                        num_blocks=1, attn_resolutions=(4,), dropout=0.1)  # fmt: skip
SPEC = DataSpec(name="toy", resolution=8, channels=3)


def test_operations_are_those_of_a_real_call() -> None:
    network, counter = SongUNet(CONFIG), FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):  # of the CPU's fused one torch counts nothing
        network(torch.zeros(1, 3, 8, 8), torch.zeros(1))
    assert footprint(network, SPEC).flops == counter.get_total_flops() > 1e6
    assert next(network.parameters()).device.type == "cpu"


def test_activations_grow_with_the_pixels() -> None:
    small = footprint(SongUNet(CONFIG), SPEC)
    large = footprint(SongUNet(replace(CONFIG, img_resolution=16, attn_resolutions=(8,))), replace(SPEC, resolution=16))
    assert 3.5 < large.activation_bytes / small.activation_bytes < 6
    # At least the outputs of the eight convolutions at full resolution.
    assert small.activation_bytes > 4 * 16 * 64 * 8


def test_what_is_computed_again_is_not_kept() -> None:
    """A further block costs what goes into it, in place of all that it computes."""
    shallow, deep = (SongUNet(replace(CONFIG, num_blocks=n)) for n in (2, 4))
    plain, again = (
        [footprint(network, SPEC, recompute=recompute) for network in (shallow, deep)] for recompute in (False, True)
    )
    assert [f.flops for f in plain] == [f.flops for f in again]
    grows, grows_again = (b.activation_bytes - a.activation_bytes for a, b in (plain, again))
    assert 0 < grows_again < 0.35 * grows
    # The insides of one block, the largest, are there while it is its turn.
    assert again[0].activation_bytes > 4 * 16 * 64 * 4


def test_a_told_network_is_measured_too() -> None:
    plain = SongUNet(CONFIG)
    assert footprint(plain.told_destination(), SPEC).flops > footprint(plain, SPEC).flops


def kept_by_a_real_call(network: SongUNet, precision: Precision) -> int:
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    network = network.to({"fp32": torch.float32, "bf16": torch.bfloat16}[precision]).train()
    x = torch.zeros(1, 3, 8, 8, dtype=next(network.parameters()).dtype)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        network(x, torch.zeros(1))
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    return sum(memory.nbytes() for pointer, memory in kept.items() if pointer not in own)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_memory_is_that_of_a_real_call(precision: Precision) -> None:
    """Attention over all 64 pixels, whose matrix no fused kernel keeps."""
    config = replace(CONFIG, attn_resolutions=(8, 4), dropout=0.0)
    found = footprint(SongUNet(config), SPEC, precision).activation_bytes
    assert found == pytest.approx(kept_by_a_real_call(SongUNet(config), precision), rel=0.03)
