"""What 8-bit products are worth: a quantized network's call, as whole numbers, against the float network's."""

from __future__ import annotations

import copy

import torch

from imagewright.bench.speed import Ratio, alternate
from imagewright.networks import DiT, DiTConfig, SongUNet, SongUNetConfig
from imagewright.networks.config import Network
from imagewright.networks.integers import with_integers
from imagewright.tuning.quantization import Call, Quantization, answer_loss, quantize
from imagewright.types import Condition, UserError


def measure_integers(device: torch.device, rounds: int) -> list[Ratio]:
    """A U-Net of 256 channels (two pictures of 32x32) and LightningDiT of width 384 (256 tokens), in 4 and 8 bits.

    details: the same against the quantized network's own call in floats. Raises UserError elsewhere than on a CPU.
    """
    if device.type != "cpu":
        raise UserError(f"8-bit products are made on a CPU, not on {device.type}; give --device cpu")
    unet = SongUNetConfig(img_resolution=32, in_channels=3, out_channels=3, channel_mult=(2, 2, 2), num_blocks=2)
    dit = DiTConfig(img_resolution=16, in_channels=32, out_channels=32, width=384, depth=4, heads=6)
    return [
        *_both("U-Net of 256 channels", SongUNet(unet), 2, rounds),
        *_both("LightningDiT of width 384", DiT(dit), 1, rounds),
    ]


def _both(name: str, network: Network, images: int, rounds: int) -> list[Ratio]:
    network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    side, channels = network.config.img_resolution, network.config.in_channels
    x = torch.randn(images, channels, side, side).contiguous(memory_format=torch.channels_last)
    call = (x, torch.zeros(images), Condition())
    return [_ratio(f"{name}, {bits} bits", network, call, bits, rounds) for bits in (4, 8)]


def _ratio(what: str, network: Network, call: Call, bits: int, rounds: int) -> Ratio:
    few = copy.deepcopy(network)
    quantize(few, [call], Quantization(bits=bits, norms="none"), loss=answer_loss)
    whole = copy.deepcopy(few)
    with_integers(whole)
    device, batch = torch.device("cpu"), len(call[0])
    with torch.inference_mode():
        ours, theirs, ratios = alternate(lambda: whole(*call), lambda: network(*call), device, rounds, batch)
        _, _, (unpacked, _, _) = alternate(lambda: whole(*call), lambda: few(*call), device, max(rounds // 3, 1), batch)
    return Ratio(what, ours, "the float network", theirs, *ratios, details={"against its own call in floats": unpacked})
