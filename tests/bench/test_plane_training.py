"""Training in the plane: the method's own trainer, fresh points, an averaged product, and nothing left behind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from imagewright.bench.claims.plane_training import ExactTeacher, PointRun, distil, mixture_points
from imagewright.noise import StepNoise
from imagewright.oracles import GaussianMixture
from imagewright.training.config import EmaConfig
from imagewright.types import Average, Batch, Clock, Condition, Event, Follow, Frozen, Parts, Trained, Update

ORACLE = GaussianMixture(torch.tensor([[1.0, 0.0], [0.0, 3.0]], dtype=torch.float64).reshape(2, 2, 1, 1), 0.1)


class Point(nn.Module):
    """Two numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2, 1, 1))


@dataclass
class Centre:
    """The generator runs to the points' mean, a critic twice a step to the generator; a target follows."""

    product: ClassVar[str] = "generator"

    def __post_init__(self) -> None:
        self.seen: list[tuple[Tensor, Clock]] = []

    def step(self, parts: Any, batch: Batch, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        self.seen.append((batch.images, clock))
        yield Update("generator", (parts.generator.w - batch.images).square().flatten(1).sum(1))
        for _ in range(2):
            aim = parts.generator.w.detach().expand_as(batch.images)
            yield Update("critic", (parts.critic.w - aim).square().flatten(1).sum(1))
        yield Follow("target", "generator", 0.5)


def parts() -> Parts:
    return Parts(
        generator=Trained(module=Point()), critic=Trained(module=Point(), ema=False), target=Average(module=Point()),
        teacher=Frozen(module=ExactTeacher(ORACLE)),
    )  # fmt: skip


RUN = PointRun(iterations=150, batch=64, lr=0.1, ema=EmaConfig(halflife_images=640))


@pytest.mark.parametrize("kind", ["adam", "radam"])
def test_every_part_does_what_the_method_says(kind: str) -> None:
    method, made = Centre(), parts()
    product = distil(method, made, mixture_points(ORACLE), PointRun(**{**vars(RUN), "kind": kind}))
    assert isinstance(product, Point) and product is not made.generator and not product.training
    for trained in (product, made.generator, made.critic, made.target):
        assert trained.w.detach().flatten().tolist() == pytest.approx([0.5, 1.5], abs=0.2)
    assert not torch.equal(product.w, made.generator.w)  # the average, not the last weights


def test_points_are_fresh_and_the_clock_runs_to_the_end() -> None:
    method = Centre()
    distil(method, parts(), mixture_points(ORACLE), PointRun(iterations=5, batch=8))
    points, clocks = zip(*method.seen, strict=True)
    assert len(torch.cat(points).unique(dim=0)) == 40 and all(p.dtype == torch.float32 for p in points)
    assert [(c.step, c.images, c.total_images) for c in clocks] == [(i, 8 * i, 40) for i in range(5)]


def test_conditions_reach_the_method() -> None:
    labels = []

    class Told(Centre):
        def step(self, parts: Any, batch: Batch, noise: StepNoise, clock: Clock) -> Iterator[Event]:
            labels.append(batch.cond.label)
            yield from super().step(parts, batch, noise, clock)

    def draw(n: int, noise: StepNoise) -> tuple[Tensor, Condition]:
        return torch.zeros(n, 2, 1, 1), Condition(label=torch.arange(n))

    distil(Told(), parts(), draw, PointRun(iterations=1, batch=4))
    assert [label.tolist() for label in labels] == [[0, 1, 2, 3]]


def test_it_is_repeatable_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, again = (distil(Centre(), parts(), mixture_points(ORACLE), RUN) for _ in range(2))
    assert torch.equal(first.w, again.w)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not list(tmp_path.iterdir())


def test_the_rate_falls_to_zero_only_with_a_cooldown() -> None:
    last = {}
    for cooldown in (True, False):
        seen: list[Tensor] = []

        class Watched(Centre):
            def step(
                self, parts: Any, batch: Batch, noise: StepNoise, clock: Clock, seen: list[Tensor] = seen
            ) -> Iterator[Event]:
                seen.append(parts.generator.w.detach().clone())
                yield from super().step(parts, batch, noise, clock)

        made = parts()
        distil(Watched(), made, mixture_points(ORACLE), PointRun(iterations=20, batch=8, lr=0.01, cooldown=cooldown))
        last[cooldown] = float((made.generator.w.detach() - seen[-1]).abs().max())
    assert last[True] == 0 and last[False] > 1e-3


def test_the_teacher_is_the_oracle() -> None:
    x, sigma = torch.ones(3, 2, 1, 1), torch.tensor([0.1, 1.0, 10.0])
    teacher = ExactTeacher(ORACLE, 0.01, 50.0)
    assert torch.equal(teacher(x, sigma), ORACLE(x, sigma)) and teacher(x, sigma).dtype == torch.float32
    assert (teacher.sigma_min, teacher.sigma_max) == (0.01, 50.0) and torch.equal(teacher.round_sigma(sigma), sigma)
