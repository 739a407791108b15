"""What latents on disk save a training that would else decode pictures, and encode them."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from imagewright.bench.speed import Ratio, alternate
from imagewright.data import ImageSet
from imagewright.data.latents import LatentSet, LatentSheet
from imagewright.data.pixels import Pixels, decode, encode_png, to_uint8
from imagewright.data.shards import Rows, claim_folder, write_rows
from imagewright.types import Batch, DataSpec, Examples

COUNT, BATCH = 256, 64
SIDE, LATENT = 256, (32, 16, 16)
"""Pixels a side of the pictures, and VA-VAE's latents of them."""
SPEC = DataSpec(name="speed", resolution=SIDE, channels=3)


class Files:
    """Pictures that are decoded whenever they are asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, rows: npt.NDArray[np.int64]) -> Pixels:
        return np.stack([decode((self.folder / f"{i}.png").read_bytes()) for i in rows])


def measure_encoded(device: torch.device, rounds: int) -> Ratio:
    """Batches of latents, with mirrored ones, read by row, against the same pictures decoded: both on the device.

    details: bytes of a picture's file, and of its latents.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        pictures = _pictures(folder)
        sets = (_latents(folder / "latents", pictures).mirrored(), pictures.mirrored())
        random = np.random.default_rng(0)

        def read(examples: Examples) -> Batch:
            """As a loader does, but nothing is read ahead: that would fall into the other's turn."""
            rows = random.integers(0, COUNT, BATCH)
            batch = examples.batch(examples.read(rows), rows, lambda: random.random(BATCH))
            return examples.prepared(batch.map(lambda t: t.to(device)))  # type: ignore[return-value]

        measured = alternate(lambda: read(sets[0]), lambda: read(sets[1]), device, rounds, BATCH)
        details = {"bytes of a picture": float((folder / "0.png").stat().st_size),
                   "bytes of its latents": 2.0 * 2 * float(np.prod(LATENT))}  # fmt: skip
        rate, other, (ratio, low, high) = measured
        return Ratio("latents from disk", rate, "pictures of 256 x 256, decoded", other, ratio, low, high, details)


def _pictures(folder: Path) -> ImageSet:
    """Smooth pictures with a little noise, as PNG files of about the size of photographs'."""
    generator = torch.Generator().manual_seed(0)
    for i in range(COUNT):
        coarse = torch.rand(1, 3, SIDE // 16, SIDE // 16, generator=generator) * 2 - 1
        smooth = torch.nn.functional.interpolate(coarse, size=(SIDE, SIDE), mode="bicubic")
        noisy = smooth + 0.03 * torch.randn(smooth.shape, generator=generator)
        (folder / f"{i}.png").write_bytes(encode_png(to_uint8(noisy)[0]))
    return ImageSet(
        spec=SPEC, pixels=Files(folder), labels=np.full(COUNT, -1), names=tuple(map(str, range(COUNT))),
        source="made up", digests=(b"",) * COUNT,
    )  # fmt: skip


def _latents(folder: Path, pictures: ImageSet) -> LatentSet:
    """A store of made-up latents, two views of each."""
    sheet = LatentSheet(n=COUNT, seed=0, shard=COUNT // 2, batch=BATCH, dtype="float16", spec=SPEC, origin={},
                        latent=LATENT, mirrored=True)  # fmt: skip
    claim_folder(folder, sheet)
    for index in range(sheet.shards):
        rows = sheet.rows(index)
        made = {"latents": torch.randn(len(rows), 2, *LATENT, generator=torch.Generator().manual_seed(index))}
        write_rows(folder, sheet, index, torch.full((len(rows),), -1), made)
    channels, side, _ = LATENT
    seen = DataSpec(name="latents", resolution=side, channels=channels)
    one = torch.ones(channels)
    return LatentSet(Rows(folder, sheet), pictures, seen, 0 * one, one, 0.5, in_memory=False)
