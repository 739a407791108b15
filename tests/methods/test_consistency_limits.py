"""Consistency in continuous time: the tangent and both gradients against differences, and what is exactly zero."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from imagewright.methods.consistency_limits import ContinuousTimeDistillation, ContinuousTimeTraining, tangent
from imagewright.methods.pairs import heun_step
from imagewright.models.consistency import ConsistencyModel
from imagewright.models.preconditioning import EDMPrecond
from imagewright.networks import SongUNet, SongUNetConfig
from imagewright.noise import StepNoise
from imagewright.types import UNCONDITIONAL, Batch, Clock, Condition, DataSpec, Frozen, Parts, Trained, UserError

SPEC = DataSpec(name="toy", resolution=8, channels=1, num_classes=3)
COND = Condition(label=torch.tensor([0, 2, -1, 1]))
LEVELS = torch.tensor([0.003, 0.3, 2.0, 79.0], dtype=torch.float64)
CLOCK = Clock(5, 500, 1000)
LOW, HIGH, SD = 0.002, 80.0, 0.5


def column(t: Tensor) -> Tensor:
    return t[:, None, None, None]


def unet(seed: int = 0, dropout: float = 0.0) -> nn.Module:
    """A small network with attention whose output layers are not near zero, in float64."""
    torch.manual_seed(seed)
    network = SongUNet(
        SongUNetConfig(img_resolution=8, in_channels=1, out_channels=1, label_dim=3, attn_resolutions=(4,),
                       dropout=dropout, model_channels=16, channel_mult=(1, 1), num_blocks=1)
    )  # fmt: skip
    for p in network.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=p[0].numel() ** -0.5)
    return network.double()


def images(n: int = 4) -> Tensor:
    return SD * StepNoise(1).normal(torch.empty(n, 1, 8, 8, dtype=torch.float64))


def distillation_parts(dropout: float = 0.0) -> Parts:
    """A student that is not its teacher."""
    teacher = EDMPrecond(unet(1)).eval()
    return Parts(student=Trained(module=ConsistencyModel(unet(0, dropout))), teacher=Frozen(module=teacher))


class Gaussian(nn.Module):
    """F of the exact flow map f(x, t) = x sqrt((smin^2 + sd^2) / (t^2 + sd^2)) of N(0, sd^2), times w = 1."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor, noise_label: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        t = torch.exp(4 * noise_label)
        s = ConsistencyModel(nn.Identity()).scalings(t)
        factor = torch.sqrt((LOW**2 + SD**2) / (t**2 + SD**2))
        return self.w * column((factor - s.c_skip) / (s.c_out * s.c_in)) * x


class Still(nn.Module):
    """The exact denoiser of N(0, sd^2)."""

    def forward(self, x: Tensor, sigma: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        return column(SD**2 / (sigma**2 + SD**2)) * x


def gradient(loss: Tensor, student: nn.Module) -> Tensor:
    taken = torch.autograd.grad(loss, list(student.parameters()), allow_unused=True)
    return torch.cat([g.flatten() for g in taken if g is not None])


def test_tangent_is_the_derivative_along_the_flow() -> None:
    model = ConsistencyModel(unet())
    x, velocity = column(LEVELS) * images(), StepNoise(2).normal(images())
    with torch.no_grad():
        f, g = tangent(model, x, LEVELS, velocity, COND)
        h = 1e-6 * LEVELS
        ahead, behind = (model.start(x + column(s * h) * velocity, LEVELS + s * h, COND) for s in (1, -1))
    torch.testing.assert_close(f, model.start(x, LEVELS, COND).detach(), rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(g, (ahead - behind) / column(2 * h), strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-6


def test_the_tangent_can_be_differentiated_in_the_weights() -> None:
    """Directional derivative of |g|^2 in a random direction of weight space, against central differences."""
    model = ConsistencyModel(unet())
    x, velocity = column(LEVELS) * images(), StepNoise(2).normal(images())
    direction = StepNoise(4).normal(nn.utils.parameters_to_vector(model.parameters()).detach())

    def loss(model: ConsistencyModel) -> Tensor:
        return tangent(model, x, LEVELS, velocity, COND)[1].square().mean()

    ours = float(gradient(loss(model), model) @ direction)
    values, weights = [], nn.utils.parameters_to_vector(model.parameters()).detach()
    for s in (1, -1):
        moved = copy.deepcopy(model)
        nn.utils.vector_to_parameters(weights + s * 1e-6 * direction, moved.parameters())
        values.append(float(loss(moved).detach()))
    assert ours == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5)


@pytest.mark.parametrize("stop_gradient", [False, True])
@pytest.mark.parametrize("metric", ["l2", "norm", "l1"])
def test_the_exact_flow_map_of_gaussian_data_has_no_tangent(metric: str, stop_gradient: bool) -> None:
    method = ContinuousTimeDistillation(metric=metric, stop_gradient=stop_gradient)  # type: ignore[arg-type]
    student = ConsistencyModel(Gaussian())
    parts = Parts(student=Trained(module=student), teacher=Frozen(module=Still()))
    [update] = method.step(parts, Batch(images(64)), StepNoise(3), CLOCK)
    size = update.parts["tangent"] if stop_gradient else update.loss  # type: ignore[union-attr]
    exact = float(size.detach().abs().max())
    with torch.no_grad():
        student.network.w.mul_(1.5)
    [update] = method.step(parts, Batch(images(64)), StepNoise(3), CLOCK)
    size = update.parts["tangent"] if stop_gradient else update.loss  # type: ignore[union-attr]
    assert exact < 1e-9 and float(size.detach().mean()) > 1e-3


def drawn(method: ContinuousTimeDistillation | ContinuousTimeTraining, batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x_t, t and z of a step from StepNoise(3)."""
    noise = StepNoise(3)
    t = method.noise_levels(LOW, HIGH, batch, noise)
    z = noise.normal(batch)
    return batch + column(t) * z, t, z


@pytest.mark.parametrize("metric", ["l2", "l1"])
@pytest.mark.parametrize("stop_gradient", [False, True])
def test_the_loss_is_the_limit_of_neighbours_on_a_fine_grid(metric: str, stop_gradient: bool) -> None:
    """Gradients of d(f(x_t, t), f(x_t', t')) / h^2 (l1: / h), t' = t - h after a Heun step, tend to the method's."""
    method = ContinuousTimeDistillation(metric=metric, stop_gradient=stop_gradient)  # type: ignore[arg-type]
    parts = distillation_parts()
    [update] = method.step(parts, Batch(images(), COND), StepNoise(3), CLOCK)
    ours = gradient(update.loss.sum(), parts.student)  # type: ignore[union-attr]
    x, t, _ = drawn(method, images())
    errors = []
    for share in (1e-2, 1e-3, 1e-4):
        h = share * t
        x_next = heun_step(parts.teacher, x, t, t - h, COND).detach()
        aim = parts.student.start(x_next, t - h, COND)
        change = (parts.student.start(x, t, COND) - (aim.detach() if stop_gradient else aim)).flatten(1)
        loss = change.square().mean(1) / h**2 if metric == "l2" else change.abs().mean(1) / h
        if stop_gradient:  # the gradient of one side alone is smaller by another h
            loss = loss * h
        theirs = gradient(loss.sum(), parts.student)
        errors.append(float((ours - theirs).norm() / ours.norm()))
    if metric == "l2":
        assert errors[0] / errors[1] == pytest.approx(10, rel=0.5) and errors[2] < 1e-2
    else:  # numbers whose sign turns within h make it slower
        assert errors[2] <= errors[1] <= errors[0] and errors[2] < 0.05


def test_norm_is_the_root_of_the_sum() -> None:
    g = StepNoise(7).normal(images())
    method = ContinuousTimeDistillation(metric="norm")
    torch.testing.assert_close(method.size(g) ** 2 / 64, ContinuousTimeDistillation().size(g))
    parts, pulled = distillation_parts(), ContinuousTimeDistillation(metric="norm", stop_gradient=True)
    [update] = pulled.step(parts, Batch(images(), COND), StepNoise(3), CLOCK)
    x, t, _ = drawn(pulled, images())
    velocity = ((x - parts.teacher(x, t, COND)) / column(t)).detach()
    g = tangent(parts.student, x, t, velocity, COND)[1].detach()
    loss = (g / column(g.flatten(1).norm(dim=1)) * parts.student.start(x, t, COND)).sum()
    torch.testing.assert_close(gradient(update.loss.sum(), parts.student), gradient(loss, parts.student))  # type: ignore[union-attr]


def test_training_has_distillations_gradient_in_the_mean() -> None:
    """For Gaussian data: the noise's velocity has the flow's as its mean given x, so the mean gradients agree."""
    student = ConsistencyModel(Gaussian())
    with torch.no_grad():
        student.network.w.zero_()
    parts = Parts(student=Trained(module=student), teacher=Frozen(module=Still()))
    taken: list[list[float]] = []
    for method in (ContinuousTimeTraining(), ContinuousTimeDistillation(stop_gradient=True)):
        batches = [SD * StepNoise(k).normal(torch.empty(2000, 1, 8, 8, dtype=torch.float64)) for k in range(30)]
        events = [next(method.step(parts, Batch(b), StepNoise(3, k), CLOCK)) for k, b in enumerate(batches)]
        taken.append([float(gradient(e.loss.mean(), student)) for e in events])  # type: ignore[union-attr]
    ours, theirs = torch.tensor(taken)
    error = float((ours - theirs).std()) / math.sqrt(30)
    assert float((ours - theirs).abs().max()) > 0
    assert abs(float((ours - theirs).mean())) < 4 * error < 0.2 * abs(float(theirs.mean()))


def test_training_without_stop_gradient_would_be_another_loss() -> None:
    """Why training has no such option: the noise's own velocity adds its variance to |g|^2, at the exact map too."""
    student, batch = ConsistencyModel(Gaussian()), images(64)
    x, t, z = drawn(ContinuousTimeTraining(), batch)
    assert float(tangent(student, x, t, z, UNCONDITIONAL)[1].detach().square().mean()) > 1e-2


def test_the_law_of_t_is_the_grids() -> None:
    t = ContinuousTimeTraining().noise_levels(
        LOW, HIGH, torch.empty(20_000, 1, 1, 1, dtype=torch.float64), StepNoise(1)
    )
    assert float(t.min()) >= LOW and float(t.max()) <= HIGH
    share = (t ** (1 / 7) - LOW ** (1 / 7)) / (HIGH ** (1 / 7) - LOW ** (1 / 7))
    counts = torch.histc(share, 10, 0, 1)
    assert float((counts - 2000).abs().max()) < 4 * math.sqrt(1800)


@pytest.mark.parametrize("method", [ContinuousTimeDistillation(stop_gradient=True), ContinuousTimeTraining()])
def test_dropout_is_the_same_in_tangent_and_output(method: ContinuousTimeDistillation | ContinuousTimeTraining) -> None:
    """The network draws its masks from torch's generator: both passes have to find it in the same state."""
    parts, states = distillation_parts(dropout=0.5), []
    plain = parts.student.network.forward

    def forward(*args: object) -> Tensor:
        states.append(torch.get_rng_state())
        answer: Tensor = plain(*args)
        return answer

    parts.student.network.forward = forward
    list(method.step(parts, Batch(images(), COND), StepNoise(3), CLOCK))
    assert len(states) == 2 and torch.equal(*states)


@pytest.mark.parametrize("stop_gradient", [False, True])
def test_only_the_student_learns(stop_gradient: bool) -> None:
    teacher = EDMPrecond(unet(1, dropout=0.2)).eval()
    method = ContinuousTimeDistillation(stop_gradient=stop_gradient)
    parts = method.parts(teacher=teacher, spec=SPEC)
    assert isinstance(parts.student, ConsistencyModel) and isinstance(parts.roles["teacher"], Frozen)
    parts.teacher.requires_grad_(True)
    [update] = method.step(parts, Batch(images(), COND), StepNoise(3), CLOCK)
    assert update.part == "student" and update.loss.shape == update.at.shape == (4,)  # type: ignore[union-attr]
    update.loss.sum().backward()  # type: ignore[union-attr]
    assert all(p.grad is None for p in parts.teacher.parameters())
    assert all(bool(torch.isfinite(p.grad).all()) for p in parts.student.parameters() if p.grad is not None)
    assert sum(float(p.grad.abs().sum()) for p in parts.student.parameters() if p.grad is not None) > 0


def test_the_students_dropout_can_be_set() -> None:
    teacher = EDMPrecond(unet(1, dropout=0.1)).eval()
    for asked, want in ((0.3, 0.3), (0.0, 0.0)):
        parts = ContinuousTimeDistillation(dropout=asked).parts(teacher=teacher, spec=SPEC)
        assert parts.student.network.config.dropout == want and parts.student.training
        for name, value in teacher.state_dict().items():
            assert torch.equal(value, parts.student.state_dict()[name])
        x = images().requires_grad_(True)
        twice = [parts.student.start(x, LEVELS, COND) for _ in range(2)]
        assert torch.equal(*twice) == (want == 0)
    with pytest.raises(UserError, match="a Gaussian, has no dropout to set"):
        ContinuousTimeDistillation(dropout=0.1).parts(teacher=EDMPrecond(Gaussian()), spec=SPEC)


def test_bad_settings_and_tangents_get_one_sentence() -> None:
    for cls, settings, sentence in (
        (ContinuousTimeDistillation, {"metric": "lpips"}, "method.metric is 'lpips'; allowed: l2, norm, l1"),
        (ContinuousTimeDistillation, {"dropout": 1.0}, r"method.dropout is 1.0; it must lie in \[0, 1\)"),
        (ContinuousTimeDistillation, {"rho": 0.0}, "method.rho is 0.0; it must be positive and finite"),
        (ContinuousTimeTraining, {"rho": math.nan}, "method.rho is nan"),
        (ContinuousTimeTraining, {"metric": "l1"}, "method.metric is 'l1'; training without a teacher allows l2 alone"),
        (ContinuousTimeTraining, {"sigma_min": 0.0}, "method.sigma_min is 0.0 and sigma_max is 80.0"),
        (ContinuousTimeTraining, {"sigma_data": -1.0}, "method.sigma_data is -1.0"),
    ):
        with pytest.raises(UserError, match=sentence):
            cls(**settings)  # type: ignore[arg-type]
    parts = distillation_parts()
    with torch.no_grad():
        next(parts.student.parameters()).fill_(torch.nan)
    for stop_gradient in (False, True):
        method = ContinuousTimeDistillation(stop_gradient=stop_gradient)
        with pytest.raises(UserError, match="the tangent is not finite at 4 of 4 images, the first at sigma"):
            list(method.step(parts, Batch(images(), COND), StepNoise(3), CLOCK))
