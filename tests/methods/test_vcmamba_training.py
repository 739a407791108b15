"""VCMamba's training: a step by hand, what mixing and erasing do, the published schedule, resume."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from imagewright.cli.dry_run import StandIns
from imagewright.methods.vcmamba import VCMambaTraining, cut_out, erased, mixed, smoothed
from imagewright.models.classifier import Classifier
from imagewright.models.files import ModelFile, save_model
from imagewright.networks import VCMamba, VCMambaConfig, WideResNet, WideResNetConfig
from imagewright.noise import BatchNoise, StepNoise
from imagewright.pretrained import find_model
from imagewright.recipes import RECIPES
from imagewright.training.experiment import Experiment, assemble
from imagewright.types import Batch, Clock, Condition, DataSpec, Update, UserError

SPEC = DataSpec(name="digits", resolution=8, channels=1, num_classes=10)
TINY = VCMambaConfig(img_resolution=8, in_channels=1, num_classes=10, widths=(4,), depths=(2,), mamba=1, stem=1)
STILL = VCMambaTraining(shift=0, erasing=0.0, mixup=0.0, cutmix=0.0, mean=(0.25,), std=(0.4,))


def network() -> VCMamba:
    torch.manual_seed(0)
    return VCMamba(TINY)


def teacher(classes: int = 10) -> Classifier:
    torch.manual_seed(1)
    return Classifier(
        WideResNet(WideResNetConfig(img_resolution=8, in_channels=1, num_classes=classes, blocks=1, widen=1))
    )


def updated(method: VCMambaTraining, parts: Any, batch: Batch) -> Update:
    (event,) = method.step(parts, batch, StepNoise(0, 0), Clock(0, 0, 4))
    assert isinstance(event, Update)
    return event


@pytest.mark.parametrize("per_class", [True, False])
def test_a_step_by_hand(per_class: bool) -> None:
    images, label = torch.rand(3, 1, 8, 8) * 2 - 1, torch.tensor([3, 0, -1])
    batch = Batch(images, Condition(label=label))
    method = replace(STILL, distillation=0.3, temperature=2.0, per_class=per_class)
    parts = method.parts(network=network(), spec=SPEC, teacher=teacher().eval())
    found = updated(method, parts, batch).loss
    made = network()(((images + 1) / 2 - 0.25) / 0.4)
    aim = 0.9 * F.one_hot(label.clamp_min(0), 10) + 0.01
    first = -(aim * made.logits.log_softmax(1)).sum(1)
    told = (parts.teacher.encode(images).logits / 2).softmax(1)
    kl = 4 * (told * (told.log() - (made.taught / 2).log_softmax(1))).sum(1) / (10 if per_class else 1)
    torch.testing.assert_close(found, (0.7 * first + 0.3 * kl) * torch.tensor([1.0, 1.0, 0.0]))
    both = replace(STILL, distillation=0.5)
    alone = updated(both, both.parts(network=network(), spec=SPEC), batch).loss
    second = -(aim * made.taught.log_softmax(1)).sum(1)
    torch.testing.assert_close(alone, (first + second) / 2 * torch.tensor([1.0, 1.0, 0.0]))


def test_mixed_pictures_have_mixed_aims() -> None:
    x = torch.rand(4, 1, 6, 8) + 1
    shares, kinds = [], set()
    for step in range(40):
        out, own = mixed(x, 0.8, 1.0, BatchNoise(0, step, range(4), 4))
        shares.append(own)
        taken = (out == x.flip(0)) & (out != x)
        if taken.any() and torch.equal(torch.where(taken, x.flip(0), x), out):
            kinds.add("rectangle")
            assert own == pytest.approx(1 - taken[0].double().mean())
            rows, columns = taken[0, 0].any(1), taken[0, 0].any(0)
            assert torch.equal(taken[0, 0], rows[:, None] & columns)
        elif own < 1:
            kinds.add("weights")
            torch.testing.assert_close(out, own * x + (1 - own) * x.flip(0))
    assert kinds == {"rectangle", "weights"} and min(shares) < 0.2 and max(shares) > 0.9
    half = BatchNoise(0, 3, range(2, 4), 4)
    assert mixed(x[2:], 0.8, 0.0, half)[1] == mixed(x, 0.8, 0.0, BatchNoise(0, 3, range(4), 4))[1]
    assert mixed(x, 0.0, 0.0, half)[1] == 1.0


def test_a_rectangle_that_is_whole_has_the_drawn_share() -> None:
    """Uniform with a parameter of 1, here of rectangles that no side cuts."""
    x, whole = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 1, 64, 64), 0
    for step in range(60):
        noise = BatchNoise(0, step, range(2), 2)
        share = float(noise.common(torch.empty(4))[1])
        taken = mixed(x, 0.0, 1.0, BatchNoise(0, step, range(2), 2))[0][0, 0] == 1
        if not (taken[[0, -1]].any() or taken[:, [0, -1]].any()):
            whole += 1
            assert 1 - taken.double().mean() == pytest.approx(share, abs=0.05)
    assert whole > 5


def test_a_mixed_step_asks_for_both_classes() -> None:
    images, label = torch.rand(4, 1, 8, 8) * 2 - 1, torch.tensor([3, 0, 5, 9])
    method = replace(STILL, mixup=1.0, distillation=0.0, smoothing=0.0)
    parts = method.parts(network=network(), spec=SPEC)
    found = updated(method, parts, Batch(images, Condition(label=label))).loss
    x, own = mixed(((images + 1) / 2 - 0.25) / 0.4, 1.0, 0.0, StepNoise(0, 0))
    logits = network()(x).logits.log_softmax(1)
    own_loss, other = (F.nll_loss(logits, t, reduction="none") for t in (label, label.flip(0)))
    assert 0.02 < own < 0.98
    torch.testing.assert_close(found, own * own_loss + (1 - own) * other)
    half = Batch(images, Condition(label=torch.tensor([3, -1, 5, 9])))  # the second is mixed with the third
    assert (updated(method, parts, half).loss == 0).tolist() == [False, True, True, False]


def test_a_step_cuts_out_erases_and_mixes_and_the_teacher_sees_it() -> None:
    """In this order, what is erased being normal noise of the network's colours."""
    images, label = torch.rand(4, 1, 8, 8) * 2 - 1, torch.tensor([3, 0, 5, 9])
    method = replace(STILL, area=0.3, erasing=1.0, cutmix=1.0, mixup=0.8, smoothing=0.0)
    parts = method.parts(network=network(), spec=SPEC, teacher=teacher().eval())
    found = updated(method, parts, Batch(images, Condition(label=label))).loss
    noise = StepNoise(0, 0)
    x = erased(cut_out(((images + 1) / 2 - 0.25) / 0.4, 0.3, noise), 1.0, noise)
    x, own = mixed(x, 0.8, 1.0, noise)
    made = network()(x)
    logits = made.logits.log_softmax(1)
    own_loss, other = (F.nll_loss(logits, t, reduction="none") for t in (label, label.flip(0)))
    told = parts.teacher.encode(2 * (0.4 * x + 0.25) - 1).logits.softmax(1)
    kl = (told * (told.log() - made.taught.log_softmax(1))).sum(1) / 10
    torch.testing.assert_close(found, (own * own_loss + (1 - own) * other + kl) / 2)
    assert 0.02 < own < 0.98
    moved = updated(replace(STILL, shift=2, distillation=0.0), parts, Batch(images, Condition(label=label))).loss
    still = updated(replace(STILL, distillation=0.0), parts, Batch(images, Condition(label=label))).loss
    assert not torch.allclose(moved, still)


def test_rectangles_are_erased_and_parts_enlarged() -> None:
    x = torch.full((256, 2, 16, 16), 7.0)
    lost = (erased(x, 0.25, BatchNoise(0, 0, range(256), 256)) != 7).all(1)
    share = lost.double().mean((1, 2))
    assert 40 <= (share > 0).sum() <= 90 and share.max() < 0.36 and share[share > 0].min() > 0.01
    rows, columns = lost.any(2), lost.any(1)
    assert torch.equal(lost, rows[:, :, None] & columns[:, None])
    ratio = (rows.sum(1) / columns.sum(1))[rows.any(1)]
    assert ratio.max() > 2 and ratio.min() < 0.5
    noise = erased(x, 1.0, BatchNoise(0, 0, range(256), 256))
    gone = (noise != 7).all(1)
    assert 0.3 < gone.double().mean((1, 2)).max() < 0.36, "a third of the picture at most, but for rounding"
    ends = [gone[:, 0], gone[:, -1], gone[:, :, 0], gone[:, :, -1]]
    assert all(0.1 < end.any(1).double().mean() < 0.3 for end in ends), "up to each side"
    noise = noise[noise != 7]
    assert abs(noise.mean()) < 0.05 and noise.std() == pytest.approx(1, abs=0.05)
    ramp = torch.arange(16.0).expand(64, 1, 16, 16)
    cut = cut_out(ramp, 0.25, BatchNoise(0, 0, range(64), 64))
    slope = (cut[:, 0, 8, 12] - cut[:, 0, 8, 4]) / 8
    assert (slope > 0.4).all() and (slope <= 1.001).all() and slope.std() > 0.1
    upright = cut_out(ramp.mT, 0.25, BatchNoise(0, 0, range(64), 64))  # the same parts
    aspect = slope / ((upright[:, 0, 12, 8] - upright[:, 0, 4, 8]) / 8)
    assert 0.74 < aspect.min() < 0.85 and 1.15 < aspect.max() < 1.34
    for seen, size in ((cut, slope), (upright, slope / aspect)):  # from all places, and nothing from beyond a side
        centre = (seen[:, 0, 7, 7] + seen[:, 0, 8, 8]) / 2 - 7.5
        assert (centre.abs() <= 8 * (1 - size) + 1e-3).all() and centre.min() < -1 and centre.max() > 1
    still = StepNoise(0, 0)
    torch.testing.assert_close(cut_out(x, 0.25, BatchNoise(0, 0, range(256), 256)), x)
    torch.testing.assert_close(cut_out(ramp, 1.0, still, 1.0), ramp)
    assert torch.equal(smoothed(torch.tensor([1]), 4, 0.2), torch.tensor([[0.05, 0.85, 0.05, 0.05]]))


@pytest.mark.parametrize(("name", "count", "side"), [("s-imagenet", 10_478_720, 224), ("b-imagenet64", None, 64)])
def test_published_recipes(name: str, count: int | None, side: int) -> None:
    run = RECIPES[f"vcmamba-{name}"]()
    with torch.device("meta"):
        model = assemble(run, sources=StandIns()).parts.roles["classifier"].module
    assert count is None or sum(p.numel() for p in model.parameters()) == count
    assert model.network.config.side == {224: 7, 64: 8}[side] and model.network.config.drop_path == 0.2
    m = run.method
    assert (m.area, m.erasing, m.mixup, m.cutmix, m.smoothing, m.distillation) == (0.08, 0.25, 0.8, 1.0, 0.1, 0.5)
    assert m.per_class and m.temperature == 1 and run.training.ema.rampup_ratio is None
    training = run.training.in_images()
    epoch, o = 1_281_167, training.optimizer
    assert (training.total_images, training.batch, o.kind, o.weight_decay) == (300 * epoch, 2176, "adamw", 0.05)
    assert o.lr == pytest.approx(1e-3 * 2176 / 512) and not o.decay_vectors
    for epochs in (5, 100, 299):  # of half a cosine over all 300, whose first 5 are the warm-up's
        wanted = o.lr * (1 + math.cos(math.pi * epochs / 300)) / 2
        assert o.lr_at(epochs * epoch, training.total_images) == pytest.approx(wanted)
    assert 0.5 ** (2176 / training.ema.halflife_images) == pytest.approx(0.99996, abs=1e-8)


def test_resuming_changes_no_bit(resumed_run: Callable[[Experiment], Path], tmp_path: Path) -> None:
    base = RECIPES["vcmamba-digits"]()
    save_model(tmp_path / "teacher", ModelFile(model=teacher(), spec=SPEC))
    sized = replace(TINY, drop_path=0.2)
    each = {"log_images": 16, "snapshot_images": 96, "checkpoint_images": 32}
    training = replace(base.training, total_images=96, batch=16, micro_batch=8, **each)
    run = replace(
        base, network=sized, training=training, method=replace(base.method, erasing=0.5, area=0.5, cutmix=1.0)
    )
    file = find_model(resumed_run(run.giving(teacher=str(tmp_path / "teacher"))))
    assert isinstance(file.model, Classifier) and file.origin["weights"] == "average"
    assert file.model.encode(torch.zeros(1, 1, 8, 8)).grid == (8, 8)


def test_what_is_refused() -> None:
    with pytest.raises(UserError, match="trains a VCMamba, not a WideResNet"):
        STILL.parts(network=teacher().network, spec=SPEC)
    with pytest.raises(UserError, match="the teacher names 7 classes; digits has 10"):
        STILL.parts(network=network(), spec=SPEC, teacher=teacher(7))
    with pytest.raises(UserError, match=r"method\.area is 0"):
        VCMambaTraining(area=0.0)


def test_a_teacher_of_grey_pictures_is_refused_before_the_first_step(tmp_path: Path) -> None:
    save_model(tmp_path, ModelFile(model=teacher(9), spec=replace(SPEC, num_classes=9)))
    run = RECIPES["vcmamba-digits"]().giving(teacher=str(tmp_path))
    run = replace(run, network=TINY, data=replace(run.data, source="emoji64", resolution=8))
    with pytest.raises(UserError, match=r"sees images of 1 channel\(s\); the data have 3"):
        assemble(run)
