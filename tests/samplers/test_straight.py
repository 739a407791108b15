"""Steps in the straight path's time: orders, grids, the rule that keeps the first noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from imagewright.oracles import GaussianMixture, GaussianOracle, IntegratedFlowMap
from imagewright.samplers import DDIM, Straight
from imagewright.samplers.straight import START, shifted, sigmoid_times, straightness
from imagewright.types import UNCONDITIONAL, Condition, UserError

MIXTURE = GaussianMixture(torch.tensor([[1.0, 0.2], [-0.6, 0.9], [0.1, -1.1]], dtype=torch.float64), 0.4)
LATENTS = torch.randn(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
AT = torch.ones(8, dtype=torch.float64)


def errors(steps: list[int], **settings: object) -> list[float]:
    """Distance to the exact flow, from t = 0.95 to 0.1, in steps of equal time."""
    high, low = 0.95, 0.1
    want = IntegratedFlowMap(MIXTURE)(high / (1 - high) * LATENTS, high / (1 - high) * AT, low / (1 - low) * AT)
    found = []
    for n in steps:
        seen: dict[float, Tensor] = {}
        sampler = Straight(times=tuple(high + i / n * (low - high) for i in range(n + 1)), **settings)
        sampler(MIXTURE, LATENTS, on_step=lambda x, _, sigma, seen=seen: seen.update({round(sigma, 9): x}))
        found.append(float((seen[round(low / (1 - low), 9)] - want).abs().max()))
    return found


@pytest.mark.parametrize(("settings", "order"), [
    ({"order": 1}, 1), ({"order": 2}, 2), ({"order": 2, "r": 0.5}, 2), ({"order": 2, "r": 0.4}, 2),
])  # fmt: skip
def test_order_of_convergence(settings: dict[str, object], order: int) -> None:
    steps = [25, 50, 100]
    slope, _ = np.polyfit(np.log(steps), np.log(errors(steps, **settings)), 1)
    assert -slope == pytest.approx(order, abs=0.2)


def test_eulers_steps_are_ddims() -> None:
    times = (0.9, 0.6, 0.3)
    got = Straight(times=times, order=1)(MIXTURE, LATENTS)
    levels = tuple(t / (1 - t) for t in times)
    torch.testing.assert_close(got, DDIM(levels=levels)(MIXTURE, LATENTS), rtol=1e-9, atol=1e-9)


class Line:
    """The denoiser of one image: its flow is straight, v = z - x0."""

    sigma_min, sigma_max, image = 0.0, 1e9, torch.tensor([0.4, -0.7], dtype=torch.float64)

    def __call__(self, x: Tensor, sigma: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        return self.image.expand(x.shape)

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return sigma


@pytest.mark.parametrize("order", [1, 2])
def test_keeping_the_noise_is_eulers_rule_on_straight_paths_and_for_one_step(order: int) -> None:
    kept = Straight(num_steps=4, order=order, keep_noise=True)
    torch.testing.assert_close(kept(Line(), LATENTS), Line.image.expand(8, 2), rtol=1e-9, atol=1e-9)
    plain = Straight(num_steps=4, order=order)
    assert float((kept(MIXTURE, LATENTS) - plain(MIXTURE, LATENTS)).abs().max()) > 0.01
    one = [Straight(num_steps=1, keep_noise=keep)(MIXTURE, LATENTS) for keep in (False, True)]
    torch.testing.assert_close(*one)


def test_straight_lines_are_straight_and_curves_are_not() -> None:
    assert float(straightness(Line(), LATENTS).max()) < 1e-15
    # N(0, s^2): x_t = z sqrt((1 - t)^2 s^2 + t^2), whose slope's variance over t is known: E[v^2] - (1 - s)^2.
    s = 0.3
    t = torch.linspace(0, 1, 20001, dtype=torch.float64)
    slope = (t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2).sqrt()
    want = (torch.trapezoid(slope**2, t) - (1 - s) ** 2) * LATENTS.square().mean(1)
    got = straightness(GaussianOracle(torch.zeros(2, dtype=torch.float64), std=s), LATENTS, num_steps=400)
    torch.testing.assert_close(got, want, rtol=0.02, atol=0)


def test_the_next_point_has_the_first_noise() -> None:
    seen: list[tuple[Tensor, Tensor, float]] = []
    Straight(num_steps=3, order=1, keep_noise=True)(MIXTURE, LATENTS, on_step=lambda *each: seen.append(each))
    x, x0, sigma = seen[0]
    torch.testing.assert_close(x, x0 + sigma * START * LATENTS)


def test_grids() -> None:
    times = torch.tensor(sigmoid_times(7, 20.0), dtype=torch.float64)
    assert (float(times[0]), float(times[-1])) == (1.0, 0.0)
    torch.testing.assert_close(times + times.flip(0), torch.ones(8).double())
    assert float(times[0] - times[1]) < 0.1 < float(times[3] - times[4])  # dense at both ends
    uniform = torch.linspace(1, 0, 8, dtype=torch.float64)
    torch.testing.assert_close(torch.tensor(sigmoid_times(7, 1e-3), dtype=torch.float64), uniform, rtol=0, atol=1e-6)
    assert Straight(num_steps=2).visited() == [START, 0.5, 0.0]
    assert Straight(grid="sigmoid", num_steps=4).visited()[1] == sigmoid_times(4, 20.0)[1]
    assert (Straight(num_steps=5).nfe, Straight(num_steps=5, order=1).nfe, Straight(times=(1.0, 0.5)).nfe) == (9, 5, 3)


def test_a_denoiser_that_knows_less_noise_is_asked_where_it_knows() -> None:
    class Asked(GaussianOracle):
        sigma_max = 40.0
        levels: list[float] = []  # noqa: RUF012

        def __call__(self, x: Tensor, sigma: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
            self.levels.append(float(sigma.max()))
            return super().__call__(x, sigma, cond)

    oracle = Asked(torch.zeros(2, dtype=torch.float64), std=0.5)
    got = Straight(num_steps=200)(oracle, LATENTS)
    assert max(oracle.levels) == 40.0
    torch.testing.assert_close(got, 0.5 * LATENTS, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("settings", "message"), [
    ({"times": (0.5, 0.7)}, "must be strictly decreasing and lie in"),
    ({"times": (1.5,)}, r"sampler.times is \(1.5,\)"),
    ({"order": 3}, "sampler.order is 3; allowed: 1, 2"),
    ({"r": 0.0}, r"sampler.r is 0.0; it must lie in \(0, 1\]"),
    ({"grid": "log"}, "it must be one of uniform, sigmoid"),
    ({"sharpness": 0.0}, "sampler.sharpness is 0.0"),
])  # fmt: skip
def test_settings_out_of_range(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Straight(**settings)  # type: ignore[arg-type]


def test_a_shift_divides_the_noise_levels() -> None:
    times = [0.0, 0.1, 0.5, 0.9, 1.0]
    assert [shifted(t, 1.0) for t in times] == times
    assert [shifted(shifted(t, 0.3), 1 / 0.3) for t in times] == pytest.approx(times, abs=1e-15)
    assert (shifted(0.0, 0.3), shifted(1.0, 0.3)) == (0.0, 1.0)
    for t in times[1:-1]:
        moved = shifted(t, 0.3)
        assert moved / (1 - moved) == pytest.approx(t / (1 - t) / 0.3)
        counted = 1 - t  # as the papers count, from the noise
        assert 1 - moved == pytest.approx(0.3 * counted / (1 + (0.3 - 1) * counted))
    visited = Straight(num_steps=10, shift=0.3).visited()
    assert visited[0] == START and visited[-1] == 0 and sum(t > 0.5 for t in visited) > 7  # more where noise is strong
    with pytest.raises(UserError, match="no effect on sampler"):
        Straight(times=(0.9, 0.5), shift=0.3)
    with pytest.raises(UserError, match="shift is 0"):
        Straight(shift=0.0)


def test_shifted_steps_end_where_the_flow_does() -> None:
    want = IntegratedFlowMap(MIXTURE)(START / (1 - START) * LATENTS, START / (1 - START) * AT, 1e-6 * AT)
    torch.testing.assert_close(Straight(num_steps=200, shift=0.3)(MIXTURE, LATENTS), want, rtol=0, atol=2e-3)
