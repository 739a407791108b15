"""Drawing pairs of noise and image into a store: what `imagewright couple` does, and a stage of a chain (`Couple`).

A pair is drawn, noise first, or inverted: a real image of the training set first, and the noise of which the model's
flow would make it. Pair i depends on the manifest and on i alone, however many processes share a folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from imagewright.data import ImageSet, from_uint8, open_images
from imagewright.data.couplings import Manifest, check_times, claim_folder, write_shard
from imagewright.data.shards import fill_shards
from imagewright.models.discrete_latents import told_latents
from imagewright.models.files import weights_hash
from imagewright.noise import ImageNoise
from imagewright.pretrained import find_model
from imagewright.samplers.generator import ImageGenerator, generator_from, sampler_to_json
from imagewright.samplers.grid import OnGrid
from imagewright.samplers.straight import Straight
from imagewright.training.chain import OF_STAGE
from imagewright.training.latents import STREAMS
from imagewright.types import Condition, UserError


@dataclass(frozen=True, kw_only=True)
class Couple:
    """A stage of a chain: pairs of a model that an earlier one made, in the stage's folder."""

    model: str
    """A run, a model folder, a shipped model, or "stage:NAME"."""
    n: int = 10_000
    """How many pairs; of inverted images, at most as many as there are."""
    seed: int = 0
    sampler: Any = None
    """None = the model's own."""
    shard: int = 2048
    dtype: str = "float16"
    batch: int = 64
    """Images per network call."""
    invert: str | None = None
    """A data set whose training images are turned into noise; None = noise is turned into images."""
    times: tuple[float, ...] = ()
    """Times of the straight path at which points of the trajectories are kept, decreasing, in (0, 1)."""

    def __call__(self, folder: Path, stages: Mapping[str, Path], device: Any) -> None:
        """Fill the store; it goes on where it stopped."""
        name = self.model
        path = str(stages[name.removeprefix(OF_STAGE)]) if name.startswith(OF_STAGE) else name
        file = find_model(path)
        generator = generator_from(file, self.sampler, device)
        drawn = Drawing.of(generator, path, weights_hash(file.model.state_dict()), self.invert, self.times)
        manifest = Manifest(
            n=self.n, seed=self.seed, shard=self.shard, batch=self.batch, dtype=self.dtype, spec=file.seen,
            origin=drawn.origin, inverted=self.invert is not None, times=self.times,
        )  # fmt: skip
        fill(folder, manifest, drawn)


@dataclass(frozen=True)
class Drawing:
    """How the pairs of a store are made; of a model in latents they are of latents.

    images: those that are inverted; None = pairs are drawn from noise.

    origin: what the manifest says of it.
    """

    generator: ImageGenerator
    times: tuple[float, ...]
    images: ImageSet | None
    origin: dict[str, Any]

    @classmethod
    def of(
        cls,
        generator: ImageGenerator,
        name: str,
        weights: str,
        invert: str | None = None,
        times: tuple[float, ...] = (),
        *,
        changes: Mapping[str, Any] | None = None,
    ) -> Drawing:
        """name, weights: of the model, as the manifest says them. changes: what else was changed about it.

        Raises UserError where the sampler draws at random on its way, cannot be run backwards or has no levels to stop
        at, and for images of another kind than the model's.
        """
        check_times(times)
        sampler = generator.sampler
        kind = type(sampler).__name__
        if generator.latent != generator.seen.shape:
            raise UserError(
                f"{name} draws images from noise of another shape, {list(generator.latent)}; couplings pair an image "
                "with noise of its own"
            )
        if not generator.deterministic:
            raise UserError(
                f"sampler {kind} draws at random on its way, so that its images are no function "
                "of the noise beside them; couplings need one that does not, such as --sampler heun"
            )
        if invert is not None and not hasattr(sampler, "invert"):
            raise UserError(f"sampler {kind} cannot be run backwards; --sampler heun, euler and straight can")
        if times:
            stopping = _stopping(sampler, times, generator.model)
            same: dict[str, Any] = {"precision": generator.precision, "space": generator.space}
            generator = ImageGenerator(generator.model, generator.spec, stopping, generator.device, **same)
        images = None if invert is None else _training_images(invert, generator)
        said = {} if images is None else {"inverted": {"source": images.source, "fingerprint": images.fingerprint}}
        origin = {
            "model": name,
            "weights_sha256": weights,
            "sampler": sampler_to_json(generator.sampler),
            "nfe": generator.nfe if images is None else generator.inversion_nfe,
            **said,
            **(changes or {}),
        }
        return cls(generator, times, images, origin)

    def __call__(self, rows: range, seed: int, batch: int) -> dict[str, Tensor]:
        """Pairs of a store on the CPU: what `write_shard` is given."""
        parts = [
            self._batch(rows[start : start + batch], seed, self._labels(rows[start : start + batch], seed))
            for start in range(0, len(rows), batch)
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _labels(self, rows: range, seed: int) -> npt.NDArray[np.int64] | None:
        if self.images is not None:
            return self.images.labels[rows.start : rows.stop] if self.generator.spec.num_classes else None
        return self.generator.labels(len(rows), seed, rows.start)

    def _batch(self, rows: range, seed: int, labels: npt.NDArray[np.int64] | None) -> dict[str, Tensor]:
        kept: dict[float, Tensor] = {}

        def keep(x: Tensor, x0: Tensor, sigma: float) -> None:
            t = sigma / (1 + sigma)
            kept.update({each: (1 - t) * x.cpu() for each in self.times if abs(each - t) < 1e-9})

        watch = keep if self.times else None
        known = torch.full((len(rows),), -1) if labels is None else torch.as_tensor(labels)
        if self.images is None:
            images = self.generator.drawn(list(rows), labels=labels, seed=seed, on_step=watch).cpu()
            found = {"images": images, "labels": known}
        else:
            real = from_uint8(torch.from_numpy(self.images.images(list(rows)))).to(self.generator.device)
            cond = Condition() if labels is None else Condition(label=known.to(self.generator.device))
            told = told_latents(self.generator.model)
            cond = cond if told is None else told.recognised(real, cond)[0]
            noise = ImageNoise(seed, list(rows))
            if self.generator.space is not None:
                real = self.generator.space.encode(real, ImageNoise(seed, list(rows), STREAMS[0]))
            latents = self.generator.inverted(real, cond, noise=noise, on_step=watch)
            found = {"images": real.cpu(), "labels": known, "latents": latents.cpu()}
        return {**found, "points": torch.stack([kept[t] for t in self.times], 1)} if self.times else found


def fill(
    folder: Path,
    manifest: Manifest,
    drawing: Drawing,
    *,
    verify: bool = False,
    say: Callable[[str], None] = lambda text: None,
    advance_to: Callable[[int], None] = lambda pairs: None,
) -> int:
    """Make every shard that has a fault; returns how many were made here. verify: read all of every shard."""
    if drawing.images is not None and manifest.n > len(drawing.images):
        raise UserError(f"n is {manifest.n}; {drawing.images.source} has {len(drawing.images)} images to invert")
    claim_folder(folder, manifest)
    return _fill(folder, manifest, drawing, verify, say, advance_to)


def _fill(
    folder: Path,
    manifest: Manifest,
    drawing: Drawing,
    verify: bool,
    say: Callable[[str], None],
    advance_to: Callable[[int], None],
) -> int:
    def make(now: Manifest, index: int) -> Callable[[], None]:
        pairs = drawing(now.rows(index), now.seed, now.batch)
        return partial(write_shard, folder, now, index, **pairs)

    return fill_shards(folder, manifest, make, verify=verify, say=say, advance_to=advance_to)


def _stopping(sampler: Any, times: tuple[float, ...], model: Any) -> Any:
    """The sampler with further levels, at which points are kept. Raises UserError where it has none to add to."""
    if isinstance(sampler, Straight):
        inner = {t for t in sampler.visited()[:-1] if all(abs(t - each) > 1e-6 for each in times)}
        return replace(sampler, times=tuple(sorted({*inner, *times}, reverse=True)))
    if not isinstance(sampler, OnGrid):
        raise UserError(
            f"sampler {type(sampler).__name__} has no levels to stop at; points of trajectories need one that has, "
            "such as --sampler heun or straight"
        )
    levels = [t / (1 - t) for t in times]
    grid = sampler.sigmas(model)[:-1].tolist()
    outside = [t for t, level in zip(times, levels, strict=True) if not grid[-1] <= level <= grid[0]]
    if outside:
        ends = ", ".join(f"{level / (1 + level):.3g}" for level in (grid[-1], grid[0]))
        raise UserError(f"times is {times}; the sampler goes through times between {ends}")
    inner = {each for each in grid if all(abs(each - level) > 1e-6 * level for level in levels)}
    return replace(sampler, levels=tuple(sorted({*inner, *levels}, reverse=True)))


def _training_images(source: str, generator: ImageGenerator) -> ImageSet:
    """The images that are inverted. Raises UserError where the model makes others."""
    spec = generator.spec
    images = open_images(source, resolution=spec.resolution, split="train", labels=bool(spec.num_classes))
    ours, theirs = ((s.resolution, s.channels, s.num_classes) for s in (spec, images.spec))
    if ours != theirs:
        raise UserError(f"{source} has images of resolution, channels and classes {theirs}; the model makes {ours}")
    return images
