"""What an autoencoder or a tokenizer gives back of pictures, and what order its latents have.

PSNR        10 log10(2^2 / mean squared error) of a picture, in dB, colours being 2 wide; the mean over pictures.
SSIM        Wang et al. 2004: torchmetrics', with its Gaussian window of deviation 1.5; of 0.5 for pictures below 16
            pixels, in which the usual window does not fit. Needs the extra `ssim`.
Perceptual  squared difference of channel-normalised feature maps (LPIPS's form) of the classifier of the data set; and
            LPIPS itself where it is installed.
Frechet     of what comes back to the pictures themselves, in an extractor's features (rFID with Inception's).
Probe       how often a linear map of latents names the class of a picture that it has not learnt from (`probe`).
Latents are drawn, as VA-VAE's evaluation has them; those of the probe are means.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from imagewright.data import ImageSet, from_uint8, to_uint8
from imagewright.metrics.features import FeatureExtractor
from imagewright.metrics.frechet import frechet_distance
from imagewright.metrics.inception import WEIGHTS_SHA256
from imagewright.metrics.perceptual import lpips_installed, normalised_distance, perceptual_network
from imagewright.metrics.probe import probe_accuracy
from imagewright.metrics.statistics import FeatureStatistics
from imagewright.noise import ImageNoise
from imagewright.precision import tf32
from imagewright.types import DataSpec, UserError, kind_of

MOST_PROBED, MOST_NUMBERS = 10_000, 4096
"""Pictures of the training set that a probe learns from, evenly spaced; numbers of latents above which it learns from
their means over places."""
SMALL = 16
"""Pixels a side below which SSIM has a smaller window."""
STREAM = 2
"""Of a picture's random numbers: those of its latents, as training has them."""
Compare = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class ReconstructionReport:
    """Scores by name, means over pictures; probe is a share in [0, 1]. reference: the pictures' fingerprint.

    latent: how many numbers stand for a picture, or tokens. notes: what was left out, and why.
    """

    scores: dict[str, float]
    num_images: int
    seed: int
    latent: tuple[int, ...]
    reference: str
    extractor_sha256: str
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@tf32(False)
def measure_reconstruction(
    model: nn.Module,
    images: ImageSet,
    known: ImageSet | None,
    extractor: FeatureExtractor,
    *,
    seed: int = 0,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    on_progress: Callable[[int], None] = lambda done: None,
) -> ReconstructionReport:
    """Of a model of kind "autoencoder" or "codec". known: what a probe learns from; None = there is none.

    Raises UserError for fewer than 2 pictures.
    """
    if len(images) < 2:
        raise UserError(f"{images.source} has {len(images)} pictures to give back; at least 2 are needed")
    there: Any = model.eval().to(device)
    measures, notes = _measures(images.spec, torch.device(device))
    sums, real, made = dict.fromkeys(measures, 0.0), *(FeatureStatistics(extractor.dim) for _ in range(2))
    for start in range(0, len(images), batch_size):
        rows = list(range(start, min(start + batch_size, len(images))))
        pixels = images.images(rows)
        pictures = from_uint8(pixels, device)
        rebuilt = given_back(there, pictures, ImageNoise(seed, rows, STREAM))
        for name, measure in measures.items():
            sums[name] += float(measure(rebuilt, pictures).double().sum())
        real.update(extractor(pixels)[0])
        made.update(extractor(to_uint8(rebuilt))[0])
        on_progress(rows[-1] + 1)
    scores = {name: total / len(images) for name, total in sums.items()}
    fid = extractor.sha256 == WEIGHTS_SHA256
    scores["rfid" if fid else f"rfd_{extractor.name}"] = frechet_distance(made, real)
    probed = None if known is None else _probe(there, known, images, batch_size, torch.device(device))
    if probed is None:
        notes.append("probe: left out, as there are no classes or no latents to read them off")
    else:
        scores["probe"] = probed
    latent = there.latent if kind_of(model) == "autoencoder" else (there.length,)
    return ReconstructionReport(
        scores=scores, num_images=len(images), seed=seed, latent=tuple(latent), reference=images.fingerprint,
        extractor_sha256=extractor.sha256, notes=tuple(notes),
    )  # fmt: skip


@torch.no_grad()
def given_back(model: Any, pictures: Tensor, noise: ImageNoise | None = None) -> Tensor:
    """Pictures [N, C, H, W] through a codec or autoencoder and back; noise: of drawn latents."""
    draws = kind_of(model) == "autoencoder" and noise is not None
    answer: Tensor = model.decode(model.encode(pictures, noise) if draws else model.encode(pictures))
    return answer


def psnr(rebuilt: Tensor, pictures: Tensor) -> Tensor:
    """[N], in dB; a picture that comes back exactly has 120."""
    errors = (rebuilt - pictures).double().square().flatten(1).mean(1)
    return 10 * (4 / errors.clamp(min=4e-12)).log10()


def _measures(spec: DataSpec, device: torch.device) -> tuple[dict[str, Compare], list[str]]:
    """Distances of two batches of pictures that can be had here, by name; and of those that cannot, why."""
    found: dict[str, Compare] = {"psnr": psnr}
    notes: list[str] = []
    if importlib.util.find_spec("torchmetrics") is None:
        notes.append("ssim: left out; it needs: pip install 'imagewright[ssim]'")
    else:
        found["ssim"] = _ssim(spec.resolution)
    own = perceptual_network(None, spec)
    if own is not None:
        found["perceptual"] = _by_maps(own.to(device))
    if lpips_installed():
        lpips: Any = perceptual_network("lpips", spec)
        found["lpips"] = lpips.to(device).compare
    if own is None and not lpips_installed():
        notes.append("perceptual: left out; no classifier of these pictures is shipped, and lpips is not installed")
    return found, notes


def _ssim(side: int) -> Compare:
    from torchmetrics.functional.image import structural_similarity_index_measure

    sigma = 1.5 if side >= SMALL else 0.5

    def measure(rebuilt: Tensor, pictures: Tensor) -> Tensor:
        each: Any = structural_similarity_index_measure(
            rebuilt, pictures, sigma=sigma, data_range=(-1.0, 1.0), reduction="none"
        )
        return each if isinstance(each, Tensor) else each[0]

    return measure


def _by_maps(network: nn.Module) -> Compare:
    @torch.no_grad()
    def measure(rebuilt: Tensor, pictures: Tensor) -> Tensor:
        return normalised_distance(network(rebuilt), network(pictures))

    return measure


def _probe(model: Any, known: ImageSet, new: ImageSet, batch_size: int, device: torch.device) -> float | None:
    """None where pictures have no classes, or a codec has no latents."""
    if known.spec.num_classes < 2 or not (kind_of(model) == "autoencoder" or hasattr(model, "codes")):
        return None
    if len(known) > MOST_PROBED:
        known = known.subset([i * len(known) // MOST_PROBED for i in range(MOST_PROBED)])
    if len(np.unique(known.labels[known.labels >= 0])) < 2 or not (new.labels >= 0).any():
        return None
    ours, theirs = (_latents(model, each, batch_size, device) for each in (known, new))
    return probe_accuracy(ours, known.labels, theirs, new.labels)


@torch.no_grad()
def _latents(model: Any, images: ImageSet, batch_size: int, device: torch.device) -> npt.NDArray[np.float32]:
    """Latents of all pictures [N, ...], of a codec its codes; their means over places where they are too many."""
    parts = []
    for start in range(0, len(images), batch_size):
        pictures = from_uint8(images.images(range(start, min(start + batch_size, len(images)))), device)
        found = model.encode(pictures)
        found = found if kind_of(model) == "autoencoder" else model.codes(found)
        parts.append((found if found[0].numel() <= MOST_NUMBERS else found.mean((2, 3))).float().cpu())
    return torch.cat(parts).numpy()
