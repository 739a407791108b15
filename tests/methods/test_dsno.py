"""DSNO: the layer over time, the model, times, weights and loss, against the program's numbers and closed forms."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from imagewright.bench.speed import peak_bytes
from imagewright.cli.dry_run import parameters
from imagewright.methods.distances import Compares, Distance
from imagewright.methods.dsno import OperatorDistillation, cosine_level, states
from imagewright.metrics.perceptual import Backbone
from imagewright.models.description import build, describe
from imagewright.models.operator import TrajectoryOperator
from imagewright.models.preconditioning import EDMPrecond
from imagewright.networks import (
    ADMUNet,
    ADMUNetConfig,
    DhariwalUNet,
    DhariwalUNetConfig,
    EDM2UNet,
    EDM2UNetConfig,
    SongUNet,
    SongUNetConfig,
    UNet,
)
from imagewright.networks.temporal import TimeMixing, spectral
from imagewright.noise import ImageNoise, StepNoise
from imagewright.recipes import RECIPES
from imagewright.samplers import Jumps, MultistepConsistency
from imagewright.training.footprint import model_footprint
from imagewright.types import Batch, Clock, Condition, Coupling, DataSpec, Update, UserError

F64 = torch.float64
SIZES: dict[str, Any] = {"img_resolution": 8, "in_channels": 1, "out_channels": 1, "model_channels": 8,
                         "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (4,), "dropout": 0.0}  # fmt: skip
SPEC = DataSpec(name="toy", resolution=8, channels=1)
LEVELS = OperatorDistillation().levels


def network(label_dim: int = 0) -> SongUNet:
    torch.manual_seed(0)
    made = SongUNet(SongUNetConfig(**SIZES, label_dim=label_dim))
    with torch.no_grad():  # the last layers start at nearly nothing
        for p in made.parameters():
            p.add_(0.05 * torch.randn(p.shape))
    return made.eval()


def operator(modes: int = 2, levels: tuple[float, ...] = LEVELS, **settings: Any) -> TrajectoryOperator:
    torch.manual_seed(1)
    made = TrajectoryOperator(network(**settings), levels=levels, modes=modes).double().eval()
    with torch.no_grad():
        for p in made.mixing.parameters():
            p.copy_(torch.randn(p.shape, dtype=F64) / p.shape[0])
    return made


def latents(n: int = 3) -> Tensor:
    return StepNoise(2).normal(torch.empty(n, 1, 8, 8, dtype=F64))


@pytest.mark.parametrize(
    ("times", "first", "total"),
    [
        (4, [1.3840465545654297, 1.0609943866729736, 0.23894041776657104, -0.5067524909973145], 10.853584289550781),
        (5, [1.1155636310577393, 0.7647123336791992, 0.16861289739608765, -0.5067877769470215], 9.021090507507324),
    ],
)
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_the_layer_is_the_program_s(times: int, first: list[float], total: float, format: Any) -> None:
    layer = TimeMixing(3, 2)
    layer.weight.data = 0.5 * torch.sin(torch.arange(36.0) + 1).reshape(3, 3, 2, 2)
    x = torch.cos(0.7 * torch.arange(2 * times * 12.0)).reshape(2 * times, 3, 2, 2)
    got = layer(x.contiguous(memory_format=format), times)
    assert got[0, 0].flatten().tolist() == pytest.approx(first, abs=2e-6)
    assert float(got.sum().detach()) == pytest.approx(total, abs=1e-4)


def transformed(x: Tensor, weight: Tensor) -> Tensor:
    """K by complex transforms."""
    seen = torch.fft.rfft(x, dim=1)[:, : weight.shape[2]]
    turned = torch.einsum("nkpc,cok->nkpo", seen, torch.view_as_complex(weight)[:, :, : seen.shape[1]])
    return torch.fft.irfft(turned, n=x.shape[1], dim=1)


@pytest.mark.parametrize("times", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("modes", [1, 2, 5])
@pytest.mark.parametrize("places", [2, 6])
def test_the_spectral_map(times: int, modes: int, places: int) -> None:
    """With fewer places than channels it is computed in another way."""
    x, y = (StepNoise(k).normal(torch.empty(2, times, places, 3, dtype=F64)) for k in (1, 2))
    weight = StepNoise(3).normal(torch.empty(3, 3, modes, 2, dtype=F64))
    got = spectral(x, weight)
    torch.testing.assert_close(got, transformed(x, weight), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(spectral(x.mT, weight, -2), got.mT, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(spectral(2 * x - 3 * y, weight), 2 * got - 3 * spectral(y, weight))  # linear
    torch.testing.assert_close(spectral(x.roll(1, 1), weight), got.roll(1, 1))  # and commutes with shifts of time
    identity = torch.zeros(3, 3, times // 2 + 1, 2, dtype=F64)
    identity[..., 0] = torch.eye(3, dtype=F64)[:, :, None]
    torch.testing.assert_close(spectral(x, identity), x)


@pytest.mark.parametrize("places", [1, 2])
def test_gradients_are_finite_differences(places: int) -> None:
    x = StepNoise(1).normal(torch.empty(1, 4, places, 2, dtype=F64)).requires_grad_()
    weight = StepNoise(3).normal(torch.empty(2, 2, 2, 2, dtype=F64)).requires_grad_()
    assert torch.autograd.gradcheck(spectral, (x, weight))


def test_the_layer_starts_at_nearly_nothing() -> None:
    weight = TimeMixing(16, 2).weight.detach()
    assert float(weight.min()) >= 0 and float(weight.max()) <= 1 / 256 and float(weight.mean()) > 0.3 / 256


NETWORKS: tuple[UNet, ...] = (
    SongUNet(SongUNetConfig(**SIZES)),
    SongUNet(SongUNetConfig(**SIZES, encoder_type="residual", decoder_type="skip", embedding_type="fourier")),
    DhariwalUNet(DhariwalUNetConfig(**SIZES)),
    ADMUNet(ADMUNetConfig(**SIZES, channels_per_head=None, resampling="conv", groups=4)),
    EDM2UNet(EDM2UNetConfig(**SIZES)),
)


@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: type(n).__name__)
def test_layers_go_into_any_of_our_networks(network: UNet) -> None:
    """Behind every residual block, but for those that resample and the second of the middle; nothing is copied."""
    model = TrajectoryOperator(network, levels=LEVELS).double().eval()
    layers = network.plan()
    wanted = {n for n in layers if "block" in n or n.endswith("in0")}
    assert {n.replace("_", ".", 1) for n in model.mixing} == wanted
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, dtype=F64))
    whole = model.trajectory(latents(2))
    assert whole.shape == (2, 4, 1, 8, 8)
    own = {p.data_ptr() for p in network.parameters()}
    assert own <= {p.data_ptr() for p in model.parameters()}
    with torch.no_grad():
        for p in model.mixing.parameters():
            p.zero_()
    # Without the layers each time is the backbone's own answer.
    alone = model.trajectory(latents(2))
    told = model.c_noise(torch.tensor(LEVELS, dtype=F64).clamp(min=model.sigma_min))
    for slot in range(4):
        want = network(latents(2), told[slot].repeat(2))
        torch.testing.assert_close(alone[:, slot], want, rtol=1e-9, atol=1e-9)
    assert float((whole - alone).abs().max()) > 1e-4


def test_no_modes_are_no_layers_and_one_time_works() -> None:
    assert not list(operator(modes=0).mixing)
    one = operator(levels=(0.0,))
    assert one.trajectory(latents()).shape == (3, 1, 1, 8, 8) and one.rows == 1


def test_it_is_a_flow_map_from_noise_to_its_levels() -> None:
    model = operator(label_dim=3)
    z, cond = latents(), Condition(label=torch.tensor([0, 2, -1]))
    points = model.trajectory(z, cond)
    high = torch.full((3,), 80.0, dtype=F64)
    for slot, level in enumerate(LEVELS):
        got = model(80 * z, high, torch.full((3,), level, dtype=F64), cond)
        torch.testing.assert_close(got, math.sqrt(1 + level**2) * points[:, slot])
    mixed = model(80 * z, high, torch.tensor([LEVELS[2], 0.0, LEVELS[0]], dtype=F64), cond)
    torch.testing.assert_close(mixed[1], points[1, 3])
    assert float((model.trajectory(z) - points).abs().max()) > 1e-3  # the class counts
    sampler = MultistepConsistency()
    torch.testing.assert_close(sampler(model, z, cond), points[:, 3].clamp(-1, 1))
    with pytest.raises(
        UserError, match=r"a jump from 80 to 0\.5; this model goes from 80 to 1\.218, 0\.4142, 0\.09853, 0"
    ):
        model(80 * z, high, torch.full((3,), 0.5, dtype=F64))
    with pytest.raises(UserError, match=r"a jump from 0\.414"):
        Jumps(sigmas=(LEVELS[1],))(model, z)


def test_an_image_is_a_function_of_its_seed_alone() -> None:
    model = operator()

    def drawn(rows: list[int]) -> Tensor:
        return model.trajectory(ImageNoise(1, rows).normal(torch.empty(len(rows), 1, 8, 8, dtype=F64)))

    torch.testing.assert_close(drawn([0, 1, 2])[2:], drawn([2]), rtol=0, atol=1e-12)
    again = build(describe(model)).double().eval()
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again.trajectory(latents()), model.trajectory(latents()))  # type: ignore[operator]


def test_every_time_of_an_image_is_told_its_class() -> None:
    model, z = operator(label_dim=3), latents()
    with torch.no_grad():
        together = model.trajectory(z, Condition(label=torch.tensor([0, 2, 1])))
        for k, label in enumerate((0, 2, 1)):
            alone = model.trajectory(z[k : k + 1], Condition(label=torch.tensor([label])))
            torch.testing.assert_close(together[k : k + 1], alone, rtol=1e-9, atol=1e-9)
        assert not torch.allclose(together[0], model.trajectory(z, Condition(label=torch.tensor([1, 2, 1])))[0])


def test_times_levels_and_weights_are_the_program_s() -> None:
    quad, uniform = OperatorDistillation(), OperatorDistillation(spacing="uniform")
    assert quad.cosine_times == (0.5625, 0.25, 0.0625, 0.0) and uniform.cosine_times == (0.75, 0.5, 0.25, 0.0)
    assert quad.levels == pytest.approx((1.2184894247462812, 0.4142401572862677, 0.09853151380664692, 0.0), rel=1e-9)
    assert uniform.levels == pytest.approx((2.414058565811458, 1.0, 0.4142401572862677, 0.0), rel=1e-9)
    assert quad.slot_weights == pytest.approx((1.0, 2.414058565811458, 10.149037210189906, 1e4), rel=1e-9)
    assert uniform.slot_weights == pytest.approx((1.0, 1.0, 2.414058565811458, 1e4), rel=1e-9)
    assert replace(quad, weights="equal").slot_weights == (1.0,) * 4
    # At log SNR 20 sqrt(SNR) is 22026, which is cut; at 0 and below the weight is 1.
    assert 1 / cosine_level(0.0) == pytest.approx(22026.4657948, rel=1e-9) and cosine_level(1.0) == pytest.approx(
        math.exp(10)
    )
    assert cosine_level(0.5) == pytest.approx(1.0)


class Says(nn.Module):
    """In a student's place: trajectories that are known."""

    def __init__(self, points: Tensor) -> None:
        super().__init__()
        self.points = nn.Parameter(points)

    def trajectory(self, latents: Tensor, cond: Condition) -> Tensor:
        return self.points


class Named:
    """In the place of `Parts`."""

    def __init__(self, **parts: Any) -> None:
        self.__dict__.update(parts)


def pairs(method: OperatorDistillation, aims: Tensor) -> Coupling:
    """A coupling whose states are `aims` [N, T, ...]."""
    t = torch.tensor(method.path_times, dtype=F64).expand(len(aims), -1)
    scale = ((1 - t) ** 2 + t**2).sqrt()[:, :, None, None, None]
    return Coupling(torch.zeros_like(aims[:, 0]), aims[:, -1], points=scale * aims[:, :-1], times=t)


@pytest.mark.parametrize(("spacing", "loss"), [("quad", 1578.303044279508), ("uniform", 1576.3304619321161)])
def test_the_loss_is_the_program_s(spacing: Any, loss: float) -> None:
    method = OperatorDistillation(spacing=spacing)
    made = torch.sin(torch.arange(32.0, dtype=F64)).reshape(2, 4, 1, 2, 2)
    pair = pairs(method, torch.cos(3 * made))
    torch.testing.assert_close(states(pair), torch.cos(3 * made))
    parts = Named(student=Says(made))
    (event,) = method.step(parts, Batch(pair.images, coupling=pair), StepNoise(1), Clock(0, 0, 1))
    assert isinstance(event, Update) and float(event.loss.mean().detach()) == pytest.approx(loss, rel=1e-12)


def test_a_linear_gaussian_teacher_s_trajectories() -> None:
    """Data N(0, sd^2): x(sigma) = x(T) sqrt((sigma^2 + sd^2) / (T^2 + sd^2)): best answers are scaled noise."""
    method, sd, top = OperatorDistillation(), 0.5, 80.0
    z = latents(2)
    levels = torch.tensor(method.levels, dtype=F64)[None, :, None, None, None]
    points = top * z[:, None] * ((levels**2 + sd**2) / (top**2 + sd**2)).sqrt()  # x0 + sigma n
    t = levels / (1 + levels)
    along = (1 - t) * points  # as a store has them
    pair = Coupling(z, points[:, -1], points=along[:, :-1], times=t[:, :-1, 0, 0, 0].expand(2, -1))
    wanted = points / (1 + levels**2).sqrt()
    torch.testing.assert_close(states(pair), wanted)
    (event,) = method.step(Named(student=Says(wanted)), Batch(z, coupling=pair), StepNoise(1), Clock(0, 0, 1))
    assert isinstance(event, Update) and float(event.loss.abs().max().detach()) == pytest.approx(0, abs=1e-10)


def test_a_perceptual_distance_looks_at_every_time() -> None:
    method = OperatorDistillation(distance=Distance(kind="perceptual"), weights="equal")
    aims = StepNoise(1).normal(torch.empty(2, 4, 1, 4, 4, dtype=F64))
    parts = Named(student=Says(aims + 0.1), features=lambda images: [images])
    (event,) = method.step(parts, Batch(aims[:, 0], coupling=pairs(method, aims)), StepNoise(1), Clock(1, 0, 1))
    assert isinstance(event, Update) and event.loss.shape == (2,) and float(event.loss.min().detach()) > 0
    with pytest.raises(UserError, match="needs a feature network"):
        method.parts(teacher=EDMPrecond(network()), spec=SPEC)


def test_vgg_s_maps_are_compared_without_learned_weights() -> None:
    class Package(nn.Module):
        def scaling_layer(self, images: Tensor) -> Tensor:
            return 2 * images

        def net(self, images: Tensor) -> tuple[Tensor, ...]:
            return images, images[..., ::2, ::2]

    maps = Backbone(Package())
    a, b = (StepNoise(k).normal(torch.empty(2, 1, 8, 8, dtype=F64)) for k in (1, 2))
    assert [tuple(m.shape) for m in maps(a)] == [(2, 3, 8, 8), (2, 3, 4, 4)] and not isinstance(maps, Compares)
    gap = [(m / m.norm(dim=1, keepdim=True) - n / n.norm(dim=1, keepdim=True)) for m, n in zip(maps(a), maps(b))]
    wanted = sum(g.square().sum(1).flatten(1).mean(1) for g in gap)
    torch.testing.assert_close(Distance(kind="perceptual")(a, b, maps), wanted)


def test_the_student_starts_as_its_teacher() -> None:
    teacher = EDMPrecond(network())
    student = OperatorDistillation(dropout=0.1).parts(teacher=teacher, spec=SPEC).student
    own = dict(student.network.named_parameters())
    assert all(torch.equal(own[n], p) for n, p in teacher.network.named_parameters())
    assert student.network.config.dropout == 0.1 and student.training
    with torch.no_grad():
        for p in student.mixing.parameters():
            p.zero_()
        answer = student.eval().trajectory(latents(2).float())
        single = teacher.network(latents(2).float(), torch.full((2,), math.log(0.002) / 4))
    torch.testing.assert_close(answer[:, -1], single, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("times", [None, (0.9, 0.5, 0.1), (0.5492,)])
def test_pairs_without_the_points_are_refused(times: tuple[float, ...] | None) -> None:
    method, z = OperatorDistillation(), latents(1)
    points = None if times is None else z[:, None].expand(-1, len(times), -1, -1, -1)
    pair = Coupling(z, z, points=points, times=None if times is None else torch.tensor([times]))
    sentence = r"4 quad slots learn from points at 0\.5492 0\.2929 0\.0897: draw them with imagewright couple"
    with pytest.raises(UserError, match=sentence):
        next(iter(method.step(Named(student=None), Batch(z, coupling=pair), StepNoise(1), Clock(0, 0, 1))))


OFFICIAL = {"dsno-cifar10-teacher": 60_004_099, "dsno-cifar10": 65_771_267, "dsno-imagenet64": 329_225_091 - 768}


@pytest.mark.parametrize(("name", "count"), OFFICIAL.items())
def test_networks_have_the_official_number_of_parameters(name: str, count: int) -> None:
    """Those of ImageNet-64 but for the bias of the class."""
    assert parameters(RECIPES[name]()) == count


@pytest.mark.parametrize(("name", "batch", "steps", "halving"), [
    ("dsno-cifar10", 256, 400_000, 100_000), ("dsno-imagenet64", 2048, 120_000, None),
])  # fmt: skip
def test_published_runs(name: str, batch: int, steps: int, halving: int | None) -> None:
    """The program of ImageNet-64 makes a step of four of its 480,000 rounds, and never comes to its first halving."""
    run = RECIPES[name]()
    training, uniform = run.training, "imagenet" in name
    assert run.method == OperatorDistillation(
        distance=run.method.distance, spacing="uniform" if uniform else "quad", dropout=0.1 if uniform else 0.2
    )
    assert not run.data.xflip and (run.method.distance.kind == "l1") >= uniform
    o = training.optimizer
    assert (training.batch, training.total_images, o.lr, o.clip_norm) == (batch, batch * steps, 2e-4, None)
    assert o.lr_at(10_000 * batch, 1) == pytest.approx(2e-4) and o.lr_at(5_000 * batch, 1) == pytest.approx(1e-4)
    assert o.eps == 1e-8 and o.betas == (0.9, 0.999)
    rates = [o.lr_at((k + 1) * batch, 1) for k in (halving, 2 * halving)] if halving else [o.lr_at(steps * batch, 1)]
    assert rates == pytest.approx([1e-4, 5e-5] if halving else [2e-4])
    assert 0.5 ** (batch / training.ema.halflife_images) == pytest.approx(0.9999)


def test_what_a_call_costs_is_said() -> None:
    model = operator().float()
    whole, single = (model_footprint(m, SPEC) for m in (model, EDMPrecond(network())))
    assert whole is not None and single is not None and whole.flops == 4 * single.flops

    def kept() -> None:
        a = torch.zeros(1000)
        b = a + 1
        del a
        torch.relu_(b)
        b * 2

    assert peak_bytes(kept, torch.device("cpu")) == 8000


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"slots": 0}, r"method\.slots is 0; it must be at least 1"),
        ({"modes": -1}, r"method\.modes is -1; it must be at least 0"),
        ({"spacing": "cubic"}, r"method\.spacing is 'cubic'; allowed: quad, uniform"),
        ({"weights": "none"}, r"method\.weights is 'none'; allowed: snr, equal"),
        ({"dropout": 1.0}, r"method\.dropout is 1\.0"),
    ],
)
def test_bad_settings(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        OperatorDistillation(**settings)


@pytest.mark.parametrize("levels", [(), (0.5,), (0.4, 0.5, 0.0), (90.0, 0.0)])
def test_bad_levels(levels: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match="they must decrease from below sigma_max"):
        TrajectoryOperator(network(), levels=levels)
