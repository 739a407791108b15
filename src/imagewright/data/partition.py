"""Some of a set's classes, and all of them in parts: which pictures a student learns from, and how classes are divided.

Source   Song et al. 2025 (arXiv 2410.23274), section 4.1: disjoint parts of equal size that cover all classes; on
         ImageNet consecutive classes, or clusters of classes that a network places near each other.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from imagewright.data.image_set import ImageSet
from imagewright.networks.config import did_you_mean
from imagewright.types import DataSpec, UserError

Part = tuple[int, ...]
Floats = npt.NDArray[np.float64]
ROUNDS = 100


def of_classes(images: ImageSet, wanted: Sequence[str]) -> ImageSet:
    """The pictures of some classes, with all classes' numbers; () = the set as it is. As `numbered`."""
    if not wanted:
        return images
    chosen = numbered(wanted, images.spec)
    empty = tuple(k for k in range(images.spec.num_classes) if k not in chosen)
    spec = replace(images.spec, empty_classes=empty)
    rows = np.flatnonzero(np.isin(images.labels, chosen))
    if len(images) and not len(rows):
        raise UserError(f"data.classes: {images.source} has no pictures of {', '.join(wanted)}")
    return replace(images.subset(rows), spec=spec)


def numbered(wanted: Sequence[str], spec: DataSpec) -> Part:
    """Numbers of the classes that are meant, each once, in order.

    wanted: numbers, ranges of numbers with both ends ("0-249"), and names; a number is never a name. Raises UserError
    for what is none of the classes.
    """
    found: set[int] = set()
    for each in wanted:
        ends = re.fullmatch(r"(\d+)(?:-(\d+))?", each)
        if ends is None:
            if each not in spec.class_names:
                raise UserError(f"data.classes: no class is called {each!r}{did_you_mean(each, spec.class_names)}")
            found.add(spec.class_names.index(each))
            continue
        first, last = int(ends[1]), int(ends[2] or ends[1])
        if not first <= last < spec.num_classes:
            raise UserError(f"data.classes: {each} is none of the set's {spec.num_classes} classes, which begin with 0")
        found.update(range(first, last + 1))
    return tuple(sorted(found))


def spelled(part: Sequence[int]) -> tuple[str, ...]:
    """Numbers of classes as `data.classes` has them: neighbours as ranges."""
    runs: list[list[int]] = []
    for k in sorted(part):
        if runs and k == runs[-1][-1] + 1:
            runs[-1].append(k)
        else:
            runs.append([k])
    return tuple(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def consecutive(classes: int, parts: int) -> list[Part]:
    """Neighbouring classes together, in parts whose sizes differ by one at the most. UserError for empty parts."""
    _check_parts(classes, parts)
    return [tuple(part.tolist()) for part in np.array_split(np.arange(classes), parts)]


def clustered(embeddings: Floats, parts: int, seed: int = 0) -> list[Part]:
    """Classes that are alike together, in parts whose sizes differ by one at the most: k-means with places.

    embeddings: [classes, D]. Each round gives the nearest pairs of class and centre their places first. Parts are in
    the order of their lowest class. Raises UserError for empty parts.
    """
    _check_parts(len(embeddings), parts)
    points = np.asarray(embeddings, np.float64)
    rng = np.random.Generator(np.random.PCG64(seed))
    centres = points[_spread(points, parts, rng)]
    whose = np.full(len(points), -1)
    for _ in range(ROUNDS):
        before, whose = whose, _placed(((points[:, None] - centres) ** 2).sum(2))
        if np.array_equal(before, whose):
            break
        centres = np.stack([points[whose == k].mean(0) for k in range(parts)])
    found = [tuple(np.flatnonzero(whose == k).tolist()) for k in range(parts)]
    return sorted(found)


def _spread(points: Floats, parts: int, rng: np.random.Generator) -> list[int]:
    """Rows to begin with, each far from those before: k-means++."""
    chosen = [int(rng.integers(len(points)))]
    while len(chosen) < parts:
        far = ((points[:, None] - points[chosen]) ** 2).sum(2).min(1)
        left = np.setdiff1d(np.arange(len(points)), chosen)
        weights = far[left]  # equal points are as good as each other
        total = weights.sum()
        chosen.append(int(rng.choice(left, p=weights / total if total else None)))
    return chosen


def _placed(distances: Floats) -> npt.NDArray[np.int64]:
    """The part of each class, [classes]: nearest pairs first, until a part is full."""
    n, parts = distances.shape
    room = np.array([len(part) for part in consecutive(n, parts)])
    whose = np.full(n, -1)
    for flat in np.argsort(distances, axis=None, kind="stable"):
        row, part = divmod(int(flat), parts)
        if whose[row] < 0 and room[part]:
            whose[row], room[part] = part, room[part] - 1
    return whose


def _check_parts(classes: int, parts: int) -> None:
    if not 1 <= parts <= classes:
        raise UserError(f"parts is {parts}; there are {classes} classes, of which each part needs one")
