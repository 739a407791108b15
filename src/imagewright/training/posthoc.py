"""Post-hoc EMA: a power-function average of any length, after training, from a few stored ones.

Source   Karras et al. 2024 (EDM2, arXiv 2312.02696), section 3.2 and appendix C, algorithm 3.
Profiles p(tau) ~ tau^gamma on [0, n] for an average after n images; `training.ema` maps a relative width to gamma.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from imagewright.training.ema import gamma_of_std
from imagewright.training.weights import combine, stored
from imagewright.types import UserError

Array = npt.NDArray[np.float64]


class Profile(NamedTuple):
    """A power-function average: after how many images, and its relative width."""

    images: float
    std: float


def inner_product(a: Profile, b: Profile) -> float:
    """int p_a p_b d tau, up to a constant common to all pairs: EDM2's eq. 139, written to avoid overflow."""
    return float(_inner_products([a], [b])[0, 0])


def _inner_products(a: Sequence[Profile], b: Sequence[Profile]) -> Array:
    """`inner_product` of all pairs, [len(a), len(b)]: the exponents are roots, found once for each width."""
    gamma = {std: gamma_of_std(std) for std in {p.std for p in (*a, *b)}}
    ga, gb = np.array([gamma[p.std] for p in a])[:, None], np.array([gamma[p.std] for p in b])
    ta, tb = np.array([float(p.images) for p in a])[:, None], np.array([float(p.images) for p in b])
    power = np.minimum(ta / tb, tb / ta) ** np.where(ta < tb, gb, ga)
    return np.asarray((ga + 1) * (gb + 1) * power / ((ga + gb + 1) * np.maximum(ta, tb)))


def solve(available: Sequence[Profile], wanted: Profile) -> Array:
    """Coefficients of the available averages whose profile is nearest to the wanted one: float64, sum 1, any sign.

    Averages that have seen more images than the wanted one get 0. Raises UserError when none is old enough.
    """
    usable = [i for i, p in enumerate(available) if p.images <= wanted.images]
    if not usable:
        raise UserError(
            f"no stored average is from before {wanted.images:g} images; the first is at "
            f"{min((p.images for p in available), default=float('nan')):g}"
        )
    chosen = [available[i] for i in usable]
    gram = _inner_products(chosen, chosen)
    right = _inner_products(chosen, [wanted])[:, 0]
    scale = np.sqrt(np.diag(gram))
    found, *_ = np.linalg.lstsq(gram / np.outer(scale, scale), right / scale, rcond=1e-14)
    coefficients = np.zeros(len(available))
    coefficients[usable] = found / scale
    total = coefficients.sum()
    return np.asarray(coefficients / total)


def reconstruct(run: Path, std: float, images: int | None = None) -> dict[str, Tensor]:
    """Weights of the average of relative width `std` in (0, 0.29) after `images` images (None: the newest stored).

    Raises UserError when the run kept no averages, or for a width outside the range.
    """
    if not 0 < std < 0.29:
        raise UserError(f"--std is {std}; it must lie in (0, 0.29)")
    entries = [s for s in stored(run) if s.kind.startswith("power")]
    if not entries:
        raise UserError(
            f"{run} kept no power-function averages; train with --training.weights-images 50000 "
            "--training.ema.power-std 0.05 0.1"
        )
    profiles = [Profile(s.images, float(s.kind.removeprefix("power"))) for s in entries]
    coefficients = solve(profiles, Profile(images or max(s.images for s in entries), std))
    used = [(s.path, float(c)) for s, c in zip(entries, coefficients, strict=True) if c != 0]
    return combine([path for path, _ in used], [c for _, c in used])
