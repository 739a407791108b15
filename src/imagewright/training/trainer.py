"""The training loop: it drives a method's generator, one optimiser step per yielded `Update`, and knows no paper."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, TypedDict

import torch

from imagewright.data import Loader
from imagewright.data.loader import Turns
from imagewright.errors import ENDINGS
from imagewright.noise import BatchNoise
from imagewright.precision import casts, tf32, wide
from imagewright.shapes import Within, misfit
from imagewright.training.checkpoint import (
    State,
    checkpoint_path,
    checkpoints,
    load_checkpoint,
    prune,
    require_fit,
    save_checkpoint,
)
from imagewright.training.config import TrainingConfig
from imagewright.training.distributed import Processes
from imagewright.training.ema import Following, Power
from imagewright.training.learners import Learner
from imagewright.training.log import Log
from imagewright.training.snapshots import snapshot_path
from imagewright.training.watch import NotFinite, Seen, Watch
from imagewright.training.weights import store
from imagewright.types import (
    Average,
    Clock,
    Event,
    Follow,
    Frozen,
    Method,
    Parts,
    Restart,
    Trained,
    Update,
    UserError,
)


class Interrupted(Exception):  # noqa: N818, not an error: the user asked for it
    """A signal was honoured after a whole step; the state is saved at `checkpoint`. signal: its number."""

    def __init__(self, checkpoint: Path, number: int) -> None:
        super().__init__(str(checkpoint))
        self.checkpoint, self.number = checkpoint, number


@dataclass(frozen=True)
class Progress:
    """What a progress bar shows: images done, of how many, images per second since the start, newest mean loss."""

    images: int
    total_images: int
    rate: float
    loss: float


class _State(TypedDict):
    step: Annotated[int, Within(0)]
    images: Annotated[int, Within(0)]
    learners: dict[str, dict[str, Any]]
    targets: dict[str, dict[str, Any]]


class Trainer:
    """One run in memory. `train()` goes on from where the clock stands until total_images.

    folder: where checkpoints go. run: what they are of (`record.identity`).
    on_snapshot: called at every snapshot and at the end with the images seen.
    on_stop: called where a signal ends the run early, so that what there is can be used.
    on_progress: called after every step.
    """

    def __init__(
        self,
        method: Method,
        parts: Parts,
        loader: Loader,
        config: TrainingConfig,
        folder: Path,
        *,
        log: Log | None = None,
        device: torch.device | str = "cpu",
        processes: Processes | None = None,
        run: str | None = None,
        on_snapshot: Callable[[int], None] = lambda images: None,
        on_stop: Callable[[int], None] = lambda images: None,
        on_progress: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        config = config.in_images()
        self.method, self.parts, self.loader, self.config, self.folder = method, parts, loader, config, folder
        self.device = torch.device(device)
        self.processes = processes or Processes()
        self.log = log or Log(None)
        self.run = run
        self.on_snapshot, self.on_stop, self.on_progress = on_snapshot, on_stop, on_progress
        self.micro = config.micro_batch or max(config.batch // self.processes.world, 1)
        if config.batch % (self.micro * self.processes.world):
            raise UserError(
                f"training.batch is {config.batch}; it must be a multiple of micro_batch x processes "
                f"({self.micro} x {self.processes.world})"
            )
        mine = self._micro_batches()
        whole, start = config.batch, mine.start * self.micro
        turns = Turns(stride=whole, first=start, count=len(mine), size=self.micro, end=config.total_images)
        loader.follow(turns, self.device)
        self.step_index, self.images = 0, 0
        self.watch = Watch(self.device)
        self._following: dict[tuple[str, str], Following] = {}
        self.learners = self._prepare()

    # --- set-up -------------------------------------------------------------------------------------------------------

    def _prepare(self) -> dict[str, Learner]:
        learners = {}
        for name, role in self.parts.roles.items():
            role.module.to(self.device)
            if self.config.channels_last:
                role.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            if isinstance(role, Frozen):
                role.module.eval().requires_grad_(False)
            elif isinstance(role, Average):
                role.module.train().requires_grad_(False)
            else:
                role.module.train()
                learners[name] = Learner(role, self.config, self.device)
            if self.config.compile and not isinstance(role, Average):
                # The network, not the wrapper: methods also call a model by other names than forward.
                getattr(role.module, "network", role.module).compile()
        if self.method.product not in learners:
            raise ValueError(f"the method's product {self.method.product!r} is not among its trained parts")
        return learners

    # --- state --------------------------------------------------------------------------------------------------------

    def state(self) -> State:
        """All that a run needs to go on as if it had never stopped."""
        averages = {n: r for n, r in self.parts.roles.items() if isinstance(r, Average)}
        return {
            "step": self.step_index,
            "images": self.images,
            "learners": {name: learner.state() for name, learner in self.learners.items()},
            "targets": {name: dict(role.module.state_dict()) for name, role in averages.items()},
        }

    def load_state(self, state: State) -> None:
        """Inverse of `state`. Raises UserError where it is of other parts, or of a step that has other images."""
        fault = misfit(state, _State)
        if fault is None and state["images"] != state["step"] * self.config.batch:
            fault = f"it is of step {state['step']} and {state['images']} images; a batch has {self.config.batch}"
        targets = {n: r.module for n, r in self.parts.roles.items() if isinstance(r, Average)}
        for found, wanted in (("learners", self.learners), ("targets", targets)):
            if fault is None and state[found].keys() != wanted.keys():
                fault = f"{found} are {', '.join(state[found])}; this run has {', '.join(wanted)}"
        if fault is not None:
            raise UserError(f"the checkpoint is damaged: {fault}")
        for name, module in targets.items():
            require_fit(state["targets"][name], module.state_dict(), f"the checkpoint's target {name}")
        for name, learner in self.learners.items():
            learner.load_state(state["learners"][name])
        for name, module in targets.items():
            module.load_state_dict(state["targets"][name])
        self.step_index, self.images = state["step"], state["images"]

    def save(self) -> Path:
        """Write a checkpoint (first process only) and remove old ones. Raises UserError for a run that is no good."""
        self._look()
        path = checkpoint_path(self.folder, self.images)
        self.log.write(self.step_index, self.images, {})  # what a run that goes on from here would not know
        if self.processes.is_first:
            save_checkpoint(path, self.state(), self.run)
            prune(self.folder, self.config.keep_checkpoints)
        self.processes.wait()
        return path

    def resume(self) -> bool:
        """Load the newest checkpoint of the folder; False if there is none. Raises UserError if it is damaged."""
        found = checkpoints(self.folder)
        if found:
            state = load_checkpoint(found[-1], self.run)
            try:
                self.load_state(state)
            except UserError as error:
                raise UserError(f"{found[-1]}: {error}") from None
        self.log.truncate(self.step_index)  # without a checkpoint too: the first attempt may have left lines
        return bool(found)

    def _leave(self, again: bool = False) -> None:
        """Write what is due at this moment besides the checkpoint; again: a snapshot only where there is none."""
        there = again and snapshot_path(self.folder.parent, self.images).exists()
        if self._passed(self.config.snapshot_images) and not there:
            self._look()
            self.on_snapshot(self.images)
        if self.config.weights_images is not None and self._passed(self.config.weights_images):
            self._keep_weights()

    def _keep_weights(self) -> None:
        """Store the product's weights and power averages beside the checkpoints (first process only)."""
        self._look()
        if self.processes.is_first:
            learner = self.learners[self.method.product]
            store(self.folder.parent, "raw", self.images, learner.module.state_dict())
            for average in learner.averages:
                if isinstance(average.profile, Power):
                    store(self.folder.parent, average.profile.name, self.images, average.state)

    def product_state(self) -> dict[str, torch.Tensor]:
        """Averaged weights of the method's product (raw ones where it has no average)."""
        learner = self.learners[self.method.product]
        return learner.averages[0].state if learner.averages else dict(learner.module.state_dict())

    # --- the loop -----------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Train until `total_images`, with checkpoints and snapshots on the way.

        The checkpoint is the last that is written of a moment, so that a run which goes on from it lacks nothing. Only
        a signal is answered by a checkpoint first, as more time may not be given; then the rest is made on resuming.
        Raises Interrupted after a signal (state and model saved), UserError when a loss stops being finite.
        """
        started, first_images = time.monotonic(), self.images
        with _interrupts() as interrupted, tf32(self.config.tf32):
            if self.images:
                self._leave(again=True)
            while self.images < self.config.total_images:
                loss = self.train_step()
                logs = self._passed(self.config.log_images)
                if logs:
                    self._look()
                rate = (self.images - first_images) / (time.monotonic() - started)
                self.on_progress(Progress(self.images, self.config.total_images, rate, loss))
                if logs:
                    self.log.write(self.step_index, self.images, {"images_per_second": rate})
                if self.processes.any(bool(interrupted)) and self.images < self.config.total_images:
                    saved = self.save()
                    self.on_stop(self.images)
                    raise Interrupted(saved, interrupted[0] if interrupted else signal.SIGTERM)
                self._leave()
                if self._passed(self.config.checkpoint_images):
                    self.save()
        self.save()

    def _passed(self, interval: float) -> bool:
        """Whether the last step crossed a multiple of `interval` images."""
        return self.images // interval > (self.images - self.config.batch) // interval

    def train_step(self) -> float:
        """One step of the method on one batch. Returns the mean loss of the product's newest update that is known."""
        clock = Clock(self.step_index, self.images, self.config.total_images)
        mine = self._micro_batches()
        noises = [self._noise(j, clock) for j in mine]
        steps = [self._events(j, noise, clock) for j, noise in zip(mine, noises, strict=True)]
        phase = 0
        while True:
            events: list[Event | None] = []
            for noise, generator in zip(noises, steps, strict=True):
                with noise.for_networks(phase):
                    with casts(self.config.precision, self.device):
                        event = next(generator, None)
                    if isinstance(event, Update):
                        self._backward(event)
                events.append(event)
            if any(_kind(e) != _kind(events[0]) for e in events):
                raise ValueError(f"micro-batches of one step yielded different events: {[_kind(e) for e in events]}")
            if events[0] is None:
                break
            if isinstance(events[0], Update):
                self._step([e for e in events if isinstance(e, Update)])
            elif isinstance(events[0], Restart):
                self.learners[events[0].part].restart()
            else:
                self._follow(events[0])
            phase += 1
        self.step_index += 1
        self.images += self.config.batch
        return self.watch.losses.get(self.method.product, math.nan)

    def _micro_batches(self) -> range:
        share = self.config.batch // self.micro // self.processes.world
        return range(self.processes.rank * share, (self.processes.rank + 1) * share)

    def _noise(self, j: int, clock: Clock) -> BatchNoise:
        places = range(j * self.micro, (j + 1) * self.micro)
        return BatchNoise(self.config.seed, clock.step, places, self.config.batch, self.device)

    def _events(self, j: int, noise: BatchNoise, clock: Clock) -> Iterator[Event]:
        """The method's step on one micro-batch, whose images are asked for when it begins and not before."""
        yield from self.method.step(self.parts, self._batch(j, clock), noise, clock)

    def _batch(self, j: int, clock: Clock) -> Any:
        return self.loader.batch(clock.images + j * self.micro, self.micro).map(self._here)

    def _here(self, tensor: torch.Tensor) -> torch.Tensor:
        """On the run's device, and images in its memory format."""
        tensor = tensor.to(self.device, non_blocking=True)
        images = tensor.ndim == 4 and tensor.is_floating_point() and self.config.channels_last
        return tensor.contiguous(memory_format=torch.channels_last) if images else tensor

    def _backward(self, update: Update) -> None:
        # Dividing the sum by the whole batch makes accumulation, and more processes, add up to one mean.
        self.learners[update.part].backward(update.loss.sum() / (self.config.batch * update.loss[0].numel()))

    def _step(self, updates: Sequence[Update]) -> None:
        part = updates[0].part
        learner = self.learners[part]
        total = sum((u.loss.detach().sum() for u in updates), torch.zeros((), device=self.device))
        loss = wide(self.processes.total(total)) / self.config.batch
        norm = learner.gradient(self.processes)
        scaled = learner.scaler.is_enabled()
        seen = Seen(part, self.step_index, self.images, loss, norm, scaled)
        with self._told():
            halted = self.watch.note(seen, patient=learner.can_halt)
        numbers = {"grad_norm": norm, "overflow": 1 - torch.isfinite(norm).float()} if scaled else {"grad_norm": norm}
        rate = learner.step(self.images + self.config.batch, updates[0].rate, halted)
        self.log.add(part, updates, loss, {"lr": rate, **numbers})

    def _look(self) -> None:
        """Wait for the device, and stop the run if anything was not finite since the last time."""
        with self._told():
            self.watch.look()

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What was found not to be finite, as a sentence."""
        try:
            yield
        except NotFinite as found:
            good = checkpoints(self.folder)
            last, seen = good[-1] if good else "none yet", found.seen
            raise UserError(
                f"training stopped at step {seen.step} ({seen.images} images): the {found.what} of part {seen.part!r} "
                f"is not finite; last good checkpoint: {last}"
            ) from None

    def _follow(self, event: Follow) -> None:
        pair = (event.part, event.of)
        if pair not in self._following:
            self._following[pair] = Following(*(self.parts.roles[n].module.state_dict() for n in pair))
        self._following[pair].move(1 - event.decay)


def _kind(event: Event | None) -> tuple[str, ...]:
    if event is None:
        return ("end",)
    return (type(event).__name__, event.part)


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Collect signals that announce the end instead of dying in mid-step; a second one kills as usual.

    One that is ignored stays ignored: `nohup` asks for that.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous = {s: handler for s in ENDINGS if (handler := signal.getsignal(s)) != signal.SIG_IGN}

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, previous[signal.Signals(number)] or signal.SIG_DFL)

    for number in previous:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler or signal.SIG_DFL)


__all__ = ["Interrupted", "Progress", "Trained", "Trainer"]
