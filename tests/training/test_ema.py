"""Averages against their closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from imagewright.training.config import EmaConfig
from imagewright.training.ema import Ema, HalfLife, Power, Profile, averages, gamma_of_std


def run(profile: Profile, values: list[float], batch: int) -> float:
    """The average after a network's one weight has taken these values, a batch of images each."""
    module = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        module.weight.fill_(values[0])
        ema = Ema(module, profile)
        for step, value in enumerate(values[1:], 1):
            module.weight.fill_(value)
            ema.update(module, step * batch, batch)
    return float(ema.state["weight"])


@pytest.mark.parametrize("batch", [10, 50, 100])
def test_half_of_an_old_weight_is_left_after_the_half_life(batch: int) -> None:
    values = [1.0] + [0.0] * (1000 // batch)
    assert run(HalfLife(500, None), values, batch) == pytest.approx(0.25, rel=1e-12)


def test_ramp_up_shortens_the_half_life_early() -> None:
    profile = HalfLife(500, 0.05)
    assert profile.decay(1000, 10) == pytest.approx(0.5 ** (10 / 50))
    assert profile.decay(1_000_000, 10) == pytest.approx(0.5 ** (10 / 500))
    assert HalfLife(0, None).decay(1000, 10) == 0


def test_a_half_life_of_zero_is_the_network_itself() -> None:
    assert run(HalfLife(0, None), [1.0, 2.0, 3.0], 10) == 3.0


@pytest.mark.parametrize("std", [0.05, 0.10, 0.2])
def test_power_average_is_the_sum_of_its_profile(std: float) -> None:
    """Weight of step i: (n_i / n)^(gamma + 1) - (n_(i-1) / n)^(gamma + 1)."""
    values = [math.sin(i) for i in range(41)]
    power = gamma_of_std(std) + 1
    expected = sum(values[i] * ((i / 40) ** power - ((i - 1) / 40) ** power) for i in range(1, 41))
    assert run(Power(std), values, 8) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("gamma", "std"), [(16.97, 0.050), (6.94, 0.100)])
def test_width_and_exponent_are_the_papers(gamma: float, std: float) -> None:
    assert gamma_of_std(std) == pytest.approx(gamma, abs=0.01)
    g = gamma_of_std(std)
    assert math.sqrt((g + 1) / ((g + 2) ** 2 * (g + 3))) == pytest.approx(std, rel=1e-9)


def test_buffers_are_averaged_when_floating_and_copied_when_not() -> None:
    module = nn.BatchNorm1d(2)
    ema = Ema(module, HalfLife(10, None))
    module.running_mean.fill_(2.0)  # type: ignore[union-attr]
    module.num_batches_tracked.fill_(7)  # type: ignore[union-attr]
    ema.update(module, 10, 10)
    assert ema.state["running_mean"].tolist() == [1.0, 1.0] and int(ema.state["num_batches_tracked"]) == 7


def test_the_first_average_is_the_exported_one() -> None:
    found = averages(nn.Linear(2, 2), EmaConfig(halflife_images=100, power_std=(0.05, 0.1)))
    assert [a.profile.name for a in found] == ["halflife", "power0.05", "power0.1"]
