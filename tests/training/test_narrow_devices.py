"""Devices without 64-bit floats: `widest` is told that this is one, and then no tensor of a run becomes float64."""

from __future__ import annotations

import dataclasses
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from imagewright import precision
from imagewright.data import Loader
from imagewright.metrics.features import digits_features
from imagewright.models.tokens import check_device
from imagewright.networks import EventViTConfig, SongUNetConfig
from imagewright.precision import tf32, wide, widest
from imagewright.pretrained import find_model
from imagewright.recipes import RECIPES
from imagewright.samplers import SAMPLERS, Heun
from imagewright.samplers.generator import ImageGenerator
from imagewright.training.distributed import pick_device
from imagewright.training.experiment import Experiment, assemble, run_experiment
from imagewright.training.trainer import Trainer
from imagewright.types import UserError

FAMILIES = (
    "edm-digits", "cd-digits", "ct-digits", "ctcd-digits", "pd-digits", "ict-digits", "mcd-digits", "mct-digits",
    "ctm-digits", "trigflow-digits", "scd-digits", "sct-digits", "dmd2-digits", "dmd2-digits-gan", "f-distill-digits",
    "vq-digits", "diff-instruct-digits", "sim-digits", "sid-digits", "uni-rkl-digits",
    "em-distillation-digits", "smt-digits", "smd-digits", "wrn-digits", "flow-digits", "align-digits", "ayf-digits",
    "analog-bits-digits", "self-conditioned-digits",
    "guided-digits", "ecm-digits", "vct-digits", "multi-student-digits-small",
    "vcmamba-digits", "disco-digits", "kl-digits", "vatt-standin-digits", "metaclip2-digits",
    "events-digits", "events-digits-tuning",
)  # fmt: skip
NETWORK = SongUNetConfig(img_resolution=8, in_channels=1, out_channels=1, model_channels=8, channel_mult=(1,),
                         num_blocks=1, attn_resolutions=(8,), dropout=0.0, label_dropout=0.1)  # fmt: skip


class Watch(TorchFunctionMode):
    """Notes every float64 tensor made of narrower ones: of what lives on the device. Numbers made of nothing pass."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        wider = isinstance(out, Tensor) and out.dtype == torch.float64
        if wider and any(isinstance(a, Tensor) and a.is_floating_point() and a.dtype != torch.float64 for a in args):
            frames = [f for f in traceback.extract_stack() if "/imagewright/" in f.filename]
            self.found.append(f"{frames[-1].filename.split('/imagewright/')[-1]}:{frames[-1].lineno} {frames[-1].line}")
        return out


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "widest", lambda device: torch.float32)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = RECIPES["edm-digits"]()
    training = dataclasses.replace(run.training, total_images=8, batch=8)
    folder = tmp_path_factory.mktemp("teacher") / "run"
    return run_experiment(dataclasses.replace(run, network=NETWORK, training=training), folder)


def tiny(name: str, teacher: Path) -> Experiment:
    run = RECIPES[name]()
    changes: dict[str, Any] = {"training": dataclasses.replace(run.training, batch=8, micro_batch=None, total_images=8)}
    if isinstance(run.network, SongUNetConfig):
        changes["network"] = NETWORK
    if run.start:
        changes["start"] = None if isinstance(run.network, EventViTConfig) else str(teacher)
    given = {
        role: str(teacher) for role, where in run.given.items() if role in ("teacher", "warmup") and where != "digits"
    }
    return dataclasses.replace(run, **changes).giving(**given)


def test_the_helper_by_device() -> None:
    assert (widest("cpu"), widest("cuda:1"), widest("mps")) == (torch.float64, torch.float64, torch.float32)
    assert wide(torch.ones(2)).dtype == torch.float64


def test_the_watch_sees_a_wide_tensor() -> None:
    class Wide(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return wide(x)

    with Watch() as watch:
        Wide()(torch.ones(2))
    assert watch.found and "precision.py" in watch.found[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_training_step_stays_narrow(name: str, teacher: Path, narrow: None, tmp_path: Path) -> None:
    experiment = tiny(name, teacher)
    made = assemble(experiment)
    trainer = Trainer(experiment.method, made.parts, Loader(made.images, 8, 0), experiment.training, tmp_path)
    with Watch() as watch:
        trainer.train_step()
    assert not watch.found


def test_every_method_of_digits_is_among_them() -> None:
    """But token models, which sum probabilities in 64 bits and are refused, and what learns from drawn images."""
    watched = {type(RECIPES[name]().method) for name in FAMILIES}
    for name, recipe in RECIPES.items():
        run = recipe()
        method, drawn = run.method, getattr(run.data, "couplings", None) or "negatives" in run.given
        if "digits" in name and not drawn:
            assert type(method) in watched or method.product == "model", name


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_sampling_stays_narrow(name: str, teacher: Path, narrow: None) -> None:
    sampler = SAMPLERS[name]()
    if sampler.model_kind != "denoiser" or name == "ancestral":
        return  # a flow map's or a token model's
    generator = ImageGenerator(find_model(teacher).model, find_model(teacher).spec, sampler)
    with Watch() as watch:
        generator.generate(2, labels=1)
    assert not watch.found


def test_token_models_are_refused() -> None:
    class Tokens(nn.Module):
        kind = "token_model"

    check_device(Tokens(), "cpu")
    with pytest.raises(UserError, match="needs 64-bit floats, which mps does not have; use --device cpu"):
        check_device(Tokens(), "mps")


def test_choosing_a_device_makes_32_bits_mean_32_bits() -> None:
    """As EDM's, SiD's and Uni-Instruct's programs do; torch lets convolutions use TF32."""
    backends = (torch.backends.cudnn, torch.backends.cuda.matmul)
    for backend in backends:
        backend.allow_tf32 = True
    pick_device("cpu")
    assert not any(backend.allow_tf32 for backend in backends)


def test_what_draws_or_measures_means_32_bits_whoever_asks() -> None:
    """In Python no device is picked by us, and a training in TF32 draws its snapshots within."""
    file, found = find_model("emoji64-32"), []
    file.model.network.register_forward_pre_hook(lambda *given: found.append(torch.backends.cudnn.allow_tf32))
    digits = digits_features()
    digits.encoder.network.register_forward_pre_hook(lambda *given: found.append(torch.backends.cudnn.allow_tf32))
    with tf32(True):
        ImageGenerator(file.model, file.spec, Heun(num_steps=1)).generate(1, labels=1)
        digits(np.zeros((1, 8, 8, 1), np.uint8))
        assert torch.backends.cudnn.allow_tf32
    assert len(found) >= 2 and not any(found)
