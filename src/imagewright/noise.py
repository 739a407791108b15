"""Randomness that is handed in: every draw is a function of what it is for, never of what was drawn before.

`ImageNoise` serves sampling: image i of seed s sees its own streams, whatever the batch or the machine around it.
`BatchNoise` serves training: an image's draws depend on (seed, step, its place in the step's batch), whatever the
micro-batch or the process in which it is computed; a resumed run needs no saved generator.
`StepNoise` is a plain stream of numbers of a key, for what has no images with places of their own.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from imagewright import fused
from imagewright.moving import pinned, sent


def derive_seed(*key: int) -> int:
    """A 63-bit seed from a tuple of non-negative integers; near keys give unrelated seeds (NumPy's SeedSequence)."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_networks(seed: int, device: torch.device) -> None:
    """Seed torch's global generators, from which networks on `device` draw their dropout."""
    if device.type == "cpu":
        # torch.manual_seed writes down a stack trace for every kind of accelerator that is absent: a millisecond.
        torch.default_generator.manual_seed(seed)
    elif device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed)
    else:
        torch.manual_seed(seed)


MANY, MOST_THREADS = 2**18, 8
"""Numbers from which on several threads draw an `ImageNoise`'s, and how many at most."""


@lru_cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked child has none of its parent's threads


class ImageNoise:
    """A generator per image. Numbers are drawn in float32 on the CPU, so every device and dtype sees the same ones.

    seed: >= 0. indices: which images of that seed the rows of a batch are. stream: independent purposes of one image
    (0 the latents and sampler noise, 1 the label).
    """

    def __init__(self, seed: int, indices: Sequence[int], stream: int = 0) -> None:
        self._generators = [torch.Generator().manual_seed(derive_seed(seed, i, stream)) for i in indices]

    def _draw(self, like: Tensor, fill: str) -> Tensor:
        if len(like) != len(self._generators):
            raise ValueError(f"noise for {len(self._generators)} images asked to fill {len(like)}")
        out = torch.empty(like.shape, dtype=torch.float32)

        def draw(rows: range) -> None:
            for i in rows:
                getattr(out[i], fill)(generator=self._generators[i])

        threads = min(MOST_THREADS, os.cpu_count() or 1) if out.numel() >= MANY else 1
        if threads == 1:
            draw(range(len(out)))
        else:  # torch lets go of Python's lock while it draws
            list(_pool(threads).map(draw, (range(k, len(out), threads) for k in range(threads))))
        return out.to(like)

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal, shape, dtype and device of `like` [N, ...]."""
        return self._draw(like, "normal_")

    def uniform(self, like: Tensor) -> Tensor:
        """Uniform on [0, 1), shape, dtype and device of `like` [N, ...]."""
        return _below_one(self._draw(like, "uniform_"))


class StepNoise:
    """A stream of numbers that is a function of a key of non-negative integers."""

    def __init__(self, *key: int, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        # The last number keeps training noise apart from the sampling noise of an equal key.
        self._generator = torch.Generator(self._device).manual_seed(derive_seed(*key, 1))

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal, shape, dtype and device of `like`."""
        return torch.randn(like.shape, generator=self._generator, device=self._device).to(like)

    def uniform(self, like: Tensor) -> Tensor:
        """Uniform on [0, 1), shape, dtype and device of `like`."""
        return _below_one(torch.rand(like.shape, generator=self._generator, device=self._device).to(like))

    def integers(self, high: int, like: Tensor) -> Tensor:
        """Uniform int64 in 0 .. high - 1, shape and device of `like`."""
        return torch.randint(high, like.shape, generator=self._generator, device=self._device)

    def common(self, like: Tensor) -> Tensor:
        """Uniform on [0, 1), of any shape: one draw for the whole batch of a training step."""
        return self.uniform(like)

    def places(self, like: Tensor) -> tuple[Tensor, int]:
        """The images' places in the whole batch, int64 [N], and how many it has; like: [N, ...]."""
        return torch.arange(len(like), device=like.device), len(like)

    @property
    def first_place(self) -> int:
        """That of the first image, known to the host."""
        return 0

    @contextmanager
    def among(self, rows: range) -> Iterator[None]:
        """While the body runs, networks see these rows of the images at hand alone."""
        yield

    @contextmanager
    def same_dropout(self) -> Iterator[None]:
        """Run the body, then put the networks' randomness back: the next forward pass draws the same dropout masks."""
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            yield


class BatchNoise(StepNoise):
    """Noise of the images at `places` of one training step's batch, and of the networks that see them.

    Numbers are a hash of (seed, step, which draw, place, which number): SplitMix64 (Steele et al. 2014) started at a
    state of each image's own, so that they need no generator and are made where they are used. A device makes the same
    numbers as another up to the rounding of its logarithm and cosine.

    places: of the batch's `batch` images, those at hand. A draw has one row per image, or several blocks of them.
    """

    def __init__(self, seed: int, step: int, places: range, batch: int, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._key, self._places, self._batch = (seed, step), places, batch
        self._draws = {"method": 0, "networks": 0, "common": 0}

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal, shape, dtype and device of `like` [N, ...] (or [k N, ...]); by Box and Muller's rule."""
        wide = torch.promote_types(like.dtype, torch.float32)
        count = math.prod(like.shape[1:])
        word = self._words(like, (count + 1) // 2)
        radius = _shifted(word, 24).add_(1).to(wide).mul_(2.0**-40).log_().mul_(-2).sqrt_()
        angle = (word & 0xFFFFFF).to(wide).mul_(2 * math.pi * 2.0**-24)
        pair = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
        return pair[:, :count].reshape(like.shape).to(like)

    def uniform(self, like: Tensor) -> Tensor:
        """Uniform on [0, 1), shape, dtype and device of `like` [N, ...] (or [k N, ...])."""
        word = self._words(like, math.prod(like.shape[1:]))
        digits = 53 if like.dtype == torch.float64 else 24
        wide = torch.promote_types(like.dtype, torch.float32)
        return _below_one((_shifted(word, 64 - digits).to(wide) * 2.0**-digits).reshape(like.shape).to(like))

    def integers(self, high: int, like: Tensor) -> Tensor:
        """Uniform int64 in 0 .. high - 1 (high < 2^31), shape and device of `like` [N, ...]."""
        word = self._words(like, math.prod(like.shape[1:]))
        return _shifted(_shifted(word, 32) * high, 32).reshape(like.shape)

    def common(self, like: Tensor) -> Tensor:
        """Uniform on [0, 1), of any shape: the same draw in every micro-batch of the step."""
        self._draws["common"] += 1  # a count of its own: micro-batches may have drawn differently often
        drawn = StepNoise(*self._key, self._draws["common"], _COMMON).uniform(torch.empty(like.shape, dtype=like.dtype))
        return sent(drawn, like.device)

    def places(self, like: Tensor) -> tuple[Tensor, int]:
        """The images' places in the whole batch, int64 [N], and how many it has; like: [N, ...]."""
        self._check(like)
        places = torch.arange(self._places.start, self._places.stop, self._places.step, device=like.device)
        return places.repeat(len(like) // len(places)), self._batch

    @property
    def first_place(self) -> int:
        """That of the first image at hand, known to the host."""
        return self._places.start

    @contextmanager
    def among(self, rows: range) -> Iterator[None]:
        """While the body runs, images are those of these rows alone, for networks and for draws."""
        before, self._places = self._places, self._places[rows.start : rows.stop : rows.step]
        try:
            yield
        finally:
            self._places = before

    @contextmanager
    def for_networks(self, phase: int) -> Iterator[None]:
        """While the body runs, networks draw their dropout from here; phase: of the step's events, the one that is due.

        What torch itself draws (attention weights' dropout, compiled networks) depends on the first place, too.
        """
        self._draws["networks"] = phase << 32
        seed_networks(derive_seed(*self._key, self._places.start, phase, 1), self._device)
        before, _networks[0] = _networks[0], self
        try:
            yield
        finally:
            _networks[0] = before

    @contextmanager
    def same_dropout(self) -> Iterator[None]:
        """Run the body, then put the networks' randomness back: the next forward pass draws the same dropout masks."""
        before = self._draws["networks"]
        with super().same_dropout():
            yield
        self._draws["networks"] = before

    def kept(self, like: Tensor, p: float) -> Tensor:
        """Where dropout of a network lets through, with probability 1 - p; bool, shape and device of `like`.

        A word decides on four numbers, by 16 bits each (p to within 2^-17): dropout's masks are most of what is drawn.
        """
        if round(p * 2**16) == 2**16:  # which 16 bits cannot say
            return torch.zeros(like.shape, dtype=torch.bool, device=like.device)
        count = math.prod(like.shape[1:])
        sixteen = self._words(like, (count + 3) // 4, "networks").view(torch.int16)
        return (sixteen >= round(p * 2**16) - 2**15)[:, :count].view_as(like)

    def dropped(self, h: Tensor, p: float) -> Tensor:
        """h with dropout by `kept`, in one kernel (`fused.drops`)."""
        return fused.dropped(h, p, self._key_of(h, "networks"), self._places)

    def _words(self, like: Tensor, count: int, purpose: str = "method") -> Tensor:
        """Random 64-bit words, int64 [rows of like, count]."""
        return _hashed(self._starts(like, purpose), count)

    def _starts(self, like: Tensor, purpose: str) -> Tensor:
        """Where the words of a new draw begin for each row of like, int64 [rows]."""
        key, places = self._key_of(like, purpose), self._places
        place = torch.arange(places.start, places.stop, places.step, device=like.device)
        starts, blocks = _mixed(place.mul_(_GOLDEN).add_(key)), len(like) // len(places)
        if blocks > 1:
            starts = (torch.arange(blocks, device=like.device).mul_(_GOLDEN)[:, None] + starts).flatten()
        return _mixed(starts)

    @property
    def in_order(self) -> bool:
        """Whether no place between the first and the last is left out, as the kernel of `dropped` has it."""
        return self._places.step == 1

    @property
    def drew_in_common(self) -> bool:
        """Whether anything was drawn for the whole batch, on the host."""
        return bool(self._draws["common"])

    def _key_of(self, like: Tensor, purpose: str) -> int | Tensor:
        """Of a new draw."""
        self._check(like)
        self._draws[purpose] += 1
        return derive_seed(*self._key, self._draws[purpose], _PURPOSES[purpose])

    def _check(self, like: Tensor) -> None:
        if like.ndim == 0 or len(like) % len(self._places):
            raise ValueError(f"noise for {len(self._places)} images asked to fill {tuple(like.shape)}")


class RecordedNoise(BatchNoise):
    """Of a step that is recorded once and done again: keys lie in the device's memory, and `tell` says whose they are.

    The numbers are those of a `BatchNoise` of that seed and step. It draws nothing in common, and leaves torch's
    generator alone.
    """

    MOST = 8192
    """Draws of a step."""

    def __init__(self, places: range, batch: int, device: torch.device) -> None:
        super().__init__(0, 0, places, batch, device)
        self._keys = torch.zeros(self.MOST, dtype=torch.int64, device=device)
        self._slots: dict[tuple[int, int], int] = {}

    def tell(self, seed: int, step: int) -> None:
        """From here on what is recorded draws the numbers of that step."""
        keys = torch.tensor([derive_seed(seed, step, *draw) for draw in self._slots], dtype=torch.int64)
        self._keys[: len(keys)].copy_(sent(pinned(keys, self._device), self._device))

    @contextmanager
    def for_networks(self, phase: int) -> Iterator[None]:
        """While the body runs, which begins the step anew, networks draw their dropout from here."""
        self._draws = {"method": 0, "networks": phase << 32, "common": 0}
        before, _networks[0] = _networks[0], self
        try:
            yield
        finally:
            _networks[0] = before

    @contextmanager
    def same_dropout(self) -> Iterator[None]:
        """Run the body, then put the count of draws back."""
        before = self._draws["networks"]
        yield
        self._draws["networks"] = before

    def _key_of(self, like: Tensor, purpose: str) -> Tensor:
        self._check(like)
        self._draws[purpose] += 1
        slot = self._slots.setdefault((self._draws[purpose], _PURPOSES[purpose]), len(self._slots))
        return self._keys[slot]


_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # 2^64 / golden ratio, as the signed number with the same bits
_COMMON = 3
_PURPOSES = {"method": 2, "networks": 4}
_networks: list[BatchNoise | None] = [None]
"""Whose images the networks are computing, while a step is trained."""


def _shifted(word: Tensor, by: int) -> Tensor:
    """A logical shift to the right of int64."""
    return (word >> by).bitwise_and_((1 << (64 - by)) - 1)


def _mixed(word: Tensor) -> Tensor:
    """SplitMix64's finaliser, int64 that wraps around."""
    for by, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        word = _shifted(word, by).bitwise_xor_(word).mul_(factor - 2**64)
    return _shifted(word, 31).bitwise_xor_(word)


def _hashed(starts: Tensor, count: int) -> Tensor:
    """The first words from each start, int64 [rows, count]."""
    return _mixed(torch.arange(1, count + 1, device=starts.device).mul_(_GOLDEN) + starts[:, None])


def dropout(h: Tensor, p: float, training: bool) -> Tensor:
    """Dropout of h [N, ...] with probability p: by the images' own noise in a training step, else by torch's.

    A compiled network has torch's: what it draws then depends on the micro-batch.
    """
    if p == 0 or not training:
        return h
    source = _networks[0]
    if source is not None and source.in_order and fused.drops(h) and _drops_the_same(h.device):
        return source.dropped(h, p)
    return torch.where(kept(h, p), h / (1 - p), torch.zeros((), dtype=h.dtype, device=h.device))


@lru_cache
def _drops_the_same(device: torch.device) -> bool:
    """Whether the kernel lets through what `BatchNoise.kept` does, in both memory formats: tried once."""
    h, ours, its = torch.ones(6, 5, 6, 2, device=device), *(BatchNoise(2**40, 7, range(3, 6), 8, device) for _ in "ab")
    try:
        return all(
            torch.equal(its.dropped(h.contiguous(memory_format=format), 0.3) != 0, ours.kept(h, 0.3))
            for format in (torch.contiguous_format, torch.channels_last)
        )
    except Exception:  # whatever a compiler that is not whole raises
        return False


def twice() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For a pass through networks that is computed twice: within the second context dropout is as within the first."""
    source = _networks[0]
    drawn = 0 if source is None else source._draws["networks"]

    @contextmanager
    def second() -> Iterator[None]:
        before, _networks[0] = _networks[0], source
        since, _second[0] = _second[0], True
        count = 0 if source is None else source._draws["networks"]
        if source is not None:
            source._draws["networks"] = drawn
        try:
            yield
        finally:
            _networks[0], _second[0] = before, since
            if source is not None:
                source._draws["networks"] = count

    return nullcontext(), second()


_second = [False]


def computing_again() -> bool:
    """Whether this is the second time that a pass through networks is computed, for what has to be noted once."""
    return _second[0]


def kept(like: Tensor, p: float) -> Tensor:
    """Where dropout with probability p lets through, bool of like's shape [N, ...]; drawn as `dropout` draws."""
    source = None if torch.compiler.is_compiling() else _networks[0]
    if source is None:
        return torch.rand(like.shape, device=like.device) >= p
    return source.kept(like, p)


def _below_one(uniform: Tensor) -> Tensor:
    """The half types round numbers just below 1 up to it; they become the largest number below."""
    return uniform.clamp(max=1 - torch.finfo(uniform.dtype).eps / 2)
