"""A part's optimiser: what weight decay falls on."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import nn

from imagewright.training.config import OptimizerConfig, OptimizerKind, TrainingConfig
from imagewright.training.learners import Learner
from imagewright.types import Trained

CPU = torch.device("cpu")


def learner(kind: OptimizerKind, vectors: bool) -> Learner:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    for p in module.parameters():
        nn.init.constant_(p, 0.5)
    optimizer = OptimizerConfig(kind=kind, lr=0.1, weight_decay=0.2, decay_vectors=vectors)
    return Learner(Trained(module=module), TrainingConfig(total_images=8, batch=1, optimizer=optimizer), CPU)


def stepped(part: Learner, slope: float = 0.0) -> dict[str, torch.Tensor]:
    """Weights after a step whose every gradient is `slope`."""
    part.backward(slope * sum((p.sum() for p in part.module.parameters()), torch.zeros(())))
    part.gradient()
    part.step(1)
    return {name: p.detach().clone() for name, p in part.module.named_parameters()}


@pytest.mark.parametrize("kind", get_args(OptimizerKind))
@pytest.mark.parametrize("vectors", [True, False])
def test_decay_falls_on_all_or_on_what_has_two_dimensions(kind: OptimizerKind, vectors: bool) -> None:
    after = stepped(learner(kind, vectors))
    moved = {name for name, p in after.items() if not bool((p == 0.5).all())}
    assert moved == (set(after) if vectors else {"0.weight", "2.weight"})


def test_moments_find_their_weights_again() -> None:
    """Saved by name, whatever the groups' order is."""
    whole, first = learner("adamw", False), learner("adamw", False)
    again = learner("adamw", False)
    for part in (whole, first):
        stepped(part, 1.0)
        for p in part.module.parameters():
            part.optimizer.state[p]["exp_avg"].mul_(p.ndim)
    again.load_state(first.state())
    assert whole.names != list(dict(whole.module.named_parameters()))
    wanted, found = stepped(whole, 1.0), stepped(again, 1.0)
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
