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
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from imagewright.arrays import read_head
from imagewright.files import read_json
from imagewright.metrics.features import EncoderFeatures, file_sha256
from imagewright.models.view import seen
from imagewright.types import Encoding, ModelKind, UserError, View

STATISTICS: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
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
FAMILIES = ("dinov2", "clip")
_SIDE = 224
WEIGHTS = "model.safetensors"


class VisionTransformer(nn.Module):
    """A network of one of these families as a `types.Encoder` without classes; its patches are the tokens."""

    kind: ClassVar[ModelKind] = "encoder"

    def __init__(self, network: nn.Module, family: str, view: View) -> None:
        super().__init__()
        self.network, self.family, self.view = network, family, view

    def encode(self, images: Tensor) -> Encoding:
        """[N, C, H, H] in [-1, 1] -> features [N, D], and a token for each patch."""
        out: Any = self.network(pixel_values=seen(images, self.view))
        config: Any = self.network.config
        side = self.view.side // config.patch_size
        last: Tensor = out.last_hidden_state
        pooled = out.image_embeds if self.family == "clip" else last[:, 0]
        return Encoding(pooled, last[:, -(side**2) :], (side, side))


class TransformerFeatures(EncoderFeatures):
    """A vision transformer of a folder as a `FeatureExtractor`. It has no classes: no Inception score."""

    def __init__(self, folder: Path, *, device: torch.device | str = "cpu", batch_size: int = 32) -> None:
        family = family_of(folder)
        weights = folder / WEIGHTS
        if not weights.is_file():
            raise UserError(f"{folder} has no {WEIGHTS}; other kinds of weights (.bin, .pt) are never opened")
        sha256 = file_sha256(weights)
        network, view = _load(folder, family), _view(folder, family)
        sees: Any = network.config.image_size if family == "clip" else view.side  # DINOv2 takes pictures of any size
        if sees != view.side:
            raise UserError(f"{folder} is of pictures of {sees} pixels; its preprocessor_config.json makes {view.side}")
        encoder, name = VisionTransformer(network, family, view), f"{family}-{sha256[:8]}"
        try:  # which looks at a picture
            super().__init__(encoder, name=name, sha256=sha256, device=device, batch_size=batch_size)
        except RuntimeError as error:
            raise UserError(f"{folder} is no whole {family} network: {_first_line(error)}") from None


def is_transformer(folder: Path) -> bool:
    """Whether a folder is described as one of these networks."""
    return (folder / "config.json").is_file()


def family_of(folder: Path) -> str:
    """dinov2 or clip. Raises UserError for a folder of another network."""
    config: dict[str, Any] = read_json(folder / "config.json", dict)
    kind = str(config.get("model_type", ""))
    if kind not in _FAMILIES:
        raise UserError(f"{folder}/config.json is of a {kind or 'nameless model'}; known are dinov2 and clip")
    return _FAMILIES[kind]


def _load(folder: Path, family: str) -> Any:
    if importlib.util.find_spec("transformers") is None:
        raise UserError(f"{folder} holds a {family} network, which needs: pip install 'imagewright[transformers]'")
    import transformers

    tensors, layers = read_head(folder / WEIGHTS).tensors, _layers(folder)
    if not isinstance(layers, int) or layers > len(tensors):  # more would be built before they are missed
        raise UserError(f"{folder}/config.json describes {layers} layers; its weights are {len(tensors)} tensors")
    for name, (dtype, _) in tensors.items():
        if not dtype.is_floating_point and not name.endswith("position_ids"):
            raise UserError(f"{folder} is no whole {family} network: {name!r} is {dtype}")
    kind: Any = transformers.CLIPVisionModelWithProjection if family == "clip" else transformers.AutoModel
    given = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
    if family != "clip":
        given["trust_remote_code"] = False
    try:
        network, told = kind.from_pretrained(str(folder), **given)
    except Exception as error:  # the library answers a damaged folder with any exception there is
        raise UserError(f"{folder} is no whole {family} network: {_first_line(error)}") from None
    missing = sorted(map(str, told["missing_keys"]))  # which it would fill with random numbers
    if missing:
        raise UserError(f"{folder} is no whole {family} network: {WEIGHTS} lacks {missing[0]!r}")
    return network


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _layers(folder: Path) -> Any:
    """How many a folder's config.json describes, of the vision part."""
    config: dict[str, Any] = read_json(folder / "config.json", dict)
    vision = config.get("vision_config")
    return (vision if isinstance(vision, dict) else config).get("num_hidden_layers", 0)


def _view(folder: Path, family: str) -> View:
    mean, std = STATISTICS[family]
    path = folder / "preprocessor_config.json"
    side: Any = _SIDE
    if path.is_file():
        said: dict[str, Any] = read_json(path, dict)
        crop = said.get("crop_size", said.get("size", _SIDE))
        side = crop.get("height", _SIDE) if isinstance(crop, dict) else crop
        mean, std = said.get("image_mean", mean), said.get("image_std", std)
    if not isinstance(side, int) or not 14 <= side <= 1024 or not (_colours(mean, 0.0) and _colours(std, 1e-3)):
        raise UserError(
            f"{path} is damaged: crop_size must be a size of 14 to 1024, image_mean and image_std three numbers up to 1"
        )
    return View(side=side, channels=3, resize="bicubic", mean=tuple(mean), std=tuple(std))


def _colours(values: Any, least: float) -> bool:
    """Whether these are three numbers from there to 1."""
    listed = isinstance(values, (list, tuple)) and len(values) == 3
    return listed and all(type(v) in (int, float) and least <= v <= 1 for v in values)
