"""A network's calls as CUDA graphs: recorded once per shape, then one launch instead of hundreds.

The answers are the plain call's own, to the last bit; a small network at a small batch is several times faster, as the
time of such a call is that of launching its kernels from Python. Graphs hold the memory of one call per shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from imagewright.models.discrete_latents import LatentDenoiser
from imagewright.networks import ImageNetwork
from imagewright.recording import recorded
from imagewright.types import UNCONDITIONAL, Condition

MOST = 4
"""Shapes of inputs that are recorded of a network; what comes beyond is called plainly."""


class Replays:
    """As a context: the networks of a model on a CUDA device replay their calls, where no gradient is asked for.

    So do those that are told discrete latents, with the layers that are put into them. What was recorded is kept for
    the next time. Calls that enter a network by another door (layer skipping, skip scaling) are not recorded.
    """

    def __init__(self, model: nn.Module) -> None:
        doors: list[tuple[nn.Module, str]] = [(m, "forward") for m in model.modules() if isinstance(m, ImageNetwork)]
        doors += [(m, "ask") for m in model.modules() if isinstance(m, LatentDenoiser)]
        self._doors = [(module, name, Replay(getattr(module, name))) for module, name in doors]
        self._entered: list[list[tuple[nn.Module, str]]] = []

    def __enter__(self) -> None:
        # Within another such context that one's recordings serve.
        mine = [(module, name, replay) for module, name, replay in self._doors if name not in vars(module)]
        for module, name, replay in mine:
            setattr(module, name, replay)
        self._entered.append([(module, name) for module, name, _ in mine])

    def __exit__(self, *error: object) -> None:
        for module, name in self._entered.pop():
            delattr(module, name)


class Replay:
    """The function of (x, noise_label, cond) that it was made of; a shape is recorded when it comes a second time.

    why_not: the reason for which nothing more is recorded, where a recording has failed; calls are plain then.
    """

    def __init__(self, forward: Callable[..., Tensor]) -> None:
        self._forward = forward
        self._seen: set[Any] = set()
        self._recorded: dict[Any, _Recorded] = {}
        self.why_not: str | None = None

    def __call__(self, x: Tensor, noise_label: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        if not x.is_cuda or torch.is_grad_enabled() or torch.cuda.is_current_stream_capturing():
            return self._forward(x, noise_label, cond)
        given = (x, noise_label, *(getattr(cond, each.name) for each in fields(Condition)))
        casts = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        key = (casts, *(None if t is None else (t.shape, t.dtype, t.stride()) for t in given))
        # The first call is plain, and warms up what a recording may not contain (allocations, choice of kernels).
        if key in self._seen and key not in self._recorded and self.why_not is None and len(self._recorded) < MOST:
            try:
                self._recorded[key] = _Recorded(self._forward, given)
            except RuntimeError as error:
                self.why_not = str(error)
        self._seen.add(key)
        if key not in self._recorded:
            return self._forward(x, noise_label, cond)
        return self._recorded[key](given)


class _Recorded:
    """One call with tensors of its own to read from and to write to."""

    def __init__(self, forward: Callable[..., Tensor], given: tuple[Tensor | None, ...]) -> None:
        self._forward = forward
        self._inputs = [None if t is None else t.clone() for t in given]
        # A cache of cast weights would outlive the recording whose memory it lies in.
        casts, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        with torch.autocast("cuda", dtype, enabled=casts, cache_enabled=False):
            self._replay = recorded(self._work, given[0].device)  # type: ignore[union-attr]

    def _work(self) -> None:
        x, noise_label, *told = self._inputs
        cond = Condition(**{each.name: value for each, value in zip(fields(Condition), told, strict=True)})
        self._output = self._forward(x, noise_label, cond)

    def __call__(self, given: tuple[Tensor | None, ...]) -> Tensor:
        for mine, new in zip(self._inputs, given, strict=True):
            if mine is not None and new is not None:
                mine.copy_(new)
        self._replay()
        return self._output.clone()
