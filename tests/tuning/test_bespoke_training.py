"""The exact statements behind the training of a bespoke solver, and small runs of it."""

import math
from dataclasses import replace

import pytest
import torch

from imagewright.noise import ImageNoise
from imagewright.oracles import GaussianMixture, GaussianOracle, IntegratedFlowMap
from imagewright.samplers.bespoke import Bespoke, Change, bespoke_step, identity_change, straight_velocity
from imagewright.tuning.bespoke import (
    BespokeTraining,
    ScaleTime,
    attached,
    bespoke_loss,
    error_weights,
    rms,
    rollout_rmse,
    solve_paths,
    step_lipschitz,
    train_bespoke,
)
from imagewright.types import UNCONDITIONAL, Condition, UserError

COUNT = 8


def normal(*shape, seed=0):
    return ImageNoise(seed, range(shape[0])).normal(torch.empty(*shape, dtype=torch.float64))


MIXTURE = GaussianMixture(torch.tensor([[1.0, 0.2], [-0.8, 0.5], [0.1, -1.0]], dtype=torch.float64), 0.3)
VELOCITY = straight_velocity(MIXTURE, 0.002, 80.0)
NARROW = GaussianMixture(MIXTURE.means, 0.05)
PATHS = solve_paths(VELOCITY, normal(COUNT, 2), tolerance=1e-9)


def random_change(config, seed, size=0.3):
    """Numbers far from the identity."""
    change = ScaleTime(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in change.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return change


@pytest.mark.parametrize("order", [1, 2])
def test_training_starts_at_the_identity_exactly(order):
    change = ScaleTime(BespokeTraining(num_steps=7, order=order))
    for ours, plain in zip(change(), identity_change(7 * order), strict=True):
        assert torch.equal(ours, plain)
    assert change.sampler() == Bespoke.identity(7, order)


@pytest.mark.parametrize(("order", "free"), [(1, 4 * 5 - 1), (2, 8 * 5 - 1)])
def test_free_numbers_are_as_many_as_the_papers(order, free):
    change = random_change(BespokeTraining(num_steps=5, order=order), seed=1)
    numbers, learnt = torch.cat(list(change())), list(change.parameters())
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(number, learnt, retain_graph=True, materialize_grads=True)])
        if number.requires_grad
        else torch.zeros(sum(p.numel() for p in learnt), dtype=torch.float64)
        for number in numbers
    ]
    assert torch.linalg.matrix_rank(torch.stack(rows)) == free == change.sampler().parameters


@pytest.mark.parametrize("seed", range(3))
def test_times_end_at_exactly_one_whatever_is_learnt(seed):
    change = random_change(BespokeTraining(num_steps=5), seed, size=2.0)()
    assert change.times[0] == 0 and change.times[-1] == 1 and bool((change.times.diff() > 0).all())
    assert bool((change.times_prime > 0).all() and (change.scales > 0).all()) and change.scales[0] == 1


def test_paths_are_the_exact_flow_also_between_the_nodes():
    times = torch.tensor([0.0, 0.13, 0.4, 0.77, 0.95, 1.0], dtype=torch.float64)
    found, pure = PATHS(times), 1e5
    start = pure * PATHS.latents + MIXTURE.means.mean(0)
    for time, state in zip(times[1:].tolist(), found[1:], strict=True):
        sigma = (1 - time) / time
        exact = IntegratedFlowMap(MIXTURE, 1e-9)(start, torch.tensor([pure]), torch.tensor([sigma])) * time
        # 80 in place of infinity, and 0.002 in place of 0, cost this much.
        torch.testing.assert_close(state, exact, rtol=0, atol=3e-4)
    fine = solve_paths(VELOCITY, PATHS.latents, tolerance=1e-10, nodes=1000)
    torch.testing.assert_close(found, fine(times), rtol=0, atol=1e-5)
    assert torch.equal(found[0], PATHS.latents) and torch.equal(found[-1], PATHS.ends)


def test_auxiliary_path_has_the_paths_value_and_the_velocity_as_its_derivative():
    times = torch.tensor([0.0, 0.21, 0.5, 0.83, 1.0], dtype=torch.float64, requires_grad=True)
    fine = solve_paths(VELOCITY, PATHS.latents, tolerance=1e-11, nodes=1500)
    states = attached(VELOCITY, fine, times)
    assert torch.equal(states.detach(), fine(times.detach()))
    step = 1e-5
    for i in (1, 2, 3):
        slope = VELOCITY(fine(times.detach())[i], times.detach()[i].expand(COUNT), UNCONDITIONAL)
        around = fine(torch.stack([times.detach()[i] - step, times.detach()[i] + step]))
        torch.testing.assert_close((around[1] - around[0]) / (2 * step), slope, rtol=0, atol=1e-5)
        for coordinate in range(2):
            (grad,) = torch.autograd.grad(states[i, 4, coordinate], times, retain_graph=True)
            assert torch.equal(grad, torch.eye(5, dtype=torch.float64)[i] * slope[4, coordinate])


@pytest.mark.parametrize("order", [1, 2])
def test_gradient_of_the_loss_is_that_of_finite_differences(order):
    config = BespokeTraining(num_steps=3, order=order)
    change = random_change(config, seed=4, size=0.2)
    paths = solve_paths(VELOCITY, PATHS.latents, tolerance=1e-11, nodes=1500)

    def loss():
        return bespoke_loss(VELOCITY, paths, change(), order, 1.0).mean()

    loss().backward()
    for parameter in change.parameters():
        for index in range(parameter.numel()):
            values = []
            for shift in (-1e-5, 1e-5):
                with torch.no_grad():
                    parameter[index] += shift
                    values.append(float(loss()))
                    parameter[index] -= shift
            assert float(parameter.grad[index]) == pytest.approx((values[1] - values[0]) / 2e-5, rel=1e-3, abs=2e-5)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("seed", range(8))
def test_the_bound_holds_on_gaussians_for_any_numbers(order, seed):
    std = torch.tensor([0.7, 1.0, 1.4], dtype=torch.float64)
    oracle = GaussianOracle(torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64), std=std)
    velocity = straight_velocity(oracle, 1e-4, 1e4)
    t = torch.linspace(0, 1, 2001, dtype=torch.float64)[:, None]
    slopes = (std**2 * t - (1 - t)) / ((std * t) ** 2 + (1 - t) ** 2)
    lipschitz = 1.001 * float(slopes.abs().max())
    paths = solve_paths(velocity, normal(16, 3, seed=seed), tolerance=1e-10, nodes=400)
    change = random_change(BespokeTraining(num_steps=4, order=order), seed, size=0.5)
    with torch.no_grad():
        bound = bespoke_loss(velocity, paths, change(), order, lipschitz)
        numbers, x = change(), paths.latents
        for i in range(4):
            x, _ = bespoke_step(velocity, x, numbers, order, i)
    error = rms(x - paths.ends)
    assert bool((error <= bound).all()) and float(error.mean()) <= float(bound.mean())


def test_early_errors_weigh_what_the_later_steps_make_of_them():
    change = Change(
        times=torch.tensor([0.0, 0.3, 0.6, 1.0]),
        times_prime=torch.tensor([0.5, 1.0, 2.0]),
        scales=torch.tensor([1.0, 2.0, 1.0, 4.0]),
        scales_prime=torch.tensor([0.0, -1.0, 3.0]),
    )
    first, second, third = (1 / 2) * (1 + 0.5 / 3), 2 * (1 + 1.5 / 3), (1 / 4) * (1 + 5.0 / 3)
    assert step_lipschitz(change, 1, 1.0).tolist() == pytest.approx([first, second, third])
    assert error_weights(change, 1, 1.0).tolist() == pytest.approx([second * third, third, 1.0])


@pytest.mark.parametrize("order", [1, 2])
def test_the_steps_constant_is_reached_by_the_worst_linear_field(order):
    """u = L x with s' >= 0 grows differences by exactly the constant: neither too small nor wasteful."""
    change = random_change(BespokeTraining(num_steps=3, order=order), seed=2)()
    change = Change(*(values.detach() for values in change))
    change = change._replace(scales_prime=change.scales_prime.abs())
    for i in range(3):
        a, _ = bespoke_step(lambda x, t, cond: 1.7 * x, torch.ones(1, 1, dtype=torch.float64), change, order, i)
        assert float(a) == pytest.approx(float(step_lipschitz(change, order, 1.7)[i]), rel=1e-12)


def test_training_beats_the_base_solver_on_fresh_noise_and_is_repeatable():
    config = BespokeTraining(
        num_steps=3, iterations=60, batch=16, pool=3, validation=2, lr=1e-2, seed=5, validate_every=20
    )
    told = []
    result = train_bespoke(NARROW, (2,), config=config, on_progress=told.append)
    fresh = [solve_paths(straight_velocity(NARROW, 0.002, 80.0), normal(64, 2, seed=77))]
    assert rollout_rmse(NARROW, result.sampler, fresh) < 0.5 * rollout_rmse(NARROW, Bespoke(num_steps=3), fresh)
    assert list(result.history) == told and [p.iteration for p in told] == [0, 20, 40, 60]
    assert result.base_rmse == told[0].val_rmse and result.val_rmse == min(p.val_rmse for p in told)
    again = train_bespoke(NARROW, (2,), config=replace(config, iterations=20))
    assert list(again.history[1:]) == told[1:2]


def test_ablations_leave_the_other_half_alone():
    plain = Bespoke.identity(2)
    for vary in ("times", "scales"):
        config = BespokeTraining(
            num_steps=2, vary=vary, iterations=10, batch=16, pool=1, validation=1, lr=1e-2, validate_every=2
        )
        sampler = train_bespoke(NARROW, (2,), config=config).sampler
        time_kept = (sampler.times, sampler.times_prime) == (plain.times, plain.times_prime)
        scale_kept = (sampler.scales, sampler.scales_prime) == (plain.scales, plain.scales_prime)
        assert (time_kept, scale_kept) == (vary == "scales", vary == "times")


def test_a_run_that_only_gets_worse_returns_the_base_solver():
    config = BespokeTraining(num_steps=2, iterations=4, validate_every=2, batch=8, pool=1, validation=1, lr=30.0)
    result = train_bespoke(MIXTURE, (2,), config=config)
    assert result.sampler == config.base and result.val_rmse == result.base_rmse


class Labelled:
    """Refuses to be asked without a class."""

    sigma_min, sigma_max = 0.002, 80.0

    def __init__(self):
        self.seen, self.network = set(), torch.nn.Linear(1, 1).double()

    def round_sigma(self, sigma):
        return sigma

    def __call__(self, x, sigma, cond=UNCONDITIONAL):
        assert cond.label is not None and len(cond.label) == len(x)
        self.seen |= set(cond.label.tolist())
        return MIXTURE(x, sigma) + 0.1 * (cond.label[:, None] + self.network(sigma[:, None]).tanh())


def test_every_path_has_a_class_of_its_own_and_the_network_is_left_alone():
    denoiser = Labelled()
    config = BespokeTraining(num_steps=2, iterations=3, batch=8, pool=1, validation=1)
    result = train_bespoke(denoiser, (2,), num_classes=3, config=config)
    assert denoiser.seen == {0, 1, 2} and math.isfinite(result.history[-1].loss)
    assert all(p.grad is None and p.requires_grad for p in denoiser.network.parameters())


def test_paths_keep_their_class_when_steps_are_stacked():
    """The bound of a batch is that of its paths one by one."""
    denoiser, labels = Labelled(), torch.tensor([0, 2, 1])
    velocity = straight_velocity(denoiser, 0.002, 80.0)
    change = random_change(BespokeTraining(num_steps=3), seed=3)()
    latents = normal(3, 2)
    together = solve_paths(velocity, latents, Condition(label=labels), tolerance=1e-7)
    for row in range(3):
        alone = solve_paths(velocity, latents[row : row + 1], Condition(label=labels[row : row + 1]), tolerance=1e-7)
        bounds = [bespoke_loss(velocity, paths, change, 2, 1.0).detach() for paths in (together, alone)]
        assert float(bounds[0][row]) == pytest.approx(float(bounds[1][0]), rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"iterations": 0}, r"bespoke\.iterations is 0; it must be at least 1"),
        ({"lr": -1.0}, r"bespoke\.lr is -1\.0; it must be positive"),
        ({"L_tau": math.inf}, r"bespoke\.L_tau is inf"),
        ({"vary": "all"}, "must be both, times or scales"),
        ({"order": 4}, r"sampler\.order is 4"),
    ],
)
def test_bad_settings_are_refused(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        BespokeTraining(**settings)
