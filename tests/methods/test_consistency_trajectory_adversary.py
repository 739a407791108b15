"""The adversary of consistency trajectory models: turns, hinge loss, its weight, and training with it to the bit."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from imagewright.data import Loader, open_images
from imagewright.methods.adversary import adaptive_weight
from imagewright.methods.consistency_trajectory import Adversarial, ConsistencyTrajectory
from imagewright.models.preconditioning import EDMPrecond
from imagewright.networks import SongUNet, SongUNetConfig
from imagewright.networks.discriminator import ConvDiscriminator, ProjectedDiscriminator
from imagewright.noise import StepNoise
from imagewright.training.config import EmaConfig, OptimizerConfig, TrainingConfig
from imagewright.training.trainer import Interrupted, Progress, Trainer
from imagewright.types import Batch, Clock, DataSpec, Follow, Parts, Trained, Update

SPEC = DataSpec(name="toy", resolution=8, channels=1)
SOON = Adversarial(start=0.0, width=4)


def teacher(label_dim: int = 0) -> EDMPrecond:
    torch.manual_seed(5)
    config = SongUNetConfig(img_resolution=8, in_channels=1, out_channels=1, label_dim=label_dim, model_channels=8,
                            channel_mult=(1, 1), num_blocks=1, attn_resolutions=())  # fmt: skip
    return EDMPrecond(SongUNet(config))


def images(n: int) -> Tensor:
    return 0.5 * StepNoise(1).normal(torch.empty(n, 1, 8, 8, dtype=torch.float64))


def learnt_parts(method: ConsistencyTrajectory, **more: Any) -> Parts:
    """Small networks in float64; the target is moved away from the student."""
    parts = method.parts(teacher=teacher().double(), spec=SPEC, **more)
    for role in parts.roles.values():
        role.module.double()
    for p in parts.target.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return parts


def run(method: ConsistencyTrajectory, parts: Parts, n: int = 16, step: int = 1, total: int = 1000) -> list[Any]:
    return list(method.step(parts, Batch(images(n)), StepNoise(3, step), Clock(step, step, total)))


def test_student_and_discriminator_take_turns_after_the_start() -> None:
    method = ConsistencyTrajectory(grid_points=4, adversarial=Adversarial(start=0.5, width=4))
    parts = learnt_parts(method)
    kinds = [[e.part if isinstance(e, Update) else e for e in run(method, parts, 2, step, 8)] for step in range(8)]
    learns, follows = "student", Follow("target", "student", 0.999)
    assert kinds[:4] == [[learns, follows]] * 4
    assert kinds[4:] == [[learns, follows], ["discriminator"]] * 2
    before, after = (run(method, parts, 2, step, 8)[-2] for step in (2, 4))
    assert "adversarial" not in before.parts and "adversarial" in after.parts


class Remembers(nn.Module):
    """A discriminator that keeps what it was shown; it takes no class."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return self.w * x.flatten(1)[:, :3]


STILL = replace(SOON.augment, brightness=0.0, saturation=0.0, contrast=0.0, translation=0.0, cutout=0.0)


def test_the_fake_is_the_image_of_the_consistency_loss() -> None:
    """In the student's steps, at the batch's own (t, n, s): the target's second answer, and no call more."""
    method = ConsistencyTrajectory(grid_points=4, adversarial=replace(SOON, augment=STILL))
    parts = learnt_parts(method)
    parts.roles["discriminator"] = Trained(module=Remembers())
    answers: dict[str, list[Tensor]] = {"student": [], "target": []}
    for name, kept in answers.items():
        parts.roles[name].module.register_forward_hook(lambda m, given, answer, kept=kept: kept.append(answer))
    update = run(method, parts, step=2)[0]
    assert [len(kept) for kept in answers.values()] == [2, 2]  # the way over u, the way by one jump
    (fake,) = parts.discriminator.seen
    assert torch.equal(fake, answers["target"][1]) and fake.requires_grad
    torch.testing.assert_close(update.parts["adversarial"], -(0.7 * fake.flatten(1)[:, :3]).mean(1))


def test_hinge_of_the_discriminator() -> None:
    """Real is the data, fake the way of one jump, both augmented; the student takes no gradient."""
    method = ConsistencyTrajectory(grid_points=4, adversarial=replace(SOON, augment=STILL))
    parts = learnt_parts(method)
    parts.roles["discriminator"] = Trained(module=Remembers())
    (update,) = run(method, parts, step=3)
    real, fake = parts.discriminator.seen
    assert torch.equal(real, images(16)) and not fake.requires_grad and fake.shape == real.shape
    hinge = (1 - 0.7 * real.flatten(1)[:, :3]).relu().mean(1) + (1 + 0.7 * fake.flatten(1)[:, :3]).relu().mean(1)
    torch.testing.assert_close(update.loss, hinge)
    changed = replace(method, adversarial=SOON)
    run(changed, parts, step=3)
    assert not torch.equal(parts.discriminator.seen[2], real)


@pytest.mark.parametrize(("least", "most"), [(0.01, 10.0), (123.0, 123.0), (0.0, 0.0)])
def test_adversarial_weight_is_kept_in_its_range(least: float, most: float) -> None:
    method = ConsistencyTrajectory(
        grid_points=4, denoising=0.0, adversarial=replace(SOON, least_weight=least, most_weight=most)
    )
    parts = learnt_parts(method)
    update = run(method, parts, step=2)[0]
    weight, fooled = update.parts["adversarial_weight"], update.parts["adversarial"]
    assert least <= float(weight) <= most
    wanted = adaptive_weight(update.parts["consistency"], fooled, parts.student.network.last_layer)
    assert float(weight) == pytest.approx(min(max(float(wanted), least), most))
    torch.testing.assert_close(update.loss, update.parts["consistency"] + weight * fooled)


def test_which_discriminator() -> None:
    class Halves(nn.Module):
        def forward(self, x: Tensor) -> list[Tensor]:
            return [x, nn.functional.avg_pool2d(x, 2)]

    method = ConsistencyTrajectory(grid_points=4, adversarial=SOON)
    own = learnt_parts(method).roles["discriminator"]
    assert isinstance(own, Trained) and isinstance(own.module, ConvDiscriminator)
    told = method.parts(teacher=teacher(3), spec=replace(SPEC, num_classes=3)).discriminator
    assert told.judge.classes is None  # as the published one, it judges without the class
    assert (own.ema, own.lr_scale, own.betas) == (False, 5.0, (0.5, 0.9))
    assert learnt_parts(method, projections=[Halves()]).discriminator.size == 224
    method = replace(method, adversarial=replace(SOON, feature_size=16))
    parts = learnt_parts(method, projections=[Halves()])
    assert isinstance(parts.discriminator, ProjectedDiscriminator)
    for step in (2, 3):
        assert torch.isfinite(run(method, parts, step=step)[0].loss).all()


# --- through the trainer ----------------------------------------------------------------------------------------------

CONFIG = TrainingConfig(
    total_images=64, batch=8, micro_batch=4, channels_last=True, optimizer=OptimizerConfig(kind="radam", lr=1e-2),
    ema=EmaConfig(halflife_images=16), log_images=8, snapshot_images=1000, checkpoint_images=1000,
)  # fmt: skip


def trainer(folder: Path, config: TrainingConfig = CONFIG, **options: Any) -> Trainer:
    data = open_images("digits")
    method = ConsistencyTrajectory(grid_points=4, adversarial=replace(SOON, start=0.25), target_decay=0.9)
    parts = method.parts(teacher=teacher(10), spec=data.spec)
    return Trainer(method, parts, Loader(data, config.batch, config.seed), config, folder, **options)


def flat(state: Any, name: str = "") -> dict[str, Any]:
    if isinstance(state, dict):
        return {k: v for key, value in state.items() for k, v in flat(value, f"{name}/{key}").items()}
    return {name: state}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A run that never stopped, of 8 steps; from step 2 on the discriminator has every odd one."""
    t = trainer(tmp_path_factory.mktemp("whole"))
    t.train()
    return t


@pytest.mark.parametrize("stop", [16, 40])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, whole: Trainer, stop: int) -> None:
    """Stopped before the adversary comes (step 2), and between a student's and a discriminator's turn (step 5)."""

    def press(progress: Progress) -> None:
        if progress.images == stop:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        trainer(tmp_path, on_progress=press).train()
    again = trainer(tmp_path)
    assert again.resume() and again.images == stop
    again.train()
    one, other = flat(again.state()), flat(whole.state())
    assert one.keys() == other.keys() and any("discriminator" in k and "exp_avg" in k for k in one)
    for key, value in one.items():
        assert torch.equal(value, other[key]) if isinstance(value, Tensor) else value == other[key], key


def test_every_part_learns(tmp_path: Path, whole: Trainer) -> None:
    fresh = trainer(tmp_path)
    for name in ("student", "target", "discriminator"):
        before, after = (t.parts.roles[name].module.state_dict() for t in (fresh, whole))
        changed = [k for k in before if not torch.equal(before[k], after[k])]
        assert len(changed) > 0.8 * len(before), set(before) - set(changed)  # RAdam's first steps are tiny


def test_the_discriminator_has_a_rate_and_momenta_of_its_own(whole: Trainer) -> None:
    groups = {name: learner.optimizer.param_groups[0] for name, learner in whole.learners.items()}
    assert groups["student"]["lr"] == 1e-2 and groups["discriminator"]["lr"] == pytest.approx(5e-2)
    assert groups["student"]["betas"] == (0.9, 0.999) and groups["discriminator"]["betas"] == (0.5, 0.9)
    steps = {n: int(x.optimizer.state[x.parameters[0]]["step"]) for n, x in whole.learners.items()}
    assert steps == {"student": 5, "discriminator": 3}
