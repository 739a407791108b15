"""What a tokenizer or autoencoder leaves in place of samples: pictures, what comes back, how its codebook is used."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from imagewright.data import ImageSet, from_uint8, to_uint8
from imagewright.models.vq import codebook_usage
from imagewright.training.snapshots import grid, save_image
from imagewright.types import kind_of

COLUMNS = 10
MEASURED = 10_000
"""Most images on which the codebook's usage is measured; the first ones of the run's own."""
BATCH = 64


@torch.no_grad()
def save_reconstructions(path: Path, model: nn.Module, images: ImageSet, device: torch.device) -> None:
    """Five pairs of rows: pictures of the run's own data, evenly spaced, and beneath each what comes back."""
    count = min(5 * COLUMNS, len(images))
    shown = images.images([i * len(images) // count for i in range(count)])
    there: Any = model.eval().to(device)
    rebuilt = to_uint8(there.decode(there.encode(from_uint8(shown).to(device))))
    rows = [np.concatenate([a[s : s + COLUMNS] for a in (shown, rebuilt)]) for s in range(0, count, COLUMNS)]
    save_image(path, grid(np.concatenate(rows), min(COLUMNS, count)), scale=max(1, 64 // images.spec.resolution))


@torch.no_grad()
def reconstruction_record(coder: nn.Module, images: ImageSet, device: torch.device) -> dict[str, Any]:
    """The mean squared error as PSNR in dB, on at most 10,000 of the run's own images; a codec's usage of its codebook.

    Latents are the means of what an autoencoder says.
    """
    model: Any = coder.eval().to(device)
    count, error, codes = min(MEASURED, len(images)), 0.0, []
    for start in range(0, count, BATCH):
        batch = from_uint8(images.images(range(start, min(start + BATCH, count)))).to(device)
        codes.append(model.encode(batch).cpu())
        error += float((model.decode(codes[-1].to(device)) - batch).cpu().double().square().flatten(1).mean(1).sum())
    psnr = 10 * math.log10(4 / max(error / count, 1e-12))  # the colour range is 2
    found = {"psnr": round(psnr, 2), "measured_on": count}
    if kind_of(model) != "codec":
        return found
    usage = codebook_usage(torch.cat(codes), model.values)
    book = {"size": model.values, "perplexity": round(usage.perplexity, 1), "dead": usage.dead}
    return {"codebook": book, **found}
