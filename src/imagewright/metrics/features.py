"""Feature extractors, what a distance compares images by: the protocol, and two small classifiers of ours.

The classifiers `digits` and `emoji` ship with the package (assets/*.safetensors, made by `train_features`);
distances in their features are called fd_digits and fd_emoji. They are not FID, whose extractor is
`inception`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Protocol, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from imagewright import limits
from imagewright.arrays import read_head, read_tensors
from imagewright.files import open_regular, parse_json
from imagewright.models.description import unbuilt
from imagewright.models.files import load_model
from imagewright.shapes import Within, misfit
from imagewright.types import UserError, kind_of

Images = npt.NDArray[np.uint8]
FORMAT = "imagewright/features/1"
ASSETS = Path(__file__).parent / "assets"
PICTURES = "pictures"
"""What an encoder's header says its classes are where each is a single picture, and no class of the set."""


class FeatureExtractor(Protocol):
    """Turns images into features for distances and logits for the Inception score.

    name:    part of every score's name (fd_<name>).        dim:    feature dimension d.
    sha256:  of the weight file; scores of different extractors do not compare.
    channels: of the pictures that it sees, 1 or 3.
    num_classes: 0 for one whose logits mean nothing. It may have a `note`: what to mind of its scores.
    """

    @property
    def name(self) -> str: ...

    @property
    def dim(self) -> int: ...

    @property
    def num_classes(self) -> int: ...

    @property
    def channels(self) -> int: ...

    @property
    def sha256(self) -> str: ...

    def __call__(self, images: Images) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """uint8 [n, H, W, C] -> features [n, d] and logits [n, k], float32."""
        ...


class ImageSource(Protocol):
    """The part of a data set that evaluation needs (`imagewright.data.ImageSet` has it).

    fingerprint: a checksum of the content; equal fingerprints mean equal images.
    """

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def images(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> Images:
        """uint8 [n, H, W, C] of the given images."""
        ...


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """A stack of stages: each halves the resolution (but the first) and applies two 3x3 convolutions.

    resolution, channels: what the network sees; images of another size are brought to it by `fit`.
    """

    resolution: int
    channels: int
    widths: tuple[int, ...]
    num_classes: int

    @property
    def dim(self) -> int:
        return self.widths[-1]


class _ConfigRecord(TypedDict):
    resolution: Annotated[int, Within(1, limits.SIDE)]
    channels: Annotated[int, Within(1, limits.SIDE)]
    widths: list[Annotated[int, Within(1, limits.WHOLE)]]
    num_classes: Annotated[int, Within(1, limits.CLASSES)]


class _Header(TypedDict):
    format: str
    name: str
    config: _ConfigRecord


class Classifier(nn.Module):
    """Convolutions, global average pooling (the features), a linear layer (the logits)."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        layers: list[nn.Module] = []
        before = config.channels
        for stage, width in enumerate(config.widths):
            if stage:
                layers.append(nn.AvgPool2d(2))
            for inner in (before, width):
                layers += [
                    nn.Conv2d(inner, width, 3, padding=1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.SiLU(),
                ]
            before = width
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(config.dim, config.num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: [N, C, R, R] in [-1, 1] -> features [N, dim], logits [N, num_classes]."""
        features = self.body(x).mean(dim=(2, 3))
        return features, self.head(features)


def fit(images: Images, resolution: int, channels: int) -> Tensor:
    """uint8 [n, H, H, C] -> float32 [n, channels, resolution, resolution] in [-1, 1].

    Larger images are averaged over boxes, smaller ones repeat their pixels (which averaging undoes exactly); where
    neither size divides the other they are interpolated (bilinear, antialiased). Grey images repeat their channel.
    Raises UserError on any other channel count.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != images.shape[2]:
        raise UserError(f"images must be uint8 [n, H, H, C], got {images.dtype} {list(images.shape)}")
    x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return fitted(x, resolution, channels)


def fitted(x: Tensor, resolution: int, channels: int) -> Tensor:
    """`fit` of images [n, C, H, H] that are numbers already; differentiable."""
    size, have = x.shape[2], x.shape[1]
    if have not in (1, channels):
        raise UserError(f"this extractor takes images of {channels} channel(s), got {have}")
    if size >= resolution and size % resolution == 0:
        x = nn.functional.avg_pool2d(x, size // resolution) if size > resolution else x
    elif resolution % size == 0:
        x = x.repeat_interleave(resolution // size, dim=2).repeat_interleave(resolution // size, dim=3)
    else:
        x = nn.functional.interpolate(
            x, size=(resolution, resolution), mode="bilinear", align_corners=False, antialias=True
        )
    return x.expand(-1, channels, -1, -1)


class ClassifierFeatures:
    """A trained `Classifier` behind the `FeatureExtractor` face; `header` is what its training recorded."""

    def __init__(self, path: Path, *, device: torch.device | str = "cpu", batch_size: int = 256) -> None:
        self.header, config, state = read_classifier(path)
        self.name: str = self.header["name"]
        self.dim = config.dim
        self.num_classes = 0 if self.header.get("target") == PICTURES else config.num_classes
        self.note = ""
        self.channels = config.channels
        self.sha256 = file_sha256(path)
        self._config, self._device, self._batch_size = config, torch.device(device), batch_size
        self.made_on = f"{self._device} {batch_size}"
        planned = unbuilt(lambda: Classifier(config), asdict(config), len(state)).state_dict()
        wrong = [
            k for k in {**planned, **state} if k not in planned or k not in state or planned[k].shape != state[k].shape
        ]
        if wrong:
            raise UserError(
                f"{path} does not fit its own description: {len(wrong)} entries differ, such as {min(wrong)}"
            )
        self.network = Classifier(config)
        self.network.load_state_dict(state)
        self.network.requires_grad_(False).eval().to(self._device)

    def __call__(self, images: Images) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        features = np.empty((len(images), self.dim), dtype=np.float32)
        logits = np.empty((len(images), self._config.num_classes), dtype=np.float32)
        for start in range(0, len(images), self._batch_size):
            rows = slice(start, start + self._batch_size)
            x = fit(images[rows], self._config.resolution, self._config.channels).to(self._device)
            with torch.inference_mode():
                f, z = self.network(x)
            features[rows], logits[rows] = f.cpu().numpy(), z.cpu().numpy()
        return features, logits


class EncoderFeatures:
    """A model of kind encoder, such as a classifier's run, behind the `FeatureExtractor` face; named as its folder.

    Raises UserError for a model of another kind.
    """

    def __init__(self, folder: Path, *, device: torch.device | str = "cpu", batch_size: int = 256) -> None:
        file = load_model(folder)
        kind = kind_of(file.model)
        if kind != "encoder":
            raise UserError(f"features {folder} is a {kind.replace('_', ' ')}, which turns no images into features")
        self.name, self.sha256, self.note = folder.resolve().name, str(file.weights_sha256), ""
        self.channels, self.side = file.spec.channels, file.spec.resolution
        self._device, self._batch_size = torch.device(device), batch_size
        self.made_on = f"{self._device} {batch_size}"
        self.network: Any = file.model.requires_grad_(False).eval().to(self._device)
        features, logits = self(np.zeros((1, self.side, self.side, self.channels), np.uint8))
        self.dim, self.num_classes = features.shape[1], logits.shape[1]

    def __call__(self, images: Images) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        found: list[tuple[Tensor, Tensor]] = []
        for start in range(0, len(images), self._batch_size):
            x = fit(images[start : start + self._batch_size], self.side, self.channels).to(self._device)
            with torch.inference_mode():
                features = self.network.features(x)
                logits = self.network.logits(x) if hasattr(self.network, "logits") else features[:, :0]
            found.append((features.cpu(), logits.cpu()))
        return torch.cat([f for f, _ in found]).numpy(), torch.cat([z for _, z in found]).numpy()


def digits_features(device: torch.device | str = "cpu") -> ClassifierFeatures:
    """The shipped classifier of 8x8 handwritten digits, 10 classes."""
    return ClassifierFeatures(ASSETS / "digits.safetensors", device=device)


def emoji_features(device: torch.device | str = "cpu") -> ClassifierFeatures:
    """The shipped classifier of emoji pictures into Unicode subgroups, seen at 32x32 RGB."""
    return ClassifierFeatures(ASSETS / "emoji.safetensors", device=device)


def read_classifier(path: Path) -> tuple[dict[str, Any], ClassifierConfig, dict[str, Tensor]]:
    """Header, configuration and weights of a classifier file; raises UserError when it is none."""
    header: dict[str, Any] = parse_json(read_head(path).texts.get("imagewright", "{}"), f"{path}: its header", dict)
    state = read_tensors(path)
    if header.get("format") != FORMAT:
        raise UserError(f"{path} is no feature classifier: its header must say format {FORMAT!r}")
    fault = misfit(header, _Header)
    if fault is not None:
        raise UserError(f"{path}: its header is damaged: {fault}")
    known = {f.name for f in fields(ClassifierConfig)}
    config = {key: value for key, value in header["config"].items() if key in known}
    return dict(header), ClassifierConfig(**{**config, "widths": tuple(config["widths"])}), state


def classifier_header(name: str, config: ClassifierConfig, **more: Any) -> dict[str, str]:
    """The safetensors metadata that `read_classifier` understands."""
    header = {"format": FORMAT, "name": name, "config": asdict(config), **more}
    return {"imagewright": json.dumps(header, sort_keys=True)}


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def in_batches(source: ImageSource, batch_size: int = 256) -> Iterator[Images]:
    """All images of a source in order."""
    for start in range(0, len(source), batch_size):
        yield source.images(np.arange(start, min(start + batch_size, len(source))))
