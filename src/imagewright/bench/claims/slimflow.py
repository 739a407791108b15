"""SlimFlow: small one-step flows gain from annealing the pairs' noise and from their own two steps (2407.12718)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from imagewright.bench.claims.claim import Budget, Claim, Row, times
from imagewright.bench.claims.plane import PointNetwork, seeded
from imagewright.bench.claims.reflow import ENERGY, Reflow
from imagewright.methods.distances import Distance
from imagewright.methods.slimflow import LAST, AnnealingReflow, FlowGuidedDistillation
from imagewright.models.flow import VelocityFlow, flow_of
from imagewright.samplers import Straight
from imagewright.types import Frozen, Parts, Trained

ONE = Straight(times=(LAST,), order=1)
ANNEALED, PLAIN = AnnealingReflow(), AnnealingReflow(anneal_images=0)
GUIDED = FlowGuidedDistillation(distance=Distance(kind="l2"))
ALONE = FlowGuidedDistillation(distance=Distance(kind="l2"), guidance=0.0)
PASSES = {GUIDED: 7, ALONE: 3}
"""Of an update of distillation: a call is 1, a gradient through it 2 more."""
LR = {ANNEALED: 1.6e-2, PLAIN: 1.6e-2, GUIDED: 1.6e-2, ALONE: 4e-3}
"""The best of 4e-3, 1.6e-2 and 4e-2 (reflow), and of 1e-3, 4e-3 and 1.6e-2 (distillation), each on a tuning seed."""


def run(seed: int, budget: Budget) -> Sequence[Row]:
    """One-step errors of both stages, with each ingredient and without."""
    pairs, count, updates, passes = (200, 4000, 2000, 5600) if budget == "full" else (50, 50, 4, 21)
    contest = Reflow(seed=seed, pairs=pairs, count=count)

    def reflow(method: AnnealingReflow) -> Any:
        """A flow from fresh weights, which are the same for both methods."""
        network = seeded(seed, lambda: PointNetwork(64, 3))
        flow = VelocityFlow(network, time_scale=1.0)  # whose sines are made for labels of order 1
        return contest.trained(method, Parts(flow=Trained(module=flow)), updates, LR[method])

    def distilled(flow: Any, method: FlowGuidedDistillation) -> Any:
        """A student of a flow, from its weights."""
        parts = Parts(student=Trained(module=flow_of(flow)), teacher=Frozen(module=flow))
        return contest.trained(method, parts, passes // PASSES[method], LR[method])

    def row(name: str, flow: Any) -> Row:
        """How far one step ends from the teacher's point, from held-out noise and from pairs that it learnt."""
        more = {"on its own pairs": contest.error(flow, ONE, contest.learnt), ENERGY: contest.distance(flow, ONE)}
        return Row(name=name, score=contest.error(flow, ONE), cost=1, more=more)

    annealed, plain = reflow(ANNEALED), reflow(PLAIN)
    return [
        row("reflow", plain),
        row("annealing reflow", annealed),
        row("annealing reflow, distilled", distilled(annealed, ALONE)),
        row("annealing reflow, flow-guided", distilled(annealed, GUIDED)),
        row("reflow, distilled", distilled(plain, ALONE)),
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
        times("after reflow, annealing is below pairs as they are", "annealing reflow", "reflow"),
        times(
            "flow-guided distillation is below distillation alone, at equal passes",
            "annealing reflow, flow-guided",
            "annealing reflow, distilled",
        ),
        times(
            "both together are below reflow and distillation as before",
            "annealing reflow, flow-guided",
            "reflow, distilled",
        ),
    ),
)
