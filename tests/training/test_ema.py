"""Averages against their closed forms."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from imagewright.training.config import EmaConfig, TrainingConfig
from imagewright.training.ema import Ema, HalfLife, Power, Profile, averages, gamma_of_std
from imagewright.training.learners import Learner
from imagewright.types import Trained, UserError


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


def survival(profile: Profile, start: int, end: int, batch: int) -> float:
    """Share that the average at `start` images has in the one at `end`."""
    return math.prod(profile.decay(n, batch) for n in range(start + batch, end + 1, batch))


def test_batch_size_matters_less_and_less_during_the_ramp_up() -> None:
    """Small steps tend to exp(-ln 2 / ratio * integral of dn / n) = (start / end)^(ln 2 / ratio), at first order."""
    limit = (100 / 200) ** (math.log(2) / 0.5)
    errors = [abs(survival(HalfLife(1e9, 0.5), 100, 200, batch) - limit) for batch in (4, 2, 1)]
    assert errors[-1] < 0.01 * limit
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.1) and errors[1] / errors[2] == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("batch", [1, 5, 20, 100])
def test_power_average_forgets_alike_at_every_batch_size(batch: int) -> None:
    assert survival(Power(0.1), 100, 200, batch) == pytest.approx(0.5 ** (gamma_of_std(0.1) + 1), rel=1e-10)


@pytest.mark.parametrize("profile", [HalfLife(200, None), HalfLife(200, 0.1), Power(0.1)], ids=lambda p: p.name)
def test_average_of_one_trajectory_converges_as_the_batch_shrinks(profile: Profile) -> None:
    """The weights follow sin(images / 200) up to 1000 images, in ever smaller steps."""
    found = [run(profile, [math.sin(n / 200) for n in range(0, 1001, batch)], batch) for batch in (8, 4, 2, 1)]
    steps = [abs(a - b) for a, b in itertools.pairwise(found)]
    assert steps[1] < 0.6 * steps[0] and steps[2] < 0.6 * steps[1]


def learner(power_std: tuple[float, ...] = (0.1,)) -> Learner:
    ema = EmaConfig(halflife_images=20, rampup_ratio=None, power_std=power_std)
    module = nn.Linear(2, 2)
    with torch.no_grad():
        module.weight.copy_(torch.eye(2))
        module.bias.zero_()
    config = TrainingConfig(total_images=100, batch=10, ema=ema)
    return Learner(Trained(module=module), config, torch.device("cpu"))


def advance(one: Learner, steps: range) -> None:
    """Move the weights as a function of the step and let the averages follow."""
    for step in steps:
        with torch.no_grad():
            one.module.weight.add_(math.sin(step))  # type: ignore[operator, union-attr]
        for average in one.averages:
            average.update(one.module, 10 * step, 10)


def test_loaded_averages_continue_bit_for_bit() -> None:
    whole, first, second = learner(), learner(), learner()
    advance(whole, range(1, 7))
    advance(first, range(1, 4))
    second.load_state(copy.deepcopy(first.state()))
    advance(second, range(4, 7))
    for expected, found in zip(whole.averages, second.averages, strict=True):
        assert all(torch.equal(expected.state[k], found.state[k]) for k in expected.state)
    # A copy, not a view: what is loaded from must not move with what is loaded.
    assert not torch.equal(first.averages[0].state["weight"], second.averages[0].state["weight"])


def test_averages_of_another_configuration_are_refused() -> None:
    with pytest.raises(UserError, match=r"holds the averages \['halflife', 'power0.1'\]; this run has \['halflife'\]"):
        learner(power_std=()).load_state(learner().state())
