"""Runs in latents: the images of a run encoded once, by any number of processes, and the space that its model lives in.

Latents are a function of the images, the autoencoder's weights and a seed, and can be made again: without a folder of
their own they are kept with what the package keeps between commands (`cache`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from imagewright.cache import folder_entry
from imagewright.data import ImageSet, from_uint8
from imagewright.data.latents import LatentSet, LatentSheet, statistics
from imagewright.data.shards import Rows, claim_folder, fill_shards, write_rows
from imagewright.models.files import weights_hash
from imagewright.models.latents import LatentSpace
from imagewright.noise import ImageNoise
from imagewright.types import UserError

SHARD_BYTES = 64 << 20
BATCH = 64
STREAMS = (2, 3)
"""Of an image's random numbers: those of its latents, and of its mirror image's."""


def open_latents(
    images: ImageSet,
    space: LatentSpace,
    *,
    mirrored: bool,
    folder: str | None = None,
    measure: bool = True,
    dtype: str = "float16",
    device: torch.device | str = "cpu",
    on_progress: Callable[[int, int], None] | None = None,
) -> LatentSet:
    """The set's latents, encoded where they are not there yet; measure: give the space their statistics.

    Raises UserError for a folder that holds others, and without a folder where nothing can be kept between commands.
    """
    sheet = _sheet(images, space, mirrored, dtype)
    where = Path(folder) if folder is not None else folder_entry("latents", *sorted(sheet.comparable().items()))
    if where is None:
        raise UserError("no folder keeps what is made between commands; say where latents go with --data.latents")
    claim_folder(where, sheet)
    encode = partial(_encoded, images, space, torch.device(device), where)
    fill_shards(where, sheet, encode, advance_to=lambda done: on_progress(done, len(images)) if on_progress else None)
    space.to("cpu")
    if measure:
        space.measured(*statistics(where, sheet))
    return LatentSet(Rows(where, sheet), images, space.spec(images.spec), space.mean, space.std, space.scale)


def _sheet(images: ImageSet, space: LatentSpace, mirrored: bool, dtype: str) -> LatentSheet:
    row = (2 if mirrored else 1) * int(np.prod(space.shape)) * (2 if dtype == "float16" else 4)
    made_of = {"images": images.fingerprint, "weights_sha256": weights_hash(space.autoencoder.state_dict())}
    return LatentSheet(
        n=len(images), seed=0, shard=max(BATCH, min(8192, SHARD_BYTES // row)), batch=BATCH, dtype=dtype,
        spec=images.spec, origin={**made_of, "source": images.source}, latent=space.shape, mirrored=mirrored,
    )  # fmt: skip


@torch.no_grad()
def _encoded(
    images: ImageSet, space: LatentSpace, device: torch.device, folder: Path, sheet: LatentSheet, index: int
) -> Callable[[], None]:
    """Encode the images of a shard; returns what writes it."""
    autoencoder: Any = space.autoencoder.eval().to(device)
    rows, parts = sheet.rows(index), []
    for start in range(rows.start, rows.stop, sheet.batch):
        these = list(range(start, min(start + sheet.batch, rows.stop)))
        pictures = from_uint8(images.images(these), device)
        views = (pictures, pictures.flip(-1))[: sheet.tensors["latents"][0]]
        drawn = [
            autoencoder.encode(view, ImageNoise(sheet.seed, these, stream))
            for view, stream in zip(views, STREAMS, strict=False)
        ]
        parts.append(torch.stack(drawn, 1).cpu())
    labels = torch.from_numpy(images.labels[rows.start : rows.stop])
    return partial(write_rows, folder, sheet, index, labels, {"latents": torch.cat(parts)})
