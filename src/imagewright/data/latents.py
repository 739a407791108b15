"""Latents of a set of images on disk, in shards (`data.shards`), and the set that training reads them from.

    manifest.json              of which images, by which autoencoder (checksums), from which seed; sizes
    shard-000000.safetensors   latents [k, V, C, H, W] and labels int64 [k]; V = 2 where images may be mirrored

Source     LightningDiT (Yao et al. 2025, 2501.01423): latents are drawn once from what the encoder says of an image,
           and once of its mirror image; of the two one is taken at random whenever the image comes.
Departs    Stored in float16, where its program has float32.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from imagewright import limits
from imagewright.data.image_set import ImageSet
from imagewright.data.shards import Rows, Sheet, SheetRecord
from imagewright.files import read_json, write_json
from imagewright.moving import sent
from imagewright.shapes import Within, misfit
from imagewright.types import Batch, Chance, Condition, DataSpec, Example, UserError

FORMAT = "imagewright-latents/1"
MEASURED = 10_000
"""Most images from whose latents means and deviations are taken, evenly spaced (the published number)."""
_CHUNK = 1024


class _ManifestRecord(SheetRecord):
    latent: list[Annotated[int, Within(1, limits.SIDE)]]
    mirrored: bool


class _Statistics(TypedDict):
    mean: list[float]
    std: list[float]


@dataclass(frozen=True, kw_only=True)
class LatentSheet(Sheet):
    """What the latents of a store are. spec: of the images. latent: shape of one. mirrored: there are two views."""

    latent: tuple[int, ...]
    mirrored: bool

    what: ClassVar[str] = "latents"
    one: ClassVar[str] = "latent"
    format: ClassVar[str] = FORMAT
    record: ClassVar[Any] = _ManifestRecord
    maker: ClassVar[str] = "imagewright train RECIPE --autoencoder RUN"
    where: ClassVar[tuple[str, ...]] = ("autoencoder", "source")

    def __post_init__(self) -> None:
        object.__setattr__(self, "latent", tuple(self.latent))
        super().__post_init__()

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Latents, of one view or of two."""
        return {"latents": (2 if self.mirrored else 1, *self.latent)}


def statistics(folder: Path, manifest: LatentSheet) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel [C], in float64, of a complete store; kept beside it."""
    path = folder / "statistics.json"
    if path.exists():
        found = read_json(path)
        fault = misfit(found, _Statistics)
        if fault is None and len(found["mean"]) == len(found["std"]) == manifest.latent[0]:
            return torch.tensor(found["mean"]).double(), torch.tensor(found["std"]).double()
    rows, count = Rows(folder, manifest), min(MEASURED, manifest.n)
    wanted = [i * manifest.n // count for i in range(count)]
    parts = [rows.read(wanted[s : s + _CHUNK])["latents"][:, 0] for s in range(0, count, _CHUNK)]
    by_channel = torch.cat(parts).double().transpose(0, 1).flatten(1)
    mean, std = by_channel.mean(1), by_channel.std(1)
    write_json(path, {"mean": mean.tolist(), "std": std.tolist()})
    return mean, std


class LatentSet:
    """The latents of a set of images, as a data set (`types.Examples`) of which models see `spec`.

    images: of which they are. mean, std: [C]; scale: the deviation to which they are brought. They are in memory where
    they fit (`limits.KEPT`), or in_memory says so, else read by row.
    """

    example: ClassVar[type[Example]] = Batch

    def __init__(
        self,
        rows: Rows,
        images: ImageSet,
        spec: DataSpec,
        mean: Tensor,
        std: Tensor,
        scale: float,
        *,
        in_memory: bool | None = None,
    ) -> None:
        self.pictures, self.spec, self.xflip = images, spec, False
        self.manifest: Any = rows.manifest
        self.mean, self.factor = mean.float()[:, None, None], (scale / std.float())[:, None, None]
        self._rows = rows
        fits = 4 * len(self) * int(np.prod(self.manifest.tensors["latents"])) <= limits.KEPT
        self.in_memory = fits if in_memory is None else in_memory
        whole = [rows.whole(k)["latents"] for k in range(self.manifest.shards)] if self.in_memory else None
        self._kept = None if whole is None else torch.cat(whole)

    def __len__(self) -> int:
        return int(self.manifest.n)

    @property
    def source(self) -> str:
        """Where the images came from."""
        return f"{self.pictures.source}, in latents"

    @property
    def empty_classes(self) -> tuple[int, ...]:
        """Classes without images."""
        return self.pictures.empty_classes

    @property
    def fingerprint(self) -> str:
        """sha256 of what the latents are made of."""
        made = json.dumps([self.manifest.comparable(), self.pictures.fingerprint], sort_keys=True)
        return sha256(made.encode()).hexdigest()

    def mirrored(self) -> Self:
        """The set whose batches have half of the images mirrored left to right. UserError where it has one view."""
        if not self.manifest.mirrored:
            raise UserError(f"{self._rows.folder} holds latents of no mirrored images; choose another data.latents")
        changed = copy.copy(self)
        changed.xflip = True
        return changed

    def read(self, rows: npt.NDArray[np.int64]) -> Tensor:
        """Latents by index, [n, V, C, H, W], float16 or float32."""
        if self._kept is not None:
            return self._kept[torch.from_numpy(rows)]
        return self._rows.read([int(i) for i in rows])["latents"]

    def batch(self, read: Tensor, rows: npt.NDArray[np.int64], chance: Chance) -> Batch:
        """As they are stored, one view of each, and the images' classes."""
        view = torch.zeros(len(rows), dtype=torch.int64)
        if self.xflip:
            view = torch.from_numpy((chance() < 0.5).astype(np.int64))
        labels = torch.from_numpy(self.pictures.labels[rows]) if self.spec.num_classes else None
        return Batch(read[torch.arange(len(rows)), view], Condition(label=labels))

    def prepared(self, batch: Batch) -> Batch:
        """As models see them: float32, of mean 0 and deviation `scale` in every channel."""
        latents = batch.images
        mean, factor = (sent(t, latents.device) for t in (self.mean, self.factor))
        return replace(batch, images=(latents.float() - mean) * factor)
