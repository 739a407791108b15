"""DINOv2 and CLIP as feature extractors, from a local folder. Needs the extra `transformers`.

Source   DINOv2 (Oquab et al. 2023, 2304.07193) for FD-DINOv2 (Stein et al. 2023, 2306.04675): the class token after the
         last norm. CLIP (Radford et al. 2021, 2103.00020): the projected image embedding. Pictures go to the network's
         size by bicubic interpolation with antialiasing, then lose the mean and spread that the folder's
         preprocessor_config.json says (else the family's own).
Safety   only safetensors weights are opened, nothing is fetched, and no code of the folder is run.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from imagewright.files import read_json
from imagewright.metrics.features import Images, file_sha256
from imagewright.types import UserError

_STATISTICS: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "dinov2": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}
"""Mean and standard deviation of the pixels in [0, 1], by family."""
_FAMILIES: Mapping[str, str] = {
    "dinov2": "dinov2",
    "dinov2_with_registers": "dinov2",
    "clip": "clip",
    "clip_vision_model": "clip",
}
"""Families by the model_type of a config.json."""
_SIDE = 224
WEIGHTS = "model.safetensors"


class TransformerFeatures:
    """A vision transformer of a folder behind the `FeatureExtractor` face. It has no classes: no Inception score."""

    num_classes = 0
    channels = 3
    note = ""

    def __init__(self, folder: Path, *, device: torch.device | str = "cpu", batch_size: int = 32) -> None:
        self.family, config = _family(folder)
        weights = folder / WEIGHTS
        if not weights.is_file():
            raise UserError(f"{folder} has no {WEIGHTS}; other kinds of weights (.bin, .pt) are never opened")
        self.sha256 = file_sha256(weights)
        self.name = f"{self.family}-{self.sha256[:8]}"
        self.network = _load(folder, self.family).requires_grad_(False).eval().to(device)
        self._device, self._batch_size = torch.device(device), batch_size
        self.side, mean, std = _preprocessing(folder, self.family)
        self._mean, self._std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (mean, std))
        vision = config.get("vision_config", config)
        self.dim = int(config.get("projection_dim", 512) if self.family == "clip" else vision["hidden_size"])

    def __call__(self, images: Images) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        features = np.empty((len(images), self.dim), dtype=np.float32)
        for start in range(0, len(images), self._batch_size):
            rows = slice(start, start + self._batch_size)
            with torch.inference_mode():
                features[rows] = self._features(self._prepared(images[rows])).float().cpu().numpy()
        return features, np.empty((len(images), 0), dtype=np.float32)

    def _prepared(self, images: Images) -> Tensor:
        x = torch.from_numpy(np.ascontiguousarray(images)).to(self._device).permute(0, 3, 1, 2).float() / 255
        x = x.expand(-1, 3, -1, -1)
        if x.shape[2:] != (self.side, self.side):
            x = nn.functional.interpolate(
                x, size=(self.side, self.side), mode="bicubic", align_corners=False, antialias=True
            ).clamp(0, 1)
        return (x - self._mean) / self._std

    def _features(self, x: Tensor) -> Tensor:
        out: Any = self.network(pixel_values=x)
        found: Tensor = out.image_embeds if self.family == "clip" else out.last_hidden_state[:, 0]
        return found


def is_transformer(folder: Path) -> bool:
    """Whether a folder is described as one of these networks."""
    return (folder / "config.json").is_file()


def _family(folder: Path) -> tuple[str, dict[str, Any]]:
    config: dict[str, Any] = read_json(folder / "config.json", dict)
    kind = str(config.get("model_type", ""))
    family = {"dinov2": "dinov2", "dinov2_with_registers": "dinov2", "clip": "clip", "clip_vision_model": "clip"}.get(
        kind
    )
    if family is None:
        raise UserError(f"{folder}/config.json is of a {kind or 'nameless model'}; known are dinov2 and clip")
    return family, config


def _load(folder: Path, family: str) -> nn.Module:
    if importlib.util.find_spec("transformers") is None:
        raise UserError(f"{folder} holds a {family} network, which needs: pip install 'imagewright[transformers]'")
    import transformers

    kind: Any = transformers.CLIPVisionModelWithProjection if family == "clip" else transformers.AutoModel
    given = {"local_files_only": True, "use_safetensors": True}
    if family != "clip":
        given["trust_remote_code"] = False
    try:
        network: nn.Module = kind.from_pretrained(str(folder), **given)
    except Exception as error:  # the library answers a damaged folder with any exception there is
        raise UserError(f"{folder} is no whole {family} network: {str(error).splitlines()[0][:200]}") from None
    return network


def _preprocessing(folder: Path, family: str) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
    mean, std = _STATISTICS[family]
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return _SIDE, mean, std
    said: dict[str, Any] = read_json(path, dict)
    crop = said.get("crop_size", said.get("size", _SIDE))
    side = crop.get("height", _SIDE) if isinstance(crop, dict) else crop
    mean, std = tuple(said.get("image_mean", mean)), tuple(said.get("image_std", std))
    if not isinstance(side, int) or not 14 <= side <= 1024 or len(mean) != 3 or len(std) != 3:
        raise UserError(f"{path} is damaged: crop_size, image_mean and image_std must be a size and three numbers each")
    return side, mean, std
