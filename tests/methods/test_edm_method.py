"""Training a denoiser: the loss against closed forms on Gaussian data, and what reaches the network."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from imagewright.data.augment import Augment
from imagewright.methods.edm import EDM, denoising_loss, loss_weight
from imagewright.models.preconditioning import EDMPrecond, VEPrecond, VPPrecond
from imagewright.noise import StepNoise
from imagewright.oracles import GaussianMixture, GaussianOracle
from imagewright.paths.noise_levels import LogNormal, LogUniform
from imagewright.types import UNCONDITIONAL, Batch, Clock, Condition, DataSpec, Parts, Trained, Update, UserError

SPEC = DataSpec(name="toy", resolution=4, channels=1)
CLOCK = Clock(0, 0, 100)
SIGMAS = torch.logspace(-2, 2, 9, dtype=torch.float64)


class Recorder(nn.Module):
    """A network that answers w times its input, and remembers what it was asked."""

    def __init__(self, w: float = 0.0) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w, dtype=torch.float64))

    def forward(self, x: Tensor, noise_label: Tensor, cond: Condition) -> Tensor:
        self.asked = (x, noise_label, cond)
        return self.w * x


class Around(nn.Module):
    """An oracle as the module that `Parts` wants."""

    def __init__(self, oracle: object) -> None:
        super().__init__()
        self.oracle = oracle

    def forward(self, x: Tensor, sigma: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        return self.oracle(x, sigma, cond)  # type: ignore[operator, no-any-return]


def only_update(method: EDM, parts: Parts, batch: Batch, seed: int = 0) -> Update:
    """The one event of a step."""
    (event,) = method.step(parts, batch, StepNoise(seed), CLOCK)
    assert isinstance(event, Update)
    return event


def images(n: int, seed: int = 1) -> Tensor:
    return 0.5 * StepNoise(seed).normal(torch.empty(n, 1, 4, 4, dtype=torch.float64))


def test_weight_cancels_the_output_scaling() -> None:
    for sigma_data in (0.3, 0.5, 2.0):
        c_out = EDMPrecond(nn.Identity(), sigma_data=sigma_data).scalings(SIGMAS).c_out
        torch.testing.assert_close(loss_weight(SIGMAS, sigma_data) * c_out**2, torch.ones_like(SIGMAS))


def test_loss_is_the_networks_own_error() -> None:
    """lambda |D - y|^2 = |F - (y - c_skip x) / c_out|^2, equation 8: at F = 0 the second form is at hand."""
    y, sigma = images(9), SIGMAS
    loss = denoising_loss(EDMPrecond(Recorder(0.0)), y, sigma, UNCONDITIONAL, StepNoise(3), 0.5)
    s = EDMPrecond(nn.Identity()).scalings(sigma)
    x = y + sigma[:, None, None, None] * StepNoise(3).normal(y)
    target = (y - s.c_skip[:, None, None, None] * x) / s.c_out[:, None, None, None]
    torch.testing.assert_close(loss, target.square().mean((1, 2, 3)))


@pytest.mark.parametrize("std", [0.5, 0.2])
def test_perfect_denoiser_of_a_gaussian_has_the_posterior_variance(std: float) -> None:
    """E lambda |D - y|^2 = lambda sigma^2 s^2 / (sigma^2 + s^2); exactly 1 where s is sigma_data."""
    oracle = GaussianOracle(torch.zeros(1, 4, 4, dtype=torch.float64), std=std)
    n = 4000
    for sigma in (0.05, 0.5, 5.0):
        levels = torch.full((n,), sigma, dtype=torch.float64)
        y = oracle.sample(n, StepNoise(7))
        loss = denoising_loss(Around(oracle), y, levels, UNCONDITIONAL, StepNoise(8), 0.5).mean()
        expected = loss_weight(levels[0], 0.5) * sigma**2 * std**2 / (sigma**2 + std**2)
        # The mean of 64,000 squared normals: relative standard error sqrt(2 / 64000) = 0.0056.
        torch.testing.assert_close(loss, expected, rtol=0.025, atol=0)
        if std == 0.5:
            assert math.isclose(expected, 1.0, rel_tol=1e-12)


def test_exact_denoiser_of_a_point_mass_has_no_loss() -> None:
    point = images(1)
    parts = Parts(denoiser=Trained(module=Around(GaussianMixture(point, 0.0))))
    update = only_update(EDM(), parts, Batch(point.expand(6, -1, -1, -1)))
    # Not quite zero: y - y is, but the mixture's mean is 1.0 * y by a softmax over one component.
    assert update.loss.max() < 1e-20


def test_noise_levels_are_log_normal_one_per_image() -> None:
    parts = EDM().parts(network=Recorder(), spec=SPEC)
    update = only_update(EDM(), parts, Batch(images(20_000)))
    assert update.at is not None and update.at.shape == (20_000,)
    logs = update.at.log()
    # Standard errors: 1.2 / sqrt(20000) = 0.0085 of the mean, 0.006 of the deviation.
    assert abs(logs.mean() + 1.2) < 0.04
    assert abs(logs.std() - 1.2) < 0.03
    asked = parts.denoiser.network.asked[1]
    torch.testing.assert_close(asked, logs / 4)


def test_update_has_one_loss_per_image_with_a_gradient() -> None:
    parts = EDM().parts(network=Recorder(0.3), spec=SPEC)
    update = only_update(EDM(), parts, Batch(images(5)))
    assert (update.part, update.loss.shape) == ("denoiser", (5,))
    assert EDM.product == "denoiser" and isinstance(parts.roles["denoiser"], Trained)
    (gradient,) = torch.autograd.grad(update.loss.sum(), [parts.denoiser.network.w])
    assert gradient != 0


def test_a_step_is_a_function_of_its_noise() -> None:
    parts = EDM().parts(network=Recorder(0.3), spec=SPEC)
    first, again, other = (only_update(EDM(), parts, Batch(images(5)), seed).loss for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_augmentation_reaches_the_network_with_its_labels() -> None:
    method = EDM(augment=Augment(p=1.0))
    assert method.augment_dim == 9 and EDM().augment_dim == 0
    label = torch.arange(8)
    batch = Batch(images(8).float(), Condition(label=label))
    recorder = Recorder(0.3).float()
    parts = method.parts(network=recorder, spec=SPEC)
    update = only_update(method, parts, batch)
    seen = recorder.asked[2]
    assert seen.augment.shape == (8, 9) and seen.augment.abs().sum(1).min() > 0
    assert torch.equal(seen.label, label)
    assert update.loss.shape == (8,)
    # The image that is noised is the augmented one: what the network was asked is c_in (augmented + sigma n).
    noise = StepNoise(0)
    moved, parameters = Augment(p=1.0)(batch.images, noise)
    sigma = method.noise_levels.sample(noise, moved[:, 0, 0, 0])
    noisy = moved + sigma[:, None, None, None] * noise.normal(moved)
    assert torch.equal(seen.augment, parameters)
    torch.testing.assert_close(recorder.asked[0], noisy / (sigma**2 + 0.25).sqrt()[:, None, None, None])
    only_update(EDM(), parts, batch)
    assert recorder.asked[2].augment is None


def test_preconditioning_is_chosen_by_name() -> None:
    kinds = {"edm": EDMPrecond, "vp": VPPrecond, "ve": VEPrecond}
    for name, kind in kinds.items():
        method = EDM(preconditioning=name)  # type: ignore[arg-type]
        assert type(method.parts(network=Recorder(), spec=SPEC).denoiser) is kind
    model = EDM(sigma_min=0.01, sigma_max=50.0, sigma_data=0.7).parts(network=Recorder(), spec=SPEC).denoiser
    assert (model.sigma_min, model.sigma_max, model.sigma_data) == (0.01, 50.0, 0.7)
    ranges = {"edm": (0.002, 80.0), "ve": (0.02, 100.0)}
    for name, (low, high) in ranges.items():
        model = EDM(preconditioning=name).parts(network=Recorder(), spec=SPEC).denoiser  # type: ignore[arg-type]
        assert (model.sigma_min, model.sigma_max) == (low, high)


@pytest.mark.parametrize("row", ["vp", "ve"])
def test_other_rows_have_weight_and_law_of_their_own(row: str) -> None:
    """lambda = 1 / sigma^2 makes |D - y|^2 = sigma^2 |F + n|^2 (up to sign) the network's plain error."""
    method = EDM(preconditioning=row)  # type: ignore[arg-type]
    parts = method.parts(network=Recorder(0.0), spec=SPEC)
    update = only_update(method, parts, Batch(images(20_000)))
    assert update.at is not None
    # F = 0: D - y is the noise itself, so every loss is the mean square of a standard normal.
    noise, count = StepNoise(0), 20_000
    sigma = method.training_levels.sample(noise, images(count)[:, 0, 0, 0])
    torch.testing.assert_close(update.at, sigma)
    torch.testing.assert_close(update.loss, noise.normal(images(count)).square().mean((1, 2, 3)))
    if row == "ve":
        logs = update.at.log()
        assert abs(float(logs.mean()) - math.log(0.02 * 100) / 2) < 4 * math.log(5000) / math.sqrt(12 * count)
        assert float(update.at.min()) >= 0.02 and float(update.at.max()) <= 100
    else:
        t = VPPrecond(nn.Identity()).sigma_inv(update.at)
        assert abs(float(t.mean()) - 0.5) < 4 / math.sqrt(12 * count)
        assert float(t.min()) >= 1e-5 * (1 - 1e-9) and float(t.max()) <= 1 + 1e-12


def test_the_ve_range_is_that_of_training() -> None:
    method = EDM(preconditioning="ve", sigma_min=0.5, sigma_max=2.0)
    update = only_update(method, method.parts(network=Recorder(), spec=SPEC), Batch(images(1000)))
    assert update.at is not None and 0.5 <= float(update.at.min()) < 0.51 and 1.98 < float(update.at.max()) <= 2.0


@pytest.mark.parametrize(
    ("row", "setting"),
    [
        ("vp", {"sigma_data": 0.4}),
        ("vp", {"sigma_min": 0.01}),
        ("vp", {"sigma_max": 10.0}),
        ("vp", {"noise_label": "angle"}),
        ("vp", {"noise_levels": LogNormal(mean=0.0)}),
        ("ve", {"sigma_data": 0.4}),
        ("ve", {"noise_label": "angle"}),
        ("ve", {"noise_levels": LogUniform(sigma_min=0.1, sigma_max=1.0)}),
    ],
)
def test_settings_without_effect_are_refused(row: str, setting: dict[str, object]) -> None:
    (name,) = setting
    with pytest.raises(UserError, match=f"method.{name} is .*; it has no effect with preconditioning '{row}'"):
        EDM(preconditioning=row, **setting)  # type: ignore[arg-type]


def test_an_unknown_row_is_refused() -> None:
    with pytest.raises(UserError, match=r"method\.preconditioning is 'iddpm'; allowed: edm, vp, ve"):
        EDM(preconditioning="iddpm")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_sigma_data_has_a_range(value: float) -> None:
    with pytest.raises(UserError, match=r"method.sigma_data is .* positive"):
        EDM(sigma_data=value)


def test_noise_range_has_an_order() -> None:
    with pytest.raises(UserError, match=r"sigma_min is 2.0 and sigma_max is 1.0"):
        EDM(sigma_min=2.0, sigma_max=1.0).parts(network=Recorder(), spec=SPEC)


def test_the_uncertainty_weighs_the_loss_and_is_learned() -> None:
    """EDM2's loss, equation 21, and what it teaches."""
    from imagewright.networks import EDM2UNet, EDM2UNetConfig

    config = EDM2UNetConfig(
        img_resolution=4, in_channels=1, out_channels=1, model_channels=4, channel_mult=(1,), channel_mult_emb=1,
        num_blocks=1, attn_resolutions=(), channels_per_head=4,
    )  # fmt: skip
    method = EDM(uncertainty=True)
    parts = method.parts(network=EDM2UNet(config), spec=SPEC)
    denoiser = parts.roles["denoiser"].module.eval()

    def update(method: EDM) -> Update:
        (event,) = method.step(parts, Batch(images=torch.ones(8, 1, 4, 4)), StepNoise(0, 0, 0), CLOCK)
        assert isinstance(event, Update) and event.at is not None
        return event

    weighed, plain = update(method), update(EDM())
    u = denoiser.log_variance(plain.at)
    torch.testing.assert_close(weighed.loss, plain.loss / u.exp() + u)
    weighed.loss.sum().backward()
    assert denoiser.logvar_linear.weight.grad.abs().sum() > 0
    with pytest.raises(UserError, match=r"method\.uncertainty is True; it has no effect with preconditioning 'vp'"):
        EDM(preconditioning="vp", uncertainty=True)
