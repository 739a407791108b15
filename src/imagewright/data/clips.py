"""Clips: short videos with the sound that goes with them and captions, as batches and as what a run learns from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from imagewright.data.words import PAD, Vocabulary, encoded
from imagewright.types import Chance, DataSpec, Example

Rows = npt.NDArray[np.int64]
KEPT = 1 << 16
"""Captions whose tokens are kept."""


@dataclass(frozen=True)
class Clips(Example):
    """Clips of video with sound and captions: what a batch of N of them is.

    video: [N, C, F, H, W] in [-1, 1]. audio: [N, samples] in [-1, 1], zeros = silent. captions: int64 [N, K, L], words
    of which there are no others than padding where a clip has no text. label: int64 [N], its class, -1 = none.
    """

    video: Tensor
    audio: Tensor
    captions: Tensor
    label: Tensor

    @property
    def heard(self) -> Tensor:
        """Which clips have a sound, float32 [N]."""
        return (self.audio != 0).any(1).float()

    @property
    def told(self) -> Tensor:
        """Which clips have a text, float32 [N]."""
        return (self.captions != PAD).flatten(1).any(1).float()


@dataclass(frozen=True, kw_only=True)
class ClipShape:
    """Sizes of every clip of a set: frames of video, samples of sound, captions, and words of each."""

    frames: int
    samples: int
    captions: int
    words: int


@dataclass(frozen=True)
class Read:
    """Clips as a set reads them: video uint8 [n, F, H, W, C], audio float32 [n, samples], texts and labels [n]."""

    video: npt.NDArray[np.uint8]
    audio: npt.NDArray[np.float32]
    texts: list[tuple[str, ...]]
    labels: Rows


class Source(Protocol):
    """Where clips come from. The first properties are those of `types.Examples`; labels: int64 [N], -1 = no class."""

    @property
    def spec(self) -> DataSpec: ...

    @property
    def source(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def in_memory(self) -> bool: ...

    @property
    def labels(self) -> Rows: ...

    def __len__(self) -> int: ...

    def read(self, rows: Rows, shape: ClipShape) -> Read: ...

    def query(self, row: int) -> str | None:
        """The caption by which a clip is searched; None = it has no text."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class ClipSet:
    """Clips of one shape whose words are told by a vocabulary: what a run learns from (`types.Examples`)."""

    origin: Source
    shape: ClipShape
    vocabulary: Vocabulary
    _encoded: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    example: ClassVar[type[Example]] = Clips

    @property
    def spec(self) -> DataSpec:
        return self.origin.spec

    @property
    def source(self) -> str:
        return self.origin.source

    @property
    def fingerprint(self) -> str:
        return self.origin.fingerprint

    @property
    def in_memory(self) -> bool:
        return self.origin.in_memory

    @property
    def empty_classes(self) -> tuple[int, ...]:
        return ()

    @property
    def offers(self) -> Mapping[str, Any]:
        """What a method may ask for by name (`training.experiment`)."""
        return {"vocabulary": self.vocabulary, "shape": self.shape}

    @property
    def labels(self) -> Rows:
        return self.origin.labels

    def __len__(self) -> int:
        return len(self.origin)

    def read(self, rows: Rows) -> Read:
        return self.origin.read(rows, self.shape)

    def batch(self, read: Read, rows: Rows, chance: Chance | None = None) -> Clips:
        """Video as bytes, [N, F, H, W, C]."""
        return Clips(
            torch.from_numpy(read.video),
            torch.from_numpy(read.audio),
            torch.stack([self.words(texts) for texts in read.texts]),
            torch.from_numpy(read.labels),
        )

    def prepared(self, batch: Clips) -> Clips:
        """The video as methods are given it."""
        return replace(batch, video=batch.video.movedim(-1, 1).float() / 127.5 - 1)

    def at(self, rows: Rows) -> Clips:
        """Clips by index, prepared."""
        return self.prepared(self.batch(self.read(rows), rows))

    def words(self, texts: tuple[str, ...]) -> Tensor:
        """Captions of one clip as int64 [K, L]: the first ones, or all again until there are K; padding for none."""
        count = self.shape.captions
        if not texts:
            return torch.full((count, self.shape.words), PAD)
        return torch.cat([self.caption(texts[i % len(texts)]) for i in range(count)])

    def caption(self, text: str) -> Tensor:
        """One caption as int64 [1, L]."""
        if len(self._encoded) > KEPT:
            self._encoded.clear()
        if text not in self._encoded:
            self._encoded[text] = encoded(self.vocabulary, [text], self.shape.words)
        return self._encoded[text]
