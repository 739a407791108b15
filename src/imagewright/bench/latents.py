"""What discrete latents cost: a call of a denoiser that is told them, against the same network alone."""

from __future__ import annotations

import torch

from imagewright.bench.speed import BATCH, SPEC, Ratio, alternate, network, seconds
from imagewright.methods.disco_diff import DiscoDiff, LatentPrior, Transformer
from imagewright.models.preconditioning import EDMPrecond
from imagewright.networks import TokenTransformer, TokenTransformerConfig
from imagewright.noise import ImageNoise
from imagewright.samplers.latents_first import latents_first
from imagewright.types import UNCONDITIONAL

PRIOR = TokenTransformerConfig(
    values=100, length=10, channels=10, width=512, depth=12, heads=8, causal=True, post_norm=False
)
"""The paper's."""


def measure_latents(device: torch.device, rounds: int) -> Ratio:
    """A call of DisCo-Diff's denoiser, with ten latents of 100 values, against a call of its network alone.

    details: what the latents of an image cost once, prior and transformer, in calls of the network.
    """
    plain = EDMPrecond(network(0)).eval().to(device)
    small = Transformer(width=64, depth=1, heads=1)  # which is not asked
    first = DiscoDiff(patch=4, encoder=small).parts(network=network(0), spec=SPEC).denoiser
    told = LatentPrior().parts(network=TokenTransformer(PRIOR), teacher=first, spec=SPEC).model.eval().to(device)
    noise = ImageNoise(0, range(BATCH))
    x, sigma = torch.randn(BATCH, *SPEC.shape, device=device), torch.full((BATCH,), 2.0, device=device)
    cond = latents_first(told, BATCH, UNCONDITIONAL, noise)

    @torch.no_grad()
    def ours() -> None:
        told(x, sigma, cond)

    @torch.no_grad()
    def theirs() -> None:
        plain(x, sigma)

    mine, other, ratios = alternate(ours, theirs, device, rounds)
    once = seconds(lambda: latents_first(told, BATCH, UNCONDITIONAL, noise), device)
    details = {"a call takes, of the network's": 1 / ratios[0], "latents once, in calls": once * other / BATCH}
    return Ratio("a call that is told latents", mine, "the network alone", other, *ratios, details=details)
