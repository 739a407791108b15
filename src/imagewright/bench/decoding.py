"""Cost of decoding tokens: what a causal transformer's cache saves, and what few passes of other models save beside it.

All networks have the same size and untrained weights: what is drawn makes no difference to how long it takes.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from imagewright.bench.speed import Ratio, alternate, peak_bytes, seconds
from imagewright.models.bits import BitDenoiser
from imagewright.models.causal import CausalTokenModel
from imagewright.models.masked import MaskedTokenModel
from imagewright.models.masked_diffusion import MaskedDiffusionModel
from imagewright.models.random_order import RandomOrderModel
from imagewright.models.self_conditioned import SelfConditioned
from imagewright.models.tokens import PixelCodec, TokenNetworkModel
from imagewright.networks import ARPG, ARPGConfig, SongUNet, SongUNetConfig, TokenTransformer, TokenTransformerConfig
from imagewright.samplers import Ancestral, BitDiffusion, MaskedDecoding, RandomizedParallel, Raster
from imagewright.samplers.generator import ImageGenerator
from imagewright.types import DataSpec, Sampler

SIDE = 16
"""Tokens a side, 256 in all, as MaskGIT has them."""
SIDES = (6, 8, 12, 16)
"""Of the images over which growth is fitted: 36 to 256 tokens."""
WIDTH, DEPTH = 128, 4
"""Of all networks."""
MANY = 8
"""Images at a time where they are drawn together; elsewhere it is one."""


def measure_cache(device: torch.device, rounds: int) -> Ratio:
    """Raster decoding of one image by a causal transformer with its cache against the same without.

    details: exponents of the least-squares line of ln seconds over ln tokens, from `SIDES`, for each.
    """
    cached, plain = (_generator(SIDE, Raster(cache=cache), device) for cache in (True, False))
    measured = alternate(lambda: cached.generate(1), lambda: plain.generate(1), device, rounds, batch=1)
    growth = {f"growth {name}": _growth(cache, device) for name, cache in (("cached", True), ("uncached", False))}
    details = {"tokens": SIDE**2, "network calls of each": cached.nfe, **growth}
    return _ratio("raster decoding, cached", "without the cache", measured, details)


def measure_masked_decoding(device: torch.device, rounds: int) -> Ratio:
    """MaskGIT's eight passes against raster decoding (cached) of one image by a causal transformer of the same size.

    details: seconds and network calls of each; the ratio for `MANY` images at a time; and against no cache, once.
    """
    masked, raster = _generator(SIDE, MaskedDecoding(num_steps=8), device), _generator(SIDE, Raster(), device)
    plain = _generator(SIDE, Raster(cache=False), device)
    measured = alternate(lambda: masked.generate(1), lambda: raster.generate(1), device, rounds, batch=1)
    _, _, (many, _, _) = alternate(lambda: masked.generate(MANY), lambda: raster.generate(MANY), device, 3, MANY)
    details = {
        "seconds": 1 / measured[0],
        "seconds in raster order": 1 / measured[1],
        "network calls": masked.nfe,
        "network calls in raster order": raster.nfe,
        f"ratio for {MANY} images together": many,
        "ratio to raster order without the cache": seconds(lambda: plain.generate(1), device) * measured[0],
    }
    return _ratio("masked decoding, 8 passes", "raster decoding, cached", measured, details)


def measure_parallel_decoding(device: torch.device, rounds: int) -> list[Ratio]:
    """ARPG's 16 passes over 64 tokens of one image, against its own 64, as many of MaskGIT, and cached raster decoding.

    details: network calls of each, and the ratio for `MANY` images at a time.
    """
    ours, found = _generator(8, RandomizedParallel(num_steps=16), device), []
    for peer, sampler in (
        ("its own 64 passes", RandomizedParallel(num_steps=64)),
        ("MaskGIT, 16 passes", MaskedDecoding(num_steps=16)),
        ("raster decoding, cached", Raster()),
    ):
        theirs = _generator(8, sampler, device)
        measured = alternate(lambda: ours.generate(1), lambda g=theirs: g.generate(1), device, rounds, batch=1)  # type: ignore[misc]
        _, _, (many, _, _) = alternate(
            lambda: ours.generate(MANY),
            lambda g=theirs: g.generate(MANY),  # type: ignore[misc]
            device,
            3,
            MANY,
        )
        details = {"network calls": ours.nfe, "of the other": theirs.nfe, f"ratio for {MANY} images together": many}
        found.append(_ratio("ARPG, 16 passes", peer, measured, details))
    return found


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """What it costs to draw one image, or `MANY` at a time, of so many tokens.

    passes: network calls of an image. seconds, together: of one image alone, and of each of several. memory: the most
    bytes in use beyond the weights, of one alone.
    """

    name: str
    tokens: int
    passes: int
    seconds: float
    together: float
    memory: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def measure_decoders(
    device: torch.device, tokens: int, rounds: int = 3, on_start: Callable[[str], None] = lambda what: None
) -> list[Decoder]:
    """Every way to draw, by models of about the same size, of a square number of tokens; medians of some rounds."""
    side = math.isqrt(tokens)
    samplers: dict[str, Sampler] = {
        "raster order, cached": Raster(),
        "raster order, no cache": Raster(cache=False),
        "MaskGIT": MaskedDecoding(num_steps=8),
        "MaskGIT, more passes": MaskedDecoding(num_steps=16),
        "MD4": Ancestral(num_steps=64),
        "ARPG": RandomizedParallel(num_steps=16),
        "ARPG, more passes": RandomizedParallel(num_steps=64),
        "analog bits": BitDiffusion(num_steps=25),
    }
    found = []
    for name, sampler in samplers.items():
        on_start(f"{name}, {tokens} tokens")
        generator = _generator(side, sampler, device)
        memory = peak_bytes(lambda g=generator: g.generate(1), device)  # type: ignore[misc]
        one, many = (
            statistics.median(seconds(lambda g=generator, n=n: g.generate(n), device) for _ in range(rounds))  # type: ignore[misc]
            for n in (1, MANY)
        )
        found.append(
            Decoder(
                name=name, tokens=tokens, passes=generator.nfe, seconds=one, together=many / MANY, memory=memory
            )
        )  # fmt: skip
    return found


def _ratio(
    what: str, peer: str, measured: tuple[float, float, tuple[float, float, float]], details: Mapping[str, float]
) -> Ratio:
    ours, theirs, ratios = measured
    return Ratio(what, ours, peer, theirs, *ratios, details=details)


def _generator(side: int, sampler: Sampler, device: torch.device) -> ImageGenerator:
    spec, codec = DataSpec(name="speed", resolution=side, channels=1), PixelCodec(side, 1)
    if isinstance(sampler, BitDiffusion):
        return ImageGenerator(BitDenoiser(SelfConditioned(_unet(side)), codec), spec, sampler, device)
    sizes: dict[str, Any] = {"values": 256, "length": side**2, "width": WIDTH, "depth": DEPTH, "heads": 4}
    kinds: dict[type, type[TokenNetworkModel]] = {
        Raster: CausalTokenModel, MaskedDecoding: MaskedTokenModel, Ancestral: MaskedDiffusionModel,
        RandomizedParallel: RandomOrderModel,
    }  # fmt: skip
    kind = kinds[type(sampler)]
    if kind is RandomOrderModel:
        network: torch.nn.Module = ARPG(ARPGConfig(**sizes, hidden_multiple=8))
    else:
        network = TokenTransformer(TokenTransformerConfig(**sizes, causal=kind is CausalTokenModel))
    return ImageGenerator(kind(network, codec), spec, sampler, device)


def _unet(side: int) -> SongUNet:
    """Of bits and an estimate of them; about as large as the transformers."""
    config = SongUNetConfig(img_resolution=side, in_channels=16, out_channels=8, model_channels=32, channel_mult=(1, 2),
                            num_blocks=1, attn_resolutions=(side // 2,))  # fmt: skip
    return SongUNet(config)


def _growth(cache: bool, device: torch.device) -> float:
    """Exponent of seconds over tokens; the faster of two measurements at each number of tokens."""
    found = []
    for side in SIDES:
        generator = _generator(side, Raster(cache=cache), device)
        found.append(min(seconds(lambda g=generator: g.generate(1), device) for _ in range(2)))  # type: ignore[misc]
    return slope([side**2 for side in SIDES], found)


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the least-squares line through (ln x, ln y)."""
    fitted = np.polyfit([math.log(v) for v in x], [math.log(v) for v in y], 1)
    return float(fitted[0])
