"""sCM: the tangent against finite differences and closed forms, the loss's gradient, the weighting, the warm-up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from imagewright.methods.continuous_consistency import (
    ContinuousConsistencyDistillation,
    ContinuousConsistencyTraining,
    tangent,
    trig_output,
    trig_velocity,
)
from imagewright.methods.edm import loss_weight
from imagewright.models.consistency import ConsistencyModel, ContinuousConsistencyModel
from imagewright.models.preconditioning import EDMPrecond
from imagewright.networks import DhariwalUNet, DhariwalUNetConfig, SongUNet, SongUNetConfig
from imagewright.networks.time_weight import TimeWeight
from imagewright.noise import StepNoise
from imagewright.paths.noise_levels import LogNormal
from imagewright.types import UNCONDITIONAL, Batch, Clock, Condition, DataSpec, Frozen, Parts, Trained, UserError

SPEC = DataSpec(name="toy", resolution=8, channels=1, num_classes=3)
SD = 0.5
COND = Condition(label=torch.tensor([0, 2, -1, 1]))
T = torch.tensor([0.004, 0.3, 1.0, 1.55], dtype=torch.float64)
CLOCK = Clock(5, 500, 1000)


def column(t: Tensor) -> Tensor:
    return t[:, None, None, None]


def unet(kind: str = "song", **more: object) -> nn.Module:
    """A small network with attention whose output layers are not near zero."""
    config, cls = (SongUNetConfig, SongUNet) if kind == "song" else (DhariwalUNetConfig, DhariwalUNet)
    sizes = {"model_channels": 16 if kind == "song" else 64, "channel_mult": (1, 1), "num_blocks": 1}
    torch.manual_seed(0)
    network = cls(
        config(img_resolution=8, in_channels=1, out_channels=1, label_dim=3, attn_resolutions=(4,), dropout=0.0,
               **sizes, **more)  # type: ignore[arg-type]
    )  # fmt: skip
    for p in network.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=p[0].numel() ** -0.5)
    return network.double()


def x_t() -> Tensor:
    return SD * StepNoise(1).normal(torch.empty(4, 1, 8, 8, dtype=torch.float64))


def start_in_trig(model: ContinuousConsistencyModel, x: Tensor, t: Tensor) -> Tensor:
    """f through the model's own face, in EDM coordinates."""
    return model.start(x / column(t.cos()), SD * t.tan(), COND)


@pytest.mark.parametrize("label", ["log", "angle"])
@pytest.mark.parametrize(("kind", "double"), [("song", False), ("song", True), ("adm", True)])
def test_tangent_is_the_derivative_along_the_flow(label: str, kind: str, double: bool) -> None:
    model = ContinuousConsistencyModel(unet(kind, double_norm=double), 0.002, 80.0, SD, label).eval()  # type: ignore[arg-type]
    x, velocity, h = x_t(), StepNoise(2).normal(x_t()), 1e-5
    with torch.no_grad():
        g = tangent(model, x, T, velocity, COND, r=1.0)
        ahead, behind = (start_in_trig(model, x + s * h * velocity, T + s * h) for s in (1, -1))
    change = column(T.cos()) * (ahead - behind) / (2 * h)
    for ours, theirs in zip(g, change, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-4


def test_start_is_the_image_itself_without_noise() -> None:
    model = ContinuousConsistencyModel(unet(), 0.002, 80.0, SD, "angle").eval()
    x = x_t()
    with torch.no_grad():
        assert torch.equal(model.start(x, torch.zeros(4, dtype=torch.float64), COND), x)
        assert torch.equal(model(x, torch.zeros(4, dtype=torch.float64), torch.zeros(4), COND), x)


@pytest.mark.parametrize("label", ["log", "angle"])
def test_edm_and_trigflow_are_the_same_network(label: str) -> None:
    """The velocity of an EDM denoiser in TrigFlow's time is sd F, and its diffusion loss is EDM's times sd^2."""
    denoiser = EDMPrecond(unet(), 0.002, 80.0, SD, label).eval()  # type: ignore[arg-type]
    student = ContinuousConsistencyModel.from_denoiser(denoiser).eval()
    x = x_t()
    with torch.no_grad():
        f = trig_output(student, x, T, COND)
        velocity = trig_velocity(denoiser, x, T, SD, COND)
        torch.testing.assert_close(velocity, SD * f, rtol=1e-7, atol=1e-9)
        x0, z = x_t(), SD * StepNoise(5).normal(x)
        noisy = column(T.cos()) * x0 + column(T.sin()) * z
        trig = SD * trig_output(student, noisy, T, COND) - (column(T.cos()) * z - column(T.sin()) * x0)
        edm = denoiser(noisy / column(T.cos()), SD * T.tan(), COND) - x0
    ours, theirs = (e.square().flatten(1).sum(1) for e in (trig, edm))
    torch.testing.assert_close(ours, SD**2 * loss_weight(SD * T.tan(), SD) * theirs, rtol=1e-7, atol=1e-9)


class ExactMap(nn.Module):
    """-F of the consistency map f(x, t) = x of N(0, sd^2): F = (cos t - 1) x / (sd sin t)."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor, noise_label: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        t = column(noise_label)
        return -self.w * (t.cos() - 1) * x / t.sin()


def test_the_exact_map_of_gaussian_data_has_no_tangent() -> None:
    """Every trajectory of N(0, sd^2) is constant in TrigFlow: the velocity is 0, and f(x, t) = x."""
    model = ContinuousConsistencyModel(ExactMap(), 0.002, 80.0, SD, "angle")
    x = x_t()
    g = tangent(model, x, T, torch.zeros_like(x), UNCONDITIONAL, r=1.0)
    assert float(g.detach().abs().max()) < 1e-14
    torch.testing.assert_close(model.start(x / column(T.cos()), SD * T.tan()), x)


def learn(method: ContinuousConsistencyTraining, clock: Clock = CLOCK, **more: object) -> tuple[Parts, list]:
    torch.manual_seed(1)
    parts = method.parts(network=unet(**more), spec=SPEC)  # type: ignore[arg-type]
    parts.weighting.double()
    batch = Batch(x_t(), COND)
    return parts, list(method.step(parts, batch, StepNoise(3), clock))


def seen(method: ContinuousConsistencyTraining, parts: Parts, r: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_t, t, velocity and tangent of the step that `learn` runs, from the same noise."""
    noise, images = StepNoise(3), x_t()
    sigma = method.noise_levels.sample(noise, images[:, 0, 0, 0]).clamp(0.002, 80.0)
    t, z = torch.atan(sigma / SD), SD * noise.normal(images)
    x = column(t.cos()) * images + column(t.sin()) * z
    velocity = column(t.cos()) * z - column(t.sin()) * images
    with torch.no_grad():
        return x, t, velocity, tangent(parts.student, x, t, velocity, COND, r)


def test_the_gradient_is_that_of_the_tangent() -> None:
    """With w at its optimum the gradient of an image's loss is -2 g^T dF, whatever its noise level."""
    method = ContinuousConsistencyTraining(warmup=0.0)
    parts, (student, _) = learn(method)
    x, t, _, g = seen(method, parts, r=1.0)
    g = method.stabilised(g)
    ours = torch.autograd.grad(student.loss.sum(), list(parts.student.parameters()))
    f = trig_output(parts.student, x, t, COND)
    theirs = torch.autograd.grad((-2 * g * f).sum(), list(parts.student.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("after", [None, 0.7])
def test_the_loss_is_the_papers(after: float | None) -> None:
    """e^w / (sd tan t) |F - F^- - g|^2 / D - w with w = ln(sigma D) + v; v = 0 at first, here also 0.7."""
    method = ContinuousConsistencyTraining(warmup=0.0)
    torch.manual_seed(1)
    parts = method.parts(network=unet(), spec=SPEC)
    parts.weighting.double()
    if after is not None:
        parts.weighting.linear.bias.data.fill_(after)
    student, weighting = method.step(parts, Batch(x_t(), COND), StepNoise(3), CLOCK)
    _, t, _, g = seen(method, parts, r=1.0)
    sigma, values = SD * t.tan(), g[0].numel()
    w = (sigma * values).log() + (after or 0.0)
    error = method.stabilised(g).square().flatten(1).mean(1)
    torch.testing.assert_close(student.loss.detach(), w.exp() / sigma * error)
    wanted = w.exp() / sigma * error - w
    torch.testing.assert_close(weighting.loss.detach() - wanted, (sigma * values).log())  # free of all weights


def test_the_weight_starts_at_its_optimum() -> None:
    """Of e^w E - w, E = 1 / (sigma D) for tangents of length one: nothing is left for the weighting to learn."""
    method = ContinuousConsistencyTraining(warmup=0.0, tangent_c=1e-12)
    parts, (student, weighting) = learn(method)
    torch.testing.assert_close(student.loss.detach(), torch.ones(4, dtype=torch.float64))
    for slope in torch.autograd.grad(weighting.loss.sum(), list(parts.weighting.parameters())):
        assert float(slope.abs().max()) < 1e-9


def test_before_the_warm_up_it_is_diffusion_training() -> None:
    method = ContinuousConsistencyTraining(tangent="none")
    parts, (student, _) = learn(method, Clock(0, 0, 1000))
    x, t, velocity, _ = seen(method, parts, r=0.0)
    ours = torch.autograd.grad(student.loss.sum(), list(parts.student.parameters()))
    error = (SD * trig_output(parts.student, x, t, COND) - velocity).square().flatten(1).sum(1)
    theirs = torch.autograd.grad(t.cos() ** 2 / SD @ error, list(parts.student.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_the_warm_up_is_a_share_of_the_run() -> None:
    """A shorter run is no less warm at its end."""
    method = ContinuousConsistencyTraining(warmup=0.2)
    for total in (100, 5000):
        shares = [method.ramp(Clock(0, int(total * share), total)) for share in (0.0, 0.05, 0.2, 0.9)]
        assert shares == pytest.approx([0.0, 0.25, 1.0, 1.0])
    assert replace(method, warmup=0.0).ramp(Clock(0, 0, 10)) == 1.0


def test_tangents_are_bounded() -> None:
    g = 1e4 * x_t()
    normalised = ContinuousConsistencyTraining().stabilised(g)
    assert (normalised.flatten(1).norm(dim=1) < 1).all() and (normalised.flatten(1).norm(dim=1) > 0.99).all()
    small = ContinuousConsistencyTraining(tangent_c=0.1).stabilised(1e-9 * g)
    torch.testing.assert_close(small, 1e-8 * g, rtol=1e-2, atol=0)
    assert float(ContinuousConsistencyTraining(tangent="clip").stabilised(g).abs().max()) == 1
    assert torch.equal(ContinuousConsistencyTraining(tangent="none").stabilised(g), g)


def test_the_weighting_finds_the_size_of_the_error() -> None:
    """The best w of e^w * error - w is -ln(error), at every level."""
    head = TimeWeight().double()
    assert torch.equal(head(T), torch.zeros(4, dtype=torch.float64))
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    t = torch.linspace(0.05, 1.5, 64, dtype=torch.float64)
    error = (2 * t).exp()
    for _ in range(400):
        optimizer.zero_grad()
        w = head(t)
        (w.exp() * error - w).mean().backward()
        optimizer.step()
    assert float((head(t) + error.log()).detach().abs().max()) < 0.2


def test_dropout_is_the_same_in_tangent_and_output() -> None:
    """The network draws its masks from torch's generator: both passes have to find it in the same state."""
    method = ContinuousConsistencyTraining(warmup=0.0)
    parts = method.parts(network=unet(), spec=SPEC)
    parts.weighting.double()
    states: list[Tensor] = []
    network = parts.student.network
    plain = network.forward

    def forward(*args: object) -> Tensor:
        states.append(torch.get_rng_state())
        torch.rand(3)  # as dropout would
        return plain(*args)

    network.forward = forward
    list(method.step(parts, Batch(x_t(), COND), StepNoise(3), CLOCK))
    assert len(states) == 2 and torch.equal(*states)


def test_half_precision_is_the_network_s_alone() -> None:
    """The tangent is in full precision whatever the trainer has around the step."""
    method = ContinuousConsistencyTraining(warmup=0.0)
    parts = method.parts(network=unet(), spec=SPEC)
    half: list[bool] = []
    network = parts.student.network
    plain = network.forward

    def forward(*args: object) -> Tensor:
        half.append(torch.is_autocast_enabled("cpu"))
        return plain(*args)

    network.forward = forward
    with torch.autocast("cpu", dtype=torch.bfloat16):
        list(method.step(parts, Batch(x_t(), COND), StepNoise(3), CLOCK))
    assert half == [False, True]


@pytest.mark.parametrize(("mean", "end"), [(9.0, 80.0), (-9.0, 0.002)])
@pytest.mark.parametrize("distils", [False, True])
def test_levels_beyond_the_model_s_range_are_moved_to_its_ends(distils: bool, mean: float, end: float) -> None:
    levels = LogNormal(mean=mean, std=0.1)
    if distils:
        method: Any = ContinuousConsistencyDistillation(noise_levels=levels)
        parts = method.parts(teacher=EDMPrecond(unet(), sigma_data=SD), spec=SPEC)
    else:
        method = ContinuousConsistencyTraining(noise_levels=levels)
        parts = method.parts(network=unet(), spec=SPEC)
    update = next(method.step(parts, Batch(x_t(), COND), StepNoise(3), CLOCK))
    torch.testing.assert_close(update.at, torch.full((4,), end, dtype=torch.float64), rtol=1e-9, atol=0)


def test_distillation_asks_a_guided_teacher() -> None:
    teacher = EDMPrecond(unet(), sigma_data=SD).eval()
    asked = {w: ContinuousConsistencyDistillation(guidance=w).parts(teacher=teacher, spec=SPEC) for w in (1.0, 3.0)}
    x, sigma = x_t(), torch.full((4,), 1.0, dtype=torch.float64)
    with torch.no_grad():
        plain = asked[1.0].teacher(x, sigma, COND)
        guided = asked[3.0].teacher(x, sigma, COND)
        free = teacher(x, sigma, Condition(label=torch.full((4,), -1)))
    torch.testing.assert_close(guided, free + 3 * (plain - free))


def test_distillation_of_the_exact_gaussian_teacher_has_its_velocity() -> None:
    """The denoiser of N(0, sd^2) has F = 0, hence velocity 0: at r = 1 the tangent of F = 0 is -cos sin x."""

    class Zero(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros((), dtype=torch.float64))

        def forward(self, x: Tensor, noise_label: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
            return self.w * x

    teacher = EDMPrecond(Zero(), sigma_data=SD)
    x = x_t()
    velocity = trig_velocity(teacher, x, T, SD, UNCONDITIONAL)
    assert float(velocity.detach().abs().max()) < 1e-11
    student = ContinuousConsistencyModel.from_denoiser(teacher)
    g = tangent(student, x, T, velocity, UNCONDITIONAL, 1.0)
    torch.testing.assert_close(g, -column(T.cos() * T.sin()) * x, rtol=0, atol=1e-11)


def test_bad_tangents_and_settings_get_one_sentence() -> None:
    method = ContinuousConsistencyTraining()
    network = unet()
    with torch.no_grad():
        next(network.parameters()).fill_(torch.nan)
    parts = method.parts(network=network, spec=SPEC)
    with pytest.raises(UserError, match="the tangent is not finite at 4 of 4 images"):
        list(method.step(parts, Batch(x_t(), COND), StepNoise(3), CLOCK))
    for settings, name in (
        ({"tangent": "tanh"}, "method.tangent is 'tanh'"),
        ({"tangent_c": 0.0}, "method.tangent_c is 0.0"),
        ({"warmup": -0.1}, "method.warmup is -0.1"),
        ({"warmup": 1.0}, r"method.warmup is 1.0; it must lie in \[0, 1\)"),
        ({"sigma_min": 90.0}, "sigma_min is 90.0 and sigma_max is 80.0"),
        ({"noise_label": "cosine"}, "noise_label is 'cosine'"),
    ):
        with pytest.raises(UserError, match=name):
            ContinuousConsistencyTraining(**settings).parts(network=network, spec=SPEC)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"method\.guidance is nan"):
        ContinuousConsistencyDistillation(guidance=float("nan"))
    with pytest.raises(UserError, match="the teacher is a ConsistencyModel"):
        ContinuousConsistencyDistillation().parts(teacher=ConsistencyModel(unet()), spec=SPEC)  # type: ignore[arg-type]


def test_both_parts_learn() -> None:
    parts = ContinuousConsistencyDistillation().parts(teacher=EDMPrecond(unet()).eval(), spec=SPEC)
    assert isinstance(parts.roles["teacher"], Frozen) and isinstance(parts.roles["weighting"], Trained)
    parts.weighting.double()
    events = list(ContinuousConsistencyDistillation().step(parts, Batch(x_t(), COND), StepNoise(3), CLOCK))
    assert [e.part for e in events] == ["student", "weighting"]
    assert all(p.grad is None for p in parts.student.parameters())
    torch.autograd.backward(events[1].loss.sum(), inputs=list(parts.weighting.parameters()))
    assert any(float(p.grad.abs().max()) > 0 for p in parts.weighting.parameters() if p.grad is not None)
