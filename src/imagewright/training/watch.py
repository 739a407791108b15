"""Whether losses and gradients are finite, known without waiting for the device.

Looking at a number on a GPU stops the host until all that was asked of the device is done. So a flag stays there: once
a loss or a gradient is not finite it is up, and optimisers that are given it leave weights as they are, whatever comes.
The host reads what there was when the run has a reason to wait (a line of the log, a checkpoint), and stops the run
then, with the step at which it happened. On the CPU, where looking is free, it looks at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from imagewright.precision import wide

MOST = 2048
"""Updates after which the host looks whatever the run's intervals."""


class NotFinite(Exception):  # noqa: N818, a finding that the trainer puts into words
    """What was not finite, of which part, at which step."""

    def __init__(self, seen: Seen, what: str) -> None:
        super().__init__(what)
        self.seen, self.what = seen, what


@dataclass(frozen=True)
class Seen:
    """One update: its mean loss and the norm of its gradient, each a tensor of one number; where the run stood.

    scaled: by a loss scale, so that a gradient may overflow; the step is left out then, and the run goes on.
    """

    part: str
    step: int
    images: int
    loss: Tensor
    norm: Tensor
    scaled: bool


class Watch:
    """patient: whether numbers are left on the device until `look`."""

    def __init__(self, device: torch.device, patient: bool | None = None) -> None:
        self.patient = device.type == "cuda" if patient is None else patient
        self._halted = torch.zeros((), device=device)
        self._seen: list[Seen] = []
        self.losses: dict[str, float] = {}

    def note(self, seen: Seen, *, patient: bool = True) -> Tensor | None:
        """Take down an update before its weights move. Returns the flag that its optimiser has to mind, float32 [].

        patient: whether the optimiser can mind it; else, and where the watch is not patient, it looks at once, returns
        None, and raises NotFinite.
        """
        self._seen.append(seen)
        if not (self.patient and patient):
            self.look()
            return None
        fine = torch.isfinite(seen.loss)
        if not seen.scaled:
            fine = fine & torch.isfinite(seen.norm)
        self._halted = torch.maximum(self._halted, 1 - fine.float())
        if len(self._seen) >= MOST:
            self.look()
        return self._halted

    def look(self) -> None:
        """Read all that was noted since the last time. Raises NotFinite for the first update that was not finite."""
        if not self._seen:
            return
        seen, self._seen = self._seen, []
        numbers = torch.stack([wide(t.detach()).reshape(()) for s in seen for t in (s.loss, s.norm)]).tolist()
        for s, loss, norm in zip(seen, numbers[::2], numbers[1::2], strict=True):
            if not math.isfinite(loss):
                raise NotFinite(s, f"loss {loss}")
            if not (s.scaled or math.isfinite(norm)):
                raise NotFinite(s, "gradient")
            self.losses[s.part] = loss
