"""Speed of what reflow needs, as ratios within one process: pairs drawn and stored, and a call of a small student."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path

import torch

from imagewright.bench.speed import BATCH, Ratio, alternate, network
from imagewright.data.couplings import Manifest
from imagewright.models.flow import VelocityFlow
from imagewright.models.preconditioning import EDMPrecond, Preconditioned
from imagewright.networks import SongUNet
from imagewright.recipes import RECIPES
from imagewright.samplers import Heun
from imagewright.samplers.generator import ImageGenerator
from imagewright.training.couple import Drawing, fill
from imagewright.types import Condition, DataSpec

SPEC = DataSpec(name="speed", resolution=32, channels=3, num_classes=10)
SHARDS = 2
STEPS = 3
"""Of Heun: five calls, where 35 are usual, so that what stands beside the calls counts seven times as much."""


def measure_pairs(device: torch.device, rounds: int) -> Ratio:
    """Pairs drawn into a store, noise, classes, checksum and files included, against the bare sampler."""
    model, sampler = EDMPrecond(network(10)).eval().to(device), Heun(num_steps=STEPS)
    generator = ImageGenerator(model, SPEC, sampler, device)
    drawing = Drawing.of(generator, "speed", "none")
    manifest = Manifest(
        n=SHARDS * BATCH, seed=0, shard=BATCH, batch=BATCH, dtype="float16", spec=SPEC, origin=drawing.origin
    )
    latents = torch.randn(BATCH, *SPEC.shape, device=device)
    cond = Condition(label=torch.arange(BATCH, device=device) % 10)

    def bare() -> None:
        for _ in range(SHARDS):
            sampler(model, latents, cond)

    with tempfile.TemporaryDirectory() as folder:
        stores = (Path(folder) / str(i) for i in count())
        ours, theirs, ratios = alternate(
            lambda: fill(next(stores), manifest, drawing), bare, device, rounds, batch=SHARDS * BATCH
        )
    return Ratio("pairs, drawn and stored", ours, "the bare sampler", theirs, *ratios, {"network calls": sampler.nfe})


def measure_student(device: torch.device, rounds: int) -> Ratio:
    """A call of the emoji student of SlimFlow, a quarter of the parameters, against a call of its teacher's network."""
    student, teacher = (_network_of(name) for name in ("slimflow-emoji64-32", "edm-emoji64-32"))
    ours, theirs, ratios = alternate(
        _asked(VelocityFlow(student), device), _asked(EDMPrecond(teacher), device), device, rounds
    )
    sizes = [sum(p.numel() for p in each.parameters()) for each in (student, teacher)]
    return Ratio("a SlimFlow student's call", ours, "its teacher's", theirs, *ratios, {"size": sizes[0] / sizes[1]})


def _network_of(recipe: str) -> SongUNet:
    sizes = {"img_resolution": SPEC.resolution, "in_channels": 3, "out_channels": 3, "label_dim": SPEC.num_classes}
    return SongUNet(replace(RECIPES[recipe]().network, **sizes))


def _asked(model: Preconditioned, device: torch.device) -> Callable[[], None]:
    model.eval().to(device)
    x, sigma = torch.randn(BATCH, *SPEC.shape, device=device), torch.full((BATCH,), 80.0, device=device)
    cond = Condition(label=torch.arange(BATCH, device=device) % 10)

    @torch.no_grad()
    def ask() -> None:
        model(80 * x, sigma, cond)

    return ask
