"""Speed of decoding tokens: what a causal transformer's cache saves, and what few masked passes save beside it.

All networks have the same size and untrained weights: what is drawn makes no difference to how long it takes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from imagewright.bench.speed import Ratio, alternate, seconds
from imagewright.models.causal import CausalTokenModel
from imagewright.models.masked import MaskedTokenModel
from imagewright.models.tokens import PixelCodec
from imagewright.networks import TokenTransformer, TokenTransformerConfig
from imagewright.samplers import MaskedDecoding, Raster
from imagewright.samplers.generator import ImageGenerator
from imagewright.types import DataSpec, Sampler

BATCH = 8
SIDE = 16
"""Tokens a side, 256 in all, as MaskGIT has them."""
SIDES = (8, 12, 16, 20)
"""Of the images over which growth is fitted: 64 to 400 tokens."""
LARGEST = 4
"""Images at a time for that fit."""


def measure_cache(device: torch.device, rounds: int) -> Ratio:
    """Raster decoding of a causal transformer with its cache against the same without; tokens of both are equal.

    details: exponents of the least-squares line of ln seconds over ln tokens, from `SIDES`, for each.
    """
    cached, plain = (_generator(SIDE, Raster(cache=cache), device) for cache in (True, False))
    ours, theirs, ratios = alternate(
        lambda: cached.generate(BATCH, batch_size=BATCH),
        lambda: plain.generate(BATCH, batch_size=BATCH),
        device,
        rounds,
        BATCH,
    )
    growth = {f"growth {name}": _growth(cache, device) for name, cache in (("cached", True), ("uncached", False))}
    details = {"tokens": SIDE**2, "network calls of each": cached.nfe, **growth}
    return Ratio("raster decoding, cached", ours, "without the cache", theirs, *ratios, details=details)


def measure_masked_decoding(device: torch.device, rounds: int) -> Ratio:
    """MaskGIT's eight passes against (cached) raster decoding of a causal transformer of the same size."""
    masked, raster = _generator(SIDE, MaskedDecoding(num_steps=8), device), _generator(SIDE, Raster(), device)
    ours, theirs, ratios = alternate(
        lambda: masked.generate(BATCH, batch_size=BATCH),
        lambda: raster.generate(BATCH, batch_size=BATCH),
        device,
        rounds,
        BATCH,
    )
    details = {
        "seconds an image": 1 / ours,
        "seconds an image in raster order": 1 / theirs,
        "network calls": masked.nfe,
        "network calls in raster order": raster.nfe,
    }
    return Ratio("masked decoding, 8 passes", ours, "raster decoding, cached", theirs, *ratios, details=details)


def _generator(side: int, sampler: Sampler, device: torch.device) -> ImageGenerator:
    causal = isinstance(sampler, Raster)
    config = TokenTransformerConfig(values=256, length=side**2, width=128, depth=4, heads=4, causal=causal)
    model = (CausalTokenModel if causal else MaskedTokenModel)(TokenTransformer(config), PixelCodec(side, 1))
    return ImageGenerator(model, DataSpec(name="speed", resolution=side, channels=1), sampler, device)


def _growth(cache: bool, device: torch.device) -> float:
    """Exponent of seconds over tokens; the faster of two measurements at each number of tokens."""
    found = []
    for side in SIDES:
        generator = _generator(side, Raster(cache=cache), device)
        times = [seconds(lambda g=generator: g.generate(LARGEST, batch_size=LARGEST), device) for _ in range(2)]  # type: ignore[misc]
        found.append(min(times))
    return slope([side**2 for side in SIDES], found)


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the least-squares line through (ln x, ln y)."""
    fitted = np.polyfit([math.log(v) for v in x], [math.log(v) for v in y], 1)
    return float(fitted[0])
