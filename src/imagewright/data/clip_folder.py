"""Clips in a folder or a zip: pictures of a video, its sound and its captions, one folder for each video.

    CLASS/VIDEO/0001.jpg ...    frames in the order of their names, `file_fps` a second; CLASS may be left out
    CLASS/VIDEO/sound.wav       PCM of any rate, as long as the frames; silent where there is none
    CLASS/VIDEO/captions.txt    UTF-8, a caption a line: seconds, a tab, words; or words alone; none without it

A video is cut into windows of `frames` at `fps`, one after the other; each is a clip, with the captions that lie
nearest to its middle in time. Folders at the top that are called train, val or test are splits; otherwise a tenth of
the videos is the test split, by a hash of their names.
Departs  The released program (data/processing.py) begins a window anywhere, at random. Where a clip has fewer captions
         than are asked for, the first ones come again (there: empty ones).
"""

from __future__ import annotations

import hashlib
import io
import math
import wave
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from imagewright.checks import require_number, require_whole
from imagewright.data.annotations import SPLITS
from imagewright.data.archive import Archive, open_archive, readable_name
from imagewright.data.clips import ClipSet, ClipShape, Read, Rows
from imagewright.data.fitting import Fitting
from imagewright.data.image_set import held_out
from imagewright.data.pixels import BadPicture, with_channels
from imagewright.data.reading import decoded, mapped
from imagewright.data.source import DataSource
from imagewright.data.words import WordList, vocabulary
from imagewright.types import DataSpec, UserError

SOUND, CAPTIONS = "sound.wav", "captions.txt"
WORDS = 65_536 - 4
"""Most words of a vocabulary that is made of the captions, so that with its marks it has the published size."""
RATES, SPEEDS = (1, 768_000), (1e-3, 1e3)
"""Least and most samples a second of a sound, and pictures a second."""


@dataclass(frozen=True, kw_only=True)
class ClipFolderConfig(DataSource):
    """Clips of the videos in a folder."""

    source: str
    """A folder or a zip."""
    split: str = "train"
    resolution: int = 224
    """Pixels of a frame's side: the square in the middle, reduced to it."""
    channels: int = 3
    frames: int = 32
    fps: float = 10.0
    """Frames a second of a clip."""
    file_fps: float = 10.0
    """Pictures a second in the folder; others than those of `fps` are left out."""
    samples: int = 153_600
    """Of the sound of a clip."""
    sample_rate: int = 48_000
    """Samples a second to which sounds are brought."""
    captions: int = 5
    words: int = 16
    """Of a caption; more are cut off."""
    vocabulary: str | None = None
    """"bytes", or a tokenizer's file; None = the words of the captions, the most frequent ones."""

    def __post_init__(self) -> None:
        for name in ("resolution", "frames", "samples", "captions"):
            require_whole(f"data.{name}", getattr(self, name), 1, 1 << 24)
        require_whole("data.sample_rate", self.sample_rate, *RATES)
        require_whole("data.words", self.words, 2, 1 << 12)
        if self.channels not in (1, 3):
            raise UserError(f"data.channels is {self.channels!r}; it must be 1 or 3")
        for name in ("fps", "file_fps"):
            require_number(f"data.{name}", getattr(self, name), *SPEEDS)
        if self.split not in ("train", "val", "test", "all"):
            raise UserError(f"data.split is {self.split!r}; allowed: train, val, test, all")

    @property
    def shape(self) -> ClipShape:
        return ClipShape(frames=self.frames, samples=self.samples, captions=self.captions, words=self.words)

    def open(self, on_progress: Callable[[int, int], None] | None = None) -> ClipSet:
        """Raises UserError for a folder that is not there, too short videos, and damaged sounds or captions; and for
        videos to learn from of which none has either."""
        clips = ClipFolder.opened(self, on_progress)
        if self.split == "train" and not any(video.sounds or video.captions for video in clips.videos):
            raise UserError(f"{self.source} has no {SOUND} and no {CAPTIONS} beside any video; nothing could be learnt")
        words = vocabulary(self.vocabulary) if self.vocabulary else WordList.of(clips.texts(), WORDS)
        return ClipSet(origin=clips, shape=self.shape, vocabulary=words)

    def of_split(self, split: str) -> ClipFolderConfig:
        """The same of other videos."""
        return replace(self, split=split)

    def absent(self) -> ClipSet | None:
        """No clips, of the same sizes, for a dry run, where the folder is not there."""
        if Path(self.source).exists():
            return None
        spec = DataSpec(name=Path(self.source).stem, resolution=self.resolution, channels=self.channels)
        words = vocabulary(self.vocabulary) if self.vocabulary else WordList(tuple(map(str, range(WORDS))))
        empty = Archive(
            path=Path(self.source), pictures=(), others=frozenset(), folders=frozenset(), bad=(), read=_unread
        )
        nothing = ClipFolder(self, empty, (), spec)
        return ClipSet(origin=nothing, shape=self.shape, vocabulary=words)


@dataclass(frozen=True)
class Video:
    """One video: its pictures' names, its captions with their moments (nan = not told), whether it has a sound."""

    name: str
    pictures: tuple[str, ...]
    captions: tuple[tuple[float, str], ...]
    sounds: bool
    label: int

    def nearest(self, moment: float, count: int) -> tuple[str, ...]:
        """The captions nearest to a moment in seconds, in that order; those without one in the order of the file."""
        far = sorted(self.captions, key=lambda said: 0 if math.isnan(said[0]) else abs(said[0] - moment))
        return tuple(text for _, text in far[:count])


@dataclass(frozen=True, eq=False)
class ClipFolder:
    """Windows of the videos of a folder or zip."""

    config: ClipFolderConfig
    archive: Archive
    videos: tuple[Video, ...]
    spec: DataSpec
    fingerprint: str = ""
    in_memory: ClassVar[bool] = False

    @classmethod
    def opened(cls, config: ClipFolderConfig, on_progress: Callable[[int, int], None] | None = None) -> ClipFolder:
        """Raises UserError as `ClipFolderConfig.open`."""
        archive = open_archive(Path(config.source))
        for name, reason in archive.bad:  # left out, it would shift all pictures after it
            raise UserError(f"{config.source}/{name} is no usable picture: {reason}")
        folders: dict[str, list[str]] = defaultdict(list)
        for name in archive.pictures:
            folders[name.rpartition("/")[0]].append(name)
        if not folders or "" in folders:
            raise UserError(f"{config.source} must hold a folder of pictures for each video")
        splits = all(name.split("/")[0].lower() in SPLITS and "/" in name for name in folders)
        chosen = {name: pictures for name, pictures in folders.items() if _is_of(name, config.split, splits)}
        if not chosen:
            raise UserError(f"{config.source} has no video in its split {config.split}")
        classes = sorted({kind for name in folders if (kind := _class_of(name, splits)) is not None})
        digest, videos = hashlib.sha256(str(config.shape).encode()), []
        for done, (name, pictures) in enumerate(chosen.items()):
            kind = _class_of(name, splits)
            label = -1 if kind is None else classes.index(kind)
            video = _video(archive, name, tuple(pictures), label, digest)
            if len(pictures) < _span(config):
                raise UserError(
                    f"{config.source}/{name} has {len(pictures)} pictures; a clip of data.frames {config.frames} takes "
                    f"{_span(config)}"
                )
            videos.append(video)
            if on_progress is not None:
                on_progress(done + 1, len(chosen))
        spec = DataSpec(
            name=Path(config.source).stem, resolution=config.resolution, channels=config.channels,
            num_classes=len(classes), class_names=tuple(classes),
        )  # fmt: skip
        return cls(config, archive, tuple(videos), spec, digest.hexdigest())

    @property
    def source(self) -> str:
        return str(self.archive.path)

    @cached_property
    def windows(self) -> tuple[tuple[int, int], ...]:
        """(video, its picture where the clip begins) of every clip."""
        span = _span(self.config)
        return tuple(
            (i, k * span) for i, video in enumerate(self.videos) for k in range(len(video.pictures) // span)
        )  # fmt: skip

    @property
    def labels(self) -> Rows:
        return np.array([self.videos[i].label for i, _ in self.windows], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.windows)

    def texts(self) -> list[str]:
        """All captions."""
        return [text for video in self.videos for _, text in video.captions]

    def read(self, rows: Rows, shape: ClipShape) -> Read:
        clips = mapped(self._clip, [int(row) for row in rows])
        texts = [self._said(int(row), shape.captions) for row in rows]
        return Read(np.stack([v for v, _ in clips]), np.stack([a for _, a in clips]), texts, self.labels[rows])

    def query(self, row: int) -> str | None:
        """The caption nearest to the clip's middle."""
        return next(iter(self._said(row, 1)), None)

    def _said(self, row: int, count: int) -> tuple[str, ...]:
        (i, start), c = self.windows[row], self.config
        return self.videos[i].nearest(start / c.file_fps + c.frames / c.fps / 2, count)

    def _clip(self, row: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
        (i, start), c = self.windows[row], self.config
        video = self.videos[i]
        fit = Fitting(c.resolution, c.channels, fit="crop", filter="bicubic")
        frames = []
        for k in range(c.frames):
            name = video.pictures[start + math.floor(k * c.file_fps / c.fps)]
            try:
                frames.append(with_channels(decoded(self.archive, name, fit)[1], c.channels))
            except BadPicture as finding:
                raise UserError(f"{self.archive.path}/{name} is no usable picture: {finding}") from None
        audio = np.zeros(c.samples, np.float32)
        if video.sounds:
            heard = sound(self.archive, f"{video.name}/{SOUND}", start / c.file_fps, c.samples, c.sample_rate)
            audio[: len(heard)] = heard
        return np.stack(frames), audio


def _span(config: ClipFolderConfig) -> int:
    """Pictures in the folder that a clip lasts."""
    return max(math.ceil(config.frames * config.file_fps / config.fps), 1)


def _is_of(name: str, split: str, splits: bool) -> bool:
    own = SPLITS[name.split("/")[0].lower()] if splits else "test" if held_out(readable_name(name)) else "train"
    return split in ("all", own)


def _class_of(name: str, splits: bool) -> str | None:
    parts = name.split("/")[1 if splits else 0 :]
    return readable_name(parts[0]) if len(parts) > 1 else None


def _video(archive: Archive, name: str, pictures: tuple[str, ...], label: int, digest: Any) -> Video:
    """Raises UserError for a damaged sound, or captions that are no text."""
    sounds, texts = f"{name}/{SOUND}", f"{name}/{CAPTIONS}"
    captions: tuple[tuple[float, str], ...] = ()
    digest.update("\n".join(map(readable_name, pictures)).encode())
    if sounds in archive.others:
        content = _read(archive, sounds)
        _opened(content, f"{archive.path}/{sounds}").close()
        digest.update(content)
    if texts in archive.others:
        content = _read(archive, texts)
        digest.update(content)
        try:
            told = map(_caption, content.decode("utf-8-sig").splitlines())
            captions = tuple((moment, text) for moment, text in told if text)
        except UnicodeDecodeError as error:
            raise UserError(f"{archive.path}/{texts} is no UTF-8 text: {error.reason}") from None
    return Video(name, pictures, captions, sounds in archive.others, label)


def _caption(line: str) -> tuple[float, str]:
    moment, tab, text = line.partition("\t")
    try:
        return (float(moment), text.strip()) if tab else (math.nan, line.strip())
    except ValueError:
        return math.nan, line.strip()


def _read(archive: Archive, name: str) -> bytes:
    try:
        return archive.read(name)
    except BadPicture as finding:
        raise UserError(f"{archive.path}/{name} cannot be read: {finding}") from None


def _opened(content: bytes, where: str) -> wave.Wave_read:
    try:
        file: wave.Wave_read = wave.open(io.BytesIO(content))  # noqa: SIM115, the caller closes it
    except (wave.Error, EOFError) as error:
        raise UserError(f"{where} is no PCM wav file: {str(error) or 'it ends too soon'}") from None
    if file.getsampwidth() > 4 or not RATES[0] <= file.getframerate() <= RATES[1]:
        raise UserError(f"{where} is no PCM wav file of 8 to 32 bits and at most {RATES[1]} samples a second")
    return file


def sound(archive: Archive, name: str, start: float, samples: int, rate: int) -> npt.NDArray[np.float32]:
    """Part of a wav file from a moment in seconds on, mean of its channels, in [-1, 1]: at most so many samples.

    Brought to the rate by a polyphase filter. Raises UserError for a damaged file.
    """
    from scipy.signal import resample_poly

    where = f"{archive.path}/{name}"
    with _opened(_read(archive, name), where) as file:
        own, width, channels = file.getframerate(), file.getsampwidth(), file.getnchannels()
        first = min(round(start * own), file.getnframes())
        file.setpos(first)
        content = file.readframes(math.ceil(samples * own / rate))
    if len(content) % (width * channels):
        raise UserError(f"{where} ends within a sample")
    heard = _values(content, width).reshape(-1, channels).mean(1)
    common = math.gcd(own, rate)
    if own != rate and len(heard):
        heard = resample_poly(heard, rate // common, own // common)
    out: npt.NDArray[np.float32] = heard[:samples].clip(-1, 1).astype(np.float32)
    return out


def _values(content: bytes, width: int) -> npt.NDArray[np.float64]:
    """Samples in [-1, 1] of so many bytes each, the first byte the least; of one byte they are unsigned."""
    raw = np.frombuffer(content, np.uint8).reshape(-1, width)
    if width == 1:
        return (raw[:, 0].astype(np.float64) - 128) / 128
    padded = np.zeros((len(raw), 4), np.uint8)
    padded[:, 4 - width :] = raw
    return padded.view("<i4")[:, 0] / 2.0**31


def _unread(name: str) -> bytes:
    raise UserError(f"{name} is not there")
