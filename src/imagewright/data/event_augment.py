"""Events made others of, their frames, and views of a frame (Yang et al. 2023, arXiv 2301.01928).

Events are float32 [N, M, 4]: x, y, t, p; rows with p = 0 are none. Frames are [N, 2, S, S]: how many events of a pixel
were positive, how many negative.

Source   Yan98/Event-Camera-Data-Pre-training: data/imagenet_dataset.py, data/augmentation.py, which decide.
Departs  Events are not sorted by their times again where copies were added, as nothing here asks for their order. A
         time that is turned keeps the interval (there it begins at 0). The copies' number is drawn up to the published
         most, events without one are left as they are. Boundaries of the nearest pixel are exact (torchvision's are
         rounded to float32).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from imagewright.noise import StepNoise

TRIES = 10
"""At a rectangle that fits into the frame; the whole frame where none does."""
ASPECT = 3 / 4
"""Least ratio of a rectangle's sides; the largest is its inverse."""
JITTER = (1.5, 1e-3)
"""Deviations of a copy's place (pixels) and time (seconds)."""
HOT = 0.1
"""Counts above it are counted in when hot pixels are looked for."""


def turned(events: Tensor, chosen: Tensor) -> Tensor:
    """Events in the opposite order of time, with the opposite signs, where chosen (bool [N])."""
    t, there = events[..., 2], events[..., 3] != 0
    first = torch.where(there, t, math.inf).amin(1, keepdim=True)
    last = torch.where(there, t, -math.inf).amax(1, keepdim=True)
    back = torch.where(there, first + last - t, t)
    other = torch.stack([events[..., 0], events[..., 1], back, -events[..., 3]], -1).flip(1)
    return torch.where(chosen[:, None, None], other, events)


def shifted(events: Tensor, by: Tensor, side: int) -> Tensor:
    """Events moved by whole pixels (int [N, 2], right and down); those that leave the frame are dropped."""
    place = events[..., :2] + by[:, None].to(events)
    inside = ((place >= 0) & (place < side)).all(-1)
    return torch.cat([place, events[..., 2:3], (events[..., 3] * inside)[..., None]], -1)


def copied(events: Tensor, number: tuple[int, int], least: int, noise: StepNoise) -> Tensor:
    """Events and jittered copies of some of them, [N, 2 M, 4].

    number: how many copies, from and to (exclusive), as far as there are events; streams of fewer than `least` events
    get none. A copy that would leave the rectangle of the events is moved to its border.
    """
    there = events[..., 3] != 0
    count = there.sum(1)
    low, high = torch.minimum(count - 1, count.new_tensor(number[0])), torch.minimum(count, count.new_tensor(number[1]))
    wanted = low + (noise.uniform(events[:, 0, 0]) * (high - low)).long()
    wanted = torch.where(count >= least, wanted, 0)
    lot = torch.where(there, noise.uniform(events[..., 0]), math.inf)
    first = torch.arange(lot.shape[1], device=lot.device) < wanted[:, None]
    taken = torch.zeros_like(there).scatter(1, lot.argsort(1), first)
    place = events[..., :2] + JITTER[0] * noise.normal(events[..., :2])
    time = events[..., 2:3] + JITTER[1] * noise.normal(events[..., 2:3])
    border = torch.where(there[..., None], events[..., :2], 0).amax(1, keepdim=True)
    place = torch.minimum(place.clamp_min(0), border)
    copies = torch.cat([place, time, (events[..., 3] * taken)[..., None]], -1)
    return torch.cat([events, copies], 1)


def blurred(events: Tensor, deviation: float, side: int, noise: StepNoise) -> Tensor:
    """Events whose places are jittered and rounded; those that leave the frame are dropped."""
    if not deviation:
        return events
    place = (events[..., :2].floor() + deviation * noise.normal(events[..., :2])).round()
    moved = torch.cat([place, events[..., 2:]], -1)
    return shifted(moved, torch.zeros(len(events), 2, device=events.device), side)


def histogram(events: Tensor, side: int) -> Tensor:
    """Counts [N, 2, side, side], of positive and of negative events, by the pixel in which they are."""
    n, most = events.shape[:2]
    x, y = (events[..., axis].long() for axis in (0, 1))
    negative, there = (events[..., 3] < 0).long(), events[..., 3] != 0
    image = torch.arange(n, device=events.device)[:, None].expand(n, most)
    cell = ((image * 2 + negative) * side + y) * side + x
    counts = torch.zeros(n * 2 * side * side, dtype=events.dtype, device=events.device)
    weight = there.to(events.dtype).flatten()
    return counts.index_add_(0, torch.where(there, cell, 0).flatten(), weight).view(n, 2, side, side)


def normalised(counts: Tensor) -> Tensor:
    """Counts as a picture in [-1, 1): each channel divided by its largest count and one more."""
    return 2 * counts / (counts.amax((2, 3), keepdim=True) + 1) - 1


def without_hot_pixels(counts: Tensor) -> Tensor:
    """Counts cut to the mean of an example's counts above 0.1."""
    above = counts > HOT
    mean = (counts * above).sum((1, 2, 3)) / above.sum((1, 2, 3)).clamp_min(1)
    return torch.minimum(counts, mean[:, None, None, None])


def recoloured(counts: Tensor, strength: float, noise: StepNoise) -> Tensor:
    """Counts of each channel scaled by 1 - strength to 1 + strength and moved by as much, where there are any."""
    if not strength:
        return counts
    scale, move = (strength * (2 * noise.uniform(counts[:, :, :1, :1]) - 1) for _ in "sm")
    return torch.where(counts > 0, ((1 + scale) * counts + move).clamp_min(0), counts)


def cropped(frames: Tensor, least: float, noise: StepNoise) -> Tensor:
    """Rectangles of `least` to 1 of the area, enlarged to the frame, each pixel the nearest one: no new counts.

    Sides 3:4 to 4:3, evenly in the logarithm; of ten drawn the first that fits.
    """
    if least == 1:
        return frames
    n, channels, side, _ = frames.shape
    like = frames.detach()[:, 0, 0, :1].float().expand(n, TRIES)
    area = side**2 * (least + (1 - least) * noise.uniform(like))
    aspect = ASPECT ** (1 - 2 * noise.uniform(like))
    wide, high = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (wide >= 1) & (wide <= side) & (high >= 1) & (high <= side)
    first, any_fits = fits.float().argmax(1, keepdim=True), fits.any(1, keepdim=True)
    out = frames
    for axis, length in ((2, high), (3, wide)):
        length = torch.where(any_fits, length.gather(1, first), side).long()
        start = (noise.uniform(like[:, :1]) * (side - length + 1)).long()
        at = start + torch.arange(side, device=frames.device) * length // side
        shape = [n, 1, 1, 1]
        shape[axis] = side
        out = out.gather(axis, at.view(shape).expand(n, channels, *out.shape[2:]))
    return out


def mirrored(frames: Tensor, noise: StepNoise) -> Tensor:
    """Half of the frames from left to right."""
    chosen = noise.uniform(frames.detach()[:, 0, 0, 0].float()) < 0.5
    return torch.where(chosen[:, None, None, None], frames.flip(3), frames)
