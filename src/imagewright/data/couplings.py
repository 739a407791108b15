"""Couplings on disk: what a teacher makes of noise, in shards (`data.shards`).

    manifest.json              what pair i is: model, sampler, seed, data specification, number type; sizes
    shard-000000.safetensors   images [k, C, H, W] and labels int64 [k] of pairs 0 .. k - 1; checksum in the head;
                               of images that were inverted latents [k, C, H, W] too; where asked for, points
                               [k, T, C, H, W] of the trajectories

Pair i is a function of (manifest, i). Its noise is not stored: it is `ImageNoise(seed, [i])`'s first normal numbers, as
for every image that this library draws, and is drawn again when the pair is read. That halves the store. The noise of
a real image is what the teacher's flow makes of it, and is stored.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar, NotRequired

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from imagewright.data.shards import (
    Rows,
    Sheet,
    SheetRecord,
    claim_folder,
    shard_fault,
    shard_path,
    standing,
    write_rows,
)
from imagewright.noise import ImageNoise
from imagewright.types import Chance, Condition, Coupling, DataSpec, Example, UserError

FORMAT = "imagewright-couplings/1"
MOST_DEVIATION = 3.0
"""Of a shard's stored latents: more than an imperfect inversion leaves, far less than other conventions have."""


class _ManifestRecord(SheetRecord):
    inverted: NotRequired[bool]
    times: NotRequired[list[float]]


@dataclass(frozen=True, kw_only=True)
class Manifest(Sheet):
    """What the pairs of a store are, and how they lie in shards.

    origin: model, weights' checksum, sampler, network calls. inverted: the images are real and the latents stored.
    times: of the straight path, at which points of the trajectories are stored, decreasing. Raises UserError out of
    range.
    """

    inverted: bool = False
    times: tuple[float, ...] = ()

    what: ClassVar[str] = "couplings"
    one: ClassVar[str] = "pair"
    format: ClassVar[str] = FORMAT
    record: ClassVar[Any] = _ManifestRecord
    maker: ClassVar[str] = "imagewright couple"
    optional: ClassVar[tuple[str, ...]] = ("inverted", "times")
    where: ClassVar[tuple[str, ...]] = ("model", "guide")

    def __post_init__(self) -> None:
        object.__setattr__(self, "times", tuple(float(t) for t in self.times))
        check_times(self.times)
        super().__post_init__()

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Images, and what else was asked for."""
        shape = self.spec.shape
        latents = {"latents": shape} if self.inverted else {}
        points = {"points": (len(self.times), *shape)} if self.times else {}
        return {"images": shape, **latents, **points}


def check_times(times: Sequence[float]) -> None:
    """Raise UserError unless times of the straight path lie between 0 and 1 and decrease; none will do."""
    if not all(0 < t < 1 for t in times) or list(times) != sorted(set(times), reverse=True):
        raise UserError(f"times is {tuple(times)}; they must lie between 0 and 1, and decrease")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a store. Raises UserError when it is missing or damaged."""
    return Manifest.read(folder)


def write_shard(folder: Path, manifest: Manifest, index: int, images: Tensor, labels: Tensor, **more: Tensor) -> None:
    """Store a shard's images [k, C, H, W], labels [k] and what else the manifest says, atomically, with a checksum."""
    write_rows(folder, manifest, index, labels, {"images": images, **more})


class Couplings:
    """A complete store, read by row: nothing is in memory but what was asked for.

    Raises UserError naming the shard when one is missing or not whole. A shard's contents are held against its checksum
    when it is first read from.
    """

    example: ClassVar[type[Example]] = Coupling
    in_memory: ClassVar[bool] = False

    def __init__(self, folder: Path | str) -> None:
        self.folder, self.xflip = Path(folder), False
        self.manifest = read_manifest(self.folder)
        self._rows = Rows(self.folder, self.manifest, _require_unit if self.manifest.inverted else None)

    def __len__(self) -> int:
        return self.manifest.n

    @property
    def spec(self) -> DataSpec:
        """Shape and classes of the images."""
        return self.manifest.spec

    @property
    def source(self) -> str:
        """Where the pairs lie."""
        return str(self.folder)

    @property
    def fingerprint(self) -> str:
        """What identifies the pairs: how many, of which seed and which weights."""
        return sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    @property
    def identity(self) -> dict[str, Any]:
        """What a run's record says of the pairs that it was given."""
        m = self.manifest
        found = {"pairs": m.n, "seed": m.seed, "weights_sha256": m.origin.get("weights_sha256")}
        inverted = m.origin.get("inverted") if m.inverted else None
        return found if inverted is None else {**found, "inverted": inverted}

    def mirrored(self) -> Couplings:
        """The store whose batches mirror half of the pairs left to right: noise, image and points together."""
        changed = copy.copy(self)
        changed.xflip = True
        return changed

    def batch(self, read: Coupling, rows: npt.NDArray[np.int64], chance: Chance) -> Coupling:
        """The pairs, half of them mirrored where that is asked for."""
        if not self.xflip:
            return read
        flips = torch.from_numpy(chance() < 0.5)
        for tensor in (read.latents, read.images, read.points):
            if tensor is not None:
                tensor[flips] = tensor[flips].flip(-1)
        return read

    def prepared(self, batch: Coupling) -> Coupling:
        """The pairs."""
        return batch

    def read(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> Coupling:
        """Pairs by index, in that order: float32. Labels only where the model has classes."""
        indices = [int(i) for i in rows]
        found = self._rows.read(indices)
        latents = found.get("latents")
        if latents is None:
            latents = ImageNoise(self.manifest.seed, indices).normal(found["images"])
        cond = Condition(label=found["labels"]) if self.spec.num_classes else Condition()
        times = torch.tensor(self.manifest.times).expand(len(indices), -1) if self.manifest.times else None
        return Coupling(latents, found["images"], cond, found.get("points"), times)


def _require_unit(path: Path, shard: Any) -> None:
    """Raise UserError where stored latents are of another noise convention, as EDM's, scaled by its largest level."""
    deviation = float(shard.get_tensor("latents").float().std(correction=0))
    if not deviation <= MOST_DEVIATION:
        raise UserError(
            f"{path} holds latents of deviation {deviation:.3g}; noise here has 1 at every place, whatever its level"
        )


@dataclass(frozen=True)
class Mixture:
    """Several stores, of which a share of the pairs of every batch is drawn each. weights: positive; their sum is 1."""

    stores: tuple[Couplings, ...]
    weights: tuple[float, ...]


def mixed(stores: Sequence[Couplings], weights: Sequence[float]) -> Couplings | Mixture:
    """One store, or a mixture; without weights every store counts by its number of pairs.

    Raises UserError where weights and stores do not match, or pairs of the stores are not of one kind.
    """
    if weights and len(weights) != len(stores):
        raise UserError(
            f"data.coupling_weights has {len(weights)} numbers for {len(stores)} stores of pairs; give one for each"
        )
    if not all(0 < weight < float("inf") for weight in weights):
        raise UserError(f"data.coupling_weights is {tuple(weights)}; weights must be positive and finite")
    if len(stores) == 1:
        return stores[0]
    first = stores[0]
    for other in stores[1:]:
        for what, ours, theirs in (
            ("shape and number of classes", _kind(first.spec), _kind(other.spec)),
            ("times", first.manifest.times, other.manifest.times),
        ):
            if ours != theirs:
                raise UserError(
                    f"couplings {first.folder} and {other.folder} do not mix: their {what} are {ours} and {theirs}"
                )
    counts = list(weights) if weights else [float(len(store)) for store in stores]
    return Mixture(tuple(stores), tuple(count / sum(counts) for count in counts))


def _kind(spec: DataSpec) -> tuple[int, ...]:
    return (*spec.shape, spec.num_classes)


__all__ = [
    "Couplings",
    "Manifest",
    "Mixture",
    "check_times",
    "claim_folder",
    "mixed",
    "read_manifest",
    "shard_fault",
    "shard_path",
    "standing",
    "write_shard",
]
