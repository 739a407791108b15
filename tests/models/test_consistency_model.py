"""The consistency model: its boundary condition, its scalings, and how it starts from a denoiser."""

import pytest
import torch
from torch import nn

from imagewright.models.consistency import ConsistencyModel
from imagewright.models.description import build, describe
from imagewright.models.preconditioning import EDMPrecond
from imagewright.networks import SongUNet, SongUNetConfig
from imagewright.types import Condition, FlowMap

SIGMAS = torch.logspace(-2, 1.9, 9, dtype=torch.float64)


def network(dtype=torch.float32):
    torch.manual_seed(0)
    config = SongUNetConfig(
        img_resolution=8, in_channels=3, out_channels=3, label_dim=2,
        model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), dropout=0.1,
    )  # fmt: skip
    made = SongUNet(config)
    for p in made.parameters():  # the last layers start at zero, which would hide the network
        nn.init.normal_(p, std=0.1)
    return made.to(dtype)


def images(n, dtype=torch.float32):
    return torch.randn(n, 3, 8, 8, dtype=dtype, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sigma_min", [0.002, 0.05])
def test_boundary_condition_is_exact(dtype, sigma_min):
    model = ConsistencyModel(network(dtype), sigma_min=sigma_min, sigma_data=0.37).eval()
    x = images(2, dtype)
    sigma = torch.full((2,), sigma_min, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(model(x, sigma, torch.zeros(2)), x)
        assert not torch.allclose(model(x, 2 * sigma, torch.zeros(2)), x, rtol=0, atol=1e-4)


def test_scalings_are_the_papers():
    sd, low = 0.5, 0.002
    c_skip, c_out, c_in, c_noise = ConsistencyModel(nn.Identity(), low, 80.0, sd).scalings(SIGMAS)
    for s, skip, out, scale, noise in zip(SIGMAS.tolist(), c_skip, c_out, c_in, c_noise, strict=True):
        assert float(skip) == pytest.approx(sd**2 / ((s - low) ** 2 + sd**2), rel=1e-12)
        assert float(out) == pytest.approx(sd * (s - low) / (sd**2 + s**2) ** 0.5, rel=1e-12)
        assert float(scale) == pytest.approx((sd**2 + s**2) ** -0.5, rel=1e-12)
        assert torch.exp(4 * noise) == pytest.approx(s, rel=1e-12)


def test_scalings_are_a_denoisers_when_the_trajectory_starts_at_zero():
    ours = ConsistencyModel(nn.Identity(), 0.0, 80.0).scalings(SIGMAS)
    for a, b in zip(ours, EDMPrecond(nn.Identity(), 0.0, 80.0).scalings(SIGMAS), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_output_is_the_affine_form_of_the_network():
    model = ConsistencyModel(network(torch.float64)).eval()
    x, sigma, cond = images(9, torch.float64), SIGMAS, Condition(label=torch.arange(9) % 3 - 1)
    c_skip, c_out, c_in, c_noise = (s[:, None, None, None] for s in model.scalings(sigma))
    with torch.no_grad():
        want = c_skip * x + c_out * model.network(c_in * x, c_noise.flatten(), cond)
        torch.testing.assert_close(model.start(x, sigma, cond), want, rtol=1e-12, atol=1e-12)
        assert torch.equal(model(x, sigma, torch.zeros(9), cond), model.start(x, sigma, cond))


def test_it_only_goes_to_zero():
    model = ConsistencyModel(network()).eval()
    assert isinstance(model, FlowMap)
    with pytest.raises(ValueError, match="only goes to sigma_to = 0"):
        model(images(2), torch.ones(2), torch.tensor([0.0, 0.5]))


def test_from_denoiser_copies_the_network():
    teacher = EDMPrecond(network(), sigma_min=0.01, sigma_max=50.0, sigma_data=0.4).eval().requires_grad_(False)
    student = ConsistencyModel.from_denoiser(teacher)
    assert (student.sigma_min, student.sigma_max, student.sigma_data) == (0.01, 50.0, 0.4)
    assert student.training
    assert not teacher.training
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    assert all(p.requires_grad for p in student.parameters())
    assert not any(p.requires_grad for p in teacher.parameters())
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_description_there_and_back():
    model = ConsistencyModel(network(), 0.01, 50.0, 0.4)
    back = build(describe(model))
    assert type(back) is ConsistencyModel
    assert describe(back) == describe(model)
