"""iCT: the doubling grid, the law of intervals, the whole-image Huber distance, the weight, shared dropout."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from imagewright.methods.distances import Distance
from imagewright.methods.improved_consistency import ImprovedConsistencyTraining, interval_probabilities
from imagewright.networks import SongUNet, SongUNetConfig
from imagewright.noise import StepNoise
from imagewright.paths.noise_levels import LogNormal
from imagewright.paths.schedules import karras_sigmas
from imagewright.types import UNCONDITIONAL, Batch, Clock, Condition, DataSpec, Follow, Update, UserError

SPEC = DataSpec(name="toy", resolution=8, channels=1)


class Remembers(nn.Module):
    """A linear network that keeps the noise labels it was asked at."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        self.labels: list[Tensor] = []

    def forward(self, x: Tensor, noise_label: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        self.labels.append(noise_label)
        return self.w * x


def images(n: int) -> Tensor:
    return 0.5 * StepNoise(1).normal(torch.empty(n, 1, 8, 8, dtype=torch.float64))


def step(method: ImprovedConsistencyTraining, seen: int = 0, n: int = 64) -> tuple[list, list[Tensor]]:
    parts = method.parts(network=Remembers(), spec=SPEC)
    events = list(method.step(parts, Batch(images(n)), StepNoise(3), Clock(seen, seen, 1000)))
    return events, [(4 * label).exp() for net in (parts.target, parts.student) for label in net.network.labels]


def test_the_grid_doubles_in_equal_stages() -> None:
    method, total = ImprovedConsistencyTraining(), 400_000
    stage = total // 8
    assert [method.grid_points(k / total) for k in (0, stage - 1, stage, total - 1)] == [11, 11, 21, 1281]
    assert [method.grid_points(k / 8) for k in range(8)] == [10 * 2**k + 1 for k in range(8)]
    short = ImprovedConsistencyTraining(s0=4, s1=50)
    assert short.stages == 4 and [short.grid_points(k / 4) for k in range(4)] == [5, 9, 17, 33]


def test_intervals_follow_the_log_normal() -> None:
    method, levels = ImprovedConsistencyTraining(), LogNormal(mean=-1.1, std=2.0)
    grid = karras_sigmas(21, 0.002, 80.0, 7.0)
    share = interval_probabilities(grid, levels)
    assert float(share.sum()) == pytest.approx(1.0, abs=1e-12) and (share > 0).all()
    drawn = method.draw_intervals(grid, StepNoise(4), torch.empty(1_000_000))
    found = torch.bincount(drawn, minlength=20) / len(drawn)
    assert float((found - share).abs().max()) < 4 * math.sqrt(0.25 / len(drawn))
    # As the grid gets finer, the law of ln(sigma) tends to the normal cut to the range.
    fine = karras_sigmas(20_001, 0.002, 80.0, 7.0).double()
    mass, middle = interval_probabilities(fine, levels), (fine[1:] * fine[:-1]).sqrt().log()
    normal = torch.distributions.Normal(-1.1, 2.0)
    low, high = (normal.cdf(torch.tensor(math.log(s), dtype=torch.float64)) for s in (0.002, 80.0))
    for at in (-3.0, -1.1, 1.0):
        expected = (normal.cdf(torch.tensor(at, dtype=torch.float64)) - low) / (high - low)
        assert float(mass[middle < at].sum()) == pytest.approx(float(expected), abs=1e-3)
    uniform = ImprovedConsistencyTraining(noise_levels=None).draw_intervals(grid, StepNoise(4), torch.empty(100_000))
    assert float((torch.bincount(uniform, minlength=20) / 1e5 - 0.05).abs().max()) < 0.004


def test_neighbours_on_the_grid_share_their_noise_and_are_weighted_by_their_gap() -> None:
    (update, follow), (lower, upper) = step(ImprovedConsistencyTraining())
    grid = karras_sigmas(11, 0.002, 80.0, 7.0).double()
    for low, high in zip(lower, upper, strict=True):
        i = int((grid - high).abs().argmin())
        assert float(high) == pytest.approx(float(grid[i]), rel=1e-6)
        assert float(low) == pytest.approx(float(grid[i + 1]), rel=1e-6)
    (plain, _), _ = step(ImprovedConsistencyTraining(by_gap=False))
    torch.testing.assert_close(update.loss, plain.loss / (upper - lower), rtol=1e-6, atol=0)
    assert isinstance(update, Update) and isinstance(follow, Follow) and follow.decay == 0.0


@pytest.mark.parametrize("law", [LogNormal(mean=-1.1, std=2.0), None])
def test_a_step_draws_its_intervals_by_the_law(law: LogNormal | None) -> None:
    n, points = 4000, 11
    _, (_, upper) = step(ImprovedConsistencyTraining(noise_levels=law), n=n)
    grid = karras_sigmas(points, 0.002, 80.0, 7.0).double()
    found = torch.bincount((grid[:, None] - upper).abs().argmin(0), minlength=points)[: points - 1] / n
    share = torch.full((points - 1,), 1 / (points - 1)) if law is None else interval_probabilities(grid, law)
    assert float((found - share).abs().max()) < 4 * math.sqrt(0.25 / n)
    assert law is None or float((found - 1 / (points - 1)).abs().max()) > 0.1


def test_huber_of_the_whole_image() -> None:
    distance = ImprovedConsistencyTraining().distance
    shape = (4, 3, 32, 32)
    c = 0.00054 * math.sqrt(3 * 32 * 32)
    assert c == pytest.approx(0.0299, abs=1e-4)
    direction = StepNoise(2).normal(torch.empty(shape, dtype=torch.float64))
    direction = direction / direction.flatten(1).norm(dim=1)[:, None, None, None]
    zero = torch.zeros_like(direction)
    torch.testing.assert_close(
        distance(1e-4 * c * direction, zero), torch.full((4,), 1e-8 * c / 2, dtype=torch.float64)
    )
    torch.testing.assert_close(distance(1e6 * direction, zero), torch.full((4,), 1e6 - c, dtype=torch.float64))
    for size in (1e-3, 1.0, 1e3):
        a = (size * direction).requires_grad_()
        (gradient,) = torch.autograd.grad(distance(a, zero).sum(), a)
        assert (gradient.flatten(1).norm(dim=1) <= 1 + 1e-12).all()


def test_both_evaluations_share_their_dropout() -> None:
    """With equal levels and inputs, student and target answer alike in training mode."""
    torch.manual_seed(0)
    config = SongUNetConfig(img_resolution=8, in_channels=1, out_channels=1, model_channels=8, channel_mult=(1,),
                            num_blocks=1, attn_resolutions=(), dropout=0.5)  # fmt: skip
    method = ImprovedConsistencyTraining()
    parts = method.parts(network=SongUNet(config).double().train(), spec=SPEC)
    states: list[Tensor] = []
    for net in (parts.student.network, parts.target.network):
        plain = net.forward
        net.forward = lambda *a, plain=plain: (states.append(torch.get_rng_state()), plain(*a))[1]
    torch.manual_seed(7)
    list(method.step(parts, Batch(images(4)), StepNoise(3), Clock(0, 0, 1000)))
    assert len(states) == 2 and torch.equal(*states)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"s0": 0}, r"method\.s0 \+ 1 is 1"),
        ({"s1": 5}, r"method\.s1 is 5; it must be at least s0 \(10\)"),
        ({"sigma_data": 0.0}, r"method\.sigma_data is 0\.0"),
        ({"target_decay": 1.0}, r"method\.target_decay is 1\.0"),
        ({"sigma_min": 100.0}, r"sigma_min is 100\.0 and sigma_max is 80\.0"),
    ],
)
def test_bad_settings(settings: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        ImprovedConsistencyTraining(**settings)


def test_the_original_recipe_can_be_put_back() -> None:
    method = ImprovedConsistencyTraining(
        noise_levels=None, by_gap=False, target_decay=0.9, distance=Distance(kind="l2")
    )
    (update, follow), _ = step(method)
    assert follow.decay == 0.9 and update.loss.shape == (64,)
