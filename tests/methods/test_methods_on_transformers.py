"""Every kind of method learns on a transformer as on a U-Net: one update of each."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn

from imagewright.data.augment import Augment
from imagewright.methods.align_your_flow import AlignYourFlow
from imagewright.methods.consistency import ConsistencyDistillation
from imagewright.methods.consistency_trajectory import Adversarial, ConsistencyTrajectory
from imagewright.methods.continuous_consistency import ContinuousConsistencyDistillation, ContinuousConsistencyTraining
from imagewright.methods.distances import Distance
from imagewright.methods.dmd2 import DMD2
from imagewright.methods.dsno import OperatorDistillation
from imagewright.methods.easy_consistency import EasyConsistencyTuning
from imagewright.methods.edm import EDM
from imagewright.methods.f_distill import FDistill
from imagewright.methods.flow_matching import FlowMatching
from imagewright.methods.guided_distillation import GuidedDistillation
from imagewright.methods.improved_consistency import ImprovedConsistencyTraining
from imagewright.methods.multistep_consistency import MultistepConsistencyDistillation
from imagewright.methods.progressive_distillation import ProgressiveDistillation
from imagewright.methods.rectified_flow_pp import RectifiedFlowPlusPlus
from imagewright.methods.score_of_mixture import ScoreOfMixtureDistillation
from imagewright.methods.time_alignment import TimeAlignment
from imagewright.methods.uni_instruct import UniInstruct
from imagewright.methods.vct import VariationalConsistencyTraining
from imagewright.models.flow import VelocityFlow
from imagewright.models.preconditioning import EDMPrecond
from imagewright.networks import DiT, DiTConfig
from imagewright.noise import StepNoise
from imagewright.paths.noise_levels import LogitNormal
from imagewright.types import Batch, Clock, Condition, Coupling, DataSpec, Trained, Update, UserError

SPEC = DataSpec(name="x", resolution=8, channels=3, num_classes=3)
METHODS: dict[str, Any] = {
    "edm": EDM(),
    "edm, augmented": EDM(augment=Augment(p=1.0)),
    "flow": FlowMatching(times=LogitNormal(), direction=1.0, time_scale=1.0),
    "flow, edm": FlowMatching(preconditioning="edm", direction=1.0),
    "ict": ImprovedConsistencyTraining(),
    "ecm": EasyConsistencyTuning(),
    "sct": ContinuousConsistencyTraining(),
    "cd": ConsistencyDistillation(distance=Distance()),
    "scd": ContinuousConsistencyDistillation(),
    "ctm": ConsistencyTrajectory(distance=Distance(), adversarial=Adversarial(start=0.0, width=8)),
    "ayf": AlignYourFlow(),
    "mcd": MultistepConsistencyDistillation(),
    "pd": ProgressiveDistillation(),
    "guided": GuidedDistillation(),
    "align": TimeAlignment(),
    "rfpp": RectifiedFlowPlusPlus(image=Distance()),
    "smd": ScoreOfMixtureDistillation(),
    "dmd2": DMD2(),
    "f": FDistill(every=2),
    "uni": UniInstruct(),
}
REFUSED = {
    "vct": (VariationalConsistencyTraining(), "U-Net"),
    "dsno": (OperatorDistillation(), "U-Net"),
}


def network(**settings: Any) -> DiT:
    torch.manual_seed(0)
    sizes = {"img_resolution": 8, "in_channels": 3, "out_channels": 3, "label_dim": 3, "patch": 4}
    made = DiT(DiTConfig(**sizes, width=16, depth=2, heads=2, **settings))
    for p in made.parameters():
        nn.init.normal_(p, std=0.2)
    return made


def parts_of(method: Any) -> Any:
    wanted, more = inspect.signature(method.parts).parameters, {"augment_dim": getattr(method, "augment_dim", 0)}
    known = {
        "spec": SPEC,
        "network": network(**more),
        "teacher": EDMPrecond(network()).eval().requires_grad_(False),
        "couplings": True,
    }
    if "network" in wanted:
        known.pop("teacher")
        known["couplings"] = False
    return method.parts(**{name: value for name, value in known.items() if name in wanted})


def batch() -> Batch:
    noise = StepNoise(3)
    images, cond = noise.normal(torch.empty(4, 3, 8, 8)), Condition(label=torch.tensor([0, 1, 2, 0]))
    return Batch(images, cond, Coupling(noise.normal(images), images, cond))


@pytest.mark.parametrize("name", METHODS)
def test_one_update(name: str) -> None:
    method, parts, learnt = METHODS[name], parts_of(METHODS[name]), set()
    step = 9 if name == "f" else 10  # at others its generator rests
    for event in method.step(parts, batch(), StepNoise(0, 1), Clock(step, 40, 100)):
        if isinstance(event, Update):
            module = getattr(parts, event.part)
            learns = [p for p in module.parameters() if p.requires_grad]
            gradients = torch.autograd.grad(event.loss.mean(), learns, allow_unused=True)
            assert all(bool(g.isfinite().all()) for g in gradients if g is not None)
            learnt |= {event.part} if any(g is not None and bool(g.any()) for g in gradients) else set()
    assert method.product in learnt
    assert learnt <= {n for n, role in parts.roles.items() if isinstance(role, Trained)}


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_a_u_net_says_so(name: str) -> None:
    method, says = REFUSED[name]
    with pytest.raises(UserError, match=says):
        parts_of(method)


def test_a_flow_of_its_own_teaches_students() -> None:
    flow = VelocityFlow(network(), time_scale=1.0, from_noise=True).eval().requires_grad_(False)
    method = ContinuousConsistencyDistillation()
    parts = method.parts(teacher=flow, spec=SPEC)
    events = list(method.step(parts, batch(), StepNoise(0, 1), Clock(10, 40, 100)))
    assert all(bool(e.loss.isfinite().all()) for e in events if isinstance(e, Update))
