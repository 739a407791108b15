"""What the searches of `imagewright tune` share: the score that they minimise, and where results go."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import nn

from imagewright.cli.console import OUT, say, table
from imagewright.cli.sampling import TUNED, Changes
from imagewright.cli.scoring import extractor_for, real_images, training_data
from imagewright.errors import an
from imagewright.files import write_json
from imagewright.metrics import embed
from imagewright.metrics.draws import frechet_of_model
from imagewright.metrics.features import FeatureExtractor
from imagewright.metrics.statistics import Moments
from imagewright.models.files import ModelFile, has_model, save_model
from imagewright.models.kinds import words
from imagewright.models.self_conditioned import is_self_conditioned
from imagewright.pretrained import find_model, folder_of
from imagewright.samplers.generator import ImageGenerator
from imagewright.training.checkpoint import require_fit
from imagewright.training.distributed import pick_device
from imagewright.types import Sampler, UserError, kind_of
from imagewright.version import versions


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """What every search that scores images is told about its score."""

    n: int = 1000
    """Images for each candidate."""
    seed: int = 0
    """Of the images, and of the search; score the choice on another seed with `imagewright evaluate`."""
    data: str | None = None
    """Real images; default what the model was trained on."""
    inception: str | None = None
    """Weights of the Inception network, for data other than digits and emoji64."""
    changes: Annotated[Changes, tyro.conf.arg(name="")] = Changes()
    """With what guidance or skip factor the images are drawn, as in `sample`."""
    device: str = "auto"
    """auto, cpu, cuda, mps."""


Told = Annotated[Scoring, tyro.conf.arg(name="")]
"""As a parameter of a search: its fields are options of the command."""


@dataclass(frozen=True)
class Scorer:
    """A model's real images and features, and the score that a search minimises."""

    extractor: FeatureExtractor
    moments: Moments
    device: torch.device
    told: Scoring

    @classmethod
    def of(cls, model: str, file: ModelFile, told: Scoring) -> Scorer:
        """Real training images through the extractor of their set, or through Inception's weights."""
        source = told.data or training_data(model, file.spec)
        images = real_images(model, told.data, file.spec, "train" if source in ("digits", "emoji64") else "all")
        target = pick_device(told.device)
        extractor = extractor_for(source, told.inception, target)
        return cls(extractor, embed(images, extractor).moments, target, told)

    def score(self, model: nn.Module, file: ModelFile, sampler: Sampler, seed: int | None = None) -> float:
        """Frechet distance of a seed's images (None = the search's): the same noise and labels for every candidate."""
        drawn = self.told.changes.apply(replace(file, model=model))
        generator = ImageGenerator(drawn, file.spec, sampler, self.device, space=file.space)
        of = self.told.seed if seed is None else seed
        return frechet_of_model(generator, self.told.n, self.extractor, self.moments, seed=of)


def fresh(run: Path, out: Path) -> ModelFile:
    """The run's model. Raises UserError when there is a model at `out`."""
    if has_model(out):
        raise UserError(f"{out} already holds a model; choose another --out")
    return find_model(run)


def require_denoiser(name: str, model: nn.Module, *, of_a_flow: bool = False) -> None:
    """Raise UserError unless a model is a denoiser of images; of_a_flow: whose answer depends on the point alone."""
    kind = kind_of(model)
    if kind != "denoiser":
        raise UserError(f"{name} is {an(words(kind))}; what is tuned here is a denoiser of images, such as edm-digits")
    if of_a_flow and is_self_conditioned(model):
        raise UserError(
            f"{name} is self-conditioned: what it says depends on what it said before, so there is no flow to follow"
        )


def save(file: ModelFile, state: dict[str, torch.Tensor], out: Path, origin: dict[str, Any]) -> None:
    """Write the model with other weights, and say where they come from."""
    require_fit(state, file.model.state_dict(), "the combination of kept weights")
    file.model.load_state_dict(state)
    save_model(out, replace(file, origin={**file.origin, **origin}))
    say(f"written to {out}; measure it with: imagewright evaluate {out}")


def tuned_path(model: str, name: str) -> Path:
    """Where a search's result goes by default. Raises UserError for a model that is no folder."""
    if not Path(model).is_dir():
        raise UserError(f"{model} is not a folder to write into; say with --out where the result goes")
    return folder_of(model) / "tuned" / f"{name}.json"


def write(path: Path, model: str, record: dict[str, Any]) -> None:
    """Write what was found, as a file that `--sampler` takes."""
    write_json(path, {"format": TUNED, "model": model, **record, "versions": versions()})
    say(f"written to {path}; use it with: imagewright sample {model} --sampler {path}")


def print_scores(what: str, values: dict[str, float]) -> None:
    """A table of scores."""
    rows = table(what, "lower is better")
    for name, value in values.items():
        rows.add_row(name, f"{value:.4g}")
    OUT.print(rows)
