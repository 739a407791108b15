"""Feature extractors, what a distance compares images by: any encoder, and two small classifiers of ours.

The classifiers `digits` and `emoji` ship with the package (assets/*.safetensors, made by `train_features`);
distances in their features are called fd_digits and fd_emoji. They are not FID, whose extractor is
`inception`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NotRequired, Protocol, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from imagewright import limits
from imagewright.arrays import read_head, read_tensors
from imagewright.errors import an
from imagewright.files import open_regular, parse_json
from imagewright.models.classifier import Classifier
from imagewright.models.description import unbuilt
from imagewright.models.files import load_model
from imagewright.networks import ConvClassifier, ConvClassifierConfig
from imagewright.precision import tf32
from imagewright.shapes import Within, misfit
from imagewright.types import Encoding, UserError, View, kind_of

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
    num_classes: 0 for one whose logits mean nothing. It may have a `note`: what to mind of its scores; and a
    `group_of`: of each of its classes the class of the data, where its own are finer.
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


class _ConfigRecord(TypedDict):
    resolution: Annotated[int, Within(1, limits.SIDE)]
    channels: Annotated[int, Within(1, limits.SIDE)]
    widths: list[Annotated[int, Within(1, limits.WHOLE)]]
    num_classes: Annotated[int, Within(1, limits.CLASSES)]


class _Header(TypedDict):
    format: str
    name: str
    config: _ConfigRecord
    group_of: NotRequired[list[Annotated[int, Within(0, limits.CLASSES)]]]


class EncoderFeatures:
    """An encoder (`types.Encoder`) behind the `FeatureExtractor` face.

    name: of its scores, fd_<name>. num_classes: None = of its logits. dtype: what it computes in.
    """

    def __init__(
        self,
        encoder: Any,
        *,
        name: str,
        sha256: str,
        num_classes: int | None = None,
        note: str = "",
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 256,
    ) -> None:
        self.encoder: Any = encoder.requires_grad_(False).eval().to(device, dtype)
        self.name, self.sha256, self.note = name, sha256, note
        self.view: View = encoder.view
        self.channels = self.view.channels
        self._device, self._dtype, self._batch_size = torch.device(device), dtype, batch_size
        self.made_on = (
            f"{self._device} {batch_size}" if dtype == torch.float32 else f"{self._device} {dtype} {batch_size}"
        )
        side = self.view.side
        features, logits = self(np.zeros((1, side, side, self.channels), np.uint8))
        if not (np.isfinite(features).all() and np.isfinite(logits).all()):
            raise UserError(f"the encoder {name} finds numbers that are not finite in a black picture; it is damaged")
        self.dim = features.shape[1]
        self.num_classes = logits.shape[1] if num_classes is None else num_classes

    def __call__(self, images: Images) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != images.shape[2]:
            raise UserError(f"images must be uint8 [n, H, H, C], got {images.dtype} {list(images.shape)}")
        found: list[tuple[Tensor, Tensor]] = []
        for start in range(0, len(images), self._batch_size):
            with torch.inference_mode(), tf32(False):
                made = self.encoded(images[start : start + self._batch_size])
            logits = made.pooled[:, :0] if made.logits is None else made.logits
            found.append((made.pooled.float().cpu(), logits.float().cpu()))
        return torch.cat([f for f, _ in found]).numpy(), torch.cat([z for _, z in found]).numpy()

    def encoded(self, images: Images) -> Encoding:
        """Of one batch."""
        x = torch.from_numpy(np.ascontiguousarray(images)).to(self._device).permute(0, 3, 1, 2).to(self._dtype)
        made: Encoding = self.encoder.encode(x / 127.5 - 1)
        return made


class ClassifierFeatures(EncoderFeatures):
    """A file that `imagewright data encoder` or `train_features` wrote; `header` is what its training recorded.

    group_of: of each class that it names the class of the data set, where it names finer ones.
    """

    def __init__(self, path: Path, *, device: torch.device | str = "cpu", batch_size: int = 256) -> None:
        self.header, config, state = read_classifier(path)
        planned = unbuilt(lambda: ConvClassifier(config), asdict(config), len(state)).state_dict()
        wrong = [
            k for k in {**planned, **state} if k not in planned or k not in state or planned[k].shape != state[k].shape
        ]
        if wrong:
            raise UserError(
                f"{path} does not fit its own description: {len(wrong)} entries differ, such as {min(wrong)}"
            )
        network = ConvClassifier(config)
        network.load_state_dict(state)
        self.group_of: list[int] | None = self.header.get("group_of")
        super().__init__(
            Classifier(network, std=(0.5,)),
            name=self.header["name"],
            sha256=file_sha256(path),
            num_classes=0 if self.header.get("target") == PICTURES else None,
            device=device,
            batch_size=batch_size,
        )


def model_features(folder: Path, *, device: torch.device | str = "cpu") -> EncoderFeatures:
    """A model of kind encoder, such as a classifier's run, named as its folder. Raises UserError for another kind."""
    file = load_model(folder)
    kind = kind_of(file.model)
    if kind != "encoder":
        raise UserError(f"features {folder} is {an(kind.replace('_', ' '))}, which turns no images into features")
    return EncoderFeatures(file.model, name=folder.resolve().name, sha256=str(file.weights_sha256), device=device)


def digits_features(device: torch.device | str = "cpu") -> ClassifierFeatures:
    """The shipped classifier of 8x8 handwritten digits, 10 classes."""
    return ClassifierFeatures(ASSETS / "digits.safetensors", device=device)


def emoji_features(device: torch.device | str = "cpu") -> ClassifierFeatures:
    """The shipped classifier of emoji pictures into Unicode subgroups, seen at 32x32 RGB."""
    return ClassifierFeatures(ASSETS / "emoji.safetensors", device=device)


def read_classifier(path: Path) -> tuple[dict[str, Any], ConvClassifierConfig, dict[str, Tensor]]:
    """Header, configuration and weights of a classifier file; raises UserError when it is none."""
    header: dict[str, Any] = parse_json(read_head(path).texts.get("imagewright", "{}"), f"{path}: its header", dict)
    state = read_tensors(path)
    if header.get("format") != FORMAT:
        raise UserError(f"{path} is no feature classifier: its header must say format {FORMAT!r}")
    fault = misfit(header, _Header)
    if fault is not None:
        raise UserError(f"{path}: its header is damaged: {fault}")
    told: _ConfigRecord = header["config"]
    config = ConvClassifierConfig(
        img_resolution=told["resolution"],
        in_channels=told["channels"],
        widths=tuple(told["widths"]),
        num_classes=told["num_classes"],
    )
    return dict(header), config, state


def classifier_header(name: str, config: ConvClassifierConfig, **more: Any) -> dict[str, str]:
    """The safetensors metadata that `read_classifier` understands."""
    told: _ConfigRecord = {
        "resolution": config.img_resolution,
        "channels": config.in_channels,
        "widths": list(config.widths),
        "num_classes": config.num_classes,
    }
    header = {"format": FORMAT, "name": name, "config": told, **more}
    return {"imagewright": json.dumps(header, sort_keys=True)}


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def in_batches(source: ImageSource, batch_size: int = 256) -> Iterator[Images]:
    """All images of a source in order."""
    for start in range(0, len(source), batch_size):
        yield source.images(np.arange(start, min(start + batch_size, len(source))))
