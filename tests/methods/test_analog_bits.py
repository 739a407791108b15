"""Training on bits and self-conditioning: what is shown to whom, what takes a gradient, the best answers, mistakes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from imagewright.cli.main import main
from imagewright.data import open_images
from imagewright.guidance import classifier_free
from imagewright.interop.graphs import write_program
from imagewright.methods.analog_bits import AnalogBitsTraining
from imagewright.methods.edm import EDM
from imagewright.methods.self_conditioning import estimated
from imagewright.metrics.bits import scorer
from imagewright.models.bits import BitDenoiser
from imagewright.models.consistency import ConsistencyModel
from imagewright.models.files import load_model
from imagewright.models.preconditioning import EDMPrecond
from imagewright.models.self_conditioned import SelfConditioned, carried, is_self_conditioned
from imagewright.models.tokens import PixelCodec
from imagewright.networks import SongUNet, SongUNetConfig, VQAutoencoderConfig
from imagewright.noise import BatchNoise, StepNoise
from imagewright.recipes import RECIPES
from imagewright.samplers import BitDiffusion, Heun
from imagewright.samplers.generator import ImageGenerator
from imagewright.training.experiment import Experiment, run_experiment
from imagewright.training.footprint import footprint
from imagewright.types import UNCONDITIONAL, Batch, Clock, Condition, DataSpec, Update, UserError

F64 = torch.float64
CLOCK = Clock(step=0, images=0, total_images=1)
CODEC, SPEC = PixelCodec(1, 1), DataSpec(name="t", resolution=1, channels=1)
BITS = 8


class Linear(nn.Module):
    """weight @ x, 8 bits, of x alone or of x and an estimate; keeps what it was shown."""

    def __init__(self, coming: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(BITS, coming, generator=generator, dtype=F64) / 2)
        self.shown: list[Tensor] = []

    def forward(self, x: Tensor, label: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        self.shown.append(x.detach())
        return torch.einsum("oi,nihw->nohw", self.weight, x)


def batch(n: int = 6) -> Batch:
    return Batch(CODEC.decode((torch.arange(n) * 43 % 256)[:, None]), Condition(label=torch.arange(n) % 2))


def stepped(method: AnalogBitsTraining, network: nn.Module, noise: StepNoise | None = None, n: int = 6) -> Update:
    parts = method.parts(network=network, codec=CODEC, spec=SPEC)
    (event,) = method.step(parts, batch(n), noise or StepNoise(3), CLOCK)
    assert isinstance(event, Update)
    return event


def test_every_second_image_is_shown_its_own_clipped_estimate() -> None:
    network = Linear(2 * BITS)
    stepped(AnalogBitsTraining(scale=0.5), network)
    first, second = network.shown
    assert len(first) == 3 and not first[:, BITS:].any()
    assert torch.equal(first[:, :BITS], second[::2, :BITS])
    told = torch.einsum("oi,nihw->nohw", network.weight[:, :BITS].detach(), first[:, :BITS]).clamp(-0.5, 0.5)
    torch.testing.assert_close(second[::2, BITS:].float(), told.float())
    assert (told.abs() == 0.5).any() and not second[1::2, BITS:].any()


def test_the_estimate_takes_no_gradient() -> None:
    network = Linear(2 * BITS)
    stepped(AnalogBitsTraining(), network).loss.sum().backward()
    bits = AnalogBitsTraining().parts(network=network, codec=CODEC, spec=SPEC).denoiser.encode(batch().images)
    x = network.shown[1]
    weight = network.weight.detach().clone().requires_grad_()
    answer = torch.einsum("oi,nihw->nohw", weight, x)  # with the estimate as a constant
    (answer - bits).square().flatten(1).mean(1).sum().backward()
    torch.testing.assert_close(network.weight.grad, weight.grad)


def test_a_network_that_ignores_the_estimate_has_the_loss_of_one_without() -> None:
    plain, ours = Linear(BITS), Linear(2 * BITS)
    with torch.no_grad():
        ours.weight.zero_()[:, :BITS] = plain.weight
    losses = [stepped(AnalogBitsTraining(self_conditioning=on), net).loss for on, net in ((False, plain), (True, ours))]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-14, atol=0)
    with torch.no_grad():  # and one that does not ignore it has another
        ours.weight[:, BITS:] = 0.3
    assert not torch.allclose(stepped(AnalogBitsTraining(), ours).loss[::2], losses[0][::2])


def test_who_is_shown_an_estimate_does_not_depend_on_the_micro_batch() -> None:
    shown = []
    for place in (0, 1, 3):
        network = Linear(2 * BITS)
        stepped(AnalogBitsTraining(), network, BatchNoise(0, 0, range(place, place + 2), 8), n=2)
        shown.append(network.shown[1][:, BITS:].flatten(1).any(1).tolist())
    assert shown == [[True, False], [False, True], [False, True]]
    alone = Linear(2 * BITS)
    stepped(AnalogBitsTraining(), alone, BatchNoise(0, 0, range(5, 6), 8), n=1)
    assert len(alone.shown) == 2 and not alone.shown[1][:, BITS:].any()


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_the_best_answer_to_a_fair_bit_is_a_hyperbolic_tangent(scale: float) -> None:
    """x0 = b tanh(b sqrt(gamma) x_t / (1 - gamma)), and logits twice the argument: gradients vanish there alone."""
    g = 0.4
    x_t = torch.linspace(-2, 2, 9, dtype=F64)
    argument = scale * math.sqrt(g) * x_t / (1 - g)
    likely = torch.sigmoid(2 * argument)  # of the bit 1
    best = {"mse": scale * torch.tanh(argument), "sigmoid": 2 * argument}
    zero, one = torch.zeros(9, 4, dtype=torch.int64), torch.ones(9, 4, dtype=torch.int64)
    codec = PixelCodec(2, 1, 2)  # one bit, four places
    for head, at in best.items():
        model = BitDenoiser(nn.Identity(), codec, scale=scale, head=head)  # type: ignore[arg-type]
        for shift, expected in ((0.0, True), (0.1, False)):
            answer = (at + shift).view(9, 1, 1, 1).expand(9, 1, 2, 2).clone().requires_grad_()
            (likely * model.loss(answer, one) + (1 - likely) * model.loss(answer, zero)).sum().backward()
            assert bool((answer.grad.abs() < 1e-12).all()) is expected  # type: ignore[union-attr]
        torch.testing.assert_close(model.estimate(at.view(9, 1, 1, 1)).flatten(), best["mse"])


# --- the path that sampling takes ---------------------------------------------------------------------------------


class Recorder(nn.Module):
    """An image network that answers louder and louder, and other things to other classes; keeps the estimates."""

    def __init__(self) -> None:
        super().__init__()
        self.estimates: list[Tensor] = []
        self.answers: list[Tensor] = []

    def forward(self, x: Tensor, label: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        self.estimates.append(x[:, 1:])
        told = 0.0 if cond.label is None else 1.0
        self.answers.append(torch.full_like(x[:, :1], 0.1 * len(self.answers) + told - 0.2))
        return self.answers[-1]


class Plain(nn.Module):
    """A denoiser that answers what its network does."""

    sigma_min, sigma_max = 0.01, 10.0

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, sigma: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        answer: Tensor = self.network(x, sigma, cond)
        return answer

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return sigma


@pytest.mark.parametrize("sampler", [Heun(num_steps=4), BitDiffusion(num_steps=7)])
def test_each_call_of_any_sampler_is_shown_the_answer_before_clipped(sampler: Any) -> None:
    seen = Recorder()
    generator = ImageGenerator(Plain(SelfConditioned(seen)), replace(SPEC, resolution=2), sampler)
    assert generator.nfe == 7 and not seen.estimates
    for _ in range(2):  # a second path begins without
        generator.generate(3)
    assert len(seen.estimates) == 14
    for k in (0, 7):
        assert not seen.estimates[k].any()
        for before, told in zip(seen.answers[k : k + 6], seen.estimates[k + 1 : k + 7], strict=True):
            torch.testing.assert_close(told, before.clamp(-1, 1))


def test_a_flow_map_of_such_a_network_is_asked_as_at_the_beginning() -> None:
    seen = Recorder()
    generator = ImageGenerator(ConsistencyModel(SelfConditioned(seen)), replace(SPEC, resolution=2))
    generator.generate(2)
    assert seen.estimates and not any(estimate.any() for estimate in seen.estimates)


def test_a_guided_denoiser_is_shown_the_guided_answer_at_both_calls() -> None:
    seen = Recorder()
    path = carried(classifier_free(Plain(SelfConditioned(seen)), 1.5))
    x, sigma, cond = torch.zeros(2, 1, 2, 2), torch.ones(2), Condition(label=torch.zeros(2, dtype=torch.int64))
    answer = path(x, sigma, cond)
    path(x, sigma, cond)
    torch.testing.assert_close(answer, torch.lerp(seen.answers[1], seen.answers[0], 1.5))
    for told in seen.estimates[2:]:
        torch.testing.assert_close(told, answer.clamp(-1, 1))


def test_the_first_pass_has_the_dropout_of_its_images() -> None:
    noise = BatchNoise(0, 0, range(4, 10), 16)
    like = torch.ones(6, 5)
    whole = noise.kept(like, 0.5)
    again = BatchNoise(0, 0, range(4, 10), 16)
    with again.among(range(1, 6, 2)):
        assert torch.equal(again.kept(like[:3], 0.5), whole[1::2])
    assert torch.equal(again.kept(like, 0.5), noise.kept(like, 0.5))


# --- runs -------------------------------------------------------------------------------------------------------------


def tiny(recipe: str, **changes: Any) -> Experiment:
    run = RECIPES[recipe]()
    network = SongUNetConfig(img_resolution=8, in_channels=1, out_channels=1, model_channels=8, channel_mult=(1,),
                             num_blocks=1, attn_resolutions=())  # fmt: skip
    training = replace(run.training, total_images=32, batch=16, log_images=16, snapshot_images=32, checkpoint_images=32)
    return replace(run, network=network, sampler=BitDiffusion(num_steps=2), training=training, **changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_experiment(tiny("analog-bits-digits"), tmp_path_factory.mktemp("bits") / "run")


def test_a_run_leaves_a_model_that_draws(run: Path, tmp_path: Path) -> None:
    file = load_model(run)
    assert is_self_conditioned(file.model) and file.sampler is not None and file.sampler["class"] == "bit-diffusion"
    main(["sample", str(run), "--n", "2", "--steps", "2", "--out", str(tmp_path / "a"), "--device", "cpu"])
    main(["sample", str(run), "--n", "2", "--sampler", "heun", "--steps", "2", "--out", str(tmp_path / "b"),
          "--device", "cpu"])  # fmt: skip
    seen: list[Tensor] = []
    told = ImageGenerator(file.model, file.spec, BitDiffusion(num_steps=2))
    drawn = told.generate(1, on_step=lambda x, x0, sigma: seen.append(x0))
    assert [tuple(each.shape) for each in seen] == [(1, 1, 8, 8)] * 2  # shown as images
    assert torch.equal(((seen[-1] + 1) * 127.5).round().byte()[:, 0], torch.from_numpy(drawn[..., 0]))
    whole = ImageGenerator(file.model, file.spec, BitDiffusion(num_steps=2)).generate(3, seed=4)
    alone = ImageGenerator(file.model, file.spec, BitDiffusion(num_steps=2)).generate(1, seed=4, first=2)
    assert abs(whole[2].astype(int) - alone[0].astype(int)).max() <= 1


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["evaluate", "--metrics", "bpd"], "has no likelihood of images: it denoises bits as real numbers"),
        (["couple", "--n", "1", "--sampler", "heun", "--out", "OUT"], "from noise of another shape, [8, 8, 8]"),
        (["edit", "--task", "inpaint", "--index", "3", "--mask", "bottom"], "is a latent denoiser; editing needs"),
        (["export", "--format", "torch", "--out", "OUT"], "it has no graph of one call"),
        (["export", "--format", "diffusers", "--out", "OUT"], "has no equal of a BitDenoiser"),
        (["tune", "bespoke"], "is a latent denoiser; what is tuned here is a denoiser of images"),
        (["sample", "--guidance", "cfg", "--weight", "2", "--out", "OUT"], "guidance needs denoisers"),
    ],
)
def test_what_bits_cannot_do_is_said_in_a_sentence(
    args: list[str], why: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, *rest = (str(tmp_path / "out") if arg == "OUT" else arg for arg in args)
    with pytest.raises(SystemExit) as ended:
        main([command, *rest[: command == "tune"], str(run), *rest[command == "tune" :]])
    assert ended.value.code == 2
    assert why in capsys.readouterr().err


def test_a_teacher_of_bits_is_refused(run: Path, tmp_path: Path) -> None:
    student = RECIPES["cd-digits"]().giving(teacher=str(run))
    with pytest.raises(UserError, match="is a latent denoiser, which makes images of noise in many steps"):
        run_experiment(student, tmp_path / "student")


def test_tokens_of_a_tokenizer_are_bits_too(tmp_path: Path) -> None:
    vq = RECIPES["vq-digits"]()
    network = VQAutoencoderConfig(img_resolution=8, in_channels=1, model_channels=4, channel_mult=(1, 1), num_blocks=1,
                                  codebook_size=6, codebook_dim=4)  # fmt: skip
    training = replace(vq.training, total_images=8, batch=8, snapshot_images=8, checkpoint_images=8)
    codec = run_experiment(replace(vq, network=network, training=training), tmp_path / "vq")
    folder = run_experiment(tiny("analog-bits-digits").giving(tokenizer=str(codec)), tmp_path / "run")
    model = load_model(folder).model
    assert model.latent == (3, 4, 4)
    assert ImageGenerator(model, load_model(folder).spec).generate(2).shape == (2, 8, 8, 1)


def test_a_self_conditioned_denoiser_has_no_likelihood() -> None:
    network = SelfConditioned(Recorder())
    with pytest.raises(UserError, match="a self-conditioned EDMPrecond has no likelihood"):
        scorer(EDMPrecond(network))
    with pytest.raises(UserError, match="a self-conditioned EDMPrecond is shown its own answers; it has no graph"):
        write_program(Path("no"), EDMPrecond(network), SPEC)


def test_edm_is_self_conditioned_by_one_setting() -> None:
    images = torch.from_numpy(open_images("digits").images(range(4))).permute(0, 3, 1, 2) / 127.5 - 1
    method, network = EDM(self_conditioning=True), Recorder()
    parts = method.parts(network=network, spec=SPEC)
    (event,) = method.step(parts, Batch(images.float()), StepNoise(0), CLOCK)
    assert method.sizes(spec=SPEC) == {"in_channels": 2} and isinstance(event, Update)
    assert [len(estimate) for estimate in network.estimates] == [2, 4]
    assert network.estimates[1][::2].any() and not network.estimates[1][1::2].any()


@pytest.mark.parametrize("name", [n for n in RECIPES if n.startswith("analog-bits-")])
def test_recipes_have_the_published_settings(name: str) -> None:
    run = RECIPES[name]()
    optimizer = run.training.optimizer
    assert (optimizer.kind, optimizer.betas, optimizer.weight_decay) == ("adamw", (0.9, 0.999), 0)
    assert run.method.self_conditioning and (optimizer.eps, optimizer.clip_norm) == (1e-8, 1)
    if "cifar10" in name or "imagenet64" in name:
        assert run.data.xflip and optimizer.lr_ramp_images == 10_000 * run.training.batch
        assert run.training.total_images == (1_500_000 if "cifar10" in name else 250_000) * run.training.batch


def test_what_a_wrapped_network_costs_is_what_the_network_costs() -> None:
    run = tiny("analog-bits-digits")
    net = SongUNet(replace(run.network, in_channels=2, label_dim=0))
    spec = replace(SPEC, resolution=8)
    assert footprint(SelfConditioned(net), spec) == footprint(net, spec) is not None


def test_estimates_of_a_slice_are_the_models_own() -> None:
    network = Linear(2)
    network.weight = nn.Parameter(torch.ones(1, 2, dtype=F64))
    x = torch.tensor([0.2, 0.4, -3.0], dtype=F64).view(3, 1, 1, 1)
    told = estimated(Plain(SelfConditioned(network)), x, torch.ones(3, dtype=F64), UNCONDITIONAL, StepNoise(0))
    assert told.estimate is not None
    assert told.estimate.flatten().tolist() == pytest.approx([0.2, 0, -3])  # which the network clips when it is shown
