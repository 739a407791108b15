"""The trajectory model: boundary, velocity, the exact jumps of Gaussian data, what it starts as, and its denoiser."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from imagewright.metrics.likelihood import log_likelihood
from imagewright.models.description import build
from imagewright.models.preconditioning import EDMPrecond
from imagewright.models.trajectory import TrajectoryModel
from imagewright.networks import DhariwalUNet, DhariwalUNetConfig, SongUNet, SongUNetConfig, UNet
from imagewright.noise import StepNoise
from imagewright.oracles import GaussianOracle
from imagewright.samplers import Heun, Jumps, MultistepConsistency
from imagewright.types import UNCONDITIONAL, Condition, Denoiser, UserError

STD = 0.5
SIZES = {"img_resolution": 8, "in_channels": 2, "out_channels": 2, "label_dim": 3, "model_channels": 8, "num_blocks": 1}


class ExactNetwork(nn.Module):
    """F for which G is the exact jump of N(0, STD^2), x sqrt((s^2 + STD^2) / (t^2 + STD^2)); sigma_data = STD."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor, noise_label: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        assert cond.destination is not None
        t, s = (4 * noise_label).exp(), (4 * cond.destination).exp()
        near, ratio, factor = (s / t - 1).abs() < 1e-12, s / t, ((s**2 + STD**2) / (t**2 + STD**2)).sqrt()
        denoised = STD**2 / (t**2 + STD**2)
        g = torch.where(near, denoised, (factor - ratio) / torch.where(near, 1.0, 1 - ratio))
        total = (t**2 + STD**2).sqrt()
        answer = self.w * (g - denoised) * total / (t * STD / total)
        return answer[:, None, None, None] * x


def exact() -> TrajectoryModel:
    return TrajectoryModel(ExactNetwork(), sigma_data=STD)


def unets() -> list[UNet]:
    torch.manual_seed(0)
    made: list[UNet] = [
        SongUNet(SongUNetConfig(**SIZES, channel_mult=(1, 2))),
        SongUNet(SongUNetConfig(**SIZES, channel_mult=(1, 2), embedding_type="fourier", decoder_type="skip")),
        DhariwalUNet(DhariwalUNetConfig(**SIZES, channel_mult=(1, 2), dropout=0.3, label_dropout=0.2)),
    ]
    for network in made:
        for p in network.parameters():
            p.data = p.data + 0.1 * torch.randn_like(p)  # zero-initialised layers too
    return made


def points(n: int, spread: float = 1.0) -> Tensor:
    return spread * StepNoise(1).normal(torch.empty(n, 2, 8, 8, dtype=torch.float64))


def levels(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("network", unets())
def test_to_where_it_is_is_the_identity_for_any_weights(network: UNet) -> None:
    model = TrajectoryModel(network.told_destination()).double()
    for p in model.parameters():
        p.data += 0.1
    t = levels(0.002, 0.1, 3.0, 80.0)
    assert torch.equal(model(points(4), t, t), points(4))
    assert torch.equal(model(points(1), levels(0.002), levels(0.0)), points(1))  # 0 means sigma_min


def test_velocity_is_the_odes() -> None:
    """dG/ds at s = t is (x - D) / t, whatever g is elsewhere."""
    model, oracle = exact(), GaussianOracle(torch.zeros(2, 8, 8, dtype=torch.float64), std=STD)
    for t in (0.05, 1.0, 40.0):
        x, h = points(2, t + STD), 1e-4 * t
        rise = (model(x, levels(t, t), levels(t, t)) - model(x, levels(t, t), levels(t - h, t - h))) / h
        velocity = (x - oracle(x, levels(t, t))) / t
        torch.testing.assert_close(rise, velocity, rtol=1e-3, atol=1e-4)


def test_any_contained_denoiser_gives_its_velocity() -> None:
    torch.manual_seed(3)
    model = TrajectoryModel(unets()[0].told_destination()).double().eval()
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    t, h, x = levels(0.7, 2.0), 1e-5, points(2)
    rise = (model(x, t, t) - model(x, t, t - h)) / h
    torch.testing.assert_close(rise, (x - model.denoiser()(x, t)) / t[:, None, None, None], rtol=1e-3, atol=1e-3)


def test_exact_jumps_form_a_semigroup() -> None:
    model, flow = exact(), GaussianOracle(torch.zeros(2, 8, 8, dtype=torch.float64), std=STD).flow_map()
    t, u, s, x = levels(80.0, 5.0, 0.3), levels(3.0, 4.9, 0.2), levels(0.5, 0.01, 0.002), points(3)
    torch.testing.assert_close(model(x, t, s), flow(x, t, s), rtol=1e-9, atol=0)
    torch.testing.assert_close(model(model(x, t, u), u, s), model(x, t, s), rtol=1e-9, atol=0)


def test_gamma_one_is_the_consistency_sampler_and_gamma_zero_one_jump() -> None:
    torch.manual_seed(4)
    model = TrajectoryModel(unets()[0].told_destination()).double().eval()
    latents, via = points(3), (20.0, 1.0, 0.1)
    for levels_on_the_way in ((), via):
        jumped = Jumps(sigmas=levels_on_the_way, gamma=1.0, clip=False)(model, latents, noise=StepNoise(7))
        known = MultistepConsistency(sigmas=levels_on_the_way, clip=False)(model, latents, noise=StepNoise(7))
        torch.testing.assert_close(jumped, known, rtol=1e-12, atol=1e-12)
    one = Jumps(clip=False)(model, latents)
    assert torch.equal(one, model(80 * latents, levels(80, 80, 80), levels(0.002, 0.002, 0.002)).detach())


def test_exact_jumps_land_on_the_flow_whatever_the_number_of_stops() -> None:
    flow, latents = GaussianOracle(torch.zeros(2, 8, 8, dtype=torch.float64), std=STD).flow_map(), points(3)
    end = flow(80 * latents, levels(80, 80, 80), levels(0.002, 0.002, 0.002))
    for via in ((), (5.0,), (20.0, 1.0, 0.1)):
        torch.testing.assert_close(Jumps(sigmas=via, clip=False)(exact(), latents), end, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("network", unets())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_starts_as_the_denoiser(network: UNet, dtype: torch.dtype) -> None:
    denoiser = EDMPrecond(network.eval(), 0.01, 50.0, 0.4)
    model = TrajectoryModel.from_denoiser(denoiser).eval()
    x, t, cond = points(3).to(dtype), levels(0.1, 2.0, 50.0), Condition(label=torch.tensor([0, 2, -1]))
    known = denoiser(x, t, cond)
    for s in (t, 0.3 * t, 0 * t):
        torch.testing.assert_close(model.towards(x, t, s, cond), known, rtol=0, atol=1e-5)
    assert model(x, t, 0.5 * t, cond).dtype == dtype
    assert (model.sigma_min, model.sigma_max, model.sigma_data) == (0.01, 50.0, 0.4)
    first, other = next(model.parameters()), next(denoiser.parameters())
    assert first.data_ptr() != other.data_ptr() and first.requires_grad


@pytest.mark.parametrize("network", unets())
def test_a_trained_destination_changes_the_answer(network: UNet) -> None:
    model = TrajectoryModel.from_denoiser(EDMPrecond(network)).eval()
    for name, p in model.named_parameters():
        if "affine_to" in name:
            p.data = p.data + 0.1 * torch.randn_like(p)
    t = levels(2.0, 2.0)
    near, far = (model.towards(points(2), t, s) for s in (levels(1.9, 1.9), levels(0.01, 0.01)))
    assert float((near - far).detach().abs().max()) > 1e-3
    again = build(model.describe())
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval().towards(points(2), t, t), model.towards(points(2), t, t))  # type: ignore[operator]


def test_last_layer_and_dropout_of_unets() -> None:
    names = ["dec.8x8_aux_conv.weight", "dec.8x8_aux_conv.weight", "dec.8x8_block1.conv1.weight"]
    for network, name in zip(unets(), names, strict=True):
        assert network.last_layer is dict(network.named_parameters())[name]
        quiet = network.with_settings(dropout=0.0, label_dropout=0.0)
        assert quiet.config.dropout == 0 == quiet.config.label_dropout
        x, label, cond = points(4).float(), torch.zeros(4), Condition(label=torch.tensor([0, 1, 2, -1]))
        assert torch.equal(quiet.train()(x, label, cond), network.eval()(x, label, cond))
        assert not torch.equal(network.train()(x, label, cond), network.eval()(x, label, cond))


def test_contained_denoiser_serves_samplers_and_likelihood() -> None:
    model = exact()
    denoiser: Denoiser = model.denoiser()
    assert isinstance(denoiser, Denoiser) and (denoiser.sigma_min, denoiser.sigma_max) == (0.002, 80.0)
    oracle = GaussianOracle(torch.zeros(2, 8, 8, dtype=torch.float64), std=STD)
    torch.testing.assert_close(denoiser(points(2), levels(0.3, 4.0)), oracle(points(2), levels(0.3, 4.0)))
    heun = Heun(num_steps=12)
    torch.testing.assert_close(heun(denoiser, points(2)), heun(oracle, points(2)), rtol=1e-9, atol=1e-12)
    found, known = (log_likelihood(d, points(2, STD), noise=StepNoise(1), steps=30, sigma_min=0.002, sigma_max=80.0)
                    for d in (denoiser, oracle))  # fmt: skip
    torch.testing.assert_close(found, known, rtol=1e-9, atol=0)


def test_a_network_that_cannot_be_told_is_refused() -> None:
    with pytest.raises(UserError, match="the denoiser's network is a Linear, which cannot be told where to go"):
        TrajectoryModel.from_denoiser(EDMPrecond(nn.Linear(2, 2)))
