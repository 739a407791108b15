"""How large, how deep and how many: all limits of what is read, in one place. `docs/security.md` says them in words.

They are there so that no file, however it was made, costs more than some 2 GB of memory or 10 s before it is refused.
What a file really holds may be as large as the machine bears.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

RECORD = 16 << 20
"""Bytes of a JSON file of ours: a description of a model or run, scores, a manifest, a line of a log."""
LABELS = 64 << 20
"""Bytes of a dataset.json: ImageNet's takes 42 MB."""
LOG = 256 << 20
"""Bytes of a log.jsonl."""
DEPTH = 32
"""Lists and objects within each other in JSON."""
VALUES, CONTAINERS = 10_000_000, 3_000_000
"""Values of a JSON file, and lists and objects among them."""

HEADER = 16 << 20
"""Bytes of a safetensors file's header."""
PICKLE_BYTES, PICKLE_STEPS = 64 << 20, 1_000_000
"""Bytes and operations of the pickle in a .pt file; a tensor takes some 30 operations."""
EXPANSION = 4
"""Bytes of all tensors of a .pt file for each byte of the file; weights that are shared count each time."""
UNPACKED, RATIO = 1 << 30, 50
"""Bytes of an array in an npz above which it may not be over so many times as large as the file."""
SPARE = 64 << 20
"""Bytes that a model may hold besides its stored weights: tables that are computed."""
WHOLE = 1 << 20
"""Any whole number in a model's description: widths, depths, classes, places."""
DESCRIBED = 4096
"""Entries of a list or object in it."""

STEPS = 10_000
"""Steps of a sampler."""

PICTURE_BYTES = 128 << 20
"""Bytes of a picture's file."""
PIXELS = 40_000_000
"""Pixels of one picture, and of all pictures that are decoded at one moment."""
KEPT = 1 << 30
"""Bytes of a set up to which it stays decoded in memory; larger ones are decoded when asked for."""
PAIRS = 10**9
"""Pairs of noise and image in a store."""
CLASSES = 1 << 16
"""Classes of a set of images."""
SIDE = 1 << 14
"""Pixels of a side of what a model makes."""


class Room:
    """A number of places that threads share; who asks for more than there are waits until all are free."""

    def __init__(self, places: int) -> None:
        self._places, self._taken = places, 0
        self._changed = threading.Condition()

    @contextmanager
    def take(self, places: int) -> Iterator[None]:
        """Hold that many places."""
        with self._changed:
            self._changed.wait_for(lambda: self._taken == 0 or self._taken + places <= self._places)
            self._taken += places
        try:
            yield
        finally:
            with self._changed:
                self._taken -= places
                self._changed.notify_all()
