"""The training loop: it drives a method's generator, one optimiser step per yielded `Update`, and knows no paper."""

from __future__ import annotations

import itertools
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict

import torch
from torch import nn

from imagewright.data import Loader
from imagewright.data.loader import Turns
from imagewright.moving import sent
from imagewright.networks.compiling import compile_network
from imagewright.networks.recompute import blocks
from imagewright.noise import BatchNoise
from imagewright.precision import casts, tf32, wide
from imagewright.shapes import Within, misfit
from imagewright.training.checkpoint import (
    State,
    checkpoint_path,
    checkpoints,
    copied,
    load_checkpoint,
    newest,
    require_fit,
)
from imagewright.training.config import TrainingConfig
from imagewright.training.distributed import Processes
from imagewright.training.ema import Following, Power
from imagewright.training.graphs import Graphs, in_vain
from imagewright.training.interrupts import Interrupted, interrupts
from imagewright.training.learners import Learner, summed
from imagewright.training.log import Log
from imagewright.training.parallel import Whole, hold
from imagewright.training.saving import Saver
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
        self.held: dict[str, Whole] = {}
        self.learners = self._prepare()
        sharded = any(held.local for held in self.held.values())
        self._saver = Saver(self.processes, config.keep_checkpoints, run, shares=sharded)
        self.graphs = self._graphs(mine)

    # --- set-up -------------------------------------------------------------------------------------------------------

    def _prepare(self) -> dict[str, Learner]:
        learners, shard = {}, self.config.parallel == "shard" and self.processes.world > 1
        for name, role in self.parts.roles.items():
            role.module.to(self.device)
            if self.config.channels_last and not shard:  # shards are rows in the plain order
                role.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            role.module.train(not isinstance(role, Frozen))
            if not isinstance(role, Trained):
                role.module.requires_grad_(False)
            self.held[name] = hold(role.module, self.processes, self.device, shard=shard)
            if isinstance(role, Trained):
                learners[name] = Learner(role, self.config, self.device, self.held[name])
            for block in blocks(role.module):
                block.recompute = self.config.recompute
            if self.config.compile and not isinstance(role, Average):
                # The network, not the wrapper: methods also call a model by other names than forward.
                compile_network(getattr(role.module, "network", role.module))
        if self.method.product not in learners:
            raise ValueError(f"the method's product {self.method.product!r} is not among its trained parts")
        return learners

    def _graphs(self, mine: range) -> Graphs | None:
        """What replays steps; None where nothing can, or shall."""
        config, why_not = self.config, None
        if self.device.type != "cuda":
            why_not = f"the device is {self.device.type}"
        elif len(mine) > 1 or self.processes.world > 1:
            why_not = "gradients of several micro-batches or processes leave in the midst of a pass"
        elif config.precision == "fp16":
            why_not = "fp16 scales its losses"
        if config.graphs and why_not:
            in_vain(why_not)
        if not config.graphs or why_not:
            return None
        places = range(mine.start * self.micro, mine.stop * self.micro)
        return Graphs(self.method, self.parts, self.learners, config.precision, config.batch, places, self.device)

    # --- state --------------------------------------------------------------------------------------------------------

    def state(self) -> State:
        """All that a run needs to go on as if it had never stopped."""
        return {
            "step": self.step_index,
            "images": self.images,
            "learners": {name: learner.state() for name, learner in self.learners.items()},
            "targets": {n: {k: h.share(k, v) for k, v in h.state.items()} for n, h in self._targets().items()},
        }

    def load_state(self, state: State) -> None:
        """Inverse of `state`. Raises UserError where it is of other parts, or of a step that has other images."""
        fault = misfit(state, _State)
        if fault is None and state["images"] != state["step"] * self.config.batch:
            fault = f"it is of step {state['step']} and {state['images']} images; a batch has {self.config.batch}"
        targets = self._targets()
        for found, wanted in (("learners", self.learners), ("targets", targets)):
            if fault is None and state[found].keys() != wanted.keys():
                fault = f"{found} are {', '.join(state[found])}; this run has {', '.join(wanted)}"
        if fault is not None:
            raise UserError(f"the checkpoint is damaged: {fault}")
        mine = {n: {k: h.mine(k, v) for k, v in state["targets"][n].items()} for n, h in targets.items()}
        for name, held in targets.items():
            require_fit(mine[name], held.state, f"the checkpoint's target {name}")
        for name, learner in self.learners.items():
            learner.load_state(state["learners"][name])
        for name, held in targets.items():
            copied(mine[name], held.state)
        self.step_index, self.images = state["step"], state["images"]

    def _targets(self) -> dict[str, Whole]:
        return {n: self.held[n] for n, role in self.parts.roles.items() if isinstance(role, Average)}

    def save(self, *, wait: bool = True) -> Path:
        """Write a checkpoint and remove old ones. Raises UserError for a run that is no good, or a full disk.

        wait: until it is there, in all processes; else it is written while the run goes on.
        """
        self._look()
        path = checkpoint_path(self.folder, self.images)
        self.log.write(self.step_index, self.images, {})  # what a run that goes on from here would not know
        self._saver.begin(path, self.state)
        if wait:
            self._saver.finish()
            self.processes.wait()
        return path

    def resume(self) -> bool:
        """Load the newest checkpoint of the folder; False if there is none. Raises UserError if it is damaged.

        The newest is what the first process finds: another may look while that is still being written.
        """
        found = newest(self.folder)
        images = int(self.processes.from_first(-1 if found is None else found))
        if images >= 0:
            path = checkpoint_path(self.folder, images)
            state = load_checkpoint(path, self.run, whole=False)
            try:
                self.load_state(state)
            except UserError as error:
                raise UserError(f"{path}: {error}") from None
        self.log.truncate(self.step_index)  # without a checkpoint too: the first attempt may have left lines
        return images >= 0

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
        learner = self.learners[self.method.product]
        powers = {a.profile.name: a.state for a in learner.averages if isinstance(a.profile, Power)}
        for kind, tensors in {"raw": learner.held.state, **powers}.items():
            whole = learner.held.gathered(tensors)
            if self.processes.is_first:
                store(self.folder.parent, kind, self.images, whole)

    def product_state(self) -> dict[str, torch.Tensor]:
        """Averaged weights of the method's product (raw ones where it has no average); on the first process, whole."""
        learner = self.learners[self.method.product]
        return learner.held.gathered(learner.averages[0].state if learner.averages else learner.held.state)

    def product(self) -> nn.Module | None:
        """The product with these weights, a module of its own; None on other processes than the first. All ask."""
        whole = self.product_state()
        return self.held[self.method.product].copied(whole) if self.processes.is_first else None

    # --- the loop -----------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Train until `total_images`, with checkpoints and snapshots on the way.

        The checkpoint is the last that is written of a moment, so that a run which goes on from it lacks nothing. Only
        a signal is answered by a checkpoint first, as more time may not be given; then the rest is made on resuming.
        Raises Interrupted after a signal (state and model saved), UserError when a loss stops being finite.
        """
        started, first_images = time.monotonic(), self.images
        with self._saver, interrupts() as interrupted, tf32(self.config.tf32):
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
                if self._passed(self.config.checkpoint_images) and self.images < self.config.total_images:
                    self.save(wait=False)
                self._saver.look()
            self.save()

    def _passed(self, interval: float) -> bool:
        """Whether the last step crossed a multiple of `interval` images."""
        return self.images // interval > (self.images - self.config.batch) // interval

    def train_step(self) -> float:
        """One step of the method on one batch. Returns the mean loss of the product's newest update that is known."""
        clock = Clock(self.step_index, self.images, self.config.total_images)
        if self.graphs is None:
            self._plain_step(clock, clock)
        elif not (self.graphs.ready and self._replayed_step(self.graphs, clock)):
            with self.graphs.plain(clock) as watched:
                self._plain_step(clock, watched)
        self.step_index += 1
        self.images += self.config.batch
        return self.watch.losses.get(self.method.product, math.nan)

    def _replayed_step(self, graphs: Graphs, clock: Clock) -> bool:
        """The step by its recording; False, and nothing has happened, where there is none."""
        (j,) = self._micro_batches()
        events = graphs.step(self._batch(j, clock), self.config.seed, clock.step)
        for event in events or ():
            self._answer([event])
        return events is not None

    def _plain_step(self, clock: Clock, told: Clock) -> None:
        """told: the clock that the method sees."""
        mine = self._micro_batches()
        noises = [self._noise(j, clock) for j in mine]
        steps = [self._events(j, noise, clock, told) for j, noise in zip(mine, noises, strict=True)]
        for held in self.held.values():
            held.begin()
        for phase in itertools.count():
            events: list[Event | None] = []
            for noise, generator in zip(noises, steps, strict=True):
                events.append(self._next(generator, noise, phase, last=noise is noises[-1]))
            if any(_kind(e) != _kind(events[0]) for e in events):
                raise ValueError(f"micro-batches of one step yielded different events: {[_kind(e) for e in events]}")
            if events[0] is None:
                break
            self._answer(events)

    def _next(self, generator: Iterator[Event], noise: BatchNoise, phase: int, *, last: bool) -> Event | None:
        """One micro-batch's next event, with its gradients; None at the end. last: of the step's micro-batches."""
        with noise.for_networks(phase):
            with casts(self.config.precision, self.device):
                if self.graphs is None:
                    event = next(generator, None)
                else:
                    with self.graphs.event(phase, noise) as came:
                        event = next(generator, None)
                        came.append(event)
            if isinstance(event, Update):
                self._backward(event, last=last)
        return event

    def _answer(self, events: Sequence[Event | None]) -> None:
        """Do what the step's micro-batches, which are at the same event, ask for."""
        event = events[0]
        if isinstance(event, Update):
            self._step([e for e in events if isinstance(e, Update)])
        elif isinstance(event, Restart):
            self.learners[event.part].restart()
        elif event is not None:
            self._follow(event)

    def _micro_batches(self) -> range:
        share = self.config.batch // self.micro // self.processes.world
        return range(self.processes.rank * share, (self.processes.rank + 1) * share)

    def _noise(self, j: int, clock: Clock) -> BatchNoise:
        places = range(j * self.micro, (j + 1) * self.micro)
        return BatchNoise(self.config.seed, clock.step, places, self.config.batch, self.device)

    def _events(self, j: int, noise: BatchNoise, clock: Clock, told: Clock) -> Iterator[Event]:
        """The method's step on one micro-batch, whose images are asked for when it begins and not before."""
        yield from self.method.step(self.parts, self._batch(j, clock), noise, told)

    def _batch(self, j: int, clock: Clock) -> Any:
        return self.loader.batch(clock.images + j * self.micro, self.micro).map(self._here)

    def _here(self, tensor: torch.Tensor) -> torch.Tensor:
        """On the run's device, and images in its memory format."""
        tensor = sent(tensor, self.device)
        images = tensor.ndim == 4 and tensor.is_floating_point() and self.config.channels_last
        return tensor.contiguous(memory_format=torch.channels_last) if images else tensor

    def _backward(self, update: Update, *, last: bool) -> None:
        # Dividing the sum by the whole batch makes accumulation, and more processes, add up to one mean.
        loss = summed(update.loss) / (self.config.batch * update.loss[0].numel())
        self.learners[update.part].backward(loss, last=last)

    def _step(self, updates: Sequence[Update]) -> None:
        part = updates[0].part
        learner = self.learners[part]
        total = sum((summed(u.loss.detach()) for u in updates), torch.zeros((), device=self.device))
        loss = wide(self.processes.total(total)) / (self.config.batch * updates[0].loss[0].numel())
        norm = learner.gradient()
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
            self._saver.finish()
            good = checkpoints(self.folder)
            last, seen = good[-1] if good else "none yet", found.seen
            raise UserError(
                f"training stopped at step {seen.step} ({seen.images} images): the {found.what} of part {seen.part!r} "
                f"is not finite; last good checkpoint: {last}"
            ) from None

    def _follow(self, event: Follow) -> None:
        pair = (event.part, event.of)
        if pair not in self._following:
            self._following[pair] = Following(*(self.held[n].state for n in pair))
        self._following[pair].move(1 - event.decay)


def _kind(event: Event | None) -> tuple[str, ...]:
    if event is None:
        return ("end",)
    return (type(event).__name__, event.part)


__all__ = ["Interrupted", "Progress", "Trained", "Trainer"]
