"""Pre-training on events: projection, Sinkhorn, who learns from what, resume; probe and fine-tuning; the commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imagewright.bench.claims import event_pretraining as claim
from imagewright.cli.dry_run import StandIns
from imagewright.cli.main import main
from imagewright.data.event_augment import normalised, without_hot_pixels
from imagewright.data.events import EventPairs
from imagewright.methods.event_classification import EventClassification
from imagewright.methods.event_pretraining import (
    EventPretraining,
    EventViews,
    balanced,
    contrasted,
    divergence,
    projected,
)
from imagewright.models.event_encoder import EventEncoder
from imagewright.models.files import load_model
from imagewright.networks import EventViT, EventViTConfig, WideResNet, WideResNetConfig
from imagewright.networks.event_vit import patch_information
from imagewright.noise import BatchNoise, StepNoise
from imagewright.recipes import RECIPES
from imagewright.recipes.event_pretraining import three_stages
from imagewright.samplers import Heun
from imagewright.training.config import OptimizerConfig, TrainingConfig
from imagewright.training.experiment import Experiment, assemble, run_experiment
from imagewright.training.learners import Learner
from imagewright.training.snapshots import read_image, save_image
from imagewright.types import Clock, Condition, DataSpec, Follow, Trained, Update, UserError

SPEC = DataSpec(name="standin_events_digits", resolution=16, channels=2, num_classes=10)
TINY = EventViTConfig(img_resolution=16, num_classes=10, patch=8, width=8, depth=1, heads=2, head_norm=True)
METHOD = EventPretraining(
    views=EventViews(shift=1, copies=(2, 9), copies_least=5, area=0.6), hidden=8, out=6, keep=0.75
)


def unit(*shape: int) -> Tensor:
    draw = torch.Generator().manual_seed(len(shape))
    return F.normalize(torch.randn(*shape, generator=draw, dtype=torch.float64), dim=-1)


# --- losses -----------------------------------------------------------------------------------------------------------


def test_zeta_is_a_projection() -> None:
    y, v = (torch.randn(5, 4, dtype=torch.float64) for _ in "yv")
    y.requires_grad_()
    once = projected(v, y)
    direction = F.normalize(y, dim=1)
    torch.testing.assert_close((once * direction).sum(1), (F.normalize(v, dim=1) * direction).sum(1))
    length = once.norm(dim=1, keepdim=True)
    torch.testing.assert_close(projected(once, y) * length, once)  # idempotent, but for what is normalised first
    torch.testing.assert_close(projected(y, y), direction)
    torch.testing.assert_close(projected(v, 3 * y), once)
    torch.testing.assert_close(projected(-2 * v, y), -once)
    v.requires_grad_()
    projected(v, y).sum().backward()
    assert y.grad is None and v.grad is not None


def test_sinkhorn_balances_and_what_is_alike_differs_by_nothing() -> None:
    scores = torch.randn(2, 6, 6, dtype=torch.float64)
    three, many = balanced(scores), balanced(scores, 200)
    torch.testing.assert_close(three.sum(2), torch.ones(2, 6, dtype=torch.float64))
    torch.testing.assert_close(many.sum(1), torch.ones(2, 6, dtype=torch.float64))
    assert (three.sum(1) - 1).abs().max() > 1e-6
    q = unit(1, 6, 4)
    torch.testing.assert_close(divergence(q, q, 0.1, "paper"), torch.zeros(1, 6, dtype=torch.float64))
    even = torch.eye(6, dtype=torch.float64)[None]  # whose similarities are balanced already
    torch.testing.assert_close(divergence(even, even, 0.1, "code"), torch.zeros(1, 6, dtype=torch.float64))
    assert (divergence(q, unit(1, 6, 5)[..., :4], 0.1, "code") > 0).all()


def test_the_papers_divergence_by_hand() -> None:
    """KL(softmax of q's similarities || that of y's)."""
    q = unit(1, 5, 4)
    y = F.normalize(q.flip(1) + q.roll(1, 2), dim=2)
    ours, theirs = ((t @ t.mT / 0.1).softmax(2) for t in (q, y))
    torch.testing.assert_close(divergence(q, y, 0.1, "paper"), (ours * (ours / theirs).log()).sum(2))
    assert not torch.allclose((ours * (ours / theirs).log()).sum(2), (theirs * (theirs / ours).log()).sum(2), rtol=0.01)


def test_a_contrast_by_hand() -> None:
    q, k = unit(3, 4), unit(3, 5)[:, :4]
    scores = (q @ k.T / 0.2).softmax(1)
    torch.testing.assert_close(contrasted(q, k, 0.2), -0.4 * scores.diagonal().log())


@pytest.mark.parametrize("learns", [False, True])
def test_the_teachers_layer_learns_from_the_structure_and_if_asked_from_pictures(learns: bool) -> None:
    method = replace(METHOD, picture_gradient=learns)
    q, k, y = (unit(4, 6 + i)[:, :6].requires_grad_() for i in range(3))
    found = method.losses(q, q, k, y)
    for name, reaches in (("events", False), ("pictures", learns), ("structure", True)):
        (gradient,) = torch.autograd.grad(found[name].sum(), y, allow_unused=True, retain_graph=True)
        assert (gradient is not None and bool(gradient.abs().max() > 0)) == reaches, name
    plain = replace(method, project=False).losses(q, q, k, y)["events"]
    torch.testing.assert_close(plain, contrasted(F.normalize(q, dim=1), F.normalize(k, dim=1), 0.2))


def test_groups_are_compared_among_themselves() -> None:
    q, y = unit(4, 6), unit(4, 7)[:, :6]
    halves = [METHOD._structure(a, b) for a, b in ((q[:2], y[:2]), (q[2:], y[2:]))]
    torch.testing.assert_close(replace(METHOD, group=2)._structure(q, y), torch.cat(halves))
    with pytest.raises(UserError, match=r"method\.group is 3; it must divide the 4 pairs"):
        replace(METHOD, group=3)._structure(q, y)


# --- a step -----------------------------------------------------------------------------------------------------------


class Teacher(nn.Module):
    """The mean colour, twice."""

    dim = 2

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((1, 2, 3))[:, None].expand(-1, 2) + torch.tensor([0.1, 0.2])


def batch(n: int = 4) -> EventPairs:
    draw = torch.Generator().manual_seed(3)
    place = 16 * torch.rand(n, 40, 2, generator=draw)
    sign = 2.0 * torch.randint(2, (n, 40, 1), generator=draw) - 1
    events = torch.cat([place, torch.arange(40.0).expand(n, -1)[..., None], sign], 2)
    return EventPairs(events, torch.rand(n, 1, 8, 8, generator=draw), Condition(label=torch.tensor([1, 3, -1, 0])[:n]))


def made(method: EventPretraining, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    teacher: Any = Teacher()
    return method.parts(network=EventViT(TINY), teacher=teacher)


def stepped(method: Any, parts: Any, at: int = 0) -> tuple[list[Any], Update]:
    events = list(method.step(parts, batch(), BatchNoise(0, 0, range(4), 4), Clock(at, at, 8)))
    update = events[-1]
    assert isinstance(update, Update)
    return events, update


@pytest.mark.parametrize(
    "changed",
    [{"reversal": 0.0}, {"shift": 0}, {"copies": (0, 0)}, {"area": 1.0}, {"mirror": False}, {"blur": 1.0},
     {"colour": 0.5}],
)  # fmt: skip
def test_every_augmentation_is_made(changed: dict[str, Any]) -> None:
    events = batch().events

    def seen(views: EventViews) -> Tensor:
        noise = BatchNoise(0, 0, range(4), 4)
        return views.view(views.counts(events, 16, noise), noise)

    assert not torch.equal(seen(METHOD.views), seen(replace(METHOD.views, **changed)))


def test_time_is_turned_in_half_of_the_streams_and_all_shifts_are_made() -> None:
    stream = torch.tensor([[5.0, 9.0, 0.0, 1.0]]).expand(2000, 1, 4)
    alone = EventViews(shift=2, copies=(0, 0), area=1.0, mirror=False)
    counts = alone.counts(stream, 16, BatchNoise(0, 0, range(2000), 2000))
    assert 900 < counts[:, 1].sum() < 1100 and counts.sum() == 2000
    where = counts.sum((0, 1))
    assert (where[7:12, 3:8] > 40).all() and where[7:12, 3:8].sum() == 2000
    always, never = (
        replace(alone, reversal=chance).counts(stream, 16, BatchNoise(0, 0, range(2000), 2000)).sum((0, 2, 3)).tolist()
        for chance in (1.0, 0.0)
    )
    assert {*always} == {0, 2000} and always == never[::-1]


def test_there_may_be_no_copies_or_some() -> None:
    stream = torch.tensor([[5.0, 9.0, 0.0, 1.0]]).expand(99, 4, 4)
    some = EventViews(shift=0, reversal=0.0, copies=(0, 3), copies_least=1, area=1.0, mirror=False)
    added = some.counts(stream, 16, BatchNoise(0, 0, range(99), 99)).sum((1, 2, 3)) - 4
    assert {0, 1, 2, 3} >= {*added.tolist()} > {1, 2}


def test_frames_are_normalised_before_their_views_and_counts_after(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pre-training cuts both views out of one normalised frame; a classifier's counts are cut out, then the rest."""
    shown: list[Tensor] = []
    look = EventViT.look

    def watched(network: EventViT, frames: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        shown.append(frames)
        return look(network, frames, kept)

    monkeypatch.setattr(EventViT, "look", watched)
    views, noise = METHOD.views, BatchNoise(0, 0, range(4), 4)
    stepped(METHOD, made(METHOD))
    frames = normalised(views.counts(batch().events, 16, noise))
    for found in shown:
        wanted = views.view(frames, noise)
        noise.uniform(patch_information(wanted, 8))
        assert torch.equal(found, wanted)
    tuning, noise = EventClassification(views=views, hot_pixels=True), BatchNoise(0, 0, range(4), 4)
    stepped(tuning, tuning.parts(network=EventViT(TINY), spec=SPEC))
    counts = views.view(views.counts(batch().events, 16, noise), noise)
    assert len(shown) == 3 and torch.equal(shown[2], normalised(without_hot_pixels(counts)))


def test_nothing_reaches_the_key_and_the_classifier_reaches_nothing() -> None:
    parts = made(METHOD)
    events, update = stepped(METHOD, parts, at=4)
    assert events[0] == Follow("key", "encoder", 1 - 0.01 * 0.5)
    update.loss.mean().backward()
    assert all(p.grad is None for p in parts.key.parameters())
    assert all(p.grad is not None for p in parts.encoder.parameters())
    silent = replace(METHOD, events=0.0, pictures=0.0, structure=0.0)
    alone = made(silent)
    stepped(silent, alone)[1].loss.mean().backward()
    reached = {n for n, p in alone.encoder.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert {n.rpartition(".")[0] for n in reached} == {"network.head.linear", "network.head.norm"}


def test_losses_add_up_by_their_weights_and_views_are_seen() -> None:
    parts = made(METHOD)
    update = stepped(METHOD, parts)[1]
    found = update.parts
    label = torch.tensor([1, 3, -1, 0])
    assert found["accuracy"][2] == 0
    only = replace(METHOD, events=3.0, pictures=0.5, structure=0.0)
    other = stepped(only, parts)[1]
    found = {name: each.detach() for name, each in found.items()}
    named = update.loss.detach() - found["events"] - found["pictures"] - 2 * found["structure"]
    torch.testing.assert_close(other.loss.detach(), 3 * found["events"] + 0.5 * found["pictures"] + named)
    assert named[label == -1].abs().max() < 1e-5 and (named[label != -1] > 0.1).all()
    for changed in ({"keep": 1.0}, {"masking": "uniform"}, {"views": replace(METHOD.views, reversal=0.0)}):
        assert not torch.equal(stepped(replace(METHOD, **changed), parts)[1].loss, update.loss), changed


def test_a_probe_learns_by_its_head_alone_and_tuning_by_all() -> None:
    method = EventClassification(probe=True, views=METHOD.views)
    config = replace(TINY, head_norm=False)
    parts: Any = method.parts(network=EventViT(config), spec=SPEC)
    stepped(method, parts)[1].loss.mean().backward()
    assert {n for n, p in parts.encoder.named_parameters() if p.grad is not None} == {
        "network.head.linear.weight", "network.head.linear.bias",
    }  # fmt: skip
    linear = parts.encoder.network.head["linear"]
    assert 0.007 < linear.weight.std() < 0.013 and not linear.bias.any()
    tuning = EventClassification(views=METHOD.views, layer_decay=0.5)
    parts = tuning.parts(network=EventViT(config), spec=SPEC)
    plain = stepped(tuning, parts)[1].loss
    assert not torch.equal(stepped(replace(tuning, hot_pixels=True), parts)[1].loss, plain)
    rate, decays = parts.roles["encoder"].groups("network.patches.weight", torch.zeros(2, 2))
    assert rate == 0.25 and decays and stepped(tuning, parts)[1].loss.shape == (4,)


def test_rates_and_decay_of_single_weights_reach_the_optimiser() -> None:
    layer = nn.Linear(2, 2)
    role = Trained(
        module=layer, lr_scale=0.5, groups=lambda name, weight: (0.2 if name == "bias" else 1, weight.ndim > 1)
    )
    optimizer = OptimizerConfig(kind="adamw", lr=0.1, weight_decay=0.3)
    learner = Learner(role, TrainingConfig(total_images=8, batch=1, optimizer=optimizer), torch.device("cpu"))
    before = {n: p.detach().clone() for n, p in layer.named_parameters()}
    learner.backward(layer(torch.ones(1, 2)).sum())
    learner.gradient()
    assert learner.step(1) == pytest.approx(0.05)
    for name, rate, kept in (("weight", 0.05, 1 - 0.05 * 0.3), ("bias", 0.01, 1.0)):
        torch.testing.assert_close(layer.get_parameter(name).detach(), before[name] * kept - rate)
    assert set(learner.state()["optimizer"]) == {"weight", "bias"}
    assert learner.state()["optimizer"]["weight"]["exp_avg"].shape == (2, 2)


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Thirty pictures of three classes, in place of all digits, whose events take seconds."""
    path = tmp_path_factory.mktemp("pictures") / "few.npz"
    draw = np.random.default_rng(0)
    np.savez(path, arr_0=draw.integers(0, 256, (30, 8, 8, 1), np.uint8), arr_1=np.arange(30) % 3)
    return str(path)


def sized(run: Experiment, pictures: str, **changes: Any) -> Experiment:
    each = {"log_images": 8, "snapshot_images": 24, "checkpoint_images": 8, "trackers": ()}
    training = replace(run.training, total_images=24, batch=8, micro_batch=None, **each)
    network = replace(run.network, patch=8, width=8, depth=1, heads=2)
    data = replace(run.data, source=pictures, most=256)
    return replace(run, data=data, training=training, network=network, **changes)


@pytest.fixture(scope="module")
def pretrained(pictures: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = sized(RECIPES["events-digits"](), pictures, method=METHOD)
    return run_experiment(run, tmp_path_factory.mktemp("events") / "run")


def test_resuming_changes_no_bit(resumed_run: Callable[[Experiment], Path], pictures: str) -> None:
    resumed_run(sized(RECIPES["events-digits"](), pictures, method=METHOD))


def test_tuning_resumes_with_the_rates_of_its_layers(
    resumed_run: Callable[[Experiment], Path], pretrained: Path, pictures: str
) -> None:
    tuning = sized(RECIPES["events-digits-tuning"](), pictures, start=str(pretrained))
    folder = resumed_run(replace(tuning, network=replace(tuning.network, drop_path=0.3)))
    model = load_model(folder).model
    assert isinstance(model, EventEncoder) and model.contrast is None
    logits = model.encode(torch.zeros(2, 2, 16, 16)).logits
    assert logits is not None and logits.shape == (2, 3)


def test_a_pretrained_encoder_is_evaluated(pretrained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["evaluate", str(pretrained), "--n", "20", "--split", "all", "--device", "cpu"])
    said = capsys.readouterr().out
    assert "a linear probe of its features" in said and "20 images, split all, 3 classes" in said
    report = json.loads((pretrained / "metrics.json").read_text())["accuracies"][0]["report"]
    assert 0 <= report["probe"] <= 1
    encoder: Any = load_model(pretrained).model
    assert encoder.view.channels == 2 and encoder.encode(torch.zeros(1, 2, 32, 32)).tokens.shape == (1, 4, 8)


def test_a_probe_begins_with_the_encoders_weights(pretrained: Path, pictures: str, tmp_path: Path) -> None:
    probe = sized(RECIPES["events-digits-probe"](), pictures, start=str(pretrained))
    found = load_model(run_experiment(probe, tmp_path)).model.state_dict()
    before = load_model(pretrained).model.state_dict()
    assert found.keys() < before.keys()
    moved = {n for n in found if not torch.equal(found[n], before[n])}
    assert moved == {"network.head.linear.weight", "network.head.linear.bias"}


def test_a_generator_draws_frames_of_events(pictures: str, tmp_path: Path) -> None:
    run = RECIPES["edm-events-digits"]()
    each = {"log_images": 8, "snapshot_images": 8, "checkpoint_images": 8, "trackers": ()}
    training = replace(run.training, total_images=8, batch=8, **each)
    network = replace(run.network, model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=())
    data = replace(run.data, source=pictures, most=256)
    small = replace(run, data=data, training=training, network=network, sampler=Heun(num_steps=1))
    run_experiment(small, tmp_path / "run")
    main(["sample", str(tmp_path / "run"), "--n", "2", "--out", str(tmp_path / "drawn"), "--device", "cpu"])
    (first,) = tmp_path.glob("drawn/*00.png")
    frame = read_image(first, (16, 16, 2))
    again = tmp_path / "again.png"
    save_image(again, frame)
    assert frame.std() > 0
    np.testing.assert_array_equal(read_image(again, (16, 16, 2)), frame)


def test_published_recipes() -> None:
    run = RECIPES["events-s-nimagenet"]()
    sources = StandIns()
    with torch.device("meta"):
        parts = assemble(run, sources=sources).parts
    assert {"examples N_Imagenet", "teacher clip:clip-vit-base-patch32"} == set(sources.missing)
    trained = sum(p.numel() for p in parts.roles["encoder"].module.parameters())
    assert trained == 60_397_440 - 196 * 384 + 4_210_688 + 131_072 + 770_536  # positions are no weights here
    training, o = run.training, run.training.optimizer
    epoch = 1_281_167
    assert (training.total_images, training.batch, o.weight_decay) == (300 * epoch, 1024, 0.03)
    assert o.lr_at(40 * epoch, training.total_images) == pytest.approx(6e-4)
    assert (run.method.group, run.method.masking, run.method.keep, run.data.most) == (64, "published", 0.5, 30_000)
    assert (training.precision, o.betas, o.clip_norm) == ("fp16", (0.9, 0.999), None)
    assert o.lr_at(170 * epoch, training.total_images) == pytest.approx(3e-4)  # half of the way down
    views = run.method.views
    assert (views.reversal, views.shift, views.copies, views.copies_least) == (0.5, 20, (100, 5000), 1000)
    assert (views.area, views.mirror, views.blur, views.colour) == (0.45, True, 0, 0)
    assert (run.method.form, run.method.picture_gradient, run.method.project) == ("code", False, True)
    assert (run.method.event_temperature, run.method.image_temperature, run.method.momentum) == (0.2, 0.1, 0.99)


@pytest.mark.parametrize(
    ("stage", "epochs", "warm_up", "batch", "decay", "area"),
    [("probe", 20, 1, 1024, 0.0, 0.9), ("tuning", 100, 20, 2048, 0.3, 0.85)],
)
def test_published_evaluations(stage: str, epochs: int, warm_up: int, batch: int, decay: float, area: float) -> None:
    run, epoch, tuned = RECIPES[f"events-b-nimagenet-{stage}"](), 1_281_167, stage == "tuning"
    training, o = run.training, run.training.optimizer
    assert (training.total_images, training.batch, o.weight_decay, o.clip_norm) == (epochs * epoch, batch, decay, 5)
    assert o.lr_at(warm_up * epoch, training.total_images) == pytest.approx(8e-4)
    assert o.lr_at(warm_up * epoch / 2, training.total_images) == pytest.approx(4e-4)
    assert run.method == EventClassification(
        probe=not tuned, views=EventViews(area=area), layer_decay=0.75 if tuned else 1.0
    )
    assert run.network == EventViTConfig(
        img_resolution=224, width=768, depth=12, heads=12, drop_path=0.1 * tuned, learn_positions=tuned
    )
    assert run.method.parts(network=EventViT(TINY), spec=SPEC).roles["encoder"].ema == tuned


def test_small_recipes_are_a_chain() -> None:
    chain = three_stages("events-digits")
    assert [s.work.start for s in chain.stages] == [None, "stage:pretraining", "stage:probe"]


# --- what is refused --------------------------------------------------------------------------------------------------


def test_what_is_refused() -> None:
    teacher: Any = Teacher()
    other = WideResNet(WideResNetConfig(img_resolution=8, in_channels=1, num_classes=10, blocks=1, widen=1))
    with pytest.raises(UserError, match="an encoder of events needs an EventViT as its network, not a WideResNet"):
        METHOD.parts(network=other, teacher=teacher)
    with pytest.raises(UserError, match="has 0 classes"):
        EventClassification().parts(network=EventViT(TINY), spec=replace(SPEC, num_classes=0))
    with pytest.raises(UserError, match=r"method\.layer_decay has no effect on a probe"):
        EventClassification(probe=True, layer_decay=0.5)
    run = RECIPES["events-digits"]()
    with pytest.raises(UserError, match=r"learns from events paired with pictures; .* holds labelled pictures"):
        assemble(replace(run, data=replace(run.data, frames=True)))
    with pytest.raises(UserError, match="learns from labelled pictures; standin_events of digits"):
        assemble(replace(RECIPES["edm-digits"](), data=run.data))
    with pytest.raises(UserError, match=r"this method needs teacher; give one with --teacher PATH"):
        assemble(run.giving(teacher=None))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"keep": 0.0}, r"method\.keep is 0"),
        ({"masking": "most"}, "allowed: exact, published, uniform"),
        ({"form": "both"}, "allowed: code, paper"),
        ({"group": 1}, r"method\.group is 1"),
        ({"event_temperature": 0.0}, r"method\.event_temperature is 0"),
        ({"structure": -1.0}, r"method\.structure is -1"),
    ],
)
def test_settings_that_are_none(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        EventPretraining(**settings)
    with pytest.raises(UserError, match=r"method\.views\.copies is \(9, 2\)"):
        EventViews(copies=(9, 2))


def test_noise_of_a_whole_step_is_the_pairs_own() -> None:
    """Of a micro-batch the frames are those of the whole batch, whatever else is in it."""
    views, given = METHOD.views, batch()
    whole = views.view(views.counts(given.events, 16, BatchNoise(0, 0, range(4), 4)), BatchNoise(0, 1, range(4), 4))
    part = views.view(views.counts(given.events[2:], 16, BatchNoise(0, 0, range(2, 4), 4)),
                      BatchNoise(0, 1, range(2, 4), 4))  # fmt: skip
    assert torch.equal(whole[2:], part) and isinstance(BatchNoise(0, 0, range(4), 4), StepNoise)


def test_the_claim_compares_the_published_losses_whatever_the_recipe_leaves_out() -> None:
    """It takes its method from a recipe."""
    assert replace(claim.METHOD, views=EventViews()) == EventPretraining(hidden=256, out=32)
    recipe = RECIPES["events-digits"]().method
    assert replace(recipe, structure=2.0) == replace(claim.RECIPE.method, hidden=256, out=64)
