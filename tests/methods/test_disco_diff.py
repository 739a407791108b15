"""DisCo-Diff: Gumbel-softmax, cross-attentions, both stages, drawing and likelihood, against closed forms."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from imagewright.data import ImageSet
from imagewright.guidance import Guided, LayerSkipped, SkipScale, SkipTuned, latent_guidance
from imagewright.interop.graphs import write_program
from imagewright.methods.disco_diff import DiscoDiff, LatentPrior, Transformer
from imagewright.methods.edm import EDM
from imagewright.metrics.bits import BitsSettings, measure_bits
from imagewright.models.description import build, describe
from imagewright.models.discrete_latents import LatentDenoiser, gumbel, told_latents
from imagewright.models.files import ModelFile, load_model, save_model
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
    TokenTransformer,
    TokenTransformerConfig,
    UNet,
)
from imagewright.networks.latent_layers import CrossAttention
from imagewright.noise import ImageNoise, StepNoise
from imagewright.oracles import GaussianMixture
from imagewright.samplers import Euler, Heun, Restart, UniPC
from imagewright.samplers.curvature import excess_length
from imagewright.samplers.generator import ImageGenerator
from imagewright.samplers.latents_first import STREAM, draw_latents, latents_first
from imagewright.samplers.replay import Replay, Replays
from imagewright.training.couple import Drawing
from imagewright.tuning.bespoke import BespokeTraining, train_bespoke
from imagewright.types import Batch, Clock, Condition, DataSpec, Update, UserError

F64 = torch.float64
SIZES: dict[str, Any] = {
    "img_resolution": 8, "in_channels": 1, "out_channels": 1, "model_channels": 8, "channel_mult": (1, 2),
    "num_blocks": 1, "attn_resolutions": (8, 4), "dropout": 0.0,
}  # fmt: skip
SPEC = DataSpec(name="toy", resolution=8, channels=1)
CLASSES = DataSpec(name="toy", resolution=8, channels=1, num_classes=3)
TINY = Transformer(width=8, depth=1, heads=2)
M, K = 4, 5
METHOD = DiscoDiff(latents=M, values=K, patch=4, encoder=TINY, told=TINY)


def shaken(module: Any, by: float = 0.3) -> Any:
    """Its numbers moved at random, so that no layer says nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(by * torch.randn(p.shape, generator=generator).to(p))
    return module


NETWORKS: tuple[UNet, ...] = tuple(
    shaken(network, 0.05)  # whose last layers begin as zeros
    for network in (
        SongUNet(SongUNetConfig(**SIZES)),
        DhariwalUNet(DhariwalUNetConfig(**{**SIZES, "model_channels": 64, "channel_mult": (1,)}, label_dim=3)),
        ADMUNet(ADMUNetConfig(**SIZES, channels_per_head=None, resampling="conv", groups=4)),
        EDM2UNet(EDM2UNetConfig(**SIZES, channels_per_head=8)),
    )
)


def fresh(network: UNet = NETWORKS[0], method: DiscoDiff = METHOD, spec: DataSpec = SPEC) -> LatentDenoiser:
    """Untrained, float64, around a copy of a network."""
    torch.manual_seed(0)
    made: LatentDenoiser = method.parts(network=copy.deepcopy(network), spec=spec).denoiser
    return made.double()


def table(values: int = K, length: int = M, classes: int = 0) -> TokenTransformer:
    torch.manual_seed(2)
    config = TokenTransformerConfig(values=values, length=length, channels=length, label_dim=classes, width=8, depth=1,
                                    heads=2, dropout=0.0, causal=True, post_norm=False)  # fmt: skip
    return shaken(TokenTransformer(config), 0.5)  # type: ignore[no-any-return]


def whole(classes: int = 0) -> LatentDenoiser:
    """A model of both stages in which everything counts, float32."""
    network = SongUNet(SongUNetConfig(**SIZES, label_dim=classes))
    first = shaken(fresh(network, spec=CLASSES if classes else SPEC).float(), 0.1)
    shaken(first.latents.attend)
    made: LatentDenoiser = LatentPrior().parts(network=table(classes=classes), teacher=first, spec=SPEC).model
    return made.eval()


@pytest.fixture(scope="module")
def model() -> LatentDenoiser:
    return whole()


def images(n: int = 3) -> Tensor:
    return StepNoise(2).uniform(torch.empty(n, 1, 8, 8, dtype=F64)) * 2 - 1


def tokens(n: int, seed: int = 3) -> Tensor:
    return StepNoise(seed).integers(K, torch.empty(n, M))


SIGMA = torch.tensor([0.1, 1.0, 7.0], dtype=F64)


# --- the network ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: type(n).__name__)
def test_a_network_begins_as_it_is_whatever_the_latents(network: UNet) -> None:
    made = fresh(network).eval()
    plain, x = EDMPrecond(made.network).eval(), images()
    with torch.no_grad():
        want = plain(x, SIGMA)
        for cond in (Condition(), made.with_latents(Condition(), tokens(3))):
            torch.testing.assert_close(made(x, SIGMA, cond), want, rtol=0, atol=0)
    attended = {n for n, layer in network.plan().items() if layer.attention}
    assert set(made.latents.shares) == attended and len(attended) >= 3
    shaken(made.latents.attend)
    with torch.no_grad():
        answers = [made(x, SIGMA, made.with_latents(Condition(), tokens(3, seed))) for seed in (3, 4)]
        torch.testing.assert_close(plain(x, SIGMA), want, rtol=0, atol=0)  # which stays as it was
    assert float((answers[0] - answers[1]).abs().amax((1, 2, 3)).min()) > 1e-6


def test_normalised_over_the_batch_no_value_is_every_image_s(tmp_path: Path) -> None:
    """In training logits have mean 0 over the batch; afterwards an image's are its own, and a prior leaves them so."""
    made = shaken(fresh(method=replace(METHOD, batch_norm=True)).float())
    assert made.encoder.out.bias is None
    x = images(16).float()
    torch.testing.assert_close(made.encoder(x).mean(0), torch.zeros(M, K), rtol=0, atol=1e-4)
    assert float(made.encoder(x).detach().std(0).min()) > 0.05
    whole = LatentPrior().parts(network=table(), teacher=made.eval(), spec=SPEC).model.train()
    before = whole.encoder(x)
    torch.testing.assert_close(whole.encoder(x[:3]), before[:3], rtol=1e-4, atol=1e-5)
    assert whole.prior.training and not whole.encoder.training and whole.training
    save_model(tmp_path, ModelFile(model=whole, spec=SPEC))
    torch.testing.assert_close(load_model(tmp_path).model.encoder(x), before, rtol=1e-4, atol=1e-5)


def test_shares_of_one_value_are_that_value() -> None:
    made = shaken(fresh())
    one = torch.nn.functional.one_hot(tokens(3), K).double()
    torch.testing.assert_close(made.latents(one), made.latents(tokens(3)))


def test_latents_are_hidden_all_at_once() -> None:
    made = shaken(fresh())
    dropped = torch.tensor([False, True, False])
    told = made.latents(tokens(3), dropped)
    torch.testing.assert_close(told[1], made.latents(None)[0])
    torch.testing.assert_close(told[::2], made.latents(tokens(3))[::2])
    with torch.no_grad():
        x = images()
        torch.testing.assert_close(made(x, SIGMA)[1], made(x, SIGMA, Condition(latents=told))[1])


def test_a_gradient_reaches_the_encoder() -> None:
    layer = shaken(CrossAttention(4, 2, 6)).double()
    x = StepNoise(1).normal(torch.empty(2, 4, 2, 2, dtype=F64))
    vectors = StepNoise(2).normal(torch.empty(2, 3, 6, dtype=F64))
    assert torch.autograd.gradcheck(layer, (x.requires_grad_(), vectors.requires_grad_()))
    made = fresh()
    shaken(made.latents.attend)
    (event,) = METHOD.step(Named(denoiser=made), Batch(images()), StepNoise(1), Clock(0, 0, 1))
    assert isinstance(event, Update)
    event.loss.mean().backward()
    assert float(made.encoder.out.weight.grad.abs().max()) > 1e-9
    assert float(made.latents.codebook.grad.abs().max()) > 0


def test_groups_speak_to_their_own_resolution_alone() -> None:
    """The first to the lowest; the way down hears of none, and no group of another."""
    made = shaken(fresh(method=replace(METHOD, groups=2)))
    shares, layers = made.latents.shares, NETWORKS[0].plan()
    assert shares and all(name.startswith("dec.") for name in shares)
    assert {(layers[name].resolution, share.start) for name, share in shares.items()} == {(4, 0), (8, 2)}
    before, changed = tokens(2), tokens(2)
    changed[:, 0] = (changed[:, 0] + 1) % K
    a, b = made.latents(before), made.latents(changed)
    torch.testing.assert_close(a[:, 2:], b[:, 2:], rtol=0, atol=0)
    assert float((a[:, 1] - b[:, 1]).abs().max().detach()) > 1e-6  # within a group they meet
    alike = shaken(fresh())
    assert float((alike.latents(before)[:, 3] - alike.latents(changed)[:, 3]).abs().max().detach()) > 1e-6


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        (replace(METHOD, groups=3), r"groups is 3; on its way up this network attends at 4, 8 pixels: 1 or 2"),
        (replace(METHOD, latents=3, groups=2), r"3 latents cannot be shared by 2 groups equally"),
        (replace(METHOD, patch=3), r"patch is 3; it must be a divisor of 8 pixels"),
        (replace(METHOD, encoder=replace(TINY, heads=3)), r"heads is 3; it must be a divisor of width, 8"),
        (replace(METHOD, told=replace(TINY, heads=3)), r"heads is 3; it must be a divisor of width, 8"),
    ],
)
def test_what_does_not_fit_is_refused(method: DiscoDiff, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        method.parts(network=NETWORKS[0], spec=SPEC)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"latents": 0}, r"method\.latents is 0; it must be at least 1"),
        ({"temperature": 0.0}, r"method\.temperature is 0"),
        ({"latent_dropout": 1.5}, r"method\.latent_dropout is 1\.5; it must lie in \[0, 1\]"),
        ({"base": EDM(preconditioning="vp")}, r"latents go with edm"),
    ],
)
def test_bad_settings(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        DiscoDiff(**settings)


# --- the first stage --------------------------------------------------------------------------------------------


class Named:
    """In the place of `Parts`."""

    def __init__(self, **parts: Any) -> None:
        self.__dict__.update(parts)


def loss(method: Any, denoiser: Any, seed: int = 1) -> Tensor:
    (event,) = method.step(Named(denoiser=denoiser), Batch(images()), StepNoise(seed), Clock(0, 0, 1))
    assert isinstance(event, Update)
    return event.loss


@pytest.mark.parametrize(
    "method", [replace(METHOD, values=1, latent_dropout=0.0), replace(METHOD, latent_dropout=1.0)], ids=["one", "null"]
)
def test_one_value_or_hidden_latents_are_edm(method: DiscoDiff) -> None:
    """Losses and gradients at the start to the bit; and whatever the layers are, an image's latents say nothing."""
    made = fresh(method=method)
    plain = EDMPrecond(copy.deepcopy(made.network))
    ours, theirs = loss(method, made), loss(EDM(), plain)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    name, weight = next(iter(plain.network.named_parameters()))
    slopes = (
        torch.autograd.grad(ours.sum(), dict(made.network.named_parameters())[name]),
        torch.autograd.grad(theirs.sum(), weight),
    )
    torch.testing.assert_close(*slopes)
    z = StepNoise(4).normal(torch.empty(2, 1, 8, 8, dtype=F64))
    sampler = Heun(num_steps=3)
    torch.testing.assert_close(sampler(made.eval(), z), sampler(plain.eval(), z), rtol=0, atol=0)
    shaken(made)
    moved = loss(method, made)
    shaken(made.encoder)  # other latents, the same loss
    torch.testing.assert_close(loss(method, made), moved, rtol=0, atol=0)
    # With latents that are told the encoder counts.
    told = replace(METHOD, latent_dropout=0.0)
    several = shaken(fresh(method=told))
    before = loss(told, several)
    shaken(several.encoder)
    assert float((loss(told, several) - before).abs().max().detach()) > 1e-9


def test_the_loss_is_edm_s_of_a_denoiser_that_is_told() -> None:
    """Written out: the weighted squared error, summed over nothing else."""
    made, x = shaken(fresh()), images()
    noise = StepNoise(5)
    sigma = METHOD.base.training_levels.sample(noise, x[:, 0, 0, 0])
    noisy = x + sigma[:, None, None, None] * noise.normal(x)
    shares = ((made.encoder(x) + gumbel(made.encoder(x), noise)) / METHOD.temperature).softmax(-1)
    hidden = noise.uniform(sigma) < METHOD.latent_dropout
    cond = Condition(latents=made.latents(shares, hidden))
    weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    want = weight * (made(noisy, sigma, cond) - x).square().flatten(1).mean(1)
    torch.testing.assert_close(loss(METHOD, made, 5), want)


def test_latents_of_single_components_straighten_the_flow() -> None:
    """Told its component an exact denoiser is one Gaussian's: its paths are straight lines, whatever its mean."""
    mixture = GaussianMixture(2 * images(4)[:, :, :1, :2], 0.2, classes=torch.arange(4))
    z = StepNoise(1).normal(torch.empty(16, 1, 1, 2, dtype=F64))
    oracle: Any = mixture
    one = excess_length(Heun(num_steps=12), oracle, z, Condition(label=torch.arange(16) % 4))
    assert float(one.abs().max()) < 1e-12
    assert float(excess_length(Heun(num_steps=12), oracle, z).mean()) > 1e-5


# --- the second stage, and the whole ------------------------------------------------------------------------------


def test_the_prior_s_loss_is_that_of_drawn_latents(model: LatentDenoiser) -> None:
    (event,) = LatentPrior().step(Named(model=model), Batch(images().float()), StepNoise(6), Clock(0, 0, 1))
    assert isinstance(event, Update)
    drawn = (model.encoder(images().float()) + gumbel(model.encoder(images().float()), StepNoise(6))).argmax(2)
    torch.testing.assert_close(event.loss.double(), model.token_model().nll(drawn) / M, rtol=1e-5, atol=1e-6)
    learns = {n.partition(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert learns == {"prior"}


def test_what_is_no_stage_1_is_refused() -> None:
    with pytest.raises(UserError, match=r"an EDMPrecond; a prior is of a model with discrete latents"):
        LatentPrior().parts(network=table(), teacher=EDMPrecond(NETWORKS[0]), spec=SPEC)
    with pytest.raises(UserError, match=r"knows 4 tokens of 6 values; the codec has 4 of 5"):
        LatentPrior().parts(network=table(values=6), teacher=fresh(), spec=SPEC)
    with pytest.raises(UserError, match="no prior yet"):
        fresh().token_model()
    with pytest.raises(UserError, match="latents are told to U-Nets alone"):
        LatentDenoiser(table(), fresh().encoder)
    with pytest.raises(UserError, match="it must be a LatentEncoder"):
        LatentDenoiser(NETWORKS[0], table())
    flat = SongUNet(SongUNetConfig(**{**SIZES, "attn_resolutions": ()}))
    for layer in flat.dec.values():
        layer.num_heads = 0  # the lowest level has attention in any case
    with pytest.raises(UserError, match="no self-attention"):
        fresh(flat)


@pytest.mark.parametrize("sampler", [Heun(num_steps=2), Euler(num_steps=3), Restart(num_steps=9), UniPC(num_steps=3)],
                         ids=lambda s: type(s).__name__)  # fmt: skip
def test_latents_come_first_whatever_the_sampler(sampler: Any) -> None:
    """Image i has latents and noise of its own, whatever the batch; the sampler's own draws are as ever."""
    model = whole().double()
    generator = ImageGenerator(model, SPEC, sampler)
    rows = [5, 6, 7]
    cond = latents_first(model, 3, Condition(), ImageNoise(9, rows, STREAM))
    noise = ImageNoise(9, rows)
    want = sampler(model, noise.normal(torch.empty(3, 1, 8, 8)), cond, noise=noise)
    drawn = generator.drawn(rows, seed=9)
    torch.testing.assert_close(drawn, want)
    torch.testing.assert_close(generator.drawn([7], seed=9)[0], drawn[2])
    without = sampler(model, ImageNoise(9, rows).normal(torch.empty(3, 1, 8, 8)), noise=ImageNoise(9, rows))
    assert float((without - want).abs().max()) > 1e-3


def test_latents_are_drawn_from_the_prior_given_the_class() -> None:
    made, n = whole(classes=3), 2_000
    cond = Condition(label=torch.full((n,), 2))
    drawn = draw_latents(made, n, cond, StepNoise(1))
    p = made.token_model().logits(drawn[:1], cond[:1]).softmax(-1)[0, 0].detach()
    share = drawn[:, 0].bincount(minlength=K) / n
    assert ((share - p).abs() < 5 * (p * (1 - p) / n).sqrt()).all()
    other = made.token_model().logits(drawn[:1], Condition(label=torch.tensor([0]))).softmax(-1)[0, 0]
    assert float((other - p).abs().max().detach()) > 0.01


def test_a_model_of_the_first_stage_draws_without_latents() -> None:
    first = shaken(fresh().float(), 0.1)
    z = ImageNoise(1, [0]).normal(torch.empty(1, 1, 8, 8))
    drawn = ImageGenerator(first, SPEC, Euler(num_steps=2)).drawn([0], seed=1)
    torch.testing.assert_close(drawn, Euler(num_steps=2)(first, z), rtol=1e-5, atol=1e-5)


def test_guidance_on_latents(model: LatentDenoiser) -> None:
    x, sigma = images().float(), SIGMA.float()
    cond = model.with_latents(Condition(), tokens(3))
    told, untold = model(x, sigma, cond), model(x, sigma)
    guided = latent_guidance(model, 2.5)
    torch.testing.assert_close(guided(x, sigma, cond), told + 1.5 * (told - untold), rtol=1e-4, atol=1e-4)
    assert guided.evaluations(1.0) == 2 and latent_guidance(model, 1.0).evaluations(1.0) == 1
    assert told_latents(guided) is model  # which both ask
    with pytest.raises(UserError, match="those of one mean nothing to the other"):
        told_latents(Guided(model, whole(), 2.0))
    assert told_latents(EDMPrecond(NETWORKS[0])) is None


def test_what_changes_the_network_leaves_its_latents(model: LatentDenoiser) -> None:
    x, sigma, cond = images().float(), SIGMA.float(), model.with_latents(Condition(), tokens(3))
    want = model(x, sigma, cond)
    torch.testing.assert_close(SkipTuned(model, SkipScale())(x, sigma, cond), want)
    for changed in (SkipTuned(model, SkipScale(bottom=0.5)), LayerSkipped(model, {1.0: (1,)})):
        answer = changed(x, sigma, cond)
        assert float((answer - want).abs().max()) > 1e-6 and float((answer - changed(x, sigma)).abs().max()) > 1e-6


def test_a_replayed_network_is_told_too(model: LatentDenoiser) -> None:
    """What stands in the place of a network's forward pass knows nothing of the layers that are put into a copy."""
    x, sigma, cond = images().float(), SIGMA.float(), model.with_latents(Condition(), tokens(3))
    want = model(x, sigma, cond)
    with Replays(model):
        torch.testing.assert_close(model(x, sigma, cond), want)
        assert isinstance(model.ask, Replay)
        assert cond.latents is not None
        changed = model.latents.of(cast(UNet, model.network), cond.latents)
        assert "forward" not in vars(changed) and "forward" in vars(model.network)
    assert "ask" not in vars(model)


def test_it_is_one_model_on_disk(model: LatentDenoiser, tmp_path: Path) -> None:
    save_model(tmp_path, ModelFile(model=model, spec=SPEC))
    again = load_model(tmp_path).model
    cond = latents_first(again, 2, Condition(), StepNoise(1))
    torch.testing.assert_close(cond.latents, latents_first(model, 2, Condition(), StepNoise(1)).latents)
    assert describe(again) == describe(model) and "prior" in describe(again)
    assert "prior" not in describe(build(describe(fresh())))


def test_a_learnt_solver_s_paths_are_told_latents(model: LatentDenoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Condition] = []

    def stop(velocity: Any, latents: Tensor, cond: Condition, tolerance: float) -> None:
        seen.append(cond)
        raise InterruptedError

    monkeypatch.setattr("imagewright.tuning.bespoke.solve_paths", stop)
    with pytest.raises(InterruptedError):
        train_bespoke(model, SPEC.shape, config=BespokeTraining(num_steps=2, batch=3))
    assert seen[0].latents is not None and seen[0].latents.shape == (3, M, 8)
    with pytest.raises(UserError, match="it has no graph of one call"):
        write_program(Path("never"), model, SPEC)


def test_bits_count_the_latents_too(model: LatentDenoiser) -> None:
    pixels = ImageSet.of(((images(2) + 1) * 127).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())
    settings = BitsSettings(ode_steps=1, passes=1)

    def bits(measured: Any) -> float:
        return measure_bits(measured, SPEC, pixels, split="test", settings=settings).bpd

    x = torch.from_numpy(pixels.images()).permute(0, 3, 1, 2).float() / 127.5 - 1
    cond, nats = model.recognised(x, Condition())
    found = model.encoder(x).argmax(2)
    torch.testing.assert_close(nats, model.token_model().nll(found))
    torch.testing.assert_close(cond.latents, model.latents(found))

    class Given(torch.nn.Module):  # the same flow, its latents known
        sigma_min, sigma_max = model.sigma_min, model.sigma_max

        def forward(self, x: Tensor, sigma: Tensor, told: Condition) -> Tensor:
            return model(x, sigma, cond)

    given = Given()
    vars(given)["_modules"].clear()
    want = bits(given) + float(nats.mean()) / (64 * math.log(2))
    assert bits(model) == pytest.approx(want, rel=1e-4) and float(nats.min()) > 0.5


def test_an_inverted_image_has_its_own_latents(model: LatentDenoiser) -> None:
    generator = ImageGenerator(model, SPEC, Euler(num_steps=2))
    drawing = Drawing.of(generator, "toy", "none")
    real = ImageSet.of((images(2) * 100 + 128).to(torch.uint8).permute(0, 2, 3, 1).numpy())
    object.__setattr__(drawing, "images", real)
    pair = drawing(range(2), 0, 2)
    cond, _ = model.recognised(pair["images"], Condition())
    want = Euler(num_steps=2).invert(model, pair["images"], cond)
    torch.testing.assert_close(pair["latents"], want, rtol=1e-4, atol=1e-4)
