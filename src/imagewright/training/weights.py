"""Weights that a run keeps along the way, apart from its checkpoints: raw ones and power-function averages.

`training.weights_images` says how often. Files: `weights/raw-000000012800.safetensors` and, for each
`ema.power_std`, `weights/power0.1-000000012800.safetensors`; names are (what, images seen). `posthoc` and
`tuning.lcsc` make new models of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from imagewright.arrays import read_head, read_tensors, require_finite
from imagewright.files import replacing
from imagewright.types import UserError

FOLDER = "weights"
IN_MEMORY = 8 << 30
"""Bytes of differences that a search holds."""
_NAME = re.compile(r"(?P<kind>[a-z0-9.]+)-(?P<images>\d{12})\.safetensors")


@dataclass(frozen=True, order=True)
class StoredWeights:
    """One file: weights of `kind` ("raw", "power0.1") after `images` images."""

    images: int
    kind: str
    path: Path


def store(run: Path, kind: str, images: int, state: Mapping[str, Tensor]) -> Path:
    """Write weights in full precision, atomically."""
    path = run / FOLDER / f"{kind}-{images:012d}.safetensors"
    with replacing(path) as aside:
        save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, aside)
    return path


def stored(run: Path, kind: str | None = None) -> list[StoredWeights]:
    """A run's kept weights, oldest first; of one kind, if asked."""
    found = []
    for path in (run / FOLDER).glob("*.safetensors"):
        match = _NAME.fullmatch(path.name)
        if match and kind in (None, match["kind"]):
            found.append(StoredWeights(int(match["images"]), match["kind"], path))
    return sorted(found)


def combine(paths: Sequence[Path], coefficients: Sequence[float]) -> dict[str, Tensor]:
    """sum_i coefficients_i weights_i, read one file at a time: two sets of weights in memory, however many files
    (one of them in float64).

    Written as the first plus multiples of differences, so equal weights combine to themselves whatever coefficients
    of sum 1, and a single 1 gives its file bit for bit. Arithmetic is float64, the answer float32; integer buffers are
    the last file's. Raises UserError unless there is a file, a coefficient for each, and their sum is 1.
    """
    if not paths or len(paths) != len(coefficients):
        raise UserError(f"{len(coefficients)} coefficients for {len(paths)} stored weights; give one for each")
    if abs(sum(coefficients) - 1) > 1e-6:
        raise UserError(f"the coefficients sum to {sum(coefficients):.6g}; they must sum to 1")
    if sorted(coefficients) == [0.0] * (len(paths) - 1) + [1.0]:
        return read_tensors(paths[list(coefficients).index(1.0)])
    _require_alike(paths)
    first = read_tensors(paths[0])
    total = {k: v.double() for k, v in first.items() if v.is_floating_point()}
    for path, coefficient in zip(paths[1:], coefficients[1:], strict=True):
        if coefficient != 0:
            with safe_open(path, framework="pt") as file:
                for name, value in total.items():
                    value.add_(file.get_tensor(name).double() - first[name], alpha=coefficient)
    require_finite(paths[-1], total)
    for name in list(total):  # one tensor's place after the other
        first[name] = total.pop(name).to(first[name].dtype)
    with safe_open(paths[-1], framework="pt") as file:
        return {k: v if v.is_floating_point() else file.get_tensor(k) for k, v in first.items()}


def differences(paths: Sequence[Path], dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], Tensor]:
    """The first weights, and all others minus it as one matrix [K - 1, parameters]: for a search that fits in memory.

    Raises UserError when there are none.
    """
    if not paths:
        raise UserError("there are no stored weights; train with --training.weights-images")
    _require_alike(paths)
    first = read_tensors(paths[0])
    base = flatten(first)
    rows = torch.empty(len(paths) - 1, len(base), dtype=dtype)
    for row, path in zip(rows, paths[1:], strict=True):
        row.copy_(flatten(read_tensors(path)) - base)
    return first, rows


class Combinations:
    """sum_i alpha_i weights_i for many alpha of sum 1, oldest weights first: for a search.

    Where all differences fit in `most` bytes they are held (K - 1 times the model); else each combination reads the
    files anew, one at a time, and memory does not grow with their number. Raises UserError when there are no files.
    """

    def __init__(self, paths: Sequence[Path], most: int = IN_MEMORY) -> None:
        if not paths:
            raise UserError("there are no stored weights; train with --training.weights-images")
        self._paths = list(paths)
        sizes = [math.prod(shape) for dtype, shape in read_head(paths[0]).tensors.values() if dtype.is_floating_point]
        self.bytes = 4 * sum(sizes) * (len(paths) - 1)
        self.held = self.bytes <= most
        if self.held:
            self.first, self._rows = differences(paths)
            self._base = flatten(self.first)
        else:
            _require_alike(paths)
            self.first = read_tensors(paths[0])

    def __call__(self, alpha: npt.NDArray[np.float64]) -> dict[str, Tensor]:
        """Weights of the combination."""
        if not self.held:
            return combine(self._paths, alpha.tolist())
        return unflatten(self._base + torch.from_numpy(alpha[1:]).float() @ self._rows, self.first)


def _require_alike(paths: Sequence[Path]) -> None:
    """Raise UserError unless all files hold tensors of the same names, shapes and number types."""
    first = read_head(paths[0]).tensors
    for path in paths[1:]:
        if read_head(path).tensors != first:
            raise UserError(
                f"{path} holds other weights than {paths[0].name}: their names, shapes or number types differ"
            )


def flatten(state: Mapping[str, Tensor]) -> Tensor:
    """All floating-point entries end to end, in the order of their names, float32."""
    return torch.cat([state[k].float().flatten() for k in sorted(state) if state[k].is_floating_point()])


def unflatten(flat: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of `flatten`; other entries are `like`'s."""
    state, at = dict(like), 0
    for name in sorted(like):
        if like[name].is_floating_point():
            state[name] = flat[at : at + like[name].numel()].reshape(like[name].shape).to(like[name].dtype)
            at += like[name].numel()
    return state
