"""Events as a camera would see a picture that moves: one for each time a pixel's log brightness passes a threshold.

A window moves over the picture in three strokes, each straight and eased, with bilinear sampling between pixels and the
border repeated. A pixel keeps a reference, L = log(luma + floor); whenever L is off by the pixel's threshold C it fires
an event of the sign of the change, at the moment at which L (straight between two frames) passed, and the reference
follows by C. Event   x, y (pixels), t (seconds), p (+1 brighter, -1 darker), float32; in the order of their times.

Source   the stand-in of this library (docs/data/standin_events.md); the sensor's model is that of event cameras'
         simulators. It has no refractory period and no hot pixels; noise events are there if asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from imagewright.checks import require_non_negative, require_positive, require_whole
from imagewright.data.pixels import Pixels
from imagewright.types import UserError

Floats = npt.NDArray[np.float64]
Events = npt.NDArray[np.float32]
LUMA = (0.299, 0.587, 0.114)
STROKES = 3
LEAST = 0.05
"""Threshold below which no pixel's falls, however wide they are spread."""
SLACK = 1e-9
"""Share of a threshold that rounding may lack."""
MOST_NOISE = 1000
"""Events of a pixel that nothing caused, on average."""
AT_ONCE = 1 << 16
"""Pixels of pictures that are simulated side by side."""


@dataclass(frozen=True, kw_only=True)
class Simulator:
    """How the window moves and when pixels fire."""

    frames: int = 60
    """At which brightness is looked at."""
    seconds: float = 0.3
    stroke: tuple[float, float] = (1.5, 3.0)
    """Length of a stroke, from and to, in pixels of the events' frame."""
    threshold: tuple[float, float] = (0.15, 0.25)
    """Of an example, from and to, in natural logarithms of brightness."""
    spread: float = 0.03
    """Deviation of pixels' thresholds about their example's."""
    floor: float = 0.05
    """Added to the brightness, which is in [0, 1]."""
    noise: float = 0.0
    """Events that nothing caused, a pixel and second."""

    def __post_init__(self) -> None:
        require_whole("simulator.frames", self.frames, STROKES + 1, 10_000)
        for name in ("seconds", "floor"):
            require_positive(f"simulator.{name}", getattr(self, name))
        for name in ("spread", "noise"):
            require_non_negative(f"simulator.{name}", getattr(self, name))
        if self.noise * self.seconds > MOST_NOISE:
            raise UserError(
                f"simulator.noise is {self.noise:g}; in simulator.seconds, {self.seconds:g}, it must be no more than "
                f"{MOST_NOISE} events a pixel"
            )
        for name, low in (("stroke", 0.0), ("threshold", LEAST)):
            pair = getattr(self, name)
            if len(pair) != 2 or not low <= pair[0] <= pair[1] <= 1e4:
                raise UserError(f"simulator.{name} is {pair}; it must be two numbers >= {low:g}, the smaller first")

    def __call__(self, pictures: Pixels, indices: Sequence[int], seed: int, scale: int = 1) -> list[Events]:
        """The events of pictures uint8 [n, h, w, C]; frames of events are `scale` times as large.

        What comes of a picture depends on (seed, its index) and on nothing else that is simulated with it.
        """
        luma = _luma(pictures)
        at_once = max(1, AT_ONCE // (luma.shape[1] * luma.shape[2] * scale**2))
        made: list[Events] = []
        for start in range(0, len(luma), at_once):
            some = range(start, min(start + at_once, len(luma)))
            draws = [np.random.default_rng(np.random.SeedSequence((seed, indices[i]))) for i in some]
            made += self._events(luma[some.start : some.stop], draws, scale)
        return made

    def _events(self, luma: Floats, draws: Sequence[np.random.Generator], scale: int) -> list[Events]:
        paths = np.stack([self._path(draw) for draw in draws])
        height, width = luma.shape[1] * scale, luma.shape[2] * scale
        base = [draw.uniform(*self.threshold) for draw in draws]
        thresholds = np.stack(
            [b + self.spread * d.normal(size=(height, width)) for b, d in zip(base, draws, strict=True)]
        )
        events = fired(np.log(film(luma, paths, scale) + self.floor), np.maximum(thresholds, LEAST))
        out = []
        for each, draw in zip(events, draws, strict=True):
            each[:, 2] *= self.seconds / (self.frames - 1)
            out.append(self._with_noise(each, draw, height, width).astype(np.float32))
        return out

    def _path(self, draw: np.random.Generator) -> Floats:
        """Where the window is in each frame, [frames, 2] (down, right) in pixels."""
        angles, lengths = draw.uniform(0, 2 * np.pi, STROKES), draw.uniform(*self.stroke, STROKES)
        ends = np.cumsum(lengths[:, None] * np.stack([np.sin(angles), np.cos(angles)], 1), 0)
        corners = np.concatenate([np.zeros((1, 2)), ends])
        at = np.linspace(0, STROKES, self.frames)
        stroke = np.minimum(at.astype(int), STROKES - 1)
        eased = (1 - np.cos(np.pi * (at - stroke))) / 2
        path: Floats = corners[stroke] + eased[:, None] * (corners[stroke + 1] - corners[stroke])
        return path

    def _with_noise(self, events: Floats, draw: np.random.Generator, height: int, width: int) -> Floats:
        if not self.noise:
            return events
        n = draw.poisson(self.noise * self.seconds * height * width)
        x, y = draw.integers(width, size=n), draw.integers(height, size=n)
        t, p = draw.uniform(0, self.seconds, n), draw.choice([-1.0, 1.0], n)
        both = np.concatenate([events, np.stack([x, y, t, p], 1)])
        return both[np.argsort(both[:, 2], kind="stable")]


def film(luma: Floats, paths: Floats, scale: int = 1) -> Floats:
    """What a window shows: pictures [n, h, w] along paths [n, T, 2] (pixels, enlarged) -> [n, T, h scale, w scale]."""
    n, height, width = luma.shape
    rows, columns = (
        (np.arange(side * scale) + 0.5 + paths[:, :, axis, None]) / scale - 0.5
        for axis, side in enumerate((height, width))
    )
    low, high, share = _between(rows, height)
    every = np.arange(n)[:, None, None]
    across = (1 - share)[..., None] * luma[every, low] + share[..., None] * luma[every, high]
    low, high, share = _between(columns[:, :, None], width)
    shown: Floats = (1 - share) * np.take_along_axis(across, low, 3) + share * np.take_along_axis(across, high, 3)
    return shown


def fired(levels: Floats, thresholds: Floats) -> list[Floats]:
    """Events of films of log brightness [n, T, H, W], by thresholds [n, H, W]; times are in frames, 0 .. T - 1."""
    reference = levels[:, 0].copy()
    found = [np.zeros((0, 5))]
    for frame in range(1, levels.shape[1]):
        count = np.floor(np.abs(levels[:, frame] - reference) / thresholds + SLACK)
        at = np.nonzero(count)
        n = count[at].astype(np.int64)
        step = thresholds[at] * np.sign(levels[:, frame][at] - reference[at])
        owner = np.repeat(np.arange(len(n)), n)
        nth = np.arange(len(owner)) - np.repeat(np.cumsum(n) - n, n) + 1
        before, now = levels[:, frame - 1][at], levels[:, frame][at]
        share = (reference[at][owner] + nth * step[owner] - before[owner]) / (now - before)[owner]
        times = frame - 1 + np.clip(share, 0, 1)
        image, y, x = (axis[owner] for axis in at)
        found.append(np.stack([image, x, y, times, np.sign(step[owner])], 1))
        reference[at] += n * step
    events = np.concatenate(found)
    events = events[np.lexsort((events[:, 3], events[:, 0]))]
    return np.split(events[:, 1:], np.searchsorted(events[:, 0], np.arange(1, len(levels))))


def _between(places: Floats, side: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Floats]:
    """The pixels on both sides of places, and how far these are from the first to the second; the border repeats."""
    places = np.clip(places, 0, side - 1)
    low = places.astype(np.int64)
    return low, np.minimum(low + 1, side - 1), places - low


def _luma(pictures: Pixels) -> Floats:
    """uint8 [n, h, w, C] -> [n, h, w] in [0, 1]."""
    weights = np.array(LUMA) if pictures.shape[3] == 3 else np.full(pictures.shape[3], 1 / pictures.shape[3])
    luma: Floats = pictures.astype(np.float64) @ weights / 255
    return luma
