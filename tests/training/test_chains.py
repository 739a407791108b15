"""Teachers, tokenizers and starting weights that recipes name: each is trained, small, as its recipe says, and used.

Networks and images are shrunk, alike in both recipes, so that what differs between them (kind of network, embedding,
classes, augmentation) still does; every model takes two steps and goes through its files.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from imagewright.cli.dry_run import KNOWN_SETS
from imagewright.data import ImageSet, Loader
from imagewright.data.config import DataConfig
from imagewright.data.couplings import Couplings
from imagewright.models.files import ModelFile, save_model
from imagewright.pretrained import shipped
from imagewright.recipes import RECIPES
from imagewright.training.experiment import Experiment, assemble
from imagewright.training.given import Sources, requests
from imagewright.training.trainer import Trainer
from imagewright.types import DataSpec

SIZES: dict[str, Any] = {
    "model_channels": 16, "groups": 8, "channel_mult": (1,), "num_blocks": 1, "attn_resolutions": (8, 16),
    "width": 16, "depth": 2, "heads": 2, "codebook_size": 8, "codebook_dim": 4, "transformer_depth": 0,
}  # fmt: skip
SIDE = 16


def named_by(experiment: Experiment) -> list[str]:
    """What a recipe needs that another makes, and that is not shipped."""
    models = [request.name for request in requests(experiment.method).values() if request.kinds]
    named = (*(experiment.given.get(name) for name in models), experiment.start)
    return [n for n in named if isinstance(n, str) and n not in shipped()]


def drawn(experiment: Experiment) -> bool:
    """Whether it is given what no recipe makes, but a command draws."""
    return "negatives" in experiment.given


UNSHRINKABLE = "disco-imagenet64"
"""Latents are told behind attention, which ADM's networks of less than 64 channels have not."""
ABSENT = "nimagenet"
"""Examples that are no pictures, of which nothing small stands in for the files."""
CHAINED = [
    name
    for name, recipe in RECIPES.items()
    if named_by(recipe()) and not drawn(recipe()) and not name.startswith(UNSHRINKABLE) and ABSENT not in name
]


class Compares(nn.Module):
    """A feature network without weights in place of LPIPS."""

    def forward(self, images: Tensor) -> list[Tensor]:
        return [images, nn.functional.avg_pool2d(images, 2)]


class Small(Sources):
    """Images of the recipe's classes and channels, 16 x 16 where the recipe names a file."""

    def images(self, data: DataConfig, on_progress: Callable[[int, int], None] | None) -> ImageSet:
        if Path(data.source).name not in KNOWN_SETS:
            return data.open(on_progress)
        _, channels, classes = KNOWN_SETS[Path(data.source).name]
        count = classes if data.labels else 0
        spec = DataSpec(
            name=Path(data.source).stem, resolution=SIDE, channels=channels, num_classes=count,
            class_names=tuple(map(str, range(count))),
        )  # fmt: skip
        pixels = np.random.default_rng(0).integers(0, 256, (8, SIDE, SIDE, channels), dtype=np.uint8)
        labels = np.arange(8) if data.labels else None
        return replace(ImageSet.of(pixels, labels), spec=spec)

    def couplings(self, name: str) -> Couplings | None:
        return None

    def features(self, name: str | None, spec: DataSpec) -> nn.Module | None:
        return Compares()


def shrunk(name: str) -> Experiment:
    """A recipe with a small network, two images a step, and its pairs left out."""
    experiment = RECIPES[name]()
    network = experiment.network
    if network is not None:
        known = {f.name for f in fields(network)}
        network = replace(network, **{k: v for k, v in SIZES.items() if k in known})
    training = replace(experiment.training, batch=2, micro_batch=None, total_images=100, precision="fp32")
    start = None if experiment.start in shipped() else experiment.start  # which no small network is
    return replace(experiment, network=network, training=training, start=start)


def trainer(experiment: Experiment, folder: Path) -> tuple[Trainer, DataSpec]:
    assembled = assemble(experiment, sources=Small())
    loader = Loader(assembled.images, 2, 0, getattr(experiment.data, "xflip", False))
    return Trainer(experiment.method, assembled.parts, loader, experiment.training, folder), assembled.images.spec


@cache
def make(name: str) -> None:
    """Train the recipe for two steps, and what it needs before it, into runs/NAME."""
    experiment = shrunk(name)
    for needed in named_by(experiment):
        make(Path(needed).name)
    run, spec = trainer(experiment, Path("runs") / name / "checkpoints")
    steps(run, experiment)
    model = copy.deepcopy(run.learners[experiment.method.product].module)
    model.load_state_dict(run.product_state())
    save_model(Path("runs") / name, ModelFile(model=model, spec=spec))


def steps(run: Trainer, experiment: Experiment) -> None:
    """Two, unless the method learns from pairs, which nobody has made here."""
    if getattr(experiment.data, "couplings", None) is None:
        for _ in range(2):
            run.train_step()


@pytest.fixture(scope="module", autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Recipes name folders under the one that a command is run in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("chains"))
        make.cache_clear()
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", CHAINED)
def test_what_a_recipe_names_is_what_another_makes(name: str) -> None:
    for model in named_by(RECIPES[name]()):
        assert model.startswith("runs/") and Path(model).name in RECIPES, model
    make(name)
    assert (Path("runs") / name / "model.json").exists()
