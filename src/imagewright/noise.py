"""Randomness that is handed in: every draw is a function of what it is for, never of what was drawn before.

`ImageNoise` serves sampling: image i of seed s sees its own streams, whatever the batch or the machine around it.
`StepNoise` serves training: a draw depends on (seed, step, micro-batch): a resumed run needs no saved generator.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


def derive_seed(*key: int) -> int:
    """A 63-bit seed from a tuple of non-negative integers; near keys give unrelated seeds (NumPy's SeedSequence)."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_networks(seed: int, device: torch.device) -> None:
    """Seed torch's global generators, from which networks on `device` draw their dropout."""
    if device.type == "cpu":
        # torch.manual_seed writes down a stack trace for every kind of accelerator that is absent: a millisecond.
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


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
        for row, generator in zip(out, self._generators, strict=True):
            getattr(row, fill)(generator=generator)
        return out.to(like)

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal, shape, dtype and device of `like` [N, ...]."""
        return self._draw(like, "normal_")

    def uniform(self, like: Tensor) -> Tensor:
        """Uniform on [0, 1), shape, dtype and device of `like` [N, ...]."""
        return _below_one(self._draw(like, "uniform_"))


class StepNoise:
    """Noise of one micro-batch of one training step, and control over the networks' own (dropout) randomness."""

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

    @contextmanager
    def same_dropout(self) -> Iterator[None]:
        """Run the body, then put torch's global generators back: the next forward pass draws the same dropout masks."""
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            yield


def _below_one(uniform: Tensor) -> Tensor:
    """The half types round numbers just below 1 up to it; they become the largest number below."""
    return uniform.clamp(max=1 - torch.finfo(uniform.dtype).eps / 2)
