"""SlimFlow: small one-step flows gain from annealing the pairs' noise and from their own two steps (2407.12718)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from imagewright.bench.claims.claim import Budget, Check, Claim, Row, how_many_times
from imagewright.bench.claims.plane import PointNetwork
from imagewright.bench.claims.plane_training import PointRun, distil, mixture_points
from imagewright.bench.claims.rings import distance_to, ring
from imagewright.methods.distances import Distance
from imagewright.methods.slimflow import LAST, AnnealingReflow, FlowGuidedDistillation
from imagewright.models.flow import VelocityFlow, flow_of
from imagewright.noise import StepNoise
from imagewright.oracles import GaussianMixture
from imagewright.paths.schedules import karras_sigmas
from imagewright.samplers import Heun, Straight
from imagewright.training.config import EmaConfig
from imagewright.types import Coupling, Frozen, Parts, Trained

BATCH = 256
TEACHER = Heun(levels=tuple(karras_sigmas(30, 0.002, 80.0).tolist()))
"""How the exact denoiser draws its pairs."""
ONE = Straight(times=(LAST,), order=1)
ANNEALED, PLAIN = AnnealingReflow(), AnnealingReflow(anneal_images=0)
GUIDED = FlowGuidedDistillation(distance=Distance(kind="l2"))
ALONE = FlowGuidedDistillation(distance=Distance(kind="l2"), guidance=0.0)
PASSES = {GUIDED: 7, ALONE: 3}
"""Of an update of distillation: a call is 1, a gradient through it 2 more."""
LR = {ANNEALED: 1.6e-2, PLAIN: 1.6e-2, GUIDED: 1.6e-2, ALONE: 4e-3}
"""The best of 4e-3, 1.6e-2 and 4e-2 (reflow), and of 1e-3, 4e-3 and 1.6e-2 (distillation), each on a tuning seed."""


@dataclass(frozen=True, kw_only=True)
class Slim:
    """One seed: eight modes on a circle, few pairs of their exact denoiser, one small network for all.

    pairs: to learn from. count: held-out noises. updates: of reflow. passes: over a batch, of distillation.
    """

    seed: int
    pairs: int
    count: int
    updates: int
    passes: int

    @cached_property
    def oracle(self) -> GaussianMixture:
        return ring(self.seed)

    @cached_property
    def learnt(self) -> Coupling:
        """The pairs to learn from."""
        return self._drawn(1000, self.pairs)

    @cached_property
    def held_out(self) -> Coupling:
        """The pairs to judge by."""
        return self._drawn(2000, self.count)

    def _drawn(self, stream: int, count: int) -> Coupling:
        noise = StepNoise(self.seed + stream, 1).normal(torch.empty(count, 2, 1, 1, dtype=torch.float64))
        return Coupling(noise, TEACHER(self.oracle, noise))

    def reflow(self, method: AnnealingReflow, lr: float) -> Any:
        """A flow from fresh weights, which are the same for both methods."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            network = PointNetwork(64, 3)
        flow = VelocityFlow(network, time_scale=1.0)  # whose sines are made for labels of order 1
        return self._trained(method, Parts(flow=Trained(module=flow)), self.updates, lr)

    def distilled(self, flow: Any, method: FlowGuidedDistillation, lr: float) -> Any:
        """A student of a flow, from its weights."""
        parts = Parts(student=Trained(module=flow_of(flow)), teacher=Frozen(module=flow))
        return self._trained(method, parts, self.passes // PASSES[method], lr)

    def _trained(self, method: Any, parts: Parts, updates: int, lr: float) -> Any:
        run = PointRun(
            iterations=updates, batch=BATCH, lr=lr, seed=self.seed, ema=EmaConfig(halflife_images=20 * BATCH)
        )
        return distil(method, parts, mixture_points(self.oracle), run, self.learnt)

    def row(self, name: str, flow: Any) -> Row:
        """How far one step from held-out noise ends from the teacher's point, and from pairs that it learnt."""
        made = self._made(flow, self.held_out)
        more = {
            "on its own pairs": self._error(self._made(flow, self.learnt), self.learnt),
            "energy distance x 1000": distance_to(self.oracle, made.flatten(1).numpy()),
        }
        return Row(name=name, score=self._error(made, self.held_out), cost=1, more=more)

    def _made(self, flow: Any, pairs: Coupling) -> Tensor:
        points: Tensor = ONE(flow, pairs.latents)
        return points.double()

    def _error(self, made: Tensor, pairs: Coupling) -> float:
        return 1000 * float((made - pairs.images).square().flatten(1).sum(1).mean())


def contest(seed: int, budget: Budget) -> Slim:
    """The work of a seed."""
    if budget == "smoke":
        return Slim(seed=seed, pairs=50, count=50, updates=4, passes=21)
    return Slim(seed=seed, pairs=200, count=4000, updates=2000, passes=5600)


def run(seed: int, budget: Budget) -> Sequence[Row]:
    """One-step errors of both stages, with each ingredient and without."""
    slim = contest(seed, budget)
    annealed, plain = (slim.reflow(method, LR[method]) for method in (ANNEALED, PLAIN))
    return [
        slim.row("reflow", plain),
        slim.row("annealing reflow", annealed),
        slim.row("annealing reflow, distilled", slim.distilled(annealed, ALONE, LR[ALONE])),
        slim.row("annealing reflow, flow-guided", slim.distilled(annealed, GUIDED, LR[GUIDED])),
        slim.row("reflow, distilled", slim.distilled(plain, ALONE, LR[ALONE])),
    ]


CLAIM = Claim(
    key="slimflow",
    paper="2407.12718",
    headline="CIFAR-10 FID at one step 5.02 with 15.7 M parameters; the best small model before 6.47 with 19.4 M",
    miniature="8 modes in the plane, 200 pairs of their exact denoiser, one small network from the same fresh "
    "weights, batches of 256. 2,000 updates of reflow with the pairs' noise annealed over the first 23%, "
    "or with the pairs as they are; then distillation to one step with and without the flow's own two "
    "steps from fresh noise, at 5,600 passes of the network each. Each arm's rate was searched alike on a "
    "tuning seed. Judged on 4,000 held-out noises by the squared distance of one step's point to the "
    "teacher's own.",
    measure="1000 E|x - teacher's x|^2",
    cost="NFE per sample",
    run=run,
    checks=(
        Check(
            says="after reflow, annealing is below pairs as they are",
            effect=how_many_times("annealing reflow", "reflow"),
            scale="ratio",
        ),
        Check(
            says="flow-guided distillation is below distillation alone, at equal passes",
            effect=how_many_times("annealing reflow, flow-guided", "annealing reflow, distilled"),
            scale="ratio",
        ),
        Check(
            says="both together are below reflow and distillation as before",
            effect=how_many_times("annealing reflow, flow-guided", "reflow, distilled"),
            scale="ratio",
        ),
    ),
)
