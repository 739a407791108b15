"""What self-play does between its rounds: a model draws what it will be told from real images, and the best is kept."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from imagewright.arrays import read_tensors
from imagewright.checks import require_whole
from imagewright.data.negatives import NegativesManifest, begin, whole, write_shard
from imagewright.metrics import embed
from imagewright.metrics.draws import frechet_of_model
from imagewright.metrics.extractors import find_extractor
from imagewright.models.files import ModelFile, has_model, save_model, weights_hash
from imagewright.pretrained import find_model
from imagewright.samplers.generator import ImageGenerator, generator_from, sampler_to_json
from imagewright.training.chain import placed_name
from imagewright.training.record import experiment_from_json, located, read_record
from imagewright.training.weights import stored
from imagewright.tuning.scores import lowest
from imagewright.types import kind_of


@dataclass(frozen=True, kw_only=True)
class DrawNegatives:
    """Draw from a model by its own sampler, unguided, into the stage's folder; `--given` names it, or a stage.

    Images are kept before rounding, tokens as they were drawn. Goes on with the first shard that is missing. Raises
    UserError where the folder holds what another model, sampler or seed drew.
    """

    given: Mapping[str, str] = field(default_factory=dict)
    """Where the model lies: {"model": "runs/edm-digits"}, or "stage:round1"."""
    n: int = 10_000
    """How many examples."""
    seed: int = 0
    shard: int = 1024
    """Examples in a file."""
    batch_size: int = 64
    """Examples per network call."""

    def __post_init__(self) -> None:
        for name in ("n", "shard", "batch_size"):
            require_whole(name, getattr(self, name), 1)
        require_whole("seed", self.seed, 0)

    def __call__(self, folder: Path, stages: Mapping[str, Path], device: Any) -> None:
        """As `training.chain.Work`."""
        file = find_model(placed_name(self.given["model"], stages))
        tokens = kind_of(file.model) == "token_model"
        generator = generator_from(with_tokens_shown(file) if tokens else file, device=device)
        codec: Any = getattr(file.model, "codec", None)
        manifest = NegativesManifest(
            n=self.n,
            seed=self.seed,
            shard=self.shard,
            what="tokens" if tokens else "images",
            shape=(codec.length,) if tokens else file.seen.shape,
            classes=file.spec.num_classes,
            origin={
                "weights_sha256": weights_hash(file.model.state_dict()),
                "sampler": sampler_to_json(generator.sampler),
                "batch": self.batch_size,
            },
        )
        begin(folder, manifest)
        for index in range(manifest.shards):
            if not whole(folder, manifest, index):
                write_shard(folder, manifest, index, *self.drawn(generator, manifest.rows(index)))

    def drawn(self, generator: ImageGenerator, rows: range) -> tuple[Tensor, Tensor]:
        """Examples of some rows, and their classes, -1 for none; example i depends on (seed, i) alone."""
        labels = generator.labels(len(rows), self.seed, rows.start)
        known = np.full(len(rows), -1) if labels is None else labels
        parts = []
        for start in range(0, len(rows), self.batch_size):
            some = list(rows[start : start + self.batch_size])
            wanted = None if labels is None else labels[start : start + self.batch_size]
            parts.append(generator.drawn(some, labels=wanted, seed=self.seed).cpu())
        return torch.cat(parts), torch.as_tensor(known)


@dataclass(frozen=True, kw_only=True)
class KeepBest:
    """Early stopping by the evaluator: of a round's reference, its average and the weights that it kept along its way
    (`training.weights_images`), the model whose images come nearest to the training images becomes the stage's.

    Every candidate draws the same noises and classes. Does nothing where the folder has its model already.
    """

    given: Mapping[str, str] = field(default_factory=dict)
    """Where the round lies: {"run": "stage:round1"}."""
    n: int = 1_000
    """Images for each candidate."""
    seed: int = 0
    inception: str | None = None
    """Weights of the Inception network, for data other than digits and emoji64."""

    def __post_init__(self) -> None:
        require_whole("n", self.n, 2)
        require_whole("seed", self.seed, 0)

    def __call__(self, folder: Path, stages: Mapping[str, Path], device: Any) -> None:
        """As `training.chain.Work`."""
        if has_model(folder):
            return
        run = placed_name(self.given["run"], stages)
        file, experiment = find_model(run), experiment_from_json(read_record(Path(run))["experiment"], Path(run))
        reference = located(experiment, Path(run)).given["reference"]
        models: dict[str, Callable[[], nn.Module]] = {
            "reference": lambda: find_model(reference).model,
            "average": lambda: file.model,
        }
        for kept in stored(Path(run)):
            models[f"{kept.kind}, {kept.images} images"] = partial(_with_weights, file.model, kept.path)
        images = experiment.data.open()
        extractor = find_extractor(None, experiment.data.source, self.inception, torch.device(device))
        moments = embed(images, extractor).moments

        def score(model: nn.Module) -> float:
            generator = generator_from(replace(file, model=model), device=device)
            return frechet_of_model(generator, self.n, extractor, moments, seed=self.seed)

        scores = {name: score(make()) for name, make in models.items()}
        best = lowest(scores.items())
        origin = {**file.origin, "kept": best, "scores": scores}
        save_model(folder, replace(file, model=models[best]().to("cpu"), origin=origin))


def _with_weights(model: nn.Module, path: Path) -> nn.Module:
    changed = copy.deepcopy(model)
    changed.load_state_dict(read_tensors(path))
    return changed


class ShownTokens(nn.Module):
    """A codec whose pictures are its tokens: a sampler then returns what it drew, whatever decoding would lose."""

    lossless = True

    def __init__(self, codec: Any) -> None:
        super().__init__()
        self.values, self.length = codec.values, codec.length

    def decode(self, tokens: Tensor) -> Tensor:
        """The tokens."""
        return tokens


def with_tokens_shown(file: ModelFile) -> ModelFile:
    """The model's file with such a codec; all else is shared."""
    changed = copy.copy(file.model)
    changed._modules = {**file.model._modules, "codec": ShownTokens(file.model.codec)}
    return ModelFile(model=changed, spec=file.spec, sampler=file.sampler)
