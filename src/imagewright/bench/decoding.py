"""Speed of decoding tokens: what a causal transformer's cache saves, and what few masked passes save beside it.

All networks have the same size and untrained weights: what is drawn makes no difference to how long it takes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

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

SIDE = 16
"""Tokens a side, 256 in all, as MaskGIT has them."""
SIDES = (6, 8, 12, 16)
"""Of the images over which growth is fitted: 36 to 256 tokens."""
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


def _ratio(
    what: str, peer: str, measured: tuple[float, float, tuple[float, float, float]], details: Mapping[str, float]
) -> Ratio:
    ours, theirs, ratios = measured
    return Ratio(what, ours, peer, theirs, *ratios, details=details)


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
        found.append(min(seconds(lambda g=generator: g.generate(1), device) for _ in range(2)))  # type: ignore[misc]
    return slope([side**2 for side in SIDES], found)


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the least-squares line through (ln x, ln y)."""
    fitted = np.polyfit([math.log(v) for v in x], [math.log(v) for v in y], 1)
    return float(fitted[0])
