"""How fast samplers converge: error of the end point against network calls, on a mixture whose flow is exact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure

from imagewright.bench.claims.ledger import COLOURS, MARKERS
from imagewright.files import replacing
from imagewright.oracles import GaussianMixture, IntegratedFlowMap
from imagewright.samplers import DDIM, DPMSolverPlusPlus, Euler, Heun, UniPC
from imagewright.types import CountedSampler

CALLS = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
FAMILIES: dict[str, Callable[[int], CountedSampler]] = {
    "Euler, karras": lambda calls: Euler(num_steps=calls),
    "DDIM, cosine": lambda calls: DDIM(num_steps=calls),
    "Heun, karras": lambda calls: Heun(num_steps=(calls + 1) // 2),
    "DPM-Solver++ (2M), log": lambda calls: DPMSolverPlusPlus(num_steps=calls),
    "UniPC, order 2, log": lambda calls: UniPC(num_steps=calls),
    "UniPC, order 3, log": lambda calls: UniPC(num_steps=calls, order=3),
}


@dataclass(frozen=True)
class Point:
    """Root-mean-square error of the end points of one sampler at a number of network calls."""

    sampler: str
    calls: int
    error: float


def measure_orders(count: int = 256, calls: Sequence[int] = CALLS) -> list[Point]:
    """All families on one mixture in the plane (8 modes of width 0.15), from the same noise."""
    angles = torch.arange(8, dtype=torch.float64) * torch.pi / 4
    oracle = GaussianMixture(torch.stack([angles.cos(), angles.sin()], 1), 0.15)
    latents = torch.randn(count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    at = torch.ones(count, dtype=torch.float64)
    exact = IntegratedFlowMap(oracle)(80 * latents, 80 * at, 0 * at)
    points = []
    for name, make in FAMILIES.items():
        for n in calls:
            sampler = make(n)
            error = (sampler(oracle, latents) - exact).square().sum(1).mean().sqrt()
            points.append(Point(name, sampler.nfe, float(error)))
    return points


def draw_orders(points: Sequence[Point], path: Path) -> None:
    """Both axes logarithmic: a method of order p falls p decades per decade of calls."""
    figure = Figure(figsize=(7.2, 4.2), layout="constrained", dpi=120)
    axes = figure.subplots()
    for i, name in enumerate(dict.fromkeys(p.sampler for p in points)):
        mine = [p for p in points if p.sampler == name]
        axes.loglog(
            [p.calls for p in mine],
            [p.error for p in mine],
            label=name,
            color=COLOURS[i % len(COLOURS)],
            marker=MARKERS[i % len(MARKERS)],
            lw=1.6,
            ms=4,
        )
    axes.set_xlabel("network calls per sample")
    axes.set_ylabel("RMS error of the end point")
    axes.grid(alpha=0.2, which="both")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    with replacing(path) as aside:
        figure.savefig(aside, format="png")
