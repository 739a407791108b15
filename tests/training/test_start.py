"""A run that starts from given weights: who gets them, and when they are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from imagewright.methods.consistency import ConsistencyTraining
from imagewright.methods.dmd2 import DMD2
from imagewright.methods.progressive_distillation import ProgressiveDistillation
from imagewright.networks import SongUNetConfig
from imagewright.recipes import RECIPES
from imagewright.samplers import Heun, MultistepConsistency
from imagewright.training.checkpoint import checkpoints, load_checkpoint
from imagewright.training.config import OptimizerConfig
from imagewright.training.experiment import Experiment, assemble, run_experiment
from imagewright.types import UserError

NETWORK = SongUNetConfig(img_resolution=8, in_channels=1, out_channels=1, model_channels=8, channel_mult=(1,),
                         num_blocks=1, attn_resolutions=(), dropout=0.0)  # fmt: skip
BASE = replace(RECIPES["edm-digits"](), sampler=Heun(num_steps=2))  # of a run's grids, which cost more than its steps
TRAINING = replace(BASE.training, total_images=16, batch=16, log_images=16, snapshot_images=16, checkpoint_images=16)


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = replace(BASE, network=NETWORK, training=TRAINING)
    return run_experiment(run, tmp_path_factory.mktemp("start") / "denoiser")


def experiment(denoiser: Path, **changes: object) -> Experiment:
    run = Experiment(
        data=BASE.data, method=ConsistencyTraining(), network=NETWORK, start=str(denoiser),
        sampler=MultistepConsistency(), training=replace(TRAINING, seed=3),
    )  # fmt: skip
    return replace(run, **changes)  # type: ignore[arg-type]


def test_the_product_and_its_average_begin_with_the_weights(denoiser: Path) -> None:
    fresh, started = (assemble(experiment(denoiser, start=s)).parts for s in (None, str(denoiser)))
    run = Experiment(data=BASE.data, method=ProgressiveDistillation(start_steps=1), given={"teacher": str(denoiser)},
                     training=TRAINING)  # fmt: skip
    weights = assemble(run).parts.teacher.state_dict()
    for name, value in weights.items():
        assert torch.equal(started.student.state_dict()[name], value)
        assert torch.equal(started.target.state_dict()[name], value)
    assert any(not torch.equal(fresh.student.state_dict()[name], value) for name, value in weights.items())


def test_a_teacher_that_is_an_average_keeps_its_own_weights(denoiser: Path, tmp_path: Path) -> None:
    other = run_experiment(replace(BASE, network=NETWORK, training=replace(TRAINING, seed=1)), tmp_path / "other")
    run = Experiment(data=BASE.data, method=ProgressiveDistillation(start_steps=1), given={"teacher": str(denoiser)},
                     start=str(other), training=TRAINING)  # fmt: skip
    parts = assemble(run).parts
    pairs = zip(parts.student.parameters(), parts.teacher.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)


def test_less_noise_than_the_weights_know_is_refused(denoiser: Path) -> None:
    run = experiment(denoiser, method=ConsistencyTraining(sigma_max=20.0))
    with pytest.raises(UserError, match=r"knows noise levels up to 80; this run's sigma_max is 20"):
        assemble(run)


def test_another_architecture_is_refused(denoiser: Path) -> None:
    run = experiment(denoiser, network=replace(NETWORK, model_channels=16))
    with pytest.raises(UserError, match="has another architecture than this run"):
        assemble(run)


def test_other_trained_parts_go_on_from_the_runs_checkpoint(denoiser: Path, tmp_path: Path) -> None:
    """A first stage without an adversary, then one with: what the head knows is its own."""
    training = replace(TRAINING, optimizer=OptimizerConfig(lr=1e-3))
    first = Experiment(data=BASE.data, method=DMD2(generator_gan=0.0, fake_gan=0.0), given={"teacher": str(denoiser)},
                       sampler=MultistepConsistency(), training=training)  # fmt: skip
    folder = run_experiment(first, tmp_path / "first")
    second = replace(first, method=DMD2(), start=str(folder))
    parts = assemble(second).parts
    trained = load_checkpoint(checkpoints(folder / "checkpoints")[-1])["learners"]["fake_score"]["module"]
    fresh = assemble(replace(second, start=None)).parts
    assert any(not torch.equal(fresh.fake_score.state_dict()[name], value) for name, value in trained.items())
    for name, value in parts.fake_score.state_dict().items():
        expected = fresh.fake_score.state_dict()[name] if name.startswith("head.") else trained[name]
        assert torch.equal(value, expected), name
    with pytest.raises(UserError, match=r"has another fake_score than this run: \d+ entries differ, such as head"):
        assemble(replace(first, start=str(run_experiment(second, tmp_path / "second"))))


def test_a_run_without_the_part_gives_only_the_product(denoiser: Path) -> None:
    run = Experiment(
        data=BASE.data, method=DMD2(), given={"teacher": str(denoiser)}, start=str(denoiser), training=TRAINING
    )
    parts = assemble(run).parts
    for name, value in parts.generator.state_dict().items():
        assert torch.equal(value, parts.teacher.state_dict()[name])
