"""Flows: the same function as the denoiser that they are made of, in the coordinates of the straight path."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from imagewright.guidance import Guided, SkipScale, SkipTuned
from imagewright.methods.consistency import ConsistencyDistillation
from imagewright.methods.consistency_limits import ContinuousTimeDistillation
from imagewright.methods.consistency_trajectory import ConsistencyTrajectory
from imagewright.methods.continuous_consistency import ContinuousConsistencyDistillation
from imagewright.methods.distances import Distance
from imagewright.methods.dmd2 import DMD2
from imagewright.methods.f_distill import FDistill
from imagewright.methods.multistep_consistency import MultistepConsistencyDistillation
from imagewright.methods.progressive_distillation import ProgressiveDistillation
from imagewright.methods.uni_instruct import UniInstruct
from imagewright.models.acceleration import InitialVelocity
from imagewright.models.consistency import edm_teacher
from imagewright.models.description import build, describe
from imagewright.models.files import ModelFile, save_model
from imagewright.models.flow import SIGMA_MAX, SIGMA_MIN, EDMFlow, VelocityFlow, VPFlow, flow_of
from imagewright.models.judging import answer_and_maps, bottleneck
from imagewright.models.preconditioning import EDMPrecond, Preconditioned, VEPrecond, VPPrecond, iDDPMPrecond
from imagewright.models.recast import Recast
from imagewright.models.trajectory import TrajectoryModel
from imagewright.networks import SongUNet, SongUNetConfig
from imagewright.noise import StepNoise
from imagewright.paths.schedules import karras_sigmas
from imagewright.pretrained import find_model
from imagewright.samplers import SAMPLERS, Heun, Straight
from imagewright.samplers.generator import ImageGenerator, usual_sampler
from imagewright.types import Batch, Clock, Condition, DataSpec, Update, UserError

MU, S = 0.3, 0.4


def network() -> nn.Module:
    torch.manual_seed(0)
    config = SongUNetConfig(img_resolution=8, in_channels=1, out_channels=1, label_dim=3, model_channels=8,
                            channel_mult=(1,), num_blocks=1, attn_resolutions=(), dropout=0.2)  # fmt: skip
    made = SongUNet(config)
    for p in made.parameters():
        nn.init.normal_(p, std=0.1)
    return made


class Small(nn.Module):
    """A random function of image and noise label that costs nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        nn.init.normal_(self.conv.weight, std=0.003)  # smooth where x is as large as the noise

    def forward(self, x: Tensor, label: Tensor, cond: Condition) -> Tensor:
        answer: Tensor = torch.tanh(self.conv(x) + torch.tanh(label / 100)[:, None, None, None])
        return answer


def numbers(n: int, seed: int) -> Tensor:
    return torch.randn(n, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Exact(nn.Module):
    """EDM's F of the denoiser of N(MU, S^2)."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor, label: Tensor, cond: Condition) -> Tensor:
        sigma = (4 * label).exp()[:, None, None, None]
        total = sigma**2 + 0.25
        x = x * total.sqrt()
        mean = (S**2 * x + sigma**2 * MU) / (S**2 + sigma**2)
        return (mean - 0.25 / total * x) * total.sqrt() / (0.5 * sigma)


def exact_end(z: Tensor, sigma: float) -> Tensor:
    """Where the flow of N(MU, S^2) brings x = sigma z."""
    return MU + (sigma * z - MU) * S / (S**2 + sigma**2) ** 0.5


TEACHERS: dict[str, Callable[[nn.Module], Preconditioned]] = {
    "edm": lambda network: EDMPrecond(network, sigma_data=0.6, noise_label="angle"),
    "vp": lambda network: VPPrecond(network, beta_d=18.0),
    "ve": VEPrecond,
}


@pytest.mark.parametrize("kind", TEACHERS)
def test_a_flow_begins_as_its_teacher_and_goes_back(kind: str) -> None:
    teacher = TEACHERS[kind](network()).double().eval()
    flow = flow_of(teacher).eval()
    t = torch.linspace(0.1, 0.95, 6, dtype=torch.float64)
    sigma, cond = t / (1 - t), Condition(label=torch.arange(6) % 3)
    x = (1 + sigma)[:, None, None, None] * numbers(6, 1)
    want = teacher(x, sigma, cond)
    assert torch.equal(flow(x, sigma, cond), want)
    x_t, column = x * (1 - t)[:, None, None, None], t[:, None, None, None]
    v = flow.velocity(x_t, t, cond)
    torch.testing.assert_close(v, (x_t - want) / column, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(x_t - column * v, want, rtol=1e-5, atol=1e-5)
    assert {p.data_ptr() for p in flow.parameters()}.isdisjoint(p.data_ptr() for p in teacher.parameters())
    assert all(p.requires_grad for p in flow.parameters())
    again = build(describe(flow)).double().eval()
    again.load_state_dict(teacher.state_dict())
    assert type(again) is type(flow) and torch.equal(again(x, sigma, cond), want)


@pytest.mark.parametrize("kind", TEACHERS)
def test_the_dense_flow_ends_where_the_teachers_does(kind: str) -> None:
    teacher = TEACHERS[kind](Small()).double().eval()
    flow = flow_of(teacher).eval()
    z = numbers(2, 3)
    top, n = 60.0, 200
    # Through the same levels: once in steps of sigma, once in steps of the path's time.
    levels = karras_sigmas(n, 0.025, top)
    want = Heun(levels=tuple(levels.tolist()))(teacher, z)
    got = Straight(times=tuple((levels / (1 + levels)).tolist()))(flow, z)
    torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3)


def test_a_gaussians_flow_is_exact() -> None:
    flow = flow_of(EDMPrecond(Exact())).double()
    assert isinstance(flow, EDMFlow)
    z, t = numbers(5, 4), torch.tensor([1e-3, 0.2, 0.5, 0.9, 0.9999], dtype=torch.float64)
    column = t[:, None, None, None]
    x_t = (1 - column) * MU + column * z
    x, sigma = x_t / (1 - column), column / (1 - column)
    mean = (S**2 * x + sigma**2 * MU) / (S**2 + sigma**2)
    torch.testing.assert_close(flow.velocity(x_t, t), (x_t - mean) / column, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(Straight(num_steps=200)(flow, z), exact_end(z, SIGMA_MAX), rtol=1e-4, atol=1e-4)
    # Pure noise, where no sigma is finite: v = z - E[x0].
    torch.testing.assert_close(flow.velocity(z, torch.ones(5).double()), z - MU, rtol=1e-4, atol=1e-4)


def test_a_velocity_network_is_a_denoiser() -> None:
    flow = VelocityFlow(network().double()).eval()
    t = torch.tensor([0.0, 1e-4, 0.3, 0.9, 1.0], dtype=torch.float64)
    x_t, cond = numbers(5, 5), Condition(label=torch.arange(5) % 3)
    v = flow.velocity(x_t, t, cond)
    assert torch.equal(v, flow.network(x_t, 999 * t, cond))
    column, inside = t[:, None, None, None], slice(1, 4)
    got = flow((x_t / (1 - column))[inside], (t / (1 - t))[inside], cond[inside])
    torch.testing.assert_close(got, (x_t - column * v)[inside])
    again = build(describe(flow)).double().eval()
    again.load_state_dict(flow.state_dict())
    assert torch.equal(again.velocity(x_t, t, cond), v)
    assert (flow.sigma_min, flow.sigma_max) == (SIGMA_MIN, SIGMA_MAX)


def test_a_network_that_counts_from_the_noise_is_the_same_flow() -> None:
    """Told 1 - t, asked for x0 - z: a Gaussian's exact velocity in either convention is one denoiser."""

    class Velocity(nn.Module):
        def __init__(self, from_noise: bool) -> None:
            super().__init__()
            self.from_noise, self.one = from_noise, nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, x_t: Tensor, label: Tensor, cond: Condition) -> Tensor:
            t = (1 - label if self.from_noise else label)[:, None, None, None]
            slope = (t - (1 - t) * S**2) / ((1 - t) ** 2 * S**2 + t**2)
            velocity = -MU + slope * (x_t - (1 - t) * MU)
            return (-velocity if self.from_noise else velocity) * self.one

    x, sigma = numbers(4, 3), torch.tensor([1e-3, 0.3, 2.0, 50.0], dtype=torch.float64)
    column = sigma[:, None, None, None]
    exact = (S**2 * x + column**2 * MU) / (S**2 + column**2)
    for from_noise in (False, True):
        flow = VelocityFlow(Velocity(from_noise), time_scale=1.0, from_noise=from_noise).double()
        torch.testing.assert_close(flow(x, sigma), exact, rtol=1e-9, atol=1e-9)
        t = torch.tensor([0.0, 0.3, 0.9, 1.0], dtype=torch.float64)
        torch.testing.assert_close(flow.velocity(x, t)[-1], x[-1] - MU)  # at pure noise
        assert flow_of(flow).from_noise == from_noise


def test_a_flow_answers_in_its_input_s_floats() -> None:
    flow = VelocityFlow(network()).eval()
    x = numbers(2, 6)
    assert flow.velocity(x, torch.tensor([0.5, 0.6])).dtype == torch.float64
    assert flow.velocity(x.float(), torch.tensor([0.5, 0.6]).double()).dtype == torch.float32


def test_what_has_no_exact_flow_is_refused() -> None:
    with pytest.raises(UserError, match="the teacher is an iDDPMPrecond, which has no exact flow at every time"):
        flow_of(iDDPMPrecond(network(), M=10))
    with pytest.raises(UserError, match="a flow needs 0 < sigma_min < sigma_max < inf"):
        VPFlow(network(), sigma_min=0.0)


def test_dropout_of_a_flow_is_its_own() -> None:
    assert flow_of(EDMPrecond(network())).network.config.dropout == 0.0
    assert flow_of(EDMPrecond(network()), dropout=0.1).network.config.dropout == 0.1


# --- whatever takes a denoiser takes a flow -------------------------------------------------------------------------

FLOWS: dict[str, Callable[[], nn.Module]] = {
    "of a denoiser": lambda: flow_of(EDMPrecond(network())),
    "of fresh weights": lambda: VelocityFlow(network()),
    "of fresh weights through EDM's factors": lambda: EDMFlow(network()),
}
SPEC = DataSpec(name="toy", resolution=8, channels=1, num_classes=3)


@pytest.mark.parametrize("kind", FLOWS)
def test_every_sampler_and_wrapper_takes_a_flow(kind: str) -> None:
    flow = FLOWS[kind]().eval()
    names = [name for name, sampler in SAMPLERS.items() if sampler.model_kind == "denoiser"]
    assert len(names) > 8
    changed = Guided(SkipTuned(flow, SkipScale(bottom=0.8)), flow, weight=2.0)
    for name in names:
        made = {} if name in ("bespoke", "restart") else {"num_steps": 3}
        for model in (flow, changed):
            generator = ImageGenerator(model, SPEC, SAMPLERS[name](**made))  # type: ignore[arg-type]
            assert generator.at([0, 1], labels=[0, 2]).shape == (2, 8, 8, 1), name
    assert type(usual_sampler(flow)) is Straight


SOURCES: dict[str, Callable[[nn.Module], Preconditioned]] = {
    "edm flow": EDMFlow,
    "velocity": VelocityFlow,
    "vp": VPPrecond,
    "vp flow": VPFlow,
    "ve": VEPrecond,
    "initial velocity": lambda network: InitialVelocity(network, alpha=1.4),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_any_denoiser_of_every_level_is_one_with_edms_preconditioning(kind: str) -> None:
    source = SOURCES[kind](network()).eval()
    teacher = edm_teacher(source)
    assert type(teacher) is EDMPrecond
    assert (teacher.sigma_min, teacher.sigma_max) == (max(0.002, source.sigma_min), 80.0)
    sigma, cond = torch.tensor([0.021, 0.1, 0.7, 3.0, 20.0, 80.0]), Condition(label=torch.arange(6) % 3)
    x = (sigma**2 + 0.25).sqrt()[:, None, None, None] * numbers(6, 1).float()
    want = source(x, sigma, cond)
    torch.testing.assert_close(teacher(x, sigma, cond), want, rtol=2e-4, atol=2e-4)
    x, sigma = x.double(), sigma.double()
    torch.testing.assert_close(teacher.double()(x, sigma, cond), source(x, sigma, cond))
    again = build(describe(teacher)).double().eval()
    again.load_state_dict(teacher.state_dict())
    assert torch.equal(again(x, sigma, cond), teacher(x, sigma, cond))
    answer, maps = answer_and_maps(teacher, x, sigma, cond)
    assert torch.equal(answer, teacher(x, sigma, cond))
    torch.testing.assert_close(maps[-1], bottleneck(source, x, sigma, cond).double())


@pytest.mark.parametrize("kind", ["edm flow", "velocity", "vp flow", "initial velocity"])
def test_a_flow_begins_as_another_flow(kind: str) -> None:
    source = SOURCES[kind](network()).eval()
    flow, x, sigma = flow_of(source).eval(), numbers(2, 8).float(), torch.tensor([0.3, 5.0])
    assert type(flow) is type(source) and torch.equal(flow(x, sigma), source(x, sigma))
    assert {p.data_ptr() for p in flow.parameters()}.isdisjoint(p.data_ptr() for p in source.parameters())


def test_a_recast_network_is_told_where_to_go_in_its_own_words() -> None:
    flow = VelocityFlow(network()).eval()
    model = TrajectoryModel.from_denoiser(edm_teacher(flow)).eval()
    told: list[Tensor] = []
    model.network.network.embed_destination = lambda label, cond: told.append(label) or torch.zeros(len(label), 32)
    x, sigma, to = numbers(2, 1).float(), torch.tensor([5.0, 1.0]), torch.tensor([0.25, 0.5])
    torch.testing.assert_close(model.towards(x, sigma, to), flow(x, sigma), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(told[0], 999 * to / (1 + to), rtol=1e-5, atol=1e-3)


STUDENTS: dict[str, Any] = {
    "cd": ConsistencyDistillation(distance=Distance()),
    "ctcd": ContinuousTimeDistillation(),
    "ctm": ConsistencyTrajectory(distance=Distance(), adversarial=None),
    "scd": ContinuousConsistencyDistillation(),
    "mcd": MultistepConsistencyDistillation(),
    "pd": ProgressiveDistillation(),
    "dmd2": DMD2(),
    "uni": UniInstruct(),
    "f": FDistill(),
}


@pytest.mark.parametrize("name", STUDENTS)
def test_students_learn_from_a_flow_that_says_the_velocity(name: str) -> None:
    method, flow = STUDENTS[name], VelocityFlow(network()).eval().requires_grad_(False)
    parts = method.parts(teacher=flow, spec=SPEC)
    batch = Batch(numbers(2, 7).float(), Condition(label=torch.tensor([0, 2])))
    events = [e for e in method.step(parts, batch, StepNoise(0, 1), Clock(0, 0, 100)) if isinstance(e, Update)]
    assert events and all(torch.isfinite(e.loss).all() for e in events)
    product = getattr(parts, method.product)
    assert type(product.network) is Recast
    assert product.network.config.dropout == (0.2 if name == "uni" else 0.0)  # which keeps its teacher's
    assert {p.data_ptr() for p in product.parameters()}.isdisjoint(p.data_ptr() for p in flow.parameters())


@pytest.mark.parametrize("kind", FLOWS)
def test_a_flow_is_a_file(kind: str, tmp_path: Path) -> None:
    flow = FLOWS[kind]().eval()
    save_model(tmp_path, ModelFile(model=flow, spec=SPEC))
    again = find_model(str(tmp_path)).model.eval()
    x, sigma = numbers(2, 1).float(), torch.tensor([0.3, 20.0])
    assert type(again) is type(flow) and torch.equal(again(x, sigma), flow(x, sigma))
