"""The four preconditionings against the paper's table and identities; descriptions there and back."""

import json
import math

import pytest
import torch
from torch import Tensor, nn

from imagewright.models.description import MODELS, build, describe
from imagewright.models.preconditioning import EDMPrecond, VEPrecond, VPPrecond, iDDPMPrecond
from imagewright.networks import SongUNet, SongUNetConfig
from imagewright.types import UNCONDITIONAL, Condition, Denoiser, UserError

ALL = pytest.mark.parametrize("precond", [EDMPrecond, VPPrecond, VEPrecond, iDDPMPrecond])
SIGMAS = torch.logspace(-2, 2, 9, dtype=torch.float64)


class Constant(nn.Module):
    """A network that answers one number in every channel, and remembers what it was asked."""

    def __init__(self, value: float, out_channels: int = 3, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value, dtype=dtype))
        self.out_channels = out_channels

    def forward(self, x: Tensor, noise_label: Tensor, cond: Condition) -> Tensor:
        self.asked = (x, noise_label, cond)
        return self.value.expand(len(x), self.out_channels, *x.shape[2:])


def network(**changes) -> SongUNet:
    arguments = {
        "img_resolution": 8,
        "in_channels": 3,
        "out_channels": 3,
        "model_channels": 8,
        "channel_mult": (1, 2),
        "num_blocks": 1,
        "attn_resolutions": (4,),
    }
    return SongUNet(SongUNetConfig(**(arguments | changes)))


# --- table 1 ------------------------------------------------------------------------------------------------


def test_edm_scalings_keep_unit_variance():
    sd = 0.5
    c_skip, c_out, c_in, c_noise = EDMPrecond(nn.Identity(), sigma_data=sd).scalings(SIGMAS)
    one = torch.ones_like(SIGMAS)
    torch.testing.assert_close(c_in**2 * (sd**2 + SIGMAS**2), one)
    # The network's target is (x0 - c_skip (x0 + n)) / c_out.
    torch.testing.assert_close(((1 - c_skip) ** 2 * sd**2 + c_skip**2 * SIGMAS**2) / c_out**2, one)
    torch.testing.assert_close((SIGMAS**2 + sd**2) / (SIGMAS * sd) ** 2 * c_out**2, one)
    torch.testing.assert_close(c_noise, SIGMAS.log() / 4)


def test_edm_c_skip_minimises_c_out():
    sd = 0.7
    c_skip, c_out, _, _ = EDMPrecond(nn.Identity(), sigma_data=sd).scalings(SIGMAS)
    for other in (c_skip - 0.01, c_skip + 0.01):
        assert ((1 - other) ** 2 * sd**2 + other**2 * SIGMAS**2 > c_out**2).all()


def test_zero_network_is_the_optimal_denoiser_of_gaussian_data():
    sd = 0.5
    denoiser = EDMPrecond(Constant(0.0), sigma_data=sd)
    x = torch.randn(9, 3, 4, 4, dtype=torch.float64)
    want = x * (sd**2 / (sd**2 + SIGMAS**2))[:, None, None, None]
    torch.testing.assert_close(denoiser(x, SIGMAS), want)


def test_vp_scalings_and_times():
    denoiser = VPPrecond(nn.Identity())
    c_skip, c_out, c_in, c_noise = denoiser.scalings(SIGMAS)
    assert (c_skip == 1).all()
    assert torch.equal(c_out, -SIGMAS)
    torch.testing.assert_close(c_in, (SIGMAS**2 + 1) ** -0.5)
    t = torch.linspace(1e-3, 1, 50, dtype=torch.float64)
    torch.testing.assert_close(denoiser.sigma_inv(denoiser.sigma(t)), t)
    # alpha-bar of the linear schedule is exp(-integral of beta), and sigma^2 = 1 / alpha-bar - 1.
    torch.testing.assert_close(1 / (1 + denoiser.sigma(t) ** 2), torch.exp(-(0.1 * t + 19.9 * t**2 / 2)))
    torch.testing.assert_close(c_noise, 999 * denoiser.sigma_inv(SIGMAS))
    assert denoiser.sigma_max == pytest.approx(math.sqrt(math.exp(10.05) - 1), rel=1e-6)
    assert denoiser.sigma_min == 0.0009765625  # 1.0005e-3 but for float32


def test_ve_scalings():
    c_skip, c_out, c_in, c_noise = VEPrecond(nn.Identity()).scalings(SIGMAS)
    assert torch.equal(c_skip, torch.ones_like(SIGMAS))
    assert torch.equal(c_in, c_skip)
    assert torch.equal(c_out, SIGMAS)
    torch.testing.assert_close(c_noise, (SIGMAS / 2).log())


# --- iDDPM's table ------------------------------------------------------------------------------------------


def test_iddpm_table_is_the_cosine_schedule_where_the_ratio_is_not_clipped():
    denoiser = iDDPMPrecond(nn.Identity(), C_1=1e-9)
    j = torch.arange(1, 1001, dtype=torch.float64)
    alpha_bar = torch.sin(math.pi / 2 * j / 1000 / 1.008) ** 2
    # The recursion starts at u_M = 0 although alpha_bar there is just below 1.
    want = (alpha_bar[-1] / alpha_bar - 1).sqrt()
    torch.testing.assert_close(denoiser.u[1:-1].double(), want[:-1], rtol=1e-3, atol=0)
    assert denoiser.u[-1] == 0


def test_iddpm_knows_the_published_range():
    denoiser = iDDPMPrecond(nn.Identity())
    assert denoiser.u.shape == (1001,)
    assert (denoiser.u[:-1] > denoiser.u[1:]).all()
    assert denoiser.sigma_min == pytest.approx(0.0064, abs=1e-4)
    assert denoiser.sigma_max == pytest.approx(20291, abs=1)


def test_iddpm_rounds_to_the_nearest_entry():
    denoiser = iDDPMPrecond(nn.Identity())
    u = denoiser.u
    assert torch.equal(denoiser.round_sigma(u), u)
    assert torch.equal(denoiser.round_sigma(u, return_index=True), torch.arange(1001))
    near = u[500:600] + 0.4 * (u[499:599] - u[500:600])
    assert torch.equal(denoiser.round_sigma(near), u[500:600])
    far = u[500:600] + 0.6 * (u[499:599] - u[500:600])
    assert torch.equal(denoiser.round_sigma(far), u[499:599])
    assert denoiser.round_sigma(torch.tensor(1e9)).shape == ()
    assert denoiser.round_sigma(torch.tensor([[1e9]], dtype=torch.float64)).dtype == torch.float64
    assert denoiser.round_sigma(torch.tensor([1e9])).item() == u[0]


def test_iddpm_counts_noise_levels_upwards_and_drops_the_variance():
    net = Constant(1.0, out_channels=6)
    denoiser = iDDPMPrecond(net)
    x = torch.zeros(2, 3, 4, 4, dtype=torch.float64)
    sigma = denoiser.u[torch.tensor([0, 990])].double()
    got = denoiser(x, sigma)
    assert net.asked[1].tolist() == [999, 9]
    torch.testing.assert_close(got, -sigma[:, None, None, None].expand_as(x))


def test_others_do_not_round():
    for precond in (EDMPrecond, VPPrecond, VEPrecond):
        assert torch.equal(precond(nn.Identity()).round_sigma(SIGMAS), SIGMAS)


# --- the affine part ----------------------------------------------------------------------------------------


@ALL
def test_denoiser_is_affine_in_the_network(precond):
    net = Constant(0.3)
    denoiser = precond(net)
    assert isinstance(denoiser, Denoiser)
    x = torch.randn(9, 3, 2, 2, dtype=torch.float64)
    cond = Condition(label=torch.arange(9))
    got = denoiser(x, SIGMAS, cond)
    s = denoiser.scalings(SIGMAS)
    torch.testing.assert_close(got, x * s.c_skip.view(-1, 1, 1, 1) + 0.3 * s.c_out.view(-1, 1, 1, 1))
    torch.testing.assert_close(net.asked[0], x * s.c_in.view(-1, 1, 1, 1))
    torch.testing.assert_close(net.asked[1], s.c_noise)
    assert net.asked[2] is cond


@ALL
def test_one_sigma_serves_all_images(precond):
    denoiser = precond(Constant(0.3))
    x = torch.randn(3, 3, 2, 2, dtype=torch.float64)
    want = denoiser(x, torch.full((3,), 0.7))
    assert torch.equal(denoiser(x, torch.tensor(0.7)), want)
    assert torch.equal(denoiser(x, torch.tensor([0.7])), want)
    with pytest.raises(ValueError, match=r"sigma has shape \(2,\); it must be \[3\]"):
        denoiser(x, torch.ones(2))


def test_affine_part_is_float32_around_a_half_precision_network():
    net = Constant(0.25, dtype=torch.bfloat16)
    x = torch.randn(2, 3, 2, 2)
    got = EDMPrecond(net)(x, torch.tensor([0.1, 3.0]))
    want = EDMPrecond(Constant(0.25))(x.double(), torch.tensor([0.1, 3.0]).double())
    assert net.asked[0].dtype == torch.bfloat16
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want.float())


def test_output_has_the_dtype_of_the_input():
    denoiser = EDMPrecond(network())
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert denoiser(x, torch.ones(2, dtype=torch.float64)).dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert denoiser(x.float(), torch.ones(2)).dtype == torch.float32


def test_derivative_along_the_noise_level():
    denoiser = EDMPrecond(network(dropout=0.0).double())
    x, sigma = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor([0.3, 4.0], dtype=torch.float64)
    _, tangent = torch.func.jvp(lambda s: denoiser(x, s, UNCONDITIONAL), (sigma,), (torch.ones_like(sigma),))
    want = (denoiser(x, sigma + 1e-6) - denoiser(x, sigma - 1e-6)) / 2e-6
    torch.testing.assert_close(tangent, want, rtol=1e-5, atol=1e-7)


# --- descriptions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    [
        EDMPrecond(network(), sigma_min=0, sigma_max=math.inf, sigma_data=0.4),
        VPPrecond(network(), beta_d=15.0, M=500),
        VEPrecond(network(label_dim=3), sigma_max=50),
        iDDPMPrecond(network(out_channels=6), C_2=0.01, M=20),
        network(encoder_type="residual", resample_filter=(1, 3, 3, 1)),
    ],
    ids=lambda model: type(model).__name__,
)
def test_description_builds_the_same_model(model):
    written = json.dumps(describe(model), allow_nan=False)
    again = build(json.loads(written))
    assert json.dumps(describe(again)) == written
    again.load_state_dict(model.state_dict())
    if isinstance(model, Denoiser):
        assert (again.sigma_min, again.sigma_max) == (model.sigma_min, model.sigma_max)
        x, sigma = torch.randn(2, 3, 8, 8), torch.tensor([0.2, 3.0])
        assert torch.equal(again.eval()(x, sigma), model.eval()(x, sigma))


def test_table_names_every_class_as_it_names_itself():
    assert all(name == model.__name__ for name, model in MODELS.items())


@pytest.mark.parametrize(
    ("description", "sentence"),
    [
        ({"class": "EDMPrecon"}, "no model or network is called 'EDMPrecon'; did you mean 'EDMPrecond'"),
        ({"class": "os.system"}, "no model or network is called 'os.system'; known are"),
        ({"klass": "EDMPrecond"}, 'must be an object with a "class"'),
        ([], 'must be an object with a "class"'),
        ({"class": "EDMPrecond"}, "EDMPrecond needs network"),
        (
            {"class": "EDMPrecond", "sigmamin": 1},
            "EDMPrecond has no argument 'sigmamin'; did you mean 'sigma_min'",
        ),
        ({"class": "SongUNet", "img_resolution": 8}, 'SongUNet is described by a "config" object alone'),
        (
            {"class": "SongUNet", "config": {"in_channels": 3}},
            "SongUNetConfig needs img_resolution, out_channels",
        ),
    ],
)
def test_broken_descriptions_are_refused(description, sentence):
    with pytest.raises(UserError, match=sentence):
        build(description)


def test_what_cannot_describe_itself_says_so():
    with pytest.raises(TypeError, match="Linear cannot describe itself"):
        describe(nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("precond", "arguments", "sentence"),
    [
        (EDMPrecond, {"sigma_min": 1, "sigma_max": 1}, "must satisfy 0 <= sigma_min < sigma_max"),
        (EDMPrecond, {"sigma_min": -1}, "must satisfy 0 <= sigma_min < sigma_max"),
        (EDMPrecond, {"sigma_data": 0}, "sigma_data is 0; it must be positive"),
        (EDMPrecond, {"sigma_max": "large"}, "sigma_max is 'large'; it must be a number"),
        (VEPrecond, {"sigma_min": 200}, "sigma_min is 200.0 and sigma_max is 100.0"),
        (VPPrecond, {"beta_d": 0}, "beta_d is 0; it must be positive"),
        (iDDPMPrecond, {"M": 1}, "M is 1; it must be an integer from 2 to 10000"),
    ],
)
def test_settings_out_of_range_are_refused(precond, arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        precond(nn.Identity(), **arguments)
