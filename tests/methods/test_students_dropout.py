"""Students are given their dropout in one place: none, whatever the teacher's, unless the method is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from imagewright.methods.consistency import ConsistencyDistillation
from imagewright.methods.consistency_limits import ContinuousTimeDistillation
from imagewright.methods.consistency_trajectory import ConsistencyTrajectory
from imagewright.methods.continuous_consistency import ContinuousConsistencyDistillation
from imagewright.methods.dmd import DMD
from imagewright.methods.dmd2 import DMD2
from imagewright.methods.f_distill import FDistill
from imagewright.methods.multistep_consistency import MultistepConsistencyDistillation
from imagewright.methods.progressive_distillation import ProgressiveDistillation
from imagewright.methods.uni_instruct import UniInstruct
from imagewright.models.preconditioning import EDMPrecond, student_network
from imagewright.networks import DhariwalUNet, DhariwalUNetConfig, SongUNet, SongUNetConfig
from imagewright.types import Condition, DataSpec, UserError

SPEC = DataSpec(name="toy", resolution=8, channels=1, num_classes=3)
SIZES: dict[str, Any] = {
    "img_resolution": 8, "in_channels": 1, "out_channels": 1, "label_dim": 3, "model_channels": 16,
    "channel_mult": (1,), "num_blocks": 1, "attn_resolutions": (), "dropout": 0.5, "label_dropout": 0.3,
}  # fmt: skip
METHODS = (
    ConsistencyDistillation(),
    ContinuousTimeDistillation(),
    ContinuousConsistencyDistillation(),
    ConsistencyTrajectory(),
    MultistepConsistencyDistillation(),
    ProgressiveDistillation(),
)


NETWORKS = {
    "ddpm++": lambda: SongUNet(SongUNetConfig(**SIZES)),
    "ncsn++": lambda: SongUNet(  # whose random frequencies are no parameters
        SongUNetConfig(**SIZES, embedding_type="fourier", channel_mult_noise=2, encoder_type="residual")
    ),
    "adm": lambda: DhariwalUNet(DhariwalUNetConfig(**SIZES)),
}


def teacher(kind: str = "ddpm++") -> EDMPrecond:
    network = NETWORKS[kind]()
    for p in network.parameters():
        nn.init.normal_(p, std=0.1)  # or the last layers, and with them all answers, would be near zero
    return EDMPrecond(network).eval()


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_students_do_not_inherit_dropout(method: Any, kind: str) -> None:
    known = teacher(kind)
    parts = method.parts(teacher=known, spec=SPEC)
    student, x = parts.student, torch.randn(2, 1, 8, 8)
    assert student.training and all(p.requires_grad for p in student.parameters())
    # In training mode two calls agree, and agree with the teacher asked without dropout.
    destination = {"destination": torch.zeros(2)} if student.network.config.destination else {}
    asked = x, torch.zeros(2), Condition(label=torch.tensor([0, 2]), **destination)
    first, again, plain = (network(*asked) for network in (student.network, student.network, known.network))
    assert torch.equal(first, again)
    torch.testing.assert_close(first, plain)
    # And the teacher keeps its own.
    assert known.network.config.dropout == 0.5


@pytest.mark.parametrize(
    ("method", "dropout", "label_dropout"),
    [(DMD(regression_weight=0.0), 0, 0), (DMD2(), 0, 0), (FDistill(), 0, 0), (UniInstruct(), 0.5, 0.3)],
)
def test_generators_and_fake_scores(method: Any, dropout: float, label_dropout: float) -> None:
    """Without any in FastGen's and DMD2's networks, with the teacher's in SiD's program and Uni-Instruct's."""
    parts = method.parts(teacher=teacher(), spec=SPEC)
    for part in (parts.generator, parts.fake_score):
        assert (part.network.config.dropout, part.network.config.label_dropout) == (dropout, label_dropout)


def test_the_published_continuous_runs_set_theirs() -> None:
    student = ContinuousTimeDistillation(dropout=0.3).parts(teacher=teacher(), spec=SPEC).student
    assert student.network.config.dropout == 0.3 and student.network.config.label_dropout == 0


def test_another_network_has_none_to_set() -> None:
    known = EDMPrecond(nn.Linear(2, 2))
    assert student_network(known) is not known.network
    with pytest.raises(UserError, match=r"method\.dropout is 0\.2; the teacher's network, a Linear, has no dropout"):
        student_network(known, 0.2)
