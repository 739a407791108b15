"""Consistency and progressive distillation against the losses and gradients of both official programs.

data/consistency_losses.json says from which commits the numbers are, and how the network of three tensors is made.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imagewright.methods.consistency import ConsistencyDistillation, ConsistencyTraining
from imagewright.methods.consistency_limits import ContinuousTimeDistillation, ContinuousTimeTraining
from imagewright.methods.distances import Distance
from imagewright.methods.progressive_distillation import ProgressiveDistillation
from imagewright.models.consistency import ConsistencyModel
from imagewright.models.preconditioning import EDMPrecond
from imagewright.types import UNCONDITIONAL, Average, Batch, Clock, Condition, Frozen, Parts, Trained, Update

REFERENCE = json.loads((Path(__file__).parent / "data" / "consistency_losses.json").read_text())
DISCRETE, CONTINUOUS = REFERENCE["discrete"], REFERENCE["continuous"]
NUMBERS = 36


def generator(key: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed=zlib.crc32(key.encode())))


def normal(key: str, *shape: int) -> Tensor:
    return torch.from_numpy(np.asarray(generator(key).standard_normal(shape)))


class ThreeTensors(nn.Module):
    """last * tanh(first * x + level ln(t)), * being a convolution; the label is ln(t) / 4."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.first = nn.Parameter(0.4 * normal(f"consistency/{name}/first", 4, 1, 3, 3))
        self.level = nn.Parameter(0.2 * normal(f"consistency/{name}/level", 4))
        self.last = nn.Parameter(0.4 * normal(f"consistency/{name}/last", 1, 4, 3, 3))

    def forward(self, x: Tensor, noise_label: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        level = self.level[:, None, None] * (4 * noise_label)[:, None, None, None]
        return F.conv2d(torch.tanh(F.conv2d(x, self.first, padding=1) + level), self.last, padding=1)


class Given:
    """The draws of the official runs."""

    def __init__(self, indices: list[int] | None = None) -> None:
        self.indices = indices

    def integers(self, high: int, like: Tensor) -> Tensor:
        return torch.tensor(self.indices)

    def uniform(self, like: Tensor) -> Tensor:
        return torch.from_numpy(generator("consistency/u").random(5)).to(like)

    def normal(self, like: Tensor) -> Tensor:
        return normal("consistency/z", *like.shape).to(like)

    @contextmanager
    def same_dropout(self) -> Iterator[None]:
        yield


BATCH = Batch(0.5 * normal("consistency/x0", 5, 1, 6, 6))


def parts_of(kind: type[EDMPrecond] = ConsistencyModel) -> Parts:
    return Parts(
        student=Trained(module=kind(ThreeTensors("student"))),
        target=Average(module=kind(ThreeTensors("target")).requires_grad_(False)),
        teacher=Frozen(module=EDMPrecond(ThreeTensors("teacher")).requires_grad_(False)),
    )


def update_of(method: Any, parts: Parts, indices: list[int] | None = None) -> Update:
    event = next(method.step(parts, BATCH, Given(indices), Clock(1, 0, 100)))
    assert isinstance(event, Update)
    return event


def assert_gradient(loss: Tensor, student: EDMPrecond, want: dict[str, list[float]], rtol: float = 1e-9) -> None:
    """Of a scalar, in all weights."""
    loss.backward()
    for name, values in want.items():
        found = getattr(student.network, name).grad.flatten().numpy()
        np.testing.assert_allclose(found, values, rtol=rtol, atol=rtol * np.abs(values).max(), err_msg=name)


@pytest.mark.parametrize("case", ["cd_l2", "cd_l1", "ct_l2", "ct_l1"])
def test_neighbours_on_the_grid(case: str) -> None:
    want, distance = DISCRETE[case], Distance(kind=case[3:])  # type: ignore[arg-type]
    method: Any = ConsistencyDistillation(grid_points=want["N"], distance=distance)
    if case.startswith("ct"):
        method = ConsistencyTraining(s0=want["N"], s1=want["N"], distance=distance)
    parts = parts_of()
    update = update_of(method, parts, want["indices"])
    np.testing.assert_allclose(update.loss.detach().numpy(), want["loss"], rtol=1e-9)
    assert_gradient(update.loss.mean(), parts.student, want["gradient"])
    if case in CONTINUOUS:  # the other program's mean
        assert float(update.loss.detach().mean()) == pytest.approx(CONTINUOUS[case]["loss"], rel=1e-9)


@pytest.mark.parametrize("case", ["pd", "pd_1"])
def test_two_steps_of_the_teacher_in_one(case: str) -> None:
    want = DISCRETE[case]
    parts, steps = parts_of(EDMPrecond), want["N"]
    update = update_of(ProgressiveDistillation(start_steps=steps, end_steps=steps), parts, want["indices"])
    np.testing.assert_allclose(update.loss.detach().numpy(), want["loss"], rtol=1e-9)
    assert_gradient(update.loss.mean(), parts.student, want["gradient"])


@pytest.mark.parametrize("case", ["norm", "l1", "l2_stop_gradient", "training"])
def test_the_limits_in_continuous_time(case: str) -> None:
    """Under stop-gradient the official l2 is the sum of g f, ours the mean of 2 g f: the limit of the mean square."""
    want, parts = CONTINUOUS[case], parts_of()
    methods: dict[str, Any] = {
        "norm": ContinuousTimeDistillation(metric="norm"),
        "l1": ContinuousTimeDistillation(metric="l1"),
        "l2_stop_gradient": ContinuousTimeDistillation(stop_gradient=True),
        "training": ContinuousTimeTraining(),
    }
    update = update_of(methods[case], parts)
    loss = update.loss.mean() * (1.0 if case in ("norm", "l1") else NUMBERS / 2)
    assert float(loss.detach()) == pytest.approx(want["loss"], rel=1e-6)
    assert_gradient(loss, parts.student, want["gradient"], rtol=1e-6)
