"""Runs in an autoencoder's latents: every family takes its steps there, and what it makes are images again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from imagewright.cli.main import main
from imagewright.data import Loader, from_uint8, open_images, to_uint8
from imagewright.data.config import DataConfig
from imagewright.data.latents import LatentSheet
from imagewright.data.shards import shard_path
from imagewright.methods.continuous_consistency import ContinuousConsistencyDistillation
from imagewright.methods.edm import EDM
from imagewright.methods.flow_matching import FlowMatching
from imagewright.methods.improved_consistency import ImprovedConsistencyTraining
from imagewright.methods.score_of_mixture import ScoreOfMixtureDistillation
from imagewright.models.files import ModelFile, save_model
from imagewright.models.kl import GaussianAutoencoder
from imagewright.models.latents import LatentSpace
from imagewright.networks import DiTConfig, KLAutoencoder, KLAutoencoderConfig, SongUNetConfig
from imagewright.noise import ImageNoise
from imagewright.paths.noise_levels import LogitNormal
from imagewright.pretrained import find_model
from imagewright.recipes import RECIPES
from imagewright.samplers import Heun, MultistepConsistency, Straight
from imagewright.samplers.generator import generator_from
from imagewright.training.experiment import Experiment, assemble, run_experiment
from imagewright.training.latents import STREAMS, open_latents
from imagewright.training.trainer import Trainer
from imagewright.types import DataSpec, UserError

CHAIN = """
from imagewright.recipes import RECIPES
from imagewright.training.chain import Chain, Stage

experiment = Chain(
    Stage("auto", RECIPES["kl-digits"]()),
    Stage("teacher", RECIPES["edm-digits"]().giving(autoencoder="stage:auto")),
    Stage("student", RECIPES["scd-digits"]().giving(teacher="stage:teacher", autoencoder="stage:teacher")),
)
"""
DIGITS = DataSpec(name="digits", resolution=8, channels=1, num_classes=10, class_names=tuple("0123456789"))
TINY = KLAutoencoderConfig(
    img_resolution=8, in_channels=1, latent_channels=3, model_channels=8, channel_mult=(1, 1), num_blocks=1,
    attn_resolutions=(),
)  # fmt: skip
NETWORK = SongUNetConfig(
    img_resolution=8, in_channels=1, out_channels=1, model_channels=8, channel_mult=(1,), num_blocks=1,
    attn_resolutions=(), dropout=0.0, label_dropout=0.1,
)  # fmt: skip
SMALL: dict[str, Any] = {"patch": 1, "width": 8, "depth": 1, "heads": 2}
"""Of a transformer."""
TRAINING = replace(
    RECIPES["edm-digits"]().training, total_images=32, batch=16, log_images=16, snapshot_images=32, checkpoint_images=16
)


def tiny_autoencoder() -> GaussianAutoencoder:
    torch.manual_seed(0)
    return GaussianAutoencoder(KLAutoencoder(TINY)).eval()


def save_autoencoder(folder: Path) -> Path:
    save_model(folder, ModelFile(model=tiny_autoencoder(), spec=replace(DIGITS, num_classes=0, class_names=())))
    return folder


def experiment(method: Any, sampler: Any, **given: str) -> Experiment:
    data = DataConfig(source="digits")
    return Experiment(data=data, method=method, network=NETWORK, sampler=sampler, given=given, training=TRAINING)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An autoencoder, and a denoiser in its latents after two steps."""
    root = tmp_path_factory.mktemp("latents")
    autoencoder = save_autoencoder(root / "autoencoder")
    run = experiment(EDM(), Heun(num_steps=2), autoencoder=str(autoencoder))
    run = replace(run, data=replace(run.data, latents=str(root / "latents")))
    return {"autoencoder": autoencoder, "teacher": run_experiment(run, root / "teacher"), "latents": root / "latents"}


STUDENTS = {
    "consistency": (ImprovedConsistencyTraining(s0=4, s1=16), MultistepConsistency()),
    "distilled": (ContinuousConsistencyDistillation(), MultistepConsistency()),
    "matching": (ScoreOfMixtureDistillation(), MultistepConsistency()),
    "flow": (FlowMatching(), Straight(num_steps=2)),
    "lightning": (FlowMatching(times=LogitNormal(), direction=1.0, time_scale=1.0), Straight(num_steps=2)),
}


def student(name: str, folders: dict[str, Path]) -> Experiment:
    """A run of a family beside the teacher, in its latents."""
    method, sampler = STUDENTS[name]
    teacher = {"teacher": str(folders["teacher"])} if name in ("distilled", "matching") else {}
    run = experiment(method, sampler, autoencoder=str(folders["teacher"]), **teacher)
    network = replace(RECIPES["lightning-dit-digits"]().network, **SMALL) if name == "lightning" else run.network
    return replace(run, network=network, data=replace(run.data, latents=str(folders["latents"])))


@pytest.mark.parametrize("name", STUDENTS)
def test_every_family_learns_in_latents_and_makes_images(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    run = replace(student(name, folders), training=replace(TRAINING, total_images=16))
    file = find_model(run_experiment(run, tmp_path / "run"))
    assert file.space is not None and file.space.same_as(find_model(folders["teacher"]).space)  # type: ignore[arg-type]
    assert file.spec.shape == (1, 8, 8) and file.seen.shape == (3, 4, 4)
    drawn = generator_from(file).generate(5, seed=3, batch_size=5)
    assert drawn.shape == (5, 8, 8, 1) and drawn.std() > 0
    alone = generator_from(file).generate(1, seed=3, first=4, batch_size=1)  # whatever is drawn beside it
    assert np.abs(alone[0].astype(int) - drawn[4].astype(int)).max() <= 1


LEARNERS = (
    "edm", "cd", "ct", "ctcd", "pd", "ict", "mcd", "mct", "ctm", "scd", "sct", "ayf", "guided", "ecm", "vct",
    "dmd2-{}-gan", "f-distill", "sid", "em-distillation", "smt", "smd", "multi-student-{}-small", "flow",
    "lightning-dit", "disco",
)  # fmt: skip
"""A recipe of digits for each method that learns from pictures alone, or from latents."""


@pytest.mark.parametrize("name", LEARNERS)
def test_every_method_takes_a_step_in_latents(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    run = RECIPES[name.format("digits") if "{}" in name else f"{name}-digits"]()
    network = replace(run.network, **SMALL) if isinstance(run.network, DiTConfig) else run.network and NETWORK
    method = replace(run.method, steps=2) if name == "em-distillation" else run.method
    optimizer = replace(run.training.optimizer, lr=1e-3, lr_ramp_images=0, lr_cooldown_images=0)
    training = replace(run.training, batch=8, micro_batch=None, optimizer=optimizer)
    teacher, data = str(folders["teacher"]), DataConfig(source="digits", latents=str(folders["latents"]))
    run = replace(run, method=method, network=network, start=run.start and teacher, data=data, training=training)
    run = run.giving(autoencoder=teacher, **{role: teacher for role in run.given if role in ("teacher", "warmup")})
    made = assemble(run)
    trainer = Trainer(method, made.parts, Loader(made.images, 8, 0), training, tmp_path)
    weights = {role: learner.module.state_dict() for role, learner in trainer.learners.items()}
    before = copy.deepcopy(weights)
    trainer.train_step()  # which may be one of a network beside the product
    assert all(torch.isfinite(value).all() for each in weights.values() for value in each.values())
    moved = any(not torch.equal(weights[role][k], old) for role in before for k, old in before[role].items())
    # A teacher of a few steps says the same with a class and without, so that guiding it teaches nothing yet.
    assert moved or (name == "guided" and trainer.learners["student"].optimizer.state)


def test_images_are_what_the_space_decodes_of_what_the_model_makes(folders: dict[str, Path]) -> None:
    file = find_model(folders["teacher"])
    generator = generator_from(file)
    made = generator.drawn([0, 1], labels=[3, 4], seed=1)
    assert made.shape == (2, 3, 4, 4) and file.space is not None
    own = made / file.space.scale * file.space.std[:, None, None] + file.space.mean[:, None, None]
    expected = to_uint8(tiny_autoencoder().decode(own))
    assert np.array_equal(generator.at([0, 1], labels=[3, 4], seed=1), expected)


def test_a_clipping_sampler_does_not_clip_latents(folders: dict[str, Path]) -> None:
    generator = generator_from(find_model(folders["teacher"]))
    assert generator.space is not None
    file = find_model(folders["teacher"])
    map_sampler = MultistepConsistency(clip=True)
    file.model.kind = "flow_map"  # type: ignore[assignment]
    assert generator_from(file, map_sampler).sampler == MultistepConsistency(clip=False)


def latent_set(tmp_path: Path, mirrored: bool = False, **settings: Any) -> tuple[LatentSpace, Any]:
    images = open_images("digits").subset(range(80))
    space = LatentSpace(tiny_autoencoder())
    return space, open_latents(images, space, mirrored=mirrored, folder=str(tmp_path), **settings)


def test_latents_have_mean_zero_and_the_deviation_asked_for(tmp_path: Path) -> None:
    space, found = latent_set(tmp_path, dtype="float32")
    rows = np.arange(len(found))
    batch = found.prepared(found.batch(found.read(rows), rows, lambda: np.zeros(len(rows))))
    by_channel = batch.images.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(by_channel.mean(1), torch.zeros(3).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(by_channel.std(1), torch.full((3,), 0.5).double(), atol=1e-5, rtol=0)
    images = from_uint8(open_images("digits").images([7]))
    expected = space.encode(images, ImageNoise(0, [7], STREAMS[0]))
    torch.testing.assert_close(batch.images[7:8], expected, atol=1e-4, rtol=1e-4)


def test_half_of_a_mirrored_set_are_latents_of_mirrored_images(tmp_path: Path) -> None:
    _, found = latent_set(tmp_path, mirrored=True, dtype="float32")
    rows = np.array([5, 5])
    batch = found.mirrored().batch(found.read(rows), rows, lambda: np.array([0.6, 0.4]))
    image = from_uint8(open_images("digits").images([5]))
    for k, (view, stream) in enumerate(zip((image, image.flip(-1)), STREAMS, strict=True)):
        expected = tiny_autoencoder().encode(view, ImageNoise(0, [5], stream))
        torch.testing.assert_close(batch.images[k : k + 1], expected, atol=1e-4, rtol=1e-4)
    plain = found.batch(found.read(rows), rows, lambda: np.array([0.6, 0.4]))
    assert torch.equal(plain.images[0], plain.images[1])


def test_a_broken_shard_is_made_again_and_another_set_is_refused(tmp_path: Path) -> None:
    _, found = latent_set(tmp_path)
    before = shard_path(tmp_path, 0).read_bytes()
    shard_path(tmp_path, 0).write_bytes(before[:-10])
    latent_set(tmp_path)
    assert shard_path(tmp_path, 0).read_bytes() == before
    assert LatentSheet.read(tmp_path).n == len(found)
    with pytest.raises(UserError, match="latents with another mirrored"):
        latent_set(tmp_path, mirrored=True)


def test_sets_too_large_for_memory_are_read_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, kept = latent_set(tmp_path)
    monkeypatch.setattr("imagewright.limits.KEPT", 0)
    _, read = latent_set(tmp_path)
    assert kept.in_memory and not read.in_memory
    rows = np.array([70, 2, 2])
    assert torch.equal(kept.read(rows).float(), read.read(rows))


@pytest.mark.parametrize("name", ["edm", "matching", "lightning"])
def test_a_run_in_latents_goes_on_as_if_it_had_not_stopped(
    name: str, folders: dict[str, Path], resumed_run: Callable[[Experiment], Path]
) -> None:
    run = experiment(EDM(), Heun(num_steps=2), autoencoder=str(folders["autoencoder"]))
    run = replace(run, data=replace(run.data, latents=str(folders["latents"])))
    run = run if name == "edm" else student(name, folders)
    file = find_model(resumed_run(replace(run, training=replace(TRAINING, total_images=48, snapshot_images=48))))
    assert file.space is not None


def refused(match: str, run: Experiment, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=match):
        run_experiment(run, tmp_path / "refused")


def test_what_does_not_fit_is_said_in_a_sentence(folders: dict[str, Path], tmp_path: Path) -> None:
    auto, teacher, heun = str(folders["autoencoder"]), str(folders["teacher"]), Heun(num_steps=2)
    distil = ContinuousConsistencyDistillation()
    refused(f"teacher {teacher} lives in an autoencoder's latents; add --autoencoder {teacher}",
            experiment(distil, MultistepConsistency(), teacher=teacher), tmp_path)  # fmt: skip
    refused("autoencoder emoji64-32 is a denoiser, which makes images of noise in many steps; train one with",
            experiment(EDM(), heun, autoencoder="emoji64-32"), tmp_path)  # fmt: skip
    run = experiment(EDM(), heun, autoencoder=auto)
    refused(r"takes images of resolution and channels \(8, 1\); the data have \(16, 3\)",
            replace(run, data=DataConfig(source="emoji64", resolution=16)), tmp_path)  # fmt: skip
    refused("data.latents has no effect without --autoencoder",
            replace(run.giving(autoencoder=None), data=replace(run.data, latents="x")), tmp_path)  # fmt: skip
    refused("data.latent_std has no effect without --autoencoder",
            replace(run.giving(autoencoder=None), data=replace(run.data, latent_std=1.0)), tmp_path)  # fmt: skip
    in_latents = replace(run.giving(autoencoder=teacher), data=replace(run.data, latent_std=1.0))
    refused("data.latent_std is 1; the latents of .* are brought to 0.5", in_latents, tmp_path)
    sizes = replace(RECIPES["edm-cifar10"]().method.augment)
    there = replace(run.data, latents=str(folders["latents"]))
    refused("method.augment changes pictures", replace(run, data=there, method=EDM(augment=sizes)), tmp_path)
    told = EDM(self_conditioning=True)
    refused("method.self_conditioning clips estimates", replace(run, data=there, method=told), tmp_path)
    classifier = RECIPES["wrn-digits"]()
    classifier = replace(classifier, training=replace(classifier.training, total_images=16)).giving(autoencoder=auto)
    classifier = replace(classifier, data=replace(classifier.data, latents=str(tmp_path / "latents")))
    refused("learns from no images that could be latents; autoencoder has no effect", classifier, tmp_path)
    refused("learns from no images that could be latents; autoencoder has no effect",
            RECIPES["md4-digits"]().giving(autoencoder=auto), tmp_path)  # fmt: skip


def test_a_model_of_other_latents_teaches_nobody(folders: dict[str, Path], tmp_path: Path) -> None:
    other = tiny_autoencoder()
    with torch.no_grad():
        other.network.post_quant_conv.bias.add_(1)
    save_model(tmp_path / "other", ModelFile(model=other, spec=DIGITS))
    run = experiment(ContinuousConsistencyDistillation(), MultistepConsistency(),
                     teacher=str(folders["teacher"]), autoencoder=str(tmp_path / "other"))  # fmt: skip
    run = replace(run, data=replace(run.data, latents=str(tmp_path / "latents")))
    refused("lives in other latents than those of this run's autoencoder", run, tmp_path)


def test_the_command_line_takes_an_autoencoder(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["train", "edm-digits", "--autoencoder", str(folders["autoencoder"]), "--dry-run"])
    shown = capsys.readouterr().out
    assert '"in_channels": 3' in shown and '"img_resolution": 4' in shown
    Path("chain.py").write_text(CHAIN)  # of stages that are not there yet
    main(["train", "chain.py", "--dry-run"])
    shown = capsys.readouterr().out
    assert '"img_resolution": 4' in shown and "student: trained" in shown
    main(["train", "scd-digits", "--teacher", str(folders["teacher"]), "--dry-run"])  # lives where its teacher does
    assert f"(autoencoder {folders['teacher']})" in " ".join(capsys.readouterr().out.split())
    main(["sample", str(folders["teacher"]), "--n", "2", "--out", "drawn", "--device", "cpu"])
    assert (tmp_path / "drawn" / "grid.png").exists()
