"""A step's forward and backward pass as one CUDA graph, where the method permits: recorded once, then one launch.

A small network on a large GPU is held up by the launching of its kernels from Python, hundreds to thousands a step.
What is recorded does the same to other numbers of the same shapes: the batch is copied to where the recording reads it,
and the keys of all noise lie in the device's memory (`RecordedNoise`), so a replayed step has the bits of a plain one.

A recording repeats what the host decided when it was made. So the first steps are watched, and a method is recorded
only if its step reads neither the clock nor torch's generator, waits for nothing, sends nothing of the host's to the
device, yields one update and after it computes nothing and lets averages follow. Any other method's steps stay as they
are. The first repetition is held against a plain step of the same noise and of a batch that is not the recorded one,
and the recording given up if they differ. The optimiser, averages, log and what several processes exchange are not part
of the recording.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode

from imagewright.noise import BatchNoise, RecordedNoise
from imagewright.precision import Precision, casts
from imagewright.recording import Work, recorded
from imagewright.training.learners import Learner, summed
from imagewright.types import Clock, Event, Example, Follow, Method, Parts, Update

AGREE = 0.02
"""Relative distance between a plain step's numbers and a repeated one's: half precision's, sums in another order."""
WATCHED = 2
"""Plain steps before one is recorded: the first chooses and compiles kernels, the last is looked at."""


def in_vain(why: str) -> None:
    """Tell the user who asked for recorded steps that there are none."""
    warnings.warn(f"steps are not recorded (training.graphs): {why}; plain ones go on", stacklevel=2)


class _WatchedClock(Clock):
    """Tells whether a method has asked it anything."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock.step, clock.images, clock.total_images)
        object.__setattr__(self, "asked", False)

    def __getattribute__(self, name: str) -> Any:
        if name in ("step", "images", "total_images", "fraction"):
            object.__setattr__(self, "asked", True)
        return object.__getattribute__(self, name)


class Graphs:
    """Watches a trainer's first steps, records one if it can, and stands in for those after it.

    batch: images of a step over all processes; places: of those, this process's, in one micro-batch.
    why_not: the reason for which nothing is recorded; None while it may be, or is.
    """

    def __init__(
        self,
        method: Method,
        parts: Parts,
        learners: Mapping[str, Learner],
        precision: Precision,
        batch: int,
        places: range,
        device: torch.device,
    ) -> None:
        self._method, self._parts, self._learners, self._precision = method, parts, learners, precision
        self._size, self._device = batch, device
        self._places, self._noise = places, RecordedNoise(places, batch, device)
        self.why_not: str | None = None
        self._plain_steps = 0
        self._events: list[Event] = []
        self._replay: Work | None = None
        self._batch: Any = None
        self._update: Any = None
        self._gradients: Any = None

    def _give_up(self, why: str) -> None:
        self.why_not = why
        in_vain(why)

    # --- watching -----------------------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether `step` may stand in for a plain one."""
        return self.why_not is None and self._plain_steps >= WATCHED

    @property
    def _looks(self) -> bool:
        return self.why_not is None and self._plain_steps == WATCHED - 1

    @contextmanager
    def plain(self, clock: Clock) -> Iterator[Clock]:
        """While a plain step is done, with this clock."""
        watched = _WatchedClock(clock) if self._looks else clock
        self._events = []
        yield watched
        if isinstance(watched, _WatchedClock):
            kinds = [type(event) for event in self._events]
            if object.__getattribute__(watched, "asked"):
                self._give_up("its step asks where the run stands")
            elif kinds[:1] != [Update] or any(kind is not Follow for kind in kinds[1:]):
                self._give_up(f"its step yields {', '.join(kind.__name__ for kind in kinds)}")
        self._plain_steps += 1

    @contextmanager
    def event(self, phase: int, noise: BatchNoise) -> Iterator[list[Event | None]]:
        """While a plain step's method goes to its event of that number, which is to be put into the list."""
        came: list[Event | None] = []
        if not self._looks:
            yield came
            return
        before, operations = self._generator(), _Operations()
        with _waits(self._device) as waits, operations if phase else nullcontext():
            yield came
        # Without their graphs: a parameter's last node, once kept, stays on the stream of this step, which a recording
        # would have to wait for, and may not.
        self._events += [_apart(e, Tensor.detach) if isinstance(e, Update) else e for e in came if e is not None]
        if waits:
            self._give_up("its step waits for the device")
        elif operations.count:
            self._give_up("its step computes after its update")
        elif not torch.equal(before, self._generator()):
            self._give_up("its step draws from torch's generator")
        elif noise.drew_in_common:
            self._give_up("its step draws on the host")

    def _generator(self) -> Tensor:
        """Where torch's generators of host and device stand."""
        host = torch.default_generator.get_state()
        return host if self._device.type != "cuda" else torch.cat([host, torch.cuda.get_rng_state(self._device)])

    # --- recording ----------------------------------------------------------------------------------------------------

    def step(self, batch: Example, seed: int, step: int) -> list[Event] | None:
        """Gradients, in the part's parameters, and the events that they belong to. None where there is no recording."""
        if self._replay is None:
            with self._unmarked():
                self._record(batch)
                self._compare(batch, seed, step)
        if self._replay is None or [_layout(t) for t in _tensors(batch)] != [_layout(t) for t in _tensors(self._batch)]:
            return None
        self._repeat(batch, seed, step)
        for parameter, gradient in zip(self._learners[self._update.part].parameters, self._gradients, strict=True):
            parameter.grad = gradient
        return [_apart(self._update, Tensor.clone), *self._events[1:]]

    def _repeat(self, batch: Example, seed: int, step: int) -> None:
        assert self._replay is not None
        torch._foreach_copy_(_tensors(self._batch), _tensors(batch))
        self._noise.tell(seed, step)
        self._replay()

    def _record(self, batch: Example) -> None:
        learner = self._learners[self._events[0].part]
        if kept(learner.parameters):
            self._give_up("it cannot be recorded: something keeps the graph of a step before")
            return
        # The other way round, so that whatever of it is not read from there, but recorded, is seen to differ.
        self._batch = batch.map(lambda t: t.flip(0))
        try:
            self._replay = recorded(self._work, self._device)
        except RuntimeError as error:
            self._give_up(f"it cannot be recorded: {error}")
            self._batch = self._update = self._gradients = None  # whose memory is a whole pass's
        learner.optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def _unmarked(self) -> Iterator[None]:
        """Passes within it leave what they write beside gradients as it was: norms of batches, notes of modules."""
        written = [buffer for role in self._parts.roles.values() for buffer in role.module.buffers()]
        before = [buffer.clone() for buffer in written]
        try:
            yield
        finally:
            for buffer, value in zip(written, before, strict=True):
                buffer.copy_(value)

    def _work(self) -> None:
        """The pass itself, from the recording's batch and noise, into its update and gradients."""
        self._update, self._gradients = self._pass(self._batch, self._noise)

    def _pass(self, batch: Example, noise: BatchNoise) -> tuple[Any, list[Tensor | None]]:
        learner = self._learners[self._events[0].part]
        learner.optimizer.zero_grad(set_to_none=True)
        with noise.for_networks(0), casts(self._precision, self._device):
            update: Any = next(iter(self._method.step(self._parts, batch, noise, Clock(0, 0, 1))))
        # Not the last: what several processes exchange is no part of a recording.
        learner.backward(summed(update.loss) / (self._size * update.loss[0].numel()), last=False)
        return _apart(update, Tensor.detach), [p.grad for p in learner.parameters]

    def _compare(self, batch: Example, seed: int, step: int) -> None:
        """Give the recording up where its first repetition is not what a plain step computes of the same."""
        if self._replay is None:
            return
        plain, gradients = self._pass(batch, BatchNoise(seed, step, self._places, self._size, self._device))
        self._repeat(batch, seed, step)
        self._learners[plain.part].optimizer.zero_grad(set_to_none=True)
        loss, others = float(plain.loss.mean()), float(self._update.loss.mean())
        apart = _distance(gradients, self._gradients)
        if not (abs(loss - others) <= AGREE * abs(loss) and apart <= AGREE):
            self._replay = self._batch = self._update = self._gradients = None
            self._give_up(
                f"repeated, its loss is {others:.6g} where a plain step's is {loss:.6g}, and its gradient {apart:.2g} "
                "of that one's length away"
            )


def _distance(ones: Sequence[Tensor | None], others: Sequence[Tensor | None]) -> float:
    """Between two gradients, in units of the first one's length."""
    pairs = [(a, b) for a, b in zip(ones, others, strict=True) if a is not None and b is not None]
    between = torch.stack([(a - b).double().square().sum() for a, b in pairs]).sum()
    length = torch.stack([a.double().square().sum() for a, _ in pairs]).sum()
    return float((between / length.clamp(min=1e-300)).sqrt())


def _apart(update: Update, function: Callable[[Tensor], Tensor]) -> Update:
    """The update with a function of each of its tensors."""
    parts = {name: function(tensor) for name, tensor in update.parts.items()}
    at = None if update.at is None else function(update.at)
    return replace(update, loss=function(update.loss), parts=parts, at=at)


def kept(parameters: Sequence[Tensor]) -> bool:
    """Whether anything holds a pass through these parameters, so that the next one meets the nodes of that one."""

    def notes(parameter: Tensor) -> Any:
        """Of its node, which is a new one unless something holds it."""
        return get_gradient_edge(parameter).node.metadata

    for parameter in parameters:
        notes(parameter)["imagewright"] = True
    return any("imagewright" in notes(parameter) for parameter in parameters)


def _tensors(batch: Example) -> list[Tensor]:
    found: list[Tensor] = []
    batch.map(lambda t: found.append(t) or t)  # type: ignore[func-returns-value]
    return found


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.stride()


@contextmanager
def _waits(device: torch.device) -> Iterator[list[str]]:
    """What torch says about waiting for the device while the body runs."""
    found: list[str] = []
    if device.type != "cuda":
        yield found
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)
    found += [str(w.message) for w in told if "called a synchronizing" in str(w.message)]


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what is computed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))
