"""How the cost of causal networks grows with the tokens of an image: training, and decoding with a cache and without.

All have about the same weights, which are untrained: what is drawn makes no difference to how long it takes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from imagewright.bench.decoding import slope
from imagewright.models.causal import CausalTokenModel
from imagewright.models.tokens import PixelCodec
from imagewright.networks import (
    AxialTransformer,
    AxialTransformerConfig,
    PerceiverAR,
    PerceiverARConfig,
    RoutingTransformer,
    RoutingTransformerConfig,
    SparseTransformer,
    SparseTransformerConfig,
)
from imagewright.noise import ImageNoise
from imagewright.samplers import Raster

LATENTS = 128
"""Of Perceiver AR, however many tokens there are."""
PASSES = 8
"""Of the network without a cache, from which decoding without one is reckoned: it takes one for every token."""
REPEATS = 3


@dataclass(frozen=True, kw_only=True)
class Growth:
    """Of one network at one number of tokens, one image at a time.

    operations: of a training step's forward pass. kept: bytes that it keeps for backward, or on a GPU the most that was
    taken beyond the weights. step: seconds of forward and backward. cached, uncached: of drawing an image.
    """

    network: str
    tokens: int
    parameters: int
    operations: float
    kept: float
    step: float
    cached: float
    uncached: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def makers(tokens: int, width: int) -> Mapping[str, Callable[[], nn.Module]]:
    """The networks for grey images of so many tokens: four blocks, strides and clusters by the root.

    tokens: a power of 4.
    """
    root = math.isqrt(tokens)
    sizes: dict[str, Any] = {"values": 256, "length": tokens, "width": width, "depth": 4, "heads": 4}
    axial = {**sizes, "depth": 2, "mlp_ratio": 4.0, "encoder_depth": 0}
    latents, less = min(LATENTS, tokens), {**sizes, "depth": 3}
    routing: dict[str, Any] = {"routing_heads": 2, "clusters": root, "block": root}
    return {
        "dense": lambda: SparseTransformer(SparseTransformerConfig(**sizes, layers=("dense",))),
        "sparse": lambda: SparseTransformer(SparseTransformerConfig(**sizes, layers=("strided", "local"))),
        "routing": lambda: RoutingTransformer(RoutingTransformerConfig(**sizes, **routing)),
        "axial": lambda: AxialTransformer(AxialTransformerConfig(**axial)),
        "perceiver": lambda: PerceiverAR(PerceiverARConfig(**less, latents=latents)),
    }


def measure_growth(
    device: torch.device, tokens: Sequence[int], width: int = 64, on_start: Callable[[str], None] = lambda what: None
) -> list[Growth]:
    """Every network at every number of tokens (powers of 4)."""
    found = []
    for count in tokens:
        for name, make in makers(count, width).items():
            on_start(f"{name}, {count} tokens")
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                network = make().to(device)
            x = torch.randint(256, (1, count), device=device)
            step, kept = _training(network.train(), x, device)
            cached, uncached = _decoding(network.eval(), x, device)
            found.append(
                Growth(
                    network=name, tokens=count, parameters=sum(p.numel() for p in network.parameters()),
                    operations=_operations(network.train(), x), kept=kept, step=step, cached=cached, uncached=uncached,
                )
            )  # fmt: skip
    return found


def exponents(found: Sequence[Growth]) -> dict[str, dict[str, float]]:
    """Of each network, how each of its costs grows with the tokens: the slope of the line through the logarithms."""
    fitted: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(each.network for each in found):
        rows = [each for each in found if each.network == name]
        costs = ("operations", "kept", "step", "cached", "uncached")
        fitted[name] = {c: slope([r.tokens for r in rows], [getattr(r, c) for r in rows]) for c in costs}
    return fitted


def _training(network: nn.Module, x: Tensor, device: torch.device) -> tuple[float, float]:
    """Seconds of forward and backward (the least of some), and bytes."""
    ask = getattr(network, "training_pass", network)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        memory = tensor.untyped_storage()
        kept[memory.data_ptr()] = memory.nbytes()
        return tensor

    def step() -> None:
        torch.autograd.backward(ask(x).float().logsumexp(-1).mean())
        network.zero_grad(set_to_none=True)

    step()
    before = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    seconds = min(_timed(step, device) for _ in range(REPEATS))
    if device.type == "cuda":
        return seconds, torch.cuda.max_memory_allocated(device) - before
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        answer = ask(x)  # held, so that no memory is used twice
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    del answer
    return seconds, sum(size for pointer, size in kept.items() if pointer not in own)


def _decoding(network: nn.Module, x: Tensor, device: torch.device) -> tuple[float, float]:
    """Seconds of one image with the cache, and without, as many passes as tokens."""
    model: Any = CausalTokenModel(network, PixelCodec(math.isqrt(x.shape[1]), 1)).eval()
    latents = torch.zeros(1, 1, device=device)

    def draw() -> None:
        Raster()(model, latents, noise=ImageNoise(0, [0]))

    def passes() -> None:
        with torch.no_grad():
            for _ in range(PASSES):
                model.logits(x)

    passes()
    return _timed(draw, device), _timed(passes, device) / PASSES * x.shape[1]


def _operations(network: nn.Module, x: Tensor) -> float:
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        getattr(network, "training_pass", network)(x)
    return float(counter.get_total_flops())


def _timed(action: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun
