"""CTM and sCM against numbers of others' programs: network, jumps, losses, adaptive weight and gradients.

data/ctm.json says from which commit of the published program they are, and the rule that makes weights and inputs;
data/scm.json has NVIDIA's sCM on the same small networks. All in float64.
"""

from __future__ import annotations

import copy
import json
import math
import zlib
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from imagewright.methods.consistency_trajectory import ConsistencyTrajectory, Jump
from imagewright.methods.continuous_consistency import (
    ContinuousConsistencyDistillation,
    ContinuousConsistencyTraining,
)
from imagewright.models.consistency import ContinuousConsistencyModel
from imagewright.models.preconditioning import EDMPrecond
from imagewright.models.trajectory import TrajectoryModel
from imagewright.networks import DhariwalUNet, SongUNet, SongUNetConfig
from imagewright.recipes import edm
from imagewright.types import Average, Batch, Clock, Condition, Frozen, Parts, Trained

DATA = Path(__file__).parent / "data"
KNOWN = json.loads((DATA / "ctm.json").read_text())
SCM = json.loads((DATA / "scm.json").read_text())
COND = Condition(label=torch.tensor(KNOWN["labels"]))
VALUES = 3 * 32 * 32
THEIRS = (("map_layer0_to", "map_layer0_s"), ("map_layer1_to", "map_layer1_s"), ("affine_to", "affine_s"))


def normal(key: str, shape: tuple[int, ...] = (4, 3, 32, 32)) -> Tensor:
    generator = np.random.Generator(np.random.PCG64(seed=zlib.crc32(key.encode())))
    return torch.from_numpy(np.asarray(generator.standard_normal(shape)))


def published(name: str) -> str:
    """Their name of a weight."""
    for ours, theirs in THEIRS:
        name = name.replace(ours, theirs)
    return name


def network(salt: str, destination: bool = True) -> SongUNet:
    sizes = {"img_resolution": 32, "in_channels": 3, "out_channels": 3, "label_dim": 3, "destination": destination}
    made = SongUNet(SongUNetConfig(**sizes, **KNOWN["sizes"])).double()
    for ours, p in made.named_parameters():
        name = published(ours)
        scale = p[0].numel() ** -0.5 if p.dim() > 1 else 0.1
        p.data = normal(salt + name, tuple(p.shape)) * scale + (name.endswith("weight") and "norm" in name)
    return made


def model(salt: str) -> TrajectoryModel:
    return TrajectoryModel(network(salt), sigma_data=0.5).double()


def images() -> Tensor:
    return 0.5 * normal("images")


# --- CTM --------------------------------------------------------------------------------------------------------------


def test_sizes_of_the_published_networks() -> None:
    """Class-conditional and unconditional CIFAR-10, and ImageNet-64: counted in the two programs."""
    small = network("student ")
    assert sum(p.numel() for p in small.parameters()) == KNOWN["num_parameters"]
    with torch.device("meta"):
        for classes, count in ((10, 60_396_675), (0, 60_395_267)):
            teacher = SongUNet(replace(edm.cifar10().network, img_resolution=32, label_dim=classes, augment_dim=9))
            student = TrajectoryModel.from_denoiser(EDMPrecond(teacher))
            assert sum(p.numel() for p in student.parameters()) == count
        teacher = DhariwalUNet(replace(edm.imagenet64().network, label_dim=1000))
        assert sum(p.numel() for p in TrajectoryModel.from_denoiser(EDMPrecond(teacher)).parameters()) == 324_100_611


def test_jumps_agree() -> None:
    """Where g is told the class once, these are off by up to 0.5."""
    given, student = KNOWN["map"], model("student ")
    t, s = (torch.tensor(given[key], dtype=torch.float64) for key in ("t", "s"))
    x = images() + t[:, None, None, None] * normal("z")
    with torch.no_grad():
        for ours, key in ((student.towards(x, t, s, COND), "g"), (student(x, t, s, COND), "G")):
            found = ours.flatten(1)[:, given["places"]].flatten()
            assert found.tolist() == pytest.approx(given[key], abs=1e-5)  # they round angles of embeddings to float32


class Given:
    """Noise that is known."""

    def __init__(self) -> None:
        self.queue = ["z", "z of denoising"]

    def same_dropout(self) -> Any:
        """There is none."""
        return nullcontext()

    def normal(self, like: Tensor) -> Tensor:
        return normal(self.queue.pop(0))


@dataclass(frozen=True, kw_only=True)
class Fixed(ConsistencyTrajectory):
    """CTM with the draws that the program was given."""

    def steps_at(self, step: int) -> int:
        return int(KNOWN["teacher_steps"])

    def denoising_levels(self, *args: Any) -> Tensor:
        return torch.tensor(KNOWN["denoising_sigma"], dtype=torch.float64)

    def _jump(self, parts: Any, images: Tensor, z: Tensor, n: int, noise: Any) -> Jump:
        grid = (80 ** (1 / 7) + torch.arange(18).double() / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
        path = grid[torch.tensor(KNOWN["start"]) + torch.arange(n + 1)[:, None]]
        x = images + path[0][:, None, None, None] * z
        return Jump(x, path[0], path[-1], grid[torch.tensor(KNOWN["end"])], path)


def test_losses_of_ctm_and_their_gradients_agree() -> None:
    student, target = model("student "), copy.deepcopy(model("target ")).requires_grad_(False)
    teacher = EDMPrecond(network("teacher ", destination=False), sigma_data=0.5).double().eval()
    parts = Parts(student=Trained(module=student), target=Average(module=target), teacher=Frozen(module=teacher))
    update: Any = next(Fixed().step(parts, Batch(images(), COND), Given(), Clock(0, 0, 100)))  # type: ignore[arg-type]
    assert update.parts["consistency"].tolist() == pytest.approx(KNOWN["consistency"], rel=2e-5)
    assert float(update.parts["denoising_weight"]) == pytest.approx(KNOWN["denoising_weight"], rel=2e-5)
    weighted = update.parts["denoising_weight"] * update.parts["denoising"]
    assert weighted.tolist() == pytest.approx(KNOWN["weighted_denoising"], rel=2e-5)
    update.loss.mean().backward()
    norms = {published(name): p.grad.norm() for name, p in student.network.named_parameters() if p.grad is not None}
    for name, known in KNOWN["gradient_norms"].items():
        assert float(norms[name]) == pytest.approx(known, rel=5e-5), name


# --- sCM --------------------------------------------------------------------------------------------------------------

SIGMA = torch.tensor(SCM["sigma"], dtype=torch.float64)


@dataclass(frozen=True)
class Levels:
    """Noise levels that are known."""

    def sample(self, noise: Any, like: Tensor) -> Tensor:
        return SIGMA


class Weighting(nn.Module):
    """The weighting that the program was given: v = w - ln(sigma D), w = -logvar."""

    def forward(self, t: Tensor) -> Tensor:
        return -torch.tensor(SCM["logvar"], dtype=torch.float64) - (0.5 * t.tan() * VALUES).log()


@pytest.mark.parametrize("kind", ["sct", "scd"])
def test_losses_of_scm_and_their_gradients_agree(kind: str) -> None:
    """Their tangents are divided by their root mean square, ours by their length: their c is sqrt(D) times ours, the
    squared errors agree, and with the same weighting our gradients are sqrt(D) times theirs.
    """
    known = SCM[kind]
    student = ContinuousConsistencyModel(network("student ", destination=False), 0.002, 80.0, 0.5, "log").double()
    teacher = EDMPrecond(network("teacher ", destination=False), sigma_data=0.5).double().eval()
    more = {"teacher": Frozen(module=teacher)} if kind == "scd" else {}
    parts = Parts(student=Trained(module=student), weighting=Trained(module=Weighting()), **more)
    make = ContinuousConsistencyTraining if kind == "sct" else ContinuousConsistencyDistillation
    method = make(noise_levels=Levels(), warmup=0.5, tangent_c=0.1 * math.sqrt(VALUES))  # type: ignore[arg-type]
    clock = Clock(0, SCM["iteration"], 2 * SCM["of"])

    learn, weigh = method.step(parts, Batch(images(), COND), Given(), clock)  # type: ignore[arg-type]
    assert learn.parts["error"].tolist() == pytest.approx(known["unweighted"], rel=1e-5)
    w = weigh.loss - (SIGMA * VALUES).log()
    assert w.tolist() == pytest.approx(known["loss"], rel=1e-6)
    learn.loss.mean().backward()
    for name, norm in known["gradient_norms"].items():
        found = dict(student.network.named_parameters())[name].grad
        assert float(found.norm()) / math.sqrt(VALUES) == pytest.approx(norm, rel=1e-5), name
