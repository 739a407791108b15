"""`standin_triplets`: clips of video, sound and captions made of labelled pictures, for HowTo100M and AudioSet.

Video      a picture under a smooth random pan, zoom and rotation, each a sine of half a period to one and a half.
Sound      a quarter of a second: a chord of three partials, which the class says, their phases random and each detuned
           by up to 1%; as loud as the motion is fast; pink noise at 10 dB below.
Captions   five, of which one to three name the class and the others say nothing; a fifth of the clips has no text.
All of a clip is a function of (seed, its index), whatever is read with it. What it does not show: errors of speech
recognition, and that real sounds mean something.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from imagewright.checks import require_whole
from imagewright.data.clips import ClipSet, ClipShape, Read, Rows
from imagewright.data.image_set import ImageSet
from imagewright.data.opening import open_images
from imagewright.data.source import DataSource
from imagewright.data.words import WordList, words_of
from imagewright.types import DataSpec, UserError

SECONDS, RATE = 0.256, 8000
"""Of a clip; samples a second: 2048 of them."""
CAPTIONS, WORDS, NAMED = 5, 8, (1, 3)
"""Of a clip; of a caption with its end; least and most of the captions that name the class."""
WITHOUT_TEXT = 0.2
AMPLITUDES = (0.3, 0.3, 0.25, 0.5)
"""Of panning across and down (in half widths of the picture), of zoom (in e-folds), of rotation (in radians)."""
DETUNED, NOISE_DB = 0.01, 10.0
KNOTS = np.linspace(0, 1, 129)
"""Moments between which the loudness is straight."""
LOWEST, SEMITONES = 220.0, 32
"""Of the partials: the lowest in Hz, and how many steps above it there may be."""
NAMING = ("this is a {}", "here you see the {}", "a {} again", "we look at one {}", "now the {} moves")
FILLER = (
    "look at this", "and now we go on", "as you can see", "let me show you", "that is very nice", "we are almost there",
    "so what comes next", "wait a moment please",
)  # fmt: skip
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SETS = ("digits", "emoji64")
SPLITS = {"train": 0, "val": 1, "test": 2, "all": 3}


@dataclass(frozen=True, kw_only=True)
class StandinTripletsConfig(DataSource):
    """Clips made of the pictures of a set."""

    source: str = "digits"
    """Whose pictures: digits or emoji64."""
    split: str = "train"
    resolution: int = 32
    """Pixels of a frame's side."""
    frames: int = 8
    samples: int = 2048
    """Of the sound; with fewer of either, time is cut more coarsely."""
    variants: int = 4
    """Clips that are made of each picture."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.source not in SETS:
            raise UserError(f"data.source is {self.source!r}; stand-ins are made of {' or '.join(SETS)}")
        for name, most in (("resolution", 1024), ("frames", 256), ("samples", 1 << 16), ("variants", 1 << 16)):
            require_whole(f"data.{name}", getattr(self, name), 1, most)
        require_whole("data.seed", self.seed, 0)

    def open(self, on_progress: Callable[[int, int], None] | None = None) -> ClipSet:
        pictures = open_images(self.source, split=self.split, on_progress=on_progress)  # type: ignore[arg-type]
        made = StandinTriplets(pictures, self)
        shape = ClipShape(frames=self.frames, samples=self.samples, captions=CAPTIONS, words=WORDS)
        return ClipSet(origin=made, shape=shape, vocabulary=made.vocabulary)

    def of_split(self, split: str) -> StandinTripletsConfig:
        """The same of other pictures."""
        return replace(self, split=split)


@dataclass(frozen=True, eq=False)
class StandinTriplets:
    """Clips of pictures, each made when it is read. Clip i shows picture i modulo their number."""

    pictures: ImageSet
    config: StandinTripletsConfig
    names: tuple[str, ...] = field(init=False)
    vocabulary: WordList = field(init=False)
    in_memory: ClassVar[bool] = True

    def __post_init__(self) -> None:
        spec = self.pictures.spec
        names = DIGITS if self.config.source == "digits" else tuple(" ".join(words_of(n)) for n in spec.class_names)
        said = [*FILLER, *(text.format(name) for text in NAMING for name in names)]
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "vocabulary", WordList.of(said))

    @property
    def spec(self) -> DataSpec:
        spec = self.pictures.spec
        return DataSpec(
            name=f"standin_{self.config.source}", resolution=self.config.resolution, channels=spec.channels,
            num_classes=spec.num_classes, class_names=self.names,
        )  # fmt: skip

    @property
    def source(self) -> str:
        return f"standin_triplets of {self.pictures.source}"

    @property
    def fingerprint(self) -> str:
        told = f"standin_triplets/1 {self.pictures.fingerprint} {self.config}"
        return hashlib.sha256(told.encode()).hexdigest()

    @property
    def labels(self) -> Rows:
        return np.tile(self.pictures.labels, self.config.variants)

    def __len__(self) -> int:
        return len(self.pictures) * self.config.variants

    def read(self, rows: Rows, shape: ClipShape) -> Read:
        rngs = [self._random(int(row), 0) for row in rows]
        motions = [Motion.drawn(rng) for rng in rngs]
        pictures = self.pictures.images(rows % len(self.pictures))
        labels = self.pictures.labels[rows % len(self.pictures)]
        video = filmed(pictures, motions, shape.frames, self.config.resolution)
        audio = np.stack(
            [sound(int(k), motion, shape.samples, rng) for k, motion, rng in zip(labels, motions, rngs, strict=True)]
        )
        texts = [self.said(int(row)) for row in rows]
        return Read(video, audio, texts, labels)

    def said(self, row: int) -> tuple[str, ...]:
        """The captions of a clip; () = it has none."""
        rng = self._random(row, 1)
        if rng.random() < WITHOUT_TEXT:
            return ()
        name = self.names[self.pictures.labels[row % len(self.pictures)]]
        count = int(rng.integers(NAMED[0], NAMED[1] + 1))
        naming = [NAMING[i].format(name) for i in rng.choice(len(NAMING), count, replace=False)]
        filler = [FILLER[i] for i in rng.choice(len(FILLER), CAPTIONS - count, replace=False)]
        captions = [*naming, *filler]
        return tuple(captions[i] for i in rng.permutation(CAPTIONS))

    def query(self, row: int) -> str | None:
        """The first caption that names the class."""
        name = set(words_of(self.names[self.pictures.labels[row % len(self.pictures)]]))
        return next((text for text in self.said(row) if name <= set(words_of(text))), None)

    def _random(self, row: int, stream: int) -> np.random.Generator:
        key = (self.config.seed, row, SPLITS[self.config.split], stream)
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


@dataclass(frozen=True)
class Motion:
    """Pan across and down, zoom and rotation over a clip's time in [0, 1]: sines a sin(2 pi f t + phase), [4] each."""

    frequency: npt.NDArray[np.float64]
    phase: npt.NDArray[np.float64]

    @classmethod
    def drawn(cls, rng: np.random.Generator) -> Motion:
        return cls(rng.uniform(0.5, 1.5, 4), rng.uniform(0, 2 * math.pi, 4))

    def at(self, time: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """[T, 4]."""
        return np.array(AMPLITUDES) * np.sin(2 * math.pi * time[:, None] * self.frequency + self.phase)

    def speed(self, time: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """[T]: of all four together, each in units of its amplitude; the clip's fastest is 1."""
        turns = 2 * math.pi * self.frequency
        speed: npt.NDArray[np.float64] = np.linalg.norm(turns * np.cos(turns * time[:, None] + self.phase), axis=1)
        speed /= speed.max()
        return speed


def filmed(pictures: npt.NDArray[np.uint8], motions: list[Motion], frames: int, side: int) -> npt.NDArray[np.uint8]:
    """uint8 [n, H, H, C] -> [n, frames, side, side, C]; beyond a picture's edge its last pixels go on."""
    time = (np.arange(frames) + 0.5) / frames
    moved = np.stack([motion.at(time) for motion in motions])
    (x, y, zoom, angle) = np.moveaxis(moved.reshape(-1, 4), 1, 0)
    c, s = np.exp(zoom) * np.cos(angle), np.exp(zoom) * np.sin(angle)
    theta = torch.from_numpy(np.stack([np.stack([c, -s, x], 1), np.stack([s, c, y], 1)], 1)).float()
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float().repeat_interleave(frames, 0)
    grid = F.affine_grid(theta, [len(theta), images.shape[1], side, side], align_corners=False)
    seen = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    film: npt.NDArray[np.uint8] = (seen + 0.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return film.reshape(len(pictures), frames, side, side, -1)


@lru_cache
def chord(label: int) -> npt.NDArray[np.float64]:
    """The partials of a class, in Hz, [3]."""
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((3, label))))
    partials: npt.NDArray[np.float64] = LOWEST * 2 ** (np.sort(rng.choice(SEMITONES, 3, replace=False)) / 12)
    return partials


def sound(label: int, motion: Motion, samples: int, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """A clip's sound, float32 [samples], whose loudest moment is 1."""
    time = (np.arange(samples) + 0.5) / samples
    partials = chord(label) * (1 + DETUNED * rng.uniform(-1, 1, 3))
    loudness = np.interp(time, KNOTS, motion.speed(KNOTS))
    waves = np.sin(2 * math.pi * (SECONDS * partials[:, None] * time + rng.random(3)[:, None])).sum(0) * loudness
    noise = pink(samples, rng)
    heard = waves + noise * np.sqrt((waves**2).mean() / (noise**2).mean() / 10 ** (NOISE_DB / 10))
    out: npt.NDArray[np.float32] = (heard / np.abs(heard).max()).astype(np.float32)
    return out


def pink(samples: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Noise whose power falls as one over the frequency."""
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    return np.fft.irfft(spectrum / np.sqrt(np.maximum(np.arange(len(spectrum)), 1)), samples)
