"""Draw docs/images/flow-trajectories.png: a flow in the plane before reflow and after it. About two minutes.

python examples/flow_trajectories.py docs/images/flow-trajectories.png
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from imagewright.bench.claims.reflow import Reflow
from imagewright.methods.rectified_flow_pp import RectifiedFlowPlusPlus
from imagewright.samplers import Straight
from imagewright.samplers.straight import straightness

SHOWN = 48
CALLS = (1, 2, 4, 8, 16, 32)


def trajectory(flow: Any, latents: Tensor) -> Tensor:
    """Points of the straight path's time, [steps + 1, N, 2]."""
    points = [latents]
    Straight(num_steps=64, order=1)(flow, latents, on_step=lambda x, _, sigma: points.append(x / (1 + sigma)))
    return torch.stack(points).flatten(2)


def main(path: Path) -> None:
    """Train, draw, and print what the page says in figures."""
    contest = Reflow(seed=21, pairs=20_000, count=4000, first=1500)
    latents = contest.held_out.latents[:SHOWN]
    again = RectifiedFlowPlusPlus(image=None)
    flows = {
        "before: the teacher's flow (exact)": contest.oracle,
        "after reflow (2-rectified flow++)": contest.flow(again, 3000, 1.6e-2),
    }
    figure = Figure(figsize=(10.5, 3.7), layout="constrained", dpi=120)
    *planes, chart = figure.subplots(1, 3)
    for axes, (name, flow) in zip(planes, flows.items(), strict=True):
        paths = trajectory(flow, latents)
        axes.plot(paths[:, :, 0], paths[:, :, 1], color="#888888", linewidth=0.7)
        axes.scatter(*paths[0].T, s=7, color="#1f77b4", label="noise")
        axes.scatter(*paths[-1].T, s=7, color="#d62728", label="point")
        bent = float(straightness(flow, contest.held_out.latents[:1000]).mean())
        axes.set_title(f"{name}\nstraightness {bent:.3f}", fontsize=9)
        axes.set_aspect("equal")
        axes.legend(fontsize=7, loc="upper right")
        errors = [contest.error(flow, Straight(num_steps=n, order=1)) / 1000 for n in CALLS]
        chart.loglog(CALLS, errors, marker="o", markersize=4, label=name.split(":")[0].split(" (")[0])
        print(name, f"straightness {bent:.4f}", [f"{n} calls {e:.4f}" for n, e in zip(CALLS, errors, strict=True)])
    chart.set_xlabel("calls (Euler)")
    chart.set_ylabel("E|x - end of the teacher's flow|$^2$")
    chart.set_title("how far the end is from the teacher's", fontsize=9)
    chart.legend(fontsize=8)
    figure.savefig(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
