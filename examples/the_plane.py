"""The plane: everything that happens to images, on points one can see. About half a minute on one core.

    python examples/the_plane.py [--short] [--out FOLDER]

1. A mixture whose denoiser is known exactly, drawn by several samplers: error against calls.
2. A denoiser learns five spots from points alone.
3. A consistency model learns the denoiser's answers in one call.
4. A picture of all of them, plane.png, and their distance from the truth.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from imagewright.bench.claims.plane import PointTraining, distance, point_denoiser, real_points, sampled, train
from imagewright.bench.claims.plane_training import PointRun, distil
from imagewright.bench.orders import measure_orders
from imagewright.methods.consistency import ConsistencyDistillation
from imagewright.methods.distances import Distance
from imagewright.noise import StepNoise
from imagewright.oracles import GaussianMixture
from imagewright.samplers import Heun, MultistepConsistency
from imagewright.types import UNCONDITIONAL, Condition, DataSpec

SPEC = DataSpec(name="plane", resolution=1, channels=2)


def spots() -> GaussianMixture:
    """Five spots of width 0.1 on the unit circle."""
    angles = torch.arange(5, dtype=torch.float64) * torch.pi * 2 / 5
    return GaussianMixture(torch.stack([angles.cos(), angles.sin()], 1).reshape(5, 2, 1, 1), 0.1)


def main() -> None:
    """Draw, train, distil, draw again."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--short", action="store_true", help="a few steps of everything, in seconds")
    options.add_argument("--out", type=Path, default=Path("runs/plane"))
    given = options.parse_args()
    updates, count = (20, 200) if given.short else (2000, 4000)
    oracle = spots()

    def draw(n: int, noise: StepNoise) -> tuple[Tensor, Condition]:
        return oracle.sample(n, noise).float(), UNCONDITIONAL

    print("1. The exact denoiser: root mean square error of the end points, by calls")
    calls = (8, 16) if given.short else (8, 16, 32, 64)
    points = measure_orders(count=32 if given.short else 256, calls=calls)
    for name in dict.fromkeys(point.sampler for point in points):
        mine = [f"{p.calls}: {p.error:.2g}" for p in points if p.sampler == name]
        print(f"   {name:<26} {', '.join(mine)}")

    print(f"2. A denoiser, {updates} updates of 512 points")
    denoiser = train(point_denoiser(96, 4, seed=0), draw, PointTraining(iterations=updates))

    print(f"3. Its student of one call, {updates} updates of 512 points")
    method = ConsistencyDistillation(distance=Distance(kind="l2"))
    student = distil(method, method.parts(teacher=denoiser, spec=SPEC), draw, PointRun(iterations=updates))

    print("4. Energy distance from the truth, in thousandths")
    truth = real_points(oracle, 1, count)
    drawn = {
        "the truth": real_points(oracle, 2, count),
        "denoiser, 35 calls": sampled(denoiser, Heun(num_steps=18), 3, count),
        "denoiser, 1 call": sampled(denoiser, Heun(num_steps=1), 3, count),
        "student, 1 call": sampled(student, MultistepConsistency(clip=False), 3, count),
    }
    given.out.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(11, 3), layout="constrained", dpi=110)
    for axes, (name, found) in zip(figure.subplots(1, len(drawn)), drawn.items(), strict=True):
        far = distance(found, truth)
        print(f"   {name:<20} {far:9.2f}")
        axes.scatter(*found.T, s=2, alpha=0.4)
        axes.set_title(f"{name}: {far:.1f}", fontsize=9)
        axes.set(xlim=(-1.6, 1.6), ylim=(-1.6, 1.6), aspect="equal")
    figure.savefig(given.out / "plane.png")
    print(f"picture: {given.out / 'plane.png'}")


if __name__ == "__main__":
    main()
