"""VCT and ECM: both programs' losses and gradients, the coupling's identities, the kernels, the encoder's part."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from imagewright.cli.dry_run import parameters
from imagewright.methods.distances import Distance
from imagewright.methods.easy_consistency import EasyConsistencyTuning
from imagewright.methods.improved_consistency import ImprovedConsistencyTraining, interval_probabilities
from imagewright.methods.noise_couplings import Independent, Transported, nearest
from imagewright.methods.vct import ICT, Learnt, VariationalConsistencyTraining, divergence
from imagewright.models.consistency import ContinuousConsistencyModel
from imagewright.models.coupled import MARGIN, CoupledConsistencyModel
from imagewright.models.description import build, describe
from imagewright.networks import EDM2UNet, EDM2UNetConfig, SongUNet, SongUNetConfig
from imagewright.noise import ImageNoise, StepNoise
from imagewright.paths.noise_levels import LogNormal
from imagewright.paths.schedules import karras_sigmas
from imagewright.recipes import RECIPES
from imagewright.samplers import MultistepConsistency
from imagewright.samplers.editing import Editing, Pixels
from imagewright.types import UNCONDITIONAL, Batch, Clock, Condition, DataSpec, Update, UserError

SPEC = DataSpec(name="toy", resolution=2, channels=1)
F64 = torch.float64
X = torch.tensor([[0.1, -0.6, 0.9, 0.3], [-0.2, 0.4, 0.7, -0.8]], dtype=F64).view(2, 1, 2, 2)
E = torch.tensor([[-0.4, 0.8, 0.3, -1.2], [1.1, 0.2, -0.5, 0.6]], dtype=F64).view(2, 1, 2, 2)
LEVELS = torch.tensor([-1.0, 2.8], dtype=F64)
INTERVALS = (3, 14)
"""Of 20, from below."""
ECM64 = EasyConsistencyTuning(
    noise_levels=LogNormal(mean=-0.8, std=1.6), q=4.0, stages=4, weighting="edm",
    distance=Distance(kind="pseudo_huber", huber_c=0.03),
)  # fmt: skip


class Net(nn.Module):
    """The network that the official programs were run with."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.7, dtype=F64))

    def forward(self, x: Tensor, noise_label: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        return torch.tanh(self.w * x + 0.3 * noise_label[:, None, None, None])


class Encoder(nn.Module):
    """And the encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.m = nn.Parameter(torch.tensor(0.2, dtype=F64))
        self.d = nn.Parameter(torch.tensor(-0.3, dtype=F64))

    def forward(self, x: Tensor, noise_label: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        assert not noise_label.any()
        return torch.cat([self.m * torch.sin(x), self.d * x + 0.5], 1)


class Standard(nn.Module):
    """An encoder that says: mean 0, deviation 1."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros((), dtype=F64))

    def forward(self, x: Tensor, noise_label: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        return torch.cat([0 * x, 0 * x + math.log(math.e - 1)], 1) + self.nothing


class Known(StepNoise):
    """The draws of the official runs: levels or intervals, then noise."""

    def __init__(self) -> None:
        super().__init__(0)

    def normal(self, like: Tensor) -> Tensor:
        return (LEVELS if like.ndim == 1 else E).to(like)

    def uniform(self, like: Tensor) -> Tensor:
        edges = interval_probabilities(karras_sigmas(21, 0.002, 80.0), LogNormal(mean=-1.1, std=2.0)).cumsum(0)
        rows = [19 - i for i in INTERVALS]
        return torch.stack([(edges[i] + edges[i - 1]) / 2 for i in rows]).to(like)


def made(method: VariationalConsistencyTraining, encoder: nn.Module | None) -> Any:
    """A method's parts with the given encoder in the place of its own."""
    plain = replace(method, coupling=Independent()).parts(network=Net(), spec=SPEC)
    for part in (plain.student, plain.target):
        part.encoder = encoder
    return plain


def updated(method: Any, parts: Any, clock: Clock, batch: Batch | None = None, noise: Any = None) -> Update:
    event = next(iter(method.step(parts, batch or Batch(X), noise or Known(), clock)))
    assert isinstance(event, Update)
    return event


def at(step: int) -> Clock:
    return Clock(step, step, 800)


ECM = EasyConsistencyTuning()
OFFICIAL = [
    (ICT, "ve", 30.0, 150, 1.5521568279481952, (-0.3288458297852244, 0.024666904787003174, -1.8251818184158082)),
    (ICT, "li", 30.0, 150, 1.5541152749226899, (-0.3306314972013249, 0.024335909714588155, -1.8243880504600893)),
    (ICT, "ve", None, 150, 1.333040818400077, (-0.2987269270018516,)),
    (ICT, "li", None, 150, 1.3352418474961474, (-0.3008484937685716,)),
    (ECM, "ve", 10.0, 0, 0.7609244108391909, (0.05887719450542592, 0.22519688162312984, -0.09580915104736377)),
    (ECM, "ve", 10.0, 350, 1.1508260758372577, (0.07201184862717436, 1.1009492797212745, -1.8466411383178127)),
    (ECM, "li", 10.0, 0, 0.76135461803703, (0.05905195080553427, 0.2254664909825442, -0.09589993689512624)),
    (ECM, "li", 10.0, 350, 1.1515039826150981, (0.07319021063297271, 1.1030435067527908, -1.8479061993498682)),
    (ECM, "ve", None, 350, 0.7604367196026828, (-0.17099074247431822,)),
    (ECM, "li", None, 350, 0.7612207534473975, (-0.17145772614253463,)),
    (ECM64, "ve", 90.0, 0, 26.203287483883614, (0.0605724814143449, 43.214288722072915, -107.40838533099881)),
    (ECM64, "ve", 90.0, 350, 22.086035984608223, (-0.5615482316619823, 42.26419030746299, -108.4702824123734)),
    (ECM64, "li", 90.0, 0, 26.21075015523388, (0.05734386823274029, 43.213075018301126, -107.40486884394528)),
    (ECM64, "li", 90.0, 350, 22.088319105144457, (-0.5646250862928966, 42.2592587902943, -108.4686379738585)),
]  # fmt: skip


@pytest.mark.parametrize(("base", "kernel", "beta", "step", "loss", "slopes"), OFFICIAL)
def test_losses_and_gradients_are_the_official_programs(
    base: Any, kernel: Any, beta: float | None, step: int, loss: float, slopes: tuple[float, ...]
) -> None:
    coupling = Independent() if beta is None else Learnt(beta=beta)
    method = VariationalConsistencyTraining(base=base, coupling=coupling, kernel=kernel)
    encoder = None if beta is None else Encoder()
    parts = made(method, encoder)
    got = updated(method, parts, at(step)).loss.mean()
    # The linear path's last time, which one of two levels is cut to in ECM, is 1e-5 short of the program's.
    close = {"rel": 1e-4, "abs": 1e-5} if kernel == "li" and base is not ICT else {"rel": 1e-9}
    assert float(got.detach()) == pytest.approx(loss, **close)
    learns = [parts.student.network.w, *([] if encoder is None else [encoder.m, encoder.d])]
    found = [float(g) for g in torch.autograd.grad(got, learns)]
    assert found == pytest.approx(list(slopes), **close)


@pytest.mark.parametrize(
    ("step", "loss", "slope"),
    [(0, 0.7781389461843341, -0.013611350046713794), (350, 0.7604367196026828, -0.17099074247431734)],
)
def test_ecm_is_its_own_program_s_too(step: int, loss: float, slope: float) -> None:
    parts = ECM.parts(network=Net(), spec=SPEC)
    assert isinstance(parts.student, ContinuousConsistencyModel)
    got = updated(ECM, parts, at(step)).loss.mean()
    assert float(got.detach()) == pytest.approx(loss, rel=1e-12)
    assert float(torch.autograd.grad(got, parts.student.network.w)[0]) == pytest.approx(slope, rel=1e-9)


@pytest.mark.parametrize("base", [ICT, ECM])
def test_a_standard_encoder_is_independent_coupling_bit_for_bit(base: Any) -> None:
    learnt, plain = (
        VariationalConsistencyTraining(base=base),
        VariationalConsistencyTraining(base=base, coupling=Independent()),
    )
    images = 0.5 * StepNoise(5).normal(torch.empty(64, 1, 2, 2, dtype=F64))
    ours, theirs = (
        updated(method, made(method, encoder), at(100), Batch(images), StepNoise(3))
        for method, encoder in ((learnt, Standard()), (plain, None))
    )  # fmt: skip
    assert torch.equal(ours.parts["consistency"], theirs.loss)
    torch.testing.assert_close(ours.parts["coupling"], torch.zeros(64, dtype=F64), rtol=0, atol=1e-6)


def test_with_ict_s_whole_image_distance_and_independent_noise_it_is_ict() -> None:
    method = ImprovedConsistencyTraining()
    variational = VariationalConsistencyTraining(base=method, coupling=Independent())
    ours = updated(variational, variational.parts(network=Net(), spec=SPEC), at(100), noise=StepNoise(3))
    theirs = updated(method, method.parts(network=Net(), spec=SPEC), at(100), noise=StepNoise(3))
    assert torch.equal(ours.loss, theirs.loss)


def test_the_divergence_is_what_sampling_says() -> None:
    mean, deviation = 0.8 * X, (0.4 + X.abs())
    draws = mean + deviation * StepNoise(1).normal(torch.empty(200_000, *X.shape, dtype=F64))
    q, p = torch.distributions.Normal(mean, deviation), torch.distributions.Normal(torch.zeros_like(X), 1.0)
    sampled = (q.log_prob(draws) - p.log_prob(draws)).flatten(2).sum(2).mean(0)
    torch.testing.assert_close(divergence(mean, deviation), sampled, rtol=0.01, atol=0.01)
    exact = torch.distributions.kl_divergence(q, p).flatten(1).sum(1)
    torch.testing.assert_close(divergence(mean, deviation), exact, rtol=1e-6, atol=1e-9)


def test_the_divergence_weighs_as_the_last_interval() -> None:
    grid = karras_sigmas(21, 0.002, 80.0)
    assert ICT.last_weight(150 / 800) == pytest.approx(1 / float(grid[0] - grid[1]), rel=1e-12)
    assert replace(ICT, by_gap=False).last_weight(0.2) == 1
    assert ECM.last_weight(0.0) == pytest.approx(1 / 40, rel=1e-6) and ECM64.last_weight(0.0) == 1
    one, two = (VariationalConsistencyTraining(coupling=Learnt(beta=beta)) for beta in (1.0, 2.0))
    costs = [updated(m, made(m, Encoder()), at(150)).parts["coupling"] for m in (one, two)]
    mean, deviation = made(one, Encoder()).student.encode(X)
    torch.testing.assert_close(costs[0], ICT.last_weight(150 / 800) * divergence(mean, deviation))
    torch.testing.assert_close(costs[1], 2 * costs[0])


@pytest.mark.parametrize("base", [ICT, ECM])
def test_the_encoder_hears_of_the_upper_end_alone(base: Any) -> None:
    """Its gradient is that of the loss with the lower end's answer held fixed."""
    method = VariationalConsistencyTraining(base=base, coupling=Learnt(beta=0.0))
    encoder = Encoder()
    parts = made(method, encoder)
    student = parts.student
    (through,) = torch.autograd.grad(updated(method, parts, at(150)).loss.sum(), encoder.m)
    t, r, weight = base.neighbours(150 / 800, Known(), X[:, 0, 0, 0])
    with torch.no_grad():
        aim = student.start(X + r[:, None, None, None] * student.noise_of(X, E), r.clamp(min=1e-300))
        aim = torch.where((r > 0)[:, None, None, None], aim, X)

    def loss(m: float) -> Tensor:
        noise = m * torch.sin(2 * X) + student.encode(X)[1] * E
        answer = student.start(X + t[:, None, None, None] * noise, t)
        return (weight * base.distance(answer, aim)).sum()

    slope = (loss(0.2 + 1e-6) - loss(0.2 - 1e-6)) / 2e-6
    assert float(through) == pytest.approx(float(slope.detach()), rel=1e-6)


@pytest.mark.parametrize("kernel", ["ve", "li"])
def test_the_boundary_and_unit_variance(kernel: Any) -> None:
    model = CoupledConsistencyModel(Net(), kernel=kernel)
    low = torch.full((2,), model.sigma_min, dtype=F64)
    a = 1 - model.time_min / model.time_max if kernel == "li" else 1.0  # the point itself is a x
    torch.testing.assert_close(model.start(X, low), a * X, rtol=1e-9, atol=1e-9)
    free = CoupledConsistencyModel(Net(), kernel=kernel, boundary=False)
    tiny = torch.full((2,), 1e-12, dtype=F64)
    torch.testing.assert_close(free.start(X, tiny), X, rtol=0, atol=1e-9)
    sigma = torch.logspace(-2.5, 6.9 if kernel == "li" else 1.9, 50, dtype=F64)
    # Data of deviation 0.5 and unit noise, seen through c_in, have variance 1.
    torch.testing.assert_close(model.scalings(sigma).c_in ** 2 * (0.25 + sigma**2), torch.ones_like(sigma))
    torch.testing.assert_close(model.sigma(model.time(sigma)), sigma, rtol=1e-9, atol=0)


def test_the_linear_path_ends_in_noise_alone() -> None:
    model = CoupledConsistencyModel(Net(), kernel="li")
    t = torch.tensor([model.latest], dtype=F64)
    a = 1 - t / model.time_max
    x = X[:1] + model.sigma(t) * E[:1]  # x_t over a
    assert float(a) == pytest.approx(MARGIN) and model.sigma_max == pytest.approx(float(t / a))
    torch.testing.assert_close(a * x, model.time_max * E[:1], rtol=2e-5, atol=2e-5)
    assert CoupledConsistencyModel(Net(), kernel="ve").sigma_max == 80


def test_in_float32_the_linear_path_is_as_good() -> None:
    model = CoupledConsistencyModel(Net(), kernel="li")
    sigma = torch.full((2,), model.sigma_max, dtype=F64)
    exact = model.start(sigma[:, None, None, None] * E, sigma)
    single = model.float().start((sigma[:, None, None, None] * E).float(), sigma.float())
    torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=1e-5)


def test_t_to_r() -> None:
    t = torch.logspace(-3, 2.5, 200, dtype=F64)
    for step in range(0, 800, 50):
        r = ECM.lower(t, step / 800)
        assert bool(((r >= 0) & (r < t)).all())
        assert ECM.stage(step / 800) == step // 100
    first, last = ECM.lower(t, 0.0), ECM.lower(t, 0.999)
    assert float(first[0]) == 0 and float(first[-1]) == pytest.approx(float(t[-1]) / 2) and float(last[0]) > 0
    cut = 1 - (1 + 8 * torch.sigmoid(-t)) / 2 < 0
    assert torch.equal(first == 0, cut) and cut.any() and not cut.all()
    assert ECM.stage(1.0) == 7


def test_transport_is_a_permutation_and_never_dearer() -> None:
    for seed in range(5):
        images, noise = (StepNoise(seed, k).normal(torch.empty(6, 1, 2, 2, dtype=F64)) for k in (1, 2))
        order = nearest(images, noise)
        assert sorted(order.tolist()) == list(range(6))

        def cost(rows: Any, images: Tensor = images, noise: Tensor = noise) -> float:
            return float((images - 80 * noise[torch.as_tensor(rows)]).square().sum())

        assert cost(order) == pytest.approx(min(map(cost, permutations(range(6)))), rel=1e-12)
    method = VariationalConsistencyTraining(coupling=Transported())
    updated(method, method.parts(network=Net(), spec=SPEC), at(0), noise=StepNoise(1))


@pytest.mark.parametrize(
    ("kernel", "one", "two"),
    [
        ("ve", (0.023058455257488394, 0.3578451414031816), (0.19408076239214278, -0.058598684783357904)),
        ("li", (0.02430621593482884, 0.35535476050365267), (0.19490318135308812, -0.06289838496709099)),
    ],
)
def test_the_second_step_has_the_encoder_s_noise_as_in_the_program(
    kernel: Any, one: tuple[float, ...], two: tuple[float, ...]
) -> None:
    class Fixed:
        def normal(self, like: Tensor) -> Tensor:
            return -E.to(like)

        uniform = normal

    model = CoupledConsistencyModel(Net(), kernel=kernel, encoder=Encoder())
    level = float(model.sigma(torch.tensor(0.821, dtype=F64)))
    got = {n: MultistepConsistency(sigmas=(level,)[: n - 1], clip=False)(model, E, noise=Fixed()) for n in (1, 2)}
    close = {"rel": 1e-9} if kernel == "ve" else {"rel": 1e-4, "abs": 1e-4}
    assert got[1].flatten()[:2].tolist() == pytest.approx(one, **close)
    assert got[2].flatten()[:2].tolist() == pytest.approx(two, **close)
    bare = CoupledConsistencyModel(Net(), kernel=kernel)
    prior = MultistepConsistency(sigmas=(level,), clip=False)(bare, E, noise=Fixed())
    assert float((prior - got[2]).abs().max()) > 0.01


def test_an_edit_s_later_steps_have_it_too() -> None:
    model = CoupledConsistencyModel(Net(), encoder=Encoder())
    bare = CoupledConsistencyModel(Net())
    keep = Pixels(torch.tensor([[True, False], [False, False]]))
    found = {
        levels: [Editing(sigmas=levels)(m, X, keep, noise=StepNoise(1)) for m in (model, bare)]
        for levels in ((80.0,), (80.0, 0.8))
    }
    assert torch.equal(*found[(80.0,)]) and not torch.equal(*found[(80.0, 0.8)])
    torch.testing.assert_close(found[(80.0, 0.8)][0][:, :, 0, 0], X[:, :, 0, 0])


def test_an_image_is_a_function_of_its_seed_alone() -> None:
    config = SongUNetConfig(img_resolution=4, in_channels=1, out_channels=1, model_channels=8, channel_mult=(1,),
                            num_blocks=1, attn_resolutions=())  # fmt: skip
    torch.manual_seed(0)
    network = SongUNet(config)
    model = CoupledConsistencyModel(network, encoder=Learnt(channels=4).encoder(network)).double().eval()
    sampler = MultistepConsistency(sigmas=(0.8,))

    def drawn(rows: list[int]) -> Tensor:
        noise = ImageNoise(1, rows)
        return sampler(model, noise.normal(torch.empty(len(rows), 1, 4, 4, dtype=F64)), noise=noise)

    torch.testing.assert_close(drawn([0, 1, 2])[2:], drawn([2]), rtol=0, atol=1e-12)
    again = build(describe(model)).double().eval()
    again.load_state_dict(model.state_dict())
    assert isinstance(again, CoupledConsistencyModel) and again.describe() == model.describe()
    model = again
    torch.testing.assert_close(drawn([0, 1, 2])[2:], drawn([2]), rtol=0, atol=1e-12)


SIZES = {"vct-cifar10": 55_732_739 + 1_562_246, "vct-ecm-imagenet64": 280_209_253 + 6_162_269,
         "vct-ecm-cifar10": 55_732_739 + 9 * 128 + 1_562_246, "ecm-cifar10": 55_732_739 + 9 * 128,
         "edm2-imagenet64-s": 280_209_253 + 128}  # fmt: skip


@pytest.mark.parametrize(("name", "count"), SIZES.items())
def test_networks_have_the_official_number_of_parameters(name: str, count: int) -> None:
    """Beside them a layer for augmentation that is told nothing, and EDM2's uncertainty."""
    assert parameters(RECIPES[name]()) == count


PUBLISHED = {  # batch, steps, kind, rate, clip, dropout
    "ecm-cifar10": (128, 200_000, "radam", 1e-4, None, 0.2),
    "vct-cifar10": (512, 400_000, "radam", 1e-4, 200.0, 0.3),
    "vct-ecm-cifar10": (128, 400_000, "radam", 1e-4, 200.0, 0.2),
    "vct-ecm-imagenet64": (128, 200_000, "adam", 1e-3, 200.0, 0.4),
}


@pytest.mark.parametrize(("name", "want"), PUBLISHED.items())
def test_published_runs(name: str, want: tuple[Any, ...]) -> None:
    run = RECIPES[name]()
    training, o = run.training, run.training.optimizer
    found = (training.batch, training.total_images // training.batch, o.kind, o.lr, o.clip_norm, run.network.dropout)
    assert found == want
    assert run.data.xflip == (name in ("vct-cifar10", "vct-ecm-cifar10"))
    assert o.lr_decay_images == (2_000 * 128 if "imagenet" in name else None) and o.eps == 1e-8
    assert o.betas == ((0.9, 0.99) if "imagenet" in name else (0.9, 0.999)) and o.lr_ramp_images == 0
    assert training.precision == "fp32"
    if "imagenet" not in name:
        assert 0.5 ** (training.batch / training.ema.halflife_images) == pytest.approx(0.9999)
    if name in COUPLED:
        assert (run.method.coupling, run.method.kernel, run.method.base) == COUPLED[name]


COUPLED = {
    "vct-cifar10": (Learnt(beta=30.0, channels=32, blocks=1), "ve", ICT),
    "vct-ecm-cifar10": (Learnt(beta=10.0, channels=32, blocks=1), "ve", EasyConsistencyTuning(q=2.0, stages=8)),
    "vct-ecm-imagenet64": (
        Learnt(beta=90.0, channels=32, blocks=2), "li",
        EasyConsistencyTuning(
            noise_levels=LogNormal(mean=-0.8, std=1.6), q=4.0, stages=4, weighting="edm",
            distance=Distance(kind="pseudo_huber", huber_c=0.06 / (3 * 64 * 64) ** 0.5),
        ),
    ),
}  # fmt: skip


def test_edm2_drops_where_it_is_told() -> None:
    config = EDM2UNetConfig(img_resolution=32, in_channels=1, out_channels=1, model_channels=64, channel_mult=(1, 1),
                            num_blocks=1, attn_resolutions=(), dropout=0.4, dropout_below=16)  # fmt: skip
    dropout = {name: block.dropout for name, block in EDM2UNet(config).enc.items() if "block" in name}
    assert dropout == {"32x32_block0": 0.0, "16x16_block0": 0.4}


@pytest.mark.parametrize(
    ("what", "settings", "sentence"),
    [
        (Learnt, {"beta": -1.0}, r"method\.coupling\.beta is -1\.0"),
        (Learnt, {"channels": 0}, r"method\.coupling\.channels is 0; it must be at least 1"),
        (VariationalConsistencyTraining, {"kernel": "vp"}, r"method\.kernel is 'vp'; allowed: ve, li"),
        (EasyConsistencyTuning, {"q": 1.0}, r"method\.q is 1\.0; it must be above 1"),
        (EasyConsistencyTuning, {"k": -1.0}, r"method\.k is -1\.0"),
        (EasyConsistencyTuning, {"stages": 0}, r"method\.stages is 0"),
        (EasyConsistencyTuning, {"weighting": "snr"}, r"method\.weighting is 'snr'; allowed: gap, edm"),
        (EasyConsistencyTuning, {"sigma_min": 90.0}, r"sigma_min is 90\.0 and sigma_max is 80\.0"),
    ],
)
def test_bad_settings(what: Any, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        what(**settings)


def test_an_encoder_is_made_of_a_unet() -> None:
    with pytest.raises(UserError, match="the network is a Net; an encoder of noise is made of a U-Net"):
        VariationalConsistencyTraining().parts(network=Net(), spec=SPEC)
