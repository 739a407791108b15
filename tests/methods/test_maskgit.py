"""MaskGIT's training: how much is masked, a loss on masked places alone, smoothing, labels, resume, mistakes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from imagewright.methods.maskgit import MaskGIT, cross_entropies, hide_labels
from imagewright.models.masked import MaskedTokenModel
from imagewright.models.tokens import PixelCodec
from imagewright.networks import SongUNetConfig, TokenTransformerConfig, VQAutoencoderConfig
from imagewright.noise import StepNoise
from imagewright.pretrained import find_model
from imagewright.recipes import RECIPES
from imagewright.samplers import MaskedDecoding
from imagewright.training.experiment import Experiment, assemble, run_experiment
from imagewright.types import UNCONDITIONAL, Batch, Clock, Condition, DataSpec, Update, UserError

SPEC = DataSpec(name="test", resolution=4, channels=1, num_classes=3)
CLOCK = Clock(step=0, images=0, total_images=1)
CODEC = PixelCodec(4, 1, 5)


class Table(nn.Module):
    """The same logits for every image; keeps what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.randn(16, 5, generator=torch.Generator().manual_seed(0)).double())

    def forward(self, tokens: Tensor, time: Tensor | None = None, cond: Condition = UNCONDITIONAL) -> Tensor:
        self.shown, self.time, self.cond = tokens, time, cond
        self.out = self.logits.expand(len(tokens), -1, -1) + 0
        self.out.retain_grad()
        return self.out


def stepped(method: MaskGIT, n: int = 64, seed: int = 0) -> tuple[Table, Tensor, Update]:
    network = Table()
    parts = method.parts(network=network, codec=PixelCodec(4, 1, 5), spec=SPEC)
    levels = torch.randint(5, (n, 16), generator=torch.Generator().manual_seed(2))
    batch = Batch(CODEC.decode(levels), Condition(label=torch.arange(n) % 3))
    (event,) = method.step(parts, batch, StepNoise(seed), CLOCK)
    assert isinstance(event, Update) and event.part == "model"
    return network, levels, event


def test_the_share_of_masked_tokens_is_the_schedule_at_an_even_r() -> None:
    tokens = torch.zeros(4000, 16, dtype=torch.int64)
    masked = MaskGIT().mask(tokens, StepNoise(0))
    count = masked.sum(1)
    assert count.min() >= 1
    # ceil(16 cos(pi r / 2)) <= k where r >= 2 / pi arccos(k / 16).
    for k in (1, 4, 8, 12, 15):
        expected = 1 - 2 / math.pi * math.acos(k / 16)
        assert float((count <= k).double().mean()) == pytest.approx(expected, abs=0.03), k
    assert masked.double().mean(0).std() < 0.02  # everywhere alike


def test_the_published_bounds_mask_one_token_at_least_and_all_at_most() -> None:
    class Ends:
        def __init__(self, r: float) -> None:
            self.r: Iterator[Tensor] = iter([torch.full((3,), r, dtype=torch.float64)])

        def uniform(self, like: Tensor) -> Tensor:
            return next(self.r, torch.rand(like.shape))

    tokens = torch.zeros(3, 16, dtype=torch.int64)
    assert (MaskGIT().mask(tokens, Ends(0.0)).sum(1) == 16).all()  # type: ignore[arg-type]
    assert (MaskGIT().mask(tokens, Ends(1 - 1e-9)).sum(1) == 1).all()  # type: ignore[arg-type]


def test_known_places_give_no_gradient() -> None:
    network, levels, event = stepped(MaskGIT())
    event.loss.sum().backward()
    masked = network.shown == 5
    assert torch.equal(network.shown[~masked], levels[~masked])
    slope = network.out.grad
    assert slope is not None and not slope[~masked].any() and slope[masked].abs().sum(1).min() > 0
    assert network.time is not None
    torch.testing.assert_close(network.time, masked.float().mean(1))


def test_the_loss_is_the_mean_cross_entropy_of_an_images_masked_places() -> None:
    network, levels, event = stepped(MaskGIT(label_smoothing=0.0))
    masked = network.shown == 5
    nats = -torch.log_softmax(network.logits.detach(), 1).expand(64, -1, -1).gather(2, levels[..., None])[..., 0]
    # The model computes in float64 here, as its network does.
    torch.testing.assert_close(event.loss, (nats * masked).sum(1) / masked.sum(1))
    torch.testing.assert_close(event.parts["cross_entropy"], nats[masked].mean())


def test_smoothing_spreads_a_tenth_over_all_values() -> None:
    logits = torch.randn(2, 3, 5, dtype=torch.float64)
    tokens = torch.randint(5, (2, 3))
    aim = torch.full((2, 3, 5), 0.1 / 5, dtype=torch.float64).scatter(2, tokens[..., None], 0.92)
    smoothed, plain = cross_entropies(logits, tokens, 0.1)
    log_p = torch.log_softmax(logits, 2)
    torch.testing.assert_close(smoothed, -(aim * log_p).sum(2))
    torch.testing.assert_close(plain, -log_p.gather(2, tokens[..., None])[..., 0])


def test_labels_are_hidden_as_often_as_asked() -> None:
    cond = Condition(label=torch.arange(4000) % 10)
    hidden = hide_labels(cond, 0.2, StepNoise(0)).label
    assert hidden is not None and float((hidden == -1).double().mean()) == pytest.approx(0.2, abs=0.03)
    assert torch.equal(hidden[hidden >= 0], (torch.arange(4000) % 10)[hidden >= 0])
    assert hide_labels(cond, 0.0, StepNoise(0)) is cond and hide_labels(UNCONDITIONAL, 0.5, StepNoise(0)).label is None
    network, _, _ = stepped(MaskGIT(label_dropout=1.0))
    assert network.cond.label is not None and (network.cond.label == -1).all()


def test_the_codec_learns_nothing_and_the_optimiser_has_the_published_betas() -> None:
    parts = MaskGIT(label_dropout=0.3).parts(network=Table(), codec=PixelCodec(4, 1, 5), spec=SPEC)
    role = parts.roles["model"]
    assert role.betas == (0.9, 0.96) and role.module.label_dropout == 0.3  # type: ignore[union-attr]
    assert [n for n, p in role.module.named_parameters() if p.requires_grad] == ["network.logits"]


@pytest.mark.parametrize("name", ["vq-imagenet256", "vq-imagenet64", "maskgit-imagenet256", "maskgit-imagenet64"])
def test_the_published_stages_average_weights_at_the_published_decay(name: str) -> None:
    training = RECIPES[name]().training
    assert 0.5 ** (training.batch / training.ema.halflife_images) == pytest.approx(0.999, abs=1e-9)
    assert training.ema.rampup_ratio is None


def test_the_published_stages_have_the_released_configurations_numbers() -> None:
    vq, tokens = (RECIPES[name]() for name in ("vq-imagenet256", "maskgit-imagenet256"))
    for run, updates in ((vq, 1_000_000), (tokens, 2_000_000)):
        t, o = run.training, run.training.optimizer
        assert (t.batch, t.total_images, o.lr, o.eps, o.clip_norm) == (256, updates * 256, 1e-4, 1e-8, None)
        assert o.lr_cooldown_images == 0 and o.lr_decay_images is None
    o = vq.training.optimizer
    assert (o.kind, o.betas, o.lr_ramp_images, o.weight_decay) == ("adam", (0.0, 0.99), 0, 0.0)
    o = tokens.training.optimizer
    assert (o.kind, o.lr_ramp_images, o.weight_decay) == ("adamw", 5_000 * 256, 0.045)
    m, net, sampler = tokens.method, tokens.network, tokens.sampler
    assert (m.schedule, m.label_smoothing, m.label_dropout) == ("cosine", 0.1, 0.0)
    assert (net.width, net.depth, net.heads, net.mlp_ratio, net.dropout, net.post_norm) == (768, 24, 16, 4.0, 0.1, True)
    assert (sampler.num_steps, sampler.schedule, sampler.temperature) == (8, "cosine", 4.5)
    m = vq.method
    assert (m.commitment, m.entropy, m.entropy_temperature, m.adversarial, m.r1) == (0.25, 0.1, 0.01, 0.1, 10.0)


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match=r"method\.schedule is 'cosin'"):
        MaskGIT(schedule="cosin")
    with pytest.raises(UserError, match=r"method\.label_smoothing is 1"):
        MaskGIT(label_smoothing=1.0)
    with pytest.raises(UserError, match=r"method\.label_dropout is -1"):
        MaskGIT(label_dropout=-1.0)


VQ = VQAutoencoderConfig(
    img_resolution=8, in_channels=1, model_channels=4, channel_mult=(1, 1), num_blocks=1, codebook_size=7,
    codebook_dim=4,
)  # fmt: skip
NETWORK = TokenTransformerConfig(values=2, length=1, width=16, depth=1, heads=2, dropout=0.1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = RECIPES["vq-digits"]()
    method = replace(base.method, discriminator_width=4)
    run = replace(base, network=VQ, method=method, training=replace(base.training, total_images=32, batch=16))
    return run_experiment(run, tmp_path_factory.mktemp("maskgit") / "vq")


@pytest.mark.parametrize("codec", ["codebook", "pixels"])
def test_resuming_changes_no_bit(codec: str, tokenizer: Path, resumed_run: Callable[[Experiment], Path]) -> None:
    base = RECIPES["maskgit-digits"]()
    training = replace(base.training, total_images=96, batch=16, micro_batch=8, log_images=16, snapshot_images=96,
                       checkpoint_images=32)  # fmt: skip
    experiment = replace(base, network=NETWORK, training=training, sampler=MaskedDecoding(num_steps=2))
    experiment = experiment.giving(tokenizer=str(tokenizer) if codec == "codebook" else None)

    folder = resumed_run(experiment)
    model = find_model(folder).model
    assert isinstance(model, MaskedTokenModel) and model.label_dropout == 0.1
    if codec == "codebook":
        assert (model.codec.values, model.codec.length) == (7, 16)
        images = torch.rand(4, 1, 8, 8) * 2 - 1  # the tokenizer came through training without a change
        assert torch.equal(model.codec.encode(images), find_model(tokenizer).model.encode(images))  # type: ignore[operator]
    else:
        assert (model.codec.values, model.codec.length) == (256, 64)


def test_tokenizers_that_do_not_fit_are_named(tokenizer: Path, tmp_path: Path) -> None:
    base = RECIPES["maskgit-digits"]()
    with pytest.raises(UserError, match=r"emoji64-32 is a denoiser, which makes images .*; this method takes a codec"):
        assemble(base.giving(tokenizer="emoji64-32"))
    emoji = replace(base, data=replace(base.data, source="emoji64", resolution=16)).giving(tokenizer=str(tokenizer))
    with pytest.raises(UserError, match=r"takes images of resolution and channels \(8, 1\); the data have \(16, 3\)"):
        assemble(emoji)
    network = SongUNetConfig(img_resolution=8, in_channels=1, out_channels=1, model_channels=8)
    with pytest.raises(UserError, match="method EDM learns no tokens; tokenizer has no effect"):
        assemble(replace(RECIPES["edm-digits"](), network=network).giving(tokenizer=str(tokenizer)))
