"""Whatever is trained: a run that dies between two steps and is resumed ends with the bits of one that did not, and how
a batch is cut up moves no loss.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from imagewright.cli.main import main
from imagewright.methods.align_your_flow import AlignYourFlow
from imagewright.methods.analog_bits import AnalogBitsTraining
from imagewright.methods.caf import ConstantAcceleration, InitialVelocityLearning
from imagewright.methods.consistency_trajectory import Adversarial, ConsistencyTrajectory
from imagewright.methods.continuous_consistency import (
    ContinuousConsistencyDistillation,
    ContinuousConsistencyTraining,
)
from imagewright.methods.disco_diff import DiscoDiff, Transformer
from imagewright.methods.distances import Distance
from imagewright.methods.dmd import DMD
from imagewright.methods.dmd2 import DMD2
from imagewright.methods.dsno import OperatorDistillation
from imagewright.methods.easy_consistency import EasyConsistencyTuning
from imagewright.methods.edm import EDM
from imagewright.methods.em_distillation import EMDistillation
from imagewright.methods.f_distill import FDistill
from imagewright.methods.flow_matching import FlowMatching
from imagewright.methods.improved_consistency import ImprovedConsistencyTraining
from imagewright.methods.multi_student import TeacherScoreMatching
from imagewright.methods.multistep_consistency import MultistepConsistencyDistillation
from imagewright.methods.rectified_flow_pp import RectifiedFlowPlusPlus
from imagewright.methods.score_of_mixture import ScoreOfMixtureDistillation, ScoreOfMixtureTraining
from imagewright.methods.simple_reflow import SimpleReflow
from imagewright.methods.slimflow import AnnealingReflow, FlowGuidedDistillation
from imagewright.methods.time_alignment import TimeAlignment
from imagewright.methods.uni_instruct import UniInstruct
from imagewright.methods.vct import Learnt, VariationalConsistencyTraining
from imagewright.models.segments import segment_stops
from imagewright.networks import SongUNetConfig
from imagewright.recipes import RECIPES
from imagewright.samplers import Accelerated, BitDiffusion, Heun, Jumps, MultistepConsistency, Straight
from imagewright.training.experiment import Experiment, run_experiment

NETWORK = SongUNetConfig(img_resolution=8, in_channels=1, out_channels=1, model_channels=8, channel_mult=(1,),
                         num_blocks=1, attn_resolutions=(8,), dropout=0.1)  # fmt: skip
BASE = RECIPES["edm-digits"]()
TRAINING = replace(
    BASE.training, total_images=96, batch=16, micro_batch=8, log_images=16, snapshot_images=96, checkpoint_images=32
)
ADVERSARIAL = Adversarial(start=0.3, width=8)
FEW = Transformer(width=8, depth=1, heads=2)
METHODS = {
    "bits": (AnalogBitsTraining(), BitDiffusion(num_steps=2)),
    "self-conditioned": (EDM(self_conditioning=True), Heun(num_steps=2)),
    "ict": (ImprovedConsistencyTraining(s0=4, s1=16), MultistepConsistency()),
    "ecm": (EasyConsistencyTuning(stages=2), MultistepConsistency()),
    "vct": (VariationalConsistencyTraining(coupling=Learnt(channels=4)), MultistepConsistency(sigmas=(0.8,))),
    "multistep": (MultistepConsistencyDistillation(segments=2), Jumps(sigmas=segment_stops(2))),
    "align": (TimeAlignment(), Heun(num_steps=2)),
    "ayf": (AlignYourFlow(warmup=0.5), Jumps(num_steps=2)),
    "ctm": (ConsistencyTrajectory(grid_points=6, target_decay=0.9, adversarial=ADVERSARIAL), Jumps()),
    "uni": (
        UniInstruct(divergence="fkl", gan_weight=0.01, fake_only_images=16, plain_images=48),
        MultistepConsistency(),
    ),
    "dmd": (DMD(regression=Distance(kind="l2")), MultistepConsistency()),
    "dmd2": (DMD2(fake_updates=2, sigmas=(2.0,)), MultistepConsistency(sigmas=(2.0,), clip=False)),
    "emd": (EMDistillation(steps=2, gamma_z=1e-3), MultistepConsistency()),
    "f-distill": (FDistill(every=2, ratio_decay=0.5, judged="all"), MultistepConsistency()),
    "tsm": (TeacherScoreMatching(), Heun(num_steps=2)),
    "smt": (ScoreOfMixtureTraining(score_updates=2), MultistepConsistency()),
    "smd": (ScoreOfMixtureDistillation(score_updates=2), MultistepConsistency()),
    "dsno": (OperatorDistillation(slots=3, dropout=0.1), MultistepConsistency()),
    "flow": (FlowMatching(), Straight(num_steps=2)),
    "rfpp": (RectifiedFlowPlusPlus(image=Distance(kind="l2"), dropout=0.1), Straight(num_steps=1)),
    "simple-reflow": (SimpleReflow(), Straight(num_steps=2)),
    "slimflow": (AnnealingReflow(anneal_images=0.8), Straight(num_steps=1)),
    "slimflow-distil": (FlowGuidedDistillation(distance=Distance(kind="l2"), dropout=0.1), Straight(num_steps=1)),
    "caf-velocity": (InitialVelocityLearning(image=Distance(kind="l2")), Straight(num_steps=1)),
    "caf": (ConstantAcceleration(image=None), Accelerated()),
    "caf-gan": (
        ConstantAcceleration(image=None, intervals=10, adversarial=replace(ADVERSARIAL, start=0.0)),
        Accelerated(),
    ),
    "scd": (ContinuousConsistencyDistillation(warmup=0.5), MultistepConsistency()),
    "sct": (ContinuousConsistencyTraining(warmup=0.5), MultistepConsistency()),
    "disco": (DiscoDiff(latents=2, values=3, patch=4, encoder=FEW, told=FEW), Heun(num_steps=2)),
}
PAIRED = ("dmd", "dsno", "rfpp", "simple-reflow", "slimflow", "slimflow-distil", "caf-velocity", "caf", "caf-gan")
FRESH = ("disco", "ecm", "self-conditioned", "flow", "slimflow", "caf-velocity", "caf", "caf-gan")
"""Methods that begin with a network of their own, whatever they are called."""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = replace(BASE, network=NETWORK, training=replace(TRAINING, total_images=32))
    return run_experiment(run, tmp_path_factory.mktemp("methods") / "teacher")


@pytest.fixture(scope="module")
def couplings(teacher: Path) -> Path:
    folder = teacher.parent / "couplings"
    main(
        [
            "couple",
            str(teacher),
            "--out",
            str(folder),
            *["--n", "40", "--sampler", "heun", "--steps", "2", "--shard", "16"],
            *["--times", *map(str, OperatorDistillation(slots=3).path_times)],
        ]
    )
    return folder


def pairs(name: str, folder: Path) -> str | tuple[str, ...] | None:
    """Two stores for one of the methods that learn from pairs."""
    return (str(folder), str(folder)) if name == "simple-reflow" else str(folder) if name in PAIRED else None


@pytest.fixture(scope="module")
def velocity(couplings: Path) -> Path:
    run = Experiment(
        data=replace(BASE.data, couplings=str(couplings)), method=METHODS["caf-velocity"][0], network=NETWORK,
        training=replace(TRAINING, total_images=16),
    )  # fmt: skip
    return run_experiment(run, couplings.parent / "velocity")


def given(name: str, request: pytest.FixtureRequest) -> dict[str, str]:
    """What a method learns from, beside pairs."""
    if name in ("caf", "caf-gan"):
        return {"velocity": str(request.getfixturevalue("velocity"))}
    if "Training" in type(METHODS[name][0]).__name__ or name in FRESH:
        return {}
    return {"flow" if name == "slimflow-distil" else "teacher": str(request.getfixturevalue("teacher"))}


@pytest.mark.parametrize("name", METHODS)
def test_resuming_changes_no_bit(
    name: str, couplings: Path, resumed_run: Callable[[Experiment], Path], request: pytest.FixtureRequest
) -> None:
    method, sampler = METHODS[name]
    learns = "Training" in type(method).__name__ or name in FRESH
    data = replace(BASE.data, couplings=pairs(name, couplings))
    experiment = Experiment(
        data=data, method=method, network=NETWORK if learns or name == "tsm" else None,
        given=given(name, request),
        sampler=sampler, training=TRAINING,
    )  # fmt: skip

    resumed_run(experiment)


OVER_THE_MICRO_BATCH = ("ctm", "f-distill", "uni", "caf-gan")
"""Methods whose loss has factors taken over the images of one forward pass, as the published programs have."""


@pytest.mark.parametrize("name", [n for n in METHODS if n not in OVER_THE_MICRO_BATCH])
def test_how_a_batch_is_cut_up_moves_no_loss(
    name: str, couplings: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Noise, times and dropout belong to the image's place in the batch; what remains is rounding."""
    method, sampler = METHODS[name]
    learns = "Training" in type(method).__name__ or name in FRESH
    data = replace(BASE.data, couplings=pairs(name, couplings))
    losses = []
    for micro in (16, 4):
        training = replace(TRAINING, total_images=16, micro_batch=micro)
        experiment = Experiment(
            data=data, method=method, network=NETWORK if learns or name == "tsm" else None,
        given=given(name, request),
            sampler=sampler, training=training,
        )  # fmt: skip
        folder = run_experiment(experiment, tmp_path / str(micro))
        log = json.loads((folder / "log.jsonl").read_text().splitlines()[0])
        losses.append({k: v for k, v in log.items() if k.endswith("/loss")})
    assert losses[0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
